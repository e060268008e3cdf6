"""Feature converters of seqio's kind: what they make is what a run trains on, and what does not fit is told."""

import functools
import operator

import numpy as np
import pytest
from tasks_in_memory import TOKENS, lay, random_examples, task
from tiny import LENGTHS, program

from meshway.framework.data.cache.format import CachedSplit
from meshway.framework.data.features import EncoderDecoder, PrefixLanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.seqio_converters import SeqioConverter
from meshway.framework.data.seqio_loader import SeqioData
from meshway.framework.errors import UserError
from meshway.models import objectives


@pytest.fixture(scope="module")
def own():
    from meshway.framework.data.seqio_adapter import import_seqio

    import_seqio()  # quietly
    import own_converters

    return own_converters


def by_hand(converter, examples, lengths):
    """Returns what a converter makes of examples, by itself, and T5X's masks of it."""
    import tensorflow as tf

    specs = {name: tf.TensorSpec(np.shape(value)[:0] or [None], tf.int32) for name, value in examples[0].items()}
    cut = [{name: value[: lengths[name]] for name, value in example.items()} for example in examples]
    made = converter(tf.data.Dataset.from_generator(lambda: iter(cut), output_signature=specs), lengths)
    rows = next(made.batch(1000).as_numpy_iterator())
    for side, told in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        if told in rows and f"{side}_segment_ids" not in rows:
            rows[f"{side}_segment_ids"] = (rows[told] > 0).astype(np.int32)
            rows[f"{side}_positions"] = rows[f"{side}_segment_ids"] * np.arange(rows[told].shape[1])
    return rows


def nonzero(count, seed=0, longest=20):
    """Examples as seqio's converters bear them: without token 0, which they take for padding."""
    found = random_examples(count, longest=longest, seed=seed).read(range(count))
    return [{name: value % 200 + 2 for name, value in each.items()} for each in found]


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, array in batch.items():
        assert np.array_equal(array, expected[name]), name


def test_unpacked_rows_are_the_converters_own(own):
    converter, examples = SeqioConverter(own.EveryOther, pack=False), nonzero(40, longest=30)
    batch = lay(converter.bind(task("inputs", "targets"), LENGTHS), examples, packed=False)
    assert_same(batch, by_hand(own.EveryOther(pack=False), examples, LENGTHS))
    spec = converter.spec(LENGTHS, 40)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == spec


@pytest.mark.slow
def test_packed_rows_are_what_the_converter_packs_of_their_examples(own):
    converter, examples = SeqioConverter(own.EveryOther, pack=True), nonzero(60, longest=9)
    examples = [{name: np.append(value, 1) for name, value in each.items()} for each in examples]
    batch = lay(converter.bind(task("inputs", "targets"), LENGTHS), examples, packed=True)
    segments = batch["encoder_segment_ids"].max(axis=1)
    assert segments.sum() == len(examples) and segments.max() > 2
    for row in segments.argsort()[-2:]:
        inside = [
            {
                "inputs": batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] == segment],
                "targets": batch["decoder_target_tokens"][row][batch["decoder_segment_ids"][row] == segment],
            }
            for segment in range(1, segments[row] + 1)
        ]
        expected = by_hand(own.EveryOther(pack=True), inside, LENGTHS)
        assert_same({name: array[row : row + 1] for name, array in batch.items()}, expected)


@pytest.mark.parametrize(
    ("theirs", "ours", "pack"),
    [
        ("EncDecFeatureConverter", EncoderDecoder, False),
        pytest.param("PrefixLMFeatureConverter", PrefixLanguageModel, False, marks=pytest.mark.slow),
        pytest.param("EncDecFeatureConverter", EncoderDecoder, True, marks=pytest.mark.slow),
        pytest.param("feature_converters.DecoderFeatureConverter", PrefixLanguageModel, False, marks=pytest.mark.slow),
    ],
)
def test_seqios_own_are_ours(own, theirs, ours, pack):
    examples = [{name: np.append(value, 1) for name, value in each.items()} for each in nonzero(30, longest=9)]
    bound = [
        converter.bind(task("inputs", "targets"), LENGTHS)
        for converter in (SeqioConverter(operator.attrgetter(theirs)(own.seqio), pack=pack), ours(pack=pack))
    ]
    one, other = (lay(objective, examples, pack) for objective in bound)
    # Unpacked, seqio leaves the last target where padding begins.
    one["decoder_input_tokens"] = one["decoder_input_tokens"] * (one["decoder_segment_ids"] > 0)
    assert_same(one, other)
    if not pack:
        one, other = (objective.prompts(examples) for objective in bound)
        assert_same({name: array[:, : other[name].shape[1]] for name, array in one.items()}, other)


