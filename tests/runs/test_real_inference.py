"""Inputs of `meshway infer` as people have them, from the command line: flags without effect, odd records, odd files.

Other flags without effect are `tests/launch/test_infer_flags.py`'s, jobs of several processes `test_infer.py`'s, pieces
of a stream (the row is about the library) `tests/framework/data/test_detokenizing.py`'s, columns of Parquet above 2 GiB
`tests/framework/inference/bulk/test_unusual_values.py`'s.
"""

import base64
import datetime
import decimal
import json
import signal

import pyarrow
import pyarrow.parquet
import pytest
from running import answer, lines, outputs, start
from saved_runs import save_run
from table_llama import pieces, table_llama

pytestmark = pytest.mark.proofs

ONE = '{"inputs": "a"}\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `run`, whose model says `bcbcbc...` behind `a`, and `run_t5`."""
    place = tmp_path_factory.mktemp("inference")
    save_run(place / "run_t5", "t5_1_1")
    tokenizer = pieces("a", "b", "c", "</e>", template=(1,))
    table_llama(place / "llama", {3: 4, 4: 5, 5: 4}, tokenizer=tokenizer)
    answer("convert", "--from=llama", "--to=run", cwd=place)
    return place


def infer(place, *words, given=ONE, output="out.jsonl", run="run", **wanted):
    """Runs a job; returns (its rows, or None where it must fail; what it said)."""
    where = [] if any(word.startswith("--output") for word in words) else [f"--output={output}"]
    said = answer("infer", f"--model_dir={run}", "--input=-", *where, "--overwrite", "--batch_size=2",
                  *words, cwd=place, given=given, **wanted)  # fmt: skip
    return (None if wanted.get("exits") else lines(place / output)), said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--beams=4", "--num_decodes=2"], "--num_decodes has no effect with --beams"),
        (["--beams=4", "--temperature=0.7"], "--temperature has no effect with --beams"),
        (["--beams=2", "--seed=3"], "--seed has no effect with --beams"),
        (["--top_k=3"], "--top_k has no effect at temperature 0"),
        (["--mode=score", "--stop=x"], "--stop has no effect with --mode=score"),
        (["--batch_size=0"], "argument --batch_size: '0' is not a whole number of at least 1"),
        (["--batch_size=2.5"], "argument --batch_size: '2.5' is not a whole number of at least 1"),
        (["--beams=0"], "argument --beams: '0' is not a whole number of at least 1"),
        (["--beams=999"], "999 are more than the 32 tokens"),
        (["--num_decodes=0", "--temperature=1"], "argument --num_decodes: '0'"),
        (["--max_new_tokens=-1"], "argument --max_new_tokens: '-1'"),
        (["--output=-"], "--output=-"),
    ],
    ids=" ".join,
)
def test_a_flag_that_would_change_nothing_or_means_nothing_is_refused(place, words, says):
    infer(place, *words, exits=2, says=says)
    assert not (place / "-").exists()


def test_fields_of_a_record_that_results_have_too_are_kept(place):
    own = {"index": 7, "score": "mine", "tokens": [9], "prediction": "theirs", "token_scores": 0, "other": None}
    ((row,), _) = infer(place, "--max_new_tokens=2", given=json.dumps({"inputs": "a", **own}) + "\n")
    assert {f"input_{name}": value for name, value in own.items() if name != "other"}.items() <= row.items()
    assert (row["index"], row["other"], row["prediction"]) == (0, None, "bc")
    table = pyarrow.table({"inputs": ["a", "a"], "index": [9, 8], "score": ["mine", "yours"]})
    pyarrow.parquet.write_table(table, place / "own.parquet")
    answer("infer", "--model_dir=run", "--input=own.parquet", "--output=own.jsonl", "--max_new_tokens=2", cwd=place)
    rows = lines(place / "own.jsonl")
    assert [(row["index"], row["input_index"], row["input_score"]) for row in rows] == [(0, 9, "mine"), (1, 8, "yours")]
    (place / "own.tsv").write_text("inputs\tindex\na\t5\n")
    answer("infer", "--model_dir=run", "--input=own.tsv", "--output=own2.jsonl", "--max_new_tokens=2", cwd=place)
    assert lines(place / "own2.jsonl")[0]["input_index"] == "5"


def test_beams_that_never_ended_are_left_out(place):
    """Of eight beams of one token only EOS has ended."""
    directory = table_llama(place / "ends", {3: 2}, tokenizer=pieces("a"))
    answer("convert", f"--from={directory}", "--to=run_ends", cwd=place)
    ((row,), _) = infer(place, "--beams=8", "--max_new_tokens=1", run="run_ends")
    assert row["tokens"] == [[2]] or row["tokens"] == [2]
    assert min(row.get("scores", [row["score"]])) > -1e6


def nested(depth):
    return '{"inputs": "a", "extra": ' + "[" * depth + "]" * depth + "}\n"


