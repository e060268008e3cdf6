"""The shipped gin files: each recipe resolves to its golden text, each layout and optimizer fits both families."""

import os
import re
from pathlib import Path

import jax
import pytest
from tiny import DECODERS, ENCODER_DECODERS, ENCODERS, FAMILIES, MIXTURES, VISION, program

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

ROOT = Path(__file__).parent.parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "recipes"
RECIPES = sorted(path.stem for path in (ROOT / "gin" / "recipes").glob("*.gin"))
NEEDED = {  # what a recipe leaves open
    "quickstart": ("MODEL_DIR='run'",),
    "real_mix": ("MODEL_DIR='run'",),
    "bench_t5": (),
    "bench_accelerator": (),
    "bench_attention": (),
    "bench_moe": (),
    "bench_decode": (),
    "v_moe_digits": ("MODEL_DIR='run'",),
    "finetune": (
        "MODEL_DIR='run'",
        "MIXTURE_OR_TASK_NAME='mine'",
        "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
        "TRAIN_STEPS_RELATIVE=20000",
        "INITIAL_CHECKPOINT_PATH='pretrained'",
    ),
    "pretrain": (
        "MODEL_DIR='run'",
        "MIXTURE_OR_TASK_NAME='c4'",
        "TRAIN_STEPS=5",
        "TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
    ),
}
INTEGERS = "@integer_products.IntegerProduct()"
BEFORE = dict.fromkeys(("pretrain", "finetune"), ("models/t5_1_1/tiny.gin",))  # files that a recipe is made to follow


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_to_its_golden_text(name):
    """It says every value, Python's defaults too, and read again it says the same. It may change only on purpose:
    MESHWAY_RENEW_GOLDENS=1 rewrites the files."""
    verb = "bench" if name.startswith("bench") else "train"
    subject = {"bench_moe": "moe", "bench_attention": "attention", "bench_decode": "decode"}.get(name, "train")
    files = (*BEFORE.get(name, ()), f"recipes/{name}.gin")
    invocation = Invocation(verb=verb, subject=subject, gin_files=files, bindings=NEEDED[name])
    resolved = config.load(invocation, import_unreferenced=False).resolved
    path = GOLDENS / f"{name}.gin"
    if os.environ.get("MESHWAY_RENEW_GOLDENS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(resolved)
    assert resolved == path.read_text()
    again = Invocation(verb=verb, subject=subject, gin_files=(str(path),))
    assert config.load(again, import_unreferenced=False).resolved == resolved


def test_a_run_that_multiplies_integers_goes_on_by_its_own_recipe(tmp_path):
    given = Invocation("train", gin_files=("quickstart",), bindings=("MODEL_DIR='run'", f"PRODUCTS={INTEGERS}"))
    resolved = config.load(given, import_unreferenced=False).resolved
    assert "integer_products.IntegerProduct.integers = 'int8'" in resolved
    (tmp_path / "config.gin").write_text(resolved)
    again = Invocation("train", gin_files=(str(tmp_path / "config.gin"),))
    assert config.load(again, import_unreferenced=False).resolved == resolved


@pytest.mark.parametrize("objective", ["span_corruption", "ul2"])
def test_an_objective_resolves_over_a_model(objective, tmp_path):
    """UL2's denoisers are NamedTuples, among Python's defaults: no text has them, and none is taken apart."""
    files = ("models/t5_1_1/tiny.gin", "recipes/pretrain.gin", f"objectives/{objective}.gin")
    invocation = Invocation("train", gin_files=files, bindings=NEEDED["pretrain"])
    resolved = config.load(invocation, import_unreferenced=False).resolved
    (path := tmp_path / "resolved.gin").write_text(resolved)
    again = Invocation("train", gin_files=(str(path),))
    assert config.load(again, import_unreferenced=False).resolved == resolved


@pytest.mark.parametrize(
    ("binding", "why"),
    [
        (
            "infer_evall/schedule.EvalDataset.split='train'",
            "no reference opens the scope 'infer_evall'; did you mean 'infer_eval' or 'train_eval'?",
        ),
        (
            "infer_eval/evaluation.Evaluation.max_predictions=3",
            "nothing refers to evaluation.Evaluation in the scope 'infer_eval'",
        ),
    ],
)
def test_a_binding_of_ours_without_effect_is_refused_though_a_model_is_not_imported_yet(binding, why):
    invocation = Invocation("train", gin_files=("recipes/quickstart.gin",), bindings=("MODEL_DIR='run'", binding))
    with pytest.raises(UserError) as error:
        config.load(invocation, import_unreferenced=False)
    assert str(error.value) == f"--gin.{binding.partition('=')[0]} has no effect: {why}"


def test_every_family_is_tested():
    tested = {*FAMILIES, *DECODERS, *ENCODER_DECODERS, *ENCODERS, *MIXTURES, *VISION}
    assert tested == {path.name for path in (ROOT / "gin" / "models").iterdir()}


# That all others fit is implied by what layouts compute, in tests/framework/partitioning/test_layouts.py.
FITTING = [("fsdp", "lm"), ("model_2d", "t5_1_1"), ("ring_model", "t5_1_1"), ("expert", "mixtral"), ("stage", "lm")]


@pytest.mark.parametrize("layout, family", FITTING)
def test_each_layout_fits_each_family(layout, family):
    """The loss can be traced, and every mesh axis of several devices shards something."""
    made = program(family, layout=layout)
    made.trace_loss()
    used = {axis for row in made.explain() for axis in re.findall(r"\w+", row.spec)}
    assert used >= {axis for axis, size in made.partitioner.mesh.shape.items() if size > 1}


def test_the_compiler_knows_the_options_of_each_layout():
    """Names for GPUs are known to every build of XLA; those for TPUs only to libtpu, which is not here."""
    names = set()
    for path in (ROOT / "gin" / "platforms").glob("*.gin"):
        names |= set(re.findall(r"'(xla_gpu_\w+)': (True|False)", path.read_text()))
    assert names
    jax.jit(lambda x: x * 2).lower(1.0).compile(compiler_options={name: value == "True" for name, value in names})


@pytest.mark.parametrize("optimizer", sorted(path.stem for path in (ROOT / "gin" / "optimizers").glob("*.gin")))
def test_each_optimizer_file_binds(optimizer):
    made = program("t5_1_1", optimizer=optimizer)
    assert made.state_shardings.opt_state is not None


def test_dry_run_prints_recipe_table_and_memory_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--gin_file=quickstart", "--gin.LAYOUT=fsdp", "--dry_run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "TRAIN_STEPS = ",
        "params/token_embedding/embedding",
        "(None, fsdp)",
        "embed->fsdp",
        "bytes per device",
    ):
        assert part in said, part
    assert "opt_state" in said and "batch/encoder_input_tokens" in said and "replicated on every device" in said
    assert not list(tmp_path.iterdir())


def test_inspect_names_the_rule_of_every_tensor(capsys):
    assert cli.main(["inspect", "--gin_file=bench_t5", "--gin.LAYOUT=model_2d"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("params/")]
    assert len(rows) > 20
    row = next(row for row in rows if "encoder/block_0/mlp/wo" in row)
    assert "layers, mlp, embed" in row and "mlp->model embed->data" in row and "(None, model, data)" in row


@pytest.mark.slow
def test_bench_prints_the_share_of_the_peak(capsys):
    bindings = [
        "D_MODEL=32",
        "D_FF=32",
        "NUM_ENCODER_LAYERS=1",
        "NUM_DECODER_LAYERS=1",
        "VOCAB_SIZE=256",
        "BATCH_SIZE=2",
    ]
    words = [
        f"--gin.{binding}" for binding in (*bindings, "bench.train.measure.steps=1", "bench.train.measure.rounds=1")
    ]
    assert cli.main(["bench", "train", "--gin_file=bench_t5", *words]) == 0
    said = capsys.readouterr().out
    assert "share of the peak" in said and "TensorFlow imported" in said and "command to first finished step" in said
