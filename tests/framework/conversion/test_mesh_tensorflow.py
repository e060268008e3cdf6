"""Mesh-TensorFlow's checkpoints come in as ours, array by array what T5X's importer makes of them."""

import copy
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from converted import params_of, whole
from tiers import tiers

from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion import t5x
from meshway.framework.conversion.mesh_tensorflow import MeshTensorFlowFiles, is_checkpoint, open_checkpoint
from meshway.framework.errors import UserError
from meshway.framework.trees import flatten, unflatten
from meshway.launch import cli, convert_in
from meshway.launch.convert import convert
from meshway.launch.recipe import bindings

GOLDENS = Path(__file__).parent.parent.parent / "goldens" / "mesh_tensorflow"
PREFIX = "model.ckpt-1000000"
SIZES = {"VOCAB_SIZE": 16, "D_MODEL": 6, "D_FF": 10, "NUM_HEADS": 2, "HEAD_DIM": 4, "NUM_BUCKETS": 8}
KINDS = {
    "t5_1_1": ("models/t5_1_1/common.gin", ("gelu", "linear"), False),
    "t5_1_0": ("models/t5/common.gin", ("relu",), True),
    "lm": ("models/t5x_decoder/common.gin", ("relu",), False),
}


def model_of(network, path):
    """Returns the model of a network, by a recipe written to `path`."""
    path.write_text(bindings.text_of(network.include, network.bindings))
    return bindings.build_network(path)[0]


