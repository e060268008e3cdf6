"""What a step needs of a device: against closed forms, and against what XLA makes of it on eight simulated devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from tiny import program

from meshway.framework.axes import sharded_by
from meshway.framework.errors import UserError
from meshway.framework.planning.memory import TOLERANCE, Memory, _Liveness, _tiled, step_memory
from meshway.framework.planning.shard_sizes import Propagation, read_function
from meshway.framework.planning.topology import CHIPS, chip_named
from meshway.launch import cli

SMALL = ("SCAN=True", "BATCH_SIZE=32", "D_MODEL=32", "D_FF=64", "NUM_HEADS=2", "HEAD_DIM=16")
LAYERS = {"lm": "NUM_LAYERS={}", "t5_1_1": "NUM_DECODER_LAYERS={}"}


def memory(family, *bindings, layers=4, layout="single") -> Memory:
    return step_memory(program(family, *SMALL, LAYERS[family].format(layers), *bindings, layout=layout))


def test_a_layer_under_full_remat_keeps_its_input_and_no_more():
    """And each device its rows of it; of a microbatch, not of the batch."""
    kept = 4 * 32 * 16 * 32 * 4  # layers, rows, length, width, bytes
    for layout, microbatches, parts in (("single", 1, 1), ("fsdp", 1, 8), ("fsdp", 4, 32)):
        bindings = ("REMAT='full'", f"NUM_MICROBATCHES={microbatches}")
        few, many = (memory("lm", *bindings, layers=n, layout=layout) for n in (4, 8))
        grown = many.activations - few.activations
        sums = many.gradients - few.gradients if microbatches > 1 else 0  # of the microbatches before
        assert grown - sums == pytest.approx(kept / parts, rel=0.1), (layout, microbatches)


def test_what_is_kept_follows_the_remat_policy_and_the_rest_does_not():
    found = {remat: memory("lm", f"REMAT='{remat}'", layers=8) for remat in ("none", "minimal", "full")}
    assert found["none"].activations > 1.5 * found["minimal"].activations > 2 * found["full"].activations
    assert len({(each.parameters, each.optimizer, each.gradients, each.batch) for each in found.values()}) == 1
    assert found["none"].gradients == found["none"].parameters


def test_activations_are_kept_by_name_on_the_device_or_beside_it():
    """What four more layers add: their inputs, [rows, length, d_model], and both products of gated feed-forward layers,
    [rows, length, d_ff], float32. Offloaded ones are in no device's memory."""
    stream, hidden = 4 * 32 * 16 * 32 * 4, 4 * 2 * 32 * 16 * 64 * 4
    wanted = {
        "{'layer_input': 'device', 'mlp_wi': 'device'}": stream + hidden,
        "{'mlp_wi': 'offload'}": stream,  # each period's input is kept in any case
        "{'layer_input': 'offload', 'mlp_wi': 'offload'}": 0,
    }
    for remat, kept in wanted.items():
        few, many = (memory("lm", f"REMAT={remat}", layers=layers).activations for layers in (4, 8))
        assert many - few == pytest.approx(kept, abs=0.1 * stream), remat


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_xla_s_buffers_are_as_large_within_the_tolerance(family, remat):
    """Temporary ones, of the compiled step on eight devices; its loops as on accelerators, not unrolled."""
    made = program(
        family, *SMALL[:1], "BATCH_SIZE=64", LAYERS[family].format(6), f"REMAT='{remat}'", layout="fsdp_model"
    )
    counted = step_memory(made)
    counted = counted.gradients + counted.activations
    compiled = made.compile_step().memory_analysis().temp_size_in_bytes
    assert 1 / TOLERANCE < counted / compiled < TOLERANCE, (counted, compiled)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [("lm", "fsdp_model"), ("t5_1_1", "zero_1")])
def test_xla_holds_state_and_gradients_of_exactly_these_sizes(family, layout):
    made = program(family, *SMALL, LAYERS[family].format(2), layout=layout)
    counted, compiled = step_memory(made), made.compile_step().memory_analysis()
    assert compiled.argument_size_in_bytes == counted.parameters + counted.optimizer + counted.batch
    step, where = jax.ShapeDtypeStruct((), jnp.int32), made.state_shardings.params
    gradients = made.partitioner.compile(
        lambda params, batch, step: made._step.gradients(params, batch, step)[0],
        *(made.param_shapes, made.abstract_batch, step),
        in_shardings=(where, made.batch_shardings, made.partitioner.replicated),
        out_shardings=where,
    )
    pointers = 8 * len(jax.tree.leaves(where))  # XLA:CPU counts those of a tuple
    assert gradients.memory_analysis().output_size_in_bytes - pointers == counted.gradients


def peak(function, *shapes, sparse_cores=False) -> int:
    """The bytes at the peak of a function of arrays, beside its arguments."""
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    found = read_function(jax.make_jaxpr(function)(*given))
    liveness = _Liveness({}, sparse_cores=sparse_cores)
    return liveness.peak(found, [((),) * len(each.shape) for each in given], [None] * len(found.gives))


