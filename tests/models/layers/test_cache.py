"""Keys and values as they are remembered: rounded by a stated bound, moved with their rows, as many bytes as said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import program

from meshway.framework.inference.engine import TokenSteps, prompt_batch
from meshway.models.layers.attention import Attention
from meshway.models.layers.cache import empty_cache, read, store, write

LENGTH, PROMPT = 7, 3
# How far logits may be off, as a share of the largest: a bfloat16 has 8 bits, an int8 7, and two layers add up.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.015, "int8": 0.025}
NAMES = ("batch", "kv_heads", "kv_length", "head_dim")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_int8_is_off_by_half_a_step_at_most():
    x = numbers(2, 5, 3, 8) * np.array([1e-6, 1.0, 1e4], np.float32)[:, None]
    x[1, 2, 1] = 0.0
    stored = store(jnp.asarray(x), "int8")
    assert stored.qvalue.dtype == jnp.int8 and stored.scale.dtype == jnp.float32
    largest = np.abs(x).max(-1)
    scale = np.where(largest > 0, largest / 127, 1.0)
    np.testing.assert_allclose(stored.scale, scale.swapaxes(1, 2)[..., None], rtol=1e-6)
    assert np.abs(stored.qvalue).max(axis=-1).tolist() == np.where(largest > 0, 127, 0).swapaxes(1, 2).tolist()
    (back, _) = read((stored, stored), jnp.float32)
    assert np.all(np.abs(back - x) <= largest[..., None] / 254 * 1.0001)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_written_is_read_where_it_was_written(dtype):
    cache = empty_cache((2, 6, 1, 4), dtype)
    new, index = (numbers(2, 2, 1, 4), numbers(2, 2, 1, 4, seed=1)), np.array([[0, 4], [5, 2]])
    keys, values = read(write(cache, new, index), jnp.float32)
    for found, given in zip((keys, values), new, strict=True):
        wanted = np.zeros((2, 6, 1, 4), np.float32)
        wanted[np.arange(2)[:, None], index] = read((store(jnp.asarray(given), dtype),) * 2, jnp.float32)[0]
        np.testing.assert_array_equal(found, wanted)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(
        ValueError, match="cache_dtype must be None or one of 'float32', 'bfloat16', 'int8', not 'int4'"
    ):
        Attention(8, 2, 4, rngs=None, cache_dtype="int4")


def made(family, dtype, *bindings):
    """A tiny model, random parameters and a batch."""
    built = program(
        family,
        "BATCH_SIZE=2",
        f"TASK_FEATURE_LENGTHS={dict.fromkeys(('targets',) if family == 'lm' else ('inputs', 'targets'), LENGTH)}",
        f"attention.Attention.cache_dtype={dtype!r}",
        *bindings,
    )

    def draw(leaf):
        # Of attention's output kernel that is twice too much: attention shall matter.
        spread = 1.0 if leaf.ndim < 3 else leaf.shape[1] ** -0.5
        return np.random.default_rng(leaf.size).normal(0.0, spread, leaf.shape).astype(np.float32)

    return built, jax.tree.map(draw, built.param_shapes), built.synthetic_batch()


LAYERS = {"lm": ("NUM_LAYERS=3", "NUM_KV_HEADS=2", "WINDOW=4"), "t5_1_1": ("NUM_DECODER_LAYERS=2",)}
CASES = [(family, dtype) for family in LAYERS for dtype in BOUNDS]


@pytest.mark.parametrize(
    "family, dtype", [pytest.param(*case, marks=() if case[1] == "int8" else pytest.mark.slow) for case in CASES]
)
def test_logits_are_near_those_of_the_full_forward_pass(family, dtype):
    """Grouped heads and a window, or keys of an encoder; teacher-forced, at every place."""
    built, params, batch = made(family, dtype, *LAYERS[family])
    model, first = built.model, PROMPT - 1 if family == "lm" else 0

    def both(params, batch):
        prompt = {name: x[:, :PROMPT] if family == "lm" else x for name, x in batch.items()}
        cache = model.prefill(params, prompt, LENGTH)[2]

        def step(cache, place):
            tokens = jax.lax.dynamic_slice_in_dim(batch["decoder_input_tokens"], place, 1, axis=1)
            logits, cache = model.decode(params, tokens, jnp.full(2, place), cache)
            return cache, logits

        decoded = jax.lax.scan(step, cache, jnp.arange(first, LENGTH))[1].swapaxes(0, 1)
        return decoded, model.logits(params, batch, None)[:, first:]

    decoded, full = map(np.asarray, jax.jit(both)(params, batch))
    off = np.abs(decoded - full).max() / np.abs(full).max()
    assert off <= BOUNDS[dtype]
    assert dtype == "float32" or off > 1e-4, "nothing was rounded"
    assert np.mean(decoded.argmax(-1) == full.argmax(-1)) >= 0.8


def test_an_int8_cache_moves_with_its_rows():
    """Copies of a row go on alike; where they have gone apart and change places, so do their logits."""
    built, params, batch = made("lm", "int8", "NUM_LAYERS=1")
    model, swapped = built.model, np.array([1, 0, 3, 2])

    @jax.jit
    def three(params, batch):
        tokens, at, cache = model.prefill(params, batch, 3)
        tokens, at, cache = jnp.repeat(tokens, 2, axis=0), jnp.repeat(at, 2), model.fork(cache, 2)
        alike, cache = model.decode(params, tokens, at, cache)
        _, cache = model.decode(params, jnp.array([[3], [4], [5], [6]]), at + 1, cache)
        turned = model.reorder(cache, jnp.array([[1, 0], [1, 0]]))
        return alike, *(model.decode(params, tokens, at + 2, each)[0] for each in (cache, turned))

    alike, plain, turned = three(params, batch)
    np.testing.assert_allclose(alike, alike[swapped], atol=1e-4)
    assert np.abs(plain - plain[swapped]).max(axis=1).min() > 0.1
    np.testing.assert_allclose(turned, plain[swapped], atol=1e-4)


@pytest.mark.parametrize(
    "family, dtype",
    [("t5_1_1", "int8"), *(pytest.param("lm", dtype, marks=pytest.mark.slow) for dtype in ("int8", "bfloat16"))],
)
def test_the_cache_lies_as_the_layout_says_and_takes_its_bytes(family, dtype):
    """Rows are cut over `data` and heads over `model`: each device holds an eighth."""
    options = ("NUM_KV_HEADS=2", "BATCH_SIZE=4") if family == "lm" else ("BATCH_SIZE=4",)
    built = program(family, f"attention.Attention.cache_dtype={dtype!r}", *options, layout="model_1d")
    length, new, batch, heads, size = 6, 3, 4, 2 if family == "lm" else 4, 16
    steps = TokenSteps(built.sharded, prompt_batch(built.sharded, batch, length), new)
    cache = steps.shapes.cache
    held = jax.tree.leaves(jax.tree.map(lambda x, y: (x, y), cache.layers, steps.shardings.cache.layers))
    shapes, lies = held[::2], held[1::2]
    places = [length + new] if family == "lm" else [length, new]
    entry = size * 2 if dtype == "bfloat16" else size + 4  # int8, and a float32 scale
    total = sum(2 * batch * each * heads * entry for each in places)
    assert sum(x.size * x.dtype.itemsize for x in shapes) == total
    wanted = built.partitioner.activation_rules.resolve(NAMES, (batch, heads, length, size), "a cache").spec
    assert tuple(wanted) == ("data", "model", None, None)
    for x, where in zip(shapes, lies, strict=True):
        expected = NamedSharding(where.mesh, PartitionSpec(None, *wanted[: x.ndim - 1]))
        assert where.is_equivalent_to(expected, x.ndim)
    assert sum(int(np.prod(y.shard_shape(x.shape))) * x.dtype.itemsize for x, y in zip(shapes, lies)) == total // 8