def test_a_decoder_of_targets_alone_has_nothing_to_predict_from(own, seqio, tmp_path):
    decoder = own.seqio.feature_converters.DecoderFeatureConverter(pack=False)
    arguments = {"lengths": {"targets": 16}, "batch_size": 2, "converter": decoder}
    for made in (
        CachedData("tiny_c", cache_dir=str(tmp_path), num_workers=0, **arguments),
        SeqioData("tiny_c", **arguments),
    ):
        (evaluation,) = made.eval_tasks()
        assert not evaluation.has_metrics and "nothing to predict from" in evaluation.left_out[0]
        assert next(evaluation.batches())[1] == 2 and list(made.vocabularies()) == ["targets"]
    alone, pairs = (SeqioConverter(decoder).bind(task("inputs", "targets"), x) for x in ({"targets": 16}, LENGTHS))
    assert "decoder_prefix_mask" in pairs.prompts(nonzero(2))
    with pytest.raises(UserError, match="neither an encoder's inputs nor a prefix"):
        alone.prompts(nonzero(2))


@pytest.mark.slow
def test_prepacked_examples_are_taken_as_they_are(own):
    seqio, examples = own.seqio, nonzero(12, longest=9)
    packed = lay(SeqioConverter(seqio.EncDecFeatureConverter).bind(task("inputs", "targets"), LENGTHS), examples, True)
    sides = (("inputs", "encoder_input_tokens", "encoder"), ("targets", "decoder_target_tokens", "decoder"))
    rows = [
        {
            key: packed[name][row]
            for feature, tokens, side in sides
            for key, name in (
                (feature, tokens),
                (f"{feature}_positions", f"{side}_positions"),
                (f"{feature}_segment_ids", f"{side}_segment_ids"),
            )
        }
        for row in range(len(packed["encoder_positions"]))
    ]
    lengths = {name: LENGTHS[name.split("_")[0]] for name in rows[0]}
    converter = SeqioConverter(seqio.PrePackedEncDecFeatureConverter, pack=False)
    assert_same(lay(converter.bind(task(*rows[0]), lengths), rows, False), packed)
    # For decoders, whose examples are batch features already.
    decoder = {name: array for name, array in packed.items() if name.startswith("decoder")}
    rows = [{name: array[row].astype(np.int32) for name, array in decoder.items()} for row in range(len(rows))]
    converter = SeqioConverter(seqio.feature_converters.PrePackedLMFeatureConverter, pack=False)
    assert_same(lay(converter.bind(task(*rows[0]), {"targets": LENGTHS["targets"]}), rows, False), decoder)
    rows = [row | {"decoder_causal_attention": row["decoder_segment_ids"]} for row in rows]
    converter = SeqioConverter(seqio.feature_converters.PrePackedPrefixLMFeatureConverter, pack=False)
    batch = lay(converter.bind(task(*rows[0]), {"inputs": 6, "targets": LENGTHS["targets"] - 6}), rows, False)
    assert_same(batch, decoder | {"decoder_prefix_mask": decoder["decoder_segment_ids"]})


@pytest.mark.slow
def test_converters_that_have_no_twin_here_run_as_they_are(own):
    seqio, suffixed = own.seqio.feature_converters, ("inputs", "targets", "suffixes")
    lengths = LENGTHS | {"suffixes": 8}
    examples = random_examples(20, suffixed, longest=9).read(range(20))
    examples = [{name: value % 200 + 2 for name, value in each.items()} for each in examples]
    expected = by_hand(seqio.PrefixSuffixLMFeatureConverter(pack=False), examples, lengths)
    expected["decoder_prefix_mask"] = expected.pop("decoder_causal_attention")
    for theirs in (seqio.PrefixSuffixLMFeatureConverter, seqio.DecoderFeatureConverter):
        converter = SeqioConverter(theirs, pack=False, left_out=["target_suffix_weights"])
        batch = lay(converter.bind(task(*suffixed), lengths), examples, packed=False)
        assert_same(batch, {name: array for name, array in expected.items() if name != "target_suffix_weights"})
    asked = objectives.DecoderOnly(network=None, prefix=True).batch_spec(20, lengths)
    assert {name: x.shape for name, x in asked.items()} == {name: x.shape for name, x in batch.items()}
    masked = functools.partial(seqio.EncoderFeatureConverter, mask_id=7)
    examples = [{name: each["inputs"] for name in LENGTHS} for each in nonzero(9)]
    lengths = dict.fromkeys(LENGTHS, 16)
    batch = lay(SeqioConverter(masked, pack=False).bind(task("inputs", "targets"), lengths), examples, packed=False)
    assert_same(batch, by_hand(masked(pack=False), examples, lengths))


@pytest.mark.slow
def test_continuous_inputs(own):
    frames = FeatureInfo("float32", (None, 3))
    info = TaskInfo("audio", {"inputs": frames, "targets": TOKENS})
    converter = SeqioConverter(own.Frames, pack=False, shapes={"inputs": (3,)})
    examples = [
        {"inputs": np.full((i, 3), i / 2, np.float32), "targets": np.full(i % 5, i + 2, np.int32)} for i in range(9)
    ]
    batch = lay(converter.bind(info, LENGTHS), examples, packed=False)
    assert batch["encoder_input_tokens"].shape == (9, LENGTHS["inputs"], 3)
    assert batch["encoder_input_tokens"].sum() == sum(each["inputs"].sum() for each in examples)
    assert batch["encoder_segment_ids"].all() and batch["decoder_segment_ids"].sum() == sum(i % 5 for i in range(9))
    with pytest.raises(UserError, match="shapes.'inputs'. must give its 1 sizes after the first"):
        SeqioConverter(own.Frames, pack=False).bind(info, LENGTHS)