def test_a_cross_entropy_holds_its_logits_and_their_gradient_takes_their_place():
    """Exponentials are computed again, the chosen logit is no array of all, nor is its gradient; but SparseCores take
    it from an array, in float32."""
    rows, vocab = 64, 4096

    def loss(logits, targets):
        logits = logits.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def step(x, kernel, targets):
        return jax.grad(lambda x: loss(x @ kernel, targets))(x)

    wanted = rows * vocab * 2  # in bfloat16
    shapes = (((2, rows // 2, 8), jnp.bfloat16), ((8, vocab), jnp.bfloat16), ((2, rows // 2), jnp.int32))
    assert wanted <= peak(step, *shapes) < 1.02 * wanted
    assert 3 * wanted <= peak(step, *shapes, sparse_cores=True) < 1.02 * 3 * wanted


def test_what_a_loop_collects_twice_is_held_once():
    def collect(twice):
        def body(carry, x):
            y = jnp.tanh(carry @ x)
            return y, (y, checkpoint_name(y, "again") if twice else y[0])

        return lambda carry, xs: jax.lax.scan(body, carry, xs)[1]

    shapes = (((64, 64), jnp.float32), ((8, 64, 64), jnp.float32))
    assert peak(collect(True), *shapes) < 1.05 * peak(collect(False), *shapes)


def test_a_gathered_weight_is_held_from_its_first_product_to_its_last():
    """x [rows/4, wide], w [wide/4, narrow]: gathered once, for both products."""

    def twice(x, y, w):
        return x @ w, y @ w

    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 64), (8, 64), (64, 16))]
    found = read_function(jax.make_jaxpr(twice)(*given))
    held = _Liveness({"fsdp": 4}).peak(found, [(("fsdp",), ())] * 2 + [(("fsdp",), ())], [None, None])
    assert held == 4 * (64 * 16 + 2 * 2 * 16)


def test_products_on_shards_gather_one_weight_and_sum_one_gradient_at_a_time():
    """Weights [wide/8, wide] outside are whole inside, their gradients again sharded outside."""
    mesh, wide = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,)), 256

    def local(x, v, w):
        return jax.lax.psum(x.T @ (x @ v), "fsdp"), jax.lax.psum(x.T @ (x @ w), "fsdp")

    specs = (PartitionSpec("fsdp"), PartitionSpec(), PartitionSpec())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(),) * 2, check_vma=False)
    found = read_function(
        jax.make_jaxpr(mapped)(*(jax.ShapeDtypeStruct((n, wide), jnp.float32) for n in (8, wide, wide)))
    )
    sharded, whole = (("fsdp",), ()), 4 * wide * wide
    held = _Liveness({"fsdp": 8}).peak(found, [sharded] * 3, [sharded] * 2)
    assert whole <= held < 1.5 * whole  # four of them otherwise


def test_slices_that_shards_read_are_made_one_after_the_other():
    mesh, size = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,)), 128

    def body(x, weights):
        on_shards = jax.shard_map(
            lambda x, v, w: (x @ v) @ w, mesh=mesh, in_specs=(PartitionSpec(),) * 3, out_specs=PartitionSpec()
        )
        return on_shards(x, *weights), None

    stacked = ((4, size, size), jnp.float32)
    held = peak(lambda x, v, w: jax.lax.scan(body, x, (v, w))[0], ((2, size), jnp.float32), stacked, stacked)
    assert 4 * size * size <= held < 1.5 * 4 * size * size  # both at once otherwise


def test_tpus_pad_the_two_dimensions_that_take_least():
    """A head of 64 lies along sublanes where the width beside it fills the lanes (these sizes are XLA:TPU's)."""
    shapes = {(24, 64, 16, 64): 24 * 64 * 16 * 128, (16, 128, 32, 64): 16 * 128 * 32 * 64, (24, 16, 64): 24 * 16 * 128}
    shapes |= {(50257, 64): 64 * 50304, (48,): 128, (): 128}
    assert {shape: _tiled(shape) for shape in shapes} == shapes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: x @ y, ["a", "c"]),
        (lambda x, y: (x.T * 2).sum(1, keepdims=True), [None]),
        (lambda x, y: x.reshape(2, 4, 8), ["a", None, None]),
        (lambda x, y: x.reshape(64), ["a"]),
        (lambda x, y: jax.lax.scan(lambda c, row: (c + row, c @ y), jnp.zeros(8), x)[1], [None, "c"]),
        (lambda x, y: y[jnp.zeros((4, 4), int)], [None, None, "c"]),
        (lambda x, y: jnp.where(x > 0, x, 0.0)[:, :4], ["a", None]),
    ],
)
def test_a_mesh_cuts_results_as_it_cuts_what_they_are_made_of(function, expected):
    """x [8, 8] is sharded by 'a' along its first dimension, y by 'b' and 'c'."""
    spec = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = read_function(jax.make_jaxpr(function)(spec, spec))
    given = [sharded_by(PartitionSpec("a", None), 2), sharded_by(PartitionSpec("b", "c"), 2)]
    made = Propagation({"a": 2, "b": 2, "c": 2}).dim_axes(found, given)[found.gives[0]]
    assert made == sharded_by(expected, len(found.gives[0].shape))


def test_room_is_told_by_the_chip_s_name(capsys):
    assert chip_named("v5p")[0] == "TPU v5p" and chip_named("H200")[0] == "NVIDIA H200"
    with pytest.raises(UserError, match="'h100' alone; there are NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe"):
        chip_named("h100")
    with pytest.raises(UserError, match="no accelerator is called 'v9'; there are TPU v4"):
        chip_named("v9")
    words = ["inspect", "--gin_file=bench_t5", "--gin.REMAT=full"]
    assert cli.main([*words, "--hardware=v5p"]) == 0
    said = capsys.readouterr().out
    assert "; in all " in said and " % of TPU v5p's 95.0 GiB" in said and "\nfits: " in said
    capacity = CHIPS["TPU v5p"].memory_bytes
    assert Memory(capacity, 1, 0, 0, 0).fits("it", capacity).startswith("does not fit: 95.0 GiB, 100 % of it's")
    assert Memory(0, 0, 0, int(capacity * 0.8), 0).fits("it", capacity).startswith("may or may not fit")
