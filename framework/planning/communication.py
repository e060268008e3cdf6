"""The minimum that a layout must send: closed forms of a train step's communication, before anything is compiled.

All counts are bytes that one device sends in one step, by the ring formulas of `collectives.SENT`. Sources:

- data parallelism and ZeRO: Rajbhandari et al. 2020 (arXiv:1910.02054), section 7: a gradient of P bytes costs
  2 P (n-1)/n where parameters are replicated (an all-reduce), and P (n-1)/n (a reduce-scatter) where they are sharded,
  plus P (n-1)/n each time the weights are gathered;
- tensor parallelism: Shoeybi et al. 2019 (arXiv:1909.08053), section 3: one all-reduce of [batch, length, d_model] for
  each row-parallel product forward, and one for each input of column-parallel products backward. With sequence
  parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2) each becomes a reduce-scatter and an
  all-gather, which send the same; so does a residual stream sharded along d_model (Pope et al. 2022,
  arXiv:2211.05102, section 3.2.1, appendix A.1 for the costs);
- a sharded vocabulary: Shoeybi et al. 2019, section 3: sums of [batch, length] instead of logits;
- ring attention over n devices (Liu et al. 2023, arXiv:2310.01889, section 3): a device's keys and values are sent n-1
  times forward and n-1 times backward, their gradients n times, the last time back to their own device;
- all-to-all attention (Jacobs et al. 2023, arXiv:2309.14509, section 3.2) and experts (Lepikhin et al. 2020,
  arXiv:2006.16668, section 3.2): each exchange of the forward pass has one in the backward pass;
- pipelines in one program (Xu et al. 2021, arXiv:2105.04663, section 3.3): each stage sends its activations to the next
  at each time step, and their gradients back.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from meshway.framework.axes import DimAxes
from meshway.framework.planning.collectives import SENT
from meshway.framework.planning.products import Lookup, Product, Uses, Weight

GRADIENTS, WEIGHTS, ACTIVATIONS, INPUTS, UPDATES = "gradients", "weights", "activations", "inputs", "updated parameters"


@dataclasses.dataclass(frozen=True)
class Term:
    """One reason to send: the bytes that a device sends over mesh axes `axes` in a step."""

    axes: tuple[str, ...]
    role: str
    bytes: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the closed forms are computed from: a train step and how a layout shards it.

    Attributes:
      mesh: sizes of the mesh's axes.
      tokens: the axes that shard tokens (batch, or length inside the layers): devices along them have other tokens.
      parameters: every parameter, with its global shape and the axes that shard it.
      optimizer: parameter -> the axes that shard its optimizer state, if it has any.
      uses: how the loss uses the parameters.
      stream: the axes that shard the residual stream between layers: along d_model, or along a length that is not
        sharded inside the layers.
      stages: the axes that shard stages of a pipeline.
      experts: the axes that shard experts.
      keys: (axes, bytes on a device for all executions) of keys and values that are replicated over `axes`, which shard
        the queries.
      platform: the platform it is compiled for, as jax names it.
      dispatch: how tokens get to experts that are elsewhere, where `uses` has the products of experts, as a trace on no
        mesh does: "slots" are exchanged, tokens "gathered", or choices "sent" alone. "" where kernels say so.
    """

    mesh: Mapping[str, int]
    tokens: frozenset[str]
    parameters: Sequence[Weight]
    optimizer: Mapping[str, frozenset[str]]
    uses: Uses
    stream: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    keys: Sequence[tuple[tuple[str, ...], float]] = ()
    platform: str = "cpu"
    dispatch: str = ""

    @functools.cached_property
    def gradient_sizes(self) -> frozenset[int]:
        """The element counts that a parameter's gradient, or that of one of its layers, may have on a device."""
        sizes = set()
        for weight in self.parameters:
            layers = math.prod(size for name, size in zip(weight.names, weight.shape) if name == "layers")
            axes = self.order({axis for dim_axes in weight.dim_axes for axis in dim_axes})
            for number in range(2 ** len(axes)):
                parts = self.size(axis for bit, axis in enumerate(axes) if number >> bit & 1)
                whole = math.prod(weight.shape) // parts
                sizes |= {whole, whole // layers}
        return frozenset(sizes)

    def size(self, axes: Iterable[str]) -> int:
        """Returns the devices along these axes together."""
        return math.prod(self.mesh[axis] for axis in axes)

    def order(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Returns the axes of more than one device, in the mesh's order."""
        chosen = set(axes)
        return tuple(axis for axis in self.mesh if axis in chosen and self.mesh[axis] > 1)


def minimum(setting: Setting) -> list[Term]:
    """Returns what must be sent if nothing is sent twice, or in a wider type than it is used in."""
    exchanged = {path for path in {lookup.weight.path for lookup in setting.uses.lookups} if _exchange(setting, path)}
    terms = [*_parameter_terms(setting, exchanged), *_product_terms(setting), *_lookup_terms(setting, exchanged)]
    terms += [*_kernel_terms(setting), *_key_terms(setting), *_stage_terms(setting), *_expert_terms(setting)]
    return [term for term in terms if term.bytes]


def unmerged(setting: Setting) -> float:
    """Returns the additional bytes for products' input gradients if each product's is summed over the mesh by itself.

    The minimum first adds the gradients of one input, then sums them over the mesh once. XLA's pass that moves a sum
    over the mesh behind an addition is not part of every backend's pipeline.
    """
    separate = sum(term.bytes * count for term, count in _input_gradients(setting, merged=False))
    return separate - sum(term.bytes * count for term, count in _input_gradients(setting, merged=True))


def gradient_bytes(setting: Setting, path: str, axes: tuple[str, ...]) -> float:
    """Returns the bytes that summing one parameter's gradient over `axes` sends."""
    alone = dataclasses.replace(setting, parameters=[weight for weight in setting.parameters if weight.path == path])
    terms = _parameter_terms(alone, set())
    return sum(term.bytes for term in terms if (term.axes, term.role) == (axes, GRADIENTS))


def _parameter_terms(setting: Setting, exchanged: set[str]) -> list[Term]:
    terms = []
    for weight in setting.parameters:
        sharded = {axis for axes in weight.dim_axes for axis in axes}
        expert = {axis for name, axes in zip(weight.names, weight.dim_axes) if name == "expert" for axis in axes}
        gathered = setting.order((sharded - expert) & setting.tokens)
        summed = setting.order(setting.tokens - sharded)
        stored = math.prod(weight.shape) / setting.size(sharded - set(gathered))
        dtype = setting.uses.dtypes.get(weight.path, weight.dtype)
        used = stored * jax.numpy.dtype(dtype).itemsize  # bytes of the part a device computes with
        parts = setting.size(gathered)
        if weight.path not in exchanged:
            scale = SENT["all-gather"](parts)
            terms.append(Term(gathered, WEIGHTS, scale * used, "gathered for the forward pass (ZeRO-3)"))
            terms.append(Term(gathered, GRADIENTS, scale * used, "reduce-scattered to the weights' shards (ZeRO-3)"))
        terms += _sum_terms(setting, weight, summed, used / parts, stored / parts)
    return terms


def _sum_terms(
    setting: Setting, weight: Weight, summed: tuple[str, ...], gradient: float, elements: float
) -> list[Term]:
    """The gradient's sum over axes that do not shard the parameter, but may shard its optimizer state."""
    apart = setting.order(setting.optimizer.get(weight.path, frozenset()) & set(summed))
    whole = tuple(axis for axis in summed if axis not in apart)
    parts = setting.size(apart)
    updated = elements * jax.numpy.dtype(weight.dtype).itemsize
    scatter, gather = SENT["reduce-scatter"](parts), SENT["all-gather"](parts)
    return [
        Term(apart, GRADIENTS, scatter * gradient, "reduce-scattered to the shards of the optimizer's state (ZeRO-1)"),
        Term(apart, UPDATES, gather * updated, "gathered after the update (ZeRO-1)"),
        Term(whole, GRADIENTS, SENT["all-reduce"](setting.size(whole)) * gradient / parts, "all-reduced"),
    ]


def _product_terms(setting: Setting) -> list[Term]:
    terms = []
    for product in setting.uses.products:
        inner = _foreign(setting, product.weight.dim_axes, product.contracted)
        if inner and not _dispatched(setting, product):
            sent = SENT["all-reduce"](setting.size(inner)) * _local(setting, product, "output") * product.times
            terms.append(Term(inner, ACTIVATIONS, sent, "sums of row-parallel products, forward"))
        terms += _vocabulary_terms(setting, product)
    return terms + [
        Term(term.axes, term.role, term.bytes * count, term.reason)
        for term, count in _input_gradients(setting, merged=True)
    ]


def _input_gradients(setting: Setting, merged: bool) -> list[tuple[Term, int]]:
    """Returns (term of one input's gradient, executions), one for each input if `merged`, else for each product."""
    found: dict[tuple[int, tuple[str, ...]], tuple[Term, int]] = {}
    for index, product in enumerate(setting.uses.products):
        outer = _foreign(setting, product.weight.dim_axes, product.kept)
        if not outer or not product.value.trained or _dispatched(setting, product):
            continue
        sent = SENT["all-reduce"](setting.size(outer)) * _local(setting, product, "value")
        term = Term(outer, ACTIVATIONS, sent, "gradients of column-parallel products' inputs, backward")
        key = (id(product.value) if merged else index, outer)
        found[key] = (term, product.value.times if merged else product.times)
    return list(found.values())


def _vocabulary_terms(setting: Setting, product: Product) -> list[Term]:
    """Logits sharded along the vocabulary: each token's maximum, sum of exponentials and target logit are reduced."""
    weight = product.weight
    axes = _foreign(setting, weight.dim_axes, [dim for dim in product.kept if weight.names[dim] == "vocab"])
    if not axes:
        return []
    entries = math.prod(weight.shape[dim] for dim in product.kept)
    rows = math.prod(product.output.shape) / entries / setting.size(setting.tokens)
    sent = 3 * SENT["all-reduce"](setting.size(axes)) * rows * np.dtype(np.float32).itemsize * product.times
    return [Term(axes, ACTIVATIONS, sent, "softmax over a sharded vocabulary")]


def balancing(setting: Setting) -> float:
    """Returns what the permutes of ring attention send beyond keys and values: the exchange of halves that balances a
    causal mask over the devices. Backward sends about as much as forward."""
    sent = 0.0
    for kernel in setting.uses.kernels:
        permutes = [call for call in kernel.written if call.kind == "collective-permute" and call.trained]
        rings = {setting.size(call.axes) for call in permutes if call.ring}
        sent += sum(call.bytes for call in permutes) - sum((parts - 1) * kernel.keys_values for parts in rings)
    return 2 * sent


def _kernel_terms(setting: Setting) -> list[Term]:
    terms = []
    for kernel in setting.uses.kernels:
        rings = {setting.order(call.axes) for call in kernel.written if call.ring and call.trained}
        for axes in rings:
            parts = setting.size(axes)
            sent = (2 * (parts - 1) + parts) * kernel.keys_values
            terms.append(Term(axes, ACTIVATIONS, sent, "keys and values around the ring, and their gradients"))
        for call in kernel.written:
            axes = setting.order(call.axes)
            sent = SENT[call.kind](setting.size(axes)) * call.bytes
            if not call.trained:
                terms.append(Term(axes, INPUTS, sent, "segment ids and positions, sent by kernels"))
            elif call.kind == "all-reduce":
                terms.append(Term(axes, ACTIVATIONS, sent, "sums in kernels"))
            elif call.kind != "collective-permute":
                terms.append(Term(axes, ACTIVATIONS, 2 * sent, f"{call.kind} of kernels, forward and backward"))
    return terms


def _dispatched(setting: Setting, product: Product) -> bool:
    return bool(setting.dispatch) and product.of_experts


def _expert_terms(setting: Setting) -> list[Term]:
    """What moves tokens to experts and back, and sums what devices with parts of an expert have made of them."""
    terms: list[Term] = []
    tokens, rows = 0.0, None
    for product in setting.uses.products:
        if _routes(product):
            tokens = math.prod(product.value.shape) / setting.size(setting.tokens)  # elements, before choices are made
        if not _dispatched(setting, product) or product.value is rows:
            continue  # the gate of a gated layer reads what the other input product reads
        rows = product.value
        there = all(product.weight.names[dim] == "embed" for dim in product.contracted)
        times = product.times * np.dtype(product.value.dtype).itemsize
        experts = {axis for dim in product.batched for axis in product.weight.dim_axes[dim]}
        exchanged, parts = setting.order(experts & setting.tokens), setting.size(experts & setting.tokens)
        moved = SENT["all-to-all"](parts) * math.prod((product.value if there else product.output).shape)
        sent = (parts - 1) * tokens if setting.dispatch == "gathered" else moved / setting.size(setting.tokens)
        terms.append(Term(exchanged, ACTIVATIONS, 2 * sent * times, "tokens to experts or back, forward and backward"))
        hidden = [dim for dim, name in enumerate(product.weight.names) if name == "mlp"]
        summed = setting.order({*_foreign(setting, product.weight.dim_axes, hidden), *(experts - setting.tokens)})
        sent = SENT["all-reduce"](setting.size(summed)) * tokens * times
        terms.append(Term(summed, ACTIVATIONS, sent, "sums of experts' outputs, or of their inputs' gradients"))
    return terms


def _routes(product: Product) -> bool:
    """Whether a product scores experts: its rows are a layer's tokens."""
    names = [product.weight.names[dim] for dim in product.kept]
    return names == ["expert"] and not product.of_experts


def _key_terms(setting: Setting) -> list[Term]:
    return [
        Term(axes, ACTIVATIONS, 2 * SENT["all-gather"](setting.size(axes)) * size, "keys and values gathered")
        for axes, size in setting.keys
    ]


def _stage_terms(setting: Setting) -> list[Term]:
    return [
        Term(setting.order(axes), ACTIVATIONS, 2 * size * times, "sent from stage to stage at each time step")
        for axes, size, times in setting.uses.carried
        if set(axes) <= setting.stages and setting.order(axes)
    ]


def _lookup_terms(setting: Setting, exchanged: set[str]) -> list[Term]:
    terms = []
    for path in dict.fromkeys(lookup.weight.path for lookup in setting.uses.lookups):
        lookups = [lookup for lookup in setting.uses.lookups if lookup.weight.path == path]
        table = lookups[0].weight
        axes = _foreign(setting, table.dim_axes, lookups[0].indexed)
        if axes:
            sent = sum(SENT["all-reduce"](setting.size(axes)) * _rows(setting, each) * each.times for each in lookups)
            sharded = {axis for dim_axes in table.dim_axes for axis in dim_axes} - set(axes)
            left = sharded if path in exchanged else sharded - setting.tokens
            whole = math.prod(table.shape) * jax.numpy.dtype(table.dtype).itemsize / setting.size(left)
            gathered = SENT["all-gather"](setting.size(axes)) * whole
            if sent <= gathered:
                terms.append(Term(axes, ACTIVATIONS, sent, "sums of lookups in a sharded table, forward"))
            else:
                terms.append(Term(axes, WEIGHTS, gathered, "a sharded table, gathered for its lookups"))
        if path in exchanged:
            terms += [term for lookup in lookups for term in _exchange_terms(setting, lookup)]
    return terms


def _exchange_terms(setting: Setting, lookup: Lookup) -> list[Term]:
    """A table whose features are sharded by axes that shard tokens: each device looks up its features for all
    tokens."""
    axes = _token_cuts(setting, lookup)
    parts = setting.size(axes)
    rows = _rows(setting, lookup) * lookup.times
    entry = math.prod(lookup.weight.shape[dim] for dim in range(len(lookup.weight.shape)) if dim not in lookup.indexed)
    indices = rows / jax.numpy.dtype(lookup.weight.dtype).itemsize / entry * np.dtype(np.int32).itemsize
    both = 2 * SENT["all-to-all"](parts) * rows
    return [
        Term(axes, INPUTS, (parts - 1) * indices, "token ids, gathered for lookups in a sharded table"),
        Term(axes, ACTIVATIONS, both, "lookups in a sharded table, exchanged, forward and backward"),
    ]


def _exchange(setting: Setting, path: str) -> bool:
    """Whether exchanging a table's lookups sends less than gathering the table and scattering its gradient."""
    lookups = [lookup for lookup in setting.uses.lookups if lookup.weight.path == path]
    if any(product.weight.path == path for product in setting.uses.products):
        return False  # it is gathered anyway
    axes = _token_cuts(setting, lookups[0])
    if not axes:
        return False
    table = lookups[0].weight
    sharded = {axis for dim_axes in table.dim_axes for axis in dim_axes} - set(axes)
    whole = math.prod(table.shape) * jax.numpy.dtype(table.dtype).itemsize / setting.size(sharded)
    gathered = 2 * SENT["all-gather"](setting.size(axes)) * whole
    return sum(term.bytes for lookup in lookups for term in _exchange_terms(setting, lookup)) < gathered


def _token_cuts(setting: Setting, lookup: Lookup) -> tuple[str, ...]:
    taken = [dim_axes for dim, dim_axes in enumerate(lookup.weight.dim_axes) if dim not in lookup.indexed]
    return setting.order({axis for dim_axes in taken for axis in dim_axes} & setting.tokens)


def _rows(setting: Setting, lookup: Lookup) -> float:
    """Bytes that a device's own tokens look up, in one execution."""
    kept = [dim for dim in range(len(lookup.weight.shape)) if dim not in lookup.indexed]
    parts = setting.size(_foreign(setting, lookup.weight.dim_axes, kept))
    return lookup.output.bytes / setting.size(setting.tokens) / parts


def _local(setting: Setting, product: Product, which: str) -> float:
    """Bytes of a product's input or output on a device, as partial sums."""
    dims = (*product.batched, *(product.kept if which == "output" else product.contracted))
    parts = setting.size(_foreign(setting, product.weight.dim_axes, dims))
    value = product.output if which == "output" else product.value
    return value.bytes / setting.size(setting.tokens) / parts


def _foreign(setting: Setting, dim_axes: DimAxes, dims: Sequence[int]) -> tuple[str, ...]:
    """Returns the axes that shard these dimensions of a weight and not tokens: it stays sharded along them."""
    return setting.order({axis for dim in dims for axis in dim_axes[dim]} - setting.tokens)
