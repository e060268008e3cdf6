"""A job's order, its chunks, its resumption and what it does with records it cannot use; nothing is computed here."""

import json
from types import SimpleNamespace

import pytest

from meshway.framework.data.vocabularies import Bytes
from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.batches import Done
from meshway.framework.inference.bulk.inputs import Reader, Record, Share
from meshway.framework.inference.bulk.job import Job, JobProgress, Policy, of_shares, summary
from meshway.framework.inference.bulk.store import ChunkStore
from meshway.framework.inference.rows import RowFormat, Text, doubling

VOCABULARY = Bytes()
LIMITS = {"inputs": 20}


class Backwards:
    """Work that turns texts round, and remembers its batches."""

    def __init__(self, dies_at=None):
        self.buckets, self.batches, self._dies_at = doubling(LIMITS, 5), [], dies_at

    def start(self, examples, bucket):
        if len(self.batches) == self._dies_at:
            raise KeyboardInterrupt
        self.batches.append(([each.index for each in examples], bucket))
        return [VOCABULARY.decode(each.inputs)[::-1] for each in examples]

    def finish(self, examples, bucket, started):
        read = sum(each.sizes["inputs"] for each in examples)
        rows = [{"prediction": text, "score": float(len(text))} for text in started]
        return Done(rows, read, 1, 3 * self.buckets.shapes[bucket]["inputs"] - read)


def records(texts, first=0):
    return [
        Record(first + n, {"inputs": text, "n": first + n}, f"in.jsonl:{first + n + 1}", repr(text).encode())
        for n, text in enumerate(texts)
    ]


def unparsed(record):
    return Record(record.index, {}, record.place, record.raw)


def text():
    return Text(VOCABULARY, VOCABULARY, (0,), (1,), end=(1,))


def reader(**options):
    return Reader(text(), RowFormat(has_encoder=True), LIMITS, **options)


def run(folder, given, work=None, skip_bad=False, share=Share(), **options):
    """Runs a job of chunks of 4 and batches of 3; returns (rows, summary, its work), of a share that is not the last
    which chunks are missing instead."""
    work = work or Backwards()
    store = ChunkStore(folder / "out.jsonl", {"job": "this"}, share=share)
    store.open()
    try:
        progress = JobProgress(len(given), silent=True)
        source = SimpleNamespace(
            records=lambda wanted: [each if wanted(each.index) else unparsed(each) for each in given]
        )
        digests = Job(source, reader(**options), work, store, Policy(4, skip_bad, share=share), 3, progress).run()
        if missing := store.missing(digests):
            return missing
        counts = summary(store)
        store.finish(len(digests), counts | {"left_out": len(counts["left_out"])})
    finally:
        store.close()
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], counts, work


TEXTS = ["abc", "a much longer one", "de", "fgh", "ij", "klm", "another longer", "n", "op"]


def test_rows_come_in_the_order_of_the_input_and_batches_by_length(tmp_path):
    rows, counts, work = run(tmp_path, records(TEXTS))
    assert [(row["index"], row["inputs"], row["n"], row["prediction"]) for row in rows] == [
        (n, each, n, each[::-1]) for n, each in enumerate(TEXTS)
    ]
    assert work.batches == [([1], 2), ([0, 2, 3], 0), ([6], 2), ([4, 5, 7], 0), ([8], 0)]
    assert counts["examples"] == 9 and counts["read_tokens"] == sum(len(each) + 1 for each in TEXTS)
    padded = 3 * (20 + 5 + 20 + 5 + 5) - counts["read_tokens"]
    assert counts["padding"] == round(padded / (padded + counts["read_tokens"]), 4)


def test_a_job_that_died_goes_on_with_the_chunk_it_was_at(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, records(TEXTS), Backwards(dies_at=3))
    rows, counts, work = run(tmp_path, records(TEXTS))
    assert [indices for indices, _ in work.batches] == [[6], [4, 5, 7], [8]]
    assert [row["index"] for row in rows] == list(range(9)) and counts["examples"] == 9


def test_an_input_that_has_changed_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, records(TEXTS), Backwards(dies_at=3))
    with pytest.raises(UserError, match=r"chunk 0 \(in.jsonl:1 to in.jsonl:4\) is not what it was"):
        run(tmp_path, records(["changed", *TEXTS[1:]]))


