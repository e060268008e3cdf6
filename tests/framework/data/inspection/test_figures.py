import html.parser
import re

import numpy as np
import pytest
import tokenizers
from data_in_memory import LENGTHS, TOKENS, VOCABULARY, encoded, memory
from tasks_in_memory import random_examples

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.encoder_only import MaskedLanguageModel
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.inspection.decoded_rows import decode_rows, visible
from meshway.framework.data.inspection.figures import Lengths, inspect
from meshway.framework.data.inspection.page import page, tables
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.passthrough import PassThrough
from meshway.framework.data.rows.examples import AppendEos, InMemory, Stepped
from meshway.framework.data.rows.mixing import Rates
from meshway.framework.data.rows.online_source import OnlineSource
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.vocabulary import HuggingFace
from meshway.framework.errors import UserError


class Plain:
    """A stream that tells no sources."""

    def __init__(self, stream):
        self.state, self.restore, self.spec = stream.state, stream.restore, stream.spec
        self.batches = stream

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)


def text(lane):
    return "".join(token.text for token in lane.tokens)


def test_figures_are_those_of_the_examples():
    examples = random_examples(200, longest=40)
    found = inspect(memory(EncoderDecoder(), {"a": examples}), batches=3)
    (source,) = found.sources
    sizes = examples.sizes
    assert (source.examples, source.items) == (200, 200)
    assert source.tokens == sizes["inputs"].sum() + sizes["targets"].sum()
    assert source.lost == np.maximum(sizes["inputs"] - 24, 0).sum() + np.maximum(sizes["targets"] - 12, 0).sum()
    for lengths in source.lengths:
        ordered = np.sort(sizes[lengths.feature])
        assert (lengths.quantile(0.5), lengths.quantile(0.95), lengths.largest) == (ordered[99], ordered[189], 40)
        assert lengths.mean == ordered.mean() and lengths.cut_at == LENGTHS[lengths.feature]


def test_what_a_step_before_the_objective_cuts_off_is_counted_too():
    sizes = [5, 24, 25, 60]
    whole = InMemory([{"inputs": np.arange(n), "targets": np.arange(3)} for n in sizes])
    step = AppendEos({"inputs": 1, "targets": 1}, {"inputs": 1, "targets": 1}, trims=True)
    found = inspect(memory(EncoderDecoder(), {"a": Stepped(whole, [step], LENGTHS)}), batches=1)
    assert found.sources[0].lengths[0].sizes.tolist() == [6, 25, 26, 61]
    assert found.sources[0].lost == 1 + 2 + 37


