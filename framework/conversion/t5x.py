"""T5X's networks under our names: T5 1.1, T5 1.0 and its decoder-only example.

A stack's layers lie in T5X either side by side ("encoder/layers_3/mlp/wo/kernel") or, where they are scanned, in one
array whose second dimension is the layers ("encoder/layers/mlp/wo/kernel"; until 2023 "encoder/encoder/...").
"""

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from meshway.framework.conversion import flaxformer
from meshway.framework.conversion.rules import Form, Rule, Shape, pieces_of
from meshway.framework.conversion.settings import Bindings
from meshway.framework.conversion.t5x_files import T5XArrays, T5XFiles
from meshway.framework.conversion.t5x_optimizer import Kind, factor_rules, filled, settings_of, slots_in
from meshway.framework.conversion.values import Values, complete_values
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.adafactor import FactorRules
from meshway.framework.optimizers.optimizers import Optimizer, OptimizerState, adafactor
from meshway.framework.terminal import listed
from meshway.framework.trees import flatten

_LAYER = re.compile(r"(encoder|decoder)/(?:layers_(?P<layer>\d+)|(?P<scanned>layers|encoder|decoder))/(?P<rest>.+)")
_BIAS = "relpos_bias/rel_embedding"  # of a stack, or of each of its layers (umT5, T5X's scalable examples)
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
class Layout:
    """How T5X lays out the layers of a stack.

    Attributes:
      scanned: the name under which all layers lie in one array, '' where they lie side by side.
      splits_heads: whether heads and their size are two dimensions of an attention's kernels.
      fused: arrays of a layer that hold several kernels (Flaxformer's), as 'self_attention/qkv_fused/kernel'.
    """

    scanned: str = ""
    splits_heads: bool = False
    fused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class T5XNetwork:
    """What a checkpoint's network is here.

    Attributes:
      include: the gin file that its recipe begins with.
      bindings: macros of that file.
      rules: where each parameter's values lie in the checkpoint.
      layouts: of its stacks.
    """

    include: str
    bindings: Bindings
    rules: tuple[Rule, ...]
    layouts: Mapping[str, Layout]

    @property
    def factor_rules(self) -> FactorRules | None:
        """Adafactor's `logical_factor_rules` by which second moments are factored as T5X factors them."""
        layout = self.layouts["decoder"]
        return factor_rules(bool(layout.scanned), layout.splits_heads)

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
        if any(rule.form.has_parts or "/expert/" in rule.theirs for rule in self.rules):
            raise UserError(
                f"{files.directory} has Flaxformer's fused kernels or experts, whose optimizer state is not converted"
            )
        return settings_of(files, Kind.of(files.moments, files, self.factor_rules))

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
        moments = files.moments
        optimizer = Optimizer(functools.partial(adafactor, **self.adafactor(files)), 1.0).bind(axes, shapes)
        flat = {name: tuple(leaf.shape) for name, leaf in flatten(shapes).items()}
        kind = Kind.of(moments, files, self.factor_rules)
        slots = slots_in(moments, kind, pieces_of(self.rules, "", flat), flat, flatten(axes))
        return filled(jax.eval_shape(optimizer.init, shapes), slots, files.step)


def network_of(files: T5XFiles) -> T5XNetwork:
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
    flaxformer.check(files)
    layers = {name: stack.num_layers for name, stack in stacks.items() if stack}
    mixture = flaxformer.mixture(files, layers, decoder.has_biases)
    around = _AROUND_LM if encoder is None else _AROUND_T5
    vocab_size, d_model = _shape_of(around[0][0], shapes)
    by_layer = decoder.has_biases
    if encoder is not None and encoder.has_biases != by_layer:
        raise UserError(
            f"the T5X checkpoint has a position bias in each layer of one stack and not of the other ({_BIAS})"
        )
    num_heads, num_buckets = decoder.shape(_BIAS) if by_layer else _shape_of(f"decoder/{_BIAS}", shapes)
    gated, tied = decoder.is_gated, "decoder/logits_dense/kernel" not in shapes
    bindings: Bindings = {
        "VOCAB_SIZE": vocab_size,
        "D_MODEL": d_model,
        "D_FF": decoder.shape("mlp/wo/kernel")[0],
        "NUM_HEADS": num_heads,
        "HEAD_DIM": math.prod(decoder.shape("self_attention/out/kernel")[:-1]) // num_heads,
        "NUM_BUCKETS": num_buckets,
        "ACTIVATIONS": flaxformer.activations(files, gated),
        "TIED_LOGITS": tied,
        **flaxformer.scaling(files),
    }
    layouts = {name: stack.layout for name, stack in stacks.items() if stack}
    network = _network(bindings, layers, layouts, gated, by_layer)
    if mixture is None:
        return network
    bindings, rules = network.bindings | mixture.bindings, network.rules + mixture.rules
    return dataclasses.replace(network, include=mixture.include, bindings=bindings, rules=rules)