def test_shares_are_disjoint_and_together_the_whole(tmp_path):
    """One dies, sees another input, and goes on."""
    (tmp_path / "alone").mkdir()
    rows, counts, _ = run(tmp_path / "alone", records(TEXTS))
    works = [Backwards(), Backwards(dies_at=1), Backwards(), Backwards()]
    assert run(tmp_path, records(TEXTS), works[0], share=Share(0, 2)) == [1]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, records(TEXTS), works[1], share=Share(1, 2))
    with pytest.raises(UserError, match="chunk 2 .* is not what it was when it was computed: the input has changed"):
        run(tmp_path, records([*TEXTS[:8], "other"]), works[2], share=Share(1, 2))
    found, together, _ = run(tmp_path, records(TEXTS), works[3], share=Share(1, 2))
    computed = [[indices for indices, _ in work.batches] for work in works]
    assert computed == [[[1], [0, 2, 3], [8]], [[6]], [[6], [4, 5, 7]], []]  # only whole chunks are kept
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone" / "out.jsonl").read_bytes() and found == rows
    of_time = ("seconds", "examples_per_second", "tokens_per_second")
    assert {**counts, **dict.fromkeys(of_time)} == {**together, **dict.fromkeys(of_time)}
    assert of_shares(Share(0, 9), 3, [1]).startswith(
        "shard 0 of 9 is done (3 chunks are too few for all: give a smaller"
    )
    assert [Policy(4, share=Share(place, 2)).records_of_share(9) for place in (0, 1)] == [5, 4]


def bad():
    given = records(TEXTS)
    given[2] = Record(2, {}, "in.jsonl:3", b"{", "not JSON")
    given[5] = Record(5, {"imputs": "x"}, "in.jsonl:6", b"x")
    given[6] = Record(6, {"inputs": "x" * 20}, "in.jsonl:7", b"y")
    given[7] = Record(7, {"inputs": 5}, "in.jsonl:8", b"z")
    return given


def test_the_first_bad_record_stops_a_job_by_name(tmp_path):
    with pytest.raises(UserError, match=r"in.jsonl:3: not JSON\nMend the input.*--on_bad=skip"):
        run(tmp_path, bad())
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_records_are_left_out_and_reported(tmp_path):
    rows, counts, _ = run(tmp_path, bad(), skip_bad=True)
    assert [row["index"] for row in rows] == [0, 1, 3, 4, 8]
    assert counts["skipped"] == 4 and counts["left_out"] == [
        "in.jsonl:3: not JSON",
        "in.jsonl:6: there is no field 'inputs', only ['imputs']; did you mean 'imputs'?",
        "in.jsonl:7: 21 tokens of inputs, and there is room for 20",
        "in.jsonl:8: field 'inputs': neither text nor a list of token ids, but int",
    ]


def test_long_inputs_are_cut_where_that_is_asked_for():
    long = Record(0, {"inputs": "x" * 30}, "a:1", b"")
    (example,), problems = reader(truncate=True).read([long])
    assert not problems and example.inputs == [*VOCABULARY.encode("x" * 19), 1]  # its EOS stays
    assert example.truncated
    decoder_only = Reader(
        Text(VOCABULARY, VOCABULARY, (0,), (1,)),
        RowFormat(has_encoder=False),
        {"inputs": 6, "targets": 9},
        truncate=True,
    )
    (example,), problems = decoder_only.read([Record(0, {"inputs": "abcdefgh"}, "a:1", b"")])
    assert VOCABULARY.decode(example.inputs) == "defgh" and example.sizes == {"inputs": 6}  # the end, behind the start


def test_what_is_cut_is_counted(tmp_path):
    _, counts, _ = run(tmp_path, records(["x" * 30, "y", "z" * 20]), truncate=True)
    assert (counts["truncated"], counts["examples"]) == (2, 3)


def test_targets_are_read_for_scores_and_inputs_need_not_be():
    rows = Reader(text(), RowFormat(has_encoder=False), {"targets": 12}, scores=True)
    examples, problems = rows.read([Record(0, {"targets": "abc"}, "a:1", b""), Record(1, {"inputs": "x"}, "a:2", b"")])
    assert examples[0].inputs == [] and examples[0].targets == VOCABULARY.encode("abc")
    assert problems == ["a:2: there is no field 'targets', only ['inputs']"]


def test_a_preprocessor_that_fails_is_the_fault_of_its_record():
    def doubled(values):
        if any("bad" in each["inputs"] for each in values):
            raise ValueError("cannot do this")
        return [{"inputs": each["inputs"] * 2} for each in values]

    examples, problems = reader(preprocess=doubled).read(records(["a", "bad", "c"]))
    assert [VOCABULARY.decode(each.inputs) for each in examples] == ["aa", "cc"]
    assert problems == ["in.jsonl:2: cannot do this"] and examples[1].values == {"inputs": "c", "n": 2}
