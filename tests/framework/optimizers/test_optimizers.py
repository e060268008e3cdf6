"""Optimizers equal optax's, treat stacked layers as separate ones, and know the axes of their state."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshway.framework.errors import UserError
from meshway.framework.optimizers import optimizers, schedules
from meshway.framework.optimizers.optimizers import AxesAware, Optimizer
from meshway.framework.trees import flatten, map_paths

LAYERS = 2
AXES = {
    "token_embedder": {"embedding": ("vocab", "embed")},
    "decoder": {
        "layers": {
            "query": {"kernel": ("layers", "embed", "heads", "head_dim")},
            "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
            "wi": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
            "norm": {"scale": ("layers", "embed")},
        },
        "norm": {"scale": ("embed",)},
        "logits": {"kernel": ("embed", "vocab")},
    },
}
SIZES = {"vocab": 20, "embed": 8, "heads": 4, "head_dim": 3, "mlp": 16, "layers": LAYERS}
TINY_AXES = {"mlp": {"kernel": ("embed", "mlp")}, "norm": {"scale": ("embed",)}}


def _shapes(axes: dict) -> dict:
    return map_paths(lambda _, names: jax.ShapeDtypeStruct(tuple(SIZES[n] for n in names), jnp.float32), axes)


SHAPES, TINY = _shapes(AXES), _shapes(TINY_AXES)
SMALL_ADAFACTOR = functools.partial(optimizers.adafactor, min_dim_size_to_factor=8)


def _tree(seed: int, shapes: dict = SHAPES) -> dict:
    def draw(path: str, leaf) -> np.ndarray:
        return np.random.default_rng([seed, *path.encode()]).normal(size=leaf.shape).astype(np.float32)

    return map_paths(draw, shapes)  # by path, for jit sorts the keys of the dicts it returns


def _train(bound: optimizers.BoundOptimizer, params: dict, steps: int = 3) -> tuple[dict, tuple, list[dict]]:
    state, step, all_stats = bound.init(params), jax.jit(bound.update), []
    for s in range(steps):
        params, state, stats = step(_tree(100 + s, params), state, params)
        all_stats.append(stats)
    return params, state, all_stats


def _train_optax(transform: optax.GradientTransformation, params: dict, steps: int = 3) -> dict:
    @jax.jit
    def step(grads, state, params):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for s in range(steps):
        params, state = step(_tree(100 + s, params), state, params)
    return params


def _assert_close(actual, expected, rtol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), actual, expected)


def _state_axes(bound: optimizers.BoundOptimizer) -> dict[str, tuple]:
    """Returns the axes by key path, after checking that each has its array's rank."""
    state = jax.eval_shape(bound.init, SHAPES)

    def check(leaf, names) -> None:
        assert isinstance(names, tuple) and len(names) == len(leaf.shape), (leaf, names)

    axes = bound.state_axes()
    jax.tree.map(check, state, axes)
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    leaves = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return dict(zip(leaves, treedef.flatten_up_to(axes), strict=True))


def _ending(found: dict[str, tuple], suffix: str) -> tuple:
    (match,) = [names for path, names in found.items() if path.endswith(suffix)]
    return match


@pytest.mark.parametrize(
    "factory",
    [optax.adamw, optax.lion, functools.partial(optax.sgd, momentum=0.9, nesterov=True), optimizers.sgd],
)
def test_a_plain_optax_factory_trains_as_optax_does(factory) -> None:
    schedule = schedules.t5_factors("constant * linear_warmup", base_learning_rate=0.1, warmup_steps=2)
    params = _tree(0, TINY)
    actual, state, _ = _train(Optimizer(factory, schedule).bind(TINY_AXES, TINY), params)
    _assert_close(actual, _train_optax(factory(schedule), params))
    assert state.step == 3


def test_the_first_update_uses_the_schedule_at_zero() -> None:
    bound = Optimizer(optax.sgd, lambda step: 0.5 + step).bind(TINY_AXES, TINY)
    params = _tree(0, TINY)
    update = jax.jit(bound.update)
    first, state, stats = update(_tree(1, TINY), bound.init(params), params)
    _assert_close(first, jax.tree.map(lambda p, g: p - 0.5 * g, params, _tree(1, TINY)))
    assert stats["learning_rate"] == 0.5 == bound.learning_rate(0)
    _, _, stats = update(_tree(2, TINY), state, first)
    assert stats["learning_rate"] == 1.5 == bound.learning_rate(1)


