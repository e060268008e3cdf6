"""Checkpoints that T5X wrote come in as ours and compute what T5X computed from them."""

import functools
import json
import shutil
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
import tensorstore
from converted import T5X, model_of, params_of, sentence_pieces, t5x_runs, whole
from tiers import tiers

from meshway.framework.conversion.rules import check_tensors, pieces_of
from meshway.framework.conversion.t5x import network_of
from meshway.framework.conversion.t5x_files import T5XFiles
from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.conversion.values import values_of
from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.rows import load_text
from meshway.framework.inference.sampling import Sampling
from meshway.launch import convert_in
from meshway.launch.convert import convert
from meshway.launch.recipe import bindings
from meshway.launch.recipe.bindings import build_network

KINDS = ("t5_native", "decoder_native", "decoder_orbax", "scalable_orbax")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of each run, as T5X leaves it: name -> path."""
    return t5x_runs(tmp_path_factory.mktemp("t5x"), *KINDS)


@pytest.fixture
def arrays(runs):
    """The arrays of the encoder-decoder, by T5X's names."""
    files = T5XFiles(runs["t5_native"])
    return {name: files.read(name) for name in files}


def write(folder, arrays, inline=()):
    """Writes arrays as T5X's own format has them, those of `inline` into the msgpack file; returns the run's folder."""
    checkpoint = folder / "checkpoint_7"
    checkpoint.mkdir(parents=True)
    target = {}
    for name, array in arrays.items():
        own = "target." + name.replace("/", ".")
        spec = {
            "driver": "zarr",
            "dtype": array.dtype.name,
            "kvstore": {"driver": "gcs", "bucket": "somewhere", "path": f"{own}/"},
            "metadata": {
                "shape": list(array.shape),
                "chunks": list(array.shape),
                "compressor": {"id": "gzip", "level": 1},
            },
        }
        *parents, last = name.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, target)
        if name in inline:
            data = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
            node[last] = msgpack.ExtType(1, data)
            continue
        node[last] = spec
        kvstore = {"driver": "file", "path": f"{checkpoint / own}/"}
        tensorstore.open(spec | {"kvstore": kvstore}, create=True).result().write(array).result()
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": 7}}}
    (checkpoint / "checkpoint").write_bytes(msgpack.packb(tree))
    return folder


def shapes_of(network, path):
    """Returns the shapes of the parameters of the network that a recipe written to `path` builds."""
    path.write_text(bindings.text_of(network.include, network.bindings))
    return convert_in.shapes_of(build_network(path)[0])


def values_in(folder, shapes):
    """Returns where the parameters [shapes] lie in a checkpoint."""
    files = T5XFiles(folder)
    pieces = pieces_of(network_of(files).rules, "", shapes)
    check_tensors(pieces, {name: files.shape(name) for name in files}, ())
    return values_of(pieces, shapes, files, None)


@pytest.mark.parametrize("kind", ["t5_native", pytest.param("scalable_orbax", marks=pytest.mark.slow)])
def test_beams_and_greedy_decodes_are_t5x_own(runs, tmp_path, kind):
    """Four beams in increasing score, length penalty 0.6; the targets' 7 places hold what is produced."""
    convert(str(runs[kind]), str(tmp_path / "run"))
    model = model_of(tmp_path / "run")
    params = params_of(tmp_path / "run", model)
    expected = np.load(T5X / f"{kind.partition('_')[0]}_expected.npz")
    tokens = expected["batch/encoder_input_tokens"]
    batch = {"encoder_input_tokens": tokens, "encoder_segment_ids": (tokens > 0).astype(np.int32)}
    decode = functools.partial(jax.jit, static_argnums=0)(
        lambda decoder, params, batch: decoder(model, params, batch, 7, Stop((1,)), np.arange(3), jax.random.key(0))
    )
    beams, greedy = decode(BeamSearch(4, 0.6), params, batch), decode(Sampling(temperature=0.0), params, batch)
    np.testing.assert_array_equal(beams.tokens, expected["beam4"])
    np.testing.assert_allclose(beams.scores, expected["beam4_scores"], rtol=1e-5)
    np.testing.assert_array_equal(greedy.tokens[:, 0], expected["greedy"])


