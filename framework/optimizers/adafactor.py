"""Adafactor, factored by the names of a parameter's axes.

Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, arXiv:1804.04235.
Unlike `optax.adafactor`, which treats a stack of layers as one tensor and heads as a dimension of their own,
this one treats each layer as a matrix.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.trees import flatten, map_paths, matching

# Axes along which independent tensors are stacked: nothing is ever averaged over them.
BATCH_AXES = ("layers", "expert", "stage")
# Adjacent axes that together are one dimension of a matrix.
JOINED_AXES = (("heads", "head_dim"), ("kv_heads", "head_dim"))
ROW, COLUMN, NONE = "row", "column", "none"
FactorRules = Mapping[str, str]  # axis name -> one of the three


class AdafactorState(NamedTuple):
    """Second moments, each a tree like the parameters'; slots that a parameter does not use are zeros [1].

    Of a factored parameter, `v_row` has the batch and row axes and `v_col` the batch and column axes, in the
    parameter's order; of any other, `v` has the parameter's shape. All are float32.
    """

    step: jax.Array  # int32 [], the number of updates done
    v_row: Params
    v_col: Params
    v: Params


def matrix_dims(names: Names) -> list[tuple[int, ...]]:
    """Returns the dimensions of the tensor(s) stacked in an array, without batch axes and with joined axes as one.

    ``('layers', 'embed', 'heads', 'head_dim')`` gives ``[(1,), (2, 3)]``: a stack of matrices.
    """
    dims: list[tuple[int, ...]] = []
    for index, name in enumerate(names):
        if name in BATCH_AXES:
            continue
        if dims and len(dims[-1]) == 1 and (names[dims[-1][0]], name) in JOINED_AXES:
            dims[-1] = (*dims[-1], index)
        else:
            dims.append((index,))
    return dims


def factored_dims(
    names: Names, shape: Sequence[int], min_dim_size: int, rules: FactorRules | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the two groups of dimensions to factor over, in the parameter's order, or None where it is not factored.

    They are the two largest of `matrix_dims`; both must have at least `min_dim_size` entries.
    A tensor of three or more such dimensions is not averaged over the others, as in optax.

    Where `rules` have each of the parameter's axes (but for `BATCH_AXES`), they decide instead, whatever the sizes: a
    matrix of a 'row' and a 'column' is factored, anything else is not. Which of the two is called a row changes
    nothing: V is the same rank-1 estimate.

    Raises:
      UserError: `rules` would factor what is no matrix.
    """
    dims = matrix_dims(names)
    if rules is not None and all(name in rules for name in names if name not in BATCH_AXES):
        roles = [{rules[names[dim] or ""] for dim in group} for group in dims]
        if not {ROW, COLUMN} <= set[str]().union(*roles) or {NONE} in roles:
            return None
        if len(dims) != 2 or any(len(each) > 1 for each in roles):
            raise UserError(
                f"logical_factor_rules: a parameter with axes {names} is no matrix of a row and a column; leave out "
                "one of them, and it is factored by its sizes"
            )
        return dims[0], dims[1]
    sizes = {group: math.prod(shape[dim] for dim in group) for group in dims}
    largest = sorted(sizes, key=lambda group: sizes[group])[-2:]
    if len(largest) < 2 or min(sizes[group] for group in largest) < min_dim_size:
        return None
    rows, columns = sorted(largest)
    return rows, columns


def factored_slots(names: Names, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], Names]]:
    """Returns the (shape, axis names) of `v_row` and `v_col` of a parameter, if it is factored."""
    dims = factored_dims(names, shape, 1)
    if dims is None:
        return {}
    rows, columns = dims
    return {
        "v_row": (without_dims(tuple(shape), columns), without_dims(tuple(names), columns)),
        "v_col": (without_dims(tuple(shape), rows), without_dims(tuple(names), rows)),
    }


