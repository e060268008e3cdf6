"""Values as people type them, from the command line: read where their meaning is plain, else refused in one message.

Every macro of every shipped recipe with a dozen impossible values is `tests/launch/recipe/test_recipe_values.py`'s;
addresses of buckets are `tests/launch/test_cli.py`'s.
"""

import shutil

import pytest
from running import LAB, answer, copy_lab

from meshway.launch import cli

pytestmark = pytest.mark.proofs

TRAIN = ("train", "--gin_file=t5.gin", "--gin.LAYOUT=single", "--gin.EVAL_PERIOD=None", "--gin.TRAIN_STEPS=2")
WHOLE = "a whole number"
REFUSED = {
    "TRAIN_STEPS=4.5": (WHOLE, "taken by loop.Periods.total"),
    "TRAIN_STEPS=True": WHOLE,
    "TRAIN_STEPS=0": "it must be at least 1",
    "TRAIN_STEPS='12'": WHOLE,
    "LEARNING_RATE='1e-3'": "a number is needed",
    "LEARNING_RATE=high": "a number is needed",
    "LEARNING_RATE=1e999": "LEARNING_RATE = inf",
    "LEARNING_RATE=-0.1": "LEARNING_RATE = -0.1",
    "LEARNING_RATE=None": "LEARNING_RATE = None",
    "DTYPE=flaot32": "did you mean 'float32'",
    "DTYPE=int32": "DTYPE = 'int32'",
    "D_MODEL=0": "it must be at least 1",
    "D_MODEL=-64": "it must be at least 1",
    "D_MODEL=[64]": WHOLE,
    "HEAD_DIM=31.5": WHOLE,
    "NUM_HEADS=None": WHOLE,
    "NUM_HEADS={}": WHOLE,
    "BATCH_SIZE='4'": WHOLE,
    "BATCH_SIZE=None": WHOLE,
    "BATCH_SIZE=2.5": WHOLE,
    "SEED=abc": WHOLE,
    "CHECKPOINT_PERIOD=-5": "CHECKPOINT_PERIOD = -5",
    "REPORT_PERIOD=0": "REPORT_PERIOD = 0",
    "OPTIMIZER=adamw": ("a reference (@module.Name", "optimizers/adamw"),
    "MODEL=llama": "a reference (@module.Name",
    "TASK_FEATURE_LENGTHS=[16, 16]": "TASK_FEATURE_LENGTHS = [16, 16]",
    "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 0}": "TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 0}",
    "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': '32'}": "TASK_FEATURE_LENGTHS",
    "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8.5}": "TASK_FEATURE_LENGTHS",
    "ACTIVATIONS=('siluu',)": "unknown ['siluu']; known are",
    "LAYOUT=3": "LAYOUT must be a layout's name or file, not 3",
    "WARMUP_STEP=3": "nothing uses the macro WARMUP_STEP; did you mean 'WARMUP_STEPS'",
    "DROPOUT_RATE=1.5": "it must be at least 0 and below 1",
    "DROPOUT_RATE=1": "it must be at least 0 and below 1",
    "DROPOUT_RATE=-0.1": "it must be at least 0 and below 1",
    "DROPOUT_RATE='0.1'": "DROPOUT_RATE = '0.1'",
    "manager.Keep.latest=0": "it must be at least 1",
    "grain_loader.CachedData.num_workers=-1": "num_workers",
    "NUM_MICROBATCHES=0": "it must be at least 1",
    "NUM_MICROBATCHES=3": ("NUM_MICROBATCHES", "8"),
    "EMA_DECAY=1.5": "EMA_DECAY = 1.5",
    "MODEL_DIR=s3://bucket/run": "it is not a local path",
    "MODEL_DIR=gs:/bucket/run": "it is no address of a bucket; did you mean gs://bucket/run",
    "CACHE_DIR=s3://bucket/cache": "it is not a local path",
    "INITIAL_CHECKPOINT_PATH=gs://bucket/run": "it is not a local path",
}


