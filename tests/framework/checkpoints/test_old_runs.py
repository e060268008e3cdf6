"""Runs from before modules moved: their arrays are restored bit for bit, and their recipe is told what to write."""

import json
import re
import tarfile

import jax
import numpy as np
import pytest
from goldens.make_old_runs import BINDINGS, FOLDER, RECIPES, digest, digests

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

DIGESTS = json.loads((FOLDER / "digests.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FOLDER / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def program_of(name):
    """Returns the program of one of the runs, from today's files."""
    family, optimizer, _, lengths, sizes = RECIPES[name]
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{family}/tiny.gin", f"optimizers/{optimizer}.gin"),
        bindings=(
            *(word for word in (*BINDINGS.split(), *sizes.split()) if "MIXTURE" not in word),
            f"TASK_FEATURE_LENGTHS={lengths}",
        ),
    )
    return config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]


def named(tree):
    """Returns array name, as checkpoints have it -> digest."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {re.sub(r"[^\w]+", ".", jax.tree_util.keystr(path)).strip("."): digest(np.asarray(x)) for path, x in leaves}


@pytest.mark.parametrize("name", RECIPES)
def test_the_arrays_of_an_old_run_are_restored_bit_for_bit(runs, name):
    assert digests(runs / name / "checkpoints" / "2" / "state") == DIGESTS[name], "the files themselves"
    program = program_of(name)
    state, position = Checkpoints(runs / name / "checkpoints", read_only=True).restore(2, program.abstract_state)
    assert named(vars(state)) == DIGESTS[name] and position
    fresh = program.init().params
    begun = named({"params": Initial(str(runs / name)).restore(fresh, program.axes)})
    assert begun == {key: value for key, value in DIGESTS[name].items() if key.startswith("params.")}
    assert begun != named({"params": program.init().params})


@pytest.mark.parametrize(("name", "network"), [("t5", "t5"), ("lm", "lm")])
def test_the_recipe_of_an_old_run_is_told_what_to_write_and_is_then_read(runs, name, network, tmp_path):
    path = runs / name / "config.gin"
    mended = path.read_text()
    with pytest.raises(UserError) as error:
        config.load(Invocation("inspect", None, (str(path),)), import_unreferenced=False)
    heading, *lines = str(error.value).splitlines()
    assert heading == "5 modules of meshway have moved since the recipe was written; write:"
    for line in lines:
        new, old = re.fullmatch(r".*config\.gin:\d+: `(.*)`, not `(.*)`", line).groups()
        assert f"\n{old}\n" in mended
        mended = mended.replace(f"\n{old}\n", f"\n{new}\n")
    assert f"from meshway.models.language import {network}" in mended
    (tmp_path / "config.gin").write_text(mended)
    read = config.load(Invocation("inspect", None, (str(tmp_path / "config.gin"),)), import_unreferenced=False)
    assert read.macro("D_MODEL") == 4


@pytest.mark.parametrize(("name", "family"), [("t5", "t5"), ("lm", "llama")])
def test_an_old_run_is_given_to_hugging_face(runs, name, family, tmp_path):
    """Its recipe is read as text: where its modules are does not matter."""
    assert cli.main(["convert", f"--from={runs / name}", f"--to={tmp_path / 'out'}", f"--family={family}"]) == 0
    assert list((tmp_path / "out").glob("*.safetensors"))
