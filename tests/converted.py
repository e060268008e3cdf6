"""Hugging Face directories taken in by `meshway convert`, and the logits of what came out; T5X's runs, unpacked."""

import io
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import sentencepiece

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.conversion.values import Values
from meshway.framework.interfaces import Model
from meshway.framework.trees import flatten, unflatten
from meshway.launch.convert import convert
from meshway.launch.recipe.bindings import build_network

Batch = dict[str, np.ndarray]
HUGGING_FACE = Path(__file__).parent / "goldens" / "hugging_face"
T5X = Path(__file__).parent / "goldens" / "t5x"


def t5x_runs(folder: Path, *kinds: str) -> dict[str, Path]:
    """Unpacks runs as T5X leaves them (`tests/goldens/t5x`); returns the folder of each."""
    for kind in kinds:
        with tarfile.open(T5X / f"{kind}.tar.gz") as archive:
            archive.extractall(folder / kind, filter="data")
    return {kind: folder / kind for kind in kinds}


def whole(values: Mapping[str, Values]) -> dict[str, np.ndarray]:
    """Returns the arrays that values of another format's files are."""
    return {path: each.shard((slice(None),) * each.ndim) for path, each in values.items()}


def model_of(run: Path) -> Model:
    """Returns the model that the recipe of a run directory builds."""
    return build_network(run / "recipe.gin")[0]


def params_of(run: Path, model: Model, step: int | None = None) -> dict:
    """Returns a run's parameters, float32, on one device; of its latest checkpoint where `step` is None."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where) for name, leaf in shapes.items()}
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    return checkpoints.restore_params(checkpoints.steps()[-1] if step is None else step, unflatten(wanted))


def logits_of(directory: Path, run: Path, batch: Batch) -> np.ndarray:
    """Takes a Hugging Face directory in as `run`, and returns what the model makes of a batch as transformers names it.

    Args:
      directory: with config.json and weights.
      run: the run directory to make.
      batch: input_ids, attention_mask [rows, length]; of encoder-decoders decoder_input_ids, decoder_attention_mask.

    Returns:
      float32 [rows, length, vocab], zero where the query is padding.
    """
    convert(str(directory), str(run))
    model = model_of(run)
    return logits_with(model, params_of(run, model), batch)


def logits_with(model: Model, params: dict, batch: Batch) -> np.ndarray:
    """Returns what a model makes of a batch as transformers names it; see `logits_of`."""
    kind = "decoder_" if "decoder_input_ids" in batch else ""
    tokens, mask = (np.asarray(batch[f"{kind}{name}"], np.int32) for name in ("input_ids", "attention_mask"))
    ours = {
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": mask,
        "decoder_positions": np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32),
    }
    if kind:
        ours["encoder_input_tokens"] = np.asarray(batch["input_ids"], np.int32)
        ours["encoder_segment_ids"] = np.asarray(batch["attention_mask"], np.int32)
    logits = jax.jit(lambda params, batch: model.logits(params, batch, None))(params, ours)
    return np.asarray(logits) * mask[..., None]


def assert_same_directory(found: Path, wanted: Path) -> None:
    """Compares two Hugging Face directories: config.json, names, dtypes and bits of all tensors."""
    assert json.loads((found / "config.json").read_text()) == json.loads((wanted / "config.json").read_text())
    ours, theirs = TensorFiles(found), TensorFiles(wanted)
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert (ours.shape(name), ours.dtype(name)) == (theirs.shape(name), theirs.dtype(name)), name
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


def sentence_pieces() -> bytes:
    """Returns a SentencePiece model of 25 pieces with T5's special ids and without its sentinels."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to cut in pieces", "and others, of the same letters"]),
        model_writer=model,
        vocab_size=25,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_json(size: int, sentinels: int = 0) -> str:
    """Returns a word-level tokenizer of `size` ids, the highest of them sentinels."""
    words = {f"w{number}": number for number in range(size - sentinels)}
    added = [
        {"id": size - 1 - number, "content": f"<extra_id_{number}>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number in reversed(range(sentinels))
    ]
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    parts = dict.fromkeys(("normalizer", "post_processor", "decoder", "truncation", "padding"))
    return json.dumps(
        {"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": {"type": "Whitespace"}} | parts
    )


def copy_of(name: str, tmp_path: Path) -> Path:
    """Returns a golden model directory, copied, without what it is expected to compute."""
    shutil.copytree(HUGGING_FACE / name, tmp_path / "model")
    (tmp_path / "model" / "expected.npz").unlink()
    return tmp_path / "model"


def sizes_of(name: str) -> list[str]:
    """Returns the bindings of the tiny recipe that give the golden's sizes."""
    read = json.loads((HUGGING_FACE / name / "config.json").read_text())
    names = {"VOCAB_SIZE": "vocab_size", "D_MODEL": "hidden_size", "D_FF": "intermediate_size",
             "NUM_HEADS": "num_attention_heads", "NUM_KV_HEADS": "num_key_value_heads", "HEAD_DIM": "head_dim",
             "NUM_LAYERS": "num_hidden_layers"}  # fmt: skip
    return [f"{ours}={read[theirs]}" for ours, theirs in names.items()]
