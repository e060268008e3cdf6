"""Layouts of inference send what the closed forms say, and compute and remember what one device does."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import pairwise, tiers

from meshway.framework.inference.weights import prepared
from meshway.framework.partitioning.partitioner import RINGS
from meshway.framework.planning.audit import audit
from meshway.framework.planning.cost import (
    BATCH_OVER,
    GATHERED_OVER,
    Arrangement,
    Transformer,
    cache_bytes,
    products,
    volume,
)
from meshway.framework.planning.products import weights_of
from meshway.framework.planning.topology import Ring
from meshway.models.layers.attention import Attention
from meshway.models.layers.blocks import SelfAttentionBlock
from meshway.models.layers.mlp import Mlp
from meshway.models.module import Network

SIZES = {8: (2, 2, 2), 16: (2, 4, 2), 64: (4, 4, 4)}
FEED_FORWARD = {
    "1d": "1D",
    "2d": "2D",
    "weight_gathered_x": "WG-X",
    "weight_gathered_xy": "WG-XY",
    "weight_gathered_xyz": "WG-XYZ",
}
STREAM = {"1D": "xyz", "2D": "xyz", "WG-X": "yz", "WG-XY": "z", "WG-XYZ": ""}  # the axes that shard it along d_model
ATTENTION = ("heads", "batch_z", "batch_yz", "batch_xyz")
LAYOUTS = [(name, over) for name in ("1d", "2d") for over in ATTENTION]
LAYOUTS += [(name, "heads") for name in FEED_FORWARD if name.startswith("weight")]
LAYOUTS += [("weight_gathered_xyz", "batch_xyz")]
LENGTH, HEAD_DIM = 4, 4


def of_products(products: str) -> str:
    return f"partitioner.Layout.products={products!r}"


class Sizes:
    """A layer on a mesh: as many heads and examples as devices. `products`: of the layout, "by_hand" or rings."""

    def __init__(self, layout: str, attention: str, products: str = "by_hand"):
        self.devices = jax.device_count()
        self.d_model, self.d_ff, self.heads = 2 * self.devices, 8 * self.devices, self.devices
        self.feed_forward, self.attention = FEED_FORWARD[layout], attention.replace("_", "-")
        sizes = SIZES[self.devices]
        self.mesh = Arrangement(*((Ring(size, 1.0),) for size in sizes))
        self.name = f"inference/{layout}" + ("" if attention == "heads" else f"_{attention}")
        shape = f"mesh.MeshShape.ici={dict(zip('xyz', sizes, strict=True))}"
        bindings = f"NUM_HEADS={self.heads}", f"BATCH_SIZE={self.devices}", shape, of_products(products)
        self.partitioner = tiny.program("lm", *bindings, layout=self.name).partitioner
        self.over, self.products_by = GATHERED_OVER.get(self.feed_forward, ""), products
        self.tokens = self.devices * LENGTH

    def sent(self, factory, call=lambda layer, x: layer(x)) -> float:
        """Elements that a device sends in a compiled layer of x [devices, length, d_model]."""
        network, shape = Network(factory), (self.devices, LENGTH, self.d_model)
        params = jax.eval_shape(network.init, jax.random.key(0))
        placed = self.partitioner.sharding(("batch", "length", "embed"), shape)
        compiled = self.partitioner.compile(
            lambda params, x: call(network.bind(params), x),
            params,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            in_shardings=(self.partitioner.state_shardings(network.axes(), params), placed),
            out_shardings=placed,
        )
        found = audit(compiled.as_text(), self.partitioner.mesh.shape).collectives
        return sum(each.sent for each in found) / 4

    def share(self, axes: str) -> float:
        """(K-1)/K of the chips along these axes."""
        return 1 - 1 / self.mesh.size(axes)

    def products(self, width_in: float, width_out: float) -> float:
        """Of ESTI's products, `cost.products`."""
        return volume(products(self.feed_forward, self.tokens, self.d_model, width_in, width_out, self.mesh), self.mesh)

    def exchanges(self, width: float) -> float:
        """Of the all-to-alls between the shards of projections and of attention, there or back."""
        other = BATCH_OVER[self.attention]
        changed = "".join(axis for axis in "xyz" if (axis in self.over) != (axis in other))
        return self.tokens * width / self.devices * self.share(changed)

    def norms(self, count: int) -> float:
        """Of the sums of squares of a residual stream that is sharded along d_model, and scales gathered over x."""
        rows = self.tokens / self.mesh.size(self.over)
        return count * (2 * self.share(STREAM[self.feed_forward]) * rows + self.scale)

    @property
    def scale(self) -> float:
        """Of a norm's scale, which is gathered over x."""
        return self.d_model * self.share("x") if self.over else 0

    def agrees(self, sent: float, expected: float, norms: int) -> bool:
        """Beside rings the compiler may move the part of a scale that a device needs, instead of gathering it."""
        least = 0 if self.products_by == "by_hand" else norms * self.scale
        return expected - least <= sent <= expected


