"""A recipe as T5X users write it, in a package of theirs, is trained and evaluated, and all in it has its effect."""

import json
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest
from running import copy_lab, lines, meshway

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the recipe by the command line, its last checkpoint evaluated by the recipe of the run."""
    folder = tmp_path_factory.mktemp("t5x")
    lab = copy_lab(folder)
    recipe = ("--gin_file=mylab/configs/pretrain.gin", f"--gin.CACHE_DIR={folder / 'cache'}")
    trained = meshway("train", *recipe, f"--gin.MODEL_DIR={folder / 'run'}", cwd=lab)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    evaluated = meshway("eval", f"--model_dir={folder / 'run'}", cwd=lab)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    return folder / "run"


def test_the_resolved_recipe_says_each_construct(run):
    said = (run / "config.gin").read_text()
    for line in (
        "import mylab.tasks",
        "encoder/mlp.Mlp.d_ff = 48",
        "mlp.Mlp.d_ff = %D_FF",
        "D_FF = 32",
        "TASK_FEATURE_LENGTHS = {'inputs': %INPUTS_LENGTH, 'targets': 8}",
        "parts.ramp.peak = %mylab.PEAK",
        "optimizers.Optimizer.frozen = [%FROZEN]",
        "shared/gin.singleton.constructor = @parts.Count",
        "first/parts.Recorder.name = 'first'",
        "parts.Recorder.count = %COUNT",
        "tasks.examples_seen.each = 100",
    ):
        assert re.search(rf"^{re.escape(line)}$", said, re.MULTILINE), f"{line} is not in:\n{said}"


def test_scopes_shape_the_parameters_of_one_stack(run):
    layout = {row["name"]: row["shape"] for row in json.loads((run / "layout.json").read_text())}
    assert layout["params/encoder/block_0/mlp/wo/kernel"][1:] == [48, 32]
    assert layout["params/decoder/block_0/mlp/wo/kernel"][1:] == [32, 32]
    assert layout["batch/encoder_input_tokens"] == [8, 24] and layout["batch/decoder_target_tokens"] == [8, 8]


def test_a_configurable_function_takes_a_constant_and_a_macro(run):
    rates = [line["learning_rate"] for line in lines(run / "metrics.jsonl") if "learning_rate" in line]
    np.testing.assert_allclose(rates, [0.025, 0.05, 0.075], rtol=1e-6)


def test_a_macro_in_a_list_freezes_what_it_names(run):
    first, last = (
        ocp.PyTreeCheckpointer().restore(run / "checkpoints" / str(step) / "state")["params"] for step in (1, STEPS)
    )
    assert np.array_equal(first["encoder_norm"]["scale"], last["encoder_norm"]["scale"])
    assert not np.array_equal(first["decoder_norm"]["scale"], last["decoder_norm"]["scale"])


def test_configurable_classes_share_a_singleton_and_differ_by_scope(run):
    found = (run / "recorded.txt").read_text().splitlines()
    assert found == [
        f"{name} {step} {2 * step - 1 + place} inputs 24"
        for step in range(1, STEPS + 1)
        for place, name in enumerate(("first", "second"))
    ]


def test_the_metric_of_the_task_is_configured_when_the_run_is_evaluated(run):
    (record,) = lines(run / "eval" / "mylab_numbers.jsonl")
    assert record["step"] == STEPS and record["metrics"]["examples_seen"] == 800.0
