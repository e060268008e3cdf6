"""Checks of users' own tasks and models pass what is right, and say what is wrong and where."""

import random
import textwrap
from pathlib import Path

import cached_tasks
import numpy as np
import pytest
import seqio
import tensorflow as tf
from cached_tasks import add, pairs

from meshway.framework.data.eval_task import TaskEvaluation
from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.passthrough import PassThrough
from meshway.launch import testing

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
LENGTHS = {"inputs": 12, "targets": 8}
PLAIN = cached_tasks.PLAIN
NO_EOS = {name: seqio.Feature(cached_tasks.BYTES, add_eos=False) for name in ("inputs", "targets")}


def exact(targets, predictions):
    return {"exact": sum(map(str.__eq__, targets, predictions)) / len(targets)}


def fails(targets, predictions):
    raise ZeroDivisionError("no targets")


def test_a_right_task_passes_and_is_described():
    add("right", PLAIN, metric_fns=[exact])
    train, validation = testing.check_task("right", LENGTHS, num_examples=20)
    assert train == testing.CheckedSplit("right", "train", 20, truncated=13, skipped=0, metrics={"exact": 1.0})
    assert (validation.split, validation.examples) == ("validation", 7)
    assert not [name for name in seqio.TaskRegistry.names() if "being_checked" in name]


LATER = {
    "trimmed": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    "random": [seqio.preprocessors.tokenize, cached_tasks.seeded_noise, cached_tasks.stateful_noise, PLAIN[1]],
    "by_length": [seqio.preprocessors.tokenize, cached_tasks.halved, seqio.preprocessors.append_eos],
}


@pytest.mark.parametrize("steps", LATER.values(), ids=LATER)
def test_steps_after_the_cache_and_random_ones_are_right_too(steps):
    add("later", steps)
    assert testing.check_task("later", LENGTHS, 6, split="validation")[0].examples == 6


@pytest.mark.slow
def test_the_quickstart_task_passes():
    found = testing.check_task(
        "quickstart_mix", {"inputs": 128, "targets": 64}, 8, "meshway.tasks.quickstart", eos=False
    )
    assert [each.task for each in found] == ["dates", "dates", "pydocs_bytes_text", "pydocs_bytes_text"]


@seqio.map_over_dataset
def far_ids(example):
    return example | {"targets": tf.concat([example["targets"], [269]], axis=0)}


@seqio.map_over_dataset
def undeclared(example):
    def draw(tokens):
        return np.append(tokens, np.int32(random.randrange(3, 259)))

    drawn = tf.numpy_function(draw, [example["inputs"]], tf.int32)
    return example | {"inputs": tf.ensure_shape(drawn, [None])}


@seqio.map_over_dataset
def without_inputs(example):
    return {"targets": example["targets"]}


def nothing(dataset):
    return dataset.take(0)


