"""The published numbers of Pope et al. 2022 (ESTI) and of How to Scale Your Model, from the closed forms."""

import itertools
import math

import pytest

from meshway.framework.errors import UserError
from meshway.framework.planning import cost
from meshway.framework.planning.cost import (
    Arrangement,
    Collective,
    RingKind,
    Transformer,
    products,
    ring_seconds,
    volume,
)
from meshway.framework.planning.layouts import arrangements
from meshway.framework.planning.topology import CHIPS, Ring, topology

V4 = CHIPS["TPU v4"]
PALM_540B = Transformer(118, 18432, 73728, 48, 1, 256, 256_128, parallel=True)
PALM_62B = Transformer(64, 8192, 32768, 32, 1, 256, 256_128, parallel=True)
PALM_8B = Transformer(32, 4096, 16384, 16, 1, 256, 256_128, parallel=True)


def mesh(x: int, y: int, z: int, flat: float | None = V4.sends) -> Arrangement:
    return Arrangement((Ring(x, 90e9),), (Ring(y, 90e9),), (Ring(z, 90e9),), flat)


def test_parameters_of_palm() -> None:
    found = [model.num_params / 1e9 for model in (PALM_8B, PALM_62B, PALM_540B)]
    assert found == pytest.approx([8.632, 62.496, 540.357], abs=5e-4)


@pytest.mark.parametrize(
    ("layout", "elements"), [("1D", 129_024), ("2D", 55_296), ("WG-X", 55_296), ("WG-XY", 129_024), ("WG-XYZ", 516_096)]
)
def test_volumes_are_what_compiled_layers_send(layout: cost.FeedForward, elements: int) -> None:
    """Measured in optimised HLO of hand-written layers, 64 devices, d_model 256, d_ff 1024, 256 tokens."""
    assert volume(products(layout, 256, 256, 1024, 1024, mesh(4, 4, 4)), mesh(4, 4, 4)) == elements


@pytest.mark.parametrize(
    ("first", "second", "ungated", "gated"),
    [
        ("2D", "WG-X", 18_432, 18_432),
        ("WG-X", "WG-XY", 73_728, 110_592),
        ("WG-XY", "WG-XYZ", 1_179_648, 1_769_472),
        ("2D", "WG-XYZ", 172_032, 211_130),
    ],
)
def test_crossovers_of_540b(first: cost.FeedForward, second: cost.FeedForward, ungated: int, gated: int) -> None:
    found = [cost.crossover(first, second, 18432, 73728, gated, mesh(4, 4, 4)) for gated in (False, True)]
    assert [round(tokens) for tokens in found] == [ungated, gated]
    assert cost.crossover(second, first, 18432, 73728, False, mesh(4, 4, 4)) == math.inf


def test_crossovers_of_figure_3() -> None:
    pairs = itertools.pairwise(("2D", "WG-X", "WG-XY", "WG-XYZ"))
    found = [round(cost.crossover(first, second, 16384, 65536, False, mesh(4, 4, 4))) for first, second in pairs]
    assert found == [16_384, 65_536, 1_048_576]


def test_the_best_split_of_a_2d_layer() -> None:
    assert cost.best_split(64, 1024, 4096) == (4, 16)  # 0.5 and 2 times sqrt(n)
    assert cost.best_split(128, 1024, 4096, torus=True) == pytest.approx((4, 32))  # sqrt(n/8), sqrt(8n)
    for chips in (16, 64, 256):
        flat = cost.stationary_seconds("2D", chips, 1024, 4096, 1e9)
        assert flat == pytest.approx(8 * 1024 / math.sqrt(chips) / 3e9)
        torus = cost.stationary_seconds("2D", chips, 1024, 4096, 1e9, torus=True)
        assert torus == pytest.approx(math.sqrt(128) * 1024 / math.sqrt(chips) / 1e9 / 2)


def test_2d_beats_1d_from_some_number_of_chips_on() -> None:
    """More than 16 flat (ESTI, section 3.2.2). In a torus sqrt(128 / n) < 4 / 3 is n > 72; How to Scale Your Model says
    81, and no slice has a number of chips between them."""

    def first(torus: bool) -> int:
        one = cost.stationary_seconds("1D", 0, 1024, 4096, 1e9, torus)
        return next(
            n for n in range(2, 500) if cost.stationary_seconds("2D", n, 1024, 4096, 1e9, torus) < one * (1 - 1e-9)
        )

    assert first(torus=False) == 17
    assert first(torus=True) == 73


