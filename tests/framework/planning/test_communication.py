"""Closed forms of communication: against formulas written out here, and against what compiled steps send."""

import dataclasses
import itertools
import math

import jax
import pytest
import tiny
from tiers import tiers

from meshway.framework.planning.collectives import read_collectives
from meshway.framework.planning.communication import (
    ACTIVATIONS,
    GRADIENTS,
    INPUTS,
    UPDATES,
    WEIGHTS,
    Setting,
    minimum,
    unmerged,
)
from meshway.framework.planning.comparison import SCALARS, compare, setting_of
from meshway.framework.planning.products import Weight, find_uses
from meshway.framework.planning.train_plan import whole_uses

VOCAB, WIDTH, HIDDEN, BATCH, LENGTH = 256, 64, 128, 16, 16
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN  # products of one layer of the tiny decoder
NORMS = 3 * WIDTH
TOKENS = BATCH * LENGTH


def sent(setting: Setting) -> dict:
    found: dict = {}
    for term in minimum(setting):
        found[term.axes, term.role] = found.get((term.axes, term.role), 0.0) + term.bytes
    return found


def setting(layout: str, *bindings: str) -> Setting:
    return setting_of(tiny.program("lm", *bindings, layout=layout))


def test_gradients_of_whole_parameters_are_all_reduced():
    parameters = 2 * VOCAB * WIDTH + LAYER + NORMS
    assert sent(setting("data")) == {(("data",), GRADIENTS): 2 * 7 / 8 * 4 * parameters}


def test_zero_1_scatters_gradients_and_gathers_updates():
    parameters = 2 * VOCAB * WIDTH + LAYER + NORMS
    expected = {(("data",), GRADIENTS): 7 / 8 * 4 * parameters, (("data",), UPDATES): 7 / 8 * 4 * parameters}
    assert sent(setting("zero_1")) == expected


def test_fsdp_gathers_weights_scatters_gradients_and_exchanges_lookups_where_they_are_fewer_than_the_table():
    gathered = 7 / 8 * 4 * (VOCAB * WIDTH + LAYER + NORMS)
    few = {
        (("fsdp",), WEIGHTS): gathered,
        (("fsdp",), GRADIENTS): gathered,
        (("fsdp",), ACTIVATIONS): 2 * 7 / 8 * 4 * TOKENS * WIDTH / 8,
        (("fsdp",), INPUTS): 7 * 4 * TOKENS / 8,
    }
    assert sent(setting("fsdp")) == pytest.approx(few)
    table = 7 / 8 * 4 * 32 * WIDTH
    rest = 7 / 8 * 4 * (32 * WIDTH + LAYER + NORMS)
    many = {(("fsdp",), WEIGHTS): rest + table, (("fsdp",), GRADIENTS): rest + table}
    assert sent(setting("fsdp", "VOCAB_SIZE=32", "TASK_FEATURE_LENGTHS={'targets': 64}")) == many


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_tensor_parallelism_sums_two_products_and_two_inputs_a_layer_and_the_vocabulary(form):
    layers = 3
    found = setting("model_1d", f"NUM_LAYERS={layers}", f"SCAN={form == 'scanned'}")
    stream = 2 * 1 / 2 * 4 * TOKENS / 4 * WIDTH  # an all-reduce of [batch, length, d_model] by 2 of 4 x 2 devices
    softmax = 3 * 2 * 1 / 2 * 4 * TOKENS / 4
    lookups, logits = stream, stream
    whole = 2 * VOCAB * WIDTH / 2 + layers * LAYER / 2 + (2 * layers + 1) * WIDTH
    expected = {
        (("model",), ACTIVATIONS): 4 * layers * stream + lookups + logits + softmax,
        (("data",), GRADIENTS): 2 * 3 / 4 * 4 * whole,
    }
    assert sent(found) == pytest.approx(expected)
    # Apart: query, key and value read one input, and the two gates of the feed-forward layer one.
    assert unmerged(found) == pytest.approx(3 * layers * stream)


def total(setting: Setting, axes: tuple[str, ...], role: str, reason: str) -> float:
    terms = [term for term in minimum(setting) if (term.axes, term.role) == (axes, role) and reason in term.reason]
    return sum(term.bytes for term in terms)


def test_rings_pass_keys_and_values_and_their_gradients_home():
    parts = 4
    found = setting("ring", f"mesh.MeshShape.ici={{'data': 2, 'sequence': {parts}}}")
    keys_values = 2 * 4 * TOKENS / 8 * WIDTH
    expected = (2 * (parts - 1) + parts) * keys_values
    assert total(found, ("sequence",), ACTIVATIONS, "ring") == expected
    assert found.tokens == {"data", "sequence"}
    assert total(found, ("data", "sequence"), GRADIENTS, "all-reduced") == 2 * 7 / 8 * 4 * (
        2 * VOCAB * WIDTH + LAYER + NORMS
    )


