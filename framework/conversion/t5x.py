"""T5X's networks under our names: T5 1.1, T5 1.0 and its decoder-only example.

A stack's layers lie in T5X either side by side ("encoder/layers_3/mlp/wo/kernel") or, where they are scanned, in one
array whose second dimension is the layers ("encoder/layers/mlp/wo/kernel"; until 2023 "encoder/encoder/...").
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshway.framework.conversion.rules import Form, Rule, Shape, pieces_of
from meshway.framework.conversion.settings import Bindings
from meshway.framework.conversion.t5x_files import T5XArrays, T5XFiles
from meshway.framework.conversion.t5x_optimizer import Kind, factor_rules, filled, slots_in
from meshway.framework.conversion.values import Values, complete_values
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.adafactor import FactorRules
from meshway.framework.optimizers.optimizers import Optimizer, OptimizerState, adafactor
from meshway.framework.trees import flatten

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "linear": "linear"}
_LAYER = re.compile(r"(encoder|decoder)/(?:layers_(?P<layer>\d+)|(?P<scanned>layers|encoder|decoder))/(?P<rest>.+)")
_CONFIG = "config.gin"  # beside its checkpoints, as T5X writes it
_BIAS = "relpos_bias/rel_embedding"  # of a stack, or of each of its layers (umT5, T5X's scalable examples)
# Arguments of T5X's Adafactor that ours calls the same; beta1 is one where there is momentum.
_ADAFACTOR = ("decay_rate", "step_offset", "clipping_threshold", "multiply_by_parameter_scale", "epsilon1", "epsilon2")
Table = tuple[tuple[str, str, str], ...]  # T5X's name, ours, how dimensions differ

_VECTOR, _MATRIX = "embed -> embed", "rows columns -> rows columns"
_TABLE = "heads buckets -> heads buckets"
# T5X's minimal examples keep heads and their size in one dimension, its scalable ones in two.
_INPUTS = "embed (heads head_dim) -> embed heads head_dim"
_OUTPUTS = "(heads head_dim) embed -> heads head_dim embed"


def _attention(theirs: str, ours: str) -> Table:
    inputs = tuple((f"{theirs}/{name}/kernel", f"{ours}/{name}/kernel", _INPUTS) for name in ("query", "key", "value"))
    return (*inputs, (f"{theirs}/out/kernel", f"{ours}/out/kernel", _OUTPUTS))


_GATED: Table = (
    ("mlp/wi_0/kernel", "mlp/wi_0/kernel", _MATRIX),
    ("mlp/wi_1/kernel", "mlp/wi_1/kernel", _MATRIX),
)
_PLAIN: Table = (("mlp/wi/kernel", "mlp/wi_0/kernel", _MATRIX),)
_LAYER_NAMES: Mapping[str, Table] = {  # of one layer, but for how its MLP begins
    "encoder": (
        ("pre_attention_layer_norm/scale", "attention_norm/scale", _VECTOR),
        *_attention("attention", "attention"),
        ("pre_mlp_layer_norm/scale", "mlp_norm/scale", _VECTOR),
        ("mlp/wo/kernel", "mlp/wo/kernel", _MATRIX),
    ),
    "decoder": (
        ("pre_self_attention_layer_norm/scale", "attention_norm/scale", _VECTOR),
        *_attention("self_attention", "attention"),
        ("pre_cross_attention_layer_norm/scale", "cross_attention_norm/scale", _VECTOR),
        *_attention("encoder_decoder_attention", "cross_attention"),
        ("pre_mlp_layer_norm/scale", "mlp_norm/scale", _VECTOR),
        ("mlp/wo/kernel", "mlp/wo/kernel", _MATRIX),
    ),
}
_AROUND_DECODER: Table = (
    ("decoder/decoder_norm/scale", "decoder_norm/scale", _VECTOR),
    ("decoder/logits_dense/kernel", "logits/kernel", _MATRIX),
)
_AROUND_T5: Table = (
    ("token_embedder/embedding", "token_embedding/embedding", _MATRIX),
    ("encoder/encoder_norm/scale", "encoder_norm/scale", _VECTOR),
    *_AROUND_DECODER,
)
_AROUND_LM: Table = (
    ("decoder/token_embedder/embedding", "token_embedding/embedding", _MATRIX),
    *_AROUND_DECODER,
)


@dataclasses.dataclass(frozen=True)
class T5XNetwork:
    """What a checkpoint's network is here.

    Attributes:
      include: the gin file that its recipe begins with.
      bindings: macros of that file.
      rules: where each parameter's values lie in the checkpoint.
      factor_rules: Adafactor's `logical_factor_rules` that give second moments the shapes that T5X's have.
    """

    include: str
    bindings: Bindings
    rules: tuple[Rule, ...]
    factor_rules: FactorRules | None = None

    def values(self, files: T5XArrays, shapes: Mapping[str, Shape], dtype: np.dtype | None = None) -> dict[str, Values]:
        """Returns the parameters [shapes] of a checkpoint; see `HuggingFaceModel.values`."""
        pieces = pieces_of(self.rules, "", shapes)
        return complete_values(f"model of {self.include}", pieces, shapes, files, dtype)

    def adafactor(self, files: T5XFiles) -> dict[str, Any]:
        """Returns the arguments of `optimizers.adafactor` that make it the one of a checkpoint, but for its rate: what
        arrays tell, and what the `config.gin` beside binds.

        Raises:
          UserError: the state is another optimizer's; it has momentum, and nothing tells its beta1.
        """
        kind = Kind.of(files.moments(), files, self.factor_rules)
        bound = _bound_in(files.directory.parent, "Adafactor")
        defaults = inspect.signature(adafactor).parameters
        found = {
            name: bound[name]
            for name in _ADAFACTOR
            if bound.get(name, defaults[name].default) != defaults[name].default
        }
        if kind.momentum:
            if not isinstance(bound.get("beta1"), float):
                raise UserError(
                    f"{files.directory} has Adafactor's momentum, and arrays do not tell its beta1: put T5X's "
                    f"config.gin, with adafactor.Adafactor.beta1, into {files.directory.parent}, or take the "
                    "parameters alone"
                )
            found["beta1"] = bound["beta1"]
        if not kind.factored:
            return found | {"factored": False}
        return found | ({"logical_factor_rules": kind.rules} if kind.rules else {})

    def optimizer_state(self, files: T5XFiles, shapes: Params, axes: Axes) -> OptimizerState:
        """Returns the state of `optimizers.adafactor` in a checkpoint.

        Args:
          files: the checkpoint.
          shapes, axes: of the parameters.

        Returns:
          a tree whose leaves are `Values` or numpy arrays.

        Raises:
          UserError: see `adafactor` and `t5x_optimizer.slots_in`.
        """
        moments = files.moments()
        optimizer = Optimizer(functools.partial(adafactor, **self.adafactor(files)), 1.0).bind(axes, shapes)
        flat = {name: tuple(leaf.shape) for name, leaf in flatten(shapes).items()}
        kind = Kind.of(moments, files, self.factor_rules)
        slots = slots_in(moments, kind, pieces_of(self.rules, "", flat), flat, flatten(axes))
        return filled(jax.eval_shape(optimizer.init, shapes), slots, files.step)


def network_of(files: T5XArrays) -> T5XNetwork:
    """Returns what network a checkpoint holds, by the names and shapes of its arrays.

    Only the MLP's activations leave no trace there. They are read from the `config.gin` that T5X writes beside its
    checkpoints; without one a gated MLP is T5 1.1's (gelu, linear), a plain one T5 1.0's (relu).

    Raises:
      UserError: an array that these networks must have is missing; activations that meshway lacks; one stack has a
        position bias in each layer and the other has not.
    """
    shapes = {name: files.shape(name) for name in files}
    stacks = {stack: _Stack.of(stack, shapes) for stack in ("encoder", "decoder")}
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    if decoder is None:
        raise UserError(f"{files.directory} is neither a T5 nor a decoder of T5X: it has no layers in 'decoder'")
    around = _AROUND_LM if encoder is None else _AROUND_T5
    vocab_size, d_model = _shape_of(around[0][0], shapes)
    by_layer = decoder.has_biases
    if encoder is not None and encoder.has_biases != by_layer:
        raise UserError(
            f"the T5X checkpoint has a position bias in each layer of one stack and not of the other ({_BIAS})"
        )
    num_heads, num_buckets = decoder.shape(_BIAS) if by_layer else _shape_of(f"decoder/{_BIAS}", shapes)
    gated, tied = decoder.is_gated, "decoder/logits_dense/kernel" not in shapes
    bound = activations(files.directory.parent / _CONFIG, "mlp_activations", gated)
    bindings: Bindings = {
        "VOCAB_SIZE": vocab_size,
        "D_MODEL": d_model,
        "D_FF": decoder.shape("mlp/wo/kernel")[0],
        "NUM_HEADS": num_heads,
        "HEAD_DIM": math.prod(decoder.shape("self_attention/out/kernel")[:-1]) // num_heads,
        "NUM_BUCKETS": num_buckets,
        "ACTIVATIONS": bound,
        "TIED_LOGITS": tied,
    }
    if encoder is None:
        include = f"models/t5x_decoder/{'layer_bias' if by_layer else 'common'}.gin"
        depths = {"NUM_LAYERS": decoder.num_layers}
    else:
        include = f"models/{'umt5' if by_layer else 't5_1_1' if gated else 't5'}/common.gin"
        depths = {"NUM_ENCODER_LAYERS": encoder.num_layers, "NUM_DECODER_LAYERS": decoder.num_layers}
    rules = [rule for stack in (encoder, decoder) if stack for rule in stack.rules()]
    rules += [Rule(theirs, ours, Form(form)) for theirs, ours, form in (*around, *_stack_biases(stacks, by_layer))]
    factored = factor_rules(bool(decoder.scanned), decoder.splits_heads)
    return T5XNetwork(include, bindings | depths, tuple(rules), factored)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The layers of an encoder or a decoder.

    Attributes:
      name: encoder or decoder.
      scanned: the name under which all layers lie in one array, if they do.
      num_layers: how many.
      first: shapes of the first layer's arrays, of all layers' where scanned.
    """

    name: str
    scanned: str
    num_layers: int
    first: Mapping[str, Shape]

    @classmethod
    def of(cls, name: str, shapes: Mapping[str, Shape]) -> "_Stack | None":
        """Returns a stack of the checkpoint, None where it has no layer of it."""
        matches = [(match, shape) for match, shape in _layers(shapes) if match[1] == name]
        if not matches:
            return None
        scanned = next((match["scanned"] for match, _ in matches if match["scanned"]), "")
        first = {match["rest"]: shape for match, shape in matches if (match["layer"] or "0") == "0"}
        layers = [int(match["layer"]) for match, _ in matches if match["layer"]]
        norms = [shape for rest, shape in first.items() if rest.endswith("norm/scale")]
        if scanned and (layers or not norms or len(norms[0]) != 2):
            raise UserError(f"T5X checkpoint: {name}/{scanned} has no second dimension of layers, as scanned ones have")
        return cls(name, scanned, norms[0][1] if scanned else max(layers) + 1, first)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has two inner layers."""
        return "mlp/wi_1/kernel" in self.first

    @property
    def splits_heads(self) -> bool:
        """Whether heads and their size are two dimensions of an attention's kernels."""
        return len(self.shape(f"{'self_' if self.name == 'decoder' else ''}attention/out/kernel")) == 3

    @property
    def has_biases(self) -> bool:
        """Whether each layer has a position bias of its own."""
        return _BIAS in self.first

    def shape(self, name: str) -> Shape:
        """Returns the shape of one layer's array."""
        shape = _shape_of(name, self.first, f"{self.name}/{self.scanned or 'layers_0'}/")
        return (shape[0], *shape[2:]) if self.scanned else shape

    def rules(self) -> Iterator[Rule]:
        """Yields where the layers' parameters lie."""
        biases = ((_BIAS, "position_bias/embedding", _TABLE),) if self.has_biases else ()
        for theirs, ours, form in (*_LAYER_NAMES[self.name], *(_GATED if self.is_gated else _PLAIN), *biases):
            if self.splits_heads:
                form = form.replace("(heads head_dim)", "heads head_dim")
            if self.scanned:
                left, right = form.split(" -> ")
                first, *others = re.findall(r"\(.*?\)|\w+", left)
                form = f"{' '.join((first, 'layers', *others))} -> layers {right}"
            yield Rule(
                f"{self.name}/{self.scanned or 'layers_{layer}'}/{theirs}", f"{self.name}/{{block}}/{ours}", Form(form)
            )


