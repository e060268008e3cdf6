"""A mixture of experts starts from a dense run's checkpoint as the dense model it is made of."""

import jax
import numpy as np
import pytest
from tiny import program

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.checkpoints.sources import Source
from meshway.framework.errors import UserError
from meshway.framework.trees import flatten
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

SMALL = ("NUM_LAYERS=4", "D_MODEL=16", "D_FF=24", "NUM_HEADS=2", "HEAD_DIM=8", "VOCAB_SIZE=64", "SCAN=True")
EVERY_LAYER = ("blocks.SelfAttentionBlock.mlp=@moe.MoeMlp",)
EVERY_SECOND = (
    "stack.Stack.blocks=[@blocks.SelfAttentionBlock, @sparse/blocks.SelfAttentionBlock]",
    "blocks.SelfAttentionBlock.mlp=@mlp.Mlp",
    "sparse/blocks.SelfAttentionBlock.mlp=@moe.MoeMlp",
)


def upcycled(folder, *bindings, layout="single"):
    """Returns the program of a mixture of experts like the dense model, and what its recipe starts from."""
    invocation = Invocation(
        verb="train",
        gin_files=("models/mixtral/tiny.gin", "optimizers/sgd.gin", "initial/upcycle.gin"),
        bindings=(
            *SMALL,
            "NUM_KV_HEADS=None",
            "ROPE_BASE=10000.0",
            "NORM_EPSILON=1e-06",
            "Z_LOSS=0.0001",
            "MODEL_DIR='unused'",
            "MIXTURE_OR_TASK_NAME='none'",
            "TRAIN_STEPS=1",
            "BATCH_SIZE=16",
            "TASK_FEATURE_LENGTHS={'targets': 16}",
            f"UPCYCLE_FROM='{folder}'",
            f"LAYOUT='{layout}'",
            *bindings,
        ),
    )
    arguments = config.load(invocation, import_unreferenced=False).build("train.train", given=["data", "resolved"])
    return arguments["program"], arguments["initial"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The run directory of a dense model of four layers, its parameters and its loss."""
    folder = tmp_path_factory.mktemp("dense")
    made = program("lm", *SMALL, optimizer="sgd", layout="data")
    state = made.init()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(state, 7, {}, {})
    checkpoints.close()
    return folder, flatten(jax.device_get(state.params)), loss(made, state.params)


def loss(made, params):
    batch = made.synthetic_batch()
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        batch[name] = batch[name] % 64
    with made.partitioner.activate():
        return float(
            jax.jit(lambda params, batch: made.model.loss(params, batch, None)[0])(params, made.shard_batch(batch))
        )


@pytest.mark.slow
@pytest.mark.parametrize("bindings, layout", [(EVERY_LAYER, "single"), (EVERY_SECOND, "fsdp_expert")])
def test_the_loss_is_the_dense_models(dense, bindings, layout):
    folder, weights, expected = dense
    made, initial = upcycled(folder, *bindings, layout=layout)
    state = made.init()
    params = initial.restore(state.params, made.axes)
    np.testing.assert_allclose(loss(made, params), expected, rtol=1e-5)
    found, fresh = flatten(params), flatten(state.params)
    for name, leaf in found.items():
        assert leaf.sharding == fresh[name].sharding and leaf.dtype == fresh[name].dtype, name
        if "router" in name:
            np.testing.assert_array_equal(leaf, fresh[name])
    period = len(bindings) // 2 + 1
    for block in range(period):
        taken = slice(block, None, period)
        name = f"decoder/block_{block}/attention/query/kernel"
        np.testing.assert_array_equal(found[name], weights["decoder/block_0/attention/query/kernel"][taken])
    experts = np.asarray(found[f"decoder/block_{period - 1}/mlp/experts/wo"])
    assert experts.shape[1] == 4
    for expert in range(4):
        np.testing.assert_array_equal(experts[:, expert], weights["decoder/block_0/mlp/wo/kernel"][taken])
    buffers = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in found.values()]
    assert len(set(buffers)) == len(buffers), "each can be donated"


AXES = {
    "block_0/wi": ("layers", "embed"),
    "block_1/wi": ("layers", "expert", "embed"),
    "block_2/wi": ("layers", "embed"),
    "block_3/wi": ("expert", "layers", "embed"),
}
SHAPES = {"block_0/wi": (3, 5), "block_1/wi": (3, 2, 5), "block_2/wi": (3, 5), "block_3/wi": (2, 3, 5)}
UPCYCLE = {"by_depth": True, "repeat_along": ["expert"]}


def saved(**shapes):
    return {"params/" + name.replace("__", "/"): [list(shape), "float32"] for name, shape in shapes.items()}


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_layers_keep_their_depth_whatever_the_order_of_axes(blocks):
    """Layer l of the checkpoint holds l everywhere: so must layer l of the model."""
    schema = saved(**{f"block_{i}__wi": (12 // blocks, 5) for i in range(blocks)})
    sources = Initial("run", **UPCYCLE).sources(SHAPES, AXES, schema)
    for name, source in sources.items():
        block = int(source.name[6])
        layers = np.arange(block, 12, blocks, dtype=np.float32)
        leaf = jax.numpy.zeros(SHAPES[name])
        found = np.asarray(source.put(jax.numpy.broadcast_to(layers[:, None], source.shape), leaf, True))
        own = np.arange(int(name[6]), 12, 4)
        expected = own[:, None] if name[6] in "02" else own[:, None, None] if name[6] == "1" else own[None, :, None]
        np.testing.assert_array_equal(found, np.broadcast_to(expected, SHAPES[name]))


def test_layers_need_not_come_first():
    values = np.arange(60, dtype=np.float32).reshape(5, 12)
    source = Source.of("wo", (5, 12), (5, 2, 3), ("embed", "expert", "layers"), 1, 4, ["expert"])
    found = np.asarray(source.put(jax.numpy.asarray(values), jax.numpy.zeros((5, 2, 3)), True))
    np.testing.assert_array_equal(found, np.broadcast_to(values[:, None, 1::4], (5, 2, 3)))


@pytest.mark.parametrize(
    "schema, options, words",
    [
        (saved(block_0__wi=(9, 5)), {}, ["block_0/wi has shape [3, 5] but 'block_0/wi' has [9, 5] (every 4th layer"]),
        (saved(block_0__wi=(12, 6)), {}, ["block_1/wi has shape [3, 2, 5]", "block_2/wi", "upcycle.gin"]),
        (saved(block_0__wi=(4, 5), block_1__wi=(4, 5), block_2__wi=(4, 5)), {}, ["a pattern of 4 blocks", "of 3"]),
        (saved(block_0__wi=(12, 5)), {"repeat_along": ["experts"]}, ["block_1/wi has shape [3, 2, 5]"]),
        (saved(block_0__wi=(12, 5)), {"repeat_along": ["expert", "stage"]}, ["repeat_along has 'stage'"]),
        (
            saved(block_0__wi=(12, 5)),
            {"by_depth": False},
            ["no 'block_3/wi'", "block_0/wi has shape [3, 5]"],
        ),
    ],
)
def test_what_does_not_fit_is_listed(schema, options, words):
    with pytest.raises(UserError) as error:
        Initial("run", **(UPCYCLE | options)).sources(SHAPES, AXES, schema)
    assert all(word in str(error.value) for word in words), str(error.value)