def check_feed_forward(layout: str, products: str = "by_hand") -> None:
    at = Sizes(layout, "heads", products)
    for activations in (("gelu",), ("gelu", "linear")):
        layer = functools.partial(Mlp, at.d_model, at.d_ff, activations=activations)
        assert at.sent(layer) == at.products(len(activations) * at.d_ff, at.d_ff), (layout, activations)


def check_attention(layout: str, attention: str, products: str = "by_hand") -> None:
    at = Sizes(layout, attention, products)
    width = at.heads * HEAD_DIM
    layer = functools.partial(Attention, at.d_model, at.heads, HEAD_DIM)
    call = lambda layer, x: layer(x)[0]  # noqa: E731
    whole = at.products(3 * width, width) + 4 * at.exchanges(width)
    assert at.sent(layer, call) == whole, (at.name, "multi-head")
    # One head of keys: on every chip, summed over x or gathered along it; its examples gathered for heads.
    expected = at.products(width, width) + 2 * at.exchanges(width)
    if at.feed_forward == "2D":
        expected += 2 * 2 * at.tokens * HEAD_DIM * at.share("x")
    elif at.over:
        expected += 2 * at.d_model * HEAD_DIM * at.share("x")
        expected += 2 * at.tokens * HEAD_DIM * at.share(at.over) if attention == "heads" else 0
    assert at.sent(functools.partial(layer, num_kv_heads=1), call) == expected, (at.name, "multi-query")


def check_grouped_heads(attention: str) -> None:
    """As many heads of keys as chips along y and z, copied where query heads are not adjacent in attention."""
    for layout, per_chip in (("1d", 1), ("2d", 1), ("2d", 2)):
        at = Sizes(layout, attention)
        heads, keys = per_chip * at.heads, at.mesh.size("yz")
        width, key_width = heads * HEAD_DIM, keys * HEAD_DIM
        expected = at.products(width, width) + 2 * at.exchanges(width)
        if layout == "2d":
            expected += 2 * 2 * at.tokens * key_width / at.mesh.size("yz") * at.share("x")
        if attention == "batch_xyz":  # each of those along x takes its part of the examples
            expected += 2 * at.tokens * key_width / at.devices * at.share("yz")
        elif attention != "heads":
            expected += 2 * at.exchanges(width / per_chip)  # a copy for each query head, or for two adjacent ones
        layer = functools.partial(Attention, at.d_model, heads, HEAD_DIM, num_kv_heads=keys)
        assert at.sent(layer, lambda layer, x: layer(x)[0]) == expected, (at.name, per_chip)


def check_shared_heads(attention: str) -> None:
    """As many heads as chips along y and z: those along x have the same ones, and take a part of the examples each."""
    at = Sizes("2d", attention)
    heads = at.mesh.size("yz")
    width, beside = heads * HEAD_DIM, at.tokens * heads * HEAD_DIM / at.mesh.size("yz")
    expected = at.products(3 * width, width) + 3 * beside * at.share("x")  # sums over x go to all, not scattered
    if attention == "batch_xyz":
        expected += 4 * beside / at.mesh.size("x") * at.share("yz")
    elif attention == "batch_yz":
        expected += 4 * beside * at.share("yz")
    else:
        expected -= beside * at.share("x")  # outputs are there already
    layer = functools.partial(Attention, at.d_model, heads, HEAD_DIM)
    assert at.sent(layer, lambda layer, x: layer(x)[0]) == expected, at.name


