"""`meshway infer` on tiny runs, from the command line: what it writes, and what it refuses."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from saved_runs import LENGTHS, VOCABULARY, save_run
from tiers import tiers

from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.rows import packing
from meshway.framework.data.seqio_adapter import import_seqio
from meshway.framework.data.vocabularies import Opaque, of_seqio
from meshway.framework.data.vocabulary import Framing
from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.bulk.batches import Predict
from meshway.framework.inference.bulk.inputs import Example
from meshway.framework.inference.decoding import Decoded, Stop
from meshway.framework.inference.predictor import Predictor
from meshway.framework.inference.rows import Text, doubling
from meshway.framework.inference.sampling import Sampling
from meshway.framework.partitioning import sharded_model
from meshway.framework.telemetry.profiler import Compilations
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import cli
from meshway.launch.infer import open_recipe
from meshway.models.objectives import DecoderOnly

seqio = import_seqio()
GOLDENS = Path(__file__).parents[1] / "goldens/hugging_face"
TEXTS = ["one", "a text of some more words, which needs a longer bucket", "", "three", "four 4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "t5")


@pytest.fixture(scope="module")
def decoder_only(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "lm", "lm", framing=Framing((300,), False))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"inputs": text, "id": f"q{n}"}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def infer(*words):
    words = [*map(str, words)]
    size = [] if any(word.startswith("--batch_size") for word in words) else ["--batch_size=4"]
    return cli.main(["infer", *size, "--gin.LAYOUT=single", *words])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy(model, params, batch):
    return Sampling(temperature=0.0)(model, params, batch, 16, Stop((1,)), np.zeros(1, int), jax.random.key(0))


def params_and_model(run):
    opened = open_recipe(run)
    predictor = Predictor(run, layout="single")
    return predictor._session.params, opened.model


def test_a_run_directory_is_no_output(run, questions, capsys):
    assert infer(f"--model_dir={run}", f"--input={questions}", f"--output={run}") == 2
    assert "is a run directory: give a file, or a folder of the results' own" in capsys.readouterr().err


def test_more_beams_than_tokens_are_refused(run, questions, tmp_path, capsys):
    assert infer(f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'a.jsonl'}", "--beams=999") == 2
    assert "beams: 999 are more than the 384 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="beams: 385 are more than the 384 tokens"):
        Predictor(run, layout="single", decoder=BeamSearch(385))
    Predictor(run, layout="single", decoder=BeamSearch(384))


ROOM = [["--num_decodes=3", "--temperature=1"], ["--mode=score"], ["--beams=3"]]


@pytest.mark.parametrize("words", tiers(ROOM, quick=ROOM[:2], slow=ROOM[2:]), ids=str)
def test_a_batch_for_which_there_is_no_room_is_refused(run, tmp_path, capsys, monkeypatch, words):
    """Before it runs: the machine would end the process, and say nothing."""
    (tmp_path / "in.jsonl").write_text('{"inputs": "a", "targets": "b"}\n')
    monkeypatch.setattr(sharded_model, "free_memory", lambda device: 1000)
    assert infer(f"--model_dir={run}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl", *words) == 2
    kind = "score" if "score" in words[0] else "predict"
    said = capsys.readouterr().err
    assert f"a batch of 4 examples ({kind}) needs " in said and "has 1,000 B free: give a smaller batch_size" in said, (
        said
    )


@pytest.mark.slow
def test_quantised_weights_are_another_job_and_the_predictor_has_them(run, questions, tmp_path, capsys):
    words = (f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'answers.jsonl'}")
    assert infer(*words, "--weights=int8") == 0
    predictor = Predictor(run, layout="single", bindings=["infer.opened.weights='int8'"], batch_size=4)
    found = [each.tokens for each in predictor.predict(TEXTS)]
    assert [row["tokens"] for row in rows_of(tmp_path / "answers.jsonl")] == found
    kernel = predictor._session.params["decoder"]["block_0"]["mlp"]["wo"]["kernel"][0]
    assert kernel.qvalue.dtype == np.int8
    with pytest.raises(UserError, match="use: this predictor keeps its weights in fewer bits"):
        predictor.use(Predictor(run, layout="single")._session.params)
    capsys.readouterr()
    assert infer(*words) == 2
    assert "--weights" in capsys.readouterr().err


def test_json_lines_in_json_lines_out(run, questions, tmp_path, capsys):
    assert infer(f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'answers.jsonl'}") == 0
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [(row["index"], row["inputs"], row["id"]) for row in rows] == [
        (n, text, f"q{n}") for n, text in enumerate(TEXTS)
    ]
    params, model = params_and_model(run)
    for row in rows[1:3]:  # each by itself, in a batch of one and of another length
        tokens = np.array([*VOCABULARY.encode(row["inputs"]), 1], np.int32)
        batch = {
            "encoder_input_tokens": tokens[None],
            "encoder_segment_ids": np.ones((1, len(tokens)), np.int32),
            "encoder_positions": np.arange(len(tokens), dtype=np.int32)[None],
        }
        alone = jax.jit(lambda params, batch: greedy(model, params, batch))(params, batch)
        length = int(alone.lengths[0, 0])
        assert row["tokens"] == np.asarray(alone.tokens[0, 0, :length]).tolist()
        assert row["prediction"] == VOCABULARY.decode([token for token in row["tokens"] if token != 1])
        np.testing.assert_allclose(row["token_scores"], alone.log_probs[0, 0, :length], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["score"], sum(row["token_scores"]), rtol=1e-5)
    said = capsys.readouterr().err
    assert "5 examples in" in said and "2 programs compiled" in said
    other = (f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'answers.jsonl'}")
    assert infer(*other, "--max_new_tokens=3", "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 9}") == 2
    assert (
        "another job (--gin.TASK_FEATURE_LENGTHS: {'inputs': 64, 'targets': 16} there, {'inputs': 64, 'targets': 9} "
        "now, --max_new_tokens: not given there, 3 now)" in capsys.readouterr().err
    )
    total = json.loads((tmp_path / "answers.jsonl.summary.json").read_text())
    assert total["examples"] == 5 and total["read_tokens"] == sum(len(text) + 1 for text in TEXTS)


@pytest.mark.slow
def test_shards_of_a_job_are_together_what_one_job_writes(run, questions, tmp_path, capsys):
    """Sampled, so that an example that is numbered otherwise would show. The last one makes the result."""
    words = (f"--model_dir={run}", f"--input={questions}", "--chunk_size=1", "--max_new_tokens=4", "--temperature=1")
    assert infer(*words, f"--output={tmp_path / 'alone.jsonl'}") == 0
    for shard in (2, 0, 1):
        assert not (tmp_path / "out.jsonl").exists()
        assert infer(*words, f"--output={tmp_path / 'out.jsonl'}", "--num_shards=3", f"--shard_id={shard}") == 0
        said = capsys.readouterr().err
        assert shard == 1 or f"shard {shard} of 3 is done; " in said
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert infer(*words, f"--output={tmp_path / 'out.jsonl'}", "--num_shards=3", "--shard_id=0") == 0
    assert "this very job is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_a_class_of_ones_own_writes_its_format(run, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_writers.py").write_text(
        "class Pairs:\n    suffix = '.pairs'\n\n    def encode(self, rows, name):\n"
        "        return ''.join(f'{row[\"id\"]}={row[\"tokens\"]}\\n' for row in rows)\n\n"
        "class Other(Pairs):\n    def __init__(self, needed):\n        pass\n"
    )
    words = (f"--model_dir={run}", f"--input={questions}", "--max_new_tokens=4", f"--output={tmp_path / 'out.pairs'}")
    for writer, message in (
        ("Pairs", "--writer=Pairs is no class in a module: write it as mylab.writers.Pairs"),
        ("own_writer.Pairs", "--writer=own_writer.Pairs: there is no module own_writer"),
        ("own_writers.Pair", "module own_writers has no 'Pair'; did you mean 'Pairs'?"),
        ("own_writers.Other", "cannot be made without arguments"),
    ):
        assert infer(*words, f"--writer={writer}") == 2
        assert message in capsys.readouterr().err
    assert infer(*words, "--writer=own_writers.Pairs") == 0
    assert infer(*words[:3], f"--output={tmp_path / 'out.jsonl'}") == 0
    wanted = [f"{row['id']}={row['tokens']}" for row in rows_of(tmp_path / "out.jsonl")]
    assert (tmp_path / "out.pairs").read_text().splitlines() == wanted


@pytest.mark.slow
def test_one_checkpoint_serves_as_well_as_its_run(run, questions, tmp_path):
    words = (f"--input={questions}", "--max_new_tokens=2")
    for name, model_dir in (("run", run), ("checkpoint", run / "checkpoints" / "7")):
        assert infer(f"--model_dir={model_dir}", *words, f"--output={tmp_path / name}.jsonl") == 0
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "checkpoint.jsonl").read_bytes()
    assert Predictor(run / "checkpoints" / "7", layout="single").step == 7


@pytest.mark.parametrize("start", [0, 5])
def test_scores_are_those_of_rows_that_are_trained_on(run, start, tmp_path):
    """From wherever the decoder starts: a converted T5's decoder_start_token_id may be any id."""
    run = run if start == 0 else save_run(tmp_path / "run", framing=Framing((start,), True, (1,)))
    path = tmp_path / "pairs.tsv"
    pairs = [("a", "yes"), ("b c d", "no, not at all"), ("", "x")]
    path.write_text("inputs\ttargets\n" + "".join(f"{known}\t{new}\n" for known, new in pairs))
    assert infer(f"--model_dir={run}", f"--input={path}", "--mode=score", f"--output={tmp_path / 'out.jsonl'}") == 0
    params, model = params_and_model(run)
    tokens = FeatureInfo("int32", (None,))
    objective = EncoderDecoder(pack=False).bind(TaskInfo("t", {"inputs": tokens, "targets": tokens}, (start,)), LENGTHS)
    items = [
        {name: np.array([*VOCABULARY.encode(text), 1], np.int32) for name, text in zip(("inputs", "targets"), pair)}
        for pair in pairs
    ]
    batch = objective.lay(items, packing.one_each(3, ["inputs", "targets"]))
    wanted = np.asarray(jax.jit(model.score)(params, batch))
    for row, expected, item in zip(rows_of(tmp_path / "out.jsonl"), wanted, items):
        np.testing.assert_allclose(row["token_scores"], expected[: len(item["targets"])], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row["score"], expected.sum(), rtol=1e-5)