def network_for(shapes: Mapping[str, Shape], layouts: Mapping[str, Layout] | None, activations: Any) -> T5XNetwork:
    """Returns the network of T5X that a model with our parameters [shapes] is, if it is one; `network_of`'s way back.

    Args:
      shapes: of the parameters.
      layouts: of its stacks; None for those of T5X's minimal examples, or, where each layer has a position bias, of its
        scalable ones.
      activations: of its MLPs (ACTIVATIONS).

    Raises:
      UserError: a parameter that these networks must have is missing.
    """
    layers = {
        stack: _our_shape(f"{stack}/block_0/mlp/wo/kernel", shapes)[0]
        for stack in ("encoder", "decoder")
        if stack == "decoder" or any(name.startswith(f"{stack}/") for name in shapes)
    }
    by_layer = "decoder/block_0/position_bias/embedding" in shapes
    gated = "decoder/block_0/mlp/wi_1/kernel" in shapes
    bias = "decoder_position_bias" if "encoder" in layers else "position_bias"
    vocab_size, d_model = _our_shape("token_embedding/embedding", shapes)
    num_heads, head_dim = _our_shape("decoder/block_0/attention/out/kernel", shapes)[1:3]
    bindings: Bindings = {
        "VOCAB_SIZE": vocab_size,
        "D_MODEL": d_model,
        "D_FF": _our_shape("decoder/block_0/mlp/wo/kernel", shapes)[1],
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "NUM_BUCKETS": _our_shape(f"{'decoder/block_0/position_bias' if by_layer else bias}/embedding", shapes)[-1],
        "ACTIVATIONS": activations or (("gelu", "linear") if gated else ("relu",)),
        "TIED_LOGITS": "logits/kernel" not in shapes,
    }
    usual = {stack: Layout(stack, True) if by_layer else Layout() for stack in layers}
    return _network(bindings, layers, layouts or usual, gated, by_layer)


def _network(
    bindings: Bindings, layers: Mapping[str, int], layouts: Mapping[str, Layout], gated: bool, by_layer: bool
) -> T5XNetwork:
    """Returns a network, given how many layers its stacks have."""
    around = _AROUND_T5 if "encoder" in layers else _AROUND_LM
    if "encoder" in layers:
        include = f"models/{'umt5' if by_layer else 't5_1_1' if gated else 't5'}/common.gin"
        depths = {f"NUM_{stack.upper()}_LAYERS": count for stack, count in layers.items()}
    else:
        include = f"models/t5x_decoder/{'layer_bias' if by_layer else 'common'}.gin"
        depths = {"NUM_LAYERS": layers["decoder"]}
    rules = [rule for stack in layers for rule in _stack_rules(stack, layouts[stack], gated, by_layer)]
    rules += [Rule(theirs, ours, Form(form)) for theirs, ours, form in (*around, *_stack_biases(layers, by_layer))]
    return T5XNetwork(include, bindings | depths, tuple(rules), layouts)


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
        return "mlp/wi_1/kernel" in self.first or self.first.get("mlp/wi_fused/kernel", (1, 1))[-2] > 1

    @property
    def splits_heads(self) -> bool:
        """Whether heads and their size are two dimensions of an attention's kernels."""
        return len(self.shape(f"{'self_' if self.name == 'decoder' else ''}attention/out/kernel")) == 3

    @property
    def layout(self) -> Layout:
        """How its layers lie."""
        return Layout(self.scanned, self.splits_heads, flaxformer.fused_arrays(self.first))

    @property
    def has_biases(self) -> bool:
        """Whether each layer has a position bias of its own."""
        return _BIAS in self.first

    def shape(self, name: str) -> Shape:
        """Returns the shape of one layer's array."""
        shape = _shape_of(name, self.first, f"{self.name}/{self.scanned or 'layers_0'}/")
        return (shape[0], *shape[2:]) if self.scanned else shape


def _stack_rules(stack: str, layout: Layout, gated: bool, by_layer: bool) -> Iterator[Rule]:
    """Yields where the parameters of a stack's layers lie."""
    biases = ((_BIAS, "position_bias/embedding", _TABLE),) if by_layer else ()
    table = (*_LAYER_NAMES[stack], *(_GATED if gated else _PLAIN), *biases)
    for theirs, ours, form in flaxformer.as_fused(table, layout.fused):
        if layout.splits_heads:
            form = form.replace("(heads head_dim)", "heads head_dim")
        if layout.scanned:
            form = flaxformer.scanned(form)
        name = f"{stack}/{layout.scanned or 'layers_{layer}'}/{theirs}"
        yield Rule(name, flaxformer.paths(stack, ours), Form(form))


def _layers(names: Mapping[str, Shape]) -> Iterator[tuple[re.Match[str], Shape]]:
    for name, shape in names.items():
        match = _LAYER.fullmatch(name)
        if match:
            yield match, shape


def _shape_of(name: str, shapes: Mapping[str, Shape], prefix: str = "") -> Shape:
    if name not in shapes:
        raise UserError(
            f"the T5X checkpoint has no {prefix}{name}, which T5 and T5X's decoder-only example have; it has "
            + listed((prefix + known for known in shapes), 4)
        )
    return shapes[name]


def _our_shape(name: str, shapes: Mapping[str, Shape]) -> Shape:
    if name not in shapes:
        raise UserError(f"the model is no network of T5X's examples: it has no parameter {name}")
    return shapes[name]


def _stack_biases(stacks: Collection[str], by_layer: bool) -> Table:
    """Returns the position biases that all layers of a stack share."""
    if by_layer:
        return ()
    if "encoder" not in stacks:
        return ((f"decoder/{_BIAS}", "position_bias/embedding", _TABLE),)
    return tuple((f"{stack}/{_BIAS}", f"{stack}_position_bias/embedding", _TABLE) for stack in stacks)