@pytest.mark.parametrize("kind", tiers(KINDS, quick=["t5_native", "decoder_orbax"], slow=KINDS))
def test_logits_and_loss_are_t5x_own(runs, tmp_path, kind):
    convert(str(runs[kind]), str(tmp_path / "run"))
    model = model_of(tmp_path / "run")
    expected = np.load(T5X / f"{kind.partition('_')[0]}_expected.npz")
    batch = {name.removeprefix("batch/"): expected[name] for name in expected.files if name.startswith("batch/")}
    for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        if tokens in batch:
            batch[f"{side}_segment_ids"] = (batch[tokens] > 0).astype(np.int32)
    batch["decoder_positions"] = np.broadcast_to(np.arange(11, dtype=np.int32), (3, 11))

    @jax.jit
    def outputs(params, batch):
        return model.logits(params, batch, None), model.loss(params, batch, None)[2]["cross_entropy"][0]

    logits, loss = outputs(params_of(tmp_path / "run", model), batch)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5 * np.abs(expected["logits"]).max())
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)


@pytest.fixture(scope="module")
def t5(runs):
    """(the shapes of the encoder-decoder's parameters, their values)."""
    shapes = shapes_of(network_of(T5XFiles(runs["t5_native"])), runs["t5_native"] / "recipe.gin")
    return shapes, whole(values_in(runs["t5_native"], shapes))


def scanned(arrays, name_of):
    """Returns the same network as T5X stores it where layers are scanned: one array each, layers in dimension 1."""
    found = {name: array for name, array in arrays.items() if "/layers_" not in name}
    for name in arrays:
        if "/layers_0/" in name:
            stack, _, rest = name.partition("/layers_0/")
            layers = [arrays[name.replace("layers_0", f"layers_{layer}")] for layer in range(2)]
            found[f"{stack}/{name_of(stack)}/{rest}"] = np.stack(layers, axis=1)
    return found


@pytest.mark.parametrize("name_of", [lambda stack: "layers", lambda stack: stack], ids=["layers", "stack"])
def test_scanned_layers_are_the_same_parameters(tmp_path, arrays, t5, name_of):
    shapes, expected = t5
    folder = write(tmp_path, scanned(arrays, name_of))
    assert network_of(T5XFiles(folder)).bindings["NUM_ENCODER_LAYERS"] == 2
    found = whole(values_in(folder, shapes))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path])


def test_a_shard_reads_its_part_only(runs, t5):
    shapes, expected = t5
    path = "decoder/block_0/attention/query/kernel"  # [layers, embed, heads, head_dim]
    index = (slice(1, 2), slice(8, 24), slice(1, 3), slice(None))
    np.testing.assert_array_equal(values_in(runs["t5_native"], shapes)[path].shard(index), expected[path][index])


def test_sizes_come_from_the_shapes(runs):
    network = network_of(T5XFiles(runs["t5_native"], step=1234))
    assert network.include == "models/t5_1_1/common.gin"
    assert network.bindings == {
        "VOCAB_SIZE": 128,
        "D_MODEL": 32,
        "D_FF": 48,
        "NUM_HEADS": 3,
        "HEAD_DIM": 8,
        "NUM_BUCKETS": 32,
        "ACTIVATIONS": ("gelu", "linear"),
        "TIED_LOGITS": False,
        "NUM_ENCODER_LAYERS": 2,
        "NUM_DECODER_LAYERS": 2,
    }


def biases_by_layer(arrays):
    """Returns the same network as it is where each layer has its stack's position bias, and layers lie side by side."""
    found = {name: array for name, array in arrays.items() if "relpos_bias" not in name}
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            bias = arrays[f"{stack}/relpos_bias/rel_embedding"] + layer
            found[f"{stack}/layers_{layer}/relpos_bias/rel_embedding"] = bias
    return found


def test_position_biases_of_layers_that_are_not_scanned(tmp_path, arrays):
    folder = write(tmp_path, biases_by_layer(arrays))
    network = network_of(T5XFiles(folder))
    assert (network.include, network.bindings["NUM_HEADS"]) == ("models/umt5/common.gin", 3)
    found = whole(values_in(folder, shapes_of(network, tmp_path / "recipe.gin")))
    biases = found["decoder/block_0/position_bias/embedding"]
    np.testing.assert_array_equal(biases[1], arrays["decoder/relpos_bias/rel_embedding"] + 1)


def test_a_decoder_with_a_position_bias_in_each_layer(tmp_path, runs):
    files = T5XFiles(runs["decoder_native"])
    arrays = {name: files.read(name) for name in files}
    bias = arrays.pop("decoder/relpos_bias/rel_embedding")
    arrays |= {f"decoder/layers_{layer}/relpos_bias/rel_embedding": bias + layer for layer in range(2)}
    folder = write(tmp_path, arrays)
    network = network_of(T5XFiles(folder))
    assert network.include == "models/t5x_decoder/layer_bias.gin"
    found = whole(values_in(folder, shapes_of(network, tmp_path / "recipe.gin")))
    np.testing.assert_array_equal(found["decoder/block_0/position_bias/embedding"], np.stack([bias, bias + 1]))


