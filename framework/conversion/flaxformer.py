"""What Flaxformer's checkpoints (written by T5X) have beyond those of T5X's own networks: several kernels in one array,
and layers with experts; and what only the config beside a checkpoint tells, of T5X's networks too.

Flaxformer names a dense T5 as T5X does. With `kernels_to_fuse` an attention's queries, keys and values lie in one array
[embed, 3, heads, head_dim], or keys and values alone; with `fuse_kernels` an MLP's inner layers in one [embed, 2, mlp].
Its Switch Transformer and token-choice mixtures have an array [expert, ...] in every second or fourth layer's MLP.
"""

import ast
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

from meshway.framework.conversion.rules import Form, Rule, Shape
from meshway.framework.conversion.settings import Bindings
from meshway.framework.conversion.t5x_files import T5XFiles
from meshway.framework.errors import UserError

Table = tuple[tuple[str, str, str], ...]  # T5X's name, ours, how dimensions differ

# An array -> the kernels that may lie in it, in their order.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_fused": ("query", "key", "value"),
    "kv_fused": ("key", "value"),
    "wi_fused": ("wi", "wi_0", "wi_1"),
}
_EXPERTS: Table = tuple(
    (f"mlp/expert/{theirs}/kernel", f"mlp/experts/{ours}", "experts rows columns -> experts rows columns")
    for theirs, ours in (("wi", "wi_0"), ("wi_0", "wi_0"), ("wi_1", "wi_1"), ("wo", "wo"))
)
_ROUTER: Table = (("mlp/router/router_weights/w/kernel", "mlp/router/kernel", "embed experts -> embed experts"),)
# Which of every so many layers have experts -> the family that has them so (the last of each), how many a token takes.
_FAMILIES = {2: ("models/switch/common.gin", 1), 4: ("models/st_moe/common.gin", 2)}

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "linear": "linear"}
_SELECTED = r"\b(?:NUM_SELECTED_EXPERTS|num_selected_experts)\s*=\s*(\d+)"
_SCALED = r"^[^#\n]*\brescale_logits\s*=\s*True"
_SPARSE = re.compile(r"(encoder|decoder)/layers_(\d+)/(mlp/expert/.+)")

# Arrays of layers that meshway's T5 has not.
_LACKING = (
    (
        r".*/(?:q_wi|o_wo)_fused/.*|(?:encoder|decoder)/\w+/kv_fused/.*",
        "layers whose attention and MLP are fused",
    ),
    (r"(?:encoder|decoder)/\w+/layer_norm/scale", "layers with attention and MLP side by side"),
    (r".*/side_relpos_bias/.*|.*/attention/T5LayerNorm_0/scale", "LongT5's transient global attention"),
    (r".*/(?:pre_)?extra_mlp(?:_layer_norm)?/.*", "ST-MoE's second MLP beside the experts"),
    (r".*/subblock_\d+/.*", "scanned experts, with a position bias in each layer"),
    (r".*/position_embedder/.*", "absolute positions"),
)
# Settings by which Flaxformer computes something else from the same arrays.
_REFUSED = (
    (r"attention_factory\s*=\s*@\S*long_attention\.\w+", "LongT5's attention"),
    (r"router\s*=\s*@\S*ExpertsChoose\w+", "experts that choose their tokens"),
    (r"use_extra_logit\s*=\s*True", "an extra logit of 0 in attention"),
    (r"use_rotary_embedding\s*=\s*True", "rotary positions"),
)


def check(files: T5XFiles) -> None:
    """Raises UserError for arrays, or settings of the config beside, of layers that meshway's T5 has not."""
    for name in files:
        if what := next((what for pattern, what in _LACKING if re.fullmatch(pattern, name)), None):
            raise UserError(f"{files.directory} has {name}, of {what}, which meshway's T5 has not")
    files.check_config(_REFUSED)


def fused_arrays(names: Collection[str]) -> tuple[str, ...]:
    """Returns which arrays of a layer hold several kernels, such as 'self_attention/qkv_fused/kernel'."""
    return tuple(name for name in names if name.split("/")[-2:-1] and name.split("/")[-2] in _FUSED)


