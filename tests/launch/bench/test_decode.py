"""`meshway bench decode`: steps are timed beside memory, bytes are those of the model, and nothing is compiled late."""

import dataclasses
import io
import json

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench import decode
from meshway.launch.bench.decode import Setting, format_table
from meshway.launch.bench.decode_results import Found, Result
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

SMALL = (
    "D_MODEL=8",
    "D_FF=12",
    "NUM_HEADS=4",
    "HEAD_DIM=2",
    "VOCAB_SIZE=128",
    "bench.decode.Setting.rounds=1",
    "bench.decode.Setting.prompt_length=4",
    "bench.decode.Setting.new_tokens=4",
    "bench.decode.Setting.mixed_batches=4",
)


def arguments(recipe, *bindings):
    invocation = Invocation("bench", "decode", (recipe,), (*SMALL, "LAYOUT='single'", *bindings))
    return config.load(invocation, import_unreferenced=False).build("bench.decode.measure")


def built(recipe, *bindings):
    sharded = arguments(recipe, *bindings)["sharded"]
    return sharded.model, sharded.param_shapes


@pytest.mark.slow
def test_a_language_model_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(decode, "StreamingRead", lambda mesh: bench_decode_read(mesh))
    monkeypatch.setattr(decode, "peak_flops", lambda devices, dtype: (1e9, f"given, {dtype}"))
    options = ("NUM_LAYERS=1", "attention.Attention.num_kv_heads=2", "bench.decode.Setting.batch_sizes=(2,)")
    found = decode.measure(**arguments("bench_decode", *options, "attention.Attention.cache_dtype='int8'"))
    assert found.compilations == 0 and found.mixed_lengths == [2, 4] and found.mesh == {"data": 1}
    (each,) = found.results
    assert each.donated and min(each.step, each.on_device, each.prefill, each.bandwidth) > 0
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # query, key and value of two heads, out, MLP, norms
    # Of the embeddings a row is read for each token; the output layer whole.
    assert each.weights == 4 * (layer + 8 + 8 * 128 + 2 * 8)
    slot = 2 * 2 * 2 * (2 + 4)  # rows, keys and values, heads, int8s and their scale
    assert each.padded == slot * (4 + 4)
    assert each.live == pytest.approx(slot * (4 + 1.5))  # 4 to 7 slots in the four steps
    assert each.prefill_flops == 2 * (2 * 4) * 2 * 8 * 4  # all that a cache of one layer needs: its keys and values
    assert each.floor == (each.weights + each.live) / each.bandwidth < each.padded_floor
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prompts of 4 tokens, then 4 new ones, on data=1"
    assert any(line.startswith("cache donated") and "yes" in line for line in lines)
    assert any("after warm-up" in line and " 0 programs, over 4 batches" in line for line in lines)


def test_bursts_are_of_whole_predictions(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n\nquit\ngo\n"))
    options = ("NUM_LAYERS=1", "bench.decode.Setting.batch_sizes=(2,)", "bench.decode.Setting.rounds=3")
    assert decode.measure(**arguments("bench_decode", *options, "bench.decode.measure.interleave=True")) is None
    said = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines() if line]
    assert [tag for tag, _ in said] == ["READY", "BURST", "BURST"]
    ready, *bursts = (json.loads(content) for _, content in said)
    assert ready["tokens"] == 2 * 4 and ready["first_done_s"] > 0
    assert all(len(burst["wall"]) == 3 and min(burst["wall"]) > 0 and burst["cpu"] >= 0 for burst in bursts)


def test_bursts_are_of_one_batch_size():
    options = ("NUM_LAYERS=1", "bench.decode.measure.interleave=True")
    with pytest.raises(UserError, match=r"--interleave times one batch size, not \(1, 8\): add --gin"):
        decode.measure(**arguments("bench_decode", *options))


def bench_decode_read(mesh):
    from meshway.framework.planning.hardware import StreamingRead

    return StreamingRead(mesh, device_bytes=2**16)


