"""Steps from the host: greedy search token by token, in the memory of one cache, without compiling anything."""

import jax
import numpy as np
import pytest
from tiny import greedy, program

from meshway.framework.errors import UserError
from meshway.framework.inference.engine import TokenSteps, prompt_batch
from meshway.framework.inference.rows import RowFormat
from meshway.framework.telemetry.profiler import Compilations

ROWS, LENGTH, NEW = 4, 6, 5


@pytest.fixture(scope="module", params=["lm", pytest.param("t5_1_1", marks=pytest.mark.slow)])
def started(request):
    """A tiny model under a layout that cuts batch and heads, its programs, and ragged prompts on the devices."""
    made = program(request.param, f"BATCH_SIZE={ROWS}", layout="model_1d")
    sharded = made.sharded.by_layer()
    prompts = prompt_batch(sharded, ROWS, LENGTH)
    inputs = [np.arange(3, 3 + size) * 7 % 250 for size in (5, 2, 3, 4)]
    batch = prompts.shard(RowFormat.of(made.model).prompts(inputs, LENGTH))
    return made, TokenSteps(sharded, prompts, NEW), made.init().params, batch


def pointers(tree):
    return [[shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]


def test_steps_are_greedy_search(started):
    made, steps, stored, batch = started
    params = made.sharded.by_layer().split(stored)
    at, found = steps.prefill(params, batch, np.arange(ROWS, dtype=np.int32), jax.random.key(0)), []
    for _ in range(NEW):
        at = steps.step(params, at)
        found.append(at.tokens)
    with made.partitioner.activate():
        wanted = jax.jit(lambda params, batch: greedy(made.model, params, batch, NEW, -1))(stored, batch)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)
    together = steps.compile_loop(NEW)(
        params, steps.prefill(params, batch, np.arange(ROWS, dtype=np.int32), jax.random.key(0))
    )
    np.testing.assert_array_equal(together.tokens, found[-1])
    np.testing.assert_array_equal(together.output, at.output)


def test_the_cache_stays_where_it_is_and_nothing_is_compiled(started):
    made, steps, stored, batch = started
    params = made.sharded.by_layer().split(stored)
    first = steps.prefill(params, batch, np.arange(ROWS, dtype=np.int32), jax.random.key(0))
    memory, at = pointers(first.cache), first
    assert any(len(set(places)) > 1 for places in memory)
    with Compilations() as compilations:
        for _ in range(3):
            before, at = at, steps.step(params, at)
            assert pointers(at.cache) == memory
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.cache))
            assert not before.tokens.is_deleted() and not before.done.is_deleted()
            assert np.asarray(at.tokens).shape == (ROWS, 1)
        steps.prefill(params, batch, np.arange(ROWS, dtype=np.int32), jax.random.key(0))
    assert compilations.count == 0
    cut = jax.tree.leaves(
        jax.tree.map(lambda x, y: np.prod(y.shard_shape(x.shape)), first.cache, steps.shardings.cache)
    )
    assert steps.memory().alias_size_in_bytes >= 4 * max(cut)


def test_a_step_needs_no_second_cache():
    """Layers write the cache where it lies: what a step needs beside it does not grow with their number."""
    made = program("lm", f"BATCH_SIZE={ROWS}", "NUM_LAYERS=12")
    steps = TokenSteps(made.sharded, prompt_batch(made.sharded, ROWS, LENGTH), 120)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(steps.shapes.cache.layers))
    assert steps.memory().temp_size_in_bytes < 0.5 * whole
    assert steps.memory().alias_size_in_bytes >= whole


def test_a_step_copies_no_weights():
    """By layer, where stacked ones are copied an entry at a time; taking them apart leaves nothing twice."""
    made = program("lm", f"BATCH_SIZE={ROWS}", "NUM_LAYERS=3", "D_MODEL=96", "D_FF=160")
    sharded, params = made.sharded.by_layer(), made.init().params
    kernel, size = params["decoder"]["block_0"]["mlp"]["wi_0"]["kernel"], 4 * 96 * 160
    steps, stacked = (TokenSteps(each, prompt_batch(each, ROWS, LENGTH), NEW) for each in (sharded, made.sharded))
    assert steps.memory().temp_size_in_bytes < size <= stacked.memory().temp_size_in_bytes
    layers = sharded.split(params, consume=True)["decoder"]["block_0"]["mlp"]["wi_0"]["kernel"]
    assert [layer.shape for layer in layers] == [(96, 160)] * 3 and kernel.is_deleted()
    pipelined = program("lm", layout="stage").sharded
    assert pipelined.by_layer() is pipelined


def test_what_does_not_fit_is_refused():
    made = program("gpt2", "NUM_POSITIONS=8", f"BATCH_SIZE={ROWS}")
    with pytest.raises(UserError, match="DecoderOnly: rows of 11 tokens are longer than the 8 positions"):
        TokenSteps(made.sharded, prompt_batch(made.sharded, ROWS, LENGTH), NEW)
    with pytest.raises(UserError, match="has no decoder"):
        prompt_batch(program("bert").sharded, ROWS, LENGTH)
