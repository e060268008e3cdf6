"""A model at hand trains, predicts, scores and evaluates as commands do, on examples in memory."""

import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import VOCABULARY, save_run

from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.rows import packing
from meshway.framework.errors import UserError
from meshway.framework.inference.predictor import Predictor
from meshway.framework.telemetry.profiler import Compilations
from meshway.launch.interactive import InteractiveModel

PAGE = Path(__file__).parents[2] / "docs/inference.md"
LENGTHS = {"inputs": 16, "targets": 8}
RECIPE = f"""
from __gin__ import dynamic_registration
include 'models/t5_1_1/tiny.gin'
include 'optimizers/adamw.gin'
VOCAB_SIZE = 384
NUM_ENCODER_LAYERS = 1
NUM_DECODER_LAYERS = 1
TASK_FEATURE_LENGTHS = {LENGTHS}
BATCH_SIZE = 4
PACK = False
LAYOUT = 'single'
DROPOUT_RATE = 0.0
Z_LOSS = 0.0
"""
EXAMPLES = [{"inputs": f"say {word}", "targets": word, "id": n} for n, word in enumerate(["one", "two", "three"])]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "recipe.gin"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def model(recipe):
    return InteractiveModel(recipe, vocabularies=VOCABULARY)


def own_batch():
    tokens = FeatureInfo("int32", (None,))
    objective = EncoderDecoder(pack=False).bind(TaskInfo("t", dict.fromkeys(LENGTHS, tokens), (0,)), LENGTHS)
    items = [{n: np.array([*VOCABULARY.encode(each[n]), 1], np.int32) for n in LENGTHS} for each in EXAMPLES]
    batch = objective.lay(items, packing.one_each(len(items), list(LENGTHS)))
    return {name: np.pad(rows, [(0, 1), *[(0, 0)] * (rows.ndim - 1)]) for name, rows in batch.items()}


@pytest.mark.slow
def test_predictions_are_those_of_the_latest_step_and_nothing_is_compiled_again(recipe):
    model = InteractiveModel(recipe, vocabularies=VOCABULARY)
    before = [each.token_scores for each in model.predict(EXAMPLES)]
    model.train_step(EXAMPLES)
    assert not model._predictor._engine.params  # a step has the memory that they took
    after = [each.token_scores for each in model.predict(EXAMPLES)]
    assert after != before
    with Compilations() as compilations:
        assert [each.token_scores for each in model.predict(EXAMPLES)] == after
        model.train_step(EXAMPLES)
        assert [each.token_scores for each in model.predict(EXAMPLES)] != after
    assert compilations.count == 0


@pytest.mark.slow
def test_a_step_is_one_on_a_batch_of_these_examples(model):
    batch, params, before = own_batch(), jax.device_get(model.state.params), model.step
    loss, weight, _ = jax.jit(model.program.model.loss, static_argnums=2)(params, batch, None)
    np.testing.assert_allclose(model.train_step(EXAMPLES)["loss"], loss / weight, rtol=1e-5)
    assert len(model.train_steps(EXAMPLES, 3)) == 3 and model.step == before + 4


def test_examples_that_are_cut_are_said(model, capsys):
    model.train_step([{"inputs": "x" * 50, "targets": "y"}, *EXAMPLES[:1]])
    assert "'examples in memory': 1 of 2 examples are longer than TASK_FEATURE_LENGTHS" in capsys.readouterr().err
    model.train_step(EXAMPLES)
    assert "longer" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_vocabulary_of_ones_own_is_taken_as_it_is(recipe):
    class Codes:
        vocab_size, eos_id = 384, 1

        def encode(self, text):
            return [ord(letter) + 2 for letter in text]

        def decode(self, ids):
            return "".join(chr(max(token - 2, 0)) for token in ids if token != 1)

    seen = []

    def metric(targets, predictions):
        seen.extend(zip(targets, predictions, strict=True))
        return {"examples": len(targets)}

    model = InteractiveModel(recipe, vocabularies=Codes())
    assert model.evaluate(EXAMPLES, [metric])["examples"] == 3
    assert seen == list(zip(["one", "two", "three"], [each.text for each in model.predict(EXAMPLES)]))


@pytest.mark.slow
def test_a_saved_model_is_a_run_and_goes_on_bit_for_bit(model, tmp_path):
    model.train_steps(EXAMPLES, 2)
    step = model.step
    model.save(tmp_path / "run")
    predictor = Predictor(tmp_path / "run", layout="single", batch_size=4)
    assert predictor.step == step
    texts = [each["inputs"] for each in EXAMPLES]
    found, expected = (
        model.predict(EXAMPLES),
        predictor.predict(texts),
    )  # of another program: weights lie layer by layer
    assert found == model.predict(texts) and [each.tokens for each in found] == [each.tokens for each in expected]
    np.testing.assert_allclose([each.score for each in found], [each.score for each in expected], rtol=1e-5)
    assert model.score(EXAMPLES) == predictor.score(texts, [each["targets"] for each in EXAMPLES])
    said, aux = model.predict_with_aux(EXAMPLES, ["encoder_output"])
    assert said == [each.text for each in predictor.predict(texts)] and np.shape(aux["encoder_output"][0]) == (8, 64)
    assert aux["scores"] == [each.score for each in model.predict(EXAMPLES)]

    again = InteractiveModel(model_dir=tmp_path / "run", bindings=["LAYOUT='single'"])
    assert again.step == step and again.train_step(EXAMPLES) == model.train_step(EXAMPLES)
    assert again.predict(EXAMPLES) == model.predict(EXAMPLES)


