"""A user's own package adds a model, a task, an optimizer and a layout by a gin file alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running import copy_lab, lines, meshway, state_hash

ROOT = Path(__file__).parent.parent.parent
ARGUMENTS = ("train", "--gin_file=bigram.gin", "--simulated_devices=4")


def check(folder):
    losses = [line["loss"] for line in lines(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    info = (folder / "model_info.txt").read_text()
    assert "data=2, codes=2" in info
    row = next(line for line in info.splitlines() if line.startswith("params/inner"))
    assert "(None, codes)" in row and "codes->codes" in row


@pytest.mark.slow
def test_beside_an_installed_meshway(tmp_path):
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={tmp_path / 'run'}", cwd=copy_lab(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / "run")


def test_the_layout_table_of_a_users_model(tmp_path):
    done = meshway("inspect", *ARGUMENTS[1:], cwd=copy_lab(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "params/outer" in done.stdout and "replicated on every device" in done.stdout


@pytest.mark.slow
def test_a_users_task_is_cached_inspected_trained_packed_and_evaluated(tmp_path):
    lab, cache, run = copy_lab(tmp_path), tmp_path / "cache", tmp_path / "run"
    recipe = ("--gin_file=t5.gin", "--gin.MIXTURE_OR_TASK_NAME=lab_mix", f"--gin.CACHE_DIR={cache}")
    words = ("cache", "--task=lab_mix", "--module=tasks.topics", f"--directory={cache}", "--num_shards=2")
    cached = meshway(*words, cwd=lab)
    assert cached.returncode == 0, cached.stderr
    assert "lab_halves" in cached.stdout and "768" in cached.stdout
    seen = meshway("inspect", "data", *recipe, f"--html={tmp_path / 'data.html'}", cwd=lab)
    assert seen.returncode == 0, seen.stderr
    assert "lab_openings, row 0" in seen.stdout and "75.00%" in seen.stdout
    assert "lab_halves" in (tmp_path / "data.html").read_text()
    trained = meshway(
        "train",
        *recipe,
        f"--gin.MODEL_DIR={run}",
        "--gin.TRAIN_STEPS=6",
        "--gin.grain_loader.CachedData.build=False",
        cwd=lab,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    last = lines(run / "metrics.jsonl")[-1]
    assert last["encoder_density"] > 0.7 and "validation/lab_halves/same_length" in last
    assert (run / "vocabularies" / "targets.json").is_file()


@pytest.mark.slow
def test_from_the_wheel_and_the_sdist(tmp_path):
    """Builds both, unpacks the wheel alone on the path in place of the repository, and runs the lab and our own T5."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path / "wheel")]
    subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path / 'sdist')!r})"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run([*build, str(next((tmp_path / "sdist").glob("*.tar.gz")))], check=True, capture_output=True)
    wheel = next((tmp_path / "wheel").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert all(name.startswith("meshway") for name in names), "nothing under a generic name"
    assert {"meshway/gin/recipes/quickstart.gin", "meshway/gin/runs/train.gin", "meshway/framework/py.typed"} <= set(
        names
    )
    assert not [name for name in names if "tests" in name or name.endswith("gin/__init__.py")]
    program = "import sys; from meshway.launch.cli import __file__ as f, main; assert sys.argv[1] in f, f; "
    program += "sys.exit(main(sys.argv[2:]))"
    site = str(tmp_path / "site")
    for words in (ARGUMENTS, ("train", "--gin_file=t5.gin", "--gin.TRAIN_STEPS=2")):
        done = subprocess.run(
            [sys.executable, "-c", program, site, *words, f"--gin.MODEL_DIR={tmp_path / words[1]}"],
            cwd=copy_lab(tmp_path / words[1]), env=os.environ | {"PYTHONPATH": site}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.proofs
def test_a_linen_module_trains_resumes_and_is_evaluated(tmp_path):
    lab, run = copy_lab(tmp_path), tmp_path / "run"
    recipe = ("train", "--gin_file=linen.gin", f"--gin.MODEL_DIR={run}", "--simulated_devices=4")
    for words in (("--gin.TRAIN_STEPS=10",), ()):
        done = meshway(*recipe, *words, cwd=lab)
        assert done.returncode == 0, done.stdout + done.stderr
    losses = {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}
    assert list(losses) == [5, 10, 15, 20] and losses[20] < losses[5] - 2
    assert "embed->fsdp" in (run / "model_info.txt").read_text()
    before = lines(run / "eval" / "lab_halves.jsonl")[-1]
    evaluated = meshway("eval", f"--model_dir={run}", "--simulated_devices=1", cwd=lab)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    after = lines(run / "eval" / "lab_halves.jsonl")[-1]
    assert after["step"] == 20 and "fingerprint" in after and after["metrics"]["same_length"] is not None
    assert abs(after["metrics"]["loss"] - before["metrics"]["loss"]) < 1e-4


OPTIONS = (
    "--gin.BATCH_SIZE_SCHEDULE=[(4, 4), (9, 8)]", "--gin.BATCH_SIZE=16", "--gin.EMA_DECAY=0.5", "--gin.SPIKE_LOSS=1.5",
    "--gin.WEIGHT_STATISTICS_PERIOD=10", "--gin.SKIP_BATCHES=[(6, 7)]", "--gin.EMA_EVALUATE=True",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_with_every_option_of_a_step_resumes_exactly_amid_its_schedule(tmp_path):
    """Stopped while batches have 8 rows, with averages, a guard's memory and batches left out."""
    lab = copy_lab(tmp_path)
    for name, stops in (("whole", [20]), ("stopped", [6, 20])):
        for steps in stops:
            words = (f"--gin.MODEL_DIR={tmp_path / name}", f"--gin.TRAIN_STEPS={steps}", "--gin.REPORT_PERIOD=1")
            done = meshway(*ARGUMENTS, *words, *OPTIONS, cwd=lab)
            assert done.returncode == 0, done.stdout + done.stderr
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert state_hash(whole, 20) == state_hash(stopped, 20)
    reports = {line["step"]: line for line in lines(whole / "metrics.jsonl") if "loss" in line}
    # Batches 6 and 7 are left out, so that step 8 takes batch 10; rows have 128 tokens at most.
    tokens = {step: line["tokens_per_second"] * line["step_seconds"] for step, line in reports.items()}
    assert all(tokens[step] <= 4 * 128 < tokens[5] for step in (1, 2, 3, 4)) and tokens[7] <= 8 * 128 < tokens[8]
    assert {step for step, line in reports.items() if "weight_rms/inner" in line} == {10, 20}
    found = {}
    for words in (("--averaged",), ()):
        done = meshway("eval", f"--model_dir={whole}", "--simulated_devices=4", *words, cwd=lab)
        assert done.returncode == 0, done.stdout + done.stderr
        found[words] = lines(whole / "eval" / "lab_lines.jsonl")[-1]["metrics"]["loss"]
    assert abs(found[("--averaged",)] - reports[20]["validation/loss"]) < 1e-4 < abs(found[()] - found[("--averaged",)])