def test_gathering_weights_over_the_best_number_of_chips() -> None:
    tokens, chips, d_model, d_ff = 2**20, 64, 1024, 4096
    best = cost.best_gather(tokens, chips, d_ff)
    assert best == math.sqrt(tokens * chips / d_ff)
    sent = lambda gathered: 2 * d_model * d_ff * gathered / chips + 2 * tokens * d_model / gathered  # noqa: E731
    assert sent(best) == pytest.approx(4 * d_model * math.sqrt(tokens * d_ff) / math.sqrt(chips))
    assert sent(best) < min(sent(best * 0.9), sent(best * 1.1))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "layout", "contexts"),
    [
        (64, 64, 128, "heads", (1320, 330)),
        (64, 1, 256, "heads", (660, 165)),
        (64, 1, 256, "batch-xyz", (43_000, 10_700)),
    ],
)
def test_longest_contexts_of_table_1(
    heads: int, kv_heads: int, head_dim: int, layout: cost.AttentionLayout, contexts: tuple[int, int]
) -> None:
    model = Transformer(118, 18432, 73728, heads, kv_heads, head_dim, 256_128, parallel=True)
    found = [cost.max_context(model, batch, layout, mesh(4, 4, 4), 0.3 * V4.memory_bytes) for batch in (128, 512)]
    assert found == pytest.approx(contexts, rel=0.015)


@pytest.mark.parametrize(
    ("model", "tokens", "chips", "seconds", "published"),
    [
        (PALM_540B, 2048, 64, 0.29, 43),
        (PALM_540B, 64 * 64, 64, 1.82, 14),
        (PALM_540B, 512 * 2048, 64, 85.2, 76),
        (PALM_540B, 512 * 64, 64, 6.0, 33),
        (PALM_62B, 2048, 16, 0.16, 36),
        (PALM_62B, 32 * 64, 16, 0.73, 8),
        (PALM_62B, 512 * 2048, 32, 20.2, 73),
        (PALM_62B, 512 * 64, 8, 5.1, 37),
    ],
)
def test_utilisations_of_tables_2_and_3(
    model: Transformer, tokens: int, chips: int, seconds: float, published: int
) -> None:
    assert abs(100 * cost.mfu(model.num_params, tokens, chips, V4.bfloat16, seconds) - published) < 1


def test_a_cache_that_is_replicated_and_one_that_is_not() -> None:
    grouped = Transformer(1, 64, 256, 8, 4, 16, 100)
    cube = mesh(2, 2, 2)
    whole = 2 * 8 * 32 * 4 * 16 * 2
    layouts = ("heads", "batch-z", "batch-yz", "batch-xyz")
    found = [cost.cache_bytes(grouped, 8, 32, layout, cube, 2) for layout in layouts]
    # 4 heads over 8 chips: each is there twice, or all those that the query heads of 2 or 4 chips meet.
    assert found == [whole / 4, whole / 4, whole / 4, whole / 8]
    pairs = Transformer(1, 64, 256, 16, 4, 16, 100)  # two adjacent query heads of a chip share one
    assert cost.cache_bytes(pairs, 8, 32, "batch-z", cube, 2) == whole / 4
    divided = Transformer(1, 64, 256, 16, 8, 16, 100)
    assert cost.cache_bytes(divided, 8, 32, "batch-z", cube, 2) == 2 * whole / 8
    single = Transformer(1, 64, 256, 8, 1, 16, 100)
    found = [cost.cache_bytes(single, 8, 32, layout, cube, 2) for layout in layouts]
    assert found == [whole / 4, whole / 8, whole / 16, whole / 32]


