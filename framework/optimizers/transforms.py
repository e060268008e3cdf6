"""Values for `Optimizer.transform`: factories of optax transformations, also for groups of parameters by pattern.

The layers of a stack are one array with a leading 'layers' axis, but independent tensors: the factories here treat
tensors along `adafactor.BATCH_AXES` as independent. optax's own factories can be used too; those that treat each array
as one tensor (optax.adafactor, lamb, lars) treat a stack of layers as a single tensor.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.adafactor import FactorRules, matrix_dims, scale_by_adafactor
from meshway.framework.optimizers.schedules import Schedule
from meshway.framework.trees import flatten, map_paths, matching, merge, select

# Axes of tables, whose rows are looked up: they are not linear maps, which Muon orthogonalises.
TABLE_AXES = ("vocab", "relpos_buckets", "length", "positions")


@dataclasses.dataclass(frozen=True)
class AxesAware:
    """An optimizer that needs the parameters' logical axes; a transform factory may return one."""

    build: Callable[[Axes], optax.GradientTransformation]


Factory = Callable[..., "optax.GradientTransformation | AxesAware"]  # called as factory(learning_rate=...)


def adafactor(
    learning_rate: float | Schedule,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool | Sequence[tuple[str, bool]] = True,
    min_dim_size_to_factor: int = 128,
    beta1: float | None = None,
    weight_decay_rate: float | None = None,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    factored: bool = True,
    logical_factor_rules: FactorRules | None = None,
    dtype_momentum: str | None = None,
    weight_decay_rate_lr_exponent: float | None = None,
    decay_vectors: bool = False,
    global_norm_clip_threshold: float | None = None,
    max_parameter_scale: float | None = None,
    skip_nan_updates: bool = False,
) -> AxesAware:
    """Adafactor as in T5X; `adafactor.scale_by_adafactor` documents the arguments not named here.

    Args:
      learning_rate: relative to each parameter's scale, unless `multiply_by_parameter_scale` is off.
      beta1: decay of the momentum, an average (without bias correction) of updates times the learning rate.
      weight_decay_rate: share of each matrix subtracted at each update, independent of the learning rate.
      dtype_momentum: of the momentum between updates; None for that of parameters.
      weight_decay_rate_lr_exponent: multiplies that share (or 1, if it is None) by this power of the learning rate.
      decay_vectors: whether vectors and scalars are decayed too, as in T5X.
      global_norm_clip_threshold: largest global norm of the gradients; `Optimizer.max_grad_norm` is the same, but for
        parameters with an optimizer of their own.
      skip_nan_updates: whether an entry that would become NaN, of parameters or of the state, stays as it was. (A step
        whose gradient has a norm that is not finite is left out by itself.)
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        clip = global_norm_clip_threshold
        chain = [
            *([] if clip is None else [optax.clip_by_global_norm(clip)]),
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
                logical_factor_rules=logical_factor_rules,
                max_parameter_scale=max_parameter_scale,
            ),
            optax.scale_by_learning_rate(learning_rate),
        ]
        if beta1 is not None:
            chain.append(optax.ema(beta1, debias=False, accumulator_dtype=dtype_momentum))
        mask = map_paths(lambda path, names: True, axes) if decay_vectors else decay_mask(axes)
        if weight_decay_rate_lr_exponent:
            rate = 1.0 if weight_decay_rate is None else weight_decay_rate
            chain.append(_decayed_by_learning_rate(rate, weight_decay_rate_lr_exponent, learning_rate, mask))
        elif weight_decay_rate is not None:
            chain.append(optax.add_decayed_weights(-weight_decay_rate, mask))
        made = optax.chain(*chain)
        return _without_nans(made) if skip_nan_updates else made

    return AxesAware(build)


def _decayed_by_learning_rate(
    rate: float, exponent: float, learning_rate: float | Schedule, mask: Any
) -> optax.GradientTransformation:
    """Returns what subtracts rate * learning rate ** exponent of each parameter that the mask is True for."""

    def init(params: Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Params, state: optax.ScaleByScheduleState, params: Params
    ) -> tuple[Params, optax.ScaleByScheduleState]:
        share = rate * (learning_rate(state.count) if callable(learning_rate) else learning_rate) ** exponent
        updates = jax.tree.map(lambda u, p, decays: u - share * p if decays else u, updates, params, mask)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _without_nans(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation that leaves alone what it would make NaN, entry by entry, of parameters and state."""

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates, new = transformation.update(updates, state, params)
        updates = jax.tree.map(lambda u, p: jnp.where(jnp.isnan(p + u), 0, u).astype(u.dtype), updates, params)
        return updates, jax.tree.map(lambda value, old: jnp.where(jnp.isnan(value), old, value), new, state)

    return optax.GradientTransformation(transformation.init, update)


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
    """optax.sgd, under a name of this module."""
    return optax.sgd(learning_rate, momentum, nesterov)


