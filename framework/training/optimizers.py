"""Optimizers: any optax transformation, bound to a model's parameters and their logical axes.

A recipe binds an `Optimizer`; the trainer calls `bind` once and gets pure functions for its jitted step.
Layers of a stack are one array on a leading 'layers' axis, yet each layer is a tensor of its own: the
factories here keep `adafactor.BATCH_AXES` apart. optax's own factories work as they are; those that treat
each array as one tensor (optax.adafactor, lamb, lars) see a stack of layers as a single tensor.
"""

import dataclasses
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from meshway.framework.axes import Names
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Axes, Params
from meshway.framework.training.adafactor import matrix_dims, scale_by_adafactor
from meshway.framework.training.optimizer_state import transformation_axes
from meshway.framework.training.schedules import Schedule, constant
from meshway.framework.training.trees import flatten, map_paths, merge, select

# Axes of tables, whose rows are looked up rather than multiplied: no linear map for Muon to orthogonalise.
TABLE_AXES = ("vocab", "relpos_buckets", "length")


@dataclasses.dataclass(frozen=True)
class AxesAware:
    """An optimizer that needs the parameters' logical axes: what a transform factory may return."""

    build: Callable[[Axes], optax.GradientTransformation]


Factory = Callable[..., "optax.GradientTransformation | AxesAware"]  # called as factory(learning_rate=...)


class OptimizerState(NamedTuple):
    """The number of updates done, and the transformation's own state (of the trainable parameters)."""

    step: Any  # int32 []
    inner: Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are trained, as a recipe says it; `bind` makes it work on a model.

    Attributes:
      transform: a factory, called as ``transform(learning_rate=schedule)``: one of this file or of optax.
      learning_rate: a number, or a schedule (see `schedules`): update s = 0, 1, ... uses ``schedule(s)``.
      max_grad_norm: largest global norm of the gradients of all trainable parameters; None does not clip.
      frozen: regexes over '/'-joined parameter paths (the whole path must match): parameters left untouched,
        without optimizer state and outside of the norm.

    Raises:
      UserError: an attribute that cannot be meant.
    """

    transform: Factory
    learning_rate: float | Schedule
    max_grad_norm: float | None = None
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.learning_rate, numbers.Real) and not isinstance(self.learning_rate, bool)
        if not number and not callable(self.learning_rate):
            raise UserError(f"Optimizer.learning_rate is {self.learning_rate!r}, not a number or a schedule")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"Optimizer.max_grad_norm is {self.max_grad_norm!r}, not positive (or None)")
        if isinstance(self.frozen, str):
            raise UserError(f"Optimizer.frozen is the string {self.frozen!r}, not a list of regexes")

    def bind(self, axes: Axes, shapes: Params) -> "BoundOptimizer":
        """Returns the optimizer of these parameters.

        Args:
          axes: the logical axis names of each parameter.
          shapes: the same tree of arrays, or of ShapeDtypeStructs.

        Raises:
          UserError: axes that do not fit the shapes, a pattern that matches no parameter, nothing left to
            train, or a transform that is no optimizer's factory.
        """
        names, arrays = flatten(axes), flatten(shapes)
        _check_axes(names, {path: tuple(array.shape) for path, array in arrays.items()})
        frozen: set[str] = set()
        for pattern in self.frozen:
            frozen.update(_matching(pattern, names, "Optimizer.frozen"))
        trainable = frozenset(names) - frozen
        if not trainable:
            raise UserError(f"Optimizer.frozen={list(self.frozen)} leaves no parameter to train")
        rate = self.learning_rate
        schedule: Schedule = rate if callable(rate) else constant(rate)
        axes = select(axes, trainable)
        transformation = _build(self.transform, schedule, axes, "Optimizer.transform")
        return BoundOptimizer(transformation, schedule, self.max_grad_norm, trainable, axes, select(shapes, trainable))


@dataclasses.dataclass(frozen=True)
class BoundOptimizer:
    """Pure functions that train one model's parameters, to be called inside of jit; see `Optimizer.bind`."""

    transformation: optax.GradientTransformation
    schedule: Schedule
    max_grad_norm: float | None
    trainable: frozenset[str]  # paths
    axes: Axes  # of the trainable parameters, as are the shapes
    shapes: Params

    def learning_rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """Returns the learning rate of update `step` (0 is the first), float32 []."""
        return jnp.asarray(self.schedule(step), jnp.float32)

    def init(self, params: Params) -> OptimizerState:
        """Returns the state before the first update."""
        inner = self.transformation.init(select(params, self.trainable))
        return OptimizerState(jnp.zeros((), jnp.int32), inner)

    def update(
        self, grads: Params, state: OptimizerState, params: Params
    ) -> tuple[Params, OptimizerState, dict[str, jax.Array]]:
        """Applies one update.

        Args:
          grads: mean gradients, in the tree of `params` (those of frozen parameters are not read).
          state: what `init` or the last `update` returned.
          params: all parameters.

        Returns:
          (new parameters, new state, statistics): `grad_norm`, the global norm before clipping, and
          `learning_rate`, both float32 [].
        """
        grads, active = select(grads, self.trainable), select(params, self.trainable)
        squares = [jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads)]
        norm = jnp.sqrt(sum(squares))
        if self.max_grad_norm is not None:
            scale = jnp.minimum(1.0, self.max_grad_norm / norm)
            grads = jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)
        updates, inner = self.transformation.update(grads, state.inner, active)
        stats = {"grad_norm": norm, "learning_rate": self.learning_rate(state.step)}
        new_state = OptimizerState(optax.safe_increment(state.step), inner)
        return merge(params, optax.apply_updates(active, updates)), new_state, stats

    def state_axes(self) -> OptimizerState:
        """Returns the logical axes of each array of the state, in the tree of ``eval_shape(init, params)``.

        Each leaf is a tuple of names, () for a scalar. The state holds tuples of its own, so map over the
        shapes first: ``jax.tree.map(f, jax.eval_shape(bound.init, params), bound.state_axes())``.

        Raises:
          UserError: an array whose axes are unknown; see `optimizer_state.transformation_axes`.
        """
        state = jax.eval_shape(self.transformation.init, self.shapes)
        return OptimizerState(step=(), inner=transformation_axes(state, self.axes, self.shapes))