def check_blocks(layout: str, attention: str, products: str = "by_hand") -> None:
    at = Sizes(layout, attention, products)
    width = at.heads * HEAD_DIM
    exchanged = 4 * at.exchanges(width)
    call = lambda layer, x: layer(x)[0]  # noqa: E731
    attending = functools.partial(Attention, num_heads=at.heads, head_dim=HEAD_DIM)
    for activations in (("gelu", "linear"), ("gelu",)) if attention == "heads" else (("gelu", "linear"),):
        hidden = len(activations) * at.d_ff
        mlp = functools.partial(Mlp, d_ff=at.d_ff, activations=activations)
        block = functools.partial(SelfAttentionBlock, at.d_model, attending, mlp)
        serial = at.products(hidden, at.d_ff) + at.products(3 * width, width) + exchanged + at.norms(2)
        assert at.agrees(at.sent(block, call), serial, 2), (at.name, activations, "serial")
        parallel = at.products(hidden + 3 * width, at.d_ff + width) + exchanged + at.norms(1)
        sent = at.sent(functools.partial(block, parallel=True), call)
        assert at.agrees(sent, parallel, 1), (at.name, activations, "parallel")


@pytest.mark.parametrize("layout", tiers(list(FEED_FORWARD), ["2d"], list(FEED_FORWARD)))
def test_feed_forward_layers_send_what_the_formula_says(layout):
    check_feed_forward(layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout, attention", LAYOUTS)
def test_attention_and_blocks_send_what_the_formula_says(layout, attention):
    check_attention(layout, attention)
    check_blocks(layout, attention)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "batch_yz", "batch_xyz"])
def test_chips_that_share_heads_send_no_more_than_they_need(attention):
    check_shared_heads(attention)


@pytest.mark.parametrize("attention", tiers(list(ATTENTION), slow=["batch_z", "batch_yz"]))
def test_chips_send_copies_of_grouped_keys_where_their_queries_go(attention):
    check_grouped_heads(attention)


# Each product of feed-forward layers in both rings; where attention is cut by examples in turn: what that exchanges are
# all-to-alls, which know no rings.
RING_CASES = [(layout, "heads", ring) for layout in FEED_FORWARD for ring in RINGS]
RING_CASES += [(*layout, RINGS[n % 2]) for n, layout in enumerate(LAYOUTS) if layout[1] != "heads"]
RING_SLOW = [("1d", "heads", "one_way"), ("2d", "batch_yz", RINGS[0]), ("weight_gathered_xy", "heads", "one_way")]


@pytest.mark.parametrize("layout, attention, ring", tiers(RING_CASES, slow=RING_SLOW))
def test_attention_and_blocks_in_rings_send_what_the_formula_says(layout, attention, ring):
    check_attention(layout, attention, ring)
    check_blocks(layout, attention, ring)


@pytest.mark.proofs
@pytest.mark.parametrize("part", ["sent", "computed"])
@pytest.mark.parametrize("devices", [16, 64])
def test_more_devices_send_what_the_formula_says_and_compute_what_one_does(devices, part):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, part], env=environment, check=True)


