"""The Vision Transformer as a model of the framework: patches, positions, classes, and what padding must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VISION

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import decoding_model
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
from meshway.models.objectives import Classifier
from meshway.models.vision import vit


def program(family, *bindings, layout="single"):
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{family}/tiny.gin", "optimizers/adamw.gin"),
        bindings=("BATCH_SIZE=16", "NUM_LAYERS=2", "D_FF=32", f"LAYOUT='{layout}'", *bindings),
    )
    return config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]


@pytest.fixture(scope="module")
def made():
    return program("v_moe", "GROUP_ROWS=16", "EVAL_CAPACITY_FACTOR=0.5")


@pytest.fixture(scope="module")
def batch(made):
    random = np.random.default_rng(0)
    image, label = random.random((16, 8, 8, 1), np.float32), random.integers(0, 10, 16).astype(np.int32)
    return {"image": image, "label": label, "loss_weights": np.ones(16, np.float32)}


def test_patches_are_squares_in_rows():
    image = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(vit.patches_of(jnp.asarray(image), 2))
    assert patches.shape == (2, 6, 12)
    for place, (row, column) in enumerate(np.ndindex(2, 3)):
        square = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patches[:, place], square.reshape(2, -1))


def test_positions_against_their_definition():
    found = np.asarray(vit.PatchPositions(2, 3, 8)())
    for place, (row, column) in enumerate(np.ndindex(2, 3)):
        angles = [np.array([1.0, 1e-4]) * at for at in (row, column)]
        expected = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)])
        np.testing.assert_allclose(found[place], expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        vit.PatchPositions(2, 3, 6)


def test_patches_must_tile_the_image():
    with pytest.raises(Exception, match="patches of 3 do not tile images of 8 x 8"):
        program("vit", "PATCH_SIZE=3")


def test_the_loss_is_the_mean_of_the_scores(made, batch):
    params = made.init().params
    weights = batch["loss_weights"].copy()
    weights[10:] = 0
    batch = batch | {"loss_weights": weights}
    loss, weight, metrics = jax.jit(lambda p, b: made.model.loss(p, b, None))(params, batch)
    scores = np.asarray(jax.jit(made.model.score)(params, batch))
    assert scores.shape == (16, 1) and float(weight) == 10 and not scores[10:].any()
    np.testing.assert_allclose(loss, -scores.sum(), rtol=1e-6)
    assert 0.4 < float(np.divide(*metrics["encoder/router/drop_rate/layer_00"])) < 0.9
    other = batch | {"image": batch["image"].copy()}
    other["image"][10:] = 7.0  # padding takes no room with experts: nothing that counts may change
    np.testing.assert_array_equal(jax.jit(made.model.score)(params, other), scores)


def test_a_classifier_has_nothing_to_decode():
    model = Classifier(lambda *, rngs: None, (8, 8, 1))
    with pytest.raises(UserError, match="Classifier has no decoder: it neither predicts nor scores text"):
        decoding_model(model)


@pytest.mark.parametrize("family, layout", [("vit", "fsdp_model"), ("v_moe", "expert")])
def test_layouts_fit(family, layout):
    assert family in VISION
    program(family, layout=layout).trace_loss()
