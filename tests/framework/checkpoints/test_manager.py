"""Checkpoints: exact, of no mesh, and clear about what is wrong with them."""

import functools
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiers import tiers
from tiny import losses, program

from meshway.framework import errors
from meshway.framework.checkpoints.manager import Checkpoints, DamagedCheckpoint, Keep, read_last
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.errors import UserError

POSITION = {"epoch": 1, "row": 48}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 6 steps under fsdp_model, saved at 3, and the losses of all six."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    made = program("t5_1_1", layout="fsdp_model", optimizer="adafactor")
    _, state = losses(made, 3)
    checkpoints = Checkpoints(folder, recipe="# the recipe")
    checkpoints.save(state, 3, POSITION, {"validation/loss": 2.0})
    host = jax.device_get(state)  # before the state is donated on
    rest, _ = losses(made, 3, state, first=3)  # while the save may still be running
    checkpoints.close()
    return folder, host, rest


MESHES = [("fsdp_model", 8), ("data", 2), ("single", 1), ("model_2d", 8)]


@pytest.mark.parametrize("layout, devices", tiers(MESHES, quick=MESHES[1:2], slow=[MESHES[0], *MESHES[2:]]))
def test_a_checkpoint_goes_on_any_mesh(saved, layout, devices):
    folder, host, rest = saved
    size = ["mesh.MeshShape.ici={'data': 2}"] if devices == 2 else []
    made = program("t5_1_1", *size, layout=layout, optimizer="adafactor")
    assert made.partitioner.mesh.size == devices
    checkpoints = Checkpoints(folder, read_only=True)
    state, position = checkpoints.restore(3, made.abstract_state)
    assert position == POSITION
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), host)
    jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted or pytest.fail(str(wanted)), state, made.state_shardings)
    found, _ = losses(made, 3, state, first=3)
    if layout == "fsdp_model":
        assert found == rest
    np.testing.assert_allclose(found, rest, rtol=1e-5)


def test_the_recipe_is_inside(saved):
    recipe = Checkpoints(saved[0], read_only=True).recipe(3)
    assert recipe["gin"] == "# the recipe"
    assert recipe["schema"]["params/token_embedding/embedding"] == [[256, 64], "float32"]


def test_another_model_is_explained(saved):
    made = program("t5_1_1", "D_FF=256", "NUM_DECODER_LAYERS=2", optimizer="adafactor")
    with pytest.raises(UserError) as error:
        Checkpoints(saved[0], read_only=True).restore(3, made.abstract_state)
    message = str(error.value)
    assert "another model or optimizer" in message
    assert (
        "params/decoder/block_0/attention/key/kernel is float32[1,64,4,16] there and float32[2,64,4,16] here" in message
    )
    with pytest.raises(UserError, match="not in the checkpoint: opt_state"):
        Checkpoints(saved[0], read_only=True).restore(3, program("t5_1_1").abstract_state)


