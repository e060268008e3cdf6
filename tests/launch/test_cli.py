"""The command line: what it understands, what it refuses, and how it ends."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from running import python_after

from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.telemetry.profiler import Profile
from meshway.launch import cli
from meshway.launch.cluster import options
from meshway.launch.flags import non_negative_int, not_negative, positive_int, share, some_text
from meshway.launch.invocation import MACROS


@pytest.fixture
def verb(monkeypatch):
    """Stands in for a verb's module; `run` does what the test says."""
    module = types.ModuleType("meshway_test_verb")
    module.seen = []
    module.run = module.seen.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.VERBS, "train", dataclasses.replace(cli.VERBS["train"], module=module.__name__))
    return module


def test_a_command_becomes_an_invocation(verb):
    words = ["train", "--gin_file", "a.gin", "--gin_file=b.gin", "--gin.MODEL_DIR=/x=y", "--gin.a/b.C.d=3"]
    words += [
        "--gin_search_paths=p,q",
        "--gin_search_paths",
        "r",
        "--dry_run",
        "--num_processes=2",
        "--process_id=0",
    ]
    assert cli.main([*words, "--coordinator_address=h:1", "--simulated_devices", "8"]) == 0
    (invocation,) = verb.seen
    assert invocation.gin_files == ("a.gin", "b.gin")
    assert invocation.bindings == ("MODEL_DIR=/x=y", "a/b.C.d=3")
    assert invocation.search_paths == ("p", "q", "r")
    assert (invocation.dry_run, invocation.num_processes, invocation.process_id) == (True, 2, 0)
    assert (invocation.coordinator_address, invocation.simulated_devices) == ("h:1", 8)
    assert vars(invocation).keys() <= set(invocation.__dataclass_fields__)


def test_a_subject_follows_its_verb():
    assert cli.parse(["bench", "train", "--gin_file=a"]).subject == "train"


def test_a_switch_is_a_binding():
    words = ["bench", "train", "--interleave", "--gin_file=a", "--gin.SEED=1"]
    assert cli.parse(words).bindings == ("SEED=1", "bench.train.measure.interleave=True")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'?"),
        (["train"], "meshway train needs a recipe: --gin_file=FILE"),
        (["train", "--gin_fil=a"], "unknown flag --gin_fil; did you mean '--gin_file'?"),
        (["train", "--model_dir=a"], "unknown flag --model_dir; did you mean --gin.MODEL_DIR=...?"),
        (["train", "--gin.MODEL_DIR", "a"], "--gin.MODEL_DIR has no value"),
        (["train", "a.gin"], "takes no argument 'a.gin'; a recipe is given as --gin_file=a.gin"),
        (["train", "--gin_file=a", "--process_id=x"], "argument --process_id: 'x' is not a whole number"),
        (["cache", "--task=a", "--workers=0"], "argument --workers: '0' is not a whole number of at least 1"),
        (["cache", "--task=a", "--num_shards=0"], "argument --num_shards: '0' is not a whole number of at least 1"),
        (["cache", "--task=a", "--max_bad_examples=-1"], "argument --max_bad_examples: '-1' is not a whole number"),
        (
            ["infer", "--model_dir=a", "--batch_size=0"],
            "argument --batch_size: '0' is not a whole number",
        ),
        (["infer", "--model_dir=a", "--beams=0"], "argument --beams: '0' is not a whole number of at least 1"),
        (["infer", "--model_dir=a", "--top_p=nan"], "argument --top_p: 'nan' is not a number above 0"),
        (["bench", "data", "--gin_file=a", "--batches=0"], "argument --batches: '0' is not a whole number of at least"),
        (
            ["serve", "--model_dir=a", "--model_dir=b"],
            "--model_dir takes one value, and is given two: a and b (see meshway serve --help)",
        ),
        (
            ["infer", "--model_dir=a", "--batch_size=1", "--batch_size=2"],
            "--batch_size takes one value, and is given two",
        ),
        (["inspect", "--gin_file=a", "--dry_run"], "unknown flag --dry_run"),
        (["bench", "--gin_file=a"], "the following arguments are required: subject"),
        (["bench", "plan", "--gin_file=a"], "--gin_file is a flag of"),
        (["bench", "plan", "--gin.SEED=1"], "meshway bench plan takes no recipe: leave out --gin.SEED=1"),
        (["bench", "trian", "--gin_file=a"], "invalid choice: 'trian'"),
    ],
)
def test_a_wrong_command_exits_2_with_a_message(capsys, words, expected):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("meshway: error: ") and expected in error
    assert "Traceback" not in error


NUMBERS = {
    positive_int: ["0", "-1", "x", "1.5", ""],
    non_negative_int: ["-1", "x", ""],
    not_negative: ["-1", "x", "inf"],
}
NUMBERS |= {share: ["0", "-1", "2", "x", "nan"], some_text: [""]}
NEEDED = {"convert": ["--from=a", "--to=b"], "status": ["a"]}  # what a verb needs before its flags are looked at


