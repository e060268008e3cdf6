"""Collectives read from HLO: notations, loops, branches, and real programs whose bytes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.errors import UserError
from meshway.framework.planning.collectives import read_collectives

MESH = {"data": 2, "model": 4}


def program(*lines: str, more: str = "") -> str:
    """An HLO program whose entry holds `lines` after a parameter p of 32 floats."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule jit_f, is_scheduled=true, num_partitions=8
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}
{more}
ENTRY %main (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0:T(8,128)}} parameter(0), metadata={{op_name="state.params[\\'w\\']"}}
{body}
}}
"""


def all_reduce(groups: str) -> str:
    return program(
        f"ROOT %r = f32[4,8]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, "
        'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/psum"}'
    )


@pytest.mark.parametrize(
    "groups, axes, size",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("model",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{}", ("data", "model"), 8),
        ("[2,4]<=[8]", ("model",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("data",), 2),  # {0,4},{2,6},{1,5},{3,7}
        ("[1,8]<=[8]", ("data", "model"), 8),
        ("[4,2]<=[8]", ("model",), 2),  # half of the axis
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("model",), 4),
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_0'}", ("data",), 2),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",), 2),
        ("mesh['axis_0'=8], device_ids=(0,4,1,5,2,6,3,7) {'axis_0':(4)2}", ("data",), 2),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ("model",), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1'}", ("data", "model"), 8),
    ],
)
def test_groups_in_all_notations_become_mesh_axes(groups, axes, size):
    (row,) = read_collectives(all_reduce(groups), MESH)
    assert (row.axes, row.group) == (axes, size)
    assert row.payload == 4 * 8 * 4
    assert row.sent == 2 * (size - 1) / size * 128
    assert row.origin == "jit(f)/psum"
    assert row.sources == {"state.params"}


def test_groups_of_one_device_move_nothing():
    assert read_collectives(all_reduce("[8,1]<=[8]"), MESH) == []


def test_kinds_their_payloads_and_what_a_ring_sends():
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"
    text = program(
        f"%g = bf16[16,8]{{1,0}} all-gather(%p), channel_id=1, {groups}, dimensions={{0}}",
        f"%s = f32[1,8]{{1,0}} reduce-scatter(%p), channel_id=2, {groups}, dimensions={{0}}, to_apply=%add",
        f"%t = (f32[1,8]{{1,0}}, f32[1,8]{{1,0}}, /*index=2*/f32[1,8]{{1,0}}, f32[1,8]) all-to-all(%a, %b, %c, %d), "
        f"channel_id=3, {groups}",
        "ROOT %q = f32[4,8]{1,0} collective-permute(%p), channel_id=4, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
    )
    rows = read_collectives(text, MESH)
    sent = {kind: sum(row.sent for row in rows if row.kind == kind) for kind in {row.kind for row in rows}}
    assert sent == {
        "all-gather": 3 / 4 * 16 * 8 * 2,
        "reduce-scatter": 3 / 4 * 4 * 8 * 4,
        "all-to-all": 3 / 4 * 4 * 8 * 4,
        "collective-permute": 4 * 8 * 4,
    }
    assert {row.axes for row in rows} == {("model",), ("data",)}
    assert sum(row.sent for row in rows if row.axes == ("model",)) == 192 + 96 + 96


def test_asynchronous_pairs_count_once_by_their_result():
    groups = "replica_groups=[2,4]<=[8], use_global_device_ids=true"
    more = f"""%wrapped (x: f32[4,8]) -> f32[1,8] {{
  %x = f32[4,8] parameter(0)
  ROOT %inner = f32[1,8]{{1,0}} reduce-scatter(%x), channel_id=7, {groups}, dimensions={{0}}, to_apply=%add
}}"""
    text = program(
        f"%a = (f32[4,8]{{1,0}}, f32[16,8]{{1,0:S(1)}}) all-gather-start(%p), channel_id=1, {groups}, dimensions={{0}}",
        "%b = f32[16,8]{1,0:S(1)} all-gather-done(%a)",
        "%c = (f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
        "%d = f32[4,8] collective-permute-done(%c)",
        "%e = ((f32[4,8]), f32[1,8], u32[]) async-start(%p), calls=%wrapped",
        "%f = ((f32[4,8]), f32[1,8], u32[]) async-update(%e), calls=%wrapped",
        "%g = f32[1,8] async-done(%f), calls=%wrapped",
        f"%h = f32[4,8] all-reduce-start(%p), channel_id=3, {groups}, to_apply=%add",
        "ROOT %i = f32[4,8] all-reduce-done(%h)",
        more=more,
    )
    rows = read_collectives(text, MESH)
    assert {row.kind: row.payload for row in rows} == {
        "all-gather": 16 * 8 * 4,
        "collective-permute": 4 * 8 * 4,
        "reduce-scatter": 4 * 8 * 4,
        "all-reduce": 4 * 8 * 4,
    }
    assert len(rows) == 4 and {row.axes for row in rows} == {("model",)}


def test_a_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    more = """%all-reduce-scatter.3 (x: f32[4,8]) -> f32[1,8] {
  %x = f32[4,8] parameter(0)
  %inner = f32[4,8] all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,8] dynamic-slice(%inner, %zero, %zero), dynamic_slice_sizes={1,8}
}"""
    (row,) = read_collectives(
        program("ROOT %f = f32[1,8] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", more=more), MESH
    )
    assert (row.kind, row.payload, row.sent) == ("reduce-scatter", 128, 3 / 4 * 128)


def loop(condition: str, attributes: str = "") -> str:
    more = f"""%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8] get-tuple-element(%s), index=1
  %r = f32[4,8] all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %r)
}}
%condition (s: (s32[], f32[4,8])) -> pred[] {{
  %s = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  {condition}
}}"""
    return program(
        "%z = s32[] constant(0)",
        "%t = (s32[], f32[4,8]) tuple(%z, %p)",
        f"%w = (s32[], f32[4,8]) while(%t), condition=%condition, body=%body{attributes}",
        "ROOT %o = f32[4,8] get-tuple-element(%w), index=1",
        more=more,
    )


def test_what_follows_a_kernel_that_describes_itself_in_lines_of_its_own_is_read():
    """As Pallas' attention kernels do, in a loop; a computation of another core ends with that core's name."""
    more = """%other (q: f32[4,8]) -> f32[4,8] {
  ROOT %q = f32[4,8] parameter(0)
}, execution_thread="sparsecore"

