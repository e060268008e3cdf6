"""Makes `tests/goldens/t5x/adafactor.npz`: parameters after updates by T5X's own Adafactor, for each of its options.

    python tests/goldens/make_t5x_adafactor.py T5X/t5x/adafactor.py

Only that file of T5X is read: what it imports of the rest (a helper and two base classes) is stood in for here.
`CASES` names the options; tests give ours the same.
"""

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

STEPS = 4
SHAPES = {"table": (12, 8), "dense": {"kernel": (8, 16), "bias": (16,)}, "norm": (8,)}
LEARNING_RATES = [0.5, 0.4, 0.3, 0.2]
# Options of both; `nan_at` puts a NaN into the gradient of that update, T5X's patterns are searched and ours match all.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lr_exponent": {"weight_decay_rate_lr_exponent": 2.0},
    "lr_exponent_and_rate": {"weight_decay_rate_lr_exponent": 1.5, "weight_decay_rate": 0.1},
    "weight_decay": {"weight_decay_rate": 0.01, "beta1": 0.9},
    "global_norm": {"global_norm_clip_threshold": 2.0},
    "max_scale": {"max_parameter_scale": 0.2},
    "skip_nan": {"skip_nan_updates": True, "nan_at": 2, "beta1": 0.9},
    "momentum": {"beta1": 0.9, "dtype_momentum": "bfloat16"},
    "scale_by_pattern": {"multiply_by_parameter_scale": [(".*bias|norm", False), (".*", True)]},
    "offset": {"step_offset": 2},
    "all": {
        "beta1": 0.5, "weight_decay_rate_lr_exponent": 1.0, "weight_decay_rate": 0.2, "global_norm_clip_threshold": 5.0,
        "max_parameter_scale": 0.5, "decay_rate": 0.6, "clipping_threshold": 0.8,
    },
}  # fmt: skip


def tree(seed: int, scale: float) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * random.normal(size=shape)).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def gradients(case: dict[str, Any]) -> list[dict[str, Any]]:
    found = [tree(10 + step, 2.0**step) for step in range(STEPS)]
    if "nan_at" in case:
        found[case["nan_at"]]["dense"]["kernel"][1, 2] = np.nan
    return found


def load(path: str) -> types.ModuleType:
    """Returns T5X's module."""

    class OptimizerDef:
        def __init__(self, hyper_params: Any) -> None:
            self.hyper_params = hyper_params

    @struct.dataclass
    class OptimizerState:
        step: Any
        param_states: Any

    utils = types.ModuleType("t5x.utils")
    utils.flatten_dict_string_keys = lambda tree: traverse_util.flatten_dict(tree, sep="/")
    optimizers = types.ModuleType("t5x.optimizers")
    optimizers.OptimizerDef, optimizers.OptimizerState = OptimizerDef, OptimizerState
    package = types.ModuleType("t5x")
    package.utils, package.optimizers = utils, optimizers
    sys.modules |= {"t5x": package, "t5x.utils": utils, "t5x.optimizers": optimizers}
    spec = importlib.util.spec_from_file_location("t5x.adafactor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str) -> None:
    theirs, results = load(path), {}
    for name, case in CASES.items():
        options = {key: value for key, value in case.items() if key != "nan_at"}
        if "multiply_by_parameter_scale" in options:
            rules = [(f"^(?:{pattern})$", value) for pattern, value in options["multiply_by_parameter_scale"]]
            options["multiply_by_parameter_scale"] = theirs.HParamMap(rules)
        if "dtype_momentum" in options:
            options["dtype_momentum"] = jnp.dtype(options["dtype_momentum"])
        adafactor = theirs.Adafactor(0.1, min_dim_size_to_factor=8, **options)
        params, state = tree(0, 0.5), adafactor.init_state(tree(0, 0.5))
        state = dataclasses.replace(state, step=jnp.asarray(case.get("step_offset", 0), jnp.int32))
        for rate, gradient in zip(LEARNING_RATES, gradients(case), strict=True):
            hyper = adafactor.hyper_params.replace(learning_rate=rate)
            params, state = adafactor.apply_gradient(hyper, params, state, gradient)
        for leaf, value in traverse_util.flatten_dict(params, sep="/").items():
            results[f"{name}/{leaf}"] = np.asarray(value)
    np.savez_compressed(Path(__file__).parent / "t5x" / "adafactor.npz", **results)


if __name__ == "__main__":
    main(sys.argv[1])
