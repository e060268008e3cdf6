"""A stack run as a pipeline is the stack: values, gradients, reports, and what crosses the mesh for it."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import pairwise, tiers
from tiny import FAMILIES, gradients_and_losses, greedy, losses, program

from meshway.framework.errors import UserError
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.models.layers.norm import dropout
from meshway.models.layers.pipeline import Pipeline
from meshway.models.layers.side_outputs import add_loss, add_metric, capture
from meshway.models.layers.stack import Stack
from meshway.models.module import Network, param

ROWS, LENGTH, WIDTH = 80, 3, 4
STAGE_LAYOUTS = ("stage", "stage_circular", "stage_fsdp", "stage_model")


class Toy(nnx.Module):
    """A layer that hates zeros, as its gradient at x = 0 is no number, and tells how large x is."""

    def __init__(self, d_model, *, rngs, dropout_rate=0.0):
        self.kernel = param(jax.random.normal(rngs.params(), (d_model, d_model)), ("embed", "mlp"))
        self.dropout_rate = dropout_rate

    def __call__(self, x, *, rng, cache, scale, shared):
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        add_metric("size", jnp.mean(jnp.abs(x)))
        add_loss("spread", 0.1 * jnp.mean(x**4))
        return x + dropout(jnp.tanh(x @ self.kernel[...]) * scale + shared, self.dropout_rate, rng), cache


def partitioner(stage, data=1):
    rules = [("batch", "data"), ("stage", "stage"), ("length", None), ("embed", None)]
    return Partitioner(Layout(MeshShape(ici={"stage": stage, "data": data}), [], rules))


@functools.cache
def inputs():
    random = np.random.default_rng(0)
    shapes = (ROWS, LENGTH, WIDTH), (ROWS, 1, 1), (1, 1, WIDTH)
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def toy(num_layers, pattern=1, pipeline=None, scan=False, remat="none", rate=0.0):
    """Returns (parameters, a function of them, x, scale, shared and a key: (loss, (output, losses, metrics)))."""

    def factory(rngs):
        blocks = [functools.partial(Toy, dropout_rate=rate)] * pattern
        return Stack(num_layers, WIDTH, rngs=rngs, blocks=blocks, scan=scan, remat=remat, pipeline=pipeline)

    network = Network(factory)

    def run(params, x, scale, shared, rng):
        with capture() as reports:
            y, _ = network.bind(params)(x, rng=rng, scale=scale, shared=shared)
        total = jnp.sum(y**3) + sum(jnp.sum(value) for value in reports.losses.values())
        return total, (y, reports.losses, reports.metrics)

    return network.init(jax.random.key(1)), run


def derived(run):
    """Jits a function of `toy` with its gradients by everything but the key."""
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True))


@functools.cache
def whole(num_layers, pattern):
    params, run = toy(num_layers, pattern)
    return jax.device_get(derived(run)(params, *inputs(), None))


def near(found, wanted, rtol=1e-5):
    def compare(path, found, wanted):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, jax.device_get(found), wanted)


@pytest.mark.parametrize(
    "stages, repeats, microbatches, pattern, options",
    [
        (2, 2, 4, 1, {"scan": True}),
        pytest.param(4, 1, 5, 2, {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, 1, {"remat": "dots", "scan": True}, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, 1, {"remat": "minimal"}, marks=pytest.mark.slow),
        pytest.param(8, 1, 2, 1, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, 4, {}, marks=pytest.mark.slow),
    ],
)
def test_pipelined_is_whole(stages, repeats, microbatches, pattern, options):
    """Idle stages leave no trace: not in values, nor as NaN in gradients, nor in what layers report, in their order."""
    params, run = toy(8, pattern, Pipeline(microbatches, repeats), **options)
    with partitioner(stages, data=8 // stages).activate():
        found = derived(run)(params, *inputs(), None)
    near(found, whole(8, pattern))
    assert found[0][1][2]["size"].shape == (8,)


@pytest.mark.slow
def test_dropout_belongs_to_layers_and_microbatches():
    """Masks are the same however many stages there are, others in each microbatch, and others for another key."""
    x, *context = inputs()
    same = np.broadcast_to(x[:1], x.shape), np.broadcast_to(context[0][:1], context[0].shape), context[1]

    @functools.cache
    def compiled(stages, repeats):
        params, run = toy(4, pipeline=Pipeline(4, repeats), rate=0.5)
        return jax.jit(lambda rng: run(params, *same, rng)[1][0])

    def output(stages, repeats, seed):
        with partitioner(stages).activate():
            y = compiled(stages, repeats)(jax.random.key(seed))
        return np.asarray(y).reshape(-1, 4, LENGTH, WIDTH)

    found = output(2, 2, 0)
    np.testing.assert_allclose(output(4, 1, 0), found, rtol=1e-5)
    assert np.abs(found[:, :1] - found[:, 1:]).max(axis=(0, 2, 3)).min() > 0.01
    assert np.abs(output(2, 2, 1) - found).max() > 0.01


def test_without_a_stage_axis_or_mesh_the_stack_runs_whole():
    """Even where a pipeline could not: three layers, and seven microbatches of eighty rows."""
    params, run = toy(3, pipeline=Pipeline(7))
    _, plain = toy(3)

    def traced(run):
        return str(jax.make_jaxpr(run)(params, *inputs(), None))

    assert traced(run) == traced(plain)
    with partitioner(1).activate():
        assert traced(run) == traced(plain)
    with partitioner(2).activate(), pytest.raises(ValueError):
        traced(run)


@pytest.mark.parametrize(
    "layers, pipeline, sizes, message",
    [
        (6, Pipeline(4), (4,), "6 periods .* 4 stages x num_repeats=1: 4 or 8 periods could"),
        (6, Pipeline(4, 2), (2,), "2 stages x num_repeats=2: 4 or 8 periods"),
        (4, Pipeline(3), (2,), "num_microbatches=3 does not split 80 rows .* 78 or 81 rows.*num_microbatches=2 or 4"),
        (4, Pipeline(6), (2, 2), "6 does not split 80 rows.* the 2 shards .*72 or 84.*num_microbatches=5 or 8"),
        (4, Pipeline(1), (2, 3), "78 or 81 rows would do(?!,)"),
        (4, Pipeline(5, 2), (2,), "num_microbatches=5 is no multiple of the 2 stages.* 4 or 6"),
        (12, Pipeline(4, 3), (4,), "num_repeats=3 and 4 stages: .* use 2 or 4"),
    ],
)
def test_what_does_not_divide_is_refused(layers, pipeline, sizes, message):
    params, run = toy(layers, pipeline=pipeline)
    with partitioner(*sizes).activate(), pytest.raises(ValueError, match=message):
        jax.eval_shape(run, params, *inputs(), None)


def test_rows_of_the_context_are_checked_and_counts_are_positive():
    params, run = toy(4, pipeline=Pipeline(4))
    x, scale, shared = inputs()
    with partitioner(2).activate(), pytest.raises(ValueError, match=r"\(7, 1, 1\) has neither the batch's 80"):
        jax.eval_shape(run, params, x, scale[:7], shared, None)
    with pytest.raises(ValueError, match="Pipeline.num_microbatches must be at least 1, not 0"):
        Pipeline(0)


def small(family, *bindings, layers=4, layout="single"):
    """A program with sizes that tell its arrays apart."""
    depths = {"t5_1_1": ("NUM_ENCODER_LAYERS", "NUM_DECODER_LAYERS"), "lm": ("NUM_LAYERS",)}[family]
    lengths = f"TASK_FEATURE_LENGTHS={ {'targets': 12} if family == 'lm' else {'inputs': 20, 'targets': 12} }"
    sizes = ("D_FF=96", "VOCAB_SIZE=512", lengths, *[f"{depth}={layers}" for depth in depths])
    return program(family, *sizes, *bindings, layout=layout)


def packed(made):
    """A batch of rows with two segments and padding; weights differ from row to row."""
    batch = made.synthetic_batch()
    for name, x in batch.items():
        length = x.shape[1]
        half = length // 2
        if name.endswith("segment_ids"):
            x[:, half:], x[:, -3:] = 2, 0
        if name.endswith("positions"):
            x[:, half:] -= half
        if name.endswith("weights"):
            x[:, -3:] = 0
            x *= np.arange(1, len(x) + 1)[:, None]
    return batch


@functools.cache
def fresh(family, layers):
    """Parameters on the host."""
    random = np.random.default_rng(1)
    shapes = small(family, layers=layers).param_shapes
    return jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), shapes)


def gradients(made, params):
    """Returns (the loss and gradients of a packed batch, the compiled program's text)."""
    where = made.state_shardings.params
    compiled = made.partitioner.compile(
        jax.value_and_grad(lambda params, batch: made.model.loss(params, batch, None)[0]),
        made.param_shapes,
        made.abstract_batch,
        in_shardings=(where, made.batch_shardings),
        out_shardings=(made.partitioner.replicated, where),
    )
    return compiled(jax.device_put(params, where), made.shard_batch(packed(made))), compiled.as_text()


@functools.cache
def reference(family, layers, *bindings):
    return jax.device_get(gradients(small(family, *bindings, layers=layers), fresh(family, layers))[0])


def rolls(text):
    """Returns the collective-permutes inside of loops, and how often the loops run."""
    entry = text[text.index("\nENTRY") :]
    inside = text[: text.index("\nENTRY")]
    assert "collective-permute" not in entry, "no permute before or after the pipeline"
    trips = re.findall(r'while\(.*"known_trip_count":\{"n":"(\d+)"\}', entry)
    return len(re.findall(r" collective-permute(?:-start)?\(", inside)), [int(trip) for trip in trips]


@pytest.mark.parametrize(
    "family, layout, layers, steps",
    [
        pytest.param("t5_1_1", "stage_model", 2, 4 + 1, marks=pytest.mark.slow),
        pytest.param("lm", "stage_circular", 4, 4 * 2 + 1, marks=pytest.mark.slow),
    ],
)
def test_network_is_what_one_device_computes(family, layout, layers, steps):
    """Loss and gradients, leaf by leaf; one roll a time step, M V + S - 1 of them, and as many backward."""
    found, text = gradients(small(family, layers=layers, layout=layout), fresh(family, layers))
    near(found, reference(family, layers))
    stacks = 2 if family == "t5_1_1" else 1
    assert rolls(text) == (2 * stacks, 2 * stacks * [steps])


CASES = {
    "family": FAMILIES,
    "layout": ("stage", "stage_fsdp", "stage_model"),
    "repeats": (1, 2),
    "options": (("SCAN=True", "REMAT='full'"), ("SCAN=False", "REMAT='minimal'")),
}
PAIRS = [tuple(case.values()) for case in pairwise(CASES)]


@pytest.mark.parametrize("family, layout, repeats, options", tiers(itertools.product(*CASES.values()), slow=PAIRS))
def test_every_layout_repeat_and_way_to_run(family, layout, repeats, options):
    made = small(family, *options, f"pipeline.Pipeline.num_repeats={repeats}", layout=layout)
    found, _ = gradients(made, fresh(family, 4))
    near(found, reference(family, 4))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["{'stage': 4, 'fsdp': 2}", "{'stage': 2, 'fsdp': 2, 'data': 2}"])
