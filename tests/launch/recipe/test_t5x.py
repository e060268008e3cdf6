"""A recipe written for T5X is answered line by line, and what the answers say makes the same recipe here."""

import re
import shutil
from pathlib import Path

import pytest
from running import LAB

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.recipe import config, t5x, t5x_names
from meshway.launch.recipe.text import Binding, Import, Include, parse

FILES = sorted(path.stem for path in (LAB / "t5x").glob("*.gin"))
# What a line of T5X's may be and is read here as it stands.
READ = {
    "MIXTURE_OR_TASK_NAME",
    "MIXTURE_OR_TASK_MODULE",
    "TASK_FEATURE_LENGTHS",
    "TRAIN_STEPS",
    "BATCH_SIZE",
    "DROPOUT_RATE",
    "INITIAL_CHECKPOINT_PATH",
    "LOSS_NORMALIZING_FACTOR",
    "LABEL_SMOOTHING",
    "Z_LOSS",
    "USE_HARDWARE_RNG",
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The current folder: a copy of T5X's recipes, and the package of tasks that they import."""
    shutil.copytree(LAB / "t5x", tmp_path, dirs_exist_ok=True)
    shutil.copytree(LAB / "mylab", tmp_path / "mylab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load(*words):
    return config.load(cli.parse(["train", *words, "--gin.MODEL_DIR=run"]), import_unreferenced=False)


def translated(text: str, message: str) -> str:
    """Returns a recipe with each line that the message names replaced by the lines below it: what a person does."""
    lines, imports, at = text.split("\n"), [], None
    for said in message.split("\n")[1:]:
        if match := re.fullmatch(r" {4}\S+?\.gin:([\d, ]+): (.*)", said):
            numbers = [int(each) for each in match[1].split(",")]
            for at in numbers:
                lines[at - 1] = ""
        elif said.startswith("    and above these:"):
            at = None
        elif at is None:
            imports.append(said.strip())
        elif not said.strip().startswith("leave out"):
            lines[at - 1] += said.strip() + "\n"
    kept = [line for line in lines if not re.fullmatch(r"[\w/.]+:", line)]  # heads of blocks whose lines are gone
    return "\n".join([kept[0], kept[1], *imports, *kept[2:]])


@pytest.mark.parametrize("name", FILES)
def test_each_line_is_read_or_answered(name):
    statements = parse((LAB / "t5x" / f"{name}.gin").read_text(), "a.gin")
    found = "\n".join(t5x.answers(statements))
    assert "nothing here is known" not in found
    listed = {
        int(number) for numbers in re.findall(r"^a\.gin:([\d, ]+):", found, re.M) for number in numbers.split(",")
    }
    for each in statements:
        if each.place.line in listed:
            continue
        assert isinstance(each, (Import, Binding))
        if isinstance(each, Import):
            assert not each.module.startswith(("t5x", "__main__"))
        else:
            assert each.is_macro and each.parameter in READ, each.said


@pytest.mark.parametrize("name", FILES)
def test_the_answers_make_a_recipe(lab, name):
    """Every line is applied as it is written; what is left open is asked for as for any recipe."""
    with pytest.raises(UserError) as error:
        load(f"--gin_file={name}.gin")
    text = (lab / f"{name}.gin").read_text()
    (lab / "here.gin").write_text(translated(text, str(error.value)))
    own = name == "own_model"  # it has no task, no run
    more = ["--gin_file=mylab/lm.gin", "--gin.DROPOUT_RATE=0.1"] if own else []
    (lab / "mylab" / "lm.gin").write_text(
        "include 'recipes/pretrain.gin'\nimport mylab.tasks\nTRAIN_STEPS = 5\n"
        "MIXTURE_OR_TASK_NAME = 'mylab_numbers'\nTASK_FEATURE_LENGTHS = {'targets': 8}\n"
    )
    resolved = load("--gin_file=here.gin", *more).resolved
    for line in EXPECTED[name]:
        assert f"\n{line}\n" in resolved, f"{line} is not in:\n{resolved}"


EXPECTED = {
    "from_scratch": (
        "BATCH_SIZE = 128",
        "D_MODEL = 768",
        "DTYPE = 'bfloat16'",
        "DROPOUT_RATE = 0.0",
        "EVAL_PERIOD = 500",
        "CHECKPOINT_PERIOD = 5000",
        "LAYOUT = 'model_1d'",
        "LOSS_NORMALIZING_FACTOR = None",
        "USE_HARDWARE_RNG = True",
        "INFER_EVAL = [@infer_eval/schedule.EvalDataset()]",
        "infer_eval/schedule.EvalDataset.data = @infer_eval/grain_loader.CachedData()",
        "infer_eval/grain_loader.CachedData.eval_lengths = None",
        "mesh.MeshShape.ici = {'data': -1, 'model': 2}",
        "beam_search.BeamSearch.num_beams = 4",
        "manager.Keep.latest = None",
        "optimizers.Optimizer.transform = @optimizers.adafactor",
        "schedules.t5_factors.factors = 'constant * rsqrt_decay'",
    ),
    "finetune": (
        "LOSS_NORMALIZING_FACTOR = 233472",
        "DROPOUT_RATE = 0.1",
        "TRAIN_STEPS = 1020000",
        "EVAL_PERIOD = 100",
        "infer_eval/grain_loader.CachedData.batch_size = 64",
        "mapping.Initial.count_on = True",
        "LEARNING_RATE = 0.001",
        "infer_eval/grain_loader.CachedData.batch_size = 64",
        "schedules.t5_factors.factors = 'constant'",
    ),
    "evaluating": (
        "infer_eval/grain_loader.CachedData.eval_lengths = None",
        "TRAIN_EVAL = None",
        "evaluation.Evaluation.all_decodes = True",
        "evaluation.Evaluation.keep_predictions = True",
        "evaluation.Evaluation.return_intermediates = True",
        "infer_eval/grain_loader.CachedData.mixture_or_task_name = 'mylab_others'",
        "infer_eval/schedule.EvalDataset.data = @infer_eval/grain_loader.CachedData()",
        "training_hooks.EarlyStopping.patience = 5",
        "train.train.hooks = [@training_hooks.EarlyStopping()]",
    ),
    "own_model": ("NUM_LAYERS = 12", "TIED_LOGITS = True", "D_FF = 2048", "sampling.Sampling.top_k = 40"),
    "whole_paths": (
        "BATCH_SIZE = 128",
        "CHECKPOINT_PERIOD = 5000",
        "EVAL_PERIOD = 500",
        "NUM_LAYERS = 12",
        "evaluation.Evaluation.decoder = @sampling.Sampling()",
        "optimizers.adafactor.decay_rate = 0.7",
        "sampling.Sampling.top_k = 40",
    ),
}


@pytest.mark.parametrize(
    "imported, line, answer",
    [
        ("import t5x.examples.scalable_t5.network", "t5x.examples.scalable_t5.network.T5Config.emb_dim", "D_MODEL = 7"),
        ("import t5x.train", "t5x.train.train.random_seed", "SEED = 7"),
        ("from __main__ import train", "train.total_steps", "TRAIN_STEPS = 7"),
        ("from t5x.contrib.moe import trainer", "trainer.MoeTrainer.num_microbatches", "NUM_MICROBATCHES = 7"),
    ],
)
def test_however_a_module_is_imported(imported, line, answer):
    assert f"\n        {answer}" in "\n".join(t5x.answers(parse(f"{imported}\n{line} = 7", "a.gin")))


def test_what_is_said_twice_is_written_once(lab):
    with pytest.raises(UserError) as error:
        load("--gin_file=from_scratch.gin")
    assert str(error.value).count("SEED = 0") == 1


@pytest.mark.parametrize(
    "flag, answer",
    [
        ("--gin.USE_CACHED_TASKS=False", "USE_CACHED_TASKS; it is T5X's, and not needed here: tasks are cached when"),
        ("--gin.RANDOM_SEED=3", "nothing uses the macro RANDOM_SEED; it is T5X's; write SEED = 3"),
        ("--gin.train_script.train.eval_period=7", "it is T5X's; write EVAL_PERIOD = 7"),
        (
            "--gin.partitioning.PjitPartitioner.model_parallel_submesh=(2, 2, 1, 1)",
            "write LAYOUT = 'model_1d' and mesh.MeshShape.ici = {'data': -1, 'model': 4}",
        ),
        ("--gin.utils.nothing_of_theirs=3", "utils.nothing_of_theirs: 'utils' is not imported"),
    ],
)
def test_a_flag_with_a_name_of_t5x_is_answered_by_its_row(flag, answer):
    with pytest.raises(UserError, match=re.escape(answer)):
        load("--gin_file=recipes/quickstart.gin", flag)


@pytest.mark.parametrize("flag", sorted(t5x_names.FLAGS))
def test_the_programs_flags_are_answered(flag):
    with pytest.raises(UserError, match=re.escape(f"{flag} is a flag of T5X's; here it is {t5x_names.FLAGS[flag]}")):
        cli.parse(["train", "--gin_file=recipes/quickstart.gin", f"{flag}=1"])


def test_a_file_of_t5x_by_its_name():
    with pytest.raises(UserError, match=r"write --gin_file=models/mt5/large\.gin --gin\.DTYPE=bfloat16"):
        load("--gin_file=t5x/examples/t5/mt5/large.gin")


@pytest.mark.parametrize(
    "file",
    [
        *(f"t5x/examples/t5/{name}.gin" for name in ("t5_1_1/xxl", "t5_1_0/11B", "t5_1_0/3B", "mt5/small", "byt5/xl")),
        "t5x/examples/scalable_t5/t5_1_1/xl.gin",
        "t5x/examples/scalable_t5/mt5/base.gin",
        "t5x/examples/scalable_t5/mt5/large.gin",
        "t5x/examples/scalable_t5/umt5/pretrain_large.gin",
        "t5x/examples/t5/t5_1_1/adamw_opt.gin",
        "t5x/contrib/gpu/t5/t5_1_1/large.gin",
        "t5x/examples/decoder_only/models/xxl.gin",
        "t5x/configs/runs/pretrain.gin",
        "t5x/contrib/moe/configs/runs/finetune.gin",
    ],
)
def test_what_stands_for_a_file_is_there(file):
    shipped = Path(config.recipe_files.SHIPPED)
    names = re.findall(r"include '(.*)'", t5x.includes(file))
    assert names and all((shipped / name).is_file() for name in names), t5x.includes(file)


def test_a_users_own_folder_is_not_taken_for_t5x():
    assert t5x.includes("mylab/t5x/base.gin") == "" and t5x.includes("models/t5_1_1/base.gin") == ""


@pytest.mark.parametrize(
    "name, value, answer",
    [
        ("trainer.Trainer.num_microbatches", None, "# the whole batch at once is the default"),
        ("decoding.temperature_sample.topp", 0.0, "sampling.Sampling.top_p = 1.0"),
        (
            "models.DecoderOnlyModel.predict_batch_with_aux.num_decodes",
            1,
            "# one prediction of each example is the default",
        ),
    ],
)
def test_values_that_mean_nothing_there_mean_nothing_here(name, value, answer):
    assert t5x_names.BINDINGS[name](value) == answer


def test_every_answer_is_gin_or_a_reason():
    """What an answer says to write can be read, whatever the value."""
    for name, answer in {**t5x_names.BINDINGS, **t5x_names.MACROS}.items():
        for value in (4, None, (1, 2, 1, 1), 0.5, "text", [], True):
            text = answer(value) if callable(answer) else answer
            if text.startswith("# "):
                continue
            written = text.replace("{value}", repr(value))
            assert all(isinstance(each, (Binding, Include)) for each in parse(written, name)), written
