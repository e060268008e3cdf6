"""Programs by shape: compiled once each, right on any mesh, and the model's refusals named."""

import bigram_table
import jax
import numpy as np
import pytest

from meshway.framework.errors import UserError
from meshway.framework.partitioning.sharded_model import ProgramCache
from meshway.framework.telemetry.profiler import Compilations

PARAMS = bigram_table.BigramTable().init(jax.random.key(0))


def batch(length, seed=0, rows=4):
    random = np.random.default_rng(seed)
    names = ("input_tokens", "target_tokens")
    tokens = {f"decoder_{name}": random.integers(0, 12, (rows, length)).astype(np.int32) for name in names}
    return tokens | {"decoder_loss_weights": np.ones((rows, length), np.float32)}


def scaled(factor):
    score = bigram_table.BigramTable().score
    return lambda params, batch, *others: factor * score(params, batch) + sum(others)


@pytest.mark.parametrize("data", [1, 4])
def test_each_name_and_shape_is_compiled_once_and_found_again(data):
    cache = ProgramCache(bigram_table.sharded(data), 4)
    shift = np.float32(3)
    calls = [
        dict(name="score", function=scaled(1.0), batch=batch(5)),
        dict(name="score", function=scaled(1.0), batch=batch(6)),
        dict(name="score", function=scaled(1.0), batch=batch(5), others=(shift,)),
        dict(name="twice", function=scaled(2.0), batch=batch(5)),
        dict(name="times", function=scaled(5.0), batch=batch(5), static=5.0),
        dict(name="times", function=scaled(7.0), batch=batch(5), static=7.0),
    ]

    def run(call):
        static = {"static": call["static"]} if "static" in call else {}
        return cache.run(call["name"], call["function"], PARAMS, call["batch"], *call.get("others", ()), **static)

    found = [run(call) for call in calls]
    assert cache.count == len(calls)
    for call, result in zip(calls, found):
        expected = call["function"](PARAMS, call["batch"], *call.get("others", ()))
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        assert result.sharding.is_fully_replicated
    with Compilations() as compilations:
        for call in calls:
            run(call)
        other = cache.run("score", scaled(1.0), PARAMS, batch(5, seed=1))
    assert compilations.count == 0 and cache.count == len(calls)
    assert not np.allclose(other, found[0])


def test_what_takes_another_way_to_compile_is_kept_and_counted_too():
    cache, made = ProgramCache(bigram_table.sharded(), 4), []
    for key in ("a", "b", "a"):
        assert cache.get(key, lambda: made.append(len(made)) or f"program {len(made)}") in ("program 1", "program 2")
    assert cache.count == len(made) == 2


def test_refusals_are_named():
    def refuses(params, batch):
        raise ValueError("rows of 5 tokens are too long")

    cache = ProgramCache(bigram_table.sharded(), 4)
    with pytest.raises(UserError, match=r"^BigramTable, score: rows of 5 tokens are too long$"):
        cache.run("score", refuses, PARAMS, batch(5))
    assert cache.count == 0
    with pytest.raises(UserError, match="of size 3 is not divisible"):
        ProgramCache(bigram_table.sharded(4), 3)