def test_intermediate_values_come_by_name(run, tmp_path):
    words = (f"--model_dir={run}", "--input=-", "--format=text", "--mode=predict_with_aux", "--max_new_tokens=4")
    path = tmp_path / "in.txt"
    path.write_text("one\nand two\n")
    words = tuple(f"--input={path}" if word == "--input=-" else word for word in words)
    assert infer(*words, "--aux=encoder_output,logits", f"--output={tmp_path / 'out.jsonl'}") == 0
    for row, text in zip(rows_of(tmp_path / "out.jsonl"), ("one", "and two")):
        assert np.shape(row["aux"]["encoder_output"])[0] == len(text) + 1
        logits = np.array(row["aux"]["logits"])
        assert logits.shape == (len(row["tokens"]), 384)
        assert logits.argmax(axis=1).tolist() == row["tokens"]  # greedy


def test_a_decoder_goes_on_behind_its_own_start(decoder_only, questions, tmp_path):
    words = (f"--model_dir={decoder_only}", f"--input={questions}", "--max_new_tokens=6")
    assert (
        infer(*words, f"--output={tmp_path / 'out.jsonl'}", "--num_decodes=2", "--temperature=1.5", "--top_k=50") == 0
    )
    rows = rows_of(tmp_path / "out.jsonl")
    for row in rows:
        assert len(row["predictions"]) == 2 and row["scores"] == sorted(row["scores"], reverse=True)
        assert row["prediction"] == row["predictions"][0] and row["score"] == row["scores"][0]
    params, model = params_and_model(decoder_only)
    whole = [300, *VOCABULARY.encode(TEXTS[0]), *rows[0]["tokens"]]
    batch = {
        "decoder_input_tokens": np.array([whole[:-1]], np.int32),
        "decoder_target_tokens": np.array([whole[1:]], np.int32),
        "decoder_loss_weights": np.ones((1, len(whole) - 1), np.float32),
        "decoder_segment_ids": np.ones((1, len(whole) - 1), np.int32),
        "decoder_positions": np.arange(len(whole) - 1, dtype=np.int32)[None],
    }
    made = len(rows[0]["tokens"])
    np.testing.assert_allclose(
        rows[0]["token_scores"], np.asarray(jax.jit(model.score)(params, batch))[0, -made:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_predictor_says_what_the_command_writes(run, questions, tmp_path):
    assert infer(f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'a.jsonl'}", "--beams=3") == 0
    predictor = Predictor(run, layout="single", decoder=BeamSearch(3), batch_size=4)
    for row, found in zip(rows_of(tmp_path / "a.jsonl"), predictor.predict(TEXTS)):
        assert (found.text, found.tokens, found.texts) == (row["prediction"], row["tokens"], row["predictions"])
        np.testing.assert_allclose(found.scores, row["scores"], rtol=1e-6)
    (scored,) = predictor.score([TEXTS[0]], [predictor.predict([TEXTS[0]])[0].text])
    assert scored.score == pytest.approx(sum(scored.token_scores))
    assert predictor.step == 7


def framed_tokenizer(size, bos):
    """A word-level tokenizer.json that puts id `bos` before every text, as Llama's does."""
    words = {f"w{n}": n for n in range(size)}
    begin = {"SpecialToken": {"id": f"w{bos}", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text],
        "special_tokens": {f"w{bos}": {"id": f"w{bos}", "ids": [bos], "tokens": [f"w{bos}"]}},
    }
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": template}
    return json.dumps(whole | {"model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"}})


def test_a_converted_model_answers_at_once_behind_its_own_bos(tmp_path):
    directory, run, out = tmp_path / "llama3", tmp_path / "run", tmp_path / "out.jsonl"
    shutil.copytree(GOLDENS / "llama3", directory, ignore=shutil.ignore_patterns("*.npz"))
    (directory / "tokenizer.json").write_text(framed_tokenizer(67, bos=1))
    (tmp_path / "in.txt").write_text("w5 w17 w40\nw9\n")
    assert cli.main(["convert", f"--from={directory}", f"--to={run}"]) == 0
    saved = json.loads((run / "vocabularies.json").read_text())
    assert saved["start"] == [1] and saved["append_eos"] is False
    assert infer(f"--model_dir={run}", f"--input={tmp_path / 'in.txt'}", f"--output={out}", "--max_new_tokens=5") == 0
    params, model = params_and_model(run)
    for row, prompt in zip(rows_of(out), ([1, 5, 17, 40], [1, 9])):
        whole = [*prompt, *row["tokens"]]
        batch = {
            "decoder_input_tokens": np.array([whole], np.int32),
            "decoder_segment_ids": np.ones((1, len(whole)), np.int32),
            "decoder_positions": np.arange(len(whole), dtype=np.int32)[None],
        }
        logits = np.asarray(jax.jit(lambda params, batch: model.logits(params, batch, None))(params, batch))[0]
        assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == row["tokens"]


@pytest.mark.parametrize("kind", ["run", pytest.param("decoder_only", marks=pytest.mark.slow)])
def test_a_stream_is_the_prediction_piece_by_piece(kind, request):
    how = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3)
    predictor = Predictor(request.getfixturevalue(kind), layout="single", decoder=how, batch_size=2)
    (whole,) = predictor.predict([TEXTS[3]], ids=[5])
    pieces = list(predictor.generate(TEXTS[3], id=5))
    assert "".join(pieces) == whole.text and len(pieces) > 2
    with pytest.raises(UserError, match="input 0: 90 tokens of inputs|input 0: 91 tokens"):
        next(predictor.generate("x" * 89))