def test_ulysses_exchanges_queries_keys_values_and_outputs_both_ways():
    exchanged = 2 * 4 * 1 / 2 * 4 * TOKENS / 8 * WIDTH
    assert total(setting("ulysses"), ("sequence",), ACTIVATIONS, "all-to-all") == exchanged


def test_keys_and_values_that_are_whole_are_gathered_and_their_gradients_scattered():
    gathered = 2 * 2 * 1 / 2 * 4 * TOKENS / 4 * WIDTH
    assert total(setting("context"), ("sequence",), ACTIVATIONS, "keys and values gathered") == gathered


def test_stages_hand_on_a_microbatch_at_each_time_step():
    microbatches, stages = 4, 2
    state = 4 * TOKENS / microbatches / 4 * WIDTH
    expected = 2 * (microbatches + stages - 1) * state
    assert total(setting("stage"), ("stage",), ACTIVATIONS, "stage") == expected


def test_lookups_are_found_where_the_table_lies_and_go_to_the_batch_one_mesh_axis_at_a_time():
    axes, shape = ("batch", "length", "embed"), (16, 16, 64)

    def way(layout: str) -> list[tuple]:
        with tiny.program("lm", layout=layout).partitioner.activate() as layout_of_activations:
            steps = layout_of_activations.lookup(axes, shape, ("vocab", "embed"), (256, 64))
        return [tuple(step.spec) for step in steps]

    assert way("data") == [("data", None, None)]
    assert way("replica_fsdp") == [("replica", None, "fsdp"), (("replica", "fsdp"), None, None)]
    assert way("fsdp_ring") == [
        (None, None, ("fsdp", "sequence")),
        (None, "sequence", "fsdp"),
        ("fsdp", "sequence", None),
    ]


OF_EXPERTS = ("expert", "fsdp_expert", "expert_model")
ROUTED = {"switch": "slots", "mixtral": "gathered"}


def of_experts(program: tiny.TrainProgram, dispatch: str) -> Setting:
    """The setting of a step whose products of experts are known, as a search has it: what kernels send is not read."""
    found = setting_of(program)
    return dataclasses.replace(found, uses=whole_uses(program, found.parameters), dispatch=dispatch)


@pytest.mark.parametrize(
    ("family", "layout"),
    tiers(
        itertools.product(ROUTED, OF_EXPERTS),
        quick=[("mixtral", "expert_model")],
        slow=[("switch", "expert_model"), ("mixtral", "fsdp_expert")],
    ),
)
def test_exchanges_of_experts_are_what_kernels_send(family, layout):
    """By closed forms, from a trace without kernels; but for the numbers and gates of choices, which are small."""
    program = tiny.program(family, layout=layout)
    kernels, forms = setting_of(program), of_experts(program, ROUTED[family])
    wide = [term for term in minimum(kernels) if "of kernels" in term.reason and term.role == ACTIVATIONS]
    sums = [term for term in minimum(kernels) if term.reason == "sums in kernels"]
    assert {term.axes for term in wide} == {("expert",)}
    exchanged = total(forms, ("expert",), ACTIVATIONS, "tokens to experts or back")
    assert exchanged == pytest.approx(sum(term.bytes for term in wide), rel=0 if family == "switch" else 0.03)
    # Kernels write the sums of outputs; jax adds as many of gradients, of the inputs that all have.
    summed = total(forms, ("model",), ACTIVATIONS, "sums of experts' outputs")
    assert summed == 2 * sum(term.bytes for term in sums) and bool(summed) == (layout == "expert_model")
    if family == "mixtral":  # gathered and scattered, forward and backward, by `parts` of eight devices
        parts = kernels.mesh["expert"]
        assert exchanged == 4 * (parts - 1) * 4 * TOKENS / (4 if layout == "expert_model" else 8) * WIDTH


@pytest.mark.slow
def test_compiled_experts_exchange_exactly_the_closed_form():
    program = tiny.program("switch", layout="expert")
    rows = read_collectives(program.compile_step().as_text(), program.partitioner.mesh.shape)
    sent = sum(row.sent for row in rows if row.kind == "all-to-all")
    assert sent == total(of_experts(program, "slots"), ("expert",), ACTIVATIONS, "tokens to experts or back") > 0


def test_compute_in_bfloat16_halves_what_products_need():
    wide, narrow = sent(setting("fsdp_model")), sent(setting("fsdp_model", "DTYPE='bfloat16'"))
    norms = 3 / 4 * 4 * NORMS / 4 * 4  # their scales are used in float32
    key = (("fsdp",), WEIGHTS)
    assert narrow[key] - norms == pytest.approx((wide[key] - norms) / 2)
    assert narrow[("model",), ACTIVATIONS] < 0.52 * wide[("model",), ACTIVATIONS]