def test_a_histogram_holds_every_example_once():
    random = np.random.default_rng(0)
    for sizes in (np.array([0, 0, 3]), np.array([7]), random.lognormal(5, 1.5, 5000).astype(int)):
        counts, width = Lengths("targets", sizes, None).histogram()
        assert counts.sum() == len(sizes) and len(counts) == min(sizes.max() // width, 40) + 1
        bars = [int(((sizes >= bar * width) & (sizes < (bar + 1) * width)).sum()) for bar in range(len(counts) - 1)]
        assert counts[:-1].tolist() == bars


def test_drawn_batches_are_counted_by_source():
    data = memory(EncoderDecoder(), {"a": random_examples(300), "b": random_examples(90, longest=6, seed=1)})
    found = inspect(data, batches=7)
    stream = data.train(slice(0, 4))
    batches = [next(stream) for _ in range(7)]
    assert found.total.rows == 28 == sum(drawn.rows for drawn in found.drawn.values())
    for side in ("encoder", "decoder"):
        filled = sum(int((batch[f"{side}_segment_ids"] > 0).sum()) for batch in batches)
        assert found.total.filled[side] == (filled, 28 * batches[0][f"{side}_segment_ids"].shape[1])
        assert sum(drawn.filled[side][0] for drawn in found.drawn.values()) == filled
    assert found.total.loss["decoder"][0] == sum(batch["decoder_loss_weights"].sum() for batch in batches)
    for source in stream.sources:
        drawn = found.drawn[source.name]
        assert drawn.rows == stream.drawn(7)[source.name]
        rows, _ = source.take(np.arange(drawn.rows))
        segments = np.maximum(*(rows[f"{side}_segment_ids"].max(axis=1) for side in ("encoder", "decoder")))
        assert drawn.items == segments.sum()
        assert drawn.filled["encoder"][0] == (rows["encoder_segment_ids"] > 0).sum()


def test_shares_are_what_rates_ask_in_every_period():
    tasks = {"a": random_examples(500), "b": random_examples(400, longest=6, seed=1), "c": random_examples(90, seed=2)}
    changes = [Rates(50_000, {"a": 0.0, "c": 2.0})]
    rates = {"a": 3.0, "b": 1.0, "c": 0.0}
    first, second = inspect(memory(EncoderDecoder(), tasks, rates=rates, changes=changes), batches=2).periods
    assert (first.first, first.batches, second.first) == (0, 25_000, 50_000)
    for period, wanted in ((first, [0.75, 0.25, 0.0]), (second, [0.0, 1 / 3, 2 / 3])):
        assert [share.asked[0] for share in period.shares] == pytest.approx(wanted)
        assert sum(share.simulated[1] for share in period.shares) == 100_000
        for kind in (0, 1):
            whole = sum(share.simulated[kind] for share in period.shares)
            drawn = [share.simulated[kind] / whole for share in period.shares]
            assert drawn == pytest.approx([share.asked[kind] for share in period.shares], rel=0.01)
    short, _ = inspect(memory(EncoderDecoder(), tasks, rates=rates, changes=[Rates(30, {"a": 0.0})]), batches=2).periods
    assert short.batches == 30 and sum(share.simulated[1] for share in short.shares) == 120


def test_rows_are_the_first_of_each_source_and_read_as_their_text():
    inputs, targets = encoded("naïve 東京?", "b"), encoded("yes", "no")
    examples = [{"inputs": i, "targets": t} for i, t in zip(inputs, targets, strict=True)]
    for pack in (True, False):
        found = inspect(memory(EncoderDecoder(pack), {"a": examples, "b": examples[:1]}), batches=1, rows=2)
        assert [sample.source for sample in found.samples] == ["a", "b"]
        shown = [lane for row in found.samples[1].rows for lane in row.lanes]
        assert {lane.title for lane in shown} == {"encoder inputs", "decoder targets"}
        assert text(shown[0]).startswith("naïve 東京?</s>") and text(shown[1]).startswith("yes</s>")
        assert shown[0].filled == sum(len(token.ids) for token in shown[0].tokens) == 15
        assert [token.special for token in shown[0].tokens] == [False] * 9 + [True]
        assert not any(lane.is_mixed for lane in shown)


def test_each_objective_shows_what_carries_loss():
    long = [{"targets": encoded("the quick brown fox")[0]}]
    pairs = [{"inputs": encoded("in")[0], "targets": encoded("out")[0]}]

    def lanes(converter, examples, lengths):
        return inspect(memory(converter, {"a": examples}, lengths), batches=1, rows=1).samples[0].rows[0].lanes

    (lane,) = lanes(LanguageModel(pack=False), long, {"targets": 24})
    assert text(lane) == "the quick brown fox</s>" and not lane.is_mixed
    (lane,) = lanes(PrefixLanguageModel(pack=False), pairs, LENGTHS)
    assert [("".join(t.text for t in s), bool(s[0].weight)) for s in lane.stretches()] == [
        ("in", False), ("</s>", False), ("out", True), ("</s>", True)
    ]  # fmt: skip
    read, restored = lanes(MaskedLanguageModel(pack=False, mask_rate=0.4), long, {"targets": 24})
    assert text(restored) == "the quick brown fox</s>" and restored.is_mixed
    assert sum(token.special for token in read.tokens) > 1 and not read.is_mixed
    read, filled = lanes(SpanCorruption(pack=False), long, LENGTHS)
    assert "<extra_id_0>" in text(read) and text(filled).startswith("<extra_id_0>")


def test_user_features_are_numbers_and_pictures():
    shapes = {"image": (5, 6, 1), "label": (), "vector": (40,)}
    converter = PassThrough(shapes, {"image": "uint8", "label": "int32", "vector": "float32"})
    image = np.zeros((5, 6, 1), np.uint8)
    image[2, 3] = 200
    example = {"image": image, "label": np.uint8(7), "vector": np.arange(40, dtype=np.uint8)}
    found = inspect(memory(converter, {"digits": [example] * 3}, {}), batches=1, rows=1)
    values = {value.name: value for value in found.samples[0].rows[0].values}
    assert values["image"].is_picture and values["image"].picture()[2, 3].tolist() == [200, 200, 200]
    assert values["label"].text == "7" and not values["label"].is_picture
    assert values["vector"].text == "float32 [40]: 0 to 39, mean 19.5"
    assert found.sources[0].lengths == [] and found.total.filled == {}
    assert all(table.rows for table in tables(found))


def test_tokens_are_safe_to_print():
    assert visible("a\x1b[31m\n\tb\u202e\x9b") == "a<U+001B>[31m\n\tb<U+202E><U+009B>"
    batch = {
        "decoder_target_tokens": np.array([[5, 0, 300, 4, 9]], np.int32),
        "decoder_segment_ids": np.array([[1, 1, 0, 2, 2]], np.int32),
        "extra_tokens_of_mine": np.arange(20)[None],
    }
    (row,) = decode_rows(batch, {})
    assert [(t.text, t.segment) for t in row.lanes[0].tokens] == [("<5>", 1), ("<0>", 1), ("<4>", 2), ("<9>", 2)]
    assert [value.name for value in row.values] == ["extra_tokens_of_mine"]


def test_bytes_that_spell_nothing_stay_bytes():
    ids = [0xE6 + 3, 0x9D + 3, ord("a") + 3, 0xC3 + 3, 0xA4 + 3, 0xFF + 3]
    batch = {"encoder_input_tokens": np.array([ids])}
    (row,) = decode_rows(batch, {"inputs": VOCABULARY})
    assert [token.text for token in row.lanes[0].tokens] == ["<0xE6>", "<0x9D>", "a", "ä", "<0xFF>"]


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("source", ["ids", "text", "later", "streamed"])
def test_special_tokens_that_texts_spell_out_are_counted(source, literal):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<": 2}, unk_token="<"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["</s>", "<|eot|>", "<extra_id_0>"])
    made.add_tokens(["bbb"])
    vocabulary = HuggingFace(made.to_str().encode(), eos_id=3, sentinels=[5], literal=literal)
    info = FeatureInfo("int32", (None,), vocabulary.info)
    texts = ["ab", "a</s>b</s>", "<|eot|>a", "bbb<extra_id_0>", "</s>", ""] * 20
    examples = [{"targets": np.array([*vocabulary.encode(text), 3], np.int32)} for text in texts]
    if source == "text":
        examples = [each | {"targets_pretokenized": text.encode()} for each, text in zip(examples, texts)]
    objective = LanguageModel(pack=source != "later").bind(TaskInfo("a", {"targets": info}), {"targets": 16})
    if source == "later":
        rows = OnlineSource("a", InMemory(examples), lambda examples, seed: examples, objective, False, shuffle=False)
    else:
        rows = RowSource("a", InMemory(examples), objective, source == "text", shuffle=False)
    wrap = Plain if source == "streamed" else lambda stream: stream
    data = memory(LanguageModel(), {"a": rows}, {"targets": 16}, batch_size=24, wrap=wrap)
    data.vocabularies = lambda: {"targets": vocabulary}
    found = inspect(data, batches=5).facts
    if literal:
        assert "special tokens" not in found
        return
    sentinels = ", `<extra_id_0>` 20 times" if source == "text" else ""  # among ids preprocessors may have put it there
    count = 80 if sentinels else 60
    assert found["special tokens"] == (
        f"{count} of 120 examples hold special tokens written in their text (`</s>` 60 times, `<|eot|>` 20 times"
        f"{sentinels}); HuggingFaceVocabulary(literal=True) takes them as text"
    )
    assert "special tokens" not in inspect(memory(EncoderDecoder(), {"a": random_examples(9)}), batches=1).facts


def test_what_is_not_known_is_said():
    examples = random_examples(60)
    online = OnlineSource("later", examples, lambda examples, seed: examples, EncoderDecoder().bind(
        TaskInfo("later", {"inputs": TOKENS, "targets": TOKENS}), {"inputs": 24, "targets": 24}), True)  # fmt: skip
    found = inspect(memory(EncoderDecoder(), {"later": online}, {"inputs": 24, "targets": 24}), batches=2)
    assert found.sources[0].lost is None and found.sources[0].items is None
    assert "later after its cache run in TensorFlow" in found.missing[0]

    found = inspect(memory(EncoderDecoder(), {"a": examples}, wrap=Plain), batches=2, rows=6)
    assert not found.sources and not found.periods and "tells neither the sizes" in found.missing[0]
    assert found.total.rows == 8 and len(found.samples[0].rows) == 6
    assert page(found)


def test_an_inspection_draws_something():
    with pytest.raises(UserError, match="at least 1 batch, not 0"):
        inspect(memory(EncoderDecoder(), {"a": random_examples(9)}), batches=0)


class Checked(html.parser.HTMLParser):
    """Checks that every element is closed in its turn, and gathers what a page could load or run."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not {name for name, _ in attrs if name.startswith("on") or name in ("src", "href")}
        if tag not in ("meta",) and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.get_starttag_text().startswith(f"<{tag}") and self.get_starttag_text().endswith("/>"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_is_whole_and_escapes_all_text():
    evil = "<script>alert('1')</script>&amp;\x1b\"><img src=x>"
    pairs = [{"inputs": i, "targets": i} for i in encoded(evil, "plain\n\ttext")]
    data = memory(PrefixLanguageModel(), {evil: pairs, "b": pairs}, {"inputs": 60, "targets": 60})
    data.name = evil
    made = page(inspect(data, batches=2))
    checked = Checked()
    checked.feed(made)
    assert not checked.open
    assert checked.tags.isdisjoint({"script", "img", "link", "iframe"})
    assert "\x1b" not in made and not re.search(r"https?:", made)
    assert "<script>alert('1')</script>&amp;" in "".join(checked.words)
    assert made == page(inspect(data, batches=2))