def sign_sgd(learning_rate: float | Schedule) -> optax.GradientTransformation:
    """optax.sign_sgd: subtracts the learning rate times the sign of each gradient.

    With a router's load as its bias's gradient this is DeepSeek-V3's balancing (arXiv:2412.19437, section 2.1.2);
    bind it in `Optimizer.overrides`.
    """
    return optax.sign_sgd(learning_rate)


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
    """optax.contrib.muon, with matrices determined by axis names: inputs are the first dimension, outputs the last.

    Adam trains vectors (norm scales, biases) and every parameter that has one of `adam_axes`: embeddings and
    output logits. In a stack, each layer's and each expert's matrix is orthogonalised separately.

    Args:
      learning_rate: of the matrices; of the other parameters too unless `adam_learning_rate` is given.
      consistent_rms: scales updates by ``sqrt(max(inputs, outputs)) * consistent_rms``, so that one learning
        rate suits both (arXiv:2502.16982); None scales by ``sqrt(max(1, outputs / inputs))``.
      adam_weight_decay: applies to all parameters that Adam trains, vectors included.

    Raises:
      UserError: from `Optimizer.bind`, for a parameter of three or more dimensions without batch axes.
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


def decay_mask(axes: Axes) -> Any:
    """Returns a tree of booleans, True for parameters that weight decay applies to: tensors of two or more dimensions.

    Batch axes do not count and joined axes count as one (see `adafactor.matrix_dims`), so norm scales and biases are
    not decayed, stacked or not. Embeddings are decayed like other matrices; `by_pattern` can exempt them.
    """
    return jax.tree.map(lambda names: len(matrix_dims(names)) >= 2, axes, is_leaf=lambda node: isinstance(node, tuple))


def _muon_dimensions(axes: Axes, adam_axes: Sequence[str]) -> Any:
    def dimensions(path: str, names: Names) -> contrib.MuonDimensionNumbers | None:
        dims = matrix_dims(names)
        if len(dims) < 2 or set(names) & set(adam_axes):
            return None
        if len(dims) == 2:
            return contrib.MuonDimensionNumbers(*dims)
        raise UserError(
            f"muon: parameter {path!r} {names} is not a matrix, it has {len(dims)} dimensions; name one of its "
            "axes in muon.adam_axes, or give it another optimizer with by_pattern"
        )

    return map_paths(dimensions, axes)


def made_by(factory: Factory, learning_rate: float | Schedule, axes: Axes, where: str) -> optax.GradientTransformation:
    """Returns the transformation of a factory, built with the axes if it is `AxesAware`.

    Raises:
      UserError: `factory`, which the recipe names at `where`, is not a factory of an optimizer.
    """
    if isinstance(factory, (optax.GradientTransformation, AxesAware)) or not callable(factory):
        raise UserError(f"{where}: {factory!r:.60} is not a factory; write it without parentheses (@optax.adamw)")
    try:
        inspect.signature(factory).bind_partial(learning_rate=learning_rate)
    except TypeError:
        raise UserError(f"{where}: {factory!r:.60} takes no argument named learning_rate") from None
    made = factory(learning_rate=learning_rate)
    if isinstance(made, AxesAware):
        made = made.build(axes)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(f"{where}: {factory!r:.60} returned {made!r:.60}, not an optax transformation")
    return made


def by_pattern(learning_rate: float | Schedule, patterns: Sequence[tuple[str, Factory]]) -> AxesAware:
    """Trains groups of parameters by different optimizers.

    Args:
      learning_rate: given to each factory.
      patterns: (regex over the whole '/'-joined parameter path, factory) in order: the first match decides.

    Raises:
      UserError: from `Optimizer.bind`, for a pattern that decides for no parameter, or a parameter that matches none.
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        left = flatten(axes)
        groups = []
        for pattern, factory in patterns:
            members = frozenset(matching(pattern, left, "by_pattern.patterns"))
            left = {path: names for path, names in left.items() if path not in members}
            groups.append((members, made_by(factory, learning_rate, select(axes, members), pattern)))
        if left:
            raise UserError(
                f"by_pattern: no pattern matches parameter {next(iter(left))!r} ({len(left)} such); "
                "end with ('.*', ...) for all the rest"
            )
        return grouped(groups)

    return AxesAware(build)


def grouped(groups: Sequence[tuple[frozenset[str], optax.GradientTransformation]]) -> optax.GradientTransformation:
    """Returns a transformation that applies to each group of paths its own; its state is a tuple with that of each."""
    # Not optax.partition: it hands out the whole tree with MaskedNodes in it, which transformations that are bound to
    # axes cannot walk beside these, and its state, whose paths are in checkpoints, is laid out otherwise.

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
