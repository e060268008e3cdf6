"""The state of T5X's Adafactor as that of `optimizers.adafactor`, and back: step and second moments.

T5X's Adafactor with its standard logical factor rules (adafactor.py in its sources) has two ways of factoring an array.
One of at most two dimensions without one of layers goes by size: both at least 128, the smaller is the row. Any other
goes by the names of its axes, whatever its sizes: 'embed' is the row, heads, their size and the MLP's units are the
column, layers are neither, and what has a bucket of relative positions is not factored.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from meshway.framework.axes import Names
from meshway.framework.conversion.rules import Form, Group, Piece, Shape
from meshway.framework.conversion.settings import Bindings
from meshway.framework.conversion.t5x_files import SLOTS, T5XArrays, T5XFiles
from meshway.framework.conversion.values import Values
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Params
from meshway.framework.optimizers.adafactor import COLUMN, NONE, ROW, AdafactorState, FactorRules, factored_dims
from meshway.framework.optimizers.transforms import adafactor
from meshway.framework.trees import map_paths

# Arguments of T5X's Adafactor that ours calls the same; beta1 is one where there is momentum.
_ADAFACTOR = (
    *("decay_rate", "step_offset", "clipping_threshold", "multiply_by_parameter_scale", "epsilon1", "epsilon2"),
    *("weight_decay_rate", "weight_decay_rate_lr_exponent", "max_parameter_scale", "skip_nan_updates"),
)
_RATE = "create_learning_rate_scheduler"
_FACTORS = ("factors", "decay_factor", "steps_per_decay", "steps_per_cycle", "step_offset", "min_learning_rate")
_SCHEDULE = {"base_learning_rate": "LEARNING_RATE", "warmup_steps": "WARMUP_STEPS"}
_SCHEDULE |= {name: f"schedules.t5_factors.{name}" for name in _FACTORS}
# The defaults of T5X's function, where a recipe binds something to it.
_SCHEDULED = {"factors": "constant * linear_warmup * rsqrt_decay", "base_learning_rate": 0.5, "warmup_steps": 1000}
MIN_DIM_SIZE = 128  # T5X's min_dim_size_to_factor, as it is where no recipe binds it
UNUSED = (1,)  # the shape of a slot without values, in both
_ATTENTION = {"embed": ROW, "heads": COLUMN, "kv_heads": COLUMN, "head_dim": COLUMN}
_SCANNED = _ATTENTION | {"mlp": COLUMN, "relpos_buckets": NONE}

Slots = dict[str, dict[str, Values]]  # one of `SLOTS` -> parameter -> its values; what is unused is left out


def factor_rules(scanned: bool, splits_heads: bool) -> dict[str, str] | None:
    """Returns the `logical_factor_rules` by which ours factors what T5X factors by names; None where that is nothing.

    Args:
      scanned: whether layers lie in one array.
      splits_heads: whether heads and their size are two dimensions.
    """
    return dict(_SCANNED) if scanned else dict(_ATTENTION) if splits_heads else None


@dataclasses.dataclass(frozen=True)
class SlotPiece:
    """One array of T5X's state and where it lies in ours.

    Attributes:
      theirs: its name, as "decoder/decoder_norm/scale/v".
      slot: 'v_row', 'v_col', 'v' of ours, or 'm', its momentum; '' for one that is unused, [1].
      piece: the parameter's entries, with the form of this slot.
    """

    theirs: str
    slot: str
    piece: Piece

    @property
    def their_shape(self) -> Shape:
        """The array's shape."""
        return self.piece.their_shape if self.slot else UNUSED

    def our_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Returns the shape of our slot, of all layers, for parameters [shapes]."""
        lead = shapes[self.piece.ours[0]][: len(self.piece.index)]
        return (*lead, *(self.piece.sizes[name] for name in self.piece.form.ours))


def slot_pieces(
    pieces: Sequence[Piece],
    shapes: Mapping[str, Shape],
    axes: Mapping[str, Names],
    rules: FactorRules | None,
    factored: bool = True,
    momentum: bool = False,
) -> list[SlotPiece]:
    """Returns how the state of parameters lies in T5X: `SLOTS` of each tensor.

    Args:
      pieces: the parameters' tensors.
      shapes, axes: of the parameters.
      rules: `factor_rules` of the network.
      factored: False where all second moments are kept.
      momentum: whether there is one (beta1).

    Raises:
      UserError: ours would factor another parameter than T5X, or some arrays hold several parameters.
    """
    if fused := [piece.theirs for piece in pieces if len(piece.ours) != 1]:
        raise UserError(f"{fused[0]} holds several parameters: its optimizer state is not converted, leave it out")
    found = []
    for piece in pieces:
        (path,) = piece.ours
        lead = len(piece.index)
        ours = factored_dims(axes[path], shapes[path], MIN_DIM_SIZE, rules) if factored else None
        named = dict(zip(piece.form.ours, axes[path][lead:], strict=True))
        theirs = _their_factors(piece, named) if factored else None
        if (ours is None) != (theirs is None):
            raise UserError(
                f"the second moments of {path} are {'whole' if theirs is None else 'factored'} in T5X's Adafactor and "
                "not so in ours: this optimizer state is not converted, take the parameters alone"
            )
        if ours is None or theirs is None:
            slots = {"v": ("v", Group())}
        else:
            rows = {piece.form.ours[dim - lead] for dim in ours[0]}
            row, column = ("v_row", "v_col") if rows == set(theirs[0]) else ("v_col", "v_row")
            slots = {"v_row": (row, theirs[1]), "v_col": (column, theirs[0])}
        if momentum:
            slots["m"] = ("m", Group())
        for name in SLOTS:
            slot, left_out = slots.get(name, ("", Group()))
            own = dataclasses.replace(piece, form=_without(piece.form, left_out))
            found.append(SlotPiece(f"{piece.theirs}/{name}", slot, own))
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the arrays of a checkpoint tell of its Adafactor.

    Attributes:
      rules: `factor_rules` of its network.
      factored: False where all second moments are kept.
      momentum: the dtype in which it is kept; None where there is none (no beta1).
    """

    rules: FactorRules | None
    factored: bool
    momentum: np.dtype | None

    @classmethod
    def of(cls, moments: T5XArrays, network: T5XArrays, rules: FactorRules | None) -> "Kind":
        """Returns the kind of a state, beside the parameters of `network`.

        Raises:
          UserError: momentum is kept in several dtypes, or in one that is not converted.
        """
        used = {name.rpartition("/")[2] for name in moments if moments.shape(name) != UNUSED}
        matrices = [shape for shape in map(network.shape, network) if len(shape) == 2]
        expected = rules is not None or any(min(shape) >= MIN_DIM_SIZE for shape in matrices)
        kept = [name for name in moments if "m" in used and name.endswith("/m")]
        dtypes = {moments.dtype(name): name for name in kept}
        if len(dtypes) > 1:
            several = ", ".join(f"{name} is {dtype.name}" for dtype, name in dtypes.items())
            raise UserError(f"{moments.directory}: momentum has several dtypes: {several}; take the parameters alone")
        return cls(rules, "v_row" in used or not expected, next(iter(dtypes), None))


