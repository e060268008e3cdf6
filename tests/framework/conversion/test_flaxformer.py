"""Checkpoints of Flaxformer's networks come in as ours and compute what Flaxformer computed from them."""

from pathlib import Path

import jax
import numpy as np
import pytest
from converted import params_of
from tiers import tiers

from meshway.framework.conversion.t5x import network_of
from meshway.framework.conversion.t5x_files import T5XFiles, write_native
from meshway.framework.conversion.tensor_files import Spec
from meshway.framework.errors import UserError
from meshway.launch import convert_in
from meshway.launch.convert import convert
from meshway.launch.recipe import bindings
from meshway.launch.recipe.bindings import build_network

GOLDENS = Path(__file__).parent.parent.parent / "goldens" / "flaxformer"
KINDS = {
    "t5_1_1": "models/t5_1_1/common.gin",
    "fused": "models/t5_1_1/common.gin",
    "fused_scanned": "models/umt5/common.gin",
    "switch": "models/switch/common.gin",
    "top_2": "models/st_moe/common.gin",
}


def golden(kind):
    """Returns (parameters by Flaxformer's names, a batch, logits)."""
    arrays = np.load(GOLDENS / f"{kind}.npz")
    parts = [
        {name.removeprefix(part): arrays[name] for name in arrays.files if name.startswith(part)}
        for part in ("params/", "batch/")
    ]
    return *parts, arrays["logits"]


def written(folder, arrays, config=""):
    """Writes arrays as T5X does; returns the run's folder."""
    specs = {f"target/{name}": Spec(array.shape, array.dtype) for name, array in arrays.items()}
    state = {
        "state/step": np.array(7, np.int32),
        "target/encoder/__save_format_metadata__/__version__": np.array(0, np.int32),
    }
    write_native(folder / "checkpoint_7", specs, lambda name: arrays[name.removeprefix("target/")], state)
    (folder / "config.gin").write_text(config)
    return folder


def whole(folder, recipe):
    """Returns a checkpoint's parameters under our names."""
    files = T5XFiles(folder)
    network = network_of(files)
    recipe.write_text(bindings.text_of(network.include, network.bindings))
    values = network.values(files, convert_in.shapes_of(build_network(recipe)[0]))
    return {path: each.shard((slice(None),) * each.ndim) for path, each in values.items()}


@pytest.mark.parametrize("kind", tiers(KINDS, quick=["fused"], slow=["t5_1_1", "fused_scanned", "switch", "top_2"]))
def test_logits_are_flaxformers(kind, tmp_path):
    arrays, batch, logits = golden(kind)
    source = written(tmp_path / "t5x", arrays, "NUM_SELECTED_EXPERTS = 2\n" if kind == "top_2" else "")
    assert network_of(T5XFiles(source)).include == KINDS[kind]
    convert(str(source), str(tmp_path / "run"))
    recipe = tmp_path / "run" / "recipe.gin"
    if kind in ("switch", "top_2"):  # as many slots as there are tokens, so that none is dropped
        recipe.write_text(recipe.read_text() + "\nCAPACITY_FACTOR = 4.0\nEVAL_CAPACITY_FACTOR = 4.0\n")
    model = build_network(recipe)[0]
    for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        batch[f"{side}_segment_ids"] = (batch[tokens] > 0).astype(np.int32)
    batch["decoder_positions"] = np.broadcast_to(np.arange(8, dtype=np.int32), (3, 8))
    found = jax.jit(lambda params, batch: model.logits(params, batch, None))(params_of(tmp_path / "run", model), batch)
    real = batch["decoder_target_tokens"] > 0
    np.testing.assert_allclose(np.asarray(found)[real], logits[real], rtol=0, atol=2e-5 * np.abs(logits[real]).max())


def apart(arrays, scanned):
    """Returns the same parameters as Flaxformer keeps them where kernels are not fused."""
    found = {}
    for name, array in arrays.items():
        at, _, kind = name.removesuffix("/kernel").rpartition("/")
        parts = {
            "qkv_fused": ("query", "key", "value"),
            "kv_fused": ("key", "value"),
            "wi_fused": ("wi_0", "wi_1"),
        }.get(kind)
        if parts is None:
            found[name] = array
            continue
        for place, part in enumerate(parts):
            found[f"{at}/{part}/kernel"] = np.take(array, place, axis=1 + scanned)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "fused_scanned"])
def test_fused_kernels_are_the_same_parameters_as_kernels_apart(kind, tmp_path):
    arrays = golden(kind)[0]
    config = "dense_attention.MultiHeadDotProductAttention.rescale_logits = True\n"
    plain = written(tmp_path / "plain", apart(arrays, kind == "fused_scanned"), config)
    assert network_of(T5XFiles(plain)).bindings["attention.Attention.scale_logits"] is True
    wanted, found = whole(plain, tmp_path / "a.gin"), whole(written(tmp_path / "fused", arrays), tmp_path / "b.gin")
    assert wanted.keys() == found.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value)


def copied(old, new):
    return lambda arrays: arrays.update({new: arrays[old]})


NORM = "encoder/encoder_norm/scale"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change", "config", "message"),
    [
        ("t5_1_1", copied(NORM, "encoder/side_relpos_bias/rel_embedding"), "", "side_.*LongT5's transient global att"),
        ("t5_1_1", copied(NORM, "decoder/layers_1/o_wo_fused/kernel"), "", "whose attention and MLP are fused"),
        ("t5_1_1", dict, "  attention_factory = @long_attention.EncoderLocalSelfAttention\n", "LongT5's attention"),
        ("switch", copied(NORM, "encoder/layers_1/pre_extra_mlp_layer_norm/scale"), "", "ST-MoE's second MLP"),
        ("switch", dict, "SparseEncoder.router = @routing.ExpertsChooseMaskedRouter()\n", "experts that choose their"),
        ("switch", dict, "NUM_SELECTED_EXPERTS = 9\n", r"config.gin: a token takes \[9\] of 4 experts"),
        (
            "switch",
            lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("encoder/layers_1/mlp")],
            "",
            "experts in layers encoder none; decoder 1: meshway's switch has them in every second layer",
        ),
        ("fused", copied(NORM, "decoder/layers_1/self_attention/key/kernel"), "", "fused kernels and without; whether"),
    ],
)
def test_what_meshway_has_not_is_named(kind, change, config, message, tmp_path):
    arrays = golden(kind)[0]
    change(arrays)
    with pytest.raises(UserError, match=message):
        network_of(T5XFiles(written(tmp_path, arrays, config)))


@pytest.mark.slow
def test_activations_are_those_of_its_config(tmp_path):
    bound = "activations = ('swish', 'linear')\n"
    source = written(tmp_path, golden("t5_1_1")[0], f"dense.MlpBlock:\n  {bound}expert/dense.MlpBlock.{bound}")
    assert network_of(T5XFiles(source)).bindings["ACTIVATIONS"] == ("silu", "linear")


@pytest.mark.slow
def test_the_optimizers_state_of_fused_kernels_is_refused(tmp_path):
    source = written(tmp_path / "t5x", golden("fused")[0])
    with pytest.raises(UserError, match="Flaxformer's fused kernels or experts, whose optimizer state is not"):
        convert(str(source), str(tmp_path / "run"), optimizer_state=True)