def as_fused(table: Table, arrays: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yields a layer's table as it is where `arrays` hold several kernels: ours are then several, a space apart."""
    places = {theirs: (ours, form) for theirs, ours, form in table}
    for theirs, ours, form in table:
        at, _, name = theirs.removesuffix("/kernel").rpartition("/")
        whole = next((each for each, parts in _FUSED.items() if name in parts and f"{at}/{each}/kernel" in arrays), "")
        parts = [f"{at}/{part}/kernel" for part in _FUSED.get(whole, ()) if f"{at}/{part}/kernel" in places]
        if not whole:
            yield theirs, ours, form
        elif theirs == parts[0]:
            yield f"{at}/{whole}/kernel", " ".join(places[part][0] for part in parts), _with_parts(form)


def _with_parts(form: str) -> str:
    """Returns the form of several kernels in one array: their number follows the dimension of their inputs."""
    left, right = form.split(" -> ")
    names = re.findall(r"\w+", left)
    inputs = 2 if names[0] == "experts" else 1
    return f"{' '.join((*names[:inputs], 'part', *names[inputs:]))} -> part {right}"


def activations(files: T5XFiles, gated: bool) -> tuple[str, ...]:
    """Returns the MLP's activations that a run's config binds, else those of T5 1.1 or 1.0.

    Raises:
      UserError: they cannot be read, differ by layer, are not as many as the MLP has, or meshway lacks one.
    """
    found = re.findall(rf"\b({files.ACTIVATIONS})\s*=\s*([(\[][^)\]]*[)\]]|'\w+'|\"\w+\")", files.config)
    if not found:
        return ("gelu", "linear") if gated else ("relu",)
    said = f"{files.config_file}: {found[0][0]} = {' and '.join(dict.fromkeys(value for _, value in found))}"
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


def scaling(files: T5XFiles) -> Bindings:
    """Returns the binding by which attention scores are scaled by 1/sqrt(head_dim).

    They always are where kernels are fused; else as the config says, since Flaxformer can start an unfused query kernel
    that much smaller instead.

    Raises:
      UserError: some are fused, others not, and the config does not say.
    """
    kinds = {name.split("/")[-2] for name in files if name.endswith("/kernel")} & {"key", "kv_fused", "qkv_fused"}
    fused, said = kinds != {"key"}, re.search(_SCALED, files.config, re.MULTILINE)
    if fused and "key" in kinds and not said:
        raise UserError(
            f"{files.directory} has attention with fused kernels and without; whether all scores are scaled "
            f"{files.config_file} must say (rescale_logits = True)"
        )
    return {"attention.Attention.scale_logits": True} if said or fused else {}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Layers with experts.

    Attributes:
      include: the gin file that the recipe begins with.
      bindings: of that file.
      rules: where the experts and their routers lie.
    """

    include: str
    bindings: Bindings
    rules: tuple[Rule, ...]


def mixture(files: T5XFiles, layers: Mapping[str, int], by_layer: bool) -> Mixture | None:
    """Returns the layers with experts; None where there is none.

    Args:
      files: the checkpoint.
      layers: how many each stack has.
      by_layer: whether each layer has a position bias of its own.

    Raises:
      UserError: experts are in other layers than `_FAMILIES` has them, or a token takes more than there are.
    """
    sparse = {stack: dict[int, dict[str, Shape]]() for stack in layers}
    for name in files:
        if match := _SPARSE.fullmatch(name):
            sparse[match[1]].setdefault(int(match[2]), {})[match[3]] = files.shape(name)
    if not any(sparse.values()):
        return None
    every = next((n for n in _FAMILIES if all([*sparse[s]] and _is_every(n, sparse[s], layers[s]) for s in layers)), 0)
    if not every or by_layer or "encoder" not in layers:
        where = "; ".join(f"{stack} {', '.join(map(str, sorted(found))) or 'none'}" for stack, found in sparse.items())
        raise UserError(
            f"{files.directory} has experts in layers {where}"
            + (" and a position bias in each layer" if by_layer else "")
            + ": meshway's switch has them in every second layer (1, 3, ...) of both stacks, st_moe in every fourth "
            "(3, 7, ...), with one position bias for a stack"
        )
    include, usual = _FAMILIES[every]
    taken = {int(count) for count in re.findall(_SELECTED, files.config)} or {usual}
    first = next(iter(sparse["decoder"].values()))
    bindings: Bindings = {"NUM_EXPERTS": next(iter(first.values()))[0]}
    if len(taken) > 1 or not 1 <= max(taken) <= bindings["NUM_EXPERTS"]:
        raise UserError(f"{files.config_file}: a token takes {sorted(taken)} of {bindings['NUM_EXPERTS']} experts")
    bindings |= {"routers.TopK.k": max(taken), "routers.TopK.normalize": False}
    rules = (
        Rule(f"{stack}/layers_{{layer}}/{theirs}", paths(stack, ours), Form(form))
        for stack in layers
        for theirs, ours, form in (*_ROUTER, *as_fused(_present(first), fused_arrays(first)))
    )
    return Mixture(include, bindings, tuple(rules))


def _is_every(period: int, found: Collection[int], num_layers: int) -> bool:
    return sorted(found) == list(range(period - 1, num_layers, period))


def _present(arrays: Collection[str]) -> Table:
    """Returns the experts' table for the arrays of a layer: an MLP has 'wi', or 'wi_0' and 'wi_1'."""
    gated = "mlp/expert/wi/kernel" not in arrays
    return tuple(row for row in _EXPERTS if row[0].endswith("wo/kernel") or ("wi_" in row[0]) == gated)


def paths(stack: str, ours: str) -> str | tuple[str, ...]:
    """Returns our parameter, or several of them, of a table's row."""
    paths = tuple(f"{stack}/{{block}}/{path}" for path in ours.split())
    return paths[0] if len(paths) == 1 else paths


def scanned(form: str) -> str:
    """Returns a form as it is where layers are the array's second dimension."""
    left, right = form.split(" -> ")
    first, *others = re.findall(r"\(.*?\)|\w+", left)
    return f"{' '.join((first, 'layers', *others))} -> " + re.sub("^(part )?", r"\1layers ", right)