BAD = {
    nested(500): "field 'extra' is nested more than 40 deep",
    nested(41): "field 'extra' is nested more than 40 deep",
    "\r\n": "an empty line, not an object",
    '{"inputs": "a", "inputs": "b"}\n': "the field 'inputs' stands in it twice",
    '["a"]\n': "a list, not an object",
    '{"inputs": NaN}\n': "NaN is not a JSON value",
    '{"inputs": ["a", 3]}\n': "field 'inputs': neither text nor a list of token ids",
    '{"inputs": [3, 99]}\n': "id 99 is not in the vocabulary of 7",
    '{"inputs": [3, -1]}\n': "id -1 is not in the vocabulary of 7",
    '{"inputs": null}\n': "field 'inputs': neither text nor a list of token ids",
    '{"input": "a"}\n': "there is no field 'inputs', only ['input']; did you mean 'input'?",
    "nothing\n": "not JSON",
}


@pytest.mark.parametrize("first", range(0, len(BAD), 4))
def test_records_that_are_none_are_named_before_anything_is_computed(place, first):
    """Each by its line, in one message."""
    bad = list(BAD.items())[first : first + 4]
    _, said = infer(place, "--max_new_tokens=2", given=ONE + "".join(line for line, _ in bad) + ONE, exits=2)
    message = said.partition("meshway: error: ")[2]
    for number, (_, why) in enumerate(bad, 2):
        (line,) = [line for line in message.splitlines() if f"<stdin>:{number}: " in line]
        assert why in line, message
    assert "--on_bad=skip" in message


def test_deep_but_sound_records_and_a_byte_order_mark_are_read(place):
    rows, _ = infer(place, "--max_new_tokens=2", given="\ufeff" + nested(30) + ONE.strip() + "\r\n")
    assert [row["prediction"] for row in rows] == ["bc", "bc"]
    assert json.dumps({"inputs": "a", "extra": rows[0]["extra"]}) + "\n" == nested(30)


def test_values_of_parquet_that_json_has_not(place):
    moment = datetime.datetime(2020, 1, 1)
    price = pyarrow.array([decimal.Decimal("1.50")], pyarrow.decimal128(6, 2))
    columns = {"raw": [b"\xff"], "when": [moment], "day": [moment.date()], "at": [datetime.time(3, 4)], "price": price}
    table = pyarrow.table({"inputs": ["a"], **columns})
    pyarrow.parquet.write_table(table, place / "times.parquet")
    answer("infer", "--model_dir=run", "--input=times.parquet", "--output=times.jsonl", "--max_new_tokens=2", cwd=place)
    (row,) = lines(place / "times.jsonl")
    assert (row["when"], row["day"], row["at"]) == ("2020-01-01T00:00:00", "2020-01-01", "03:04:00")
    assert (float(row["price"]), base64.b64decode(row["raw"])) == (1.5, b"\xff")
    nanoseconds = pyarrow.table({"inputs": ["a"], "nanoseconds": pyarrow.array([1], pyarrow.timestamp("ns"))})
    pyarrow.parquet.write_table(nanoseconds, place / "odd.parquet")
    answer("infer", "--model_dir=run", "--input=odd.parquet", "--output=odd.jsonl", "--max_new_tokens=2", cwd=place,
           exits=2, says=("odd.parquet", "'nanoseconds'"))  # fmt: skip


def test_a_job_that_is_resumed_with_another_flag_names_the_flag(place):
    (place / "ten.jsonl").write_text(ONE * 10)
    words = ("infer", "--model_dir=run", "--input=ten.jsonl", "--output=resumed.jsonl", "--batch_size=2")
    answer(*words, "--max_new_tokens=2", cwd=place, says="written: resumed.jsonl")
    answer(*words, "--max_new_tokens=2", cwd=place, says="this very job is finished")
    for flag, changed in [
        ("--temperature=0.5", "--temperature: 0.0 there, 0.5 now"),
        ("--max_new_tokens=3", "--max_new_tokens: 2 there, 3 now"),
        ("--stop=b", "--stop: "),
    ]:
        given = () if flag.startswith("--max") else ("--max_new_tokens=2",)
        answer(*words, *given, flag, cwd=place, exits=2, says=("another job", changed))


def test_two_jobs_of_one_output_at_once(place):
    """The second is told who works on it."""
    (place / "many.jsonl").write_text(ONE * 20_000)
    words = ("infer", "--model_dir=run_t5", "--input=many.jsonl", "--output=both.jsonl", "--chunk_size=2")
    first = start(*words, cwd=place)
    try:
        while not [*place.glob("both.jsonl.parts/*.json")]:
            assert first.poll() is None, first.communicate()
        said = answer(*words, cwd=place, exits=2, says="is working on this output")
        assert f"process {first.pid} on " in said
    finally:
        first.send_signal(signal.SIGKILL)
        outputs([first])
