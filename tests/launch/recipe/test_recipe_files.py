"""Which files are read, in which order, and what a flag's value means."""

import pytest

from meshway.framework.errors import UserError
from meshway.launch.recipe.files import GinFiles
from meshway.launch.recipe.text import Place, parse_flag


def read(lab, verb: str = "train", **options) -> dict:
    return lab.load(**options).build("train.train")


@pytest.mark.parametrize("name", ["recipes/base.gin", "recipes/base", "base.gin", "base", "gin/recipes/base.gin"])
def test_a_shipped_recipe_is_found_by_every_spelling(lab, name):
    assert read(lab, gin_files=[name])["steps"] == 10


def test_files_are_tried_beside_then_as_given_then_in_search_paths_then_shipped(lab):
    files = GinFiles([str(lab.folder / "extra")] if (lab.folder / "extra").mkdir() is None else [], lab.folder / "gin")
    beside = lab.folder / "beside"
    places = ["gin/part.gin", "extra/part.gin", "part.gin", "beside/part.gin"]
    for place in places:
        lab.write(place, "")
        assert files.find("part.gin", beside, Place("x")) == (lab.folder / place).resolve()


def test_an_include_is_relative_to_its_file(lab):
    lab.write("mine/part.gin", "TRAIN_STEPS = 21")
    path = lab.write("mine/whole.gin", "include 'base'\ninclude 'part.gin'\n")
    assert read(lab, gin_files=[path])["steps"] == 21


def test_the_including_files_folder_comes_before_the_current_one(lab):
    lab.write("mine/part.gin", "TRAIN_STEPS = 21")
    lab.write("part.gin", "TRAIN_STEPS = 22")
    path = lab.write("mine/whole.gin", "include 'base'\ninclude 'part.gin'\n")
    assert read(lab, gin_files=[path])["steps"] == 21


def test_a_shipped_file_includes_shipped_ones_whatever_lies_around(lab):
    lab.write("gin/recipes/inner.gin", "include 'parts/steps.gin'\ninclude 'beside.gin'\n")
    lab.write("gin/parts/steps.gin", "include 'recipes/base.gin'\nTRAIN_STEPS = 21")
    lab.write("gin/recipes/beside.gin", "")
    for folder in ("", "mine/", "extra/"):
        for name in ("parts/steps.gin", "beside.gin", "recipes/base.gin"):
            lab.write(folder + name, "TRAIN_STEPS = 22")
    path = lab.write("mine/whole.gin", "include 'recipes/inner.gin'\n")
    for named in ("inner", "recipes/inner.gin", path):
        assert read(lab, gin_files=[named], search_paths=("extra",))["steps"] == 21


def test_a_verbs_defaults_are_no_recipe(lab):
    path = lab.write("mine/whole.gin", "include 'base'\ninclude 'runs/inspect.gin'\n")
    for given in ("inspect", "runs/train.gin", path):
        said = "mine/whole.gin:2: include 'runs/inspect.gin'" if given == path else f"--gin_file={given}"
        with pytest.raises(UserError, match=f"{said} has the defaults of `meshway .*which reads them by itself"):
            read(lab, gin_files=[given])


def test_a_byte_order_mark_is_no_part_of_a_recipe(lab):
    path = lab.folder / "marked.gin"
    path.write_bytes(b"\xef\xbb\xbfinclude 'base'\nTRAIN_STEPS = 21\n")
    assert read(lab, gin_files=[str(path)])["steps"] == 21


def test_files_that_include_each_other_are_refused(lab):
    lab.write("a.gin", "include 'b.gin'")
    lab.write("b.gin", "include 'a.gin'")
    with pytest.raises(UserError, match="b.gin:1: files include each other: a.gin -> b.gin -> a.gin"):
        lab.load(gin_files=["a.gin"])


def test_a_search_path_may_hold_the_defaults_of_a_verb(lab):
    lab.write("mine/runs/train.gin", lab.folder.joinpath("gin/runs/train.gin").read_text().replace("10", "33"))
    assert read(lab, search_paths=("mine",))["steps"] == 33
    with pytest.raises(UserError, match="--gin_search_paths: nowhere is not a folder"):
        lab.load(search_paths=("nowhere",))