WRONG = {
    "EOS": (
        [seqio.preprocessors.tokenize],
        {},
        r"'validation', example 0: feature '\w+' ends with \d+ and not with EOS",
    ),
    "ids": ([*PLAIN, far_ids], {}, r"'validation', example 0.*269"),
    "dtype": ([*PLAIN, cached_tasks.to_int64], {}, r"'targets'.*int(32|64)"),
    "random": ([*PLAIN[:1], undeclared, PLAIN[1]], {}, r"example 0: feature 'inputs' is not the same when read again"),
    "empty": ([*PLAIN[:1]], {"features": NO_EOS}, r"example 0: feature 'targets' is empty"),
    "missing": ([*PLAIN, without_inputs], {}, r"inputs"),
    "metric": (PLAIN, {"metric_fns": [fails]}, r"metric function fails raises .*no targets"),
    "postprocessor": (PLAIN, {"metric_fns": [exact], "postprocess_fn": lambda text, **_: int("x")}, "invalid literal"),
    "none": ([*PLAIN, nothing], {}, r"split 'validation' has no examples"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_task_is_told_what_is_wrong(fault):
    steps, more, message = WRONG[fault]
    add("wrong", steps, **more)
    with pytest.raises(AssertionError, match=f"(?s)'wrong'.*{message}"):
        testing.check_task("wrong", LENGTHS, 4, split="validation")


def test_a_cache_that_holds_something_else_is_told(monkeypatch):
    read = TaskEvaluation.read
    monkeypatch.setattr(
        TaskEvaluation, "read", lambda *given: [e | {"targets": e["targets"] + 1} for e in read(*given)]
    )
    add("right", PLAIN)
    with pytest.raises(AssertionError, match="'right'.*example 0: feature 'targets' is not what its cache holds"):
        testing.check_task("right", LENGTHS, 4, split="validation")


def test_a_step_that_needs_lengths_asks_for_them():
    add("right", LATER["by_length"])
    with pytest.raises(AssertionError, match="(?s)'right'.*give `lengths`"):
        testing.check_task("right", num_examples=4, split="validation")


def test_a_task_without_text_needs_the_converter_of_its_recipe():
    features = {"image": seqio.ContinuousFeature(dtype=tf.uint8, rank=3)}
    add("images", [], cached_tasks.everything, features=features)
    with pytest.raises(AssertionError, match="'images'.*give the `converter`"):
        testing.check_task("images", num_examples=4, split="validation")
    converter = PassThrough({"image": (4, 3, 2)}, {"image": "uint8"})
    assert testing.check_task("images", {}, 4, split="validation", converter=converter)[0].examples == 4


def test_a_name_or_split_that_is_not_there_has_the_nearest():
    add("right", PLAIN)
    with pytest.raises(AssertionError, match="'righ'.*did you mean 'right'"):
        testing.check_task("righ")
    with pytest.raises(AssertionError, match="'vaildation'.*did you mean 'validation'"):
        testing.check_task("right", split="vaildation")


def test_a_converter_whose_segments_run_together_is_told():
    class Mixed(EncoderDecoder):
        def bind(self, task, lengths):
            objective = super().bind(task, lengths)
            lay = objective.lay

            def run_together(items, placement):
                arrays = lay(items, placement)
                arrays["decoder_segment_ids"] = np.minimum(arrays["decoder_segment_ids"], 1)
                return arrays

            object.__setattr__(objective, "lay", run_together)
            return objective

    add("right", PLAIN, pairs)
    with pytest.raises(AssertionError, match="example 0: no segment of a packed row is what it is alone"):
        testing.check_task("right", {"inputs": 64, "targets": 64}, 6, split="validation", converter=Mixed())


def test_a_shipped_task_and_a_shipped_model_pass():
    (found,) = testing.check_task("dates", {"inputs": 32, "targets": 16}, 4, "meshway.tasks.dates", "validation")
    assert found.metrics == {"exact_match": 100.0}
    small = ["VOCAB_SIZE=64", "NUM_LAYERS=1", "D_MODEL=16", "LAYOUT='single'"]
    testing.check_model("models/lm/tiny.gin", small, {"targets": 9})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "model_1d"])
def test_a_shipped_encoder_decoder_passes_on_a_mesh(layout):
    small = ["VOCAB_SIZE=64", "NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=1", f"LAYOUT={layout!r}"]
    testing.check_model("models/t5_1_1/tiny.gin", small, {"inputs": 9, "targets": 8})


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "sums.gin"
    path.write_text(
        textwrap.dedent("""
            from __gin__ import dynamic_registration
            import own_models
            MODEL = @own_models.Sums()
            own_models.Sums.fault = None
            TASK_FEATURE_LENGTHS = {'targets': 10}
            LAYOUT = 'fsdp'
        """)
    )
    return str(path)


def test_a_right_model_of_ones_own_passes(recipe):
    testing.check_model(recipe)


@pytest.mark.parametrize("fault", testing.CHECKS)
def test_a_wrong_model_is_told_by_the_check_that_it_fails(recipe, fault):
    says = "embedd" if fault == "parameters" else f"^{fault}: "
    with pytest.raises(AssertionError, match=says):
        testing.check_model(recipe, [f"own_models.Sums.fault={fault!r}"])


@pytest.mark.parametrize("fault", ["segments", "decoding"])
def test_a_check_that_is_skipped_is_not_made(recipe, fault):
    testing.check_model(recipe, [f"own_models.Sums.fault={fault!r}"], skip=[fault])


def test_parameters_that_are_not_finite_are_told(recipe):
    with pytest.raises(AssertionError, match="table is not finite"):
        testing.check_model(recipe, ["own_models.Sums.fault='finite'"])


def test_a_mistake_in_the_recipe_or_in_skip_is_told(recipe):
    with pytest.raises(AssertionError, match="falut.*fault"):
        testing.check_model(recipe, ["own_models.Sums.falut=1"])
    with pytest.raises(AssertionError, match="'segment'.*did you mean 'segments'"):
        testing.check_model(recipe, skip=["segment"])


@pytest.mark.slow
def test_the_page_runs_on_a_shipped_task_and_model_and_names_the_checks():
    section = PAGE.read_text().split("## Testing a task and a model of your own")[1].split("\n## ")[0]
    exec(textwrap.dedent("\n".join(line for line in section.splitlines() if line.startswith("    "))), {})
    assert all(f"`{name}`" in section for name in testing.CHECKS)