def settings_of(files: T5XFiles, kind: Kind) -> dict[str, Any]:
    """Returns the arguments of `optimizers.adafactor` for a kind of state, and those that a `config.gin` binds.

    Raises:
      UserError: there is momentum, and nothing tells its beta1; an argument is bound to a reference.
    """
    bound = _bound(files, "Adafactor", (*_ADAFACTOR, "beta1"))
    defaults = inspect.signature(adafactor).parameters
    found = {
        name: bound[name] for name in _ADAFACTOR if bound.get(name, defaults[name].default) != defaults[name].default
    }
    if found.get("weight_decay_rate"):
        found["decay_vectors"] = True  # T5X's decays vectors too
    if kind.momentum is not None:
        if not isinstance(bound.get("beta1"), float):
            raise UserError(
                f"{files.directory} has Adafactor's momentum, and arrays do not tell its beta1: put T5X's config.gin, "
                f"with adafactor.Adafactor.beta1, into {files.config_file.parent}, or take the parameters alone"
            )
        found["beta1"] = bound["beta1"]
        if kind.momentum != np.float32:
            found["dtype_momentum"] = kind.momentum.name
    if not kind.factored:
        return found | {"factored": False}
    return found | ({"logical_factor_rules": kind.rules} if kind.rules else {})