def test_topologies() -> None:
    v4 = topology("v4:4x4x4")
    assert v4.num_chips == 64 and v4.chip is V4 and {ring.bandwidth for ring in v4.rings} == {90e9}
    assert {ring.bandwidth for ring in topology("v4:2x2x2").rings} == {45e9}  # no link wraps around
    assert [ring.bandwidth for ring in topology("v5e:16x4").rings] == [90e9, 45e9]
    assert topology("H100:12").num_chips == 12 and [ring.size for ring in topology("h100:12").rings] == [2, 2, 3]
    assert topology("h100:1").num_chips == 1
    assert {one.sizes for one in arrangements(topology("h100:4"), flat=False)} == {
        (x, y, z) for x in (1, 2, 4) for y in (1, 2, 4) for z in (1, 2, 4) if x * y * z == 4
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", "no accelerator is called 'v5x'; did you mean 'v5"),
        ("v5p", "does not say how many: write it as v5p:4x4x4"),
        ("v5e:0x4", "does not say how many: write it as v5e:4x4"),
        ("v5p:4x4", "a torus of 3 dimensions, and it has 2: write it as v5p:4x4x4"),
        ("h100:eight", "does not say how many: write it as h100:8"),
        ("h100:99999999999", "has 99,999,999,999 chips; at most 1,048,576"),
        ("v5e:4x4x65537slices", "has 1,048,592 chips"),
        ("", "no accelerator is called ''"),
        ("v5litepod-8", "write the chip and how many, as v5e:4x4"),
        ("v4-128", "write the chip and how many, as v4:4x4x4"),
        ("v5e:32x32", "a pod has 256 chips, not 1,024; several slices are written as v5e:4x4x2slices"),
        ("cpu:4096", "at most 512 devices are simulated"),
    ],
)
def test_no_such_topology(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology(name)


def test_a_product_in_rings_takes_the_longer_of_a_chunk_and_its_product_in_each_round() -> None:
    """By hand: 4 chips in a ring, chunks of 250 elements of 2 bytes, links of 100 bytes/s one way."""
    along = Arrangement((Ring(4, 200.0),), (Ring(1, 1.0),), (Ring(1, 1.0),))
    gather = Collective("all-gather", "x", 1000)
    scatter = Collective("reduce-scatter", "x", 1000)

    def seconds(product: float, ring: RingKind, *collectives: Collective) -> float:
        return ring_seconds(collectives, product, along, [2.0] * len(collectives), 100.0, ring)

    for one in (gather, scatter):
        assert seconds(4.0, "one_way", one) == pytest.approx(3 * max(5, 1) + 1)  # a hop of 500 bytes
        assert seconds(40.0, "one_way", one) == pytest.approx(3 * max(5, 10) + 10)
        # 2 rounds of 750 bytes each way: a whole chunk each, then halves.
        assert seconds(4.0, "bidirectional", one) == pytest.approx(max(7.5, 3) + 1)
        assert seconds(40.0, "bidirectional", one) == pytest.approx(30 + 10)
    assert seconds(7.0, "one_way") == 7.0  # nothing goes around
    weights = Collective("all-gather", "x", 1001, weights=True)  # more than the activations, which then wait
    alone = gather.seconds(along, 2.0)
    assert seconds(400.0, "one_way", weights, gather) == pytest.approx(400 + alone)


def test_a_gather_goes_on_beside_the_block_that_leaves_first() -> None:
    mesh = Arrangement((Ring(2, 200.0),), (Ring(4, 200.0),), (Ring(1, 1.0),))
    gather, scatter = Collective("all-gather", "y", 1000), Collective("reduce-scatter", "x", 1000)
    # Half of the product, a quarter of it alone, beside 3 hops of 5 s; the other half beside a hop of 10 s.
    found = ring_seconds([gather, scatter], 8.0, mesh, [2.0, 2.0], 100.0, "one_way")
    assert found == pytest.approx(15 + 10 + 1)


def test_rings_of_several_axes_are_nested() -> None:
    mesh = Arrangement((Ring(1, 1.0),), (Ring(4, 200.0),), (Ring(2, 200.0),))
    gather = Collective("all-gather", "yz", 800)
    # 3 hops of 200 bytes along y, one of 800 along z, then what is left: one chunk's product of eight.
    assert ring_seconds([gather], 0.8, mesh, [2.0], 100.0, "one_way") == pytest.approx(6 + 8 + 0.1)