def written(kind, folder, change):
    """Writes a golden, of which `change` alters the arrays by name, as another checkpoint; returns its prefix."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(GOLDENS / kind / PREFIX))
    arrays = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    change(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(folder / PREFIX),
        tensor_names=list(arrays),
        shape_and_slices=[""] * len(arrays),
        tensors=[tf.constant(each) for each in arrays.values()],
    )
    return folder / PREFIX


@pytest.mark.parametrize("kind", tiers(KINDS, quick=["t5_1_1"], slow=["t5_1_0", "lm"]))
def test_arrays_are_those_of_t5x_importer(kind, tmp_path):
    files, network = open_checkpoint(GOLDENS / kind)
    include, activations, tied = KINDS[kind]
    layers = {"NUM_LAYERS": 2} if kind == "lm" else {"NUM_ENCODER_LAYERS": 2, "NUM_DECODER_LAYERS": 2}
    assert network.include == include
    assert network.bindings == SIZES | {"ACTIVATIONS": activations, "TIED_LOGITS": tied} | layers
    expected = dict(np.load(GOLDENS / f"{kind}_expected.npz"))
    assert files.step == expected.pop("step") == 1_000_000 and files.num_slots > 0
    theirs = copy.copy(files)
    theirs._values = expected
    shapes = convert_in.shapes_of(model_of(network, tmp_path / "recipe.gin"))
    wanted = whole(t5x.network_of(theirs).values(theirs, shapes))
    found = whole(network.values(files, shapes))
    assert found.keys() == wanted.keys() == shapes.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, wanted[path])


@pytest.mark.slow
def test_a_run_starts_from_one_directly_or_converted(tmp_path):
    prefix = GOLDENS / "t5_1_1" / PREFIX
    convert(str(prefix), str(tmp_path / "run"))
    network = open_checkpoint(prefix)[1]
    model = model_of(network, tmp_path / "recipe.gin")
    fresh = model.init(jax.random.key(0))
    converted = flatten(params_of(tmp_path / "run", model))
    for path in (prefix, f"{prefix}.index", prefix.parent):
        initial = Initial(str(path))
        assert initial.known_step() == 1_000_000 and initial.is_here
        initial.check(fresh, model.axes())
    direct = flatten(initial.restore(unflatten(flatten(fresh)), model.axes()))
    for name, value in converted.items():
        np.testing.assert_array_equal(direct[name], value)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1000000"]
    with pytest.raises(UserError, match=r"is a checkpoint of Mesh-TensorFlow.*leave out Initial.renames"):
        Initial(str(prefix), renames=[("a", "b")]).restore(fresh, model.axes())


@pytest.mark.slow
def test_activations_are_those_of_operative_config(tmp_path):
    prefix = Path(shutil.copytree(GOLDENS / "t5_1_1", tmp_path / "t5")) / PREFIX
    config = tmp_path / "t5" / "operative_config.gin"
    config.write_text('DenseReluDense.activation = ["swish", "linear"]\nDenseReluDense.dropout_rate = 0.0\n')
    assert open_checkpoint(prefix)[1].bindings["ACTIVATIONS"] == ("silu", "linear")
    config.write_text("encoder/DenseReluDense.activation = 'relu'\ndecoder/DenseReluDense.activation = 'gelu'\n")
    with pytest.raises(UserError, match="DenseReluDense.activation = 'relu' and 'gelu': several"):
        open_checkpoint(prefix)
    config.write_text("SelfAttention.fold_scaling_into_initializer = False\n")
    with pytest.raises(UserError, match=r"operative_config.gin: .*fold_scaling.* attention scores are scaled"):
        open_checkpoint(prefix)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: remove(Path(f"{at}.data-00001-of-00002")), "incomplete: .*data-00001-of-00002 is missing"),
        (lambda at: cut(Path(f"{at}.data-00000-of-00002")), r"is truncated: [\d,]+ bytes, and the values .* take 12,"),
        (lambda at: cut(Path(f"{at}.index")), r"ckpt-1000000.index is truncated or damaged"),
        (lambda at: Path(f"{at}.data-00000-of-00002").write_bytes(bytes(5992)), "cannot be read from .*[Cc]hecksum"),
    ],
)
def test_damaged_files_are_said_and_end_with_two(damage, message, tmp_path, capsys):
    prefix = Path(shutil.copytree(GOLDENS / "t5_1_1", tmp_path / "t5")) / PREFIX
    damage(prefix)
    assert cli.main(["convert", f"--from={prefix}", f"--to={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def renamed(old, new):
    return lambda arrays: arrays.update({new: arrays.pop(old)})


WO = "decoder/block_001/layer_002/DenseReluDense/wo/kernel"
BIAS = "decoder/block_000/layer_000/SelfAttention/relative_attention_bias"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed(WO, f"{WO}s"), f"1 variable has no place in T5: {WO}s .nearest that has: {WO.replace('1', '0')}"),
        (lambda arrays: arrays.pop(WO), f"1 tensor is missing: {WO}"),
        (lambda arrays: arrays.update({WO: np.ones((11, 6), np.float32)}), rf"{WO} is \[11, 6\], not \[10, 6\]"),
        (renamed("shared/embedding", "encoder/embedding"), "an embedding for each stack .encoder/embedding, decoder/"),
        (lambda arrays: arrays.pop(BIAS), f"not a complete T5 of Mesh-TensorFlow: it has no {BIAS}"),
        (
            lambda arrays: arrays.update({"encoder/positional_embedding": np.ones((8, 6), np.float32)}),
            "no place in T5: encoder/positional_embedding",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named(change, message, tmp_path):
    files, network = open_checkpoint(GOLDENS / "t5_1_1")
    shapes = convert_in.shapes_of(model_of(network, tmp_path / "recipe.gin"))
    with pytest.raises(UserError, match=message):
        files, network = open_checkpoint(written("t5_1_1", tmp_path, change))
        network.values(files, shapes)


@pytest.mark.slow
def test_what_the_verb_refuses(tmp_path, monkeypatch):
    prefix = GOLDENS / "t5_1_1" / PREFIX
    assert is_checkpoint(prefix) and not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are \[1000000\]"):
        convert(str(prefix.parent), str(tmp_path / "run"), step=7)
    with pytest.raises(UserError, match="is Mesh-TensorFlow's, whose optimizer state is not converted"):
        convert(str(prefix), str(tmp_path / "run"), optimizer_state=True)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="Mesh-TensorFlow's checkpoints need TensorFlow, which cannot be imported"):
        MeshTensorFlowFiles(prefix)
    assert list(tmp_path.iterdir()) == []
