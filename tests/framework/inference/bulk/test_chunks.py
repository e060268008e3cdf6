"""Chunks of results: what is committed is read back, what is finished is whole, what is not ours stays."""

import contextlib
import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.inference.bulk.batches import OwnFormat
from meshway.framework.inference.bulk.inputs import Share
from meshway.framework.inference.bulk.store import ChunkStore, Committed

JOB = {"recipe": "abc", "step": "100"}
OTHER = {"recipe": "abc", "step": "200", "mode": "score"}
OUTPUTS = ["out.jsonl", "out.json", "out.parquet", "out.txt", "folder"]


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def rows(number: int, count: int = 3) -> list[dict]:
    first = number * 3
    return [
        {"index": i, "inputs": f"q {i} é", "prediction": f"a\n{i}", "scores": [i / 2, 0.5]}
        for i in range(first, first + count)
    ]


def store(path, job=JOB, **options) -> ChunkStore:
    result = ChunkStore(path, job, **options)
    result.open()
    return result


def commit(chunks: ChunkStore, numbers, make=rows) -> None:
    for number in numbers:
        chunks.commit(
            number, make(number), f"digest {number}", {"tokens": 10 * number, "seconds": 0.5}, [f"in:{number}: bad"]
        )


def job_of(path, numbers=range(4), job=JOB, make=rows, **options) -> Path:
    """Runs a whole job."""
    with contextlib.closing(store(path, job, **options)) as chunks:
        commit(chunks, numbers, make)
        return chunks.finish(len(chunks.committed()), {"checkpoint": "somewhere"})


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_chunks_become_one_file_in_order(tmp_path, name):
    output = tmp_path / name
    assert job_of(output, [2, 0, 3, 1]) == output
    assert lines(output) == [row for number in range(4) for row in rows(number)]
    assert output.read_text(encoding="utf-8").startswith(
        '{"index":0,"inputs":"q 0 é","prediction":"a\\n0","scores":[0.0,0.5]}\n'
    )
    assert json.loads((tmp_path / f"{name}.summary.json").read_text()) == {
        "written_by": "meshway infer",
        "job": JOB,
        "files": [{"name": name, "bytes": output.stat().st_size}],
        "num_chunks": 4,
        "num_rows": 12,
        "left_out": [f"in:{number}: bad" for number in range(4)],
        "checkpoint": "somewhere",
    }
    assert sorted(tree(tmp_path)) == [name, f"{name}.summary.json"]


def test_chunks_become_a_parquet_file_of_a_row_group_each(tmp_path):
    job_of(tmp_path / "out.parquet", [2, 0, 3, 1])
    with pyarrow.parquet.ParquetFile(tmp_path / "out.parquet") as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3] * 4
        assert file.read().to_pylist() == [row for number in range(4) for row in rows(number)]


@pytest.mark.parametrize("format", [None, "jsonl", "parquet"])
def test_chunks_become_shards(tmp_path, format):
    output = job_of(tmp_path / "folder", [2, 0, 1], format=format)
    suffix = format or "jsonl"
    names = [f"part-{number:05d}-of-00003.{suffix}" for number in range(3)]
    assert sorted(tree(output)) == ["_summary.json", *names]
    for number, name in enumerate(names):
        path = output / name
        found = pyarrow.parquet.read_table(path).to_pylist() if format == "parquet" else lines(path)
        assert found == rows(number)
    assert [file["name"] for file in json.loads((output / "_summary.json").read_text())["files"]] == names