def scale_by_adafactor(
    axes: Axes,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool | Sequence[tuple[str, bool]] = True,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    factored: bool = True,
    logical_factor_rules: FactorRules | None = None,
    max_parameter_scale: float | None = None,
) -> optax.GradientTransformation:
    """Returns Adafactor without learning rate, momentum and sign: chain it with a negative scale.

    For update t = 1, 2, ... of a gradient G of parameter X, with beta2 = 1 - t**-decay_rate (section 7.2):
    V is the moving average of G**2 + epsilon1, or its rank-1 estimate V = R C' / mean(R) from the row means R
    and column means C (algorithm 4); U = G / sqrt(V) is clipped to U / max(1, RMS(U) / clipping_threshold)
    (section 6) and multiplied by max(epsilon2, RMS(X)) (section 8).

    Args:
      axes: the logical axis names of each parameter. Tensors along `BATCH_AXES` are independent (in factoring and both
        RMS), and each pair of `JOINED_AXES` counts as one dimension.
      decay_rate: exponent of the second moment's decay.
      step_offset: the update at which t starts again, for fine-tuning.
      clipping_threshold: largest RMS of an update before the parameter's scale; None does not clip.
      multiply_by_parameter_scale: whether steps are relative to the parameter's RMS; or (regex over the whole
        '/'-joined path, whether), of which the first that matches decides, as T5X's `HParamMap` (which searches).
      min_dim_size_to_factor: a matrix with fewer rows or columns than this keeps all its second moments.
      epsilon1: added to squared gradients.
      epsilon2: least scale of a parameter.
      factored: False keeps all second moments of every parameter.
      logical_factor_rules: axis name -> 'row', 'column' or 'none', as T5X's: a parameter all of whose axes are in it is
        factored by them and not by its sizes (see `factored_dims`). T5X does so where layers are scanned, or heads and
        their size are two dimensions.
      max_parameter_scale: largest scale of a parameter, against growth without bound; None for any.

    Raises:
      UserError: another word in `logical_factor_rules`; from `init`, if they would factor what is no matrix.
      ValueError: from `update`, if the parameters are not given but their scale is needed.
    """
    adafactor = _Adafactor(
        axes=axes,
        decay_rate=decay_rate,
        step_offset=step_offset,
        clipping_threshold=clipping_threshold,
        scaled=_scaled(multiply_by_parameter_scale, axes),
        max_scale=math.inf if max_parameter_scale is None else max_parameter_scale,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon1=epsilon1,
        epsilon2=epsilon2,
        factored=factored,
        rules=_checked(logical_factor_rules),
    )
    return optax.GradientTransformation(adafactor.init, adafactor.update)


