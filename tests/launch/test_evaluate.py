"""`meshway eval` in one process, on a model of a few numbers."""

import json
import re

import bigram_table
import jax
import pytest

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.launch import cli

RECIPE = """
from __gin__ import dynamic_registration
import bigram_table

MODEL = @bigram_table.BigramTable()
DATA = @bigram_table.Tables()
bigram_table.Tables.batch_size = %BATCH_SIZE
BATCH_SIZE = 8
LAYOUT = 'single'
"""


@pytest.fixture
def run(tmp_path):
    """A run directory of steps 10, 20 and 30."""
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save_params(bigram_table.BigramTable().init(jax.random.key(step)), step)
    checkpoints.close()
    (folder / "config.gin").write_text(RECIPE)
    return folder


def evaluate(capsys, *words):
    """Runs the verb; returns (exit code, what it said, what it complained of)."""
    capsys.readouterr()
    code = cli.main(["eval", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def told(output):
    return [int(step) for step in re.findall(r"^step (\d+)  ids  loss", output, re.MULTILINE)]


def test_the_run_directory_is_all_it_needs(capsys, run):
    code, said, errors = evaluate(capsys, f"--model_dir={run}")
    assert code == 0, errors
    assert told(said) == [30] and "done: 1 step; report:" in said and "count 3  (3 examples, " in said
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--steps=all")
    assert code == 0 and told(said) == [10, 20] and "1 step had been evaluated already" in said
    records = [json.loads(line) for line in (run / "eval" / "ids.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30]
    assert len({record["fingerprint"] for record in records}) == 1


def test_a_step_is_evaluated_again_when_something_else_is_asked_of_it(capsys, run):
    def steps(*words):
        code, said, errors = evaluate(capsys, f"--model_dir={run}", "--steps=10,20", *words)
        assert code == 0, errors
        return told(said)

    assert steps() == [10, 20] and steps() == []
    assert steps("--gin.LAYOUT=data") == [], "where it lies says nothing of what is found"
    assert steps(f"--gin_file={run / 'config.gin'}") == []
    assert steps("--max_predictions=2") == [10, 20] and steps() == [10, 20]
    assert steps("--again") == [10, 20]
    assert steps("--watch", "--gin.TRAIN_STEPS=30") == []


def test_weights_in_fewer_bits_need_a_model_that_takes_them(capsys, run):
    code, _, errors = evaluate(capsys, f"--model_dir={run}", "--weights=int8")
    assert code == 2 and "BigramTable names no parameter that may be quantised" in errors
    code, _, errors = evaluate(capsys, f"--model_dir={run}", "--weights=int8", "--steps=10,20")
    assert code == 2 and "--weights compares one checkpoint, and --steps names 2: give one" in errors
    code, _, errors = evaluate(capsys, f"--model_dir={run}", "--weights=int8", "--watch")
    assert code == 2 and "leave out --watch" in errors
    code, _, errors = evaluate(capsys, f"--model_dir={run}", "--cache=int8")
    assert code == 2 and "--cache: 'attention' of 'attention.Attention' is not imported" in errors


def test_another_split_stands_beside(capsys, run):
    assert evaluate(capsys, f"--model_dir={run}")[0] == 0
    before = (run / "eval" / "ids.jsonl").read_bytes()
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--split=train")
    assert code == 0 and "(2 examples" in said, errors
    assert (run / "eval" / "ids.jsonl").read_bytes() == before and (run / "eval" / "ids.train.jsonl").exists()
    code, said, _ = evaluate(capsys, f"--model_dir={run}", "--split=validation")
    assert code == 0 and told(said) == [], "that is the recipe's own"


def test_a_watcher_ends_with_the_run_or_when_nothing_comes(capsys, run):
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--watch", "--gin.TRAIN_STEPS=30")
    assert code == 0 and told(said) == [10, 20, 30], errors
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--watch", "--idle_timeout=1")
    assert code == 0 and told(said) == [] and "no new checkpoint for 1 s" in said, errors
    code, _, errors = evaluate(capsys, f"--model_dir={run}", "--idle_timeout=1")
    assert code == 2 and "--idle_timeout has no effect without --watch" in errors


def test_a_metric_that_raises_leaves_the_rest_and_the_exit_code_tells(capsys, run):
    more = ("--gin.bigram_table.Tables.names=['bad','ids']", "--gin.bigram_table.Tables.fails=bad")
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--steps=20,30", *more)
    assert code == 2 and "Traceback" not in errors
    assert "2 times:\n  task 'bad', broken: ZeroDivisionError: of none" in errors
    assert told(said) == [20, 30] and said.count("bad broken raised") + said.count("bad  broken raised") == 2
    bad, good = ((run / "eval" / f"{name}.jsonl").read_text() for name in ("bad", "ids"))
    assert bad.count('"count": 3.0') == good.count('"count": 3.0') == 2
    assert bad.count("ZeroDivisionError") == 2 and "failed" not in good


MISTAKES = {
    "unknown step": (("--steps=25",), ["no checkpoint of step 25; there are [10, 20, 30]"]),
    "no step": (("--steps=last",), ["--steps=last is none of latest, all"]),
    "unknown split": (("--split=test",), ["no split 'test'; there is 'train'"]),
    "checkpoint of another recipe": (
        ("--gin.bigram_table.BigramTable.vocab_size=13",),
        ["checkpoints/30 holds another model than this recipe", "float32[12,12] there and float32[13,13] here"],
    ),
    "batch that does not divide": (("--gin.LAYOUT=data", "--gin.BATCH_SIZE=6"), ["size 6", "data=8"]),
    "misspelt flag": (("--step=10",), ["unknown flag --step", "--steps"]),
    "misspelt binding": (("--gin.bigram_table.Tables.nams=1",), ["no parameter 'nams'; did you mean 'names'?"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_before_anything_is_evaluated(capsys, run, case):
    words, expected = MISTAKES[case]
    code, said, errors = evaluate(capsys, f"--model_dir={run}", *words)
    assert code == 2 and "Traceback" not in errors and errors.count("meshway: error: ") == 1
    assert all(part in errors for part in expected), errors
    assert not list(run.glob("eval/*.jsonl"))


def test_what_is_no_run(capsys, run, tmp_path):
    assert "or --model_dir=DIR" in evaluate(capsys)[2]
    assert "no such directory; did you mean 'run'?" in evaluate(capsys, f"--model_dir={tmp_path / 'rum'}")[2]
    assert "neither recipe.gin nor config.gin" in evaluate(capsys, f"--model_dir={tmp_path}")[2]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.gin").write_text(RECIPE)
    code, _, errors = evaluate(capsys, f"--model_dir={empty}")
    assert code == 2 and "there is no complete checkpoint in" in errors and "--watch waits" in errors


def test_a_run_that_cannot_be_written(capsys, run):
    (run / "eval").write_text("")
    code, _, errors = evaluate(capsys, f"--model_dir={run}")
    assert code == 2 and re.search(r"cannot write .*run/eval", errors) and "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gin.TRAIN_STEPS=40"], "has saved step 30 of 40"),
        ([], "has no TRAIN_STEPS"),
        (["--gin.TRAIN_STEPS=30", "--watch"], "leave out --finished"),
    ],
)
def test_a_run_that_was_stopped_is_not_evaluated_by_accident(capsys, run, words, expected):
    code, said, errors = evaluate(capsys, f"--model_dir={run}", "--finished", *words)
    assert code == 2 and expected in errors and not said


def test_a_finished_run_is_evaluated(capsys, run):
    assert evaluate(capsys, f"--model_dir={run}", "--finished", "--gin.TRAIN_STEPS=30")[0] == 0
    code, said, _ = evaluate(capsys, f"--model_dir={run}", "--gin.TRAIN_STEPS=40")
    assert code == 0 and "had been evaluated already" in said, "the flag is no part of what was evaluated"