def test_t5_1_0_has_a_plain_mlp_and_tied_logits(tmp_path, arrays):
    del arrays["decoder/logits_dense/kernel"]
    plain = {name.replace("wi_0", "wi"): array for name, array in arrays.items() if "/wi_1/" not in name}
    folder = write(tmp_path, plain, inline=["token_embedder/embedding"])
    network = network_of(T5XFiles(folder))
    assert (network.include, network.bindings["ACTIVATIONS"]) == ("models/t5/common.gin", ("relu",))
    found = whole(values_in(folder, shapes_of(network, tmp_path / "recipe.gin")))
    np.testing.assert_array_equal(found["token_embedding/embedding"], arrays["token_embedder/embedding"])
    kernel = found["encoder/block_0/mlp/wi_0/kernel"]
    np.testing.assert_array_equal(kernel[1], arrays["encoder/layers_1/mlp/wi_0/kernel"])


def test_activations_are_those_of_the_run(tmp_path, arrays):
    folder = write(tmp_path, arrays)
    (folder / "config.gin").write_text("network.T5Config:\n    mlp_activations = ('swish', 'linear')\n")
    assert network_of(T5XFiles(folder)).bindings["ACTIVATIONS"] == ("silu", "linear")
    (folder / "config.gin").write_text("network.T5Config.mlp_activations = ('relu',)\n")
    with pytest.raises(UserError, match="mlp_activations = .'relu',. is not what .* 2 of gelu"):
        network_of(T5XFiles(folder))


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """A run that this file wrote."""
    files = T5XFiles(runs["t5_native"])
    return write(tmp_path_factory.mktemp("written"), {name: files.read(name) for name in files})


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "checkpoint_7/target.encoder.encoder_norm.scale"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: cut(run / "checkpoint_7/checkpoint"), "checkpoint is truncated or no msgpack file"),
        (lambda run: (run / "checkpoint_7/checkpoint").write_bytes(b"\x80"), "no optimizer/target"),
        (lambda run: remove(run / NORM), "'encoder/encoder_norm/scale' is missing or damaged in"),
        (lambda run: cut(run / NORM / ".zarray"), "'encoder/encoder_norm/scale' is missing or damaged in"),
        (lambda run: remove(run / NORM / "0"), "'encoder/encoder_norm/scale' cannot be read from .* is missing"),
        (lambda run: cut(run / NORM / "0"), "'encoder/encoder_norm/scale' cannot be read from .* truncated"),
        (lambda run: remove(run / "checkpoint_7/checkpoint"), "holds no T5X checkpoint"),
        (remove, "there is no folder"),
    ],
)
def test_what_is_damaged_or_missing_is_said(tmp_path, written, t5, damage, message):
    run = Path(shutil.copytree(written, tmp_path / "run"))
    damage(run)
    with pytest.raises(UserError, match=message):
        whole(values_in(run, t5[0]))


def test_a_damaged_orbax_database_is_said(runs, tmp_path):
    run = Path(shutil.copytree(runs["decoder_orbax"], tmp_path / "run"))
    state = run / "checkpoint_1234" / "state"
    data = max((state / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    kept = data.read_bytes()
    cut(data)
    with pytest.raises(UserError, match="missing or damaged|truncated|cannot be read"):
        files = T5XFiles(run)
        [files.read(name) for name in files]
    data.write_bytes(kept)
    metadata = json.loads((state / "_METADATA").read_text())
    more = {"key_metadata": [{"key": key, "key_type": 2} for key in ("target", "decoder", "lost")]}
    metadata["tree_metadata"]["more"] = more
    (state / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="incomplete.*decoder/lost"):
        T5XFiles(run)
    cut(state / "manifest.ocdbt")
    with pytest.raises(UserError, match="truncated or damaged"):
        T5XFiles(run)


def test_orbax_with_a_folder_for_each_array(written, tmp_path, t5):
    """As Orbax writes without OCDBT."""
    state = tmp_path / "checkpoint_5" / "state"
    shutil.copytree(written / "checkpoint_7", state, ignore=shutil.ignore_patterns("checkpoint"))
    found = whole(values_in(tmp_path, t5[0]))
    for path, value in t5[1].items():
        np.testing.assert_array_equal(found[path], value)


def test_steps_are_chosen_and_listed(runs, tmp_path, written):
    run = Path(shutil.copytree(written, tmp_path / "run"))
    shutil.copytree(runs["t5_native"] / "checkpoint_1234", run / "checkpoint_1234")
    assert T5XFiles(run).step == 1234 and T5XFiles(run, 7).step == 7 and T5XFiles(run / "checkpoint_7").step == 7
    with pytest.raises(UserError, match=r"no checkpoint of step 8; there are \[7, 1234\]"):
        T5XFiles(run, 8)
    with pytest.raises(UserError, match="checkpoint of step 7, not 1234"):
        T5XFiles(run / "checkpoint_7", 1234)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder/layers_1/mlp/wo/kernel": None}, "1 tensor is missing: encoder/layers_1/mlp/wo/kernel"),
        ({"encoder/extra/kernel": "encoder/encoder_norm/scale"}, "1 tensor has no place in the model: encoder/extra"),
        (
            {"decoder/layers_1/mlp/wo/kernel": "token_embedder/embedding"},
            r"mlp/wo/kernel is \[128, 32\], not \[48, 32\]",
        ),
        ({"decoder/relpos_bias/rel_embedding": None}, "has no decoder/relpos_bias/rel_embedding"),
        (
            {"encoder/layers_0/relpos_bias/rel_embedding": "encoder/relpos_bias/rel_embedding"},
            "a position bias in each layer of one stack and not of the other",
        ),
    ],
)
def test_arrays_without_a_home_and_homes_without_an_array_are_listed(tmp_path, arrays, t5, change, message):
    for name, source in change.items():
        arrays[name] = arrays[source] if source else arrays.pop(name)
        if source is None:
            del arrays[name]
    run = write(tmp_path, arrays)
    with pytest.raises(UserError, match=message):
        values_in(run, t5[0])