def test_clipping_scales_to_the_limit_and_reports_the_norm_before() -> None:
    params, grads = _tree(0, TINY), _tree(1, TINY)
    norm = math.sqrt(sum(float(np.square(g).sum()) for g in jax.tree.leaves(grads)))
    for limit in (norm / 4, norm * 4):
        bound = Optimizer(optax.sgd, 1.0, max_grad_norm=limit).bind(TINY_AXES, TINY)
        new, _, stats = jax.jit(bound.update)(grads, bound.init(params), params)
        np.testing.assert_allclose(stats["grad_norm"], norm, rtol=1e-6)
        step = math.sqrt(sum(float(np.square(n - p).sum()) for n, p in _pairs(new, params)))
        np.testing.assert_allclose(step, min(norm, limit), rtol=1e-5)


def _pairs(a: dict, b: dict) -> list[tuple]:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_zero_gradients_pass_clipping_unharmed() -> None:
    bound = Optimizer(optax.sgd, 1.0, max_grad_norm=1.0).bind(TINY_AXES, TINY)
    params = _tree(0, TINY)
    new, _, _ = bound.update(jax.tree.map(np.zeros_like, params), bound.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, new, params)


@pytest.mark.parametrize("factory", [optax.adamw, SMALL_ADAFACTOR])
def test_frozen_parameters_stay_bit_identical_and_leave_no_trace(factory) -> None:
    patterns = [r"token_embedder/.*", r".*/norm/scale"]
    bound = Optimizer(factory, 0.1, max_grad_norm=1.0, frozen=patterns).bind(AXES, SHAPES)
    params = _tree(0)
    trained, state, stats = _train(bound, params)
    frozen = {"token_embedder/embedding", "decoder/norm/scale", "decoder/layers/norm/scale"}
    for path, value in flatten(trained).items():
        assert np.array_equal(value, flatten(params)[path]) == (path in frozen), path
    assert not [path for path in _state_axes(bound) if "embedding" in path or "norm" in path]
    grads = [g for path, g in flatten(_tree(100)).items() if path not in frozen]
    np.testing.assert_allclose(
        stats[0]["grad_norm"], math.sqrt(sum(float(np.square(g).sum()) for g in grads)), rtol=1e-6
    )


def test_decay_acts_on_matrices_only_stacked_or_not() -> None:
    mask = flatten(optimizers.decay_mask(AXES))
    assert {path for path, decayed in mask.items() if not decayed} == {
        "decoder/layers/wi/bias",
        "decoder/layers/norm/scale",
        "decoder/norm/scale",
    }
    assert not optimizers.decay_mask({"bias": ("layers", "heads", "head_dim")})["bias"]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_decay_shrinks_what_has_no_gradient(name: str) -> None:
    decay = {"weight_decay_rate": 0.05} if name == "adafactor" else {"weight_decay": 0.5}
    factory = functools.partial(getattr(optimizers, name), **decay)
    bound = Optimizer(factory, 0.1).bind(TINY_AXES, TINY)
    params = _tree(0, TINY)
    zeros = jax.tree.map(np.zeros_like, params)
    new, _, _ = jax.jit(bound.update)(zeros, bound.init(params), params)
    for path, value in flatten(new).items():
        factor = 0.95 if flatten(optimizers.decay_mask(TINY_AXES))[path] else 1.0
        np.testing.assert_allclose(value, factor * flatten(params)[path], rtol=1e-6)


def test_adafactor_with_momentum_and_decay_equals_optax_on_matrices() -> None:
    axes = {"w": ("embed", "mlp"), "u": ("mlp", "embed")}
    shapes = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in axes}
    rng = np.random.default_rng(0)
    grads = [{name: rng.normal(size=(8, 8)).astype(np.float32) for name in axes} for _ in range(4)]
    schedule = schedules.t5_factors("constant * linear_warmup", base_learning_rate=0.1, warmup_steps=3)
    ours = Optimizer(functools.partial(SMALL_ADAFACTOR, beta1=0.9, weight_decay_rate=0.01), schedule)
    bound = ours.bind(axes, shapes)
    theirs = optax.adafactor(schedule, min_dim_size_to_factor=8, momentum=0.9, weight_decay_rate=0.01)
    params = expected = grads[0]
    state, their_state = bound.init(params), theirs.init(params)
    step, their_step = jax.jit(bound.update), jax.jit(theirs.update)
    for grad in grads:
        params, state, _ = step(grad, state, params)
        updates, their_state = their_step(grad, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    _assert_close(params, expected)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (
            optimizers.adamw,
            functools.partial(
                optax.adamw, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=optimizers.decay_mask(TINY_AXES)
            ),
        ),
        (functools.partial(optimizers.sgd, momentum=0.9), functools.partial(optax.sgd, momentum=0.9)),
        (
            functools.partial(optimizers.sgd, momentum=0.9, nesterov=True),
            functools.partial(optax.sgd, momentum=0.9, nesterov=True),
        ),
        (
            optimizers.lion,
            functools.partial(optax.lion, b1=0.9, b2=0.99, weight_decay=0.0),
        ),
    ],
    ids=["adamw", "momentum", "nesterov", "lion"],
)
def test_defaults_and_options_are_the_documented_ones(ours, theirs) -> None:
    params = _tree(0, TINY)
    found, _, _ = _train(Optimizer(ours, 0.01).bind(TINY_AXES, TINY), params)
    expected = _train_optax(theirs(0.01), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected)


