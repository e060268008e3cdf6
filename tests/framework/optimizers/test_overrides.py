"""Overridden parameters are trained by their own rule alone, outside of the norm; the rest as if without them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import program

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.errors import UserError
from meshway.framework.optimizers import optimizers, schedules
from meshway.framework.optimizers.optimizers import BoundOptimizer, Optimizer
from meshway.framework.trees import flatten, map_paths, merge, select

AXES = {
    "embedding": ("vocab", "embed"),
    "moe": {
        "router": {"kernel": ("layers", "embed", "expert"), "bias": ("layers", "expert")},
        "wi": ("layers", "expert", "embed", "mlp"),
    },
    "norm": {"scale": ("embed",)},
}
SIZES = {"vocab": 10, "embed": 8, "expert": 4, "mlp": 16, "layers": 2}
SHAPES = map_paths(lambda _, names: jax.ShapeDtypeStruct(tuple(SIZES[n] for n in names), jnp.float32), AXES)
BIAS = (".*bias", optimizers.sign_sgd, 0.125)
TABLE = ("embedding", functools.partial(optax.sgd, momentum=0.9), schedules.t5_factors("linear_warmup", warmup_steps=4))


def tree(seed: int) -> dict:
    def draw(path: str, leaf) -> np.ndarray:
        return np.random.default_rng([seed, *path.encode()]).normal(size=leaf.shape).astype(np.float32)

    return map_paths(draw, SHAPES)


def train(bound: BoundOptimizer, params: dict, scale: float = 1.0) -> tuple[dict, dict]:
    state, step, stats = bound.init(params), jax.jit(bound.update), {}
    for s in range(3):
        grads = tree(100 + s)
        grads["moe"]["router"]["bias"] *= scale
        params, state, stats = step(select(grads, flatten(params)), state, params)
    return params, stats


@pytest.mark.parametrize(
    "factory", [optimizers.adamw, optimizers.muon, functools.partial(optimizers.adafactor, min_dim_size_to_factor=4)]
)
def test_each_group_trains_as_it_would_alone(factory):
    params, frozen = tree(0), ["norm/.*"]
    whole = Optimizer(factory, 0.1, max_grad_norm=0.5, frozen=frozen, overrides=[BIAS, TABLE]).bind(AXES, SHAPES)
    found, stats = train(whole, params, scale=1e6)
    expected = params
    for optimizer, paths in (
        (Optimizer(factory, 0.1, max_grad_norm=0.5), {"moe/router/kernel", "moe/wi"}),
        (Optimizer(*BIAS[1:]), {"moe/router/bias"}),
        (Optimizer(*TABLE[1:]), {"embedding"}),
    ):
        alone, alone_stats = train(optimizer.bind(select(AXES, paths), select(SHAPES, paths)), select(params, paths))
        expected = merge(expected, alone)
        if optimizer.max_grad_norm:
            assert float(alone_stats["grad_norm"]) == float(stats["grad_norm"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_a_bias_moves_against_its_loads_sign_by_the_rate():
    paths = {"moe/router/bias", "embedding"}
    bound = Optimizer(optax.sgd, 0.1, overrides=[BIAS]).bind(select(AXES, paths), select(SHAPES, paths))
    params, grads = select(tree(0), paths), select(tree(1), paths)
    loads = np.array([[3, 1, 2, 2], [0, 8, 0, 0]], np.float32)
    grads["moe"]["router"]["bias"] = loads - 2
    new, _, _ = bound.update(grads, bound.init(params), params)
    moved = new["moe"]["router"]["bias"] - params["moe"]["router"]["bias"]
    np.testing.assert_allclose(moved, [[-0.125, 0.125, 0, 0], [0.125, -0.125, 0.125, 0.125]], atol=1e-6)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    bound = Optimizer(optax.sgd, 0.1, overrides=[BIAS]).bind(AXES, SHAPES)
    params, grads = tree(0), tree(1)
    for value in (np.inf, np.nan):
        grads["moe"]["router"]["bias"][1, 2] = value
        _, _, stats = bound.update(grads, bound.init(params), params)
        assert not math.isfinite(stats["grad_norm"])


def test_the_state_of_each_group_has_its_axes():
    factory = functools.partial(optimizers.adafactor, min_dim_size_to_factor=4)
    bound = Optimizer(factory, 0.1, overrides=[BIAS, TABLE]).bind(AXES, SHAPES)
    main, bias, table = bound.state_axes().inner
    assert main[0].v_row["moe"]["wi"] == ("layers", "expert", "embed")
    assert not jax.tree.leaves(bias) and table[0].trace == {"embedding": ("vocab", "embed")}


def test_overrides_of_a_recipe_are_sharded_and_restored(tmp_path):
    made = program(
        "lm",
        "optimizers.Optimizer.overrides=[('.*/scale', @optimizers.sgd, 0.1), ('token_embedding/.*', @optimizers.adamw, "
        "@schedules.t5_factors())]",
        layout="fsdp_model",
    )
    state = made.init()
    moment = state.opt_state.inner[2][0].mu["token_embedding"]["embedding"]
    assert moment.sharding == state.params["token_embedding"]["embedding"].sharding
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, {}, {})
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path, read_only=True).restore(1, made.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("moe/router/biass", optax.sgd, 0.1)], "overrides: 'moe/router/biass' matches no.*'moe/router/bias'"),
        ([BIAS, ("moe/.*", optax.sgd, 0.1)], r"'moe/\.\*' matches 'moe/router/bias', as does the override '.*bias'"),
        ([("norm/scale", optax.sgd, 0.1)], "'norm/scale' matches 'norm/scale', as does Optimizer.frozen"),
        ([("(?!norm).*", optax.sgd, 0.1)], "leave no parameter to Optimizer.transform"),
        ([("moe/.*", optax.sgd)], r"not \(regex, factory, learning rate or schedule\)"),
        ([("moe/.*", optax.sgd, "fast")], r"not \(regex, factory, learning rate or schedule\)"),
        (("moe/.*", optax.sgd, 0.1), r"holds 'moe/\.\*', not \(regex"),
        ([("moe/.*", optax.sgd(0.1), 0.1)], r"Optimizer.overrides, 'moe/\.\*': .* without parentheses"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be_meant(overrides, message):
    with pytest.raises(UserError, match=message):
        Optimizer(optax.sgd, 0.1, frozen=["norm/scale"], overrides=overrides).bind(AXES, SHAPES)
