"""`meshway cache`: from its flags to the files, by a recipe or without one."""

import zlib

import pytest
from running import LAB, python_after

from meshway.framework.data.cache import builder, workers
from meshway.framework.data.cache.builder import BuiltSplit
from meshway.framework.data.cache.format import CachedSplit
from meshway.launch import cache, cli
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config


@pytest.fixture(autouse=True)
def in_the_lab(monkeypatch, tmp_path):
    monkeypatch.chdir(LAB)
    monkeypatch.syspath_prepend(str(LAB))
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))


def test_flags_are_short_words_for_bindings():
    words = "--task=a_b --module=x.y --directory=/z --splits=train,validation --num_shards=4 --workers 2 --overwrite"
    invocation = cli.parse(["cache", *words.split(), "--max_bad_examples=3", "--gin.SEED=1"])
    assert invocation.gin_files == ()
    assert invocation.bindings == (
        "SEED=1",
        "MIXTURE_OR_TASK_NAME='a_b'",
        "MIXTURE_OR_TASK_MODULE='x.y'",
        "CACHE_DIR='/z'",
        "cache.cache.splits='train,validation'",
        "cache.cache.num_shards=4",
        "cache.cache.workers=2",
        "cache.cache.overwrite=True",
        "cache.cache.max_bad_examples=3",
    )


