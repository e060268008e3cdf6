"""Optimizers: any optax transformation, bound to a model's parameters and their logical axes.

A recipe binds an `Optimizer`; the trainer calls `bind` once and gets pure functions for its jitted step. Values for
`Optimizer.transform` are in `transforms`; recipes name them by this module (`optimizers.adamw`).
"""

import dataclasses
import numbers
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.optimizer_state import transformation_axes
from meshway.framework.optimizers.schedules import Schedule, constant
from meshway.framework.optimizers.transforms import (
    AxesAware,
    Factory,
    adafactor,
    adamw,
    by_pattern,
    decay_mask,
    grouped,
    lion,
    made_by,
    muon,
    sgd,
    sign_sgd,
)
from meshway.framework.trees import flatten, matching, merge, select

__all__ = [
    "AxesAware",
    "BoundOptimizer",
    "Factory",
    "Optimizer",
    "OptimizerState",
    "ParameterAverage",
    "adafactor",
    "adamw",
    "by_pattern",
    "decay_mask",
    "lion",
    "muon",
    "sgd",
    "sign_sgd",
]


class OptimizerState(NamedTuple):
    """The number of updates done, and the transformation's own state (of the trainable parameters)."""

    step: Any  # int32 []
    inner: Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are trained, as a recipe configures it; `bind` applies it to a model.

    Attributes:
      transform: a factory, called as ``transform(learning_rate=schedule)``: one of this file or of optax.
      learning_rate: a number, or a schedule (see `schedules`): update s = 0, 1, ... uses ``schedule(s)``.
      max_grad_norm: largest global norm of the gradients that `transform` gets; None does not clip.
      frozen: regexes over '/'-joined parameter paths (the whole path must match): parameters that are not trained, have
        no optimizer state and are not in the norm.
      overrides: (regex, factory, learning rate or schedule): parameters trained by another factory, not in the norm and
        never clipped, such as ``('.*router/bias', @optimizers.sign_sgd, 0.001)``.

    Raises:
      UserError: an attribute of a wrong type or out of range.
    """

    transform: Factory
    learning_rate: float | Schedule
    max_grad_norm: float | None = None
    frozen: Sequence[str] = ()
    overrides: Sequence[tuple[str, Factory, float | Schedule]] = ()

    def __post_init__(self) -> None:
        if not _is_rate(self.learning_rate):
            raise UserError(f"Optimizer.learning_rate is {self.learning_rate!r}, not a number or a schedule")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"Optimizer.max_grad_norm is {self.max_grad_norm!r}, not positive (or None)")
        if isinstance(self.frozen, str):
            raise UserError(f"Optimizer.frozen is the string {self.frozen!r}, not a list of regexes")
        for override in self.overrides:
            sound = isinstance(override, Sequence) and len(override) == 3 and isinstance(override[0], str)
            if not sound or not _is_rate(override[2]):
                raise UserError(
                    f"Optimizer.overrides holds {override!r:.100}, not (regex, factory, learning rate or schedule), "
                    "such as ('.*router/bias', @optimizers.sign_sgd, 0.001)"
                )

    def bind(self, axes: Axes, shapes: Params, untrained: Collection[str] = ()) -> "BoundOptimizer":
        """Returns the optimizer of these parameters.

        Args:
          axes: the logical axis names of each parameter.
          shapes: the same tree of arrays, or of ShapeDtypeStructs.
          untrained: paths of those that the model updates itself.

        Raises:
          UserError: axes that do not fit the shapes, a pattern that matches no parameter, a parameter that several of
            `frozen` and `overrides` match, nothing left to train, or a transform that is not a factory of an optimizer.
        """
        names, arrays = flatten(axes), flatten(shapes)
        _check_axes(names, {path: tuple(array.shape) for path, array in arrays.items()})
        names = {path: each for path, each in names.items() if path not in untrained}
        frozen: set[str] = set()
        for pattern in self.frozen:
            frozen.update(matching(pattern, names, "Optimizer.frozen"))
        trainable = frozenset(names) - frozen
        if not trainable:
            raise UserError(f"Optimizer.frozen={list(self.frozen)} leaves no parameter to train")
        overridden = self._overridden(names, frozen)
        main = trainable.difference(*overridden)
        if not main:
            raise UserError("Optimizer.overrides and frozen leave no parameter to Optimizer.transform")
        schedule = _schedule(self.learning_rate)
        transformation = made_by(self.transform, schedule, select(axes, main), "Optimizer.transform")
        if overridden:
            groups = [(main, transformation)]
            for members, (pattern, factory, rate) in zip(overridden, self.overrides, strict=True):
                where = f"Optimizer.overrides, {pattern!r}"
                groups.append((members, made_by(factory, _schedule(rate), select(axes, members), where)))
            transformation = grouped(groups)
        axes, shapes = select(axes, trainable), select(shapes, trainable)
        return BoundOptimizer(transformation, schedule, self.max_grad_norm, trainable, main, axes, shapes)

    def _overridden(self, names: dict[str, Names], frozen: set[str]) -> list[frozenset[str]]:
        """Returns the paths that each override matches."""
        owners = dict.fromkeys(frozen, "Optimizer.frozen")
        claimed = []
        for pattern, _, _ in self.overrides:
            members = matching(pattern, names, "Optimizer.overrides")
            for path in members:
                if path in owners:
                    raise UserError(f"Optimizer.overrides: {pattern!r} matches {path!r}, as does {owners[path]}")
            owners |= dict.fromkeys(members, f"the override {pattern!r}")
            claimed.append(frozenset(members))
        return claimed


@dataclasses.dataclass(frozen=True)
class BoundOptimizer:
    """Pure functions that train one model's parameters, to be called inside jit; see `Optimizer.bind`."""

    transformation: optax.GradientTransformation
    schedule: Schedule
    max_grad_norm: float | None
    trainable: frozenset[str]  # paths
    normed: frozenset[str]  # those in the global norm: all but overrides'
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
          grads: mean gradients, a tree like `params` (those of frozen parameters are ignored).
          state: what `init` or the last `update` returned.
          params: all parameters.

        Returns:
          (new parameters, new state, statistics): `grad_norm`, the global norm before clipping (without overridden
          parameters, but NaN if a gradient of theirs is not finite), and `learning_rate`, both float32 [].
        """
        grads, active = select(grads, self.trainable), select(params, self.trainable)
        main = select(grads, self.normed)
        norm = _norm(main)
        if self.max_grad_norm is not None:
            # optax.clip_by_global_norm rounds otherwise (it divides each gradient), and says no norm.
            scale = jnp.minimum(1.0, self.max_grad_norm / norm)
            grads = merge(grads, jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), main))
        if self.trainable != self.normed:  # the step skips updates whose norm is not finite
            norm = jnp.where(jnp.isfinite(_norm(select(grads, self.trainable - self.normed))), norm, jnp.nan)
        updates, inner = self.transformation.update(grads, state.inner, active)
        stats = {"grad_norm": norm, "learning_rate": self.learning_rate(state.step)}
        new_state = OptimizerState(optax.safe_increment(state.step), inner)
        return merge(params, optax.apply_updates(active, updates)), new_state, stats

    def state_axes(self) -> OptimizerState:
        """Returns the logical axes of each array of the state, a tree like ``eval_shape(init, params)``.

        Each leaf is a tuple of names, () for a scalar. States contain other tuples too, so map over the shapes first:
        ``jax.tree.map(f, jax.eval_shape(bound.init, params), bound.state_axes())``.

        Raises:
          UserError: an array whose axes are unknown; see `optimizer_state.transformation_axes`.
        """
        state = jax.eval_shape(self.transformation.init, self.shapes)
        return OptimizerState(step=(), inner=transformation_axes(state, self.axes, self.shapes))


@dataclasses.dataclass(frozen=True)
class ParameterAverage:
    """An exponential moving average of trained parameters, in float32 or better, which a run keeps beside them.

    After update t = 0, 1, ... it is decay * average + (1 - decay) * parameters; it starts from the initial parameters.

    Attributes:
      decay: at least 0 and below 1; 0.999 remembers about a thousand updates. None keeps no average.
      warmup: whether the decay is at most (1 + t) / (10 + t), so that the first parameters are soon forgotten (as
        TensorFlow's ExponentialMovingAverage does with `num_updates`).
      evaluate: whether the run's own evaluations use it; `meshway eval`, `infer` and `convert` do with --averaged.
    """

    decay: float | None
    warmup: bool = False
    evaluate: bool = False

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"ParameterAverage.decay = {self.decay}: it must be at least 0 and below 1")

    def init(self, params: Params) -> Params:
        """Returns the average before the first update, of trained parameters."""
        return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True), params)

    def update(self, average: Params, params: Params, step: jax.Array) -> Params:
        """Returns the average after update number `step` (0 is the first), which gave all parameters `params`."""
        decay: Any = self.decay
        if self.warmup:
            t = step.astype(jnp.float32)
            decay = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
        new = select(params, flatten(average))
        moved = optax.incremental_update(new, average, 1.0 - decay)
        return jax.tree.map(lambda value, before: value.astype(before.dtype), moved, average)


def _check_axes(names: dict[str, Names], shapes: dict[str, tuple[int, ...]]) -> None:
    for path in names.keys() ^ shapes.keys():
        missing, there = ("axes", "a shape") if path in shapes else ("shape", "axes")
        raise UserError(f"optimizer: parameter {path!r} has {there} but no {missing}")
    for path, shape in shapes.items():
        if len(names[path]) != len(shape):
            raise UserError(f"optimizer: parameter {path!r} of shape {shape} has axes {names[path]}")


def _is_rate(rate: Any) -> bool:
    return callable(rate) or (isinstance(rate, numbers.Real) and not isinstance(rate, bool))


def _schedule(rate: float | Schedule) -> Schedule:
    return rate if callable(rate) else constant(rate)


def _norm(grads: Params) -> jax.Array:
    """Returns the global norm, float32 []; optax sums squares in the gradients' own dtype, so they are cast first."""
    return optax.tree.norm(jax.tree.map(lambda grad: grad.astype(jnp.float32), grads))