def test_a_text_ends_a_prediction_for_command_and_library_alike(run, questions, tmp_path):
    words = (f"--model_dir={run}", f"--input={questions}", "--max_new_tokens=12", "--temperature=1.0")
    assert infer(*words, f"--output={tmp_path / 'free.jsonl'}") == 0
    free = rows_of(tmp_path / "free.jsonl")
    said = free[1]["prediction"]
    stops = [said[1:3], "never this"]  # across tokens, which are bytes here
    assert infer(*words, *[f"--stop={each}" for each in stops], f"--output={tmp_path / 'out.jsonl'}") == 0
    found = rows_of(tmp_path / "out.jsonl")
    assert len(found[1]["prediction"]) < len(said)
    for row, whole in zip(found, free):
        end = whole["prediction"].find(stops[0]) + len(stops[0])
        cut = stops[0] in whole["prediction"]
        assert row["prediction"] == (whole["prediction"][:end] if cut else whole["prediction"])
        size = len(row["tokens"])
        assert row["tokens"] == whole["tokens"][:size] and row["token_scores"] == whole["token_scores"][:size]
        np.testing.assert_allclose(row["score"], sum(row["token_scores"]), rtol=1e-5)
    how = {"layout": "single", "batch_size": 4, "max_new_tokens": 12, "decoder": Sampling(temperature=1.0)}
    predictor = Predictor(run, stop=stops[0], **how)  # a lone string is one stop
    assert [each.text for each in predictor.predict(TEXTS)] == [row["prediction"] for row in found]
    assert "".join(predictor.generate(TEXTS[1], id=1)) == found[1]["prediction"]