def test_an_encoder_decoder_reads_its_decoder_and_the_encoded_keys():
    model, params = built("t5_1_1/tiny", "NUM_ENCODER_LAYERS=3", "NUM_DECODER_LAYERS=2")
    weights, cache = decode.step_bytes(model, params, batch_size=3, length=5, new_tokens=4)
    attention, kv_slot = 4 * 8 * 8, 2 * 8
    layer = attention + attention // 2 + 3 * 8 * 12 + 3 * 8  # of cross-attention, query and output alone
    bias = 32 * 4  # at 3 rows of 4 slots all of it may be read
    parts = 2 * layer + 8 + 8 * 128 + 3 * 8
    assert 4 * parts < weights <= 4 * (parts + bias)
    # Keys and values of inputs and of what was decoded, in each layer; and which inputs there are.
    assert cache == 4 * (2 * 3 * kv_slot * (5 + 4) + 3 * 5)


@pytest.mark.slow
def test_a_layout_is_counted_by_what_each_device_holds(monkeypatch):
    monkeypatch.setattr(decode, "StreamingRead", lambda mesh: bench_decode_read(mesh))
    monkeypatch.setattr(decode, "peak_flops", lambda devices, dtype: (1e9, "given"))
    options = (
        "NUM_LAYERS=1",
        "LAYOUT='model_1d'",
        "bench.decode.Setting.batch_sizes=(4,)",
        "bench.decode.Setting.mixed_batches=1",
    )
    given = arguments("bench_decode", *options, "bench.decode.Setting.params_dtype='bfloat16'")
    setting = Setting((4,), 8, 4, 1, 1, "bfloat16")
    found = decode.measure(given["sharded"], setting)
    (each,) = found.results
    assert found.mesh == {"data": 4, "model": 2} and each.donated and found.compilations == 0
    # Cut over `model` once, the rest four times: norms lie on all eight, and embeddings are cut by `model` too.
    cut, whole = 4 * 8 * 8 + 3 * 8 * 12 + 8 * 128 + 4 * 8, 3 * 8
    assert each.weights == 2 * (4 * cut + 8 * whole)
    assert each.padded == 4 * 4 * 2 * 8 * 12  # rows and heads are cut: nothing is held twice


def test_the_table_gives_shares_of_the_floor():
    result = Result(4, 0.02, 0.019, 0.5, 1e9, 6e8, 1e8, 4e8, 2048, 1e11, 1e10, True)
    assert result.floor == pytest.approx(0.007) and result.host_gap == pytest.approx(0.001)
    found = Found([result], 0, [4, 8], {"data": 1}, "known")
    setting = Setting((4,), 8, 4, 1, 3, None)
    row = format_table(found, setting).splitlines()[2]
    assert "20.00 ms" in row and " 200 " in row and "35.0 %" in row and "50.0 %" in row and "+1.00 ms" in row
    assert "20.0 %" in row  # 1 GFLOP in half a second, of 10 GFLOP/s
    copied = dataclasses.replace(found, results=[dataclasses.replace(result, donated=False)])
    assert "NO, a step copies it" in format_table(copied, setting)


def test_the_command_line_knows_it_and_numbers_have_a_range():
    asked = cli.parse(["bench", "decode", "--gin_file=bench_decode", "--new_tokens=5"])
    assert asked.subject == "decode" and asked.bindings == ("bench.decode.Setting.new_tokens=5",)
    with pytest.raises(UserError, match="bench.decode.Setting.new_tokens = 0: it must be at least 1"):
        decode.measure(**arguments("bench_decode", "bench.decode.Setting.new_tokens=0"))
    with pytest.raises(UserError, match=r"attention.Attention.cache_dtype = 'int4': no such dtype"):
        arguments("bench_decode", "attention.Attention.cache_dtype='int4'")
    with pytest.raises(
        UserError, match="params_dtype must be None or one of float32, bfloat16, float16, int8, int4, not 'int2'"
    ):
        decode.measure(**arguments("bench_decode", "bench.decode.Setting.params_dtype='int2'"))
    with pytest.raises(UserError, match="EncoderOnly has no decoder: it neither predicts nor scores text"):
        decode.measure(**arguments("bert/tiny"))
    with pytest.raises(UserError, match="bench.decode.Setting.prompt_length must be at least 2, not 1"):
        decode.measure(**arguments("bench_decode", "bench.decode.Setting.prompt_length=1"))
    with pytest.raises(UserError, match="bench.decode.Setting.batch_sizes must be at least 1, not 0"):
        decode.measure(**arguments("bench_decode", "bench.decode.Setting.batch_sizes=()"))
