"""Token ids of converted models equal those of transformers' tokenizers: in rows of training, evaluation and inference.

The goldens are from `tests/goldens/make_special_ids.py`: tokenizers in the style of published models.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from converted import HUGGING_FACE
from safetensors.numpy import save_file
from tiers import tiers

from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.conversion.tokenizer_files import read_framing, read_vocabulary
from meshway.framework.data.inspection.decoded_rows import decode_rows
from meshway.framework.data.seqio_adapter import import_seqio
from meshway.framework.data.vocabularies import load
from meshway.framework.data.vocabularies import read_framing as read_saved_framing
from meshway.framework.inference.bulk.inputs import Reader, Record
from meshway.framework.inference.predictor import Predictor
from meshway.framework.inference.rows import RowFormat, load_text
from meshway.launch import cli
from meshway.launch.convert import convert
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

GOLDENS = Path(__file__).parents[1] / "goldens" / "special_ids"
FAMILIES = sorted(path.name for path in GOLDENS.iterdir())
LENGTH = 64
# A prompt and a completion of the goldens' `pairs`, in each split; metrics are not at stake.
TASK = """
import json
import seqio
import tensorflow as tf
from meshway.tasks.hugging_face import HuggingFaceVocabulary

VOCABULARY = HuggingFaceVocabulary({folder!r}, eos_token={eos!r})


def read(split, shuffle_files, seed=None):
    pairs = json.loads({pairs!r})
    return tf.data.Dataset.from_tensor_slices(
        {{"inputs": [each["prompt"] for each in pairs], "targets": [each["completion"] for each in pairs]}}
    )


def said(targets, predictions):
    with open({predictions!r}, "w") as file:
        json.dump(predictions, file)
    return {{"count": len(predictions)}}


seqio.TaskRegistry.add(
    {name!r},
    source=seqio.FunctionDataSource(read, splits=["train", "validation"]),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={{
        "inputs": seqio.Feature(VOCABULARY, add_eos=False), "targets": seqio.Feature(VOCABULARY, add_eos=True)
    }},
    metric_fns=[said],
)
"""

RECIPE = """
from __gin__ import dynamic_registration
from meshway.framework.data import features

