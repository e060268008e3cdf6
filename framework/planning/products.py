"""How a traced loss uses its parameters: products, lookups, and the inputs of each. Nothing is compiled.

The sums over a mesh that a layout requires follow from these: a product whose weight is sharded along a contracted axis
yields partial sums, one sharded along an output axis yields partial sums of its input's gradient.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from meshway.framework.axes import DimAxes, sharded_by
from meshway.framework.interfaces import Axes, Params
from meshway.framework.partitioning.partitioner import path_name
from meshway.framework.planning.collectives import ShardMapKernel, kernel_of


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array that is not just a parameter; compared by identity.

    Attributes:
      times: how often loops compute a new one in a step.
      trained: whether it depends on a parameter, so that the loss has a gradient for it.
    """

    shape: tuple[int, ...]
    dtype: Any
    times: int
    trained: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the whole array, once."""
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, or a part of one, only moved, cast or sliced.

    Attributes:
      path: its name.
      names: the logical axis of each dimension; None where a reshape joined or split axes.
      dim_axes: the mesh axes that shard each dimension as it is stored.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: tuple[str | None, ...]
    dim_axes: DimAxes

    def keep(self, dims: Sequence[int], shape: Sequence[int], dtype: Any) -> "Weight":
        """Returns the weight with only the dimensions `dims`, in that order."""
        names, dim_axes = tuple(self.names[dim] for dim in dims), tuple(self.dim_axes[dim] for dim in dims)
        return Weight(self.path, tuple(shape), dtype, names, dim_axes)


def weights_of(shapes: Params, axes: Axes, shardings: Any = None) -> list[Weight]:
    """Returns a model's parameters in the order of their tree; without `shardings`, a tree of them, on one device."""
    paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    specs = [()] * len(paths) if shardings is None else [each.spec for each in jax.tree.leaves(shardings)]
    return [
        Weight(path_name(path), leaf.shape, leaf.dtype, tuple(name), sharded_by(spec, len(leaf.shape)))
        for (path, leaf), name, spec in zip(paths, names, specs, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Product:
    """A value times a weight.

    Attributes:
      weight, value, output: the factors and the result.
      contracted, batched, kept: the weight's contracted, batch (or, of a ragged product, group), and remaining
        dimensions.
      times: how often it is computed in a step, loops included.
    """

    weight: Weight
    value: Value
    output: Value
    contracted: tuple[int, ...]
    batched: tuple[int, ...]
    kept: tuple[int, ...]
    times: int

    @property
    def of_experts(self) -> bool:
        """Whether each row is multiplied with the weight of its own expert."""
        return any(self.weight.names[dim] == "expert" for dim in self.batched)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows taken from a weight; indices select along its dimensions `indexed`."""

    weight: Weight
    output: Value
    indexed: tuple[int, ...]
    times: int


@dataclasses.dataclass
class Uses:
    """How a trace uses its parameters.

    Attributes:
      kernels: the bodies of `shard_map`s.
      carried: (mesh axes of the first dimension, bytes on a device, times) of arrays that loops carry with a sharded
        first dimension: those that stages of a pipeline send on.
      laid_out: (shape, spec) -> bytes of an element times how often an array is constrained so.
      dtypes: parameter -> the type it is used in, the narrowest if there are several.
    """

    products: list[Product] = dataclasses.field(default_factory=list)
    lookups: list[Lookup] = dataclasses.field(default_factory=list)
    kernels: list[ShardMapKernel] = dataclasses.field(default_factory=list)
    carried: list[tuple[tuple[str, ...], float, int]] = dataclasses.field(default_factory=list)
    laid_out: dict[tuple[tuple[int, ...], Any], int] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, Any] = dataclasses.field(default_factory=dict)


def find_uses(closed: Any, weights: Sequence[Weight]) -> Uses:
    """Finds the uses of parameters in a loss.

    Args:
      closed: the closed jaxpr of a function whose first arguments, flattened, are the parameters.
      weights: those parameters, in order.

    Returns:
      the products and lookups of the loss itself; those of its gradient follow from them. Of `shard_map` bodies only
      the collectives are read.
    """
    finder = _UseFinder()
    rest = [Value(var.aval.shape, var.aval.dtype, 1) for var in closed.jaxpr.invars[len(weights) :]]
    finder.run(closed.jaxpr, [*weights, *rest], 1)
    return finder.uses


_SAME_DIMS = (
    "convert_element_type",
    "copy",
    "name",
    "sharding_constraint",
    "optimization_barrier",
    "reduce_precision",
    "slice",
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class _UseFinder:
    def __init__(self) -> None:
        self.uses = Uses()

    def run(self, jaxpr: Any, inputs: Sequence[Value | Weight], times: int) -> list[Value | Weight]:
        """Adds the uses in a jaxpr that runs `times` times; returns its outputs."""
        known: dict[Any, Value | Weight] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            known[var] = Value(var.aval.shape, var.aval.dtype, times)

        def read(atom: Any) -> Value | Weight:
            if hasattr(atom, "val") or atom not in known:
                return Value(atom.aval.shape, atom.aval.dtype, times)
            return known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._equation(equation, operands, times), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Any], times: int) -> list[Value | Weight]:
        name = equation.primitive.name
        if name == "scan":
            return self._scan(equation, operands, times)
        if name == "cond":
            results = [self.run(_body(branch), operands[1:], times) for branch in equation.params["branches"]]
            return list(_values(equation.outvars, times, [value for result in results for value in result]))
        if name == "while":
            return self._while(equation, operands, times)
        if name not in ("shard_map", "pallas_call"):
            for key in _INNER:
                inner = _body(equation.params.get(key))
                if inner is not None and len(inner.invars) == len(operands):
                    return self.run(inner, operands, times)
        if name in ("sharding_constraint", "copy", "name") and isinstance(operands[0], Value):
            if name == "sharding_constraint":
                layout = (operands[0].shape, equation.params["sharding"].spec)
                self.uses.laid_out[layout] = self.uses.laid_out.get(layout, 0) + times * operands[0].dtype.itemsize
            return [operands[0]]  # the same array, resharded: products that read it share its gradient
        moved = self._moved(name, equation, operands)
        if moved is not None:
            return [moved]
        if name == "shard_map":
            self.uses.kernels.append(kernel_of(equation, times))
        outputs = _values(equation.outvars, times, operands)
        self._use(name, equation, operands, outputs, times)
        return list(outputs)

    def _scan(self, equation: Any, operands: list[Any], times: int) -> list[Value | Weight]:
        body, repeated = _body(equation.params["jaxpr"]), times * equation.params["length"]
        # Distinguished by rank: arrays that are scanned over have one more dimension outside.
        carried = _same_rank(equation.outvars, body.outvars)
        fixed = _same_rank(equation.invars, body.invars) - carried
        inputs: list[Value | Weight] = list(operands[:fixed])
        inputs += _values(body.invars[fixed : fixed + carried], repeated, operands)
        for operand, var in zip(operands[fixed + carried :], body.invars[fixed + carried :], strict=True):
            if isinstance(operand, Weight):
                inputs.append(operand.keep(range(1, len(operand.shape)), var.aval.shape, var.aval.dtype))
            else:
                inputs += _values([var], repeated, [operand])
        self.run(body, inputs, repeated)
        state = {var.aval.shape for var in body.invars[fixed : fixed + carried]}
        self.uses.carried += [(axes, size, repeated) for axes, size in _cut_states(body, state)]
        return list(_values(equation.outvars, times, operands))

    def _while(self, equation: Any, operands: list[Any], times: int) -> list[Value | Weight]:
        params = equation.params
        body, skipped = _body(params["body_jaxpr"]), params["cond_nconsts"]
        fixed = operands[skipped : skipped + params["body_nconsts"]]
        self.run(body, [*fixed, *_values(body.invars[len(fixed) :], times, operands)], times)
        return list(_values(equation.outvars, times, operands))

    def _moved(self, name: str, equation: Any, operands: list[Any]) -> Weight | None:
        """Returns the resulting weight if an equation only moves a weight; else None."""
        weight = operands[0] if operands and isinstance(operands[0], Weight) else None
        if weight is None:
            return None
        out = equation.outvars[0].aval
        if name in _SAME_DIMS or name == "dynamic_slice":
            return weight.keep(range(len(out.shape)), out.shape, out.dtype)
        if name == "transpose":
            return weight.keep(equation.params["permutation"], out.shape, out.dtype)
        if name == "squeeze":
            gone = {dim % len(weight.shape) for dim in equation.params["dimensions"]}
            return weight.keep([dim for dim in range(len(weight.shape)) if dim not in gone], out.shape, out.dtype)
        if name == "reshape":
            return _reshaped(weight, out)
        if name in ("mul", "div") and all(not other.shape for other in operands[1:]):
            return weight.keep(range(len(out.shape)), out.shape, out.dtype)
        return None

    def _use(self, name: str, equation: Any, operands: list[Any], outputs: list[Value], times: int) -> None:
        for weight in (operand for operand in operands if isinstance(operand, Weight)):
            before = self.uses.dtypes.get(weight.path, weight.dtype)
            narrower = min(before, weight.dtype, key=lambda dtype: jax.numpy.dtype(dtype).itemsize)
            self.uses.dtypes[weight.path] = narrower
        if name == "dot_general":
            (left_c, right_c), (left_b, right_b) = equation.params["dimension_numbers"]
            sides = [(0, left_c, left_b), (1, right_c, right_b)]
            for side, contracted, batched in sides:
                weight, value = operands[side], operands[1 - side]
                if isinstance(weight, Weight) and isinstance(value, Value):
                    taken = {*contracted, *batched}
                    kept = tuple(dim for dim in range(len(weight.shape)) if dim not in taken)
                    self.uses.products.append(
                        Product(weight, value, outputs[0], tuple(contracted), tuple(batched), kept, times)
                    )
        elif name == "ragged_dot_general" and isinstance(operands[1], Weight) and isinstance(operands[0], Value):
            numbers = equation.params["ragged_dot_dimension_numbers"]
            (_, contracted), _ = numbers.dot_dimension_numbers
            groups = tuple(numbers.rhs_group_dimensions)
            kept = tuple(dim for dim in range(len(operands[1].shape)) if dim not in (*contracted, *groups))
            self.uses.products.append(
                Product(operands[1], operands[0], outputs[0], tuple(contracted), groups, kept, times)
            )
        elif name == "gather" and isinstance(operands[0], Weight):
            indexed = tuple(equation.params["dimension_numbers"].start_index_map)
            self.uses.lookups.append(Lookup(operands[0], outputs[0], indexed, times))


def _body(jaxpr: Any) -> Any:
    """Returns the jaxpr of a closed one; parameters of equations may be closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(len(one.aval.shape) == len(other.aval.shape) for one, other in pairs)


def _cut_states(body: Any, shapes: set[tuple[int, ...]]) -> set[tuple[tuple[str, ...], float]]:
    """Returns (mesh axes of the first dimension, bytes on a device) of arrays that a loop's body lays out as it carries
    them, if the mesh shards their first dimension."""
    found = set()
    for equation in body.eqns:
        if equation.primitive.name == "sharding_constraint" and equation.outvars[0].aval.shape in shapes:
            sharding, value = equation.params["sharding"], equation.outvars[0].aval
            first = sharded_by(sharding.spec, 1)[0]
            if first:
                shard = math.prod(sharding.shard_shape(value.shape)) * jax.numpy.dtype(value.dtype).itemsize
                found.add((first, shard))
    return found


def _values(variables: Sequence[Any], times: int, causes: Sequence[Value | Weight]) -> list[Value]:
    trained = any(isinstance(cause, Weight) or cause.trained for cause in causes)
    return [Value(var.aval.shape, var.aval.dtype, times, trained) for var in variables]


def _reshaped(weight: Weight, out: Any) -> Weight | None:
    """Returns the weight after a reshape that adds or drops dimensions of size 1, or splits or joins leading ones."""
    old, new = list(weight.shape), list(out.shape)
    tail = 0
    while tail < min(len(old), len(new)) and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    head = [dim for dim in range(len(old) - tail)]
    axes = tuple(axis for dim in head for axis in weight.dim_axes[dim])
    lead = len(new) - tail
    names: list[str | None] = [None] * lead
    dim_axes: list[tuple[str, ...]] = [()] * lead
    if axes and not lead:
        return None
    if lead:
        # The mesh axes of a joined dimension shard the first of those that it is split into.
        names[0], dim_axes[0] = (weight.names[head[0]] if head else None), axes
    keep = range(len(old) - tail, len(old))
    return Weight(
        weight.path,
        tuple(new),
        out.dtype,
        (*names, *(weight.names[dim] for dim in keep)),
        (*dim_axes, *(weight.dim_axes[dim] for dim in keep)),
    )