def schedule_of(files: T5XFiles) -> Bindings:
    """Returns the bindings of the learning rate and of clipping that the `config.gin` beside a checkpoint tells, for a
    recipe with `optimizers/adafactor.gin`.

    Raises:
      UserError: the rate is not T5X's own schedule, or something of it is bound to a reference.
    """
    text = _lines(files)
    for said in _values(text, r"(?:[\w./]*\.)?learning_rate_fn"):
        if not re.match(rf"@\S*{_RATE}\b", _without_macros(text, said)):
            raise UserError(
                f"{files.config_file}: learning_rate_fn = {said} is not T5X's {_RATE}, and is not taken over: remove "
                "that line, and bind optimizers.Optimizer.learning_rate in the recipe, or take the parameters alone"
            )
    bound = _bound(files, _RATE, tuple(_SCHEDULE))
    bound = _SCHEDULED | bound if bound else bound
    found: Bindings = {ours: bound[theirs] for theirs, ours in _SCHEDULE.items() if theirs in bound}
    norm = _bound(files, "Adafactor", ("global_norm_clip_threshold",)).get("global_norm_clip_threshold")
    return found | ({"optimizers.Optimizer.max_grad_norm": norm} if norm else {})


def _bound(files: T5XFiles, name: str, parameters: Sequence[str]) -> dict[str, Any]:
    """Returns what the `config.gin` beside a checkpoint binds parameters of a class or function to, in blocks or one by
    one.

    Raises:
      UserError: one is bound to a reference, or to a macro that is none of a value.
    """
    text = _lines(files)
    blocks = re.findall(rf"\b{name}:[ \t]*\n((?:[ \t]+.*\n|\n|#.*\n)*)", text)
    found = {}
    for parameter in parameters:
        inside = [each for block in blocks for each in _values(block, parameter)]
        if given := [*inside, *_values(text, rf"(?:.*\b)?{name}\.{parameter}")]:
            said = given[-1]
            try:
                found[parameter] = ast.literal_eval(_without_macros(text, said))
            except (ValueError, SyntaxError) as error:
                raise UserError(
                    f"{files.config_file}: {name}.{parameter} = {said} is a reference, and what it stands for is not "
                    "known here: write its value there, or take the parameters alone"
                ) from error
    return found


def _lines(files: T5XFiles) -> str:
    """Returns a `config.gin` without lines that are comments."""
    return re.sub(r"^[ \t]*#.*\n", "", files.config + "\n", flags=re.MULTILINE)


def _without_macros(text: str, value: str) -> str:
    """Returns what a value stands for where it is a macro, of macros perhaps."""
    for _ in range(8):
        if macro := re.match(r"%([\w./]+)", value):
            value = (_values(text, re.escape(macro[1])) or [value])[-1]
    return value


def _values(text: str, name: str) -> list[str]:
    """Returns the values that lines of gin bind to a name (a pattern), in their order, each in one line: gin wraps long
    ones, and indents the rest."""
    found = re.findall(rf"^([ \t]*)(?:{name}) = (.*(?:\n(?:\1[ \t]+\S.*|\1[)\]}}].*))*)", text, re.MULTILINE)
    return [re.sub(r"\s*\\?\n\s*", " ", value).strip("\\ ") for _, value in found]