def test_text_is_a_prediction_a_line(tmp_path):
    predictions = ["a", "two\nlines\r\n", "back\\nslash", "", None, "é\u2028"]
    job_of(tmp_path / "out.txt", [0], make=lambda _: [{"prediction": text} for text in predictions])
    content = (tmp_path / "out.txt").read_bytes().decode()
    assert content == "a\ntwo\\nlines\\r\\n\nback\\\\nslash\n\n\né\u2028\n"
    for row, message in (({"score": 1.0}, r"have none \(score\)"), ({"prediction": ["a", "b"]}, "have list")):
        with pytest.raises(UserError, match=f"a .txt output holds .*{message}: use .jsonl"):
            job_of(tmp_path / "other.txt", [0], make=lambda _, row=row: [row])
    assert sorted(tree(tmp_path)) == ["out.txt", "out.txt.summary.json"]  # the failed job has left nothing


class Table:
    """A writer of one's own: a header, once where chunks become a file."""

    suffix = ".csv"

    def __init__(self, name="prediction"):
        self.name = name

    def encode(self, rows, name):
        return "\n".join([self.name, *(repr(row[self.name]) for row in rows), ""])

    def merge(self, paths, file):
        lines = [path.read_text().splitlines()[1:] for path in paths]
        file.write("\n".join([self.name, *(line for each in lines for line in each), ""]).encode())


def test_a_writer_of_ones_own_is_committed_merged_and_resumed(tmp_path):
    output = tmp_path / "out.csv"
    with contextlib.closing(store(output, writer=OwnFormat(Table()))) as chunks:
        commit(chunks, (1,))
    assert (tmp_path / "out.csv.parts/chunk-000001.csv").read_text() == "prediction\n'a\\n3'\n'a\\n4'\n'a\\n5'\n"
    with contextlib.closing(store(output, writer=OwnFormat(Table()))) as chunks:
        assert list(chunks.committed()) == [1]
        commit(chunks, (0,))
        chunks.finish(2, {})
    assert output.read_text().splitlines() == ["prediction", *(repr(f"a\n{n}") for n in range(6))]
    job_of(tmp_path / "folder", range(2), writer=OwnFormat(Table("index")))
    shards = [path.read_text() for path in sorted((tmp_path / "folder").glob("part-*.csv"))]
    assert shards == ["index\n0\n1\n2\n", "index\n3\n4\n5\n"]
    descriptions = [OwnFormat(Table(name)).description for name in ("a", "b")]
    assert descriptions[0] == f"{__name__}.Table(name='a')" != descriptions[1]  # part of what a job is


def test_what_is_wrong_with_a_writer_is_told(tmp_path):
    for writer, message in (
        (object(), r"writer object: it needs an attribute suffix, such as '.csv', and a method encode\(rows, name\)"),
        (SimpleNamespace(suffix="csv", encode=len), "its suffix 'csv' cannot be one, as '.csv' is"),
        (SimpleNamespace(suffix=".json", encode=len), ".json is taken by files beside those of chunks, .jsonl is not"),
        (Table("text"), "chunk 0: encode of writer Table raised KeyError: 'text'"),
        (
            SimpleNamespace(suffix=".csv", encode=lambda rows, name: rows),
            "encode of SimpleNamespace returned list, not",
        ),
    ):
        with pytest.raises(UserError, match=message):
            job_of(tmp_path / "out.csv", writer=OwnFormat(writer))
        assert not tree(tmp_path)
    for name, options, message in (
        ("out.jsonl", {}, "out.jsonl: the writer writes .csv: end it in that, or name a folder"),
        ("out", {"format": "parquet"}, "where a writer has its own .*: leave out 'parquet'"),
    ):
        with pytest.raises(UserError, match=message):
            store(tmp_path / name, writer=OwnFormat(Table()), **options)


