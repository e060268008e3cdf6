"""Mistakes that users make: each ends in one clear message and exit code 2, never in a traceback."""

import contextlib
import re
import shutil
import subprocess

import pytest
from running import LAB, command, environment
from tiers import tiers

from meshway.framework.errors import EnvironmentFailure, UserError, at_the_end
from meshway.launch import cli

T5 = ("train", "--gin_file=t5.gin")
BIGRAM = ("train", "--gin_file=bigram.gin")
SHORT = ("--gin.TRAIN_STEPS=2", "--gin.EVAL_PERIOD=None", "--gin.CHECKPOINT_PERIOD=1")


@pytest.fixture(autouse=True)
def in_the_lab(monkeypatch):
    monkeypatch.chdir(LAB)
    monkeypatch.syspath_prepend(str(LAB))


def mistake(capsys, *words, exits=2):
    """Runs a command that must fail, as a user's mistake if nothing else is said, and returns its message."""
    capsys.readouterr()
    code = cli.main(list(words))
    errors = capsys.readouterr().err
    assert code == exits, errors
    assert "Traceback" not in errors
    messages = [line for line in errors.splitlines() if line.startswith("meshway: error: ")]
    assert len(messages) == 1, errors
    return errors[errors.index("meshway: error: ") :]


CASES = {
    "misspelt binding": (
        (*T5, "--gin.attention.Attention.num_head=8", "--gin.MODEL_DIR={dir}"),
        ["--gin.attention.Attention.num_head", "did you mean 'num_heads'"],
    ),
    "unused macro": ((*T5, "--gin.DROPOUT=0.1", "--gin.MODEL_DIR={dir}"), ["DROPOUT", "DROPOUT_RATE"]),
    "missing MODEL_DIR": (T5, ["--gin.MODEL_DIR=", "the run directory"]),
    "unknown recipe": (
        ("train", "--gin_file=recipes/quikstart.gin"),
        ["quikstart", "did you mean 'recipes/quickstart'"],
    ),
    "unknown task": ((*T5, "--gin.MIXTURE_OR_TASK_NAME=lab_halfs", "--gin.MODEL_DIR={dir}"), ["lab_halves"]),
    "unknown task to evaluate": (
        ("eval", "--gin_file=t5.gin", "--task=lab_halfs", "--model_dir={dir}", "--watch", "--idle_timeout=1"),
        ["lab_halfs", "lab_halves"],
    ),
    "feature length missing": (
        (*T5, "--gin.TASK_FEATURE_LENGTHS={'inputs': 64}", "--gin.MODEL_DIR={dir}"),
        ["TASK_FEATURE_LENGTHS", "'targets'"],
    ),
    "an axis of a Linen parameter is missing": (
        ("train", "--gin_file=linen.gin", "--gin.linen_lm.Boxed.names=('embed',)", "--gin.MODEL_DIR={dir}"),
        ["parameters of Boxed need a logical axis name", "wi/kernel of shape [16, 32] has ('embed',)", "param_axes"],
    ),
    "batch not divisible": (
        (*T5, "--gin.BATCH_SIZE=12", "--gin.LAYOUT=data", "--gin.MODEL_DIR={dir}"),
        ["size 12", "data=8", "BATCH_SIZE to a multiple of 8"],
    ),
    "mesh larger than the devices": (
        (*T5, "--gin.mesh.MeshShape.ici={'data': 16}", "--gin.MODEL_DIR={dir}"),
        ["16 devices", "there are 8", "--simulated_devices=16"],
    ),
    "heads not divisible": (
        (*T5, "--gin.NUM_HEADS=3", "--gin.LAYOUT=model_1d", "--gin.MODEL_DIR={dir}"),
        ["heads' of size 3", "model=2"],
    ),
    "unmapped axis in a user's model": (
        (*BIGRAM, "--gin.LAYOUT=fsdp", "--gin.MODEL_DIR={dir}"),
        ["'codes'", "no rule of Layout", "('codes', None)"],
    ),
    "rule that never matches": (
        (
            *BIGRAM,
            "--gin.MODEL_DIR={dir}",
            "--gin.partitioner.Layout.parameters=[('codes', 'codes'), ('vocab', None), ('embd', 'data')]",
        ),
        ["match no axis", "'embd'", "'embed'"],
    ),
    "vocabulary larger than the model's": (
        (*T5, "--gin.VOCAB_SIZE=128", "--gin.MODEL_DIR={dir}"),
        ["128", "vocabulary", "VOCAB_SIZE"],
    ),
    "unknown split": (
        (*T5, "--gin.grain_loader.CachedData.train_split=trian", "--gin.MODEL_DIR={dir}"),
        ["no split 'trian' for training", "did you mean 'train'"],
    ),
    "converter of another model": (
        (*T5, "--gin.FEATURE_CONVERTER=@features.PrefixLanguageModel()", "--gin.MODEL_DIR={dir}"),
        ["the data's features do not fit the model", "FEATURE_CONVERTER"],
    ),
    "parameters from nowhere": (
        (*T5, "--gin_file=initial/upcycle.gin", "--gin.UPCYCLE_FROM=nowhere", "--gin.MODEL_DIR={dir}"),
        ["Initial.path: nowhere is neither a run directory"],
    ),
    "relative steps without a step": (
        (*T5, "--gin.TRAIN_STEPS_RELATIVE=5", "--gin.MODEL_DIR={dir}"),
        ["TRAIN_STEPS_RELATIVE=5 counts from the step", "INITIAL_CHECKPOINT_PATH"],
    ),
    "batches of a stream that change their size": (
        (*T5, "--gin_file=data/streamed.gin", "--gin.BATCH_SIZE_SCHEDULE=[(2, 8)]", "--gin.MODEL_DIR={dir}"),
        ["BATCH_SIZE_SCHEDULE", "counts batches, not examples", "use cached data"],
    ),
    "module that is not there": (
        (*T5, "--gin.MIXTURE_OR_TASK_MODULE=tasks.topic", "--gin.MODEL_DIR={dir}"),
        ["tasks.topic"],
    ),
    "non-finite loss": (
        (
            *T5,
            "--gin.MODEL_DIR={dir}",
            "--gin.LEARNING_RATE=1e30",
            "--gin.train.train.max_skipped_in_a_row=2",
            *SHORT[1:],
        ),
        ["not finite", "max_skipped_in_a_row=2", "learning rate"],
    ),
    "unknown layout": ((*T5, "--gin.LAYOUT=fdsp", "--gin.MODEL_DIR={dir}"), ["fdsp", "fsdp"]),
    "several processes half told": ((*T5, "--num_processes=2", "--gin.MODEL_DIR={dir}"), ["--coordinator_address"]),
    "unknown verb": (("trian",), ["train"]),
}