def slots_in(
    moments: T5XArrays, kind: Kind, pieces: Sequence[Piece], shapes: Mapping[str, Shape], axes: Mapping[str, Names]
) -> Slots:
    """Returns the values of our state in a checkpoint.

    Raises:
      UserError: its arrays have other shapes than T5X's standard rules give.
    """
    found = slot_pieces(pieces, shapes, axes, kind.rules, kind.factored, kind.momentum is not None)
    wrong = [each for each in found if moments.shape(each.theirs) != each.their_shape]
    if wrong:
        each = wrong[0]
        raise UserError(
            f"{moments.directory}: {each.theirs} is {list(moments.shape(each.theirs))}, and T5X's standard factor "
            f"rules with min_dim_size_to_factor={MIN_DIM_SIZE} give {list(each.their_shape)}: its Adafactor was "
            "another one. Take the parameters alone"
        )
    return _assembled(found, shapes, moments, kind)


def _assembled(found: Sequence[SlotPiece], shapes: Mapping[str, Shape], moments: T5XArrays, kind: Kind) -> Slots:
    slots: Slots = {slot: {} for slot in SLOTS}
    by_slot: dict[tuple[str, str], list[SlotPiece]] = {}
    for each in found:
        if each.slot:
            by_slot.setdefault((each.slot, each.piece.ours[0]), []).append(each)
    for (slot, path), layers in by_slot.items():
        pairs = [(dataclasses.replace(each.piece, theirs=each.theirs), 0) for each in layers]
        # Our momentum is an average of what is added to parameters, T5X's of what is subtracted.
        negated = slot == "m"
        dtype = (kind.momentum if negated else None) or np.dtype(np.float32)
        slots[slot][path] = Values(layers[0].our_shape(shapes), dtype, pairs, moments, negated)
    return slots


def filled(state: Any, slots: Slots, step: int) -> Any:
    """Returns an optimizer's state with the values of T5X's.

    Args:
      state: the shapes of a state of `optimizers.adafactor`.
      slots: what `slots_in` returned.
      step: the number of updates done.

    Returns:
      the same tree; a leaf is `Values`, or an array: a count, or a slot that is unused.
    """

    def values(slot: str, tree: Params) -> Params:
        return map_paths(lambda path, leaf: slots[slot].get(path, np.zeros(leaf.shape, leaf.dtype)), tree)

    def node(each: Any) -> Any:
        count: Any = np.asarray(step, np.int32)
        if isinstance(each, AdafactorState):
            return AdafactorState(count, *[values(slot, getattr(each, slot)) for slot in ("v_row", "v_col", "v")])
        if isinstance(each, optax.EmaState):
            return optax.EmaState(count, values("m", each.ema))
        return count  # other leaves are counts of updates

    return jax.tree.map(node, state, is_leaf=lambda each: isinstance(each, (AdafactorState, optax.EmaState)))


def _their_factors(piece: Piece, named: Mapping[str, str | None]) -> tuple[Group, Group] | None:
    """Returns the names of the form that T5X takes for the row and the column of a tensor; None where it is whole."""
    groups, shape = piece.form.theirs, piece.their_shape
    if len(groups) <= 2 and "layers" not in piece.form.ours:
        if len(groups) < 2 or min(shape) < MIN_DIM_SIZE:
            return None
        row, column = sorted(range(2), key=lambda dim: shape[dim])
        return groups[row], groups[column]
    roles = {name: _SCANNED.get(axis or "", "") for name, axis in named.items()}
    sides = [tuple(name for name in piece.form.ours if roles[name] == role) for role in (ROW, COLUMN, NONE)]
    return None if sides[2] or not sides[0] or not sides[1] else (sides[0], sides[1])


def _without(form: Form, left_out: Group) -> Form:
    """Returns the form of an array that lacks some names."""

    def side(groups: Iterator[Group]) -> str:
        kept = (tuple(name for name in group if name not in left_out) for group in groups)
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in kept if group)

    return Form(f"{side(iter(form.theirs))} -> {side((name,) for name in form.ours)}")