%layer (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8] parameter(0)
  %kernel = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"block":"{\\"q\\": 512}"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %r = f32[4,8]{1,0} all-reduce(%kernel), replica_groups=[2,4]<=[8], to_apply=%add
}
"""
    (row,) = read_collectives(program("ROOT %c = f32[4,8]{1,0} call(%p), to_apply=%layer", more=more), MESH)
    assert (row.kind, row.axes, row.array.shape, row.sources) == ("all-reduce", ("model",), (4, 8), {"state.params"})


def test_loops_count_their_trips_known_compared_or_unknown():
    compared = "%n = s32[] constant(7)\n  ROOT %c = pred[] compare(%i, %n), direction=LT"
    unknown = "%m = s32[] get-tuple-element(%s), index=0\n  ROOT %c = pred[] compare(%i, %m), direction=LT"
    known = ', backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}'
    quoted = ', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"6\\"}}"'
    for text, count in [(loop(compared, known), 5), (loop(unknown, quoted), 6), (loop(compared), 7)]:
        (row,) = read_collectives(text, MESH)
        assert (row.count, row.payload, row.note) == (count, 128 * count, "")
        assert row.sources == {"state.params"}  # through the loop's state
    (row,) = read_collectives(loop(unknown), MESH)
    assert row.count == 1 and "unknown length" in row.note


def test_of_a_conditional_the_dearest_branch_counts_and_calls_are_followed():
    def branch(name: str, size: int) -> str:
        return f"""%{name} (x: f32[{size}]) -> f32[{size}] {{
  %x = f32[{size}] parameter(0)
  ROOT %r = f32[{size}] all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}}"""

    text = program(
        "%k = s32[] constant(1)",
        "%u = f32[4] constant({1,2,3,4})",
        "%v = f32[16] constant({...})",
        "%c = f32[4] conditional(%k, %u, %v), branch_computations={%small, %large}",
        "ROOT %d = f32[4] call(%u), to_apply=%small",
        more=branch("small", 4) + "\n" + branch("large", 16),
    )
    rows = read_collectives(text, MESH)
    assert sorted(row.payload for row in rows) == [16, 64]
    assert ["conditional" in row.note for row in rows] == [True, False]


def test_what_is_no_hlo_is_refused():
    with pytest.raises(UserError, match="no ENTRY"):
        read_collectives("module @jit_f {}", MESH)


@pytest.fixture(scope="module")
def real() -> list:
    """A program of one collective of each kind on a mesh whose devices are in another order than their ids."""
    devices = np.array(jax.devices())[[5, 0, 7, 2, 1, 6, 3, 4]].reshape(2, 4)
    mesh = Mesh(devices, ("data", "model"))

    def f(x: jax.Array, y: jax.Array) -> jax.Array:
        def inside(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(jax.lax.psum(x, "data")), None

        once = jax.lax.psum(x, "model")
        looped = jax.lax.scan(inside, y, None, length=5)[0]
        permuted = jax.lax.ppermute(y * 2, "model", [(i, (i + 1) % 4) for i in range(4)])
        exchanged = jax.lax.all_to_all(y * 3, "model", 1, 0, tiled=True)
        scattered = jax.lax.psum_scatter(y * 4, "data", tiled=True)
        gathered = jax.lax.all_gather(y * 5, "data", tiled=True)
        return once.sum() + looped.sum() + permuted.sum() + exchanged.sum() + scattered.sum() + gathered.sum()

    spec = PartitionSpec("data", "model")
    manual = jax.shard_map(f, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec(), check_vma=False)
    x = jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    y = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
    return read_collectives(jax.jit(manual).lower(x, y).compile().as_text(), mesh.shape)


def test_a_real_psum_over_one_axis_has_exactly_its_bytes_and_five_times_that_in_a_scan(real):
    once, looped = [row for row in real if row.kind == "all-reduce"]
    assert (once.axes, once.count, once.payload) == (("model",), 1, 3 * 2 * 4)
    assert (looped.axes, looped.count, looped.payload) == (("data",), 5, 5 * 4 * 4 * 4)


def test_real_permutes_exchanges_scatters_and_gathers(real):
    shard = 4 * 4 * 4
    found: dict = {}
    for row in real:
        key = (row.kind, row.axes)
        found[key] = found.get(key, 0) + row.payload
    del found["all-reduce", ("model",)], found["all-reduce", ("data",)]
    assert found == {
        ("collective-permute", ("model",)): shard,
        ("all-to-all", ("model",)): shard,
        ("reduce-scatter", ("data",)): shard,
        ("all-gather", ("data",)): 2 * shard,
    }
