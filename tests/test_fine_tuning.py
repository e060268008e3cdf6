"""docs/fine_tuning.md from end to end: files and commands as they stand, on a tiny Llama with its own tokenizer."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from converted import HUGGING_FACE, logits_of, logits_with, model_of, params_of
from readme import commands, in_folder, words_of
from running import lines
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.data.seqio_adapter import import_seqio
from meshway.framework.data.vocabularies import read_framing
from meshway.framework.data.vocabulary import Framing
from meshway.launch import cli

PAGE = (Path(__file__).parent.parent / "docs" / "fine_tuning.md").read_text()
FILES = dict(re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SPECIAL = ["<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>"]
VOCABULARY = 320
# What the recipes become where they are trained: one batch has each example of train.jsonl once.
SMALLER = {
    "fine_tune.gin": "TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}\nTRAIN_STEPS = 3\nBATCH_SIZE = 8\n"
    "REPORT_PERIOD = 1\nPACK = False\nLEARNING_RATE = 0.05\nWARMUP_STEPS = 1\n",
    "chat.gin": f"VOCAB_SIZE = {VOCABULARY + 2}\n",
}


@pytest.fixture
def furnished(tmp_path, monkeypatch):
    """The current folder: the page's files, smaller recipes, a Llama and questions."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mylab" / "__init__.py").touch()
    for name, bindings in SMALLER.items():
        (tmp_path / name).rename(tmp_path / f"documented_{name}")
        (tmp_path / name).write_text(f"include 'documented_{name}'\n{bindings}")
    llama(tmp_path / "models" / "Llama-3.2-1B")
    for split, numbers in {"train": range(8), "validation": range(8, 11)}.items():
        examples = [{"question": f"What is 5 to the power of {n}?", "answer": str(5**n)} for n in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples))
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "cache"))
    with in_folder(tmp_path, monkeypatch):
        yield tmp_path
    seqio = import_seqio()
    for name in ("answers", "chat"):
        seqio.TaskRegistry.remove(name)


def llama(folder):
    """Makes a small Llama with random weights and a byte-level tokenizer that puts a BOS before a text."""
    folder.mkdir(parents=True)
    byte_level = pre_tokenizers.ByteLevel
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(PAGE.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{SPECIAL[2]} $A", special_tokens=[(SPECIAL[2], 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((HUGGING_FACE / "llama3" / "config.json").read_text())
    golden, old, rng = TensorFiles(HUGGING_FACE / "llama3"), config["vocab_size"], np.random.default_rng(0)
    shapes = {name: [VOCABULARY if size == old else size for size in golden.shape(name)] for name in golden}
    values = {name: rng.normal(int(len(shape) == 1), 0.3, shape) for name, shape in shapes.items()}
    save_file({name: value.astype(np.float32) for name, value in values.items()}, str(folder / "model.safetensors"))
    config |= {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))


@pytest.mark.slow
def test_the_page_from_end_to_end(furnished):
    for command in commands(PAGE):
        if "chat.gin" in command:
            runpy.run_path("grow.py")
        assert cli.main(words_of(command)) == 0, command
    before, (first, _, last) = _loss_before(), lines(furnished / "runs/tuned/metrics.jsonl")
    assert abs(first["loss"] - before["eval"]) < 1e-4 and abs(first["loss"] - before["infer"]) < 1e-4
    assert last["loss"] < first["loss"] - 0.1
    framing = Framing((2,), False, (1, 0))
    assert read_framing(furnished / "runs/llama") == framing
    assert read_framing(furnished / "runs/tuned") == dataclasses.replace(framing, append_eos=None)
    assert len(lines(furnished / "answers.jsonl")) == 3
    _assert_exported("tuned", "exported", [1, 0], VOCABULARY)
    _assert_exported("chat", "exported_chat", [1, 0, VOCABULARY + 1], VOCABULARY + 2)


def _loss_before():
    """Returns the loss, a token, of the converted model on train.jsonl, as eval and infer tell it."""
    scored = lines(Path("before.jsonl"))
    scores = [score for each in scored for score in each["token_scores"]]
    assert len(scored) == 8 and len(scores) > 30
    evaluated = lines(Path("runs/llama/eval/answers.train.jsonl"))[-1]["metrics"]["loss"]
    return {"eval": evaluated, "infer": -sum(scores) / len(scores)}


def _assert_exported(run, directory, stop, size):
    """Compares an exported directory with the run that it is of: logits, what starts and ends texts."""
    config = json.loads(Path(directory, "config.json").read_text())
    assert (config["bos_token_id"], config["vocab_size"]) == (2, size)
    tokens = np.random.default_rng(0).integers(0, size, (2, 12))
    batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    found = logits_of(Path(directory), Path("runs", directory), batch)
    model = model_of(Path("runs", directory))
    np.testing.assert_array_equal(found, logits_with(model, params_of(Path("runs", run), model, 3), batch))
    assert read_framing(Path("runs", directory)) == Framing((2,), False, tuple(stop))
