"""Inputs of infer: each format holds what was written, from any start, and every mistake is told with its place."""

import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk import lines as line_files
from meshway.framework.inference.bulk import sources
from meshway.framework.inference.bulk.sources import TaskSource, open_source

ROWS = [{"inputs": f"question {i} — é", "id": i, "scores": [i / 2] * (i % 3)} for i in range(23)]


def read(path, start=0, **options):
    return list(open_source(str(path), **options).records(start))


def write_lines(path: Path, lines: list[str], end: str = "\n") -> Path:
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def as_tsv(rows):
    return ["inputs\tid", *(f"{row['inputs']}\t{row['id']}" for row in rows)]


def write(folder: Path, kind: str, rows=ROWS, name: str = "in") -> tuple[Path, list[dict]]:
    """Writes rows as a kind of file; returns it with what it should hold."""
    path = folder / f"{name}.{kind}"
    if kind.startswith("jsonl"):
        return write_lines(path, [json.dumps(row) for row in rows]), rows
    if kind.startswith("tsv"):
        return write_lines(path, as_tsv(rows), "\r\n"), [{"inputs": r["inputs"], "id": str(r["id"])} for r in rows]
    if kind.startswith("txt"):
        return write_lines(path, [row["inputs"] for row in rows]), [{"inputs": r["inputs"]} for r in rows]
    if kind.startswith("tfrecord"):
        return write_tfrecord(path, rows), [row | {"scores": _single(row["scores"])} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5 if len(rows) < 100 else 2000)
    return path, rows


def _single(values):
    return values[0] if len(values) == 1 else values