@dataclasses.dataclass(frozen=True)
class _Adafactor:
    axes: Axes
    decay_rate: float
    step_offset: int
    clipping_threshold: float | None
    scaled: Any  # a tree of booleans
    max_scale: float
    min_dim_size_to_factor: int
    epsilon1: float
    epsilon2: float
    factored: bool
    rules: FactorRules | None

    def init(self, params: Params) -> AdafactorState:
        leaves, treedef = _flatten(params)
        names = treedef.flatten_up_to(self.axes)
        slots = [self._init_slots(*args) for args in zip(leaves, names, strict=True)]
        return AdafactorState(jnp.zeros((), jnp.int32), *_unzip(treedef, slots, 3))

    def update(
        self, grads: Params, state: AdafactorState, params: Params | None = None
    ) -> tuple[Params, AdafactorState]:
        if params is None:
            if any(jax.tree.leaves(self.scaled)):
                raise ValueError("scale_by_adafactor: update() needs the parameters, to scale by their RMS")
            params = grads
        leaves, treedef = _flatten(grads)
        trees = (params, self.axes, self.scaled, state.v_row, state.v_col, state.v)
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        t = (state.step - self.step_offset + 1).astype(jnp.float32)
        beta2 = 1.0 - t**-self.decay_rate
        results = [self._update_leaf(beta2, *args) for args in zip(leaves, *columns, strict=True)]
        updates, *slots = _unzip(treedef, results, 4)
        return updates, AdafactorState(optax.safe_increment(state.step), *slots)

    def _dims(self, names: Names, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return factored_dims(names, shape, self.min_dim_size_to_factor, self.rules) if self.factored else None

    def _init_slots(self, param: jax.Array, names: Names) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape, unused = param.shape, (1,)
        dims = self._dims(names, shape)
        if dims is None:
            shapes = unused, unused, shape
        else:
            shapes = without_dims(shape, dims[1]), without_dims(shape, dims[0]), unused
        # Separate arrays: the train step donates its state, and a buffer cannot be donated twice.
        v_row, v_col, v = (jnp.zeros(slot, jnp.float32) for slot in shapes)
        return v_row, v_col, v

    def _update_leaf(
        self,
        beta2: jax.Array,
        grad: jax.Array,
        param: jax.Array,
        names: Names,
        scaled: bool,
        v_row: jax.Array,
        v_col: jax.Array,
        v: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        grad = grad.astype(jnp.float32)
        square = jnp.square(grad) + self.epsilon1
        dims = self._dims(names, grad.shape)
        if dims is None:
            v = beta2 * v + (1.0 - beta2) * square
            update = grad * jax.lax.rsqrt(v)
        else:
            rows, columns = dims
            v_row = beta2 * v_row + (1.0 - beta2) * jnp.mean(square, axis=columns)
            v_col = beta2 * v_col + (1.0 - beta2) * jnp.mean(square, axis=rows)
            # sqrt(mean(R)) / sqrt(R) rather than 1 / sqrt(R / mean(R)): if other rows have large gradients, the
            # quotient of a row without any (R = epsilon1) would underflow, and 0 / 0 is NaN.
            row = jnp.expand_dims(v_row, columns)
            row = jnp.sqrt(jnp.mean(row, axis=rows, keepdims=True)) * jax.lax.rsqrt(row)
            update = grad * row * jnp.expand_dims(jax.lax.rsqrt(v_col), rows)
        # One number for each tensor, so that the update itself is multiplied only once.
        scale = jnp.ones((), jnp.float32)
        tensor = tuple(index for index, name in enumerate(names) if name not in BATCH_AXES)
        if self.clipping_threshold is not None:
            scale = scale / jnp.maximum(1.0, _rms(update, tensor) / self.clipping_threshold)
        if scaled:
            rms = jnp.maximum(_rms(param, tensor), self.epsilon2)
            scale = scale * (rms if math.isinf(self.max_scale) else jnp.minimum(rms, self.max_scale))
        return update * scale, v_row, v_col, v


def _scaled(setting: bool | Sequence[tuple[str, bool]], axes: Axes) -> Any:
    """Returns for each parameter whether its updates are multiplied by its scale."""
    if isinstance(setting, bool):
        return map_paths(lambda path, names: setting, axes)
    left, found = flatten(axes), dict[str, bool]()
    for pattern, scaled in setting:
        found |= dict.fromkeys(matching(pattern, left, "multiply_by_parameter_scale"), scaled)
        left = {path: names for path, names in left.items() if path not in found}
    if left:
        raise UserError(
            f"multiply_by_parameter_scale: no pattern matches {next(iter(left))!r}; end with ('.*', True) for the rest"
        )
    return map_paths(lambda path, names: found[path], axes)


def _checked(rules: FactorRules | None) -> FactorRules | None:
    for name, role in (rules or {}).items():
        if role not in (ROW, COLUMN, NONE):
            raise UserError(f"logical_factor_rules: {name!r} is {role!r}, not '{ROW}', '{COLUMN}' or '{NONE}'")
    return rules


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=dims, keepdims=True))


def without_dims(items: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns a shape, or axis names, without the given dimensions."""
    return tuple(item for index, item in enumerate(items) if index not in dims)


def _flatten(tree: Params) -> tuple[list[jax.Array], Any]:
    # jax's stubs hide the methods of a PyTreeDef from type checkers: Any shows them.
    return jax.tree.flatten(tree)


def _unzip(treedef: Any, rows: Sequence[tuple[jax.Array, ...]], width: int) -> list[Params]:
    return [treedef.unflatten([row[column] for row in rows]) for column in range(width)]