def test_texts_do_not_stop_a_search(run):
    with pytest.raises(UserError, match="cannot end them by a text"):
        Predictor(run, layout="single", decoder=BeamSearch(2), stop="a")


def test_prompts_are_answered_on_the_terminal(run, questions, tmp_path, capsys):
    assert infer(f"--model_dir={run}", f"--input={questions}", f"--output={tmp_path / 'out.jsonl'}") == 0
    wanted = [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")]
    capsys.readouterr()
    words = (f"--model_dir={run}", f"--prompt={TEXTS[0]}", f"--prompt={TEXTS[1]}")
    assert infer(*words) == 0
    assert capsys.readouterr().out == f"> {TEXTS[0]}\n{wanted[0]}\n\n> {TEXTS[1]}\n{wanted[1]}\n\n"
    assert infer(*words, f"--output={tmp_path / 'two.jsonl'}") == 0
    assert [row["prediction"] for row in rows_of(tmp_path / "two.jsonl")] == wanted[:2]
    assert infer(f"--model_dir={run}", "--prompt=" + "x" * 99) == 2
    assert "prompt 1: 100 tokens of inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_begin_as_they_are_told(run, tmp_path):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"inputs": "one", "first": "Well, "}\n{"inputs": "two"}\n')
    words = (f"--model_dir={run}", f"--input={path}", "--begin_field=first", "--max_new_tokens=8")
    assert infer(*words, f"--output={out}") == 0
    told, free = rows_of(out)
    assert told["prediction"].startswith("Well, ") and not free["prediction"].startswith("Well, ")
    predictor = Predictor(run, layout="single", batch_size=4, max_new_tokens=8)
    assert [each.text for each in predictor.predict(["one", "two"], begun=["Well, ", ""])] == [
        told["prediction"],
        free["prediction"],
    ]


@pytest.mark.slow
def test_a_warm_predictor_compiles_nothing_over_mixed_lengths(run):
    predictor = Predictor(run, layout="single", batch_size=2, max_new_tokens=4)
    draw = random.Random(0)
    texts = ["x" * draw.randint(0, 63) for _ in range(24)]
    predictor.predict(texts)
    with Compilations() as compilations:
        predictor.predict(texts[::-1])
    assert compilations.count == 0


def test_what_searches_cannot_stream(run):
    with pytest.raises(UserError, match="BeamSearch.* cannot stream"):
        next(Predictor(run, layout="single", decoder=BeamSearch(2)).generate("x"))


MISTAKES = {
    "a prompt longer than the cache": (
        ["--max_input_length=20"],
        "questions.jsonl:2: 55 tokens of inputs, and there is",
    ),
    "an unknown step": (["--step=8"], "has no checkpoint of step 8; there are [7]"),
    "an unknown mode": (["--mode=guess"], "argument --mode: 'guess' is not one of predict, score"),
    "a missing field": (
        ["--inputs_field=input"],
        "there is no field 'input', only ['id', 'inputs']; did you mean 'inputs'?",
    ),
    "no targets to score": (["--mode=score"], "there is no field 'targets', only ['id', 'inputs']"),
    "aux without a name": (["--mode=predict_with_aux"], "goes with --aux=NAMES"),
    "an unknown intermediate": (
        ["--mode=predict_with_aux", "--aux=hidden"],
        "no intermediate 'hidden'; there are decoder_",
    ),
    "a batch that does not divide": (["--gin.LAYOUT=data", "--batch_size=3"], "'batch' of size 3 is not divisible"),
    "another recipe": (["--gin.D_MODEL=32"], "holds another model than this recipe"),
    "both inputs": (["--split=train"], "give one"),
    "beams and decodes": (["--beams=4", "--num_decodes=2"], "--num_decodes has no effect with --beams"),
    "a batch of none": (["--batch_size=0"], "argument --batch_size: '0' is not a whole number of at least 1"),
    "less than no beams in gin": (
        ["--gin.infer.infer.beams=-1"],
        "--gin.infer.infer.beams: infer.infer.beams = -1: it must be at least 1",
    ),
    "an empty stop": (["--stop="], "stop: '' is not a text"),
    "an empty split": (["--split="], "argument --split: '' is not a text"),
    "standard output": (["--output=-"], "--output=-: results are files"),
    "a shard of none": (["--shard_id=1"], "--num_shards=N, of how many, is missing: both are given, or none"),
    "shards of which this is none": (["--num_shards=2"], "--shard_id=I, which of them this is, is missing: both"),
    "a shard that there is not": (
        ["--num_shards=2", "--shard_id=2"],
        "shard_id=2 is not one of 2 shards, which are 0 to 1",
    ),
    "an unknown policy": (["--on_bad=ignore"], "argument --on_bad: 'ignore' is not one of fail, skip"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, run, questions, tmp_path, capsys):
    words, message = MISTAKES[name]
    output = [] if any(word.startswith("--output") for word in words) else [f"--output={tmp_path / 'out.jsonl'}"]
    assert infer(f"--model_dir={run}", f"--input={questions}", *output, *words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_model_without_a_decoder_is_refused_before_anything_is_compiled(questions, tmp_path, capsys):
    encoder = save_run(tmp_path / "bert", "bert")
    with Compilations() as compilations:
        assert infer(f"--model_dir={encoder}", f"--input={questions}", f"--output={tmp_path / 'out.jsonl'}") == 2
    assert compilations.count == 0
    said = capsys.readouterr().err
    assert "EncoderOnly has no decoder: it neither predicts nor scores text" in said and "Traceback" not in said


def test_a_model_that_does_not_decode_scores_and_is_refused_where_it_should_predict(
    decoder_only, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr(DecoderOnly, "prefill")
    monkeypatch.delattr(DecoderOnly, "fork")
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    pairs.write_text(json.dumps({"inputs": "one", "targets": "two"}) + "\n")
    with Compilations() as compilations:
        assert infer(f"--model_dir={decoder_only}", f"--input={pairs}", f"--output={output}") == 2
    assert compilations.count == 0
    said = capsys.readouterr().err
    assert "DecoderOnly does not decode" in said and "no method prefill or fork" in said and "--mode=score" in said
    assert infer(f"--model_dir={decoder_only}", f"--input={pairs}", f"--output={output}", "--mode=score") == 0
    assert len(rows_of(output)[0]["token_scores"]) > 1


def test_earlier_results_are_an_input_of_which_nothing_is_lost(run, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(
        '{"inputs": "one", "index": 7, "tokens": [1], "score": "A", "input_score": 3, "prediction": "p"}\n'
    )
    words = (f"--model_dir={run}", f"--input={first}", f"--output={second}")
    assert infer(*words, "--max_new_tokens=2") == 0
    (row,) = rows_of(second)
    assert row["index"] == 0 and len(row["tokens"]) == 2 and row["score"] < 0
    kept = {"input_index": 7, "input_tokens": [1], "input_input_score": "A", "input_score": 3, "input_prediction": "p"}
    assert kept.items() <= row.items()
    assert infer(*words, "--mode=score", "--targets_field=prediction", "--overwrite") == 0
    (row,) = rows_of(second)
    assert row["prediction"] == "p" and row["tokens"] == [1]  # names that scores do not take


@pytest.mark.parametrize("empty", [0, 1, 6])
def test_beams_that_never_ended_are_left_out(empty):
    """Two have ended: the others are empty, and score -1e7 as T5X has it."""
    found = Decoded(
        np.array([[[0, 0]] * empty + [[70, 1], [71, 1]]]), np.array([[0] * empty + [2, 2]]),
        np.zeros((1, empty + 2, 2), np.float32), np.array([[-1e7] * empty + [-2.0, -1.0]], np.float32),
    )  # fmt: skip
    example = Example(0, {}, [5], [], {"inputs": 1})
    text = Text(VOCABULARY, VOCABULARY, (0,), (1,))
    engine = SimpleNamespace(batch_size=1)
    (row,) = Predict(engine, text, doubling({"inputs": 4}), 2).finish([example], 0, found).rows
    assert row["predictions"] == ["D", "C"] and row["scores"] == [-1.0, -2.0] and row["prediction"] == "D"


def test_a_run_of_token_ids_needs_no_vocabulary(run, tmp_path, capsys):
    bare, path = tmp_path / "bare", tmp_path / "in.jsonl"
    shutil.copytree(run, bare)
    (bare / "vocabularies.json").unlink()
    path.write_text('{"inputs": [5, 6, 1]}\n{"inputs": [9, 1]}\n')
    for name, model_dir in (("with", run), ("without", bare)):
        words = (f"--model_dir={model_dir}", f"--input={path}", "--max_new_tokens=3")
        assert infer(*words, f"--output={tmp_path / name}.jsonl") == 0
    for known, row in zip(rows_of(tmp_path / "with.jsonl"), rows_of(tmp_path / "without.jsonl"), strict=True):
        size = len(known["tokens"])  # without a vocabulary no id is known to end it
        assert row["tokens"][:size] == known["tokens"] and row["token_scores"][:size] == known["token_scores"]
        assert row["prediction"] == " ".join(f"<{token}>" for token in row["tokens"])
    capsys.readouterr()
    path.write_text('{"inputs": [5, 384]}\n{"inputs": "text"}\n')
    assert infer(f"--model_dir={bare}", f"--input={path}", f"--output={tmp_path / 'bad.jsonl'}") == 2
    said = capsys.readouterr().err
    assert "id 384 is not in the vocabulary of 384" in said and "holds no vocabularies" in said


@pytest.mark.parametrize("mode", ["predict", "score"])
def test_a_vocabulary_without_text_serves_token_ids(run, mode, tmp_path, capsys):
    """As a task of numbers has it, whose seqio vocabulary is a PassThroughVocabulary."""
    opaque, path = tmp_path / "opaque", tmp_path / "in.jsonl"
    shutil.copytree(run, opaque)
    RunDirectory(opaque).save_vocabularies(dict.fromkeys(LENGTHS, Opaque("numbers", 384, eos_id=1)), None)
    path.write_text('{"inputs": [5, 6, 1], "targets": [9, 8, 1]}\n')
    words = (f"--input={path}", f"--mode={mode}")
    for name, model_dir in (("bytes", run), ("opaque", opaque)):
        assert infer(f"--model_dir={model_dir}", *words, f"--output={tmp_path / name}.jsonl") == 0, capsys.readouterr()
    (known,), (row,) = (rows_of(tmp_path / f"{name}.jsonl") for name in ("bytes", "opaque"))
    assert row["token_scores"] == known["token_scores"] and row.get("tokens") == known.get("tokens")


class Backwards(seqio.ByteVocabulary):
    """A vocabulary of a user's: bytes, the last one first."""

    def _encode(self, s):
        return super()._encode(s)[::-1]

    def _decode(self, ids):
        return super()._decode([token for token in ids if token != 1][::-1])


def of_kind(kind, folder):
    """A seqio vocabulary of at most 384 ids."""
    letters = [*map(chr, range(32, 127)), "é"]
    match kind:
        case "words":
            return seqio.UnigramVocabulary([f"w{n}" for n in range(380)], split_on_space=True)
        case "characters":
            return seqio.PartialCodepointVocabulary(list(map(ord, letters)), extra_ids=200)
        case "word pieces":
            words = ["[PAD]", "[UNK]", *letters[1:], *(f"##{letter}" for letter in letters[1:]), "[SEP]"]
            (folder / "vocab.txt").write_text("\n".join(words) + "\n")
            return seqio.BertWordPieceVocabulary(str(folder / "vocab.txt"), end_of_sequence_id=192)
    return Backwards(100)


@pytest.fixture(scope="module")
def backwards(tmp_path_factory):
    """A run whose vocabulary only the code of its task knows."""
    features = dict.fromkeys(LENGTHS, seqio.Feature(Backwards(100)))
    source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=["train"])
    seqio.TaskRegistry.add("infer_backwards", source=source, preprocessors=[], output_features=features)
    yield save_run(tmp_path_factory.mktemp("runs") / "own", "t5_1_1", "MIXTURE_OR_TASK_NAME = 'infer_backwards'")
    seqio.TaskRegistry.remove("infer_backwards")


@pytest.mark.parametrize(
    "kind",
    tiers(
        ["words", "characters", "word pieces", "a user's"],
        quick=["a user's"],
        slow=["words", "characters", "word pieces"],
    ),
)
def test_every_vocabulary_of_text_reads_and_writes_it(run, request, kind, tmp_path, capsys):
    theirs = of_kind(kind, tmp_path)
    known = of_seqio(theirs)
    made, path = tmp_path / "run", tmp_path / "in.jsonl"
    shutil.copytree(request.getfixturevalue("backwards") if kind == "a user's" else run, made)
    RunDirectory(made).save_vocabularies(dict.fromkeys(LENGTHS, known), Framing.of(known))
    texts = ["w3 w5 w9", "12 a . b", "w7"]
    ids = [[*known.encode(text), *([] if known.eos_id is None else [known.eos_id])] for text in texts]
    path.write_text("".join(json.dumps({"inputs": each}) + "\n" for each in [*texts, *ids]))
    words = (f"--model_dir={made}", f"--input={path}", "--max_new_tokens=6", "--temperature=1.0", "--seed=3")
    assert infer(*words, f"--output={tmp_path / 'out.jsonl'}") == 0, capsys.readouterr()
    rows = rows_of(tmp_path / "out.jsonl")
    assert "written as ids" not in capsys.readouterr().err
    ends = lambda tokens: tokens[: tokens.index(known.eos_id)] if known.eos_id in tokens else tokens  # noqa: E731
    for row in rows:
        assert row["prediction"] == (theirs.decode(ends(row["tokens"])) if ends(row["tokens"]) else "")
    stop = rows[0]["prediction"][1:3]
    how = {"layout": "single", "batch_size": 4, "max_new_tokens": 6, "decoder": Sampling(temperature=1.0), "seed": 3}
    predictor = Predictor(made, stop=stop, **how)
    found = predictor.predict([*texts, *ids])
    assert found[0].text == "".join(rows[0]["prediction"].partition(stop)[:2])
    assert found[0].tokens == rows[0]["tokens"][: len(found[0].tokens)]
    assert "".join(predictor.generate(texts[0], id=0)) == found[0].text
    assert predictor.predict(ids[:1])[0].tokens == found[0].tokens  # text is read as its ids


def test_a_vocabulary_whose_code_is_gone_says_where_it_was_looked_for(backwards, tmp_path, capsys):
    path, gone = tmp_path / "in.jsonl", tmp_path / "gone"
    path.write_text('{"inputs": "text"}\n')
    shutil.copytree(backwards, gone)
    recipe = (gone / "recipe.gin").read_text().replace("infer_backwards", "infer_forwards")
    (gone / "recipe.gin").write_text(recipe)
    words = (f"--model_dir={gone}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}")
    RunDirectory(gone).save_vocabularies(dict.fromkeys(LENGTHS, of_seqio(Backwards(100))), None)
    assert infer(*words) == 2
    said = capsys.readouterr().err
    assert "in.jsonl:1: field 'inputs': text, and there is none in opaque" in said and "infer_forwards" in said
    path.write_text('{"inputs": [70, 71]}\n')
    assert infer(*words) == 0
    assert "predictions are written as ids" in capsys.readouterr().err
    assert rows_of(tmp_path / "out.jsonl")[0]["prediction"].startswith("<")


def test_a_malformed_line_is_named_or_left_out(run, tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"inputs": "fine"}\n{"inputs": "broken\n{"inputs": "fine too"}\n')
    words = (f"--model_dir={run}", f"--input={path}", f"--output={out}", "--max_new_tokens=4")
    assert infer(*words) == 2
    assert "in.jsonl:2: not JSON" in capsys.readouterr().err
    assert infer(*words, "--on_bad=skip") == 0
    assert [row["index"] for row in rows_of(out)] == [0, 2]
    assert "left out: in.jsonl:2" in capsys.readouterr().err.replace(f"{path}", "in.jsonl")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "half a file": lambda step: largest(step).write_bytes(largest(step).read_bytes()[:1000]),
    "a missing file": lambda step: largest(step).unlink(),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no recipe": lambda step: shutil.rmtree(step / "recipe"),
    "nothing but names": lambda step: [path.write_bytes(b"") for path in step.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("damage", tiers(DAMAGES, quick=["half a file", "no recipe"], slow=DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, tmp_path, capfd, damage):
    """As rsync, cut off, leaves it. What only reads renames nothing."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copytree(folder / "checkpoints" / "7", folder / "checkpoints" / "9")
    DAMAGES[damage](folder / "checkpoints" / "9")
    asked = ["--prompt=one", "--max_new_tokens=4"]
    assert infer(f"--model_dir={folder}", *asked) == 0
    said = capfd.readouterr()
    assert f"checkpoint {folder}/checkpoints/9 cannot be read" in said.err and "taking step 7" in said.err
    assert said.out.startswith("> one\n")
    for words in ([f"--model_dir={folder}", "--step=9"], [f"--model_dir={folder}/checkpoints/9"]):
        assert infer(*words, *asked) == 1
        said = capfd.readouterr()
        (message,) = [line for line in said.err.splitlines() if line.startswith("meshway: error: ")]
        assert f"{folder}/checkpoints/9 cannot be read" in message and "Step 7 is there too" in message and not said.out
        assert not any(word in said.err for word in ("Traceback", "Event loop", "ERROR:absl", "<bound method"))
    with pytest.warns(UserWarning, match="taking step 7"):
        Predictor(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["7", "9"]
