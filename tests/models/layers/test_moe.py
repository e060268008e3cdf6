"""The mixture of experts: every form of dispatch, on every mesh, against all experts on all tokens."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import tiers

from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.models.layers import moe
from meshway.models.layers.masks import AttentionMetadata, Mask
from meshway.models.layers.mixture import routers
from meshway.models.layers.mlp import ACTIVATIONS, Mlp
from meshway.models.layers.side_outputs import capture, with_padding_mask
from meshway.models.layers.stack import Stack
from meshway.models.module import Network

D, F, E, B, L = 8, 16, 4, 8, 6
X = jax.random.normal(jax.random.key(1), (B, L, D))
KEY = jax.random.key(2)
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")


def layout(ici, batch, mlp=None, length=None, embed=None, expert="expert"):
    """What the shipped layouts say of these axes, and what none of them says."""
    stored = [("embed", None), ("mlp", mlp), ("expert", expert), ("layers", None)]
    computed = [("expert", expert), ("batch", batch), ("mlp", mlp), ("length", length), ("embed", embed)]
    return Layout(MeshShape(ici=ici), stored, computed)


BOTH, CUBE = ("data", "expert"), {"data": 2, "expert": 2, "model": 2}
LAYOUTS = {
    "expert": layout({"data": 2, "expert": 4}, BOTH),
    "outermost": layout({"expert": 4, "data": 2}, ("expert", "data")),
    "expert_model": layout(CUBE, BOTH, "model"),
    "expert_sequence": layout(CUBE, BOTH, "model", length="model | None"),
    "expert_2d": layout(CUBE, BOTH, "model", embed="model | None"),
    "own": layout({"data": 4, "model": 2}, "data", expert="model"),
    "two_axes": layout(CUBE, ("data", "model", "expert"), expert=("model", "expert")),
    "cut_rows": layout({"data": 2, "sequence": 2, "expert": 2}, BOTH, length="sequence"),
    "cut_rows_by_expert": layout({"data": 4, "expert": 2}, ("data",), length="expert"),
}
SLOTS = {"capacity_factor": 1.0, "dropout_rate": 0.3, "num_shared_experts": 1}
FORMS = {
    "all_to_all": SLOTS | {"dispatch": "all_to_all"},
    "einsum": SLOTS | {"dispatch": "einsum"},
    "dropless": SLOTS | {"dispatch": "dropless"},
    "ragged": SLOTS | {"dispatch": "ragged"},
    "expert_choice": SLOTS | {"router": functools.partial(routers.ExpertChoice, z_loss=0.1)},
}


def layer(**options):
    return Network(functools.partial(moe.MoeMlp, D, F, E, **options))


@functools.cache
def params_of(shared=0):
    return layer(num_shared_experts=shared).init(jax.random.key(0))


def loss_of(network):
    def loss(params, x, rng):
        with capture() as reports:
            y = network.bind(params)(x, rng=rng)
        return jnp.sum(jnp.sin(y)) + sum(reports.losses.values()), (y, reports)

    return loss


def run(network, params, x=X, rng=KEY, partitioner=None):
    """Returns ((loss, (output, reports)), gradients to parameters and x)."""
    function = jax.jit(jax.value_and_grad(loss_of(network), argnums=(0, 1), has_aux=True))
    if partitioner is None:
        return function(params, x, rng)
    with partitioner.activate():
        return function(params, x, rng)


def forward(network, params, x=X, rng=None, segments=None):
    """Returns (output, reports)."""

    @jax.jit
    def function(params, x, rng, segments):
        with (
            capture() as reports,
            with_padding_mask(None if segments is None else Mask(None, AttentionMetadata(segments))),
        ):
            y = network.bind(params)(x, rng=rng)
        return y, reports

    return function(params, x, rng, segments)


def assert_same(found, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), found, expected)


def all_experts_on_all_tokens(params, x, gates):
    """The definition, without slots or indices: sum over experts of gate x expert(x)."""
    experts = params["experts"]
    hidden = ACTIVATIONS["gelu"](jnp.einsum("bld,edf->blef", x, experts["wi_0"]))
    hidden = hidden * jnp.einsum("bld,edf->blef", x, experts["wi_1"])
    return jnp.einsum("ble,blef,efd->bld", gates, hidden, experts["wo"])


@pytest.fixture(scope="module")
def defined():
    """Loss, output and gradients of the definition, with top-2 gates."""

    def loss(params, x, rng):
        logits = x @ params["router"]["kernel"]
        best = jax.nn.one_hot(jax.lax.top_k(logits, 2)[1], E).sum(-2)
        gates = jax.nn.softmax(jnp.where(best > 0, logits, -jnp.inf))
        y = all_experts_on_all_tokens(params, x, gates)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params_of(), X, None)


@pytest.mark.parametrize("form", ["all_to_all", "einsum", "dropless"])
def test_forms_equal_all_experts_on_all_tokens_when_nothing_drops(form, defined):
    network = layer(dispatch=form, capacity_factor=E / 2)
    (loss, (y, reports)), gradients = run(network, params_of(), rng=None)
    assert reports.metrics["router/drop_rate"] == 0
    assert not reports.losses  # at inference
    assert_same(((loss, y), gradients), defined)


@functools.cache
def on_one_device(form, groups_per_row=1):
    network = layer(**(FORMS[form] | {"groups_per_row": groups_per_row}))
    return network, run(network, params_of(1))


def test_all_to_all_and_einsum_agree_on_what_is_dropped():
    found, expected = on_one_device("all_to_all")[1], on_one_device("einsum")[1]
    assert expected[0][1][1].metrics["router/drop_rate"] > 0.1
    assert_same(found, expected)


def over_the_mesh(form, name):
    parts = 2 if name.startswith("cut_rows") and form not in moe.SLOTLESS else 1
    network, expected = on_one_device(form, parts)
    assert_same(run(network, params_of(1), partitioner=Partitioner(LAYOUTS[name])), expected)


# With drops, dropout, a shared expert and auxiliary losses: output, reports and all gradients.
def test_a_mesh_changes_nothing():
    over_the_mesh("all_to_all", "expert_model")


# Forms with slots and without on every mesh; ragged products differ from dropless ones in the kernel alone: on few.
EVERYWHERE = [(form, name) for form in ("all_to_all", "dropless") for name in LAYOUTS]
ELSEWHERE = [(form, name) for form in ("einsum", "expert_choice") for name in ("expert", "expert_model", "cut_rows")]
# One of three forms on every mesh, and the others where experts lie apart.
SLOW = [(("all_to_all", "dropless", "ragged")[n % 3], name) for n, name in enumerate(LAYOUTS)]
SLOW += [("einsum", "expert_model"), ("expert_choice", "expert"), ("expert_choice", "cut_rows")]
EVERYWHERE += [case for case in SLOW if case[0] == "ragged"]


@pytest.mark.parametrize(("form", "name"), tiers(EVERYWHERE + ELSEWHERE, slow=SLOW))
def test_no_mesh_changes_anything(form, name):
    over_the_mesh(form, name)


def test_one_pair_of_all_to_alls_a_layer():
    """Counted as instructions of the compiled forward pass of one layer, at inference."""
    network, partitioner = layer(capacity_factor=1.0), Partitioner(LAYOUTS["expert"])
    stored = partitioner.state_shardings(network.axes(), params_of())
    with partitioner.activate():
        tokens = partitioner.sharding(("batch", "length", "embed"), X.shape)
        function = jax.jit(
            lambda params, x: network.bind(params)(x), in_shardings=(stored, tokens), out_shardings=tokens
        )
        text = function.lower(params_of(), X).compile().as_text()
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES}
    # The gathered array is the router's small kernel, which lies with the experts.
    assert counts == {"all-to-all": 2, "all-gather": 1, "all-reduce": 0, "reduce-scatter": 0, "collective-permute": 0}


@pytest.mark.slow
def test_ragged_dispatch_is_one_instruction_there_and_one_back_where_the_backend_has_it():
    network, partitioner = layer(dispatch="ragged"), Partitioner(LAYOUTS["expert"])
    with partitioner.activate():
        lowered = jax.jit(lambda params, x: network.bind(params)(x)).trace(params_of(), X)
        found = {
            p: lowered.lower(lowering_platforms=(p,)).as_text().count("ragged_all_to_all(") for p in ("tpu", "cpu")
        }
    assert found == {"tpu": 2, "cpu": 0}


def test_drop_rate_counts_what_found_no_slot():
    network = layer(capacity_factor=0.5, router=functools.partial(routers.TopK, k=2))
    _, reports = forward(network, params_of())
    experts = np.argsort(-np.asarray(X @ params_of()["router"]["kernel"]), axis=-1)[..., :2]
    capacity = int(np.ceil(0.5 * 2 * L / E))  # rows are groups
    dropped = sum(max(0, (row == expert).sum() - capacity) for row in experts for expert in range(E))
    np.testing.assert_allclose(reports.metrics["router/drop_rate"], dropped / experts.size, rtol=1e-5)


def test_no_row_depends_on_another_and_no_token_on_padding():
    network = layer(capacity_factor=0.5)
    real = np.arange(L) < np.arange(B)[:, None] % 4 + 1
    real[:, 0] = False
    segments = real.astype(np.int32)
    outputs, said = zip(
        *(forward(network, params_of(), np.where(real[..., None], X, fill), KEY, segments) for fill in (0, 3))
    )
    assert_same(said[0], said[1])
    np.testing.assert_allclose(outputs[0][real], outputs[1][real], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs[0][~real], 0)  # padding takes no slot
    others = np.where((np.arange(B) == 2)[:, None, None], X, -X)
    np.testing.assert_allclose(
        forward(network, params_of(), others)[0][2], forward(network, params_of())[0][2], rtol=1e-5
    )


def test_equal_experts_are_one_mlp_dropout_included():
    """What sparse upcycling starts from: gates sum to one, so copies of one Mlp do what it does."""
    dense = Network(functools.partial(Mlp, D, F, dropout_rate=0.3))
    kernels = dense.init(jax.random.key(3))
    copies = {name: jnp.broadcast_to(kernels[name]["kernel"], (E, *kernels[name]["kernel"].shape)) for name in kernels}
    network = layer(capacity_factor=E / 2, dropout_rate=0.3)
    params = params_of() | {"experts": copies}
    # The key of the experts' dropout is the second of three.
    expected, _ = forward(dense, kernels, rng=jax.random.split(KEY, 3)[1])
    assert_same(forward(network, params, rng=KEY)[0], expected, atol=1e-5)


def test_capacity_may_differ_at_inference():
    network = layer(capacity_factor=2.0, eval_capacity_factor=0.5)
    drops = {}
    for rng in (KEY, None):
        _, reports = forward(network, params_of(), rng=rng)
        drops[rng is None] = float(reports.metrics["router/drop_rate"])
    assert drops[False] == 0 < drops[True]


@pytest.mark.parametrize("form", FORMS)
def test_activations_may_be_bfloat16(form):
    function = jax.value_and_grad(loss_of(layer(**FORMS[form])), argnums=(0, 1), has_aux=True)
    x = X.astype(jnp.bfloat16)
    for partitioner in (None, Partitioner(LAYOUTS["expert_model"])):
        with contextlib.nullcontext() if partitioner is None else partitioner.activate():
            (_, (y, reports)), (params, gradient) = jax.eval_shape(function, params_of(1), x, KEY)
        assert y.dtype == gradient.dtype == jnp.bfloat16
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, reports)))


class Residual(nnx.Module):
    """A block of one layer."""

    def __init__(self, d_model, *, rngs, **options):
        self.mlp = moe.MoeMlp(d_model, F, E, rngs=rngs, **options)

    def __call__(self, x, *, rng, cache):
        return x + self.mlp(x, rng=rng), cache


@pytest.mark.slow
@pytest.mark.parametrize("form", ["all_to_all", "einsum", "dropless"])
def test_inside_scan_and_remat_and_mapped_over_stages(form):
    block = functools.partial(Residual, dispatch=form, capacity_factor=1.0, dropout_rate=0.3)
    stacks = {
        kind: Network(functools.partial(Stack, 2, D, blocks=[block], scan=kind == "scan", remat=remat))
        for kind, remat in (("loop", "none"), ("scan", "full"))
    }
    params = stacks["loop"].init(jax.random.key(0))

    def loss(network, params, x):
        with capture() as reports:
            y, _ = network.bind(params)(x, rng=KEY)
        return jnp.sum(jnp.sin(y)) + sum(map(jnp.sum, reports.losses.values())), (y, reports)

    def value(network):
        return jax.jit(jax.value_and_grad(functools.partial(loss, network), argnums=(0, 1), has_aux=True))

    expected = value(stacks["loop"])(params, X)
    with Partitioner(LAYOUTS["expert"]).activate():
        assert_same(value(stacks["scan"])(params, X), expected)
    staged = Partitioner(layout({"stage": 2, "data": 2, "expert": 2}, BOTH))
    network = layer(dispatch=form, capacity_factor=1.0)
    params, x = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), (params_of(), X))

    def stage(params, x):
        once = jax.checkpoint(lambda x, _: (x + network.bind(params)(x), None))
        return jax.lax.scan(once, x, None, length=2)[0]

    def summed(params, x, axis):  # as a pipeline does
        return jnp.sum(jnp.sin(jax.vmap(stage, spmd_axis_name=axis)(params, x)))

    expected = jax.jit(jax.value_and_grad(functools.partial(summed, axis=None), argnums=(0, 1)))(params, x)
    with staged.activate():
        found = jax.jit(jax.value_and_grad(functools.partial(summed, axis=("stage",)), argnums=(0, 1)))(params, x)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatch": "sorted"}, "dispatch must be one of"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"num_experts": 0}, "num_experts must be positive"),
        ({"group_rows": 2, "groups_per_row": 2}, "one must be 1"),
        ({"activations": ("swish",)}, "MoeMlp.activations: unknown"),
        ({"router": routers.ExpertChoice, "dispatch": "dropless"}, "use 'all_to_all'"),
        ({"group_rows": 3}, "is not divisible into groups of 3 rows"),
    ],
)
def test_options_that_cannot_be(options, message):
    network = Network(functools.partial(moe.MoeMlp, D, F, **({"num_experts": E} | options)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: network.bind(network.init(key))(X), KEY)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("expert", {"num_experts": 6}, "'expert' of size 6 is not divisible by expert=4"),
        ("expert", {"group_rows": 2}, "give 4 groups, which the 8 devices"),
        ("cut_rows", {}, "groups_per_row to a multiple of 2"),
        (layout(CUBE, BOTH, expert=("expert", "model")), {}, "of which all do, or none"),
    ],
)
def test_layouts_that_cannot_be(where, options, message):
    network = Network(functools.partial(moe.MoeMlp, D, F, **({"num_experts": E} | options)))
    partitioner = Partitioner(LAYOUTS[where] if isinstance(where, str) else where)
    with partitioner.activate(), pytest.raises(Exception, match=message):
        jax.eval_shape(lambda key: network.bind(network.init(key))(X), KEY)