def write_tfrecord(path: Path, rows) -> Path:
    """Writes tf.train.Examples by TensorFlow itself."""
    tf = pytest.importorskip("tensorflow")

    def feature(value):
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0] if values else 0.5, float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        values = [each.encode() if isinstance(each, str) else each for each in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    with tf.io.TFRecordWriter(str(path), "GZIP" if path.suffix == ".gz" else "") as writer:
        for row in rows:
            features = tf.train.Features(feature={name: feature(value) for name, value in row.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path


KINDS = ["jsonl", "jsonl.gz", "tsv", "tsv.gz", "txt", "txt.gz", "parquet"]
KINDS += [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tfrecord", "tfrecord.gz")]  # TensorFlow writes


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_its_rows_from_any_start(tmp_path, kind):
    path, expected = write(tmp_path, kind)
    records = read(path)
    assert [record.values for record in records] == expected
    assert [record.index for record in records] == list(range(23))
    assert not any(record.problem for record in records)
    assert len({record.raw for record in records}) == 23
    for start in range(25):
        assert read(path, start) == records[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_glob_is_its_files_by_name(tmp_path, kind):
    expected = []
    for name, rows in (("b", ROWS[10:]), ("a", ROWS[:10])):
        expected = write(tmp_path, kind, rows, name)[1] + expected
    pattern = tmp_path / f"*.{kind}"
    records = read(pattern)
    assert [record.values for record in records] == expected
    assert [record.index for record in records] == list(range(23))
    for start in (3, 9, 10, 11, 22):
        assert read(pattern, start) == records[start:]
    assert "2 files" in open_source(str(pattern)).description


def test_an_empty_file_among_others_has_no_records(tmp_path):
    for kind in ("jsonl", "tsv", "txt"):
        write(tmp_path, kind, ROWS[:2], "a")
        (tmp_path / f"b.{kind}").write_bytes(b"")
        assert len(read(tmp_path / f"*.{kind}")) == 2


def test_places_are_those_of_an_editor(tmp_path):
    assert read(write(tmp_path, "jsonl")[0])[16].place == f"{tmp_path}/in.jsonl:17"
    assert read(write(tmp_path, "tsv")[0])[16].place == f"{tmp_path}/in.tsv:18"  # the header is line 1
    assert read(write(tmp_path, "parquet")[0], 16)[0].place == f"{tmp_path}/in.parquet row 17"
    write(tmp_path, "parquet", ROWS[:4], "in2")
    assert read(tmp_path / "*.parquet", 24)[0].place == f"{tmp_path}/in2.parquet row 2"


def test_standard_input_is_read_once(monkeypatch):
    content = b'{"inputs": "a"}\n"b"\n{"inputs": "c"}'
    stdin(monkeypatch, content)
    source = open_source("-")
    records = list(source.records(1))
    assert [(r.index, r.values, r.place, r.raw) for r in records] == [
        (1, {"inputs": "b"}, "<stdin>:2", b'"b"'),
        (2, {"inputs": "c"}, "<stdin>:3", b'{"inputs": "c"}'),
    ]
    with pytest.raises(UserError, match="only once"):
        next(source.records())
    stdin(monkeypatch, b"x\ty\r\n1\t2\r\n")
    assert [r.values for r in open_source("-", "tsv").records()] == [{"x": "1", "y": "2"}]
    stdin(monkeypatch, b"")
    with pytest.raises(UserError, match="the input is empty: standard input"):
        list(open_source("-", "text").records())
    with pytest.raises(UserError, match="Parquet cannot be read from standard input"):
        open_source("-", "parquet")


def test_a_pipe_is_read(tmp_path):
    read_end, write_end = os.pipe()
    os.write(write_end, b'{"inputs": "a"}\n')
    os.close(write_end)
    try:
        assert [r.values for r in read(f"/dev/fd/{read_end}", format="jsonl")] == [{"inputs": "a"}]
    finally:
        os.close(read_end)


def test_bad_json_lines_are_problems_of_their_lines(tmp_path):
    lines = {
        b'{"inputs": "ok"}': "",
        b'{"a": 1, "b" 2}': "not JSON: Expecting ':' delimiter at column 14",
        b"[1, 2]": "a list, not an object",
        b"17": "a number, not an object",
        b"true": "a boolean, not an object",
        b"null": "null, not an object",
        b'{"x": NaN}': "not JSON: NaN is not a JSON value",
        b'{"x": ' + b"9" * 5000 + b"}": "not JSON: Exceeds the limit",
        b"[" * 200_000: "nested too deeply",
        b'{"inputs": "a", "id": 1, "inputs": "b"}': "the field 'inputs' stands in it twice",
        b'{"inputs": "a", "more": {"x": 1, "x": 1}}': "the field 'x' stands in it twice",
        b'{"inputs": "\xff"}': "not UTF-8: byte 0xff at byte 13 of the line",
        b"": "an empty line, not an object",
        b" ": "an empty line, not an object",
        b'"last"': "",
    }
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n\n \r\n")  # what is blank at the end is no record
    records = read(path)
    assert len(records) == len(lines)
    for record, (line, problem) in zip(records, lines.items(), strict=True):
        assert problem in record.problem and bool(problem) == bool(record.problem), line[:50]
        assert record.raw == line
        assert bool(record.values) != bool(record.problem)
    assert records[-1].values == {"inputs": "last"}
    assert [record.index for record in records] == list(range(len(lines)))
    assert read(path, 11) == records[11:]


def test_bad_tsv_lines_are_problems_of_their_lines(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_bytes(b'a\tb\n1\t"2\n1\n1\t2\t3\n\n\t\n\xfe\t1\n\n\n')
    records = read(path)
    assert [(r.place.rsplit(":")[-1], r.values, r.problem) for r in records] == [
        ("2", {"a": "1", "b": '"2'}, ""),
        ("3", {}, "1 cell, not 2 (a, b)"),
        ("4", {}, "3 cells, not 2 (a, b)"),
        ("5", {}, "an empty line, not 2 cells"),
        ("6", {"a": "", "b": ""}, ""),
        ("7", {}, "not UTF-8: byte 0xfe at byte 1 of the line"),
    ]


def test_columns_stand_for_a_header_that_is_not_there(tmp_path):
    path = write_lines(tmp_path / "in.tsv", ["1\t2", "3\t4"])
    assert [r.values for r in read(path, columns=["a", "b"])] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    # The digest tells apart the same line under other names.
    assert read(path, columns=["a", "b"])[1].raw != read(path, columns=["b", "a"])[1].raw
    assert read(path)[0].raw == b"1\t2\n3\t4"


def test_columns_of_parquet_are_chosen(tmp_path):
    path, _ = write(tmp_path, "parquet")
    assert [r.values for r in read(path, columns=["id"])] == [{"id": i} for i in range(23)]
    with pytest.raises(UserError, match="has no column 'input'; did you mean 'inputs'"):
        open_source(str(path), columns=["input"])


def test_text_keeps_every_line(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\n \xff\n\rlast\x0b\n\n")
    records = read(path)
    assert [record.values.get("inputs") for record in records] == ["first", "", None, "\rlast\x0b", ""]
    assert records[2].problem == "not UTF-8: byte 0xff at byte 2 of the line"


@pytest.mark.parametrize("kind", ["jsonl", "tsv"])
def test_byte_order_mark_is_dropped_from_the_start_of_each_file(tmp_path, kind):
    for name in "ab":
        path, expected = write(tmp_path, kind, ROWS[:2], name)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.values for record in read(tmp_path / f"*.{kind}")] == expected * 2


def test_bad_text_of_parquet_is_the_problem_of_its_row(tmp_path):
    good, bad = "é".encode(), b"\xff"
    binary = pyarrow.array([good, bad, good], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"inputs": text}), tmp_path / "in.parquet")
    records = read(tmp_path / "in.parquet")
    assert [record.values for record in records] == [{"inputs": "é"}, {}, {"inputs": "é"}]
    assert "a value that Python cannot hold: 'utf-8' codec can't decode byte 0xff" in records[1].problem


def damaged_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"".join(b'"%d"\n' % (i * 7919) for i in range(50_000)))[:-2000])


# TFRecord files of one tf.train.Example each, as TensorFlow 2.21 writes them.
EXAMPLES = [
    {"ids": [-1, 2**63 - 1, -(2**63), 300], "one": [5], "floats": [0.1, -2.5e-20], "none": [], "": "é", "raw": b"\xff"},
    {"inputs": "a" * 20},
    {"inputs": ["a", "b"]},
]
TFRECORDS = [
    "7a00000000000000138986780a780a0c0a036f6e6512051a030a01050a0a0a0012060a040a02c3a90a0c0a0372617712050a030a01ff0a0a0a04"
    "6e6f6e65120212000a160a06666c6f617473120c120a0a08cdcccc3d4a1eec9e0a2a0a0369647312231a210a1fffffffffffffffffff01ffffff"
    "ffffffffff7f80808080808080808001ac02f67f35b8",
    "2600000000000000734fe3000a240a220a06696e7075747312180a160a146161616161616161616161616161616161616161a7b70564",
    "16000000000000004f61be280a140a120a06696e7075747312080a060a01610a0162992d8170",
]


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "txt", "tfrecord"])
def test_records_that_are_not_wanted_are_not_parsed_and_have_their_bytes(tmp_path, kind, monkeypatch):
    if kind == "tfrecord":
        (path := tmp_path / "x.tfrecord").write_bytes(b"".join(map(bytes.fromhex, TFRECORDS)))
    else:
        path, _ = write(tmp_path, kind, ROWS[:3])
    whole, parsed = read(path), []
    monkeypatch.setattr(
        line_files, "_parsed", lambda line, parse, real=line_files._parsed: parsed.append(line) or real(line, parse)
    )
    monkeypatch.setattr(sources, "_example", lambda *given, real=sources._example: parsed.append(given) or real(*given))
    some = list(open_source(str(path)).records(wanted=lambda index: index == 1))
    assert len(parsed) == 1 and some[1] == whole[1]
    assert [(each.index, each.raw, each.place) for each in some] == [(x.index, x.raw, x.place) for x in whole]
    assert [each.values for each in some[::2]] == [{}, {}] and not any(each.problem for each in some)