@pytest.mark.parametrize("binding", REFUSED)
def test_a_value_without_meaning_is_refused_by_its_macro(binding, tmp_path, monkeypatch, capsys):
    """In this process, as nothing of a run is started; `tests/runs/test_mistakes.py` has commands of their own."""
    shutil.copy(LAB / "t5.gin", tmp_path)
    monkeypatch.chdir(tmp_path)
    name, says = binding.partition("=")[0], REFUSED[binding]
    says = (name, *([says] if isinstance(says, str) else says))
    given = () if name == "MODEL_DIR" else ("--gin.MODEL_DIR=run",)
    assert cli.main([*TRAIN, *given, f"--gin.{binding}"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("meshway: error: ") == 1, said
    assert all(part in said for part in says), (says, said)
    assert len(said[said.index("meshway: error: ") :].splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["t5.gin"], "nothing is made"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return copy_lab(tmp_path_factory.mktemp("values"))


@pytest.mark.parametrize(
    ("bindings", "says"),
    [
        (("TRAIN_STEPS=4.0", "DTYPE=bf16", "BATCH_SIZE=8.0", "WARMUP_STEPS=1e1"), "done: step 4;"),
        (
            ("TRAIN_STEPS=1e1", "DTYPE='fp32'", "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64.0}"),
            "done: step 10;",
        ),
    ],
)
def test_values_whose_meaning_is_plain_are_read(bindings, says, lab):
    run = "".join(filter(str.isalnum, bindings[0]))
    answer(*TRAIN, f"--gin.MODEL_DIR=runs/{run}", *[f"--gin.{each}" for each in bindings], cwd=lab, says=says)


def test_a_recipe_that_begins_with_a_byte_order_mark(lab):
    text = (lab / "t5.gin").read_text()
    (lab / "marked.gin").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (lab / "outer.gin").write_bytes(b"\xef\xbb\xbfinclude 'marked.gin'\nTRAIN_STEPS = 77\n")
    words = ("--dry_run", "--gin.MODEL_DIR=runs/marked")
    answer("train", "--gin_file=marked.gin", *words, cwd=lab, says="TRAIN_STEPS = 30")
    answer("train", "--gin_file=outer.gin", *words, cwd=lab, says="TRAIN_STEPS = 77")


def test_an_include_is_looked_for_beside_the_file_that_includes(lab):
    """And a shipped file's own includes are shipped ones, whatever the current folder holds."""
    base = (lab / "t5.gin").read_text()
    (lab / "sub").mkdir()
    (lab / "base.gin").write_text(base + "TRAIN_STEPS = 111\n")
    (lab / "sub" / "base.gin").write_text(base + "TRAIN_STEPS = 222\n")
    (lab / "sub" / "mine.gin").write_text("include 'base.gin'\n")
    words = ("--dry_run", "--gin.MODEL_DIR=runs/included")
    answer("train", "--gin_file=sub/mine.gin", *words, cwd=lab, says="TRAIN_STEPS = 222")
    for name in ("optimizers/adafactor.gin", "models/t5_1_1/common.gin"):
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).write_text("NOT_READ = 1\n")
    said = answer("train", "--gin_file=models/t5_1_1/tiny.gin", "--gin_file=optimizers/sgd.gin", *words,
                  "--gin.MIXTURE_OR_TASK_MODULE=tasks.topics", "--gin.MIXTURE_OR_TASK_NAME=lab_halves",
                  "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64}", "--gin.TRAIN_STEPS=3",
                  "--gin.VOCAB_SIZE=384", cwd=lab)  # fmt: skip
    assert "NOT_READ" not in said
    for folder in ("optimizers", "models/t5_1_1"):  # the lab's own recipes would include these
        shutil.rmtree(lab / folder)


def test_several_mistakes_of_one_recipe_are_one_message(lab):
    """As many as are found, each by its own line, and nothing is trained."""
    (lab / "wrong.gin").write_text("include 'sub.gin'\n")
    answer("train", "--gin_file=wrong.gin", "--gin.MODEL_DIR=runs/wrong", cwd=lab, exits=2, says="sub.gin")
    (lab / "twice.gin").write_text("include 't5.gin'\nD_MODEL = 0\nDROPOUT_RATE = 2\n")
    said = answer("train", "--gin_file=twice.gin", "--gin.MODEL_DIR=runs/twice", cwd=lab, exits=2, says="twice.gin:")
    assert "D_MODEL = 0" in said or "DROPOUT_RATE = 2" in said