def test_other_meshes(sizes):
    rows = "partitioner.Layout.activations=[('batch', ('data', 'fsdp')), ('stage', 'stage'), ('vocab', 'stage'), "
    rest = ("length", "kv_length", "embed", "mlp", "heads", "kv_heads", "head_dim", "expert")
    more = [rows + ", ".join(f"('{name}', None)" for name in rest) + "]"] if "data" in sizes else []
    options = (f"mesh.MeshShape.ici={sizes}", "pipeline.Pipeline.num_repeats=2", *more)
    found, _ = gradients(small("lm", *options, layers=8, layout="stage_fsdp"), fresh("lm", 8))
    near(found, reference("lm", 8))


ROUNDED = [(family, layout) for layout in ("stage_circular", "stage_model") for family in FAMILIES]


@pytest.mark.parametrize("family, layout", tiers(ROUNDED, slow=[("lm", "stage_circular")]))
def test_bfloat16_differs_by_rounding(family, layout):
    """From float32 as much as one device's bfloat16 does."""

    def error(found):
        wanted = reference(family, 4)
        return {
            jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(jax.device_get(found)), jax.tree.leaves(wanted), strict=True
            )
        }

    alone = error(reference(family, 4, "DTYPE='bfloat16'"))
    found, _ = gradients(small(family, "DTYPE='bfloat16'", layout=layout), fresh(family, 4))
    for name, value in error(found).items():
        assert value < max(2 * alone[name], 1e-3), name