def test_muon_orthogonalises_each_layer_by_itself() -> None:
    factory = functools.partial(optimizers.muon, weight_decay=0.0)
    params = _tree(0)
    trained, _, _ = _train(Optimizer(factory, 0.1).bind(AXES, SHAPES), params)
    layers = params["decoder"]["layers"]
    matrices = {"query": (8, 12), "out": (12, 8), "wi": (8, 16)}
    # Plain optax.contrib.muon sees 2-D arrays as matrices: give it each layer's, heads and head_dim joined.
    apart = {
        f"{name}{k}": layers[name]["kernel"][k].reshape(shape)
        for name, shape in matrices.items()
        for k in range(LAYERS)
    }
    transform = optax.contrib.muon(0.1, consistent_rms=0.2)
    state, step = transform.init(apart), jax.jit(transform.update)
    for s in range(3):
        grads = _tree(100 + s)["decoder"]["layers"]
        split = {
            f"{name}{k}": grads[name]["kernel"][k].reshape(shape)
            for name, shape in matrices.items()
            for k in range(LAYERS)
        }
        updates, state = step(split, state, apart)
        apart = optax.apply_updates(apart, updates)
    for name, shape in matrices.items():
        for k in range(LAYERS):
            actual = trained["decoder"]["layers"][name]["kernel"][k].reshape(shape)
            np.testing.assert_allclose(actual, apart[f"{name}{k}"], rtol=1e-4, atol=1e-5)
    adam = _train_optax(optax.adamw(0.1, 0.9, 0.95, weight_decay=0.0, nesterov=True), params)
    for path in ("token_embedder/embedding", "decoder/logits/kernel", "decoder/norm/scale"):
        np.testing.assert_allclose(flatten(trained)[path], flatten(adam)[path], rtol=1e-5, atol=1e-6)


def test_muon_refuses_what_is_no_matrix_unless_adam_takes_it() -> None:
    axes = {"conv": ("height", "width", "embed"), "w": ("embed", "mlp")}
    shapes = {"conv": jnp.ones((3, 3, 4)), "w": jnp.ones((4, 4))}
    with pytest.raises(UserError, match="'conv'.*3 dimensions"):
        Optimizer(optimizers.muon, 0.1).bind(axes, shapes)
    Optimizer(functools.partial(optimizers.muon, adam_axes=("height",)), 0.1).bind(axes, shapes)


def test_by_pattern_equals_each_optimizer_on_its_own_parameters() -> None:
    axes = {
        "norm": {"scale": ("embed",)},
        "layers": {"wi": ("layers", "embed", "mlp")},
        "wo": ("mlp", "embed"),
    }
    patterns = [("norm/scale", optax.sgd), ("layers/.*", SMALL_ADAFACTOR), (".*", optimizers.adamw)]
    mixed = Optimizer(functools.partial(optimizers.by_pattern, patterns=patterns), 0.1)
    bound, params = mixed.bind(axes, _shapes(axes)), _tree(0, _shapes(axes))
    trained, _, _ = _train(bound, params)
    for (_, factory), name in zip(patterns, ("norm", "layers", "wo"), strict=True):
        alone = Optimizer(factory, 0.1).bind({name: axes[name]}, {name: params[name]})
        state, expected = alone.init({name: params[name]}), {name: params[name]}
        step = jax.jit(alone.update)
        for s in range(3):
            expected, state, _ = step({name: _tree(100 + s, params)[name]}, state, expected)
        _assert_close({name: trained[name]}, expected)
    adafactor, adam = bound.state_axes().inner[1][0], bound.state_axes().inner[2][0]
    assert adafactor.v_row == {"layers": {"wi": ("layers", "embed")}}
    assert adam.mu == {"wo": ("mlp", "embed")}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([("decoder/.*", optax.sgd)], "no pattern matches parameter 'token_embedder/embedding'"),
        ([(".*", optax.sgd), ("decoder/norm/.*", optax.sgd)], "'decoder/norm/.*' matches no"),
        ([("decoder/norms/scale", optax.sgd), (".*", optax.sgd)], "'decoder/norm/scale'"),
        ([("(", optax.sgd)], "not a regular expression"),
    ],
)
def test_by_pattern_refuses_gaps_and_idle_patterns(patterns: list, message: str) -> None:
    factory = functools.partial(optimizers.by_pattern, patterns=patterns)
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        Optimizer(factory, 0.1).bind(AXES, SHAPES)


