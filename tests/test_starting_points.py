"""The recipes of docs/starting_points.md are what they say: each builds a run."""

import re
from pathlib import Path

import pytest

from meshway.framework.trees import flatten
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

TEXT = (Path(__file__).parent.parent / "docs" / "starting_points.md").read_text()
RECIPES = dict(re.findall(r"^## (.+?)$.*?^```gin\n(.+?)^```", TEXT, re.MULTILINE | re.DOTALL))
GIVEN = (
    "MODEL_DIR='unused'",
    "MIXTURE_OR_TASK_NAME='none'",
    "TRAIN_STEPS=10",
    "BATCH_SIZE=8",
    "TASK_FEATURE_LENGTHS={'targets': 8}",
    "LAYOUT='single'",
    "NUM_LAYERS=1",
)


def built(title, tmp_path):
    """Returns what `meshway train` would be called with."""
    path = tmp_path / "recipe.gin"
    path.write_text(RECIPES[title])
    recipe = config.load(Invocation("train", gin_files=(str(path),), bindings=GIVEN))
    return recipe.build("train.train", given=["data", "resolved"])


def test_all_are_found():
    assert len(RECIPES) == TEXT.count("```gin") == TEXT.count("\n## ")


def test_from_another_run(tmp_path):
    initial = built("From another run", tmp_path)["initial"]
    assert (initial.path, initial.step, initial.resize) == ("runs/pretrained", 20000, None)


def test_with_its_step(tmp_path):
    arguments = built("With its step and its optimizer's state", tmp_path)
    initial = arguments["initial"]
    assert (initial.path, initial.count_on, initial.optimizer_state) == ("runs/pretrained", True, True)
    assert arguments["periods"].counted_from(20000).last == 25000


def test_other_names(tmp_path):
    """Parameters of a stack that had another name are found; what is left at init is asked of nobody."""
    arguments = built("With other names, or in part", tmp_path)
    program = arguments["program"]
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(program.param_shapes).items()}
    saved = {re.sub("^decoder/", "stack/", name): shape for name, shape in shapes.items() if name != "logits/kernel"}
    schema = {f"params/{name}": [list(shape), "float32"] for name, shape in saved.items()}
    sources = arguments["initial"].sources(shapes, flatten(program.axes), schema)
    assert shapes.keys() - sources.keys() == {"logits/kernel"}
    assert {source.name for source in sources.values()} == set(saved)


def test_a_vocabulary_that_grew(tmp_path):
    arguments = built("With a larger vocabulary", tmp_path)
    program = arguments["program"]
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(program.param_shapes).items()}
    schema = {f"params/{name}": [[32000 if size == 32064 else size for size in shape], "float32"]
              for name, shape in shapes.items()}  # fmt: skip
    sources = arguments["initial"].sources(shapes, flatten(program.axes), schema)
    assert {name for name, source in sources.items() if source.resize} >= {"token_embedding/embedding"}


def test_frozen(tmp_path):
    program = built("Only part of it trained", tmp_path)["program"]
    names = set(flatten(program.param_shapes))
    left = {name for name in names if re.match(r"token_embedding/|decoder/.*/attention/", name)}
    assert left and program.optimizer.trainable == names - left


def test_what_is_kept(tmp_path):
    keep = built("What stays on disk", tmp_path)["keep"]
    assert (keep.latest, keep.every, keep.best, keep.metric) == (2, 10000, 1, "validation/my_task/loss")
    keep.policy()


def test_no_evaluation(tmp_path):
    assert built("No evaluation during training", tmp_path)["periods"].evaluate is None


@pytest.mark.parametrize(
    "name", ["path", "step", "renames", "left_at_init", "resize", "frozen", "latest", "every", "best"]
)
def test_every_setting_is_shown(name):
    assert any(re.search(rf"\b{name} = ", recipe) for recipe in RECIPES.values())
