"""Each mistake in a recipe ends in one message: what, where, and the nearest right thing."""

import textwrap

import pytest

from meshway.framework.errors import UserError

INCLUDE = "include 'recipes/base.gin'\n"


def message(lab, *bindings: str, **options) -> str:
    with pytest.raises(UserError) as error:
        lab.load(*bindings, **options)
    return str(error.value)


MISTAKES = {
    "an unknown module": (
        "from lab import layrs",
        "recipe.gin:2: there is no module lab.layrs (no 'layrs' in lab); did you mean 'layers'?",
    ),
    "an unknown package": (
        "import labb.layers",
        "recipe.gin:2: there is no module labb.layers; did you mean 'lab'?",
    ),
    "a word that is not imported": (
        "laiers.Mlp.hidden = 3",
        "recipe.gin:2: laiers.Mlp.hidden: 'laiers' of 'laiers.Mlp' is not imported; did you mean 'layers'?",
    ),
    "one word for two modules": (
        "from lab import mesh as layers",
        "recipe.gin:2: `from lab import mesh as layers` gives 'layers' a second meaning, after "
        "`from lab import layers` at gin/recipes/base.gin:3; rename one with `as`",
    ),
    "an unknown configurable": (
        "layers.Mpl.hidden = 3",
        "recipe.gin:2: layers.Mpl.hidden: module lab.layers has no 'Mpl'; did you mean 'Mlp'?",
    ),
    "an unknown reference": (
        "layers.Block.mlp = @layers.Moa",
        "recipe.gin:2: @layers.Moa: module lab.layers has no 'Moa'; did you mean 'Moe'?",
    ),
    "an unknown parameter": (
        "layers.Mlp.hiden = 3",
        "recipe.gin:2: layers.Mlp.hiden: layers.Mlp has no parameter 'hiden'; did you mean 'hidden'?",
    ),
    "a function left out": (
        "train.steps = 3",
        "recipe.gin:2: train.steps: train is a module, not a class or function; did you mean 'train.train.steps'?",
    ),
    "a constant as a function": (
        "layers.Block.mlp = @layers.WIDTH",
        "recipe.gin:2: @layers.WIDTH is 64, not a class or function",
    ),
    "an unknown constant": (
        "layers.Mlp.hidden = %layers.WIDHT",
        "recipe.gin:2: %layers.WIDHT: module lab.layers has no 'WIDHT'; did you mean 'WIDTH'?",
    ),
    "an undefined macro": (
        "layers.Mlp.hidden = %TRAIN_STEP",
        "recipe.gin:2: layers.Mlp.hidden: no macro TRAIN_STEP is defined; did you mean 'TRAIN_STEPS'?",
    ),
    "an unused macro": (
        "TRAIN_STPES = 3",
        "recipe.gin:2: nothing uses the macro TRAIN_STPES; did you mean 'TRAIN_STEPS'?",
    ),
    "an unused binding": (
        "layers.Moe.experts = 3",
        "recipe.gin:2: layers.Moe.experts has no effect: nothing in use refers to @layers.Moe; "
        "remove it, or refer to it",
    ),
    "an unopened scope": (
        "layers.Block.mlp = @wide/layers.Mlp\nwied/layers.Mlp.hidden = 3",
        "recipe.gin:3: wied/layers.Mlp.hidden has no effect: no reference opens the scope 'wied'; did you mean 'wide'?",
    ),
    "macros that need each other": (
        "TRAIN_STEPS = %A\nA = %B\nB = [%A]",
        "recipe.gin:4: B: the macro A needs its own value",
    ),
    "a call that needs itself": (
        "layers.Mlp.activation = @layers.Mlp()",
        "recipe.gin:2: @layers.Mlp() needs its own value",
    ),
    "a required parameter": (
        "train.train.layout = @layers.Block()\nlayers.Block.mlp = %gin.REQUIRED",
        "missing, give each in the recipe or by its flag:\n    --gin.layers.Block.mlp=...  (recipe.gin:3)",
    ),
    "a bare word": (
        "TRAIN_STEPS = many",
        "recipe.gin:2: cannot read `TRAIN_STEPS = many`: many is not a value: write 'many' for text, "
        "%many for a macro, @many for a reference",
    ),
    "an open bracket": ("TRAIN_STEPS = [1,", "recipe.gin:"),
    "an unknown include": (
        "include 'recipes/bass.gin'",
        "recipe.gin:2: found no gin file 'recipes/bass.gin' (looked in ",
    ),
    "a layout that does not exist": (
        "LAYOUT = 'fdsp'",
        "recipe.gin:2: found no gin file 'fdsp' (looked in ",
    ),
    "a layout that is no name": ("LAYOUT = 3", "recipe.gin:2: LAYOUT must be a layout's name or file, not 3"),
}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("framework.training.optimizers", "framework.optimizers.optimizers"),
        ("launch.eval", "launch.evaluate"),
        ("launch.inspect", "launch.inspection"),
        ("launch.bench_moe", "launch.bench.moe"),
        ("launch.data_stages", "launch.bench.stages"),
        ("launch.rounds", "launch.bench.rounds"),
        ("models.moe", "models.layers.moe"),  # launch/bench/moe.py is of another folder
    ],
)
def test_a_module_of_ours_that_moved_is_named_with_its_new_place(lab, before, now):
    parent, _, name = f"meshway.{before}".rpartition(".")
    text = message(lab, recipe=f"{INCLUDE}from {parent} import {name}\n")
    assert text.endswith(f"there is no module meshway.{before} (no {name!r} in {parent}); it is now meshway.{now}")