include '{run}'
include 'optimizers/sgd.gin'
MIXTURE_OR_TASK_MODULE = {name!r}
MIXTURE_OR_TASK_NAME = {name!r}
TASK_FEATURE_LENGTHS = {{'inputs': {length}, 'targets': {length}}}
TRAIN_STEPS = 1
features.LanguageModel.inputs = True
"""


def golden(family):
    return json.loads((GOLDENS / family / "expected.json").read_text())


def model_of(family, folder, **generation):
    """Makes a published directory: a golden tokenizer, and the golden network with rows for its ids and positions."""
    shutil.copytree(GOLDENS / family, folder)
    (folder / "expected.json").unlink()
    source = HUGGING_FACE / golden(family)["model"]
    config, own = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    sizes = {config["vocab_size"]: own["vocab_size"], config.get("n_positions"): 4 * LENGTH}
    tensors, rng = TensorFiles(source), np.random.default_rng(0)
    shapes = {name: [sizes.get(size, size) for size in tensors.shape(name)] for name in tensors}
    values = {name: rng.normal(int(len(shape) == 1), 0.3, shape) for name, shape in shapes.items()}
    save_file({name: value.astype(np.float32) for name, value in values.items()}, str(folder / "model.safetensors"))
    positions = {"n_positions": 4 * LENGTH} if "n_positions" in config else {}
    (folder / "config.json").write_text(json.dumps(config | own | positions))
    if generation:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return folder


def once(expected, ids):
    """What a decoder reads: transformers puts BOS before a text that spells it out, too; here it has it once."""
    twice = expected["bos"] is not None and ids[:2] == [expected["bos"]] * 2
    return ids[1:] if twice else ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_texts_equal_transformers(family):
    """What stands before a text, what ends it, its ids with control words in it, and the text of ids."""
    directory, expected = GOLDENS / family, golden(family)
    config = json.loads((directory / "config.json").read_text())
    vocabulary = read_vocabulary(directory, config)
    framing = read_framing(directory, config, False, vocabulary)
    assert vocabulary.eos_id == expected["eos"] and framing.stop == tuple(expected["stop"])
    for each in expected["texts"]:
        ids = each.get("file", each["ids"])
        assert [*framing.start, *vocabulary.encode(each["text"])] == ids, each["text"]
    assert any(ids[: len(framing.start)] == list(framing.start) for ids in [expected["texts"][0]["ids"]])
    for each in expected["predictions"]:
        before = each["ids"][: next((n for n, token in enumerate(each["ids"]) if token in framing.stop), None)]
        assert vocabulary.decode(before) == each["decoded"]


@pytest.mark.parametrize(
    "family", tiers(FAMILIES, quick=["llama3_instruct"], slow=[f for f in FAMILIES if f != "llama3_instruct"])
)
def test_rows_of_a_converted_run_equal_transformers(family, tmp_path):
    """A prompt as inference reads it, a pair as training and scoring read it, and where a prediction ends."""
    expected = golden(family)
    convert(str(model_of(family, tmp_path / "model")), str(tmp_path / "run"))
    text = load_text(tmp_path / "run", has_encoder=False)
    rows = RowFormat(False, False, text.start, text.bos)
    reader = Reader(text, rows, {"inputs": LENGTH})
    for number, each in enumerate(expected["texts"]):
        wanted = once(expected, each.get("file", each["ids"]))
        examples, problems = reader.read([Record(number, {"inputs": each["text"]}, "here", b"")])
        if not wanted:  # no BOS, and no text
            assert not examples and "without a start token nothing can follow it" in problems[0]
            continue
        prompt = rows.prompts([examples[0].inputs], LENGTH)
        assert prompt["decoder_input_tokens"][0].tolist() == [*wanted, *[0] * (LENGTH - len(wanted))]
        assert prompt["decoder_segment_ids"][0].sum() == len(wanted)
    for each in expected["pairs"]:
        known, new = text.read_inputs(each["prompt"]), text.read_targets(each["completion"])
        prompt, completion = each.get("file", each["ids"])
        scored = rows.scored([known], [new], {"targets": LENGTH})
        assert_teaches(scored, 0, [*prompt, *completion, expected["eos"]], len(prompt))
    for each in expected["predictions"]:
        assert text.write(each["ids"]) == each["decoded"]
        stream = text.stream()
        assert "".join([*map(stream.feed, each["ids"]), stream.finish()]) == each["decoded"]


@pytest.mark.parametrize(
    ("family", "ids", "special"), [("gpt2", [0, 64, 316], "..x"), ("gemma3", [2, 0, 300, 6], "xx.x")]
)
def test_pages_show_an_id_0_that_is_text_as_text(family, ids, special):
    vocabulary = read_vocabulary(GOLDENS / family, json.loads((GOLDENS / family / "config.json").read_text()))
    batch = {"decoder_target_tokens": np.array([ids]), "decoder_segment_ids": np.ones((1, len(ids)), np.int32)}
    ((lane,),) = [row.lanes for row in decode_rows(batch, {"targets": vocabulary})]
    assert ["x" if token.special else "." for token in lane.tokens] == list(special)
    assert vocabulary.decode(ids[:1]) == ("!" if family == "gpt2" else "<bos>")


def assert_teaches(rows, row, whole, known):
    """One example in a row: `whole` is read and learned, but for its first `known` ids; the rest is padding."""
    weights, segments = (rows[f"decoder_{name}"][row] for name in ("loss_weights", "segment_ids"))
    learned = np.flatnonzero(weights).tolist()
    first = max(known, 1)  # nothing predicts the first id of a sequence
    assert rows["decoder_target_tokens"][row][learned].tolist() == whole[first:]
    assert learned == list(range(first - 1, len(whole) - 1))
    assert rows["decoder_input_tokens"][row, : len(whole) - 1].tolist() == whole[:-1]
    assert not rows["decoder_input_tokens"][row, len(whole) :].any() and not segments[len(whole) :].any()


@pytest.fixture
def tasked(tmp_path, monkeypatch):
    """Returns a function: (family, prompts and completions) -> a converted run, and a recipe over their task."""
    names = set()
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(family, pairs, **generation):
        name, folder, run = f"pairs_of_{family}", tmp_path / family / "model", tmp_path / family / "run"
        names.add(name)
        shutil.rmtree(tmp_path / family, ignore_errors=True)
        model_of(family, folder, **generation)
        token = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
        given = {"name": name, "folder": str(folder), "eos": token, "pairs": json.dumps(pairs)}
        predictions = str(tmp_path / "predictions.json")
        (tmp_path / f"{name}.py").write_text(TASK.format(**given, predictions=predictions))
        convert(str(folder), str(run))
        assert load(run / "vocabularies", "targets").eos_id == golden(family)["eos"]
        recipe = tmp_path / f"{name}.gin"
        recipe.write_text(RECIPE.format(run=run / "recipe.gin", name=name, length=LENGTH // 2))
        return run, recipe

    yield make
    for name in names & set(sys.modules):
        del sys.modules[name]
        import_seqio().TaskRegistry.remove(name)


@pytest.mark.parametrize("family", tiers(FAMILIES, slow=["gemma3"]))
def test_batches_of_a_task_equal_transformers(family, tasked):
    """Training, teacher-forced evaluation and its prompts over a seqio task."""
    expected, bindings = golden(family), ("MODEL_DIR='x'", "BATCH_SIZE=8", "PACK=False")
    pairs = [each for each in expected["pairs"] if each["prompt"]]
    _, recipe = tasked(family, pairs)
    invocation = Invocation("train", gin_files=(str(recipe),), bindings=bindings)
    data = config.load(invocation).build("train.train", given=["resolved"])["data"]
    ids = [each.get("file", each["ids"]) for each in pairs]
    wholes = [([*prompt, *completion, expected["eos"]], len(prompt)) for prompt, completion in ids]
    (task,) = data.eval_tasks()
    ((teacher_forced, real),) = task.batches()
    assert real == len(pairs) and set(task.stop_ids) == set(expected["stop"])
    trained, seen = next(data.train(slice(0, 8))), []
    for batch, rows in ((teacher_forced, real), (trained, 8)):
        for row in range(rows):
            read = batch["decoder_input_tokens"][row].tolist()
            whole, known = next(each for each in wholes if read[: len(each[0]) - 1] == each[0][:-1])
            assert_teaches(batch, row, whole, known)
            seen.append(whole)
    assert all(seen.count(whole) > 2 for whole, _ in wholes)
    assert not teacher_forced["decoder_segment_ids"][real:].any()
    ((prompts, _),) = task.prompt_batches()
    for row, (prompt, _) in zip(prompts["decoder_input_tokens"], ids):
        assert row[: len(prompt)].tolist() == prompt and not row[len(prompt) :].any()
    for each in expected["predictions"]:
        assert task.postprocess(0, np.array(each["ids"])) == each["decoded"]


@pytest.mark.parametrize("family", tiers(FAMILIES, slow=["llama3_instruct"]))
def test_predictions_of_a_tuned_run_end_alike(family, tasked, tmp_path):
    """In evaluation within a run and in the library: at any stop id; a tuned run and its export keep them."""
    expected = golden(family)
    pairs = [each for each in expected["pairs"] if each["prompt"]]
    prompts = [each["prompt"] for each in pairs]
    run, _ = tasked(family, pairs)
    free = Predictor(run).predict(prompts)[0].tokens
    added = next(token for token in free if token != free[0])
    run, recipe = tasked(family, pairs, eos_token_id=[*expected["stop"], added])
    tuned = tmp_path / "tuned"
    flags = [f"--gin.{each}" for each in ("BATCH_SIZE=8", "PACK=False", "LEARNING_RATE=0.0", "EVAL_PERIOD=1")]
    assert cli.main(["train", f"--gin_file={recipe}", f"--gin.MODEL_DIR={str(tuned)!r}", *flags]) == 0
    stop = [*expected["stop"], added]
    framing = read_saved_framing(tuned)
    assert sorted(framing.stop) == sorted(stop) and list(framing.start) == expected["texts"][1]["ids"]  # of ""
    found = Predictor(tuned).predict(prompts)
    assert found[0].tokens == free[: free.index(added) + 1]
    assert json.loads((tmp_path / "predictions.json").read_text()) == [each.text for each in found]
    convert(str(tuned), str(tmp_path / "exported"))
    generation = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == sorted(stop)
    assert golden_tokenizer_kept(family, tmp_path / "exported")


def golden_tokenizer_kept(family, directory):
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return all((directory / name).read_bytes() == (GOLDENS / family / name).read_bytes() for name in names)