def test_help_lists_the_flags_and_what_they_do_not_share_with_training(capsys):
    assert cli.main(["cache", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("(--gin_file=FILE | --task=...)", "--task NAME", "--max_bad_examples N", "CACHE_DIR", "--overwrite"):
        assert word in text
    assert "--simulated_devices" not in text and "TRAIN_STEPS" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "needs a recipe: --gin_file=FILE, as --gin_file=recipes/quickstart.gin; or --task=NAME"),
        (["--module=tasks.topics"], "or --task=NAME"),
        (["--task=lab_lines", "--num_shards=few"], "argument --num_shards: 'few' is not a whole number"),
        (["--task=lab_lines", "--simulated_devices=2"], "unknown flag --simulated_devices"),
        (["--tsk=lab_lines"], "unknown flag --tsk; did you mean '--task'"),
        (["--task=lab_lines", "--module=tasks.topic"], "module 'tasks.topic', which should register the tasks"),
        (["--task=lab_line", "--module=tasks.topics"], "did you mean 'lab_lines'"),
        (["--task=lab_lines", "--module=tasks.topics", "--splits=trian"], "did you mean 'train'?"),
        (
            ["--task=lab_lines", "--module=tasks.topics", "--num_shards=0"],
            "argument --num_shards: '0' is not a whole number of at least 1",
        ),
        (["--task=lab_lines", "--gin.cache.cache.shards=3"], "shards"),
        (["--task=lab_lines", "--module=tasks.topics", "--directory=t5.gin"], "cannot write t5.gin/lab_lines: Not a"),
    ],
)
def test_mistakes_are_told(capsys, words, expected):
    assert cli.main(["cache", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_task_is_cached_without_a_recipe(capsys, tmp_path):
    words = ["cache", "--task=lab_lines", "--module=tasks.topics", "--num_shards=2", "--splits=validation"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "lab_lines  validation        64" in said and f"cached in {tmp_path / 'tasks'}" in said
    assert len(CachedSplit(tmp_path / "tasks" / "lab_lines", "validation")) == 64
    assert cli.main([*words[:3], "--num_shards=3"]) == 2
    assert "number of shards changed from 2 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["t5.gin", "bigram.gin"])
def test_a_recipes_task_is_cached(tmp_path, capsys, recipe):
    name = {"t5.gin": "lab_halves", "bigram.gin": "lab_lines"}[recipe]
    assert cli.main(["cache", f"--gin_file={recipe}", "--num_shards=1", f"--directory={tmp_path / 'own'}"]) == 0
    assert len(CachedSplit(tmp_path / "own" / name, "train")) == 768
    assert name in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_a_recipe_s_large_tasks_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache, "PARALLEL", 0)
    assert cli.main(["cache", "--gin_file=t5.gin", "--num_shards=1"]) == 0
    assert "task 'lab_halves': " in (printed := capsys.readouterr().out) and "rows a pass; kept" in printed
    assert cli.main(["cache", "--gin_file=t5.gin", "--gin.TASK_FEATURE_LENGTHS={'inputs': 9}"]) == 0
    assert "rows are not counted yet, the first run will: " in capsys.readouterr().out


def test_bad_examples_and_empty_splits_are_reported(monkeypatch, capsys):
    bad = ["task 'a', split 'train', example 3 of shard 0 of 8: ValueError: no"]
    built = [
        BuiltSplit("a", "train", 9, {"targets": 1200}, 2_000_000, bad, 1.5),
        BuiltSplit("a", "x", 0, {}, 0, [], 0.0),
    ]
    monkeypatch.setattr(cache, "build", lambda *arguments, **options: built)
    cache.cache("a", directory="/d")
    assert capsys.readouterr().out.splitlines() == [
        "task  split  examples  targets tokens   MB  seconds",
        "a     train         9           1,200  2.0      1.5",
        "a     x             0               -  0.0      0.0",
        "bad examples left out: 1, the first: " + bad[0],
        "task 'a', split 'x' has no examples",
        "cached in /d",
    ]


def test_reading_a_recipe_to_cache_its_task_imports_no_jax():
    program = (
        "from meshway.launch import cache, cli; from meshway.launch.recipe import config; "
        "recipe = config.load(cli.parse(['cache', '--gin_file=t5.gin'])); "
        "assert recipe.build('cache.cache')['mixture_or_task_name'] == 'lab_halves'"
    )
    assert not {"jax", "flax", "tensorflow"} & python_after(program)


TASKS = """
import seqio, tensorflow as tf
from meshway.framework.data.features import LanguageModel

class Converter(LanguageModel):
    pass

def texts(split, shuffle_files, seed=None):  # does not say how many there are: several processes cache it
    signature = {"targets": tf.TensorSpec([], tf.string)}
    return tf.data.Dataset.from_generator(lambda: ({"targets": word} for word in "abc"), output_signature=signature)

for name in ("NAME_a", "NAME_b"):
    seqio.TaskRegistry.add(
        name, seqio.FunctionDataSource(texts, splits=["train"]), preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
    )
"""
MIXTURE = "import seqio\nseqio.MixtureRegistry.add('NAME_mix', ['NAME_a', 'NAME_b'], default_rate=1)\n"


@pytest.fixture
def imports(tmp_path, monkeypatch, request):
    """(a recipe that registers its tasks by importing two modules, one of which it also refers to; their names)"""
    name = f"lab_{zlib.crc32(request.node.name.encode())}"
    modules = [f"{name}_tasks", f"{name}_mixture"]  # the second needs the first
    for module, text in zip(modules, (TASKS, MIXTURE)):
        (tmp_path / f"{module}.py").write_text(text.replace("NAME", name))
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tmp_path / "mine.gin"
    recipe.write_text(
        f"from __gin__ import dynamic_registration\nimport {modules[0]}\nimport {modules[1]}\n"
        f"include 'data/cached.gin'\nFEATURE_CONVERTER = @{modules[0]}.Converter()\n"
        f"MIXTURE_OR_TASK_NAME = '{name}_mix'\nBATCH_SIZE = 2\nTASK_FEATURE_LENGTHS = {{'targets': 4}}\n"
    )
    return recipe, modules


def source_of(recipe):
    return config.load(Invocation("inspect", "data", (str(recipe),))).build("inspection.data")["source"]


def test_processes_that_write_caches_are_told_what_the_recipe_imports(imports, monkeypatch):
    recipe, modules = imports
    found = []
    monkeypatch.setattr(cache, "cache", lambda **given: found.append(given) or [])
    cache.run(Invocation("cache", None, (str(recipe),)))
    assert found[0]["imported"] == modules == source_of(recipe).modules
    resolved = config.load(Invocation("inspect", "data", (str(recipe),))).resolved
    assert [line for line in resolved.splitlines() if "lab_" in line][:2] == [f"import {each}" for each in modules]


@pytest.mark.slow
def test_a_process_of_a_cache_made_on_first_use_knows_the_recipe_s_tasks(imports, tmp_path, monkeypatch):
    """Those registered by its imports alone, one of which it also refers to; one shard by one process."""

    def first(jobs, num_workers, report):
        assert num_workers > 1, "the task does not say how much there is to do"
        workers.run_jobs(jobs[:1], 2, report)
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "run_jobs", first)
    monkeypatch.setattr(builder.os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        source_of(imports[0]).train(slice(0, 2))
    assert len([*tmp_path.rglob("*.array_record")]) == 1