def adafactor(
    learning_rate: float | Schedule,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: int = 128,
    beta1: float | None = None,
    weight_decay_rate: float | None = None,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    factored: bool = True,
) -> AxesAware:
    """Adafactor as T5X runs it; see `adafactor.scale_by_adafactor` for the arguments not named here.

    Args:
      learning_rate: relative to each parameter's scale, unless `multiply_by_parameter_scale` is off.
      beta1: decay of the momentum, an average (without bias correction) of steps that hold the learning rate.
      weight_decay_rate: share of each matrix lost at each update, whatever the learning rate.
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        chain = [
            scale_by_adafactor(
                axes,
                decay_rate=decay_rate,
                step_offset=step_offset,
                clipping_threshold=clipping_threshold,
                multiply_by_parameter_scale=multiply_by_parameter_scale,
                min_dim_size_to_factor=min_dim_size_to_factor,
                epsilon1=epsilon1,
                epsilon2=epsilon2,
                factored=factored,
            ),
            optax.scale_by_learning_rate(learning_rate),
        ]
        if beta1 is not None:
            chain.append(optax.ema(beta1, debias=False))
        if weight_decay_rate is not None:
            chain.append(optax.add_decayed_weights(-weight_decay_rate, decay_mask(axes)))
        return optax.chain(*chain)

    return AxesAware(build)


def adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mu_dtype: str | None = None,
) -> AxesAware:
    """optax.adamw that decays matrices only (see `decay_mask`), by `weight_decay` times the learning rate."""
    return AxesAware(
        lambda axes: optax.adamw(
            learning_rate, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=decay_mask(axes)
        )
    )


def lion(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    mu_dtype: str | None = None,
) -> AxesAware:
    """optax.lion that decays matrices only (see `decay_mask`), by `weight_decay` times the learning rate."""
    return AxesAware(lambda axes: optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask=decay_mask(axes)))


def sgd(
    learning_rate: float | Schedule, momentum: float | None = None, nesterov: bool = False
) -> optax.GradientTransformation:
    """optax.sgd, under the name that the other optimizers of this file have."""
    return optax.sgd(learning_rate, momentum, nesterov)


def muon(
    learning_rate: float | Schedule,
    beta: float = 0.95,
    ns_steps: int = 5,
    weight_decay: float = 0.1,
    consistent_rms: float | None = 0.2,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_weight_decay: float = 0.0,
    adam_learning_rate: float | Schedule | None = None,
    adam_axes: Sequence[str] = TABLE_AXES,
) -> AxesAware:
    """optax.contrib.muon; axis names say what a matrix is: inputs are its first dimension, outputs its last.

    Adam trains vectors (norm scales, biases) and every parameter that has one of `adam_axes`: embeddings and
    output logits. Of a stack, each layer's and each expert's matrix is orthogonalised by itself.

    Args:
      learning_rate: of the matrices; of the others too unless `adam_learning_rate` is given.
      consistent_rms: scales updates by ``sqrt(max(inputs, outputs)) * consistent_rms``, so that one learning
        rate suits both (arXiv:2502.16982); None scales by ``sqrt(max(1, outputs / inputs))``.
      adam_weight_decay: applies to all that Adam trains, vectors included.

    Raises:
      UserError: from `Optimizer.bind`, for a parameter of three or more dimensions that are no stack.
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        return contrib.muon(
            learning_rate,
            ns_steps=ns_steps,
            beta=beta,
            weight_decay=weight_decay,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
            adam_weight_decay=adam_weight_decay,
            adam_learning_rate=adam_learning_rate,
            muon_weight_dimension_numbers=_muon_dimensions(axes, adam_axes),
            consistent_rms=consistent_rms,
        )

    return AxesAware(build)