def test_json_is_strict_and_numpy_is_plain(tmp_path):
    row = {
        "z": np.float32(0.5),
        "a": np.int64(7),
        "scores": np.array([[0.25, np.nan], [np.inf, 1.0]], np.float32),
        "nan": math.nan,
        "aux": {"b": np.array(3), "flag": np.bool_(True)},
        "text": "half \ud800",
        "none": None,
    }
    job_of(tmp_path / "out.jsonl", [0], make=lambda _: [row])
    assert (tmp_path / "out.jsonl").read_text() == (
        '{"z":0.5,"a":7,"scores":[[0.25,null],[null,1.0]],"nan":null,"aux":{"b":3,"flag":true},'
        '"text":"half \\ud800","none":null}\n'
    )
    job_of(tmp_path / "out.parquet", [0], make=lambda _: [row])
    (found,) = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert math.isnan(found.pop("nan")) and found.pop("text") == "half \\ud800"
    assert found["scores"][1] == [math.inf, 1.0] and found["aux"] == {"b": 3, "flag": True}
    with pytest.raises(TypeError, match="cannot hold a object"):
        job_of(tmp_path / "other.jsonl", [0], make=lambda _: [{"a": object()}])


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_job_goes_on_where_it_was_left(tmp_path, name):
    whole = tmp_path / "whole"
    parted = tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    job_of(whole / name)
    for numbers in ([0], [2, 1], []):
        with contextlib.closing(store(parted / name)) as chunks:
            assert not chunks.finished
            commit(chunks, numbers)
    with contextlib.closing(store(parted / name)) as chunks:
        assert chunks.committed() == {
            number: Committed(f"digest {number}", 3, {"tokens": 10 * number, "seconds": 0.5}, [f"in:{number}: bad"])
            for number in range(3)
        }
        before = tree(parted)
        commit(chunks, [0, 1, 2], make=lambda _: [])  # there already
        assert tree(parted) == before
        with pytest.raises(ValueError, match="1 of 4 chunks are not committed, the first is 3"):
            chunks.finish(4, {})
        commit(chunks, [3])
        chunks.finish(4, {"checkpoint": "somewhere"})
        assert chunks.finished
        with pytest.raises(ValueError, match="the output is not open, or has finished"):
            commit(chunks, [4])
    assert tree(parted) == tree(whole)
    with contextlib.closing(store(parted / name)) as chunks:
        assert chunks.finished
        assert chunks.finish(4, {}) == parted / name
    assert tree(parted) == tree(whole)


def test_other_records_under_a_committed_number_are_refused(tmp_path):
    with contextlib.closing(store(tmp_path / "out.jsonl")) as chunks:
        commit(chunks, range(3))
        with pytest.raises(
            UserError, match="chunk 1 of .*out.jsonl was made from other records: the input has changed"
        ):
            chunks.commit(1, rows(1), "another digest", {}, [])
        with pytest.raises(UserError, match="has 3 chunks of this job, the input makes only 2 now"):
            chunks.finish(2, {})
    with contextlib.closing(store(tmp_path / "out.jsonl", overwrite=True)) as chunks:
        chunks.commit(1, rows(7), "another digest", {}, [])
        assert list(chunks.committed()) == [0, 1, 2] and chunks.committed()[1].digest == "another digest"
        chunks.finish(2, {})
    assert lines(tmp_path / "out.jsonl") == rows(0) + rows(7)


@pytest.mark.parametrize("name", OUTPUTS)
def test_another_jobs_chunks_and_results_are_refused_or_overwritten(tmp_path, name):
    expected = tmp_path / "expected"
    (tmp_path / "a").mkdir()
    expected.mkdir()
    output = tmp_path / "a" / name
    job_of(expected / name, range(2), OTHER)
    with contextlib.closing(store(output)) as chunks:
        commit(chunks, range(3))
    before = tree(tmp_path / "a")
    with pytest.raises(
        UserError, match="holds 3 chunks of another job .step: 100 there, 200 now, mode: not given there"
    ):
        store(output, OTHER)
    assert tree(tmp_path / "a") == before
    job_of(output, range(2), OTHER, overwrite=True)
    assert tree(tmp_path / "a") == tree(expected)
    with pytest.raises(UserError, match="is the result of another job .step: 200 there, 100 now.*overwrite"):
        store(output)
    assert tree(tmp_path / "a") == tree(expected)
    stranger = (output if name == "folder" else output.parent) / "notes.txt"
    stranger.write_text("mine")
    job_of(output, range(3), overwrite=True)
    stranger.unlink()
    job_of(output, range(2), OTHER, overwrite=True)
    assert tree(tmp_path / "a") == tree(expected)