def test_later_files_win_and_the_command_line_wins_over_all(lab):
    one = lab.write("one.gin", "include 'base'\nTRAIN_STEPS = 1")
    two = lab.write("two.gin", "TRAIN_STEPS = 2")
    assert read(lab, gin_files=[one, two])["steps"] == 2
    assert lab.load("TRAIN_STEPS=3", gin_files=[one, two]).build("train.train")["steps"] == 3


def test_the_layout_in_force_comes_before_the_recipe_that_may_adjust_it(lab):
    assert read(lab)["mesh"].ici == {"data": 1}
    assert read(lab, recipe="include 'base'\nLAYOUT = 'fsdp'")["mesh"].ici == {"data": 1, "fsdp": -1}
    adjusted = "include 'base'\nLAYOUT = 'fsdp'\nmesh.MeshShape.ici = {'fsdp': 2}"
    assert read(lab, recipe=adjusted)["mesh"].ici == {"fsdp": 2}


def test_a_layout_of_the_command_line_replaces_the_recipes_whole(lab):
    adjusted = "include 'base'\nLAYOUT = 'fsdp'\nmesh.MeshShape.ici = {'fsdp': 2}"
    assert lab.load("LAYOUT=single", recipe=adjusted).build("train.train")["mesh"].ici == {"data": 1}
    bound = lab.load("mesh.MeshShape.ici={'fsdp': 4}", "LAYOUT=fsdp", recipe=adjusted)
    assert bound.build("train.train")["mesh"].ici == {"fsdp": 4}


def test_a_resolved_recipe_takes_another_layout(lab):
    path = lab.write("resolved.gin", lab.load("LAYOUT=fsdp").resolved)
    assert read(lab, gin_files=[path])["mesh"].ici == {"data": 1, "fsdp": -1}
    assert lab.load("LAYOUT=single", gin_files=[path]).build("train.train")["mesh"].ici == {"data": 1}


def test_a_resolved_recipe_does_not_ask_for_the_users_layout_file(lab):
    own = lab.folder.joinpath("gin/layouts/fsdp.gin").read_text().replace("-1", "7")
    lab.write("mine/odd.gin", own)
    path = lab.write("mine/recipe.gin", "include 'base'\nLAYOUT = 'odd.gin'")
    text = lab.load(gin_files=[path]).resolved
    lab.folder.joinpath("mine/odd.gin").unlink()
    again = lab.load(gin_files=[lab.write("resolved.gin", text)])
    assert again.build("train.train")["mesh"].ici == {"data": 1, "fsdp": 7}
    assert again.resolved == text


def test_a_block_binds_as_its_lines_would(lab):
    recipe = "include 'base'\nlayers.Mlp:\n    hidden = 5  # wide\n    activation = 'gelu'\n"
    assert vars(read(lab, recipe=recipe)["model"].blocks[0].mlp) == {"hidden": 5, "activation": "gelu"}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("X=/tmp/x", "/tmp/x"),
        ('X="/tmp/x"', "/tmp/x"),
        ("X='a b'", "a b"),
        ("X=fsdp", "fsdp"),
        ("X=~/runs/t5-small_2", "~/runs/t5-small_2"),
        ("X=../a.gin", "../a.gin"),
        ("X=gs://bucket/run=1", "gs://bucket/run=1"),
        ("a/b.C.x={'inputs': [1, -2.5]}", {"inputs": [1, -2.5]}),
        ("X=1e-3", 1e-3),
        ("X=None", None),
        ("X=True", True),
    ],
)
def test_a_flag_means(flag, value):
    assert parse_flag(flag).value == value


@pytest.mark.parametrize(
    "flag", ["X=10k", "X=a b", "X=[1", "X=", "X=false", "X=Null", "X=3\nY=4", "X==3", "3=4", "X=1 2"]
)
def test_a_flag_that_means_nothing_is_refused_with_its_value(flag):
    with pytest.raises(UserError, match="--gin"):
        parse_flag(flag)


def test_a_python_word_in_the_wrong_case_is_not_text():
    with pytest.raises(UserError, match="--gin.Decoder.scan: false is not a gin value: write False"):
        parse_flag("Decoder.scan=false")