def test_uses_are_followed_through_loops_casts_slices_and_reshapes():
    def loss(weights: dict, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jax.numpy.tanh(x @ kernel.astype(x.dtype)), None

        x, _ = jax.lax.scan(layer, x, weights["stack"])
        x = jax.checkpoint(lambda x, kernel: x @ kernel.reshape(8, 2, 4).transpose(0, 2, 1)[..., 0])(x, weights["one"])
        return x.sum() + weights["table"][jax.numpy.array([1, 2])].sum()

    shapes = {"one": (8, 8), "stack": (5, 8, 8), "table": (16, 8)}
    weights = [
        Weight(name, shape, jax.numpy.dtype("float32"), ("a",) * len(shape), ((),) * (len(shape) - 1) + (("model",),))
        for name, shape in shapes.items()
    ]
    tree = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    uses = find_uses(jax.make_jaxpr(loss)(tree, jax.ShapeDtypeStruct((3, 8), "bfloat16")), weights)
    stacked, single = uses.products
    assert (stacked.weight.path, stacked.times, stacked.weight.dim_axes) == ("stack", 5, ((), ("model",)))
    assert (stacked.contracted, stacked.kept, stacked.value.trained) == ((0,), (1,), True)
    assert single.weight.path == "one" and single.weight.shape == (8, 4) and single.times == 1
    (lookup,) = uses.lookups
    assert lookup.weight.path == "table" and lookup.indexed == (0,)
    assert uses.dtypes["stack"] == jax.numpy.bfloat16


@pytest.fixture(scope="module")
def compiled() -> dict:
    """Lines of comparison of compiled tiny steps, by layout."""
    found = {}
    for layout in ("data", "fsdp", "model_1d"):
        program = tiny.program("lm", layout=layout)
        rows = read_collectives(program.compile_step().as_text(), program.partitioner.mesh.shape)
        found[layout] = {(line.axes, line.role): line for line in compare(setting_of(program), rows)}
    return found


@pytest.mark.slow
def test_compiled_data_parallelism_sends_exactly_the_minimum(compiled):
    line = compiled["data"][("data",), GRADIENTS]
    assert line.measured == line.minimum and not line.why
    assert compiled["data"][("data",), SCALARS].measured < 100


def test_compiled_fsdp_sends_the_minimum_but_for_reduce_scatters_that_this_backend_does_not_form(compiled):
    lines = compiled["fsdp"]
    for role in (ACTIVATIONS, INPUTS):
        assert lines[("fsdp",), role].measured == lines[("fsdp",), role].minimum
    assert lines[("fsdp",), WEIGHTS].measured == pytest.approx(lines[("fsdp",), WEIGHTS].minimum, rel=0.005)
    gradients = lines[("fsdp",), GRADIENTS]
    assert gradients.measured == 2 * gradients.minimum
    (why,) = gradients.why
    assert "reduce-scatter" in why and "XLA:CPU" in why


def test_compiled_tensor_parallelism_exceeds_the_minimum_by_gradients_summed_apart(compiled):
    line = compiled["model_1d"][("model",), ACTIVATIONS]
    apart = 3 * 2 * 1 / 2 * 4 * TOKENS / 4 * WIDTH
    argmax = 1 / 2 * 2 * (4 + 4) * TOKENS / 4  # accuracy: each device's best logit and its index, gathered
    assert line.measured == line.minimum + apart + argmax
    (why,) = line.why
    assert why.startswith("48.0 KiB") and math.isclose(apart, 48 * 1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, axes, scale",
    [
        ("ulysses", ("sequence",), 4 / 2),  # queries, keys, values and outputs, half of each
        ("replica_fsdp", ("fsdp",), 3 / 4),
        ("fsdp_ring", ("fsdp", "sequence"), 3 / 4 + 1 / 2),  # lookups, over one axis and then the other
    ],
)
def test_compiled_exchanges_of_activations_send_what_they_must_forward_and_backward(layout, axes, scale):
    program = tiny.program("lm", layout=layout)
    rows = read_collectives(program.compile_step().as_text(), program.partitioner.mesh.shape)
    exchanged = [row for row in rows if row.kind == "all-to-all"]
    assert {axis for row in exchanged for axis in row.axes} == set(axes)
    assert sum(row.sent for row in exchanged) == 2 * scale * 4 * TOKENS / 8 * WIDTH


def test_every_line_above_its_minimum_says_why(compiled):
    for lines in compiled.values():
        for line in lines.values():
            assert line.why or line.role == SCALARS or line.measured <= 1.005 * line.minimum, line