FAMILIES = {
    "multi-head": ("lm",),
    "grouped": ("lm", "NUM_KV_HEADS=4"),
    "in large groups": ("lm", "NUM_KV_HEADS=2"),
    "in groups of neighbours": ("lm", "NUM_HEADS=16", "NUM_KV_HEADS=4"),
    "multi-query": ("lm", "NUM_KV_HEADS=1"),
    "shared heads": ("lm", "NUM_HEADS=4"),
    "one shared head of keys": ("lm", "NUM_HEADS=4", "NUM_KV_HEADS=1"),
    "parallel": ("palm",),
    "ungated": ("gpt2",),
    "encoder-decoder": ("t5_1_1",),
    "ungated encoder-decoder": ("t5",),
}
ALL = [f"inference/{name}" + ("" if over == "heads" else f"_{over}") for name, over in LAYOUTS]
ALL += [f"inference/2d_after_weight_gathered_{axes}" for axes in ("x", "xy", "xyz")]
ALL += [f"inference/2d_batch_xyz_after_weight_gathered_{axes}" for axes in ("x", "xy", "xyz")]
QUICK = [("multi-query", "inference/2d_batch_xyz_after_weight_gathered_xyz", "by_hand")]
SLOW = [
    ("multi-head", "inference/2d_batch_z", "by_hand"),
    ("grouped", "inference/2d_after_weight_gathered_x", "by_hand"),
    ("in large groups", "inference/1d_batch_yz", "by_hand"),
    ("in groups of neighbours", "inference/2d_batch_yz", "by_hand"),
    ("grouped", "inference/weight_gathered_xy", "by_hand"),
    ("shared heads", "inference/2d_batch_z", "by_hand"),
    ("one shared head of keys", "inference/2d_batch_xyz_after_weight_gathered_xy", "by_hand"),
    ("parallel", "inference/2d", "by_hand"),
    ("encoder-decoder", "inference/2d_batch_yz", "by_hand"),
    ("encoder-decoder", "inference/2d_batch_xyz_after_weight_gathered_xyz", "by_hand"),
    ("ungated", "inference/2d_batch_xyz", "by_hand"),
    ("ungated encoder-decoder", "inference/weight_gathered_x", "by_hand"),
    ("multi-query", "inference/2d_batch_xyz_after_weight_gathered_xyz", "bidirectional"),
    ("parallel", "inference/2d", "bidirectional"),
    ("grouped", "inference/1d", "one_way"),
    ("encoder-decoder", "inference/2d_batch_yz", "one_way"),
]
# Every way to have heads under every layout, since how heads are cut hangs on both; after a prompt that gathers weights
# along x, xy, xyz in turn, as attention gets the same of these. Ways to multiply in turn: they know no heads. Families
# that differ in blocks alone meet each layout of feed-forward layers, and each of attention.
WAYS = ("by_hand", *RINGS)
BLOCKS = ("parallel", "ungated", "encoder-decoder", "ungated encoder-decoder")
AFTER = [layout for layout in ALL if "_after_" in layout]
IN_TURN = [
    (family, layout, WAYS[(i + j) % 3])
    for i, family in enumerate(family for family in FAMILIES if family not in BLOCKS)
    for j, layout in enumerate(ALL)
    if layout not in AFTER or AFTER.index(layout) % 3 == i % 3
]
PARTS = {layout: layout.removeprefix("inference/").partition("_batch")[::2] for layout in ALL}  # 2d, _xyz_after_...
FED = {layout: (fed, over.partition("_after")[2]) for layout, (fed, over) in PARTS.items()}
OVER = {layout: over.partition("_after")[0] for layout, (_, over) in PARTS.items()}
IN_TURN += [
    (case["family"], case["layout"], case["way"])
    for case in pairwise(
        {"family": BLOCKS, "layout": ALL, "way": WAYS},
        of=lambda case: case | {"layout": FED[case["layout"]], "over": OVER[case["layout"]]},
    )
]
CASES = list(dict.fromkeys([*QUICK, *SLOW, *IN_TURN]))
# Of 16 and 64 devices: what they hold of keys is a part of a head's, of several, or of an example's.
ON_MORE = [
    ("multi-head", "inference/1d_batch_yz"),
    ("multi-head", "inference/2d_batch_z"),
    ("grouped", "inference/2d_batch_z"),
    ("grouped", "inference/1d_batch_yz"),
    ("multi-query", "inference/2d_batch_xyz_after_weight_gathered_xy"),
    ("multi-query", "inference/weight_gathered_xyz_batch_xyz"),
    ("one shared head of keys", "inference/2d_batch_xyz"),
    ("parallel", "inference/2d_after_weight_gathered_xyz"),
    ("encoder-decoder", "inference/2d_batch_yz"),
    ("ungated encoder-decoder", "inference/weight_gathered_x"),
]


def made(family: str, layout: str, *more: str):
    """A model of as many heads as devices, but for the families that say otherwise."""
    name, *bindings = FAMILIES[family]
    devices, shape = jax.device_count(), []
    sizes = [f"NUM_HEADS={devices}"]
    if devices > 8:
        bindings = [each.replace("NUM_HEADS=4", f"NUM_HEADS={math.prod(SIZES[devices][1:])}") for each in bindings]
        sizes += ["D_MODEL=128", "D_FF=128", "HEAD_DIM=4", f"BATCH_SIZE={devices}"]
        shape = [f"mesh.MeshShape.ici={dict(zip('xyz', SIZES[devices], strict=True))}"] if "/" in layout else []
    return tiny.program(name, *sizes, *bindings, *shape, *more, layout=layout)


def decoded(program, params, steps: int, weights: str | None = None):
    """Returns logits of `steps` given tokens after a prompt, scores of the prompt, and the cache."""
    fed = np.random.default_rng(0).integers(2, 200, (steps, program.batch_size, 1), np.int32)
    params = jax.device_put(params, program.sharded.param_shardings)
    sharded, params = prepared(program.sharded, params, weights is not None, weights)
    model = sharded.model
    batch = program.shard_batch(program.synthetic_batch())
    logits = []
    with program.partitioner.activate():
        _, positions, cache = jax.jit(model.prefill, static_argnums=2)(params, batch, steps)
        positions, step = np.asarray(positions), jax.jit(model.decode, donate_argnums=3)
        for index, tokens in enumerate(fed):
            found, cache = step(params, tokens, positions + index, cache)
            logits.append(np.asarray(found))
        scores = jax.jit(model.score)(params, batch)
    return np.stack(logits), np.asarray(scores), cache