def test_overwriting_makes_a_finished_result_anew_but_goes_on_with_its_own_chunks(tmp_path):
    output = tmp_path / "out.jsonl"
    job_of(output)
    with contextlib.closing(store(output, overwrite=True)) as chunks:
        assert not chunks.finished and not chunks.committed() and not output.exists()
        commit(chunks, [0, 1])
    with contextlib.closing(store(output, overwrite=True)) as chunks:
        assert list(chunks.committed()) == [0, 1]


def test_a_job_that_failed_before_its_first_chunk_leaves_nothing(tmp_path):
    for name in OUTPUTS:
        store(tmp_path / name).close()
        assert not tree(tmp_path)
    chunks = store(tmp_path / "out.jsonl")
    os.close(chunks._lock._own)  # killed
    assert tree(tmp_path)
    store(tmp_path / "out.jsonl", OTHER).close()
    assert not tree(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_files_of_others_are_never_touched(tmp_path, name, overwrite):
    output = tmp_path / name
    theirs = output / "part-00001-of-00007.jsonl" if name == "folder" else output
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine")
    message = f"{theirs.name} exists already and was not written by meshway infer: move it away"
    with pytest.raises(UserError, match=message):
        store(output, overwrite=overwrite)
    theirs.unlink()
    with contextlib.closing(store(output, overwrite=overwrite)) as chunks:
        commit(chunks, range(2))
        theirs.write_text("mine")
        with pytest.raises(UserError, match=message):
            chunks.finish(2, {})
    with pytest.raises(UserError, match=message):
        store(output, overwrite=overwrite)
    assert theirs.read_text() == "mine"
    theirs.unlink()
    job_of(output, range(2), overwrite=overwrite)
    changed = output / "part-00001-of-00002.jsonl" if name == "folder" else output
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(UserError, match=f"{changed.name} was changed after meshway infer wrote it: move it away"):
        store(output, OTHER, overwrite=overwrite)
    changed.unlink()
    summary = (output if name == "folder" else tmp_path) / (
        "_summary.json" if name == "folder" else f"{name}.summary.json"
    )
    for content, what in (
        (b"{}", "was not written by"),
        (b"[]", "is not what"),
        (b"no", "is not what"),
        (b'{"written_by": "meshway infer"}', "is not what"),
    ):
        summary.write_bytes(content)
        with pytest.raises(UserError, match=f"summary.json .*{what}.*move it away"):
            store(output, overwrite=overwrite)
        assert summary.read_bytes() == content


@pytest.mark.parametrize("name", ["out.jsonl", "folder"])
def test_a_removed_result_is_made_again(tmp_path, name):
    output = job_of(tmp_path / name)
    before = tree(tmp_path)
    (output / "part-00002-of-00004.jsonl" if name == "folder" else output).unlink()
    job_of(tmp_path / name)
    assert tree(tmp_path) == before


def test_chunks_that_were_damaged_are_made_again(tmp_path):
    output = tmp_path / "out.jsonl"
    with contextlib.closing(store(output)) as chunks:
        commit(chunks, range(4))
        parts = tmp_path / "out.jsonl.parts"
        content = (parts / "chunk-000001.jsonl").read_bytes()
        (parts / "chunk-000001.jsonl").write_bytes(content.replace(b"q", b"Q"))
        with pytest.raises(UserError, match="chunk-000001.jsonl was changed after it was written; run again"):
            chunks.finish(4, {})
    (parts / "chunk-000002.jsonl").write_bytes(content[:-1])
    (parts / "chunk-000003.jsonl").unlink()
    with contextlib.closing(store(output)) as chunks:
        assert list(chunks.committed()) == [0]
    job_of(output)
    assert lines(output) == [row for number in range(4) for row in rows(number)]


@pytest.mark.parametrize("name", ["out.parquet", "folder"])
def test_parquet_types_are_found_as_chunks_come(tmp_path, name):
    made = [
        [],
        [{"a": None, "b": [], "c": 1}],
        [{"a": "x", "b": [1], "c": 2.5, "d": {"e": [None]}}, {}],
        [{"d": {"e": [0.5], "f": "y"}, "b": None}],
    ]
    with contextlib.closing(store(tmp_path / name, format="parquet")) as chunks:
        commit(chunks, [0, 1], made.__getitem__)
    job_of(tmp_path / name, [2, 3], make=made.__getitem__, format="parquet")
    table = pyarrow.parquet.read_table(tmp_path / name)
    assert table.to_pylist() == [
        {"a": None, "b": [], "c": 1.0, "d": None},
        {"a": "x", "b": [1], "c": 2.5, "d": {"e": [None], "f": None}},
        {"a": None, "b": None, "c": None, "d": None},
        {"a": None, "b": None, "c": None, "d": {"e": [0.5], "f": "y"}},
    ]
    if name == "folder":  # each shard has the schema of all
        for path in (tmp_path / name).glob("*.parquet"):
            assert pyarrow.parquet.read_schema(path).equals(table.schema)


def test_types_that_parquet_cannot_hold_together_are_told(tmp_path):
    with contextlib.closing(store(tmp_path / "out.parquet")) as chunks:
        chunks.commit(0, [{"id": 1}], "d", {}, [])
        for bad, message in (
            ([{"id": "x"}], "chunk 1: a column has another type than in the chunks before .*id.*int64 vs string"),
            ([{"id": 1}, {"id": "x"}], "chunk 1: column 'id' has no single type"),
            ([{"id": 2**70}], "chunk 1: column 'id' has no single type"),
            ([{"id": 1, "aux": {}}], "chunk 1: Parquet cannot hold"),
        ):
            with pytest.raises(UserError, match=f"{message}.*use .jsonl"):
                chunks.commit(1, bad, "d", {}, [])
        chunks.commit(1, [{"id": 2}], "d", {}, [])
        chunks.finish(2, {})
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == [{"id": 1}, {"id": 2}]


def test_results_without_any_row(tmp_path):
    for name in OUTPUTS:
        job_of(tmp_path / name, [0, 1], make=lambda _: [])
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 0
    assert (tmp_path / "folder" / "part-00001-of-00002.jsonl").read_bytes() == b""


def test_a_summary_may_not_hide_what_it_tells_by_itself(tmp_path):
    with contextlib.closing(store(tmp_path / "out.jsonl")) as chunks:
        commit(chunks, [0])
        with pytest.raises(ValueError, match="the summary has its own files"):
            chunks.finish(1, {"files": 3})


def test_one_process_at_a_time(tmp_path):
    output = tmp_path / "out.jsonl"
    program = f"""
        import sys
        from meshway.framework.inference.bulk.store import ChunkStore
        chunks = ChunkStore({str(output)!r}, {JOB!r})
        chunks.open()
        print("open", flush=True)
        sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "open\n"
        before = tree(tmp_path)
        for options in ({}, {"job": OTHER, "overwrite": True}):
            with pytest.raises(
                UserError, match=f"process {holder.pid} on .* is working on this output .*out.jsonl.parts/lock"
            ):
                store(output, **options)
        assert tree(tmp_path) == before
    finally:
        holder.kill()
        holder.communicate()
    job_of(output)


def test_shares_work_side_by_side_and_nobody_else(tmp_path):
    output = tmp_path / "out.jsonl"
    digests = [f"digest {number}" for number in range(4)]
    job_of(tmp_path / "whole.jsonl")
    with contextlib.closing(store(output, share=Share(0, 2))) as even:
        for options, message in (
            ({"share": Share(0, 2)}, r"working on this output .*00000-of-00002.lock is locked"),
            ({}, r"working on this output .*00000-of-00002.lock is locked"),
            (
                {"share": Share(1, 2), "job": OTHER, "overwrite": True},
                r"as its job is another one \(step: 100 there, 200",
            ),
        ):
            with pytest.raises(UserError, match=message):
                store(output, **options)
        with contextlib.closing(store(output, share=Share(1, 2))) as odd:
            commit(odd, (1, 3))
            assert odd.missing(digests) == [0, 2]
        commit(even, (0, 2))
        assert even.missing(digests) == [] and not even.finished
        even.finish(4, {"checkpoint": "somewhere"})
    assert (
        output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not (tmp_path / "out.jsonl.parts").exists()
    )
    with contextlib.closing(store(output, share=Share(1, 2))) as odd:
        assert odd.finished
    # What shares left is completed by a process alone.
    with contextlib.closing(store(tmp_path / "left.jsonl", share=Share(1, 2))) as odd:
        commit(odd, (1, 3))
    with contextlib.closing(store(tmp_path / "left.jsonl")) as whole:
        assert list(whole.committed()) == [1, 3]
        with pytest.raises(
            UserError, match=r"is working on this output .*left.jsonl.parts/lock is locked.: wait for it"
        ):
            store(tmp_path / "left.jsonl", share=Share(0, 2))


def test_chunks_of_shares_on_several_disks_may_be_copied_together(tmp_path):
    for place in (0, 1):
        (tmp_path / str(place)).mkdir()
        with contextlib.closing(store(tmp_path / str(place) / "out.jsonl", share=Share(place, 2))) as chunks:
            commit(chunks, range(place, 4, 2))
    parts = [tmp_path / place / "out.jsonl.parts" for place in ("0", "1")]
    for path in parts[1].glob("chunk-*"):
        path.rename(parts[0] / path.name)
    job_of(tmp_path / "whole.jsonl")
    with contextlib.closing(store(tmp_path / "0" / "out.jsonl")) as chunks:
        assert not chunks.missing([f"digest {number}" for number in range(4)])
        chunks.finish(4, {"checkpoint": "somewhere"})
    assert (tmp_path / "0" / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_names_that_do_not_fit_are_told(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for name, options, message in (
        ("result/out.jsonl", {}, "no folder '.*result'; did you mean 'results'"),
        ("a/b/out.jsonl", {}, "no folder"),
        ("out.csv", {}, "out.csv: .csv is not written; end it in .jsonl, .json, .parquet, .txt, or name a folder"),
        ("out.jsonl.gz", {}, ".gz is not written"),
        ("out.parquet", {"format": "jsonl"}, "its format is parquet, not jsonl"),
        ("folder", {"format": "parket"}, "no format 'parket' of shards; did you mean 'parquet'"),
        ("folder.jsonl", {}, "is a folder"),
        ("file", {}, "is a file; a folder of shards"),
    ):
        with pytest.raises(UserError, match=message):
            ChunkStore(tmp_path / name, JOB, **options)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir", "open", "write"])
def test_a_disk_that_refuses_is_told_and_the_job_goes_on_later(tmp_path, monkeypatch, name, call):
    job_of(tmp_path / name)
    expected = tree(tmp_path)
    (tmp_path / "later").mkdir()
    output = tmp_path / "later" / name
    for works in range(30):
        calls = iter(range(works))

        def refuse(*args, original=getattr(os, call), calls=calls, **options):
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            try:
                job_of(output)
                break
            except EnvironmentFailure as error:
                assert "cannot write" in str(error) and "No space left on device" in str(error)
    assert works > 0 and tree(tmp_path / "later") == expected


def test_without_pyarrow_the_extra_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"meshway\[parquet\]"):
        store(tmp_path / "out.parquet")
    assert not tree(tmp_path)
