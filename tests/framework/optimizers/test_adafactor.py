"""Adafactor by axis names equals optax's on matrices, and treats stacked layers as separate ones."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshway.framework.errors import UserError
from meshway.framework.optimizers.adafactor import factored_dims, matrix_dims, scale_by_adafactor
from meshway.framework.optimizers.optimizer_state import transformation_axes
from meshway.framework.optimizers.transforms import adafactor
from meshway.framework.trees import flatten

STEPS = 5


def _normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def _run(transform: optax.GradientTransformation, params: dict, grads: list[dict]) -> tuple[list[dict], dict]:
    """Returns the updates of each step (parameters move by -0.1 of them) and the last state."""
    return _run_jitted(jax.jit(transform.update), transform.init(params), params, grads)


def _run_jitted(step, state, params: dict, grads: list[dict]) -> tuple[list[dict], dict]:
    found = []
    for grad in grads:
        updates, state = step(grad, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        found.append(updates)
    return found, state


def _assert_close(actual, expected, rtol: float = 1e-6) -> None:
    def check(a, b) -> None:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"multiply_by_parameter_scale": False, "decay_rate": 0.6},
        {"clipping_threshold": None},
        {"factored": False},
    ],
)
def test_equals_optax_on_matrices_and_vectors(kwargs: dict) -> None:
    axes = {
        "tall": ("vocab", "embed"),
        "wide": ("embed", "mlp"),
        "square": ("embed", "mlp"),
        "scale": ("embed",),
    }
    shapes = {"tall": (24, 8), "wide": (8, 16), "square": (8, 8), "scale": (8,)}
    params = {name: _normal(i, shape, 0.3) for i, (name, shape) in enumerate(shapes.items())}
    grads = [
        {name: _normal(10 * step + i, shape, 2.0**step) for i, (name, shape) in enumerate(shapes.items())}
        for step in range(STEPS)
    ]
    ours = scale_by_adafactor(axes, min_dim_size_to_factor=8, **kwargs)
    theirs = optax.chain(optax.adafactor(min_dim_size_to_factor=8, **kwargs), optax.scale(-1.0))
    actual, state = _run(ours, params, grads)
    expected, _ = _run(theirs, params, grads)
    for a, b in zip(actual, expected, strict=True):
        _assert_close(a, b)
    assert state.v_row["tall"].shape == ((1,) if "factored" in kwargs else (24,))


def test_a_stack_equals_its_layers_trained_apart() -> None:
    axes = {
        "query": ("embed", "heads", "head_dim"),
        "out": ("heads", "head_dim", "embed"),
        "scale": ("embed",),
        "small": ("mlp", "embed"),
    }
    shapes = {"query": (8, 4, 3), "out": (4, 3, 8), "scale": (8,), "small": (2, 8)}
    # Layers of very different sizes: any mixing in clipping, scale or factoring would show.
    sizes = [1e-3, 1.0, 30.0]
    layers = [{n: _normal(7 * k + i, s, sizes[k]) for i, (n, s) in enumerate(shapes.items())} for k in range(3)]
    grads = [
        [
            {n: _normal(100 * t + 7 * k + i, s, 10.0 ** (k - 1)) for i, (n, s) in enumerate(shapes.items())}
            for k in range(3)
        ]
        for t in range(STEPS)
    ]

    def stack(trees: list[dict]) -> dict:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    batch_axes = {"query": "layers", "out": "stage", "scale": "expert", "small": "layers"}
    stacked_axes = {name: (batch_axes[name], *names) for name, names in axes.items()}
    stacked, state = _run(
        scale_by_adafactor(stacked_axes, min_dim_size_to_factor=8), stack(layers), [stack(g) for g in grads]
    )
    assert state.v_row["query"].shape == (3, 8) and state.v_col["query"].shape == (3, 4, 3)
    assert state.v_row["out"].shape == (3, 4, 3) and state.v_col["out"].shape == (3, 8)
    assert state.v["small"].shape == (3, 2, 8) and state.v_row["small"].shape == (1,)
    one = scale_by_adafactor(axes, min_dim_size_to_factor=8)
    step_one = jax.jit(one.update)
    for k, layer in enumerate(layers):
        alone, _ = _run_jitted(step_one, one.init(layer), layer, [g[k] for g in grads])
        for step in range(STEPS):
            _assert_close(jax.tree.map(lambda x, k=k: x[k], stacked[step]), alone[step])


def test_joined_heads_equal_the_reshaped_matrix() -> None:
    shape, flat = (8, 4, 3), (8, 12)
    params = {"kernel": _normal(0, shape)}
    grads = [{"kernel": _normal(step + 1, shape)} for step in range(STEPS)]
    split, _ = _run(
        scale_by_adafactor({"kernel": ("embed", "kv_heads", "head_dim")}, min_dim_size_to_factor=8),
        params,
        grads,
    )
    matrix, _ = _run(
        scale_by_adafactor({"kernel": ("embed", "mlp")}, min_dim_size_to_factor=8),
        {"kernel": params["kernel"].reshape(flat)},
        [{"kernel": grad["kernel"].reshape(flat)} for grad in grads],
    )
    for a, b in zip(split, matrix, strict=True):
        _assert_close(a["kernel"].reshape(flat), b["kernel"])


def test_dimensions_by_name() -> None:
    assert matrix_dims(("layers", "embed", "heads", "head_dim")) == [(1,), (2, 3)]
    assert matrix_dims(("stage", "expert", "layers", "embed")) == [(3,)]
    assert matrix_dims(("heads", "embed", "head_dim")) == [(0,), (1,), (2,)]
    assert matrix_dims(("heads", "head_dim", "head_dim")) == [(0, 1), (2,)]
    assert factored_dims(("layers", "embed", "heads", "head_dim"), (2, 128, 4, 32), 128) == ((1,), (2, 3))
    assert factored_dims(("layers", "embed", "heads", "head_dim"), (999, 128, 4, 31), 128) is None
    assert factored_dims(("layers", "embed"), (512, 512), 128) is None
    assert factored_dims(("height", "embed", "mlp"), (3, 256, 128), 128) == ((1,), (2,))


def test_scalars_and_per_layer_scalars_are_tensors_too() -> None:
    params = {"gain": np.float32(2.0), "gains": np.array([2.0, 0.5], np.float32)}
    grads = [{"gain": np.float32(3.0), "gains": np.array([3.0, -1.0], np.float32)}]
    updates, _ = _run(scale_by_adafactor({"gain": (), "gains": ("layers",)}), params, grads)
    _assert_close(updates[0], {"gain": np.float32(2.0), "gains": np.array([2.0, -0.5], np.float32)})


def test_rows_without_gradient_stay_finite_beside_large_ones() -> None:
    grad = np.zeros((8, 8), np.float32)
    grad[0] = 1e6
    updates, _ = _run(
        scale_by_adafactor({"table": ("vocab", "embed")}, min_dim_size_to_factor=8),
        {"table": np.ones((8, 8), np.float32)},
        [{"table": grad}] * 3,
    )
    assert np.isfinite(updates[-1]["table"]).all() and not updates[-1]["table"][1:].any()


def test_state_is_float32_for_any_parameter_and_the_decay_restarts_at_the_offset() -> None:
    axes = {"w": ("embed",)}
    transform = scale_by_adafactor(axes, step_offset=2, multiply_by_parameter_scale=False)
    state = transform.init({"w": jnp.ones(4, jnp.bfloat16)})
    assert state.v["w"].dtype == jnp.float32
    state = state._replace(step=jnp.int32(2), v={"w": jnp.full(4, 9.0)})
    _, state = transform.update({"w": jnp.full(4, 2.0)}, state)
    np.testing.assert_allclose(state.v["w"], 4.0)  # t = 1 again: beta2 = 0 forgets what came before


def test_parameter_scale_needs_parameters() -> None:
    transform = scale_by_adafactor({"w": ("embed",)})
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update({"w": jnp.ones(4)}, transform.init({"w": jnp.ones(4)}))


RULES = {"embed": "row", "heads": "column", "head_dim": "column", "mlp": "column", "relpos_buckets": "none"}


@pytest.mark.parametrize(
    ("names", "shape", "dims"),
    [
        (("layers", "embed", "heads", "head_dim"), (3, 4, 2, 2), ((1,), (2, 3))),
        (("layers", "mlp", "embed"), (3, 6, 4), ((1,), (2,))),
        (("layers", "embed"), (300, 400), None),
        (("layers", "heads", "relpos_buckets"), (3, 200, 200), None),
        (("vocab", "embed"), (200, 130), ((0,), (1,))),  # an axis without a rule: by size
        (("vocab", "embed"), (200, 120), None),
        ((), (), None),
    ],
)
def test_rules_decide_by_names_and_sizes_for_the_rest(names, shape, dims) -> None:
    assert factored_dims(names, shape, 128, RULES) == dims


def test_factoring_by_rules_is_that_of_a_least_size_of_one() -> None:
    """So is the state, whose axes are known."""
    axes = {"kernel": ("layers", "mlp", "embed"), "scale": ("embed",)}
    params = {"kernel": _normal(0, (2, 6, 4)), "scale": _normal(1, (4,))}
    grads = [
        {name: _normal(5 * step + i, leaf.shape) for i, (name, leaf) in enumerate(params.items())} for step in range(3)
    ]
    found, state = _run(scale_by_adafactor(axes, logical_factor_rules=RULES), params, grads)
    expected, _ = _run(scale_by_adafactor(axes, min_dim_size_to_factor=1), params, grads)
    for a, b in zip(found, expected, strict=True):
        _assert_close(a, b)
    assert transformation_axes(state, axes, params).v_col["kernel"] == ("layers", "embed")


def test_rules_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match="'embed' is 'rows', not 'row', 'column' or 'none'"):
        scale_by_adafactor({"w": ("embed", "mlp")}, logical_factor_rules={"embed": "rows"})
    with pytest.raises(UserError, match="is no matrix of a row and a column"):
        factored_dims(("embed", "heads", "mlp"), (4, 4, 4), 1, RULES)


def _t5x():
    """The script that made T5X's numbers: its options, parameters and gradients."""
    path = Path(__file__).parents[2] / "goldens" / "make_t5x_adafactor.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, np.load(path.parent / "t5x" / "adafactor.npz")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "momentum" else ()) for n in _t5x()[0].CASES]
)
def test_options_equal_those_of_t5x(name: str) -> None:
    made, expected = _t5x()
    case, offset = made.CASES[name], made.CASES[name].get("step_offset", 0)
    options = {key: value for key, value in case.items() if key != "nan_at"}
    axes = {"table": ("vocab", "embed"), "dense": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}, "norm": ("embed",)}
    rates = jnp.asarray(made.LEARNING_RATES)
    transform = adafactor(lambda step: rates[step], min_dim_size_to_factor=8, decay_vectors=True, **options).build(axes)
    params = made.tree(0, 0.5)
    state = transform.init(params)
    if offset:
        state = (state[0]._replace(step=jnp.int32(offset)), *state[1:])
    # Compiled as a whole, products in bfloat16 are not rounded in between, as those of T5X's numbers are.
    update = transform.update if "dtype_momentum" in options else jax.jit(transform.update)
    for gradient in made.gradients(case):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    if "dtype_momentum" in options:
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state[-1].ema)} == {"bfloat16"}
    for path, value in flatten(params).items():
        np.testing.assert_allclose(value, expected[f"{name}/{path}"], rtol=2e-5, atol=1e-6, err_msg=path)
    if name != "plain":
        different = [np.abs(expected[f"{name}/{path}"] - expected[f"plain/{path}"]).max() for path in flatten(params)]
        assert name == "offset" or max(different) > 1e-3, "the option does something here"


def test_patterns_of_the_parameter_scale_are_all_used_and_cover_all() -> None:
    axes = {"a": ("embed",), "b": ("embed",)}
    with pytest.raises(UserError, match="no pattern matches 'b'"):
        scale_by_adafactor(axes, multiply_by_parameter_scale=[("a", False)])
    with pytest.raises(UserError, match="'c' matches no"):
        scale_by_adafactor(axes, multiply_by_parameter_scale=[("c", False), (".*", True)])
    with pytest.raises(UserError, match=r"multiply_by_parameter_scale: '\(c' is not a regular expression"):
        scale_by_adafactor(axes, multiply_by_parameter_scale=[("(c", False), (".*", True)])
