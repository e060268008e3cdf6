"""`meshway bench accelerator`: every part runs, in small; what fails is told, and the others go on."""

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench import accelerator
from meshway.launch.bench.accelerator import Row, format_rows

WORDS = ["bench", "accelerator", "--gin_file=bench_accelerator"]


def test_without_an_accelerator_only_the_small_form_runs(monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_devices", lambda: ("cpu", "cpu", 1))
    with pytest.raises(UserError, match="finds no GPU or TPU .* --small runs everything in small on CPU"):
        accelerator.measure(cli.parse(WORDS))
    # A part that raises is a row, after which the command goes on, and ends with exit code 1.
    for part in ("_training", "_attention", "_dispatch", "_decoding"):
        monkeypatch.setattr(accelerator, part, lambda *_: iter([Row("fine", "1 ms")]))
    monkeypatch.setattr(accelerator, "_layout", lambda name: 1 / 0)
    assert cli.main([*WORDS, "--small"]) == 1
    said = capsys.readouterr().out
    assert said.count("failed: ZeroDivisionError: division by zero") == len(accelerator.SMALL_LAYOUTS)
    assert said.count("NOT MET") == len(accelerator.SMALL_LAYOUTS) and said.count("fine") == 4


def test_a_table_says_what_was_wanted():
    lines = format_rows(
        [Row("step", "2 ms"), Row("MFU", "61 %", ">= 60 %", True), Row("x", "2", "1", False)]
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["found", "wanted"],
        ["step", "2", "ms"],
        ["MFU", "61", "%", ">=", "60", "%", "ok"],
        ["x", "2", "1", "NOT", "MET"],
    ]


@pytest.mark.slow
def test_its_small_form_runs_every_part(capsys):
    rows = {row.what: row for row in accelerator.measure(cli.parse([*WORDS, "--small", "--simulated_devices=8"]))}
    wrong = [row for row in rows.values() if row.right is False]
    assert not wrong, wrong
    checked = [name for name, row in rows.items() if row.right]
    assert "layout ring, data=4 x sequence=2" in checked and "layout inference/2d, x=2 x y=2 x z=2" in checked
    assert {f"attention {name}, gradients" for name in ("reference", "chunked", "splash")} < set(checked)
    assert {f"dispatch {name}, gradients" for name in ("einsum", "all_to_all", "dropless", "ragged")} < set(checked)
    assert rows["parameters, tokens a step"].found == "73,920, 256"
    assert {"MFU", "step", "token, batch 8", "with a cache of programs", "attention splash, 128"} < set(rows)
