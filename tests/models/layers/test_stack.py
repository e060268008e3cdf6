"""A stack is its layers in their order, whichever way they are run and however many are left over from its pattern."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.pipeline import Pipeline
from meshway.models.layers.side_outputs import add_metric, capture
from meshway.models.layers.stack import Stack
from meshway.models.module import Network, param

WIDTH = 3


class Toy(nnx.Module):
    """Mixes features, shows its cache what it saw, and says its number."""

    def __init__(self, d_model, *, rngs, power):
        self.kernel = param(jax.random.normal(rngs.params(), (d_model, d_model)), ("embed", "mlp"))
        self.power = power

    def __call__(self, x, *, rng, cache, shift):
        add_metric("size", jnp.sum(self.kernel[...]))
        y = jnp.tanh(x @ self.kernel[...]) ** self.power + shift
        if rng is not None:
            y = y * jax.random.bernoulli(rng, 0.5, y.shape)
        return x + y, None if cache is None else cache + jnp.mean(x)

    def empty_cache(self, start):
        return jnp.full((2,), start)


def network(num_layers, pattern, **options):
    def block(power):
        return lambda d_model, rngs: Toy(d_model, rngs=rngs, power=power)

    blocks = [block(i + 1) for i in range(pattern)]
    return Network(lambda rngs: Stack(num_layers, WIDTH, rngs=rngs, blocks=blocks, **options))


def by_hand(params, num_layers, pattern, x, shift, cache):
    """What the docstring of `Stack` says, one layer after another; its metric and caches by layer."""
    sizes, caches = [], []
    for layer in range(num_layers):
        kernel = params[f"block_{layer % pattern}"]["kernel"][layer // pattern]
        sizes.append(jnp.sum(kernel))
        caches.append(cache + jnp.mean(x))
        x = x + jnp.tanh(x @ kernel) ** (layer % pattern + 1) + shift
    return x, (jnp.stack(sizes), jnp.stack(caches))


@pytest.mark.parametrize("options", [{"scan": True}, {"scan": False}, {"scan": True, "remat": "full"}, "by layer"])
@pytest.mark.parametrize("num_layers, pattern", [(8, 3), (4, 2), (2, 3)])
def test_a_stack_is_its_layers_in_their_order(num_layers, pattern, options):
    by_layer = options == "by layer"
    made = network(num_layers, pattern, **({} if by_layer else options))
    params = made.init(jax.random.key(0))
    assert made.stacked() == [f"{block}/kernel" for block in sorted(params)]
    lengths = [len(params[f"block_{i}"]["kernel"]) for i in range(min(pattern, num_layers))]
    assert lengths == [len(range(i, num_layers, pattern)) for i in range(min(pattern, num_layers))]
    assert sorted(params) == [f"block_{i}" for i in range(len(lengths))]
    x, shift = jnp.ones((2, 4, WIDTH)), jnp.full((1, 1, WIDTH), 0.1)

    def run(params, x, shift):
        stack = made.bind(jax.tree.map(tuple, params) if by_layer else params)
        with capture() as found:
            y, cache = stack(x, shift=shift, cache=stack.empty_cache(start=0.5))
        in_order = cache if by_layer else [cache[n % pattern][n // pattern] for n in range(num_layers)]
        return jnp.sum(y**2), (y, found.metrics["size"], jnp.stack(in_order)[:, 0])

    def wanted(params, x, shift):
        y, (sizes, caches) = by_hand(params, num_layers, pattern, x, shift, 0.5)
        return jnp.sum(y**2), (y, sizes, caches)

    (_, found), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(params, x, shift)
    (_, expected), theirs = jax.value_and_grad(wanted, argnums=(0, 1, 2), has_aux=True)(params, x, shift)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, theirs)


def test_scanned_and_unrolled_layers_draw_the_same_dropout():
    params = network(5, 2).init(jax.random.key(0))
    x, shift = jnp.ones((2, 4, WIDTH)), jnp.zeros((1, 1, WIDTH))
    scanned, unrolled = (
        network(5, 2, scan=scan).bind(params)(x, rng=jax.random.key(1), shift=shift)[0] for scan in (True, False)
    )
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-6)


def test_a_pipeline_refuses_a_partial_period(monkeypatch):
    monkeypatch.setattr(Pipeline, "num_stages", lambda self: 2)
    made = network(5, 2, pipeline=Pipeline(1))
    with pytest.raises(ValueError, match="5 layers leave 1 over from periods of 2 blocks; 4 or 6 layers would do"):
        made.bind(made.init(jax.random.key(0)))(jnp.ones((2, 4, WIDTH)), shift=jnp.zeros((1, 1, WIDTH)))


def test_a_stack_needs_layers():
    with pytest.raises(ValueError, match="num_layers=0"):
        network(0, 2).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("ful", r"unknown policy 'ful' \(did you mean 'full'\?\)"),
        ({"mlp_w": "device"}, r"no activation is called 'mlp_w' \(did you mean 'mlp_wo'\?\)"),
        ({"mlp_wi": "host"}, "'mlp_wi' is kept in 'host'; it is 'device' or 'offload'"),
    ],
)
def test_what_cannot_be_kept_is_refused(remat, message):
    with pytest.raises(ValueError, match=message):
        network(2, 2, remat=remat).init(jax.random.key(0))


def test_offloading_needs_memory_beside_the_device(monkeypatch):
    bare = SimpleNamespace(addressable_memories=lambda: [SimpleNamespace(kind="device")], device_kind="a chip")
    monkeypatch.setattr(jax, "local_devices", lambda: [bare])
    with pytest.raises(ValueError, match="'layer_input' is to be offloaded, and jax shows no pinned_host memory"):
        network(2, 2, remat={"mlp_wi": "device", "layer_input": "offload"}).init(jax.random.key(0))
