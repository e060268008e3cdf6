"""What README and the Makefile say is so: files are there, and commands do what is said of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from readme import README, ROOT, SMALLER, blocks, commands, furnish, in_folder, words_of
from running import copy_lab, lines

from meshway.launch import cli
from meshway.launch.cli import USAGE, parse

BIN = Path(sys.executable).parent
# Nothing is trained, read or compiled.
CHEAP = r"--dry_run|^meshway inspect (?=--)(?!.*--(compile|hlo))|^meshway launch (?!local|ray|worker)"
# Words that make a command of README short.
SHORT = {
    "make quickstart": " QUICKSTART_FLAGS='--gin.TRAIN_STEPS=150 --gin.EVAL_PERIOD=150'",
    "meshway bench parallel": " --layouts=fsdp,model_1d",
    "meshway launch local": " --gin.TRAIN_STEPS=2 --gin.REPORT_PERIOD=1 --gin.EVAL_PERIOD=None",
}


@pytest.fixture
def furnished(tmp_path, monkeypatch):
    """The current folder, which has what README's commands name."""
    furnish(tmp_path)
    with in_folder(tmp_path, monkeypatch):
        yield tmp_path


def in_shell(command: str, folder: Path, **variables: str) -> str:
    """Runs a line of README as a user does, with the meshway of this Python first; returns what it says."""
    for beginning, more in SHORT.items():
        command += more if command.startswith(beginning) else ""
    # make is not to install: a file is old where -o says so.
    command = re.sub(r"^make", f"make -f {ROOT}/Makefile -o {BIN}/meshway VENV={BIN.parent}", command)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | variables
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def here(command: str) -> None:
    """Runs a command of README in this process, on its eight devices."""
    for beginning, more in SHORT.items():
        command += more if command.startswith(beginning) else ""
    words = [word for word in words_of(command) if word != "--simulated_devices=8"]
    assert cli.main(words) == 0, command


def test_commands_are_found():
    """As README writes them: with comments, going on in a next line, behind another command."""
    page = "    cd a && meshway train --x='a b'  # c\n    # meshway\n\n    meshway launch \\\n      -- y\n\nmeshway\n"
    assert commands(page) == ["cd a && meshway train --x='a b'", "meshway launch -- y"]
    assert words_of(commands(page)[0]) == ["train", "--x=a b"]
    assert len(commands()) > 20


def test_each_command_is_one_that_meshway_knows():
    """README's, those of docs/, of the verbs' own texts and of recipes' headings, and what --help gives as examples."""
    pages = [README, USAGE.replace("\n  ", "\n    ")]
    for pattern in ("docs/*.md", "launch/**/*.py", "gin/**/*.gin"):
        pages += [path.read_text().replace("\n#", "\n") for path in sorted(ROOT.glob(pattern))]
    found = [command for page in pages for command in commands(page) if "meshway" in command]
    assert len(found) > 70
    for command in found:
        assert parse(words_of(command.removesuffix(" ..."))) is not None, command


@pytest.mark.parametrize("command", [command for command in commands() if re.search(CHEAP, command)])
def test_commands_that_train_nothing(command, furnished, capsys):
    """With README's own recipe, at its size."""
    here(command)
    output = re.search(r"--output=(\S+)", command)
    assert (furnished / output[1]).stat().st_size if output else capsys.readouterr().out


@pytest.mark.slow
def test_the_quickstart_is_seen_to_learn(tmp_path):
    """Shortened to a quarter of its steps: dates that it never saw are read, if not yet nearly all of them."""
    (block,) = [block for block in blocks() if any("--model_dir=runs/quickstart" in line for line in block)]
    said = in_shell("make quickstart", tmp_path, XLA_FLAGS="")  # optimised, unlike what other tests compile
    for command in block:
        in_shell(command, tmp_path)
    assert "1 of 3" in said and "3 of 3" in said and re.search(r'"inputs":.*"targets":.*"prediction":', said)
    assert re.search(r"dates\n  input .*\n  target .*\n  prediction .*", said)
    run = tmp_path / "runs" / "quickstart"
    losses = [line["validation/loss"] for line in lines(run / "metrics.jsonl") if "validation/loss" in line]
    assert losses[-1] < losses[0] / 2
    metrics = lines(run / "eval" / "dates.jsonl")[-1]["metrics"]
    assert metrics["accuracy"] > 0.75 and metrics["exact_match"] > 5
    assert (run / "report.html").stat().st_size and len(lines(run / "predictions.jsonl")) > 200
    (answer,) = lines(tmp_path / "answers.jsonl")
    assert answer["prediction"]


@pytest.mark.slow
def test_commands_that_train_and_what_follows(furnished):
    """In README's order, with its recipe made smaller."""
    (furnished / "mine.gin").rename("readme.gin")
    (furnished / "mine.gin").write_text(SMALLER)
    for command in commands():
        if re.search(CHEAP + r"|^make |^cd |runs/quickstart|^meshway launch", command):
            continue
        here(command.replace("/data/cache", "cache"))
    assert json.loads((furnished / "answers.jsonl").read_text().splitlines()[0])["inputs"] == "write 7"


@pytest.mark.slow
def test_commands_that_start_processes(tmp_path):
    """What needs processes or devices of its own: `launch local`, and the lab in its folder."""
    copy_lab(tmp_path / "tests")
    started = [command for command in commands() if re.match("meshway launch local|cd ", command)]
    assert len(started) == 2
    for command in started:
        in_shell(command.replace("/tmp/", f"{tmp_path}/runs/"), tmp_path)
        (model_dir,) = re.findall(r"MODEL_DIR=(\S+)", command)
        reports = lines(tmp_path / "runs" / Path(model_dir).name / "metrics.jsonl")
        assert any("loss" in report for report in reports), command


def test_files_that_readme_names_exist():
    for name in re.findall(r"`((?:framework|models|gin|tasks|launch|tests)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"include '([\w/.]+)'", README):
        if not name.startswith("t5x"):
            assert (ROOT / "gin" / name).exists(), name


def test_the_example_of_readme_is_the_lab():
    """Every line README quotes from tests/lab/bigram.gin is in it, comments aside."""
    lab = (ROOT / "tests/lab/bigram.gin").read_text()
    block = README[README.index("    import optimizers\n") : README.index("    cd tests/lab")]
    for line in block.splitlines():
        line = line.split("  #")[0].strip()
        assert line in lab, line


def test_the_ci_runs_readmes_test_command():
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


def test_nothing_names_where_packages_come_from_or_this_workplace():
    words = ["pypi" + ".org", "/" + "work/", "files.python" + "hosted"]
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.is_file() and not inside[0].startswith(".") and path.suffix in {".py", ".md", ".gin", ".toml", ".html"}:
            text = path.read_text()
            assert not [word for word in words if word in text], path


def test_each_feature_of_t5x_has_a_test_or_a_command():
    """The last cell of each row of docs/t5x_features.md."""
    rows = [line for line in (ROOT / "docs" / "t5x_features.md").read_text().split("\n") if line.startswith("| ")]
    cells = [row.strip("| ").rpartition(" | ")[2] for row in rows]
    cells = [cell for cell in cells if cell not in ("---", "test or command")]
    assert len(cells) >= 80
    for cell in cells:
        if cell.startswith("meshway "):
            assert parse(cell.split()[1:]) is not None, cell
            continue
        file, _, name = cell.partition("::")
        assert (ROOT / file).is_file(), cell
        assert not name or f"def {name}(" in (ROOT / file).read_text(), cell
