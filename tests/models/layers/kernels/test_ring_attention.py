"""Attention over a cut length, by ring and by all-to-all, is attention: forward, backward, under every wrapper."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from attention_cases import TRANSFORMATIONS, Case, arrays, assert_equals_reference, attend, partitioner
from tiers import tiers
from tiny import losses, program

from meshway.models.layers.kernels.ring_attention import RingAttention
from meshway.models.layers.kernels.ulysses import UlyssesAttention
from meshway.models.layers.masks import AttentionMetadata, Mask, make_attention_mask, row_positions

RING, PLAIN, ULYSSES = RingAttention(True, 4, 3), RingAttention(False, 5, 4), UlyssesAttention(5, 4)
PACKED = Case(length=20, causal=True, segments=True, bias=True, dropout_rate=0.25)
EVERYTHING = dataclasses.replace(PACKED, alibi=True, window=9, soft_cap=1.5, sinks=True)
CROSS = Case(length=8, kv_length=20, segments=True)
CASES = [
    PACKED,
    EVERYTHING,
    Case(window=5, sinks=True, kv_heads=4),
    CROSS,
    Case(causal=True, kv_heads=4),
    Case(segments=True, bias=True, kv_heads=1),
    Case(causal=True, segments=True, prefix=True, bias=True),
    Case(length=40, causal=True, segments=True, kv_heads=1),
]
ON = [(RING, (2, 2, 2)), (RING, (1, 8, 1)), (PLAIN, (1, 4, 2)), (ULYSSES, (2, 2, 2)), (ULYSSES, (1, 4, 1))]


@pytest.mark.slow
def test_balanced_ring_equals_the_reference():
    # Parts of five tokens do not halve; heads are cut as well, and one key head serves two queries' heads.
    assert_equals_reference(RING, EVERYTHING, partitioner((1, 4, 2)))


def test_plain_ring_equals_the_reference():
    assert_equals_reference(RING, CROSS, partitioner((1, 4, 1)))


def test_all_to_all_equals_the_reference():
    # Two key heads over four devices that cut heads: each is repeated once.
    assert_equals_reference(ULYSSES, EVERYTHING, partitioner((2, 2, 2)))


WHOLE = [(PACKED, RING, (2, 1, 2)), (PACKED, ULYSSES, (4, 1, 2))]  # a length that no device shares
POSSIBLE = WHOLE + [
    (case, kernel, mesh)
    for case in CASES
    for kernel, mesh in ON
    if not any(length % mesh[1] for length in (case.length, case.kv_length or 0))
]


# Each case, and each kernel on each mesh.
IN_TURN = [(one, *on) for n, one in enumerate(CASES) for m, on in enumerate(ON) if (n + 2 * m) % 5 == 0]


@pytest.mark.parametrize(
    "case, kernel, mesh", tiers(POSSIBLE, slow=[*WHOLE, *(case for case in IN_TURN if case in POSSIBLE)]), ids=str
)
def test_equals_the_reference(case, kernel, mesh):
    rules = {} if case.kv_heads % mesh[2] == 0 else {"kv_heads": None}
    assert_equals_reference(kernel, case, partitioner(mesh, **rules))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [RING, ULYSSES], ids=str)
def test_several_mesh_axes_may_cut_the_length(kernel):
    both = ("data", "sequence")
    assert_equals_reference(
        kernel, PACKED, partitioner((2, 2, 2) if kernel is RING else (2, 2, 1), batch=None, length=both, kv_length=both)
    )


def name(value):
    return getattr(value, "__name__", str(value))


INSIDE = [(kernel, around) for kernel in (RING, PLAIN, ULYSSES) for around in TRANSFORMATIONS]


@pytest.mark.parametrize("kernel, around", tiers(INSIDE, slow=INSIDE[::4]), ids=name)
def test_works_inside_other_transformations(kernel, around):
    assert_equals_reference(kernel, PACKED, partitioner((2, 2, 2), batch=None), around=around)


SCANNED, UNROLLED = ("SCAN=True", "REMAT='full'"), ("SCAN=False", "REMAT='minimal'")


STACKS = [
    (family, layout, *ways)
    for layout, *ways in (("ring", SCANNED, UNROLLED), ("ring_model", UNROLLED, SCANNED))
    for family in ("t5_1_1", "lm")
]


@pytest.mark.parametrize("family, layout, t5, lm", tiers(STACKS, slow=[STACKS[1], STACKS[2]]), ids=str)
def test_a_stack_of_layers_has_the_loss_of_one_device(family, layout, t5, lm):
    two = ("NUM_ENCODER_LAYERS=2", "NUM_DECODER_LAYERS=2") if family == "t5_1_1" else ("NUM_LAYERS=2",)
    shape = ("mesh.MeshShape.ici={'data': 2, 'sequence': 4}",) if layout == "ring" else ()
    found, wanted = (
        losses(program(family, *two, *more, layout=name), 3)[0]
        for name, more in ((layout, (*shape, *(t5 if family == "t5_1_1" else lm))), ("single", ()))
    )
    assert found == pytest.approx(wanted, rel=2e-5)


REFUSED = {
    "bias": (RING, "takes a bias as positions.PositionBias .* shape \\(1, 4, 20, 20\\)"),
    "mask": (RING, "mask made by masks.make_attention_mask"),
    "keys elsewhere": (RING, "'length' to \\('sequence',\\) and 'kv_length' to \\(\\)"),
    "head_dim": (ULYSSES, "map 'head_dim' to None"),
    "heads": (ULYSSES, "4 query heads leave 2 a device on \\('model',\\), which are not divisible by sequence=4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused(what):
    kernel, message = REFUSED[what]
    (query, key, value, *_), _, _ = arrays(PACKED)
    rules = {"keys elsewhere": {"kv_length": None}, "head_dim": {"heads": None, "kv_heads": None, "head_dim": "model"}}
    given = {"bias": {"bias": jnp.zeros((1, 4, 20, 20))}, "mask": {"mask": Mask(jnp.ones((1, 1, 20, 20), bool))}}
    with partitioner((1, 4, 2), **rules.get(what, {})).activate(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: kernel(query, key, value, **given.get(what, {})))


def test_a_length_of_one_is_whole_and_attends_all_the_same():
    assert_equals_reference(RING, Case(length=1, kv_length=20, segments=True), partitioner((1, 4, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, sends",
    [(PLAIN, ["collective-permute"]), (RING, ["collective-permute"]), (ULYSSES, ["all-gather", "all-to-all"])],
    ids=str,
)
def test_only_what_each_form_needs_is_sent(kernel, sends):
    on, case = partitioner((2, 4, 1)), Case(causal=True, segments=True)
    operands, (segments, _), _ = arrays(case)
    four = on.sharding(("batch", "length", "heads", "head_dim"), operands[0].shape)
    with on.activate():
        placed = [jax.device_put(x, four) for x in operands[:3]]
        compiled = (
            jax.jit(lambda *x: attend(kernel, case, *x, None, None)[0], out_shardings=four).lower(*placed).compile()
        )
    found = set(
        re.findall(
            r" (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
        )
    )
    assert sorted(found) == sends  # all-to-all gathers segments and places, a few integers a token


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [RingAttention(True, 256, 256), RingAttention(False, 256, 256), UlyssesAttention(256, 256)], ids=str
)
def test_memory_falls_with_devices(kernel):
    """Temporary bytes a device of forward and backward at length 16384: the reference's scores alone take 8 GiB."""
    length, heads, head_dim = 16384, 8, 32
    found = []
    for devices in (1, 2, 4, 8):
        on = partitioner((1, devices, 1))
        four = on.sharding(("batch", "length", "heads", "head_dim"), (1, length, heads, head_dim))
        two = on.sharding(("batch", "length"), (1, length))

        def loss(query, key, value, segments):
            metadata = AttentionMetadata(segments, row_positions(length))
            return jnp.sum(kernel(query, key, value, mask=make_attention_mask(metadata, metadata, causal=True)))

        arguments = [jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32, sharding=four)] * 3
        arguments.append(jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=two))
        with on.activate():
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(four,) * 3).lower(*arguments).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
        print(f"{kernel} {devices} devices: {found[-1] / 2**20:.1f} MiB", flush=True)
    shard = 4 * length * heads * head_dim
    assert found[0] < 24 * shard  # no scores: they would be 64 times an operand for each head
    assert all(more > less for more, less in zip(found, found[1:])), found
    assert found[-1] < 0.4 * found[0]