LATE = ("non-finite loss", "converter of another model")  # a model is compiled
NOT_IN_A_DRY_RUN = ("missing MODEL_DIR", "non-finite loss", "unknown task to evaluate", "unknown verb")


@pytest.mark.parametrize("case", tiers(CASES, quick=[case for case in CASES if case not in LATE], slow=LATE))
def test_a_mistake_is_answered(case, capsys, tmp_path):
    """And a dry run answers it in the same words, and writes nothing."""
    words, expected = CASES[case]
    words = [word.replace("{dir}", str(tmp_path / "run")) for word in words]
    if case not in NOT_IN_A_DRY_RUN:
        found = mistake(capsys, *words, "--dry_run")
        assert not list(tmp_path.iterdir())
    message = mistake(capsys, *words)
    missing = [part for part in expected if part not in message]
    assert not missing, f"{missing} not in: {message}"
    assert case in NOT_IN_A_DRY_RUN or found == message


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run of two steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("short")
    words = command(*T5, *SHORT, f"--gin.MODEL_DIR={folder}", "--gin.LAYOUT=single")
    done = subprocess.run(words, cwd=LAB, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def resume(folder, *more):
    return (*T5, *SHORT[1:], "--gin.TRAIN_STEPS=4", "--gin.LAYOUT=single", f"--gin.MODEL_DIR={folder}", *more)


@pytest.mark.slow
def test_checkpoint_of_another_model(short_run, capsys):
    words = resume(short_run, "--gin.D_FF=256")
    message = mistake(capsys, *words)
    assert mistake(capsys, *words, "--dry_run") == message
    assert "another model" in message and "there and" in message and "config.gin" in message


@pytest.mark.slow
def test_another_optimizer_is_told_how_to_take_the_parameters(short_run, capsys):
    words = resume(short_run, "--gin_file=optimizers/lion.gin")
    message = mistake(capsys, *words)
    assert mistake(capsys, *words, "--dry_run") == message
    assert "another optimizer's state" in message and f"mapping.Initial.path = {str(short_run)!r}" in message


@pytest.mark.slow
def test_a_warmup_of_averages_from_a_step_that_counts_on(short_run, capsys, tmp_path):
    """And a dry run of batches that change their size needs no cache."""
    words = [
        *T5,
        "--gin.LAYOUT=single",
        f"--gin.INITIAL_CHECKPOINT_PATH={short_run}",
        f"--gin.MODEL_DIR={tmp_path}/run",
    ]
    words += ["--gin.TRAIN_STEPS_RELATIVE=2", "--gin.EMA_DECAY=0.9"]
    message = mistake(capsys, *words, "--gin.EMA_WARMUP=True")
    assert mistake(capsys, *words, "--gin.EMA_WARMUP=True", "--dry_run") == message
    assert "EMA_WARMUP counts steps from 0, and this run counts on from step 2" in message
    words += ["--gin.BATCH_SIZE_SCHEDULE=[(3, 8)]", f"--gin.CACHE_DIR={tmp_path}/cache"]
    assert cli.main([*words, "--dry_run"]) == 0
    assert "not cached yet" in capsys.readouterr().out and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_dry_run_says_where_a_run_would_go_on(short_run, capsys):
    """And what it resolved: task, splits, vocabulary, lengths, converter, model, mesh, optimizer."""
    before = {path: path.stat().st_mtime_ns for path in short_run.rglob("*")}
    assert cli.main([*resume(short_run), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert f"{short_run} goes on from its checkpoint 2" in said
    for name, value in {
        "model": "EncoderDecoder",
        "optimizer": "adafactor",
        "mesh": "data=1",
        "data": "CachedData lab_halves",
        "converter": "EncoderDecoder",
        "feature lengths": "inputs 64, targets 64",
        "vocabularies": "inputs and targets: bytes vocabulary of",
    }.items():
        assert re.search(rf"^{name}: +{re.escape(value)}", said, re.MULTILINE), (name, said)
    assert re.search(r"^lab_halves +train +training +[\d,]+ +cached$", said, re.MULTILINE), said
    assert {path: path.stat().st_mtime_ns for path in short_run.rglob("*")} == before


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "half a file": lambda step: largest(step).write_bytes(
        largest(step).read_bytes()[: largest(step).stat().st_size // 2]
    ),
    "an empty file": lambda step: largest(step).write_bytes(b""),
    "a missing file": lambda step: largest(step).unlink(),
    "no recipe": lambda step: shutil.rmtree(step / "recipe"),
    "no data position": lambda step: (step / "data" / "metadata").write_bytes(b'{"batch":'),
    "no manifest": lambda step: [path.unlink() for path in (step / "state").rglob("manifest.ocdbt")],
}


@pytest.mark.parametrize("damage", tiers(DAMAGES, slow=DAMAGES))
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(short_run, capsys, tmp_path, damage):
    """As rsync, cut off, leaves it."""
    folder = tmp_path / "run"
    shutil.copytree(short_run, folder)
    DAMAGES[damage](folder / "checkpoints" / "2")
    words = [*resume(folder), "--gin.TRAIN_STEPS=3"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "checkpoint 2 is truncated or damaged" in captured.out and "going on from step 1" in captured.out
    assert "Traceback" not in captured.err and "Event loop" not in captured.err
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"1", "2", "2.damaged", "3"} <= names
    shutil.rmtree(folder / "checkpoints" / "1")
    for step in ("2", "3"):
        DAMAGES["half a file"](folder / "checkpoints" / step)
    message = mistake(capsys, *words[:-1], "--gin.TRAIN_STEPS=9", exits=1)
    assert "truncated" in message and "There is no other one" in message
    assert "2.damaged" in {path.name for path in (folder / "checkpoints").iterdir()}, "nothing is thrown away"


def test_model_dir_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    words = (*T5, f"--gin.MODEL_DIR={tmp_path / 'file' / 'run'}")
    message = mistake(capsys, *words)
    assert mistake(capsys, *words, "--dry_run") == message
    assert "cannot be written" in message and "--gin.MODEL_DIR" in message


def run_short(*before, folder):
    words = command(*T5, *SHORT, f"--gin.MODEL_DIR={folder}", "--gin.LAYOUT=single")
    return subprocess.run([*before, *words], cwd=LAB, env=environment(), capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def disk_of(size, folder):
    """A real one, where the kernel lets us mount it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system; another test of full disks needs none")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_before_the_run(tmp_path):
    with disk_of("300k", tmp_path / "full") as folder:
        done = run_short(folder=folder / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "free" in done.stderr and "one checkpoint needs" in done.stderr, done.stderr


FILLER = """
class Fill:
    def __init__(self, path, step):
        self.path, self.step = path, step

    def close(self):
        pass

    def after_step(self, step):
        if step == self.step:
            with open(self.path, "wb", buffering=0) as file:
                try:
                    for size in (65536, 512):
                        while file.write(bytes(size)) == size:
                            pass
                except OSError:
                    pass
"""


def test_a_disk_that_fills_in_mid_run_is_told_by_the_file_that_did_not_fit(tmp_path, capsys, monkeypatch):
    """All that is written after it, as the report, fails as well and hides nothing."""
    (tmp_path / "filling.py").write_text(FILLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    with disk_of("8m", tmp_path / "disk") as folder:
        (tmp_path / "filling.gin").write_text(
            "from __gin__ import dynamic_registration\nimport filling\nfrom meshway.launch import train\n"
            f"train.train.hooks = [@filling.Fill()]\nfilling.Fill.path = '{folder}/filler'\nfilling.Fill.step = 3\n"
        )
        words = ["train", "--gin_file=counting.gin", f"--gin_file={tmp_path}/filling.gin", "--gin.REPORT_PERIOD=1"]
        message = mistake(capsys, *words, f"--gin.MODEL_DIR={folder}/run", exits=1)
        # The metrics of a step may still fit into the last block of their file; the checkpoint at the end does not.
        assert f"cannot write {folder}/run/" in message or f"saving checkpoint 10 in {folder}/run" in message, message
        assert "no space left on device" in message.lower()
        assert "report.html" not in message, "which is written last"


def test_nothing_at_the_end_hides_what_ended_a_run():
    told = []

    def refuse():
        told.append("asked")
        raise EnvironmentFailure("cannot write report.html")

    with pytest.raises(UserError, match="the loss is not finite"), at_the_end(refuse):
        raise UserError("the loss is not finite")
    with pytest.raises(EnvironmentFailure, match="report.html"), at_the_end(refuse):
        pass
    assert len(told) == 2


@pytest.mark.slow
def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path):
    """No file may grow past 200 KiB. Writes still under way in tensorstore's threads may complain beside us."""
    limit = ["bash", "-c", 'trap "" XFSZ; ulimit -f 200; exec "$@"', "limited"]
    done = run_short(*limit, folder=tmp_path / "run")
    assert done.returncode == 1 and done.stderr.count("meshway: error: ") == 1, done.stderr
    assert "saving checkpoint" in done.stderr and "Free some space" in done.stderr, done.stderr
