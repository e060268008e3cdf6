"""A run starts from a model whose vocabulary has another size: entries that both have keep their bits."""

import re

import jax
import numpy as np
import pytest
from converted import HUGGING_FACE, t5x_runs, whole
from tiny import program

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion.hugging_face import open_model
from meshway.framework.conversion.t5x import network_of
from meshway.framework.conversion.t5x_files import T5XFiles
from meshway.framework.errors import UserError
from meshway.framework.trees import flatten

SMALL = ("D_MODEL=16", "D_FF=24", "NUM_HEADS=2", "HEAD_DIM=8")
OLD = 64


def made(size, layout="single"):
    """A model with a table and logits of its own."""
    given = (*SMALL, "NUM_KV_HEADS=2", "TIED_LOGITS=False", f"VOCAB_SIZE={size}")
    return program("llama", *given, optimizer="sgd", layout=layout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the run directory of a model of `OLD` entries, its parameters)."""
    folder = tmp_path_factory.mktemp("run")
    params = jax.tree.map(lambda leaf: leaf + 0.125, made(OLD).init().params)  # none is as a fresh model has it
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save_params(params, 3)
    checkpoints.close()
    return folder, flatten(jax.device_get(params))


@pytest.mark.parametrize(
    "family, size, resize", [("bert", 80, "mean"), ("gpt2", 48, "shrink"), ("t5_1_1", 80, "fresh")]
)
def test_every_family_has_its_vocabulary_found(family, size, resize):
    """By the axis, whatever the parameters are called: tables, logits, biases over the vocabulary."""
    small = program(family, f"VOCAB_SIZE={OLD}", optimizer="sgd")
    here = program(family, f"VOCAB_SIZE={size}", optimizer="sgd")
    schema = {f"params/{name}": [list(leaf.shape), "float32"] for name, leaf in flatten(small.param_shapes).items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(here.param_shapes).items()}
    found = Initial("x", resize=resize).sources(shapes, flatten(here.axes), schema)
    changed = {name for name, shape in shapes.items() if list(shape) != schema[f"params/{name}"][0]}
    assert {name for name, source in found.items() if source.resize} == changed != set()
    assert found.keys() == shapes.keys()


def check(found, fresh, old, axes, how):
    """Compares parameters with the old ones: all entries that both have, and those that are new."""
    resized = 0
    for name, value in found.items():
        value, names = np.asarray(value), axes[name]
        if "vocab" not in names:
            np.testing.assert_array_equal(value, old[name], err_msg=name)
            continue
        resized += 1
        dim = names.index("vocab")
        value, before, initial = (np.moveaxis(np.asarray(each), dim, 0) for each in (value, old[name], fresh[name]))
        both = min(len(value), len(before))
        np.testing.assert_array_equal(value[:both], before[:both], err_msg=name)
        if how == "fresh":
            np.testing.assert_array_equal(value[both:], initial[both:], err_msg=name)
        elif how == "mean":
            mean = np.broadcast_to(before.mean(axis=0), value[both:].shape)
            np.testing.assert_allclose(value[both:], mean, rtol=1e-5, atol=1e-6, err_msg=name)
    return resized


@pytest.mark.parametrize("how, size", [("mean", 72), ("fresh", 72), ("shrink", 56)])
def test_entries_that_both_have_keep_their_bits(saved, how, size):
    folder, old = saved
    here = made(size)
    fresh = here.init().params
    found = flatten(Initial(str(folder), resize=how).restore(fresh, here.axes))
    assert check(found, flatten(fresh), old, flatten(here.axes), how) == 2


def test_resized_in_the_shards_of_a_mesh(tmp_path):
    """Of a table that the mesh cuts along the vocabulary, although it does not divide the old size."""
    params = made(60).init().params
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save_params(params, 0)
    checkpoints.close()
    here = made(72, layout="model_1d")
    fresh = here.init().params
    table = flatten(fresh)["token_embedding/embedding"]
    assert not table.sharding.is_fully_replicated
    found = flatten(Initial(str(tmp_path), resize="mean").restore(fresh, here.axes))
    assert found["token_embedding/embedding"].sharding == table.sharding
    check(found, flatten(fresh), flatten(jax.device_get(params)), flatten(here.axes), "mean")


@pytest.mark.parametrize(
    "size, resize, words",
    [
        (72, None, ["a vocabulary of 72", "one of 64", "grew set Initial.resize = 'mean'", "'fresh'"]),
        (72, "shrink", ["Initial.resize is 'shrink'", "grew set Initial.resize = 'mean'"]),
        (56, None, ["one of 64: to drop the last 8 entries set Initial.resize = 'shrink'"]),
        (56, "mean", ["Initial.resize is 'mean'", "set Initial.resize = 'shrink'"]),
        (64, "mean", ["no vocabulary of the model has another size"]),
    ],
)
def test_another_size_is_named(saved, size, resize, words):
    folder, _ = saved
    here = made(size)
    with pytest.raises(UserError) as error:
        Initial(str(folder), resize=resize).restore(here.abstract_state.params, here.axes)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "Initial.renames" not in str(error.value)


@pytest.mark.parametrize("value", ["meen", "zeros", True, 3])
def test_an_unknown_way_to_resize(value):
    with pytest.raises(UserError, match=re.escape(f"Initial.resize = {value!r} is not a way")):
        Initial("x", resize=value)


def stored(model, size, fresh, axes):
    """Returns the parameters of a model of `size` entries, given those of another size."""
    shapes = {}
    for name, leaf in flatten(fresh).items():
        dims = zip(leaf.shape, axes[name], strict=True)
        shapes[name] = tuple(size if axis == "vocab" else dim for dim, axis in dims)
    return whole(model(shapes))


@pytest.mark.parametrize("how, size", [("fresh", 75), ("shrink", 60), (None, 75)])
def test_from_a_hugging_face_directory(how, size):
    model = open_model(HUGGING_FACE / "llama3")
    sizes = ("D_MODEL", "D_FF", "NUM_HEADS", "NUM_KV_HEADS", "HEAD_DIM", "NUM_LAYERS", "TIED_LOGITS")
    bindings = [f"{name}={model.bindings[name]!r}" for name in sizes]
    here = program("llama", *bindings, f"VOCAB_SIZE={size}", optimizer="sgd", layout="single")
    fresh, axes = here.init().params, flatten(here.axes)
    initial = Initial(str(model.directory), resize=how)
    if how is None:
        with pytest.raises(UserError, match=f"a vocabulary of {size} and .* one of 67: .*Initial.resize = "):
            initial.restore(fresh, here.axes)
        return
    old = stored(model.values, 67, fresh, axes)
    assert check(flatten(initial.restore(fresh, here.axes)), flatten(fresh), old, axes, how) == 2


@pytest.mark.slow
def test_from_a_checkpoint_of_t5x(tmp_path):
    directory = t5x_runs(tmp_path, "decoder_native")["decoder_native"]
    files = T5XFiles(directory)
    network = network_of(files)
    size = network.bindings["VOCAB_SIZE"]
    bindings = [f"{name}={value!r}" for name, value in network.bindings.items() if name != "VOCAB_SIZE"]
    here = program("t5x_decoder", *bindings, f"VOCAB_SIZE={size + 5}", optimizer="sgd")
    fresh, axes = here.init().params, flatten(here.axes)
    old = stored(lambda shapes: network.values(files, shapes), size, fresh, axes)
    found = flatten(Initial(str(directory), resize="mean").restore(fresh, here.axes))
    assert check(found, flatten(fresh), old, axes, "mean") >= 1
    with pytest.raises(UserError, match=r"is a checkpoint of T5X.*leave out Initial.renames"):
        Initial(str(directory), renames=[("a", "b")]).restore(fresh, here.axes)
