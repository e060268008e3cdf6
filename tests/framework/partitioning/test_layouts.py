"""Every shipped layout, and many products of them, compute what one device computes."""

import functools

import jax
import numpy as np
import pytest
from tiers import tiers
from tiny import DENSE_LAYOUTS, FAMILIES, gradients_and_losses, losses, program

from meshway.framework.errors import UserError

STEPS, FEW = 20, 4  # of proofs; of the others: gradients, leaf by leaf, tell of a difference already
# Layout file -> other mesh shapes it is tried with: what else its file can be asked for.
SHAPES = {
    "zero_1": ["{'data': 4}"],
    "fsdp": ["{'fsdp': 4}"],
    "model_1d": ["{'data': 2, 'model': 4}"],
    "model_2d": ["{'data': 2, 'model': 4}"],
    "fsdp_model": ["{'fsdp': 2, 'model': 4}"],
    "model_sequence": ["{'data': 2, 'model': 4}"],
    "ring": ["{'data': 2, 'sequence': 4}", "{'data': 1, 'sequence': 8}"],
    "ring_model": ["{'data': 1, 'sequence': 4, 'model': 2}"],
    "ulysses": ["{'data': 2, 'sequence': 4}"],
}
# Pipelines need more layers: tests/models/layers/test_pipeline.py.
MESHES = [(layout, "") for layout in DENSE_LAYOUTS if layout != "single" and not layout.startswith("stage")]
MESHES += [(layout, f"mesh.MeshShape.ici={shape}") for layout, shapes in SHAPES.items() for shape in shapes]
# Each layout file once in CI, families in turn, and rings of other sizes; the product of two ways to shard with both.
QUICK = [("fsdp_model", "", "lm")]
TURNS = [(*mesh, FAMILIES[n % 2]) for n, mesh in enumerate(MESHES)]
SLOW = [("fsdp_model", "", "t5_1_1"), *(case for case in TURNS if not case[1] or case[0] in ("ring", "ring_model"))]
# Each layout as it is shipped with both families; on another mesh with one, as sizes are the mesh's.
AS_SHIPPED = [(*mesh, family) for mesh in MESHES if not mesh[1] for family in FAMILIES]
CASES = list(dict.fromkeys([*QUICK, *SLOW, *TURNS, *AS_SHIPPED]))


@pytest.fixture(scope="module")
def reference():
    """Per family: the fresh state on one device, on the host, the first gradients and the losses of twenty steps."""

    @functools.cache
    def of(family):
        made = program(family)
        fresh = jax.device_get(made.init())
        return fresh, *gradients_and_losses(made, fresh, STEPS)

    return of


def steps_of(request):
    return STEPS if request.node.get_closest_marker("proofs") else FEW


@pytest.mark.parametrize("layout, shape, family", tiers(CASES, QUICK, SLOW))
def test_layout_equals_one_device(layout, shape, family, reference, request):
    made = program(family, *[shape] if shape else [], layout=layout)
    check_equal(made, *reference(family), steps_of(request))


# `CASES` that are proofs take twenty steps: on each mesh, the family that CI does not try. Of those that it tries with
# both families, one does so here.
BOTH = [case[:2] for case in SLOW if {(*case[:2], family) for family in FAMILIES} <= {*QUICK, *SLOW}]


@pytest.mark.proofs
@pytest.mark.parametrize("layout, shape", dict.fromkeys(BOTH))
def test_layout_equals_one_device_over_twenty_steps(layout, shape, reference, family="lm"):
    made = program(family, *[shape] if shape else [], layout=layout)
    check_equal(made, *reference(family), STEPS)


def check_equal(made, fresh, gradients, expected, steps):
    found_gradients, found = gradients_and_losses(made, fresh, steps)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found, expected[:steps], rtol=1e-4)
    assert steps < STEPS or found[-1] < found[0]
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            found_gradients[name], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


# Layouts whose products may gather and scatter beside themselves: activations, or weights of which they are sharded.
BY_LAYERS = ["by_hand", "one_way", "bidirectional"]
SHARDED = {"model_sequence": "{'data': 2, 'model': 4}", "model_2d": "", "fsdp_model": "", "model_1d": "", "fsdp": ""}
PRODUCTS = [(layout, products) for layout in SHARDED for products in BY_LAYERS]
PRODUCTS = [case for case in PRODUCTS if case not in [("model_1d", "one_way"), ("model_1d", "bidirectional")]]
PRODUCTS_SLOW = [
    ("model_sequence", "bidirectional", "lm"),
    ("model_sequence", "one_way", "t5_1_1"),
    ("model_2d", "one_way", "lm"),
    ("fsdp_model", "bidirectional", "lm"),
    ("model_2d", "by_hand", "t5_1_1"),
]


