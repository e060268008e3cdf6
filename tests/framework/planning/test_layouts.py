"""The layouts that Pope et al. 2022 (ESTI) chose, and what an estimate adds up."""

from pathlib import Path

import pytest

from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.layouts import Pass, candidates, estimates, shipped, why_behind
from meshway.framework.planning.topology import topology

PALM_540B = Transformer(118, 18432, 73728, 48, 1, 256, 256_128, parallel=True)
PALM_62B = Transformer(64, 8192, 32768, 32, 1, 256, 256_128, parallel=True)
PALM_8B = Transformer(32, 4096, 16384, 16, 1, 256, 256_128, parallel=True)


def decode(batch: int, context: int = 2048, **options: float) -> Pass:
    return Pass("decode", batch, 1, context, **options)


def prefill(batch: int, length: int, **options: float) -> Pass:
    return Pass("prefill", batch, length, length, **options)


@pytest.mark.parametrize("overlap", [False, True])
def test_picks_of_the_paper_on_64_chips(overlap: bool) -> None:
    slice_ = topology("v4:4x4x4")
    for batch in (64, 128, 256, 512):
        best = estimates(PALM_540B, decode(batch, overlap=overlap), slice_)[0]
        assert best.feed_forward == "2D" and best.attention != "heads" and best.fits
    best = estimates(PALM_540B, prefill(512, 2048, overlap=overlap), slice_)[0]
    assert best.feed_forward.startswith("WG")
    both = estimates(PALM_540B, prefill(512, 2048, overlap=overlap), slice_, feed_forward=("2D", "WG-XYZ"))
    assert both[0].feed_forward == "WG-XYZ"
    assert estimates(PALM_540B, prefill(1, 2048, overlap=overlap), slice_)[0].feed_forward == "2D"
    assert estimates(PALM_540B, prefill(1, 2048, overlap=overlap), slice_)[0].attention == "heads"


def test_attention_over_the_batch_from_4_rows_on() -> None:
    slice_ = topology("v4:4x4x4")
    for flat in (False, True):
        every = {batch: estimates(PALM_540B, decode(batch), slice_, flat) for batch in (1, 2, 4, 16, 64)}
        found = [next(e for e in each if e.mesh.sizes == (4, 4, 4)).attention for each in every.values()]
        assert found[:2] == ["heads", "heads"]
        assert all(layout.startswith("batch") for layout in found[2:])


def test_one_chip_sends_nothing_and_reads_its_weights_once_a_token() -> None:
    (best, *_) = estimates(PALM_8B, decode(1, weight_bytes=1), topology("v5p:1x1x1"))
    assert best.communication == 0 and best.num_collectives == 0
    assert best.memory * best.chip.memory_bandwidth == pytest.approx(PALM_8B.num_params + best.cache)
    assert best.bound == "memory" and best.fits


def test_int8_weights_halve_the_reads_and_a_model_that_is_too_large_comes_last() -> None:
    slice_ = topology("v5e:4x4")
    wide, narrow = (estimates(PALM_62B, decode(32, weight_bytes=size), slice_)[0] for size in (2, 1))
    assert wide.weights == 2 * narrow.weights and wide.seconds > narrow.seconds
    assert not any(each.fits for each in estimates(PALM_540B, decode(32), slice_))


def test_an_encoder_runs_in_prefill_and_its_output_is_read_in_decoding() -> None:
    xxl = Transformer(24, 4096, 10240, 64, 64, 64, 32128, encoder_layers=24, tied=False)
    assert xxl.num_params == pytest.approx(11.135e9, rel=1e-3)
    slice_ = topology("v4:2x2x2")
    read = estimates(xxl, prefill(8, 512), slice_)[0]
    step = estimates(xxl, Pass("decode", 8, 1, 64, inputs=512), slice_)[0]
    crossed = 24 * 2 * 4096 * 64 * 64  # keys and values of the encoder's output are made once, with it
    assert read.params == xxl.encoder_params + crossed
    assert step.params == xxl.decoder_params - crossed + xxl.logits_params
    scores = 4 * 24 * 8 * 512 * 64 * 64 * 512  # every token of an encoder sees every other
    assert read.compute * 8 * read.chip.bfloat16 == pytest.approx(2 * read.params * 8 * 512 + scores)
    whole = 2 * 24 * 8 * (64 + 512) * 64 * 64 * 2
    assert step.cache == whole / 8


def test_the_layouts_that_are_shipped_are_those_that_may_be_chosen() -> None:
    folder = Path(__file__).parents[3] / "gin/layouts/inference"
    assert sorted(shipped().values()) == sorted(f"inference/{path.stem}" for path in folder.glob("*.gin"))


def test_prefill_and_decoding_share_one_copy_of_the_weights() -> None:
    """The paper's offline setting: weights gathered for the prompts, stationary for the steps, resting alike; and keys
    and values stay where they are."""
    slice_ = topology("v4:4x4x4")
    read, step = (estimates(PALM_540B, what, slice_) for what in (prefill(512, 2048), decode(512, 2112)))
    best, *others = candidates(read, step, 64)
    first, then = best.prefill, best.decode
    assert first.mesh == then.mesh and first.attention == then.attention and best.fits
    assert first.feed_forward.startswith("WG") and then.feed_forward == "2D"
    alone = read[0].seconds + 64 * step[0].seconds
    assert alone <= best.seconds < 1.02 * alone
    assert best.seconds == first.seconds + 64 * then.seconds <= min(each.seconds for each in others if each.fits)
    assert candidates([], step, 64) == []


def test_why_a_layout_comes_behind_another() -> None:
    slice_ = topology("v4:4x4x4")
    found = candidates(estimates(PALM_540B, prefill(1, 2048), slice_), estimates(PALM_540B, decode(1), slice_), 64)
    one = next(each for each in found if each.layout == "inference/1d")
    assert why_behind(one, found[0]).endswith("slower, most of all by prefill's communication")
    wide = candidates(estimates(PALM_540B, prefill(512, 2048), slice_), estimates(PALM_540B, decode(512), slice_), 64)
    heads = next(each for each in wide if each.layout == "inference/2d")
    assert not heads.fits and why_behind(heads, wide[0]) == "a chip has no room for it"


@pytest.mark.parametrize("flat", [False, True])
def test_both_dies_of_a_chip_hold_their_part(flat: bool) -> None:
    """A TPU7x is two devices of 96 GiB and half its FLOP/s each: 8 chips hold what 16 such devices do."""
    where = topology("tpu7x:2x2x2")
    assert where.num_chips == 8 and where.num_devices == 16
    (dies,) = [ring for ring in where.device_rings if ring.is_inside]
    assert dies.size == 2 and dies.bandwidth == 600e9
    for each in estimates(PALM_62B, prefill(64, 2048), where, flat):
        assert each.mesh.size("xyz") == 16
        assert each.weights == PALM_62B.num_params * 2 / 16
        assert each.chip_seconds_per_token * 64 * 2048 == pytest.approx(8 * each.seconds)
        assert each.compute >= 2 * each.params * 64 * 2048 / (8 * 2307e12)