def test_a_truncated_checkpoint_is_told_and_the_one_before_named(saved, tmp_path):
    folder, _, _ = saved
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    shutil.copytree(folder / "3", copy / "2")
    largest = max((copy / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    made = program("t5_1_1", optimizer="adafactor")
    with pytest.raises(DamagedCheckpoint, match=r"truncated, damaged.*params|opt_state.*Step 2 is there too"):
        Checkpoints(copy, read_only=True).restore(3, made.abstract_state)
    with pytest.raises(DamagedCheckpoint, match="Remove that folder to continue from step 2"):
        Checkpoints(copy).restore(3, made.abstract_state)


def test_arrays_that_come_after_a_failed_read_say_nothing(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: heard.append(str(found.exc_value)))
    errors.quiet_closed_loops.__wrapped__()

    class Late:
        def __init__(self, words):
            self.words = words

        def __del__(self):
            raise RuntimeError(self.words)

    for words in ("Event loop is closed", "another error", "Event loop is closed"):
        Late(words)
    assert heard == ["another error"]


def test_the_last_that_can_be_read_is_taken_and_nothing_is_renamed(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / str(step)).mkdir()

    def read(step, bad=(2, 3)):
        if step in bad:
            raise DamagedCheckpoint(f"checkpoint {step}: DATA_LOSS")
        return f"of {step}"

    said = []
    checkpoints = SimpleNamespace(steps=lambda: [1, 2, 3, 4])
    assert read_last(checkpoints, 3, read, said.append) == (1, "of 1")
    assert said == ["checkpoint 3: DATA_LOSS; taking step 2", "checkpoint 2: DATA_LOSS; taking step 1"]
    assert read_last(checkpoints, 4, read, said.append) == (4, "of 4") and len(said) == 2
    with pytest.raises(DamagedCheckpoint, match="checkpoint 4"):
        read_last(checkpoints, 4, functools.partial(read, bad=(1, 2, 3, 4)), said.append)
    with pytest.raises(UserError, match="another model"):  # this is none: all of a run's checkpoints are of one model
        read_last(checkpoints, 4, lambda step: (_ for _ in ()).throw(UserError("another model")), said.append)


def steps_kept(folder, state, keep, metrics):
    checkpoints = Checkpoints(folder, keep)
    for step, value in metrics.items():
        checkpoints.save(state, step, POSITION, {} if value is None else {"score": value})
    checkpoints.close()
    return checkpoints.steps()


def test_which_checkpoints_are_kept(tmp_path):
    values = {1: 3.0, 2: 1.0, 3: 5.0, 4: 4.0, 5: None}
    state = program("lm").init()
    assert steps_kept(tmp_path / "a", state, Keep(latest=2), values) == [4, 5]
    assert steps_kept(tmp_path / "b", state, Keep(latest=1, every=2), values) == [2, 4, 5]
    assert steps_kept(tmp_path / "c", state, Keep(latest=1, best=1, metric="score"), values) == [2, 5]
    assert steps_kept(tmp_path / "d", state, Keep(latest=1, best=1, metric="score", highest=True), values) == [3, 5]
    assert steps_kept(tmp_path / "e", state, Keep(latest=None), values) == [1, 2, 3, 4, 5]
    rarely = {1: 3.0, 2: None, 3: 1.0, 4: None, 5: 2.0}  # most steps are not evaluated
    assert steps_kept(tmp_path / "f", state, Keep(latest=1, best=1, metric="score"), rarely) == [3, 5]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the checkpoint folder"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_parameters_move_to_another_model_by_renames(saved):
    """The encoder becomes a language model's decoder; its output layer stays fresh."""
    folder, host, _ = saved
    made = program("lm", "attention.Attention.rotary=None")
    state = made.init()
    initial = Initial(
        str(folder.parent),
        renames=[("decoder/(.*)", r"encoder/\1"), ("decoder_norm/(.*)", r"encoder_norm/\1")],
        left_at_init=["logits/kernel"],
    )
    params = initial.restore(state.params, made.axes)
    np.testing.assert_array_equal(
        params["decoder"]["block_0"]["mlp"]["wo"]["kernel"],
        host.params["encoder"]["block_0"]["mlp"]["wo"]["kernel"],
    )
    np.testing.assert_array_equal(params["token_embedding"]["embedding"], host.params["token_embedding"]["embedding"])
    np.testing.assert_array_equal(params["logits"]["kernel"], state.params["logits"]["kernel"])


@pytest.fixture(scope="module")
def another():
    """Parameters of another model, and their axes."""
    made = program("lm", "D_FF=192")
    return made.init().params, made.axes


@pytest.mark.parametrize(
    "initial, words",
    [
        ({}, ["decoder_norm", "pattern"]),
        ({"renames": [("decodr/(.*)", "x")]}, ["pattern 'decodr/(.*)' matches no parameter"]),
        ({"left_at_init": ["decoder/.*", "decoder_norm/.*"], "step": 7}, ["no checkpoint of step 7", "[3]"]),
        ({"renames": [("decoder/(.*)", r"enc0der/\1")]}, ["no 'enc0der/block_0", "nearest: encoder/block_0"]),
    ],
)
def test_what_a_partial_restore_refuses(saved, another, initial, words):
    if not initial:
        words = ["has shape", "Initial.left_at_init"]
    with pytest.raises(UserError) as error:
        Initial(str(saved[0].parent), **initial).restore(*another)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_path_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="neither a run directory nor a checkpoint"):
        Initial(str(tmp_path)).restore({}, {})


def test_parameters_are_read_in_the_precision_that_is_asked_for(tmp_path):
    """A converted model keeps the precision of its files, and is evaluated in that of its recipe."""
    stored = {"table": jax.random.normal(jax.random.key(0), (3, 4)).astype("bfloat16")}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_params(stored, 0)
    checkpoints.wait()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    wanted = {"table": jax.ShapeDtypeStruct((3, 4), "float32", sharding=sharding)}
    found = checkpoints.load_params(0, wanted)["table"]
    assert found.dtype == "float32" and found.sharding == sharding
    np.testing.assert_array_equal(found, stored["table"].astype("float32"))
    with pytest.raises(UserError, match=r"table is bfloat16\[3,4\] there and bfloat16\[3,5\] here"):
        checkpoints.load_params(0, {"table": jax.ShapeDtypeStruct((3, 5), "bfloat16", sharding=sharding)})
    checkpoints.close()


def test_coroutines_that_orbax_leaves_behind_are_not_shown(monkeypatch):
    """Thrown away after a failed read, each would add a traceback to the one message."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    errors.quiet_closed_loops.__wrapped__()
    for path in ("site-packages/orbax/checkpoint/_src/serialization.py", "site-packages/mine.py"):
        left = SimpleNamespace(cr_code=SimpleNamespace(co_filename=path))
        sys.unraisablehook(SimpleNamespace(exc_value=Exception("while reading array index"), object=left))
    assert [each.object.cr_code.co_filename for each in shown] == ["site-packages/mine.py"]
