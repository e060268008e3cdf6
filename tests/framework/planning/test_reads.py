"""Bytes that a function reads at least, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.planning.flops import bytes_read

TABLE, MATRIX = jax.ShapeDtypeStruct((100, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((3,), jnp.int32)


def test_a_lookup_reads_what_it_takes_and_a_product_everything():
    def embed(table, matrix, tokens):
        return table.astype(jnp.bfloat16)[tokens] @ matrix.astype(jnp.bfloat16)

    assert bytes_read(embed, TABLE, MATRIX, TOKENS) == (3 * 8 * 4, 8 * 8 * 4, 3 * 4)

    def tied(table, tokens):
        return table[tokens] @ table.T

    assert bytes_read(jax.jit(tied), TABLE, TOKENS)[0] == 100 * 8 * 4


def test_what_nothing_depends_on_is_not_read():
    def some(params, x):
        unused = params["b"] @ params["b"]
        return jnp.tanh(x @ params["a"]), params["c"], unused[:0]

    x = jnp.ones((2, 8))
    read = bytes_read(some, {"a": MATRIX, "b": MATRIX, "c": MATRIX}, x)
    assert read[0]["a"] == 256 and read[0]["c"] == 0 and read[1] == 64


def test_layers_count_whether_they_are_scanned_or_not():
    stacked = {"used": jnp.ones((5, 8, 8)), "unused": jnp.ones((5, 8))}

    def scanned(layers, shared, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["used"] + shared), None), x, layers)[0]

    def unrolled(layers, shared, x):
        for i in range(5):
            x = jnp.tanh(x @ jax.tree.map(lambda leaf, i=i: leaf[i], layers)["used"] + shared)
        return x

    def some(layers, shared, x):
        return jax.checkpoint(lambda x: x @ layers["used"][3] + shared)(x)

    def counted(layers, shared, x):
        def step(carry, number):
            x, layers = carry
            return (jnp.tanh(x @ layers["used"][number] + shared), layers), None

        return jax.lax.scan(step, (x, layers), jnp.arange(5))[0][0]

    x, shared = jnp.ones((2, 8)), jnp.ones(8)
    for function in (scanned, unrolled, counted):
        assert bytes_read(function, stacked, shared, x)[0] == {"used": 5 * 256, "unused": 0}
        assert bytes_read(function, stacked, shared, x)[1] == 32
    assert bytes_read(some, stacked, shared, x)[0]["used"] == 256


def test_an_update_in_place_is_read_where_it_is_used():
    def write_and_read(cache, new, at):
        cache = cache.at[at].set(new)
        return cache.sum(axis=0), cache

    cache = np.ones((6, 4), np.float32)
    assert bytes_read(write_and_read, cache, cache[0], 2)[:2] == (96, 16)
