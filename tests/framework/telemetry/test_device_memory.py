from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from meshway.framework.telemetry.profiler import memory_in_use, planned


def device(answer):
    def memory_stats():
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(memory_stats=memory_stats)


FULL = {"bytes_in_use": 100, "peak_bytes_in_use": 900, "bytes_limit": 1000, "num_allocs": 7}
CALM = {"bytes_in_use": 500, "peak_bytes_in_use": 600, "bytes_limit": 1000}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([FULL], (100, 900, 1000)),
        ([CALM, FULL, None], (100, 900, 1000)),
        ([{"bytes_in_use": 5}], (5, None, None)),
        ([{"bytes_in_use": 5}, {"bytes_in_use": 9, "bytes_limit": None}], (9, None, None)),
        ([{"peak_bytes_in_use": -1, "bytes_limit": "much", "bytes_in_use": True}], (None, None, None)),
        ([None, {}], (None, None, None)),
        ([NotImplementedError("no"), RuntimeError("UNIMPLEMENTED")], (None, None, None)),
        ([], (None, None, None)),
    ],
)
def test_what_is_counted_is_of_the_fullest_device_and_nothing_is_made_up(answers, expected):
    names = ("device_bytes_in_use", "device_peak_bytes_in_use", "device_bytes_limit")
    counted = {name: value for name, value in zip(names, expected, strict=True) if value is not None}
    assert memory_in_use([device(answer) for answer in answers]) == counted


def test_cpus_count_nothing_and_the_plan_of_a_step_is_its_own():
    assert memory_in_use(jax.local_devices()) == {}
    ones = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    compiled = jax.jit(lambda x, y: (x + y, y * 2), donate_argnums=0).lower(ones, ones).compile()
    assert planned(compiled).startswith(
        "by XLA's plan the step needs 3.0 MiB of each device: state and batch 2.0 MiB, results beside them 1.0 MiB"
    )
    assert planned(SimpleNamespace(memory_analysis=lambda: None)) == ""