@pytest.mark.parametrize(
    ("name", "arguments", "lengths", "message"),
    [
        (
            "Longer",
            {"pack": False},
            LENGTHS,
            "Longer .TASK_FEATURE_LENGTHS.*'decoder_target_tokens' has length not equal",
        ),
        pytest.param(
            *("Halved", {"pack": True}, LENGTHS, "Halved.*makes 2 rows.*planned as 1.*half the lengths.*pack=False"),
            marks=pytest.mark.slow,
        ),
        ("EveryOther", {}, {"inputs": 8}, "TASK_FEATURE_LENGTHS={'inputs': 8} lacks 'targets', which EveryOther reads"),
        ("EveryOther", {}, LENGTHS | {"input": 8}, "has 'input', which is no task feature that EveryOther reads"),
        ("EveryOther", {}, LENGTHS | {"targets": 0}, "TASK_FEATURE_LENGTHS.'targets'. must be a whole number"),
        ("Noisy", {"pack": False}, LENGTHS, "Noisy draws random numbers"),
        ("Frames", {"pack": True, "shapes": {"inputs": (3,)}}, LENGTHS, "PACKING_FEATURE_DTYPES must be defined"),
    ],
)
def test_a_converter_that_does_not_fit_is_one_message(own, name, arguments, lengths, message):
    with pytest.raises(UserError, match=message) as raised:
        SeqioConverter(getattr(own, name), **arguments).bind(task("inputs", "targets"), lengths)
    assert "\n" not in str(raised.value)


def test_other_mistakes(own):
    with pytest.raises(UserError, match="Dropping makes .. rows of what is planned as 20"):
        lay(SeqioConverter(own.Dropping, pack=False).bind(task("inputs", "targets"), LENGTHS), nonzero(20), False)
    with pytest.raises(UserError, match="'inputs' is float32 of rank 2, but EveryOther.TASK_FEATURES says int32"):
        info = TaskInfo("audio", {"inputs": FeatureInfo("float32", (None, 3)), "targets": TOKENS})
        SeqioConverter(own.EveryOther, pack=False).bind(info, LENGTHS)
    with pytest.raises(UserError, match="decoders start from .7., but EveryOther from its bos_id 0"):
        SeqioConverter(own.EveryOther, pack=False).bind(
            TaskInfo("a", dict.fromkeys(LENGTHS, TOKENS), start=(7,)), LENGTHS
        )
    with pytest.raises(UserError, match="passthrough.PassThrough"):
        SeqioConverter(own.seqio.PassThroughFeatureConverter)
    with pytest.raises(UserError, match="EncoderDecoder, which is no seqio.FeatureConverter"):
        SeqioConverter(EncoderDecoder)


@pytest.mark.slow
def test_a_run_trains_on_what_the_converter_makes(own, seqio, tmp_path):
    trained = program("t5_1_1")
    step = trained.compile_step()
    arguments = {"lengths": LENGTHS, "batch_size": 16, "shuffle": False}
    converter = own.EveryOther(pack=False)
    data = CachedData("tiny_c", converter=converter, cache_dir=str(tmp_path), num_workers=0, **arguments)

    def losses(batches):
        state, found = trained.init(), []
        for batch in batches:
            state, metrics = step(state, trained.shard_batch(batch))
            found.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
        return found

    stream = data.train(slice(None))
    first = [next(stream), next(stream)]
    resumed = data.train(slice(None))
    resumed.restore(stream.state())
    examples = [  # the task ends with append_eos_after_trim
        {name: np.append(each[name][: LENGTHS[name] - 1], 1) for name in LENGTHS}
        for each in CachedSplit(tmp_path / "tiny_c", "train")
    ]
    rows = by_hand(converter, (examples * 3)[:48], LENGTHS)
    rows = {name: array.astype(np.float32 if "weights" in name else np.int32) for name, array in rows.items()}
    expected = losses({name: array[i : i + 16] for name, array in rows.items()} for i in (0, 16, 32))
    assert np.allclose(losses([*first, next(stream)]), expected, rtol=0, atol=1e-5)
    assert np.allclose(losses([*first, next(resumed)]), expected, rtol=0, atol=1e-5)
    (evaluation,) = data.eval_tasks()
    batch, real = next(evaluation.batches())
    assert real == 7 and batch["decoder_loss_weights"].max() == 0.5 and not batch["decoder_loss_weights"][7:].any()
    streamed = next(SeqioData("tiny_c", converter=converter, **arguments).train(slice(None)))
    assert streamed.keys() == batch.keys()