def _layers(names: Mapping[str, Shape]) -> Iterator[tuple[re.Match[str], Shape]]:
    for name, shape in names.items():
        match = _LAYER.fullmatch(name)
        if match:
            yield match, shape


def _shape_of(name: str, shapes: Mapping[str, Shape], prefix: str = "") -> Shape:
    if name not in shapes:
        raise UserError(
            f"the T5X checkpoint has no {prefix}{name}, which T5 and T5X's decoder-only example have; it has "
            + _some(prefix + known for known in shapes)
        )
    return shapes[name]


def _stack_biases(stacks: Mapping[str, _Stack | None], by_layer: bool) -> Table:
    """Returns the position biases that all layers of a stack share."""
    if by_layer:
        return ()
    if stacks["encoder"] is None:
        return ((f"decoder/{_BIAS}", "position_bias/embedding", _TABLE),)
    return tuple((f"{stack}/{_BIAS}", f"{stack}_position_bias/embedding", _TABLE) for stack in stacks)


def activations(config: Path, argument: str, gated: bool) -> tuple[str, ...]:
    """Returns the MLP's activations that a run's gin file binds, else those of T5 1.1 or 1.0.

    Args:
      config: the file; it need not be there.
      argument: a pattern of what they are bound to, as 'mlp_activations'.
      gated: whether the MLP has two of them.

    Raises:
      UserError: they cannot be read, are not as many as the MLP has, or meshway lacks one.
    """
    found = re.findall(rf"\b({argument})\s*=\s*([(\[][^)\]]*[)\]]|'\w+'|\"\w+\")", _text_of(config))
    if not found:
        return ("gelu", "linear") if gated else ("relu",)
    said = f"{config}: {found[0][0]} = {' and '.join(dict.fromkeys(value for _, value in found))}"
    try:
        values = [ast.literal_eval(value) for _, value in found]
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{said} cannot be read") from error
    names, *others = [[value] if isinstance(value, str) else [str(name) for name in value] for value in values]
    if any(other != names for other in others):
        raise UserError(f"{said}: several, and meshway's networks have the same in all their layers")
    unknown = [name for name in names if name not in _ACTIVATIONS]
    if unknown or len(names) != 1 + gated:
        wanted = f"{1 + gated} of {', '.join(_ACTIVATIONS)}"
        raise UserError(f"{said} is not what the checkpoint can be converted with: {wanted}")
    return tuple(_ACTIVATIONS[name] for name in names)


def _text_of(file: Path) -> str:
    """Returns a gin file's text, '' where there is none."""
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def _bound_in(run: Path, name: str) -> dict[str, Any]:
    """Returns the literals that a run's config.gin binds to a class or function, in a block or one by one."""
    text = _text_of(run / _CONFIG)
    blocks = re.findall(rf"\b{name}:[ \t]*\n((?:[ \t]+.*\n|\n|#.*\n)*)", text + "\n")
    lines = [line for block in blocks for line in re.findall(r"^[ \t]+(\w+) = (.+)$", block, re.MULTILINE)]
    lines += re.findall(rf"\b{name}\.(\w+) = (.+)$", text, re.MULTILINE)
    found = {}
    for parameter, value in lines:
        with contextlib.suppress(ValueError, SyntaxError):  # a reference or a macro
            found[parameter] = ast.literal_eval(value)
    return found


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