def by_pattern(learning_rate: float | Schedule, patterns: Sequence[tuple[str, Factory]]) -> AxesAware:
    """Trains groups of parameters by different optimizers.

    Args:
      learning_rate: given to each factory.
      patterns: (regex over the whole '/'-joined parameter path, factory) in order: the first match decides.

    Raises:
      UserError: from `Optimizer.bind`, for a pattern without a parameter of its own, or a parameter that
        matches none.
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        left = flatten(axes)
        groups = []
        for pattern, factory in patterns:
            members = frozenset(_matching(pattern, left, "by_pattern.patterns"))
            left = {path: names for path, names in left.items() if path not in members}
            groups.append((members, _build(factory, learning_rate, select(axes, members), pattern)))
        if left:
            raise UserError(
                f"by_pattern: no pattern matches parameter {next(iter(left))!r} ({len(left)} such); "
                "end with ('.*', ...) for all the rest"
            )
        return _grouped(groups)

    return AxesAware(build)


def decay_mask(axes: Axes) -> Any:
    """Returns the tree of which parameters weight decay acts on: tensors of two or more dimensions.

    Batch axes do not count and joined axes count as one (see `adafactor.matrix_dims`), so norm scales and
    biases are not decayed, stacked or not. Embeddings are decayed, as other matrices are; `by_pattern`
    exempts them where that is not wanted.
    """
    return jax.tree.map(lambda names: len(matrix_dims(names)) >= 2, axes, is_leaf=lambda node: isinstance(node, tuple))


def _grouped(
    groups: list[tuple[frozenset[str], optax.GradientTransformation]],
) -> optax.GradientTransformation:
    def init(params: Params) -> tuple[Any, ...]:
        return tuple(transformation.init(select(params, members)) for members, transformation in groups)

    def update(grads: Params, state: tuple[Any, ...], params: Params) -> tuple[Params, tuple[Any, ...]]:
        updates, states = grads, []
        for (members, transformation), inner in zip(groups, state, strict=True):
            part, inner = transformation.update(select(grads, members), inner, select(params, members))
            updates = merge(updates, part)
            states.append(inner)
        return updates, tuple(states)

    return optax.GradientTransformation(init, update)


def _muon_dimensions(axes: Axes, adam_axes: Sequence[str]) -> Any:
    def dimensions(path: str, names: Names) -> contrib.MuonDimensionNumbers | None:
        dims = matrix_dims(names)
        if len(dims) < 2 or set(names) & set(adam_axes):
            return None
        if len(dims) == 2:
            return contrib.MuonDimensionNumbers(*dims)
        raise UserError(
            f"muon: parameter {path!r} {names} is no matrix but has {len(dims)} dimensions; name one of its "
            "axes in muon.adam_axes, or give it another optimizer with by_pattern"
        )

    return map_paths(dimensions, axes)


def _build(factory: Factory, learning_rate: float | Schedule, axes: Axes, where: str) -> optax.GradientTransformation:
    """Calls a transform factory and gives it the axes if it asks for them."""
    if isinstance(factory, (optax.GradientTransformation, AxesAware)) or not callable(factory):
        raise UserError(f"{where}: {factory!r:.60} is no factory; write it without parentheses (@optax.adamw)")
    try:
        inspect.signature(factory).bind_partial(learning_rate=learning_rate)
    except TypeError:
        raise UserError(f"{where}: {factory!r:.60} takes no argument named learning_rate") from None
    made = factory(learning_rate=learning_rate)
    if isinstance(made, AxesAware):
        made = made.build(axes)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(f"{where}: {factory!r:.60} returned {made!r:.60}, no optax transformation")
    return made


def _check_axes(names: dict[str, Names], shapes: dict[str, tuple[int, ...]]) -> None:
    for path in names.keys() ^ shapes.keys():
        missing, there = ("axes", "a shape") if path in shapes else ("shape", "axes")
        raise UserError(f"optimizer: parameter {path!r} has {there} but no {missing}")
    for path, shape in shapes.items():
        if len(names[path]) != len(shape):
            raise UserError(f"optimizer: parameter {path!r} of shape {shape} has axes {names[path]}")


def _matching(pattern: str, paths: Iterable[str], where: str) -> list[str]:
    try:
        matched = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if not matched:
        hint = did_you_mean(pattern, paths) or f"; parameters left are {', '.join(sorted(paths)[:5])}, ..."
        raise UserError(f"{where}: {pattern!r} matches no (remaining) parameter{hint}")
    return matched
