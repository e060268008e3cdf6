"""Fields that are passed through: what can be written is taken, what cannot is named before anything is computed."""

import datetime
import decimal
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk import parquet
from meshway.framework.inference.bulk.batches import JsonLines
from meshway.framework.inference.bulk.parquet import ParquetRows
from meshway.framework.inference.bulk.sources import open_source


def read(path, start=0):
    return list(open_source(str(path)).records(start))


@pytest.mark.parametrize("opened", ["[]", '{"a":1}'], ids=["lists", "objects"])
def test_a_field_that_is_nested_too_deeply_is_the_problem_of_its_record(opened, tmp_path):
    def nested(depth):
        inner = opened
        for _ in range(depth - 1):
            inner = f"[{inner}]" if opened == "[]" else f'{{"a":{inner}}}'
        return f'{{"inputs": "x", "deep": {inner}}}\n'

    (tmp_path / "in.jsonl").write_text(nested(40) + nested(41) + nested(500) + '{"inputs": "' + "[" * 500 + '"}\n')
    problems = [record.problem for record in read(tmp_path / "in.jsonl")]
    assert problems == ["", *["field 'deep' is nested more than 40 deep"] * 2, ""]
    good = read(tmp_path / "in.jsonl")[0].values
    for encoding in (JsonLines(), ParquetRows([])):  # what is taken can be written
        assert encoding.encode([{"index": 0, **good}], "chunk 0")


UNUSUAL = {
    "when": datetime.datetime(2020, 1, 2, 3, 4, 5, 678, datetime.UTC),
    "day": datetime.date(2020, 1, 2),
    "time": datetime.time(1, 2, 3),
    "took": datetime.timedelta(seconds=1.5),
    "price": decimal.Decimal("1.10"),
    "raw": b"\xff\x00",
    "list": [datetime.date(2020, 1, 2)],
    "struct": {"price": decimal.Decimal("2.5")},
}


def test_parquet_values_that_json_has_no_word_for_are_passed_through(tmp_path):
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"inputs": "a", **UNUSUAL}]), path)
    (record,) = read(path)
    assert record.values == {"inputs": "a", **UNUSUAL}
    content = ParquetRows([]).encode([record.values], "chunk 0")
    assert pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist() == [record.values]
    assert json.loads(JsonLines().encode([record.values], "chunk 0")) == {
        "inputs": "a",
        "when": "2020-01-02T03:04:05.000678+00:00",
        "day": "2020-01-02",
        "time": "01:02:03",
        "took": 1.5,
        "price": "1.10",
        "raw": "/wA=",
        "list": ["2020-01-02"],
        "struct": {"price": "2.5"},
    }


def test_a_time_that_python_cannot_hold_is_the_problem_of_its_row_by_column(tmp_path):
    times = pyarrow.array([1000, 1001], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"inputs": ["a", "b"], "at": times}), tmp_path / "in.parquet")
    first, second = read(tmp_path / "in.parquet")
    assert not first.problem and "column 'at' has a value that Python cannot hold" in second.problem


class Overflowing:
    """Arrow's refusal of nested columns past 2 GiB, at so many rows of a column instead."""

    def __init__(self, column, most):
        self.column, self.most, self.real = column, most, parquet._read_batches

    def __call__(self, file, size, group, columns):
        for number, batch in enumerate(self.real(file, size, group, columns)):
            # Rows before the fifth are small.
            if self.column in batch.schema.names and size > self.most and (number + 1) * size > 4:
                raise pyarrow.ArrowNotImplementedError("Nested data conversions not implemented for chunked arrays")
            yield batch


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("most", [1, 3])
def test_a_column_too_large_for_a_batch_is_read_in_smaller_ones(most, start, tmp_path, monkeypatch):
    rows = [{"inputs": f"{n}", "parts": [f"{n}", "x"]} for n in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    monkeypatch.setattr(parquet, "_BATCH", 4)
    monkeypatch.setattr(parquet, "_read_batches", Overflowing("parts", most))
    assert [record.values for record in read(tmp_path / "in.parquet", start)] == rows[start:]
    assert [record.index for record in read(tmp_path / "in.parquet", start)] == [*range(start, 20)]


def test_a_row_too_large_to_be_read_names_its_column(tmp_path, monkeypatch):
    rows = [{"inputs": f"{n}", "parts": ["x"]} for n in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    monkeypatch.setattr(parquet, "_read_batches", Overflowing("parts", 0))
    with pytest.raises(UserError, match="in.parquet: column 'parts' holds too much in one row"):
        read(tmp_path / "in.parquet")