# Families in turn: a product knows the layer it is in, not the model.
DONE = {case[:2] for case in PRODUCTS_SLOW}
PRODUCTS = PRODUCTS_SLOW + [(*case, FAMILIES[n % 2]) for n, case in enumerate(PRODUCTS) if case not in DONE]


@pytest.mark.parametrize("layout, products, family", tiers(PRODUCTS, slow=PRODUCTS_SLOW))
def test_products_by_layers_equal_one_device(layout, products, family, reference):
    shape = [f"mesh.MeshShape.ici={SHARDED[layout]}"] if SHARDED[layout] else []
    made = program(family, *shape, f"partitioner.Layout.products={products!r}", layout=layout)
    check_equal(made, *reference(family), FEW)


def test_rings_without_anything_to_send_around_are_refused():
    with pytest.raises(UserError, match="Layout.products='one_way' has no effect.*model_sequence"):
        program("lm", "partitioner.Layout.products='one_way'", layout="model_1d").trace_loss()


@pytest.mark.parametrize(
    "layout", tiers(["fsdp_model", "model_1d", "model_2d", "model_sequence"], slow=["fsdp_model", "model_2d"])
)
def test_one_key_head_stays_whole_where_heads_are_cut(layout):
    one = program("lm", "NUM_KV_HEADS=1")
    fresh = jax.device_get(one.init())
    expected_gradients, expected = gradients_and_losses(one, fresh, 3)
    gradients, found = gradients_and_losses(program("lm", "NUM_KV_HEADS=1", layout=layout), fresh, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


# Families of mixtures: in "all_to_all" with room for every token, and without slots. Both ways to dispatch under every
# layout, one family each; the other under two.
MIXTURE_CASES = [
    (family, layout, dispatch)
    for family, dispatch in (("switch", "all_to_all"), ("mixtral", "all_to_all"), ("mixtral", "dropless"))
    for layout in ("expert", "fsdp_expert", "expert_model", "fsdp", "model_sequence")
    if (family, dispatch) != ("mixtral", "all_to_all") or layout in ("fsdp_expert", "model_sequence")
] + [("mixtral", "fsdp_expert", "ragged")]


def mixture(family, dispatch, layout="single"):
    return program(family, f"DISPATCH='{dispatch}'", "moe.MoeMlp.capacity_factor=8.0", layout=layout)


@functools.cache
def mixture_reference(family, dispatch):
    single = mixture(family, dispatch)
    fresh = jax.device_get(single.init())
    return fresh, *gradients_and_losses(single, fresh, STEPS)


MIXED = [
    *MIXTURE_CASES[0:5:2],
    ("mixtral", "fsdp_expert", "all_to_all"),
    ("mixtral", "fsdp", "dropless"),
]  # each layout, each way to dispatch but one, each family


@pytest.mark.parametrize("family, layout, dispatch", tiers(MIXTURE_CASES, slow=MIXED))
def test_a_mixture_under_a_layout_equals_one_device(family, layout, dispatch, request):
    check_equal(mixture(family, dispatch, layout), *mixture_reference(family, dispatch), steps_of(request))


@pytest.mark.parametrize("family", tiers(FAMILIES, quick=["lm"], slow=["t5_1_1"]))
def test_fresh_parameters_do_not_depend_on_the_mesh(family, reference):
    fresh, *_ = reference(family)
    for found, wanted in zip(jax.tree.leaves(program(family, layout="fsdp_model").init()), jax.tree.leaves(fresh)):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("optimizer", tiers(["adafactor", "lion", "muon", "sgd"], slow=["adafactor", "muon"]))
def test_optimizer_state_is_sharded_and_changes_nothing(optimizer):
    # Muon's matrix iteration amplifies rounding; a few steps suffice to see a wrong state.
    rate = "LEARNING_RATE=0.001"
    whole, _ = losses(program("lm", rate, optimizer=optimizer), 4)
    cut_program = program("lm", rate, optimizer=optimizer, layout="fsdp_model")
    cut, state = losses(cut_program, 4)
    np.testing.assert_allclose(cut, whole, rtol=2e-4)
    leaves = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1000]
    assert all(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves)


def test_fsdp_cuts_the_bytes_of_the_state():
    def share(layout):
        rows = [row for row in program("t5_1_1", layout=layout).explain() if not row.name.startswith("batch")]
        return sum(row.bytes_per_device for row in rows) / sum(row.total_bytes for row in rows)

    assert share("data") == 1.0
    assert share("fsdp") < 0.15  # an eighth, and the small position biases whole