@functools.cache
def reference(family: str, steps: int):
    program = made(family, "single")
    params = jax.device_get(program.init().params)
    return params, *decoded(program, params, steps)[:2]


@pytest.mark.parametrize("family, layout, way", tiers(CASES, QUICK, SLOW))
def test_logits_and_cache_are_those_of_one_device(family, layout, way, request):
    check_model(family, layout, 32 if request.node.get_closest_marker("proofs") else 4, of_products(way))


def check_model(family: str, layout: str, steps: int, *more: str) -> None:
    params, expected, scores = reference(family, steps)
    program = made(family, layout, *more)
    logits, found, cache = decoded(program, params, steps)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)
    check_cache(program, layout, cache)


KEPT_IN_INTEGERS = "attention.Attention.cache_dtype='int8'"


@functools.cache
def reference_in_integers(family: str):
    params = reference(family, 4)[0]
    return params, *decoded(made(family, "single", KEPT_IN_INTEGERS), params, 4, "int8")[:2]


# Each layout once, families in turn: scales lie as what they scale, of whichever model.
INTEGERS = [(("multi-query", "encoder-decoder")[n % 2], layout) for n, layout in enumerate(ALL)]


@pytest.mark.parametrize("family, layout", tiers(INTEGERS, slow=[INTEGERS[-1], ("multi-query", "inference/2d")]))
def test_weights_and_cache_in_integers_are_those_of_one_device(family, layout):
    """But for keys and values at the edge of two integers; a cache in a quarter of the bytes, and its scales."""
    params, expected, scores = reference_in_integers(family)
    program = made(family, layout, KEPT_IN_INTEGERS)
    logits, found, cache = decoded(program, params, 4, "int8")
    assert np.abs(logits - expected).max() <= 5e-3 * np.abs(expected).max()
    np.testing.assert_allclose(found, scores, rtol=1e-4, atol=1e-4)
    floats = made(family, layout)
    params = jax.device_put(params, floats.sharded.param_shardings)
    with floats.partitioner.activate():
        batch = floats.shard_batch(floats.synthetic_batch())
        before = jax.jit(floats.sharded.model.prefill, static_argnums=2)(params, batch, 4)[2]
    held, before = (
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(each.layers)) for each in (cache, before)
    )
    assert held == before * (1 + 4 / 16) / 4


def check_cache(program, layout: str, cache) -> None:
    """What each device holds of keys and values is what the plan counts: a single head on all of them, or examples'
    shares."""
    over = next((each for each in ATTENTION[:0:-1] if each in layout), "heads").replace("_", "-")
    mesh = Arrangement(*((Ring(size, 1.0),) for size in SIZES[jax.device_count()]))
    weights = weights_of(program.param_shapes, program.axes)
    heads, kv_heads = (
        next(each.shape[each.names.index(axis)] for each in weights if axis in each.names)
        for axis in ("heads", "kv_heads")
    )
    expected, held = 0, dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(cache.layers):
        layers, batch, _, context, head_dim = leaf.shape  # with copies of heads
        sizes = Transformer(layers, 1, 1, heads, kv_heads, head_dim, 1)
        expected += layers * cache_bytes(sizes, batch, context, over, mesh, 4) / 2  # leaf by leaf: keys or values
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {expected}


if __name__ == "__main__":
    assert math.prod(SIZES[jax.device_count()]) == jax.device_count()
    if sys.argv[1:] == ["computed"]:
        for family, layout in ON_MORE:
            check_model(family, layout, 32)
    else:
        for layout in FEED_FORWARD:
            check_feed_forward(layout)
        for layout, attention in LAYOUTS:
            check_attention(layout, attention)
            check_blocks(layout, attention)
        for n, layout in enumerate(LAYOUTS if jax.device_count() < 64 else ()):  # steps are unrolled: hundreds of them
            check_blocks(*layout, RINGS[n % 2])
        for attention in ATTENTION:
            check_grouped_heads(attention)
        for attention in ("heads", "batch_yz", "batch_xyz"):
            check_shared_heads(attention)