@pytest.mark.parametrize(
    "factory",
    [optax.adamw, optimizers.adamw, functools.partial(optax.sgd, momentum=0.9), optax.lion, optax.adam],
)
def test_state_shaped_like_parameters_has_their_axes(factory) -> None:
    found = _state_axes(Optimizer(factory, schedules.constant(0.1)).bind(AXES, SHAPES))
    assert found["step"] == ()
    for path, names in flatten(AXES).items():
        moments = [axes for leaf, axes in found.items() if leaf.endswith("/" + path)]
        assert moments and all(axes == names for axes in moments), path
    assert all(axes == () for leaf, axes in found.items() if leaf.endswith("count"))


def test_state_axes_of_our_adafactor() -> None:
    factory = functools.partial(SMALL_ADAFACTOR, beta1=0.9)
    found = _state_axes(Optimizer(factory, 0.1).bind(AXES, SHAPES))
    query = "decoder/layers/query/kernel"
    assert _ending(found, f"v_row/{query}") == ("layers", "embed")
    assert _ending(found, f"v_col/{query}") == ("layers", "heads", "head_dim")
    assert _ending(found, f"v/{query}") == (None,)
    assert _ending(found, f"ema/{query}") == ("layers", "embed", "heads", "head_dim")
    assert _ending(found, "v_row/decoder/layers/norm/scale") == (None,)
    assert _ending(found, "v/decoder/layers/norm/scale") == ("layers", "embed")