@pytest.mark.slow
def test_the_documented_lines_run(recipe, tmp_path, monkeypatch, capsys):
    lines = PAGE.read_text().split("unless they are given:\n")[1].splitlines()
    block = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("    "))]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_text(RECIPE)
    exec(textwrap.dedent("\n".join(block)), {})
    assert "'accuracy'" in capsys.readouterr().out
    assert Predictor("runs/by_hand", layout="single").step == 101


@pytest.mark.slow
def test_metric_functions_get_what_seqio_gives_them(model):
    seen = {}

    def of_predictions(targets, predictions):
        seen["predictions"] = (targets, predictions)
        return {"same": float(targets == predictions)}

    def of_aux(targets, predictions, aux_values):
        return {"best": float(max(aux_values["scores"]))}

    def of_scores(targets, scores):
        return {"score": float(np.mean(scores))}

    def post(text, example, is_target):
        return f"{example['id']}: {text}" if is_target else text

    found = model.evaluate(EXAMPLES, [of_predictions, of_aux, of_scores], post)
    predicted = model.predict(EXAMPLES)
    assert seen["predictions"] == (["0: one", "1: two", "2: three"], [each.text for each in predicted])
    np.testing.assert_allclose(found["best"], max(each.score for each in predicted), rtol=1e-5)
    scored = [each.score for each in model.score(EXAMPLES)]
    np.testing.assert_allclose(found["score"], np.mean(scored), rtol=1e-5)
    tokens = sum(len(each["targets"]) + 1 for each in EXAMPLES)
    np.testing.assert_allclose(found["loss"], -sum(scored) / tokens, rtol=1e-5)
    before = model.evaluate(EXAMPLES)["loss"]  # of the parameters as they are now, each time
    model.train_step(EXAMPLES)
    assert before == pytest.approx(found["loss"]) and model.evaluate(EXAMPLES)["loss"] < before


def test_what_is_wrong_with_examples_is_told(model, recipe, tmp_path):
    def raises(targets, predictions):
        raise KeyError("no")

    for call, message in (
        (lambda: InteractiveModel(recipe), "there is no vocabulary: give vocabularies=, or a recipe with the MIXTURE"),
        (lambda: InteractiveModel(), "needs a recipe .a gin file., or model_dir="),
        (lambda: InteractiveModel(model_dir=tmp_path), "is neither a run directory nor a checkpoint"),
        (lambda: InteractiveModel(recipe, step=3), "step=3 names a checkpoint of a run: give its model_dir="),
        (lambda: model.train_step([]), "there are no examples"),
        (lambda: model.train_step(EXAMPLES * 2), "6 examples make 6 rows, and a batch has 4: use train_steps"),
        (lambda: model.train_step([{"inputs": "a", "target": "b"}]), "example 0 has no 'targets', only .*did you mean"),
        (lambda: model.train_step([{"inputs": "a", "targets": [5, 999]}]), "example 0, field 'targets': id 999 is not"),
        (lambda: model.train_step({"inputs": "a"}), "give a list of examples"),
        (lambda: model.predict([5]), "example 0 is neither a dict nor a text, but int"),
        (lambda: model.predict(["x" * 50]), "51 tokens of inputs"),
        (lambda: model.evaluate(EXAMPLES, [lambda a, b: {}]), r"takes \('a', 'b'\), not \(targets, predictions\) or"),
        (lambda: model.evaluate(EXAMPLES, [raises]), "evaluate: raises raised KeyError"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.proofs
def test_a_run_of_parameters_alone_is_trained_on(tmp_path):
    """As a converted one is; its own recipe lacks an optimizer."""
    run = save_run(tmp_path / "run", "lm")
    with pytest.raises(UserError, match="OPTIMIZER"):
        InteractiveModel(model_dir=run)
    (run / "recipe.gin").write_text((run / "recipe.gin").read_text() + "include 'optimizers/adamw.gin'\n")
    sizes = ["BATCH_SIZE=2", "LAYOUT='single'", "TASK_FEATURE_LENGTHS={'targets': 32}"]
    model = InteractiveModel(model_dir=run, bindings=sizes)
    predictor = Predictor(run, layout="single", batch_size=2, max_input_length=32, max_new_tokens=32)
    assert model.predict(["abc"]) == predictor.predict(["abc"])
    before = model.step  # what a run starts from counts on
    first, *_, last = model.train_steps([{"targets": "a b c"}, {"targets": "d e f"}], 8)
    assert last["loss"] < first["loss"] and model.step == before + 8
    assert before == predictor.step > 0