def test_a_binding_by_the_name_before_says_what_it_is_now(lab):
    assert message(lab, "eval.evaluate.watch=True").endswith("is not imported; it is now meshway.launch.evaluate")


def test_a_recipe_of_an_older_run_is_told_all_that_moved_at_once(lab):
    imports = """
        from meshway.framework import evaluation
        from meshway.framework.training import optimizers
        from meshway.models import t5
        from meshway.models.layers import relative
        from meshway.models.language import t5
    """
    text = message(lab, recipe=f"{INCLUDE}{textwrap.dedent(imports)}t5.T5.d_model = 3\n")
    assert text == (
        "4 modules of meshway have moved since the recipe was written; write:"
        "\n    recipe.gin:3: `from meshway.framework.evaluation import evaluation`, "
        "not `from meshway.framework import evaluation`"
        "\n    recipe.gin:4: `from meshway.framework.optimizers import optimizers`, "
        "not `from meshway.framework.training import optimizers`"
        "\n    recipe.gin:5: `from meshway.models.language import t5`, not `from meshway.models import t5`"
        "\n    recipe.gin:6: `from meshway.models.layers import positions as relative`, "
        "not `from meshway.models.layers import relative`"
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_message(lab, mistake):
    line, expected = MISTAKES[mistake]
    text = message(lab, recipe=f"{INCLUDE}{line}\n")
    assert text.startswith(expected)


def test_near_names_of_files_are_offered(lab):
    assert message(lab, gin_files=["bas"]).endswith("; did you mean 'base'?")
    assert message(lab, "LAYOUT=fsd").endswith("; did you mean 'fsdp'?")
    assert "'small' is the name of several shipped files: models/lm/small, models/t5/small" in message(
        lab, recipe="include 'small'"
    )


def test_all_problems_come_in_one_message(lab):
    text = message(lab, "TRAIN_STPES=3", recipe=f"{INCLUDE}layers.Mlp.hiden = 3\nlayers.Block.heds = 3\n")
    assert text.startswith("3 problems:\n  recipe.gin:2: layers.Mlp.hiden")
    assert "\n  recipe.gin:3: layers.Block.heds" in text
    assert "\n  --gin.TRAIN_STPES: nothing uses the macro TRAIN_STPES; did you mean 'TRAIN_STEPS'?" in text


def test_a_broken_reference_is_not_blamed_on_what_hangs_on_it(lab):
    text = message(lab, "MODEL=@model.Modle()")
    assert text == "--gin.MODEL: @model.Modle: module lab.model has no 'Modle'; did you mean 'Model'?"


def test_what_hangs_on_a_misspelt_macro_is_not_blamed(lab):
    recipe = lab.folder.joinpath("gin/recipes/base.gin").read_text().replace("MODEL = ", "MODLE = ")
    assert message(lab, recipe=recipe).splitlines()[:2] == [
        "2 problems:",
        "  recipe.gin:7: nothing uses the macro MODLE; did you mean 'MODEL' or 'MODEL_DIR'?",
    ]


def test_what_hangs_on_a_misspelt_class_is_not_blamed(lab):
    recipe = lab.folder.joinpath("gin/recipes/base.gin").read_text().replace("[@layers.Block]", "[@layers.Blck]")
    assert message(lab, recipe=recipe) == (
        "recipe.gin:8: @layers.Blck: module lab.layers has no 'Blck'; did you mean 'Block'?"
    )


def test_parameters_are_those_of_the_constructor_whatever_the_metaclass(lab):
    lab.write("lab/mesh.py", META)
    text = message(lab, "mesh.MeshShape.icy=3")
    assert text == "--gin.mesh.MeshShape.icy: mesh.MeshShape has no parameter 'icy'; did you mean 'ici'?"


META = """
    class Meta(type):
        def __call__(cls, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class MeshShape(metaclass=Meta):
        def __init__(self, ici):
            self.ici = ici
"""


def test_missing_values_are_listed_at_once_with_their_flags(lab):
    recipe = f"{INCLUDE}TRAIN_STEPS = %gin.REQUIRED\nlayers.Mlp.hidden = %gin.REQUIRED"
    text = message(lab, "MODEL_DIR=%gin.REQUIRED", recipe=recipe)
    assert text.splitlines() == [
        "missing, give each in the recipe or by its flag:",
        "    --gin.layers.Mlp.hidden=...  (recipe.gin:3)",
        "    --gin.TRAIN_STEPS=...  the step at which training ends  (recipe.gin:2)",
        "    --gin.MODEL_DIR=...  the run directory: logs, checkpoints, report  (--gin.MODEL_DIR)",
    ]


def test_a_value_that_another_verb_requires_is_not_asked_for(lab):
    lab.load(verb="inspect", recipe=f"{INCLUDE}TRAIN_STEPS = %gin.REQUIRED")


def test_a_call_that_lacks_arguments_names_their_flags(lab):
    recipe = "from lab import layers\nfrom lab import model\nMODEL = @model.Model()\n"
    text = message(lab, "TRAIN_STEPS=@layers.Mlp()", recipe=recipe)
    assert text == "--gin.TRAIN_STEPS: @layers.Mlp() needs hidden, which nothing binds: --gin.layers.Mlp.hidden=..."


def test_replacing_a_part_does_not_blame_what_an_included_file_bound_for_it(lab):
    loaded = lab.load(recipe=f"{INCLUDE}layers.Block.mlp = @layers.Moe")
    assert loaded.build("train.train")["model"].blocks[0].mlp.experts == 2
    assert "layers.Mlp.hidden" not in loaded.resolved


def test_binding_a_part_after_it_was_replaced_is_an_error(lab):
    text = message(lab, "layers.Block.mlp=@layers.Moe", "layers.Mlp.hidden=3")
    assert text.startswith("--gin.layers.Mlp.hidden has no effect")


def test_any_other_name_is_taken_where_the_code_takes_any(lab):
    loaded = lab.load("layers.Block.mlp=@layers.Moe", "layers.Moe.capacity=1.5")
    assert loaded.build("train.train")["model"].blocks[0].mlp.options == {"capacity": 1.5}


def test_bindings_for_other_verbs_are_no_problem(lab):
    recipe = f"{INCLUDE}from lab.verbs import inspection\ninspection.inspect.model = 3\n"
    lab.load(recipe=recipe)
    lab.load("MODEL_DIR=/tmp/run", "TRAIN_STEPS=3", verb="inspect", recipe=INCLUDE)


def test_a_module_that_needs_what_is_not_installed_says_so(lab):
    lab.write("lab/broken.py", "import not_installed_anywhere\n")
    text = message(lab, recipe=f"{INCLUDE}from lab import broken")
    assert text == ("recipe.gin:2: module lab.broken cannot be imported: No module named 'not_installed_anywhere'")