def test_state_axes_of_optax_adafactor() -> None:
    axes = {
        "tall": ("vocab", "embed"),
        "wide": ("embed", "vocab"),
        "square": ("embed", "mlp"),
        "v": ("embed",),
    }
    shapes = {"tall": (9, 8), "wide": (8, 9), "square": (8, 8), "v": (8,)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    factory = functools.partial(optax.adafactor, min_dim_size_to_factor=8, momentum=0.9)
    bound = Optimizer(factory, 0.1).bind(axes, shapes)
    state = bound.state_axes().inner[0]
    assert state.v_row == {"tall": ("embed",), "wide": ("embed",), "square": ("embed",), "v": (None,)}
    assert state.v_col == {"tall": ("vocab",), "wide": ("vocab",), "square": ("mlp",), "v": (None,)}
    assert state.v == {"tall": (None,), "wide": (None,), "square": (None,), "v": ("embed",)}
    rows = jax.eval_shape(bound.init, shapes).inner[0].v_row
    assert {name: row.shape for name, row in rows.items()} == {
        "tall": (8,), "wide": (8,), "square": (8,), "v": (1,)
    }  # fmt: skip


def test_state_axes_of_muon_and_of_masked_states() -> None:
    found = _state_axes(Optimizer(optimizers.muon, 0.1).bind(AXES, SHAPES))
    assert _ending(found, "mu/decoder/layers/wi/kernel") == ("layers", "embed", "mlp")
    assert _ending(found, "nu/token_embedder/embedding") == ("vocab", "embed")
    assert _ending(found, "ns_coeffs") == (None,)

    def halves(learning_rate) -> optax.GradientTransformation:
        labels = map_paths(lambda path, _: "a" if "norm" in path else "b", AXES)
        return optax.partition({"a": optax.adam(learning_rate), "b": optax.sgd(learning_rate, 0.9)}, labels)

    found = _state_axes(Optimizer(halves, 0.1).bind(AXES, SHAPES))
    assert _ending(found, "nu/decoder/norm/scale") == ("embed",)
    assert _ending(found, "trace/decoder/logits/kernel") == ("embed", "vocab")


def test_a_parameter_named_like_another_ones_tail_is_told_apart() -> None:
    axes = {"kernel": ("embed",), "mlp": {"kernel": ("embed", "mlp")}}
    shapes = {"kernel": jnp.ones(4), "mlp": {"kernel": jnp.ones((4, 4))}}
    mu = Optimizer(optax.adamw, 0.1).bind(axes, shapes).state_axes().inner[0].mu
    assert mu == axes

    def labelled(learning_rate) -> optax.GradientTransformation:  # a group's label is no part of the path
        return optax.partition({"mlp": optax.adam(learning_rate)}, map_paths(lambda *_: "mlp", axes))

    inner = Optimizer(labelled, 0.1).bind(axes, shapes).state_axes().inner
    assert inner.inner_states["mlp"].inner_state[0].mu == axes


def test_state_of_unknown_shape_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"diff_params_memory.*of shape \(10, .*belongs to parameter"):
        Optimizer(optax.lbfgs, 0.1).bind(AXES, SHAPES).state_axes()

    def odd(learning_rate) -> optax.GradientTransformation:
        return optax.GradientTransformation(lambda p: {"history": jnp.zeros(7)}, lambda u, s, p: (u, s))

    with pytest.raises(UserError, match=r"history.*of shape \(7,\) belongs to no parameter"):
        Optimizer(odd, 0.1).bind(AXES, SHAPES).state_axes()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frozen": ["decoder/norm/scal"]}, "did you mean 'decoder/norm/scale'"),
        ({"frozen": ["norm/scale"]}, "'norm/scale' matches no"),
        ({"frozen": [".*"]}, "leaves no parameter to train"),
        ({"frozen": "decoder/.*"}, "not a list of regexes"),
        ({"max_grad_norm": 0.0}, "not positive"),
        ({"learning_rate": "1e-3"}, "not a number or a schedule"),
        ({"transform": optax.adamw(1e-3)}, "without parentheses"),
        ({"transform": optimizers.adamw(1e-3)}, "without parentheses"),
        ({"transform": lambda rate: optax.sgd(rate)}, "no argument named learning_rate"),
        ({"transform": lambda learning_rate: None}, "not an optax transformation"),
    ],
)
def test_mistakes_of_a_recipe_are_answered(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Optimizer(**({"transform": optax.adamw, "learning_rate": 1e-3} | kwargs)).bind(AXES, SHAPES)


def test_axes_must_fit_the_shapes() -> None:
    with pytest.raises(UserError, match=r"'w' of shape \(4, 4\) has axes \('embed',\)"):
        Optimizer(optax.sgd, 0.1).bind({"w": ("embed",)}, {"w": jnp.ones((4, 4))})
    with pytest.raises(UserError, match="'w' has axes but no shape"):
        Optimizer(optax.sgd, 0.1).bind({"w": ("embed",)}, {})
    with pytest.raises(UserError, match="'w' has a shape but no axes"):
        Optimizer(optax.sgd, 0.1).bind({}, {"w": jnp.ones(4)})


def test_a_users_own_axes_aware_optimizer_gets_the_trainable_axes() -> None:
    seen = []

    def own(learning_rate) -> AxesAware:
        return AxesAware(lambda axes: seen.append(axes) or optax.sgd(learning_rate))

    Optimizer(own, 0.1, frozen=["decoder/.*"]).bind(AXES, SHAPES)
    assert seen == [{"token_embedder": {"embedding": ("vocab", "embed")}}]


@pytest.mark.parametrize("factory", [SMALL_ADAFACTOR, optimizers.muon, optimizers.lion])
def test_no_buffer_of_a_fresh_state_is_shared_so_that_it_can_be_donated(factory) -> None:
    leaves = jax.tree.leaves(Optimizer(factory, 0.1).bind(AXES, SHAPES).init(_tree(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("factory", [SMALL_ADAFACTOR, optimizers.adamw])
def test_parameters_and_state_keep_their_dtypes(factory) -> None:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), SHAPES)
    bound = Optimizer(factory, 0.1, max_grad_norm=1.0).bind(AXES, params)
    state = jax.eval_shape(bound.init, params)
    new, new_state, stats = jax.eval_shape(bound.update, params, state, params)
    assert new == params and new_state == state
    assert stats["grad_norm"].dtype == stats["learning_rate"].dtype == jnp.float32