def test_tfexamples_hold_what_tensorflow_wrote(tmp_path):
    """A damaged record is its own problem; one whose length is damaged, that of the input."""
    first, second, third = map(bytes.fromhex, TFRECORDS)
    path = tmp_path / "x.tfrecord-00000-of-00002"
    path.write_bytes(first + second)
    (tmp_path / "x.tfrecord-00001-of-00002").write_bytes(gzip.compress(third))
    records = read(tmp_path / "x.tfrecord*")
    assert [each.values for each in records] == [EXAMPLES[0] | {"one": 5}, *EXAMPLES[1:]]
    assert records[0].ids == {"ids": EXAMPLES[0]["ids"], "one": [5]} and records[1].place == f"{path} record 2"
    assert list(records[0].values) == sorted(EXAMPLES[0])
    path.write_bytes(frame(b"\x0a\x05no") + first)
    assert [each.problem.partition(":")[0] for each in read(path)] == ["not a tf.train.Example", ""]
    path.write_bytes(first + second.replace(b"aaa", b"baa"))
    assert [each.problem for each in read(path)] == ["", "it is damaged: its checksum is another one"]
    for content, message in (
        (first + second[:-5], "is cut off: record 2 has 37 of 42 bytes"),
        (first + second[:7], "is damaged at record 2: no length"),
        (b"{}" * 9, "is not a TFRecord file"),
        (b"", "the input is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(path)


def frame(content):
    length = len(content).to_bytes(8, "little")
    checksums = [sources._masked_crc32c(each).to_bytes(4, "little") for each in (length, content)]
    return length + checksums[0] + content + checksums[1]


@pytest.mark.slow
def test_the_sample_of_tfexamples_is_tensorflows(tmp_path):
    tf = pytest.importorskip("tensorflow")
    for row, content in zip(EXAMPLES, TFRECORDS):
        written = [write_tfrecord(tmp_path / "a", [row]), tmp_path / "b"]
        written[1].write_bytes(bytes.fromhex(content))
        found = [[each.numpy() for each in tf.data.TFRecordDataset(str(path))] for path in written]
        assert tf.train.Example.FromString(found[0][0]) == tf.train.Example.FromString(found[1][0])


MISTAKES = {
    "question.jsonl": (None, {}, "no input file '.*'; did you mean 'questions.jsonl'"),
    "nowhere/a.jsonl": (None, {}, "there is no folder"),
    "*.nothing": (None, {}, "matches no file"),
    "": (None, {}, r"is a folder; name its files, such as '.*\*.jsonl'"),
    "data.xyz": (
        b"x\n",
        {},
        "its suffix '.xyz' is of no known format; give one .--format.: jsonl, tsv, parquet, text, tfr",
    ),
    "data": (b"x\n", {}, "a name without suffix has no known format"),
    "format.txt": (b"x\n", {"format": "json"}, "no input format 'json'; did you mean 'jsonl'"),
    "empty.txt": (b"", {}, "the input is empty: .*empty.txt"),
    "blank.jsonl": (b"\n\n \n", {}, "the input is empty"),
    "header.tsv": (b"a\tb\n", {}, "the input is empty"),
    "noname.tsv": (b"a\t\tb\n1\t2\t3\n", {}, "noname.tsv:1: column 2 has no name"),
    "noheader.tsv": (b"\n1\t2\t3\n", {}, "noheader.tsv:1: column 1 has no name"),
    "twice.tsv": (b"a\tb\ta\n1\t2\t3\n", {}, "column 3 is named 'a', as one before it"),
    "latin.tsv": (b"a\t\xe9\n1\t2\n", {}, "latin.tsv:1: the header is not UTF-8"),
    "columns.txt": (b"x\n", {"columns": ["a"]}, "text has none"),
    "table.jsonl": (b"PAR1\x15\x00", {}, "is a Parquet file, not one of lines"),
    "gzip.jsonl": (gzip.compress(b"x"), {}, "compressed by gzip: its name must end in .gz"),
    "plain.jsonl.gz": (b"{}\n", {}, "cannot read .*plain.jsonl.gz: Not a gzipped file"),
    "damaged.jsonl.gz": (damaged_gzip, {}, r"damaged.jsonl.gz, after line \d+: Compressed file ended before"),
    "wide.jsonl": ('{"inputs": 1}'.encode("utf-16"), {}, "is UTF-16: convert it to UTF-8"),
    "document.json": (b'[\n  {"a": 1}\n]\n', {}, "one JSON value over several lines"),
    "text.parquet": (b"hello\n" * 9, {}, "cannot read .*text.parquet as Parquet: .*magic bytes"),
    "packed.parquet.gz": (gzip.compress(b"x"), {}, "Parquet is not read from .gz files"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(tmp_path, name):
    content, options, message = MISTAKES[name]
    (tmp_path / "questions.jsonl").write_bytes(b"{}\n")
    if callable(content):
        content(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, **options)


def test_mistakes_between_files_are_told_before_any_is_read(tmp_path):
    for number, lines in enumerate((["a\tb", "1\t2"], ["1\t3", "1\t4"])):
        write_lines(tmp_path / f"{number}.tsv", lines)
    with pytest.raises(UserError, match=r"1.tsv:1: the header \(1, 3\) is not that of .*0.tsv \(a, b\)"):
        open_source(str(tmp_path / "*.tsv"))
    write(tmp_path, "jsonl")
    with pytest.raises(UserError, match="0.tsv is tsv, .*in.jsonl is jsonl"):
        open_source(str(tmp_path / "*"))
    for number, column in enumerate("ab"):
        pyarrow.parquet.write_table(pyarrow.table({column: [1]}), tmp_path / f"{number}.parquet")
    with pytest.raises(UserError, match="1.parquet has the columns b; .*0.parquet has a"):
        open_source(str(tmp_path / "*.parquet"))


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    path, _ = write(tmp_path, "jsonl")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("meshway.framework.inference.bulk.lines.open", refuse, raising=False)
    with pytest.raises(UserError, match="cannot read .*in.jsonl: Permission denied"):
        open_source(str(path))


def test_a_line_without_end_is_refused_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("meshway.framework.inference.bulk.lines._LONGEST", 1 << 20)
    (tmp_path / "in.txt").write_bytes(b"short\n" + b"x" * (1 << 21))
    with pytest.raises(UserError, match="in.txt:2 is longer than 1 MiB"):
        read(tmp_path / "in.txt")


@pytest.mark.parametrize("kind", ["jsonl.gz", "tsv", "parquet"])
def test_reading_holds_little_of_a_large_file(tmp_path, kind):
    path, _ = write(tmp_path, kind, [{"inputs": "x" * 1000, "id": i} for i in range(8000)])
    tracemalloc.start()
    try:
        assert sum(len(record.values["inputs"]) for record in open_source(str(path)).records()) == 8_000_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_empty_parquet_file_is_told(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="the input is empty: .*in.parquet"):
        read(tmp_path / "in.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path, _ = write(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"meshway\[parquet\]"):
        open_source(str(path))


def test_records_are_counted_beforehand_where_that_is_quick(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    (tmp_path / "a.tsv").write_text("inputs\ttargets\nx\ty\nz\tw\n")
    (tmp_path / "a.jsonl").write_text('{"inputs": "x"}\n' * 7)
    for name, count in (("a.txt", 3), ("a.tsv", 2), ("a.jsonl", 7)):
        source = open_source(str(tmp_path / name))
        assert source.total == count == len(list(source.records()))
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(b"one\n")
    assert open_source(str(tmp_path / "b.txt.gz")).total is None and open_source("-").total is None
    pyarrow.parquet.write_table(pyarrow.table({"inputs": ["a", "b"]}), tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet")).total == 2


class Task:
    """A task of two examples, of which the second lacks a feature."""

    name, num_examples = "t", 2
    examples = [
        {
            "inputs": np.array([7, 1]),
            "targets": np.array([8]),
            "inputs_pretokenized": "é".encode(),
            "id": np.array([b"a", b"\xff"], object),
            "weight": np.float32(0.1),
            "scores": np.array([0.1, 2], np.float32),
        },
        {"inputs": np.array([9]), "targets": np.array([1]), "inputs_pretokenized": b"b", "weight": np.float32(3)},
    ]

    def read(self, indices):
        return [self.examples[index] for index in indices]

    def text(self, feature, index):
        return f"{feature} {index}"


def test_features_of_a_tasks_examples_are_kept():
    def kept(fields):
        records = list(TaskSource([Task()], "train", ["inputs"], fields).records())
        ours = {"task", "example", "inputs", "targets"}
        assert [record.values["inputs"] for record in records] == ["inputs 0", "inputs 1"]
        return [{name: value for name, value in each.values.items() if name not in ours} for each in records]

    assert kept(None) == [{"inputs_pretokenized": "é"}, {"inputs_pretokenized": "b"}]
    assert kept([]) == [{}, {}]
    assert kept(["id", "weight", "inputs"]) == [
        {"id": ["a", b"\xff"], "weight": 0.1, "inputs_tokens": [7, 1]},
        {"weight": 3.0, "inputs_tokens": [9]},
    ]
    every = kept(["all"])[0]
    assert every["scores"] == [0.1, 2.0] and every["targets_tokens"] == [8] and len(every) == 6
    with pytest.raises(UserError, match="no task has a feature 'ids' to keep; did you mean 'id'.; there are id, inp"):
        kept(["ids"])
