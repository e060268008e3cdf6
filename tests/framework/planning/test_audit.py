"""What is read of a compiled program: its collectives by kind and axis, and the donated arrays that are copied."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.errors import UserError
from meshway.framework.planning.audit import audit, exchanges, format_audit
from meshway.launch import inspection


@pytest.fixture(scope="module")
def found():
    """A step that updates one array of its state in place, and returns another in a type that does not fit."""
    mesh = Mesh(jax.devices()[:8], ("model",))

    def step(state, x):
        summed = jax.lax.psum(x, "model") + jax.lax.psum(2 * x, "model")
        return {"kept": state["kept"] + summed.sum(), "cast": state["cast"].astype(jnp.bfloat16)}, summed

    split, whole = PartitionSpec("model"), PartitionSpec()
    manual = jax.shard_map(step, mesh=mesh, in_specs=(split, whole), out_specs=(split, whole), check_vma=False)
    state = {name: jax.ShapeDtypeStruct((8, size), jnp.float32) for name, size in (("kept", 4), ("cast", 8))}
    placed = (NamedSharding(mesh, split), NamedSharding(mesh, whole))
    jitted = jax.jit(manual, in_shardings=placed, out_shardings=placed, donate_argnums=0)
    text = jitted.lower(state, jax.ShapeDtypeStruct((32,), jnp.float32)).compile().as_text()
    return audit(text, mesh.shape, ["state"])


def test_collectives_are_summed_by_kind_and_axes(found):
    (row,) = exchanges(found.collectives)
    assert (row.kind, row.axes, row.payload) == ("all-reduce", ("model",), 2 * 32 * 4)
    assert row.sent == 2 * 7 / 8 * row.payload


def test_a_donated_array_that_no_result_takes_is_named(found):
    assert {each.name: each.aliased for each in found.donated} == {"state['kept']": True, "state['cast']": False}
    assert "donated: 1 of 2 arrays" in format_audit("a step", found)
    assert "not aliased: state['cast'] (32 B)" in format_audit("a step", found)


def test_what_inspect_hlo_refuses():
    program = tiny.program("lm")
    with pytest.raises(UserError, match="'decoder' is none of step, score, prefill, decode; did you mean 'decode'"):
        inspection.layout(program, hlo=True, programs="step,decoder")
    with pytest.raises(UserError, match="give --hlo too"):
        inspection.layout(program, programs="step")
    with pytest.raises(UserError, match="leave out --compile"):
        inspection.layout(program, hlo=True, compile=True)


@pytest.mark.slow
def test_inspect_hlo_of_every_program():
    text = inspection.layout(tiny.program("lm", layout="model_1d"), hlo=True, programs="decode,step,score,prefill")
    decode, step, score, prefill = text.split("\n\n")
    assert decode.startswith("a step of decoding: a device sends") and "donated: 2 of 2 arrays" in decode
    assert step.startswith("a train step") and "written in place" in step and "not aliased" not in step
    assert "all-reduce  model" in score and "donated" not in score + prefill