def test_bfloat16_and_unconverted_dtypes(tmp_path, arrays):
    name = "encoder/encoder_norm/scale"
    arrays[name] = np.asarray(jax.numpy.asarray(arrays[name], "bfloat16"))
    files = T5XFiles(write(tmp_path / "half", arrays))
    assert files.dtype(name) == arrays[name].dtype and files.num_bytes == 182528 - 64
    np.testing.assert_array_equal(files.read(name), arrays[name])
    arrays[name] = np.ones(32, np.int32)
    with pytest.raises(UserError, match="has dtype int32, which meshway does not convert"):
        T5XFiles(write(tmp_path / "whole", arrays)).read(name)


@pytest.mark.parametrize(
    "kind, family", [("t5_native", "t5"), pytest.param("scalable_orbax", "umt5", marks=pytest.mark.slow)]
)
def test_a_t5x_model_goes_on_to_hugging_face(runs, tmp_path, kind, family):
    """Its recipe says what config.json does: exported, it is the T5, or umT5, that transformers knows."""
    convert(str(runs[kind]), str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "exported"), family=family)
    tensors, files = TensorFiles(tmp_path / "exported"), T5XFiles(runs[kind])
    np.testing.assert_array_equal(tensors.read("shared.weight"), files.read("token_embedder/embedding"))
    query = tensors.read("decoder.block.1.layer.1.EncDecAttention.q.weight").T
    bias = "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if family == "umt5":  # layers are in one array, its second dimension
        theirs = files.read("decoder/decoder/encoder_decoder_attention/query/kernel")[:, 1].reshape(query.shape)
        biases = files.read("decoder/decoder/relpos_bias/rel_embedding")
        for layer in range(3):
            np.testing.assert_array_equal(tensors.read(bias.format(layer)).T, biases[:, layer])
    else:
        theirs = files.read("decoder/layers_1/encoder_decoder_attention/query/kernel")
    np.testing.assert_array_equal(query, theirs)
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert (config["feed_forward_proj"], config["tie_word_embeddings"]) == ("gated-gelu", False)
    assert (config["model_type"], config["num_heads"]) == (family, 3 if family == "t5" else 2)


def test_text_comes_with_the_vocabulary_of_the_task(runs, tmp_path):
    model = sentence_pieces()
    (tmp_path / "pieces.model").write_bytes(model)
    given = dict(source=str(runs["t5_native"]), target=str(tmp_path / "run"), step=1234)
    convert(**given, vocabulary=str(tmp_path / "pieces.model"))
    text = load_text(tmp_path / "run", has_encoder=True)
    assert text.write(text.read_inputs("same words")) == "same words" and text.start == (0,) and text.end == (1,)


def test_the_verb_refuses_what_t5x_has_not(runs, tmp_path):
    with pytest.raises(UserError, match="the vocabulary .*none.model cannot be read"):
        convert(str(runs["t5_native"]), str(tmp_path / "run"), vocabulary=str(tmp_path / "none.model"))
    with pytest.raises(UserError, match="--family is not for T5X"):
        convert(str(runs["t5_native"]), str(tmp_path / "run"), family="t5")
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        convert(str(runs["t5_native"]), str(tmp_path / "run"), step=3)
    assert list(tmp_path.iterdir()) == []
