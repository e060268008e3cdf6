"""Products whose operands and sums go around rings are those of one device, and send what an all-gather would."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tiers import tiers

from meshway.framework.errors import UserError
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import RINGS, Layout, Partitioner
from meshway.framework.planning.audit import audit
from meshway.models.layers.collective_matmul import gathered
from meshway.models.layers.mlp import Mlp
from meshway.models.module import Network


@dataclasses.dataclass(frozen=True)
class Case:
    """A feed-forward layer on a mesh: d_model and d_ff are multiples of its devices, and odd where these are.

    Attributes:
      parameters, activations: the layout's rules but those that replicate.
      sent: elements that a device gets of others in one pass, as a function of the sizes of axes, rows, d_model, d_ff.
    """

    parameters: tuple
    activations: tuple
    sent: object


def share(*sizes: int) -> float:
    return 1 - 1 / math.prod(sizes)


CASES = {
    # Megatron's, between layers along d_model, or along the length.
    "stream": Case(
        (("mlp", "x"),), (("embed", "x"), ("mlp", "x")), lambda x, rows, model, ff: 2 * rows * model * share(x)
    ),
    "length": Case(
        (("mlp", "x"),),
        (("mlp", "x"), ("length", "x | None")),
        lambda x, rows, model, ff: 2 * rows * model * share(x),
    ),
    "nested": Case(
        (("mlp", "x+y"),),
        (("embed", "x+y"), ("mlp", "x+y")),
        lambda x, y, rows, model, ff: 2 * rows * model * share(x, y),
    ),
    # Operands gathered over y, sums scattered over x, and back.
    "two dimensions": Case(
        (("embed", "x"), ("mlp", "y")),
        (("embed", "x+y"), ("mlp", "y+x")),
        lambda x, y, rows, model, ff: 2 * rows * model / x * share(y) + 3 * rows * ff / y * share(x),
    ),
    # Few tokens a device: kernels go around.
    "weights": Case(
        (("embed", "x"), ("mlp", "y")),
        (("batch", "x"), ("embed", "y"), ("mlp", "y")),
        lambda x, y, rows, model, ff: 3 * model * ff / y * share(x) + 2 * rows * model / x * share(y),
    ),
    "all weights": Case(
        (("embed", "x"), ("mlp", "y")),
        (("batch", "x+y"),),
        lambda x, y, rows, model, ff: 3 * model * ff * share(x, y),
    ),
}
ONE_AXIS, TWO_AXES = [(1,), (2,), (4,), (6,), (8,)], [(2, 2), (2, 4), (4, 2), (2, 3), (3, 2)]
# Each layer on each mesh; ways around a ring in turn, so that both meet each layer and each number of devices.
ALL = [
    (name, mesh, RINGS[(i + j) % 2])
    for i, (name, case) in enumerate(CASES.items())
    for j, mesh in enumerate(ONE_AXIS if {axis for _, axis in case.parameters} == {"x"} else TWO_AXES)
]
QUICK = [("two dimensions", (2, 2), "bidirectional")]
SLOW = [
    ("stream", (6,), "one_way"),
    ("stream", (1,), "bidirectional"),
    ("length", (4,), "bidirectional"),
    ("nested", (3, 2), "bidirectional"),
    ("two dimensions", (2, 3), "one_way"),
    ("weights", (3, 2), "bidirectional"),
    ("all weights", (2, 2), "one_way"),
]
ALL = list(dict.fromkeys([*QUICK, *SLOW, *ALL]))


def partitioner(case: Case, mesh: tuple[int, ...], products: str) -> Partitioner:
    sizes = dict(zip("xy", mesh, strict=False))
    tables = ([*each, ("*", None)] for each in (case.parameters, case.activations))
    return Partitioner(Layout(MeshShape(sizes), *tables, products=products), jax.devices()[: math.prod(mesh)])


@functools.cache
def layer(parts: int):
    """Returns (sizes, a layer, its parameters, an input) that divide by so many devices."""
    batch, length, d_model, d_ff = parts, parts, 3 * parts, 5 * parts
    network = Network(functools.partial(Mlp, d_model, d_ff, activations=("gelu", "linear")))
    x = jax.random.normal(jax.random.key(1), (batch, length, d_model))
    return (batch * length, d_model, d_ff), network, network.init(jax.random.key(0)), x


def run(on: Partitioner | None, parts: int):
    """Returns a layer's output, the gradients of a function of it, and the collectives of a forward pass."""
    _, network, params, x = layer(parts)

    def forward(params, x):
        return network.bind(params)(x)

    def both(params, x):
        y, pull = jax.vjp(forward, params, x)
        return y, pull(jnp.cos(y))

    if on is None:
        return *jax.jit(both)(params, x), ()
    placed = on.sharding(("batch", "length", "embed"), x.shape)
    where = (on.state_shardings(network.axes(), params), placed)
    shapes = jax.eval_shape(lambda: (params, x))
    compiled = on.compile(forward, *shapes, in_shardings=where, out_shardings=placed)
    collectives = audit(compiled.as_text(), on.mesh.shape).collectives
    trained = on.compile(both, *shapes, in_shardings=where, out_shardings=(placed, where))
    return *trained(*jax.device_put((params, x), where)), collectives


@functools.cache
def reference(parts: int):
    return jax.device_get(run(None, parts)[:2])


@pytest.mark.parametrize("name, mesh, ring", tiers(ALL, QUICK, SLOW))
def test_a_layer_in_rings_is_that_of_one_device_and_sends_what_gathers_would(name, mesh, ring):
    case, parts = CASES[name], math.prod(mesh)
    y, gradients, collectives = run(partitioner(case, mesh, ring), parts)
    for found, expected in zip(jax.tree.leaves((y, gradients)), jax.tree.leaves(reference(parts)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert sum(each.sent for each in collectives) / 4 == pytest.approx(case.sent(*mesh, *layer(parts)[0]), rel=1e-9)
    rings = [each for each in collectives if each.kind == "collective-permute"]
    assert bool(rings) == (parts > 1) and all(len(each.axes) == 1 for each in rings)
    if name != "weights":  # whose activations are gathered and scattered at once
        assert len(rings) == len(collectives)


@pytest.mark.parametrize("ring, hops", [("one_way", 5), ("bidirectional", 3)])
def test_hops_of_a_ring(ring, hops):
    """Of 6 devices: chunks go 5 hops one way, or 3 both ways, of which the last has halves."""

    def chunks(x):
        seen = []
        gathered(x, [("x", 0)], ring, lambda chunk, starts: seen.append(starts[0]))
        assert len(seen) == 6
        return jnp.stack(seen)

    mesh = Mesh(np.array(jax.devices()[:6]), ("x",))
    mapped = jax.shard_map(chunks, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    jaxpr = jax.make_jaxpr(mapped)(jnp.zeros(36))
    permutes = [each for each in jaxpr.eqns[0].params["jaxpr"].eqns if each.primitive.name == "ppermute"]
    ways = [each.params["perm"][0][1] for each in permutes]
    assert ways.count(1) == hops and len(ways) == (5 if ring == "one_way" else 6)
    assert sum(each.outvars[0].aval.size for each in permutes) == 5 * 6
    starts = np.asarray(jax.jit(mapped)(jnp.zeros(36))).reshape(6, 6)
    assert all(sorted(each) == list(range(0, 36, 6)) for each in starts)


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match="Layout.products is one of .*'both_ways'"):
        Layout(MeshShape({"x": 2}), [], [], products="both_ways")