def impossible():
    """Every flag of every verb and kind of launch that takes a number, a text or one of several words -> what it cannot
    be."""
    for name in sorted(cli.VERBS.keys() - {"launch"}):  # a set: workers must collect the same order
        parser, children = cli.parsers(name)
        for subject, each in (children or {"": parser}).items():
            words = [word for word in (name, subject) if word] + NEEDED.get(name, ["--gin_file=quickstart"])
            yield from impossible_of(each, words)
    for name, parser in options.parsers()[1].items():
        yield from impossible_of(parser, ["launch", name])


def impossible_of(parser, words):
    for action in parser._actions:
        if action.type in NUMBERS or isinstance(action.type, functools.partial):
            yield words, action.option_strings[0], NUMBERS.get(action.type, ["x", "", "JSONL"])


@pytest.mark.parametrize(
    ("words", "flag", "values"),
    list(impossible()),
    ids=lambda each: each if isinstance(each, str) else "_".join(each)[:40],
)
def test_no_flag_takes_what_it_cannot_mean(words, flag, values, capsys, verbs_untouched):
    """Each value ends in one message that names the flag as it was typed; nothing of the verb is imported."""
    for value in values:
        assert cli.main([*words, f"{flag}={value}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("meshway: error: ") and error.count("\n") == 1, error
        assert f"argument {flag}: " in error and repr(value) in error, error


def test_the_audit_of_flags_finds_them():
    flags = {(words[0], flag) for words, flag, _ in impossible()}
    assert len(flags) > 40 and {("infer", "--top_p"), ("cache", "--workers"), ("launch", "--restarts")} <= flags


@pytest.fixture
def verbs_untouched(monkeypatch):
    """No verb may be run."""

    def imported(name, *_):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(cli.importlib, "import_module", imported)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["eval", "--gin_file=quickstart", "--model_dir=x", "--steps=1,x"], "--steps=1,x"),
        (["eval", "--gin_file=quickstart", "--model_dir=x", "--steps=x"], "--steps=x"),
        (["bench", "parallel", "--gin_file=bench_t5", "--layouts=fspd"], "fspd"),
        (["cache", "--task=a", "--module=math", "--gin.cache.cache.workers=0"], "--gin.cache.cache.workers"),
        (["cache", "--task=a", "--module=math", "--gin.cache.cache.num_shards=0"], "--gin.cache.cache.num_shards"),
        (["cache", "--task=a", "--gin.cache.cache.max_bad_examples=-1"], "--gin.cache.cache.max_bad_examples"),
        (
            ["bench", "data", "--gin_file=quickstart", "--gin.bench.data.measure.batches=0"],
            "--gin.bench.data.measure.batches",
        ),
        (["inspect", "--gin_file=bench_t5", "--hardware=abacus"], "--hardware"),
    ],
)
def test_a_value_that_is_read_later_is_named_as_it_was_typed(words, flag, capsys):
    assert cli.main(words) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meshway: error: ")]
    assert flag in message and "num_workers" not in message, message


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("wrong"), 2), (EnvironmentFailure("gone"), 1), (KeyboardInterrupt(), 130)]
)
def test_an_error_of_the_run_becomes_an_exit_code(verb, monkeypatch, capsys, error, code):
    def run(invocation):
        raise error

    verb.run = run
    assert cli.main(["train", "--gin_file=a"]) == code
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("MESHWAY_TRACEBACK", "1")
    assert cli.main(["train", "--gin_file=a"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_a_bug_keeps_its_traceback(verb):
    verb.run = lambda invocation: {}["bug"]
    with pytest.raises(KeyError):
        cli.main(["train", "--gin_file=a"])


def test_the_help_of_a_verb_explains_every_flag_and_macro(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for word in [
        "--gin_file",
        "--gin.NAME=VALUE",
        "--gin_search_paths",
        "--dry_run",
        "--process_id",
        *MACROS,
    ]:
        assert word in text
    assert cli.main([]) == 0
    assert all(name in capsys.readouterr().out for name in ["verbs:"])


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["bench", "--help"]])
def test_help_imports_neither_jax_nor_gin_nor_numpy(words):
    loaded = python_after(f"from meshway.launch import cli; cli.main({words!r})")
    assert not {"jax", "gin", "numpy", "tensorflow"} & loaded


def test_a_folder_named_gin_is_not_taken_for_the_library(tmp_path):
    (tmp_path / "gin").mkdir()
    (tmp_path / "meshway").mkdir()
    for folder in ("framework", "launch"):  # without site-packages there is no installed meshway either
        (tmp_path / "meshway" / folder).symlink_to(Path(__file__).parent.parent.parent / folder)
    program = "import meshway.launch.recipe.text"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert "pip install gin-config" in shown.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--gin_file=quickstart", "--dry_run", "--gin.MODEL_DIR=s3://bucket/run"],
        ["train", "--gin_file=quickstart", "--dry_run", "--gin.MODEL_DIR=x", "--gin.CACHE_DIR=s3://bucket/cache"],
        ["train", "--gin_file=s3://bucket/recipe.gin"],
        ["train", "--gin_file=quickstart", "--gin_search_paths=gs://bucket/gin"],
        ["train", "--gin_file=quickstart", "--gin.MODEL_DIR=x", "--gin.LAYOUT=gs://bucket/layout.gin"],
        ["train", "--gin_file=quickstart", "--gin_file=initial/upcycle.gin", "--gin.MODEL_DIR=x", "--dry_run",
         "--gin.UPCYCLE_FROM=gs://bucket/dense"],
        ["eval", "--model_dir=s3://bucket/run"],
        ["infer", "--model_dir=hdfs://host/run", "--input=a.jsonl", "--output=b.jsonl"],
        ["convert", "--from=s3://bucket/llama", "--to=run"],
        ["convert", "--from=llama", "--to=file:///run"],
        ["cache", "--task=a", "--module=math", "--directory=gs://bucket/cache"],
        ["inspect", "data", "--gin_file=quickstart", "--html=https://host/data.html"],
        pytest.param(["launch", "slurm", "--nodes=1", "--output=gs://bucket/job.sbatch", "--",
                      "train", "--gin_file=quickstart", "--gin.MODEL_DIR=/x"], marks=pytest.mark.slow),
        ["launch", "slurm", "--nodes=1", "--", "train", "--gin_file=quickstart", "--gin.MODEL_DIR=s3://bucket/run"],
        ["launch", "local", "--processes=1", "--log_dir=gs://bucket/logs", "--", "train", "--gin_file=quickstart",
         "--gin.MODEL_DIR=x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_path_may_be_the_address_of_a_bucket(capsys, words, tmp_path, monkeypatch):
    """`gs://bucket/run` once became a folder `gs:` here."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meshway: error: ")]
    assert "is not a local path" in message, message
    for flag in re.findall(r"--[\w.]+", message):
        assert any(word.startswith(f"{flag}=") for word in words), f"{flag} was not written: {message}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [Initial, Profile])
def test_what_takes_a_path_later_refuses_an_address_when_it_is_made(make):
    with pytest.raises(UserError, match="gs://bucket/run is not a local path"):
        make("gs://bucket/run")


@pytest.mark.parametrize("verb", ["train", "eval", "infer", "cache", "convert"])
def test_a_command_says_what_it_does_before_its_imports(capfd, tmp_path, monkeypatch, verb):
    (tmp_path / "takes_seconds.py").write_text(
        "import sys\nprint('imported', file=sys.stderr)\ndef run(invocation): return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "takes_seconds", raising=False)
    monkeypatch.setitem(cli.VERBS, verb, dataclasses.replace(cli.VERBS[verb], module="takes_seconds"))
    words = ["--from=x", "--to=y"] if verb == "convert" else ["--gin_file=my.gin"]
    assert cli.main([verb, *words]) == 7
    assert capfd.readouterr().err == f"meshway {verb}: importing what it needs ...\nimported\n"


def test_a_process_ends_without_a_search_for_cycles_and_loses_nothing(tmp_path):
    code = f"""if True:
        import atexit, sys
        sys.argv = ["meshway", "--version"]
        from meshway.launch import cli
        class Owner:
            def __init__(self, path):
                self.me, self.file = self, open(path, "w")  # only a search for cycles would close it
                self.file.write("held back")
            def __del__(self):
                print("searched")
        owner = Owner({str(tmp_path / "text")!r})
        atexit.register(lambda: print("asked to end"))
        sys.exit(cli.main() + 5)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and not done.stderr, done.stderr
    assert (tmp_path / "text").read_text() == "held back"
    assert done.stdout.endswith("asked to end\n"), "the ends that others asked for come first, and no search does"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (["status", "{run}"], {141}),
        (["status", "{run}", "--json"], {141}),
        (["--help"], {141}),
        (["infer", "--help"], {0, 141}),  # argparse may pass over it
        (["--version"], {141}),
        (["status", "{run}/nowhere"], {2}),  # says so on standard error, which nobody reads either
    ],
)
def test_a_reader_that_has_gone_is_no_error(tmp_path, words, codes, unbuffered):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    command = [sys.executable, "-m", "meshway.launch.cli", *(word.format(run=tmp_path) for word in words)]
    reader, writer = os.pipe()
    os.close(reader)
    errors, kept = (writer, None) if codes == {2} else (subprocess.PIPE, "")
    process = subprocess.Popen(
        command, stdout=writer, stderr=errors, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}
    )
    os.close(writer)
    assert process.communicate(timeout=60)[1] == kept and process.returncode in codes


def test_a_broken_pipe_of_another_kind_keeps_its_traceback(verb):
    def run(invocation):
        raise BrokenPipeError("a worker's")

    verb.run = run
    with pytest.raises(BrokenPipeError):
        cli.main(["train", "--gin_file=a"])