# Each layout, families in turn; the first two with the other family as well, for twenty steps.
FEW = [(FAMILIES[n % 2], layout) for n, layout in enumerate(STAGE_LAYOUTS)]
ACCUMULATED = [*FEW[:2], *[(FAMILIES[(n + 1) % 2], layout) for n, layout in enumerate(STAGE_LAYOUTS[:2])], *FEW[2:]]


@pytest.mark.parametrize("family, layout", tiers(ACCUMULATED, slow=FEW[:2]))
def test_steps_with_accumulated_gradients(family, layout, request):
    """The step's own microbatches, each of which the pipeline cuts again; twenty steps of proofs, else four."""
    steps = 20 if request.node.get_closest_marker("proofs") else 4
    alone = small(family, "BATCH_SIZE=32")
    state = jax.device_get(alone.init())
    first, expected = gradients_and_losses(alone, state, steps)
    options = ("BATCH_SIZE=32", "NUM_MICROBATCHES=2")
    found_first, found = gradients_and_losses(small(family, *options, layout=layout), state, steps)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    near(found_first, first, rtol=1e-4)


@pytest.mark.parametrize("family", tiers(FAMILIES, slow=["lm"]))
def test_dropout_in_a_network(family):
    """It drops units, trains, and a seed gives one result."""
    options = ("DROPOUT_RATE=0.2", "SCAN=True", "REMAT='full'")
    made = small(family, *options, layout="stage_circular")
    first, _ = losses(made, 8)
    again, _ = losses(made, 8)
    assert first == again and first[-1] < first[0]
    without, _ = losses(small(family, "DROPOUT_RATE=0.0", *options[1:], layout="stage_circular"), 1)
    assert abs(first[0] - without[0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_under_a_stage_layout(family):
    """A cache belongs to no microbatch: the stack runs whole, on parameters that lie by stage."""

    def decoded(made):
        params = made.init().params
        with made.partitioner.activate():
            return np.asarray(
                jax.jit(lambda params, batch: greedy(made.model, params, batch, 5, 1))(
                    params, made.shard_batch(made.synthetic_batch())
                )
            )

    np.testing.assert_array_equal(decoded(small(family, layout="stage_circular")), decoded(small(family)))


def test_a_user_reads_what_does_not_divide_before_anything_compiles():
    """Rows are those of the step's own microbatches."""
    small("lm", "NUM_MICROBATCHES=1", layout="stage").trace_loss()
    with pytest.raises(UserError, match="^DecoderOnly: .*=4 does not split 8 rows .* 16 rows would do, or .*=2$"):
        small("lm", "NUM_MICROBATCHES=2", layout="stage").trace_loss()


def test_idle_work_is_no_model_flops():
    assert small("lm", layout="stage").flops == small("lm").flops


def kept_for_backward(made):
    """Returns the shapes, without time and stages, of what the forward scan over time keeps for the backward one."""
    with made.partitioner.activate():
        jaxpr = jax.make_jaxpr(jax.grad(lambda params, batch: made.model.loss(params, batch, None)[0]))(
            made.param_shapes, made.abstract_batch
        )
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    (forward,) = (scan for scan in scans if scan.params["length"] > 4 and not scan.params["reverse"])
    shapes = [variable.aval.shape for variable in forward.outvars]
    return [shape[2:] for shape in shapes if shape[:1] == (forward.params["length"],) and len(shape) > 2]


@pytest.mark.parametrize("scan", [True, False])
def test_weights_are_not_kept_for_every_time_step(scan):
    """A stage picks the weights of a repeat anew at each time step; kept, they would take M times their room."""
    for dtype in ("float32", "bfloat16"):
        options = (f"SCAN={scan}", f"DTYPE='{dtype}'")
        shapes = kept_for_backward(small("lm", *options, layers=8, layout="stage_circular"))
        weights = {(64, 96), (96, 64), (64, 4, 16), (4, 16, 64)}
        assert shapes and not [shape for shape in shapes if shape[-2:] in weights or shape[-3:] in weights]


def test_remat_keeps_in_a_pipeline_what_it_keeps_without():
    """Projections are kept under "minimal" and "dots", scores under "dots"; stages are a batch axis to no policy."""
    found = {
        remat: kept_for_backward(small("lm", f"REMAT='{remat}'", "SCAN=False", layout="stage"))
        for remat in ("full", "minimal", "dots")
    }
    hidden, scores = (4, 12, 96), (4, 4, 12, 12)
    assert [shapes.count(hidden) for shapes in found.values()] == [0, 4, 4]
    assert [shapes.count(scores) for shapes in found.values()][:2] == [0, 0]
    assert found["dots"].count(scores) > 0
