"""Values that cannot be: one message that names the macro, before anything is built."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import tiers

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

GIN = Path(__file__).parent.parent.parent.parent / "gin"
MORE = ("MODEL_DIR='run'", "MIXTURE_OR_TASK_NAME='a'", "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}")
IMPOSSIBLE = ["-3", "0.5", "1e400", "'four'", "[1]", "{'a': -1}", "(None,)", "True", "''", "b'4'", "-1e9"]
NOWHERE = "@nowhere.Thing()"


def load(files, *bindings, verb=None):
    verb = verb or ("train" if files[0] in ("recipes/quickstart.gin", "recipes/real_mix.gin") else "bench")
    bindings = (*MORE[:1], *bindings) if verb == "train" else bindings
    subject = "train" if verb == "bench" else None
    return config.load(Invocation(verb, subject, tuple(files), bindings=bindings), import_unreferenced=False)


def numbers_of(files):
    """Returns macro -> its text, of those used by what the recipe is loaded for that hold a number."""
    found = re.findall(r"^([A-Z_0-9]+) = (-?[\d.]+(?:e-?\d+)?|\{.*\d\})$", load(files).resolved, re.MULTILINE)
    unused = ("CHECKPOINT_PERIOD", "EVAL_PERIOD", "REPORT_PERIOD", "BIAS_SPEED") if "recipes" not in files[0] else ()
    return {name: text for name, text in found if name not in unused}


RECIPES = {
    "quickstart": ["recipes/quickstart.gin"],
    "real_mix": ["recipes/real_mix.gin"],
    **{
        family: [f"models/{family}/tiny.gin", "optimizers/adafactor.gin", "more"]
        for family in ("t5", "gpt2", "llama", "gemma2", "gemma3", "deepseek", "mixtral", "palm", "bert", "switch")
    },
}
QUICK = [("quickstart", "0.5"), ("llama", "'four'"), ("mixtral", "-3")]
SLOW = [("real_mix", "1e400"), ("t5", "[1]"), ("deepseek", "{'a': -1}"), ("bert", "True"), ("switch", "b'4'")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    path = folder / "more.gin"
    path.write_text(
        "VOCAB_SIZE = 64\nBATCH_SIZE = 16\nLEARNING_RATE = 0.01\nWARMUP_STEPS = 10\n"
        "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}\n"
    )
    return lambda name: [str(path) if file == "more" else file for file in RECIPES[name]]


@pytest.mark.parametrize("name, value", tiers([*QUICK, *SLOW], quick=QUICK, slow=SLOW))
def test_every_number_of_a_recipe_refuses_what_it_cannot_be(name, value, written):
    files = written(name)
    check_refused(files, numbers_of(files), value)


@pytest.mark.proofs
@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_recipe_refuses_all_that_it_cannot_be(name, written):
    files = written(name)
    numbers = numbers_of(files)
    for value in IMPOSSIBLE:
        check_refused(files, numbers, value)


def check_refused(files, macros, value):
    """All that hold a number at once: each is named with its place, and nothing else is blamed."""
    assert len(macros) > 5
    with pytest.raises(UserError) as raised:
        load(files, *[f"{macro}={value}" for macro in macros])
    blamed = set(re.findall(r"--gin\.([A-Z_0-9]+): \1 = ", str(raised.value)))
    halves = {macro for macro, text in macros.items() if value == "0.5" and not text.isdecimal() and text[0] != "{"}
    assert blamed >= macros.keys() - halves, (value, macros.keys() - blamed)


SUBJECTS = {
    "bench_moe": "moe",
    "bench_attention": "attention",
    "bench_decode": "decode",
    "bench_t5": "train",
    "bench_accelerator": "train",
}
RESOLVED = GIN.parent / "tests" / "goldens" / "recipes"  # with what recipes leave open, as the model that is fine-tuned
MACROS = {  # of every shipped recipe: macro -> its text
    path.stem: dict(re.findall(r"^([A-Z_0-9]+) = (.*)$", path.read_text(), re.MULTILINE))
    for path in sorted(RESOLVED.glob("*.gin"))
}
ALONE = [("bench_moe", "LAYOUT"), ("bench_attention", "LAYOUT"), ("v_moe_digits", "IMAGE_SHAPE")]
ALONE_SLOW = [("quickstart", "MODEL_DIR")]
NAMES = (
    "MODEL_DIR",
    "CACHE_DIR",
    "INITIAL_CHECKPOINT_PATH",
    "SEQIO_CACHE_DIRS",
    "MIXTURE_OR_TASK_NAME",
    "MIXTURE_OR_TASK_MODULE",
)


def possible(macro: str, text: str) -> set[str]:
    """Returns which of IMPOSSIBLE a macro with this value may well be."""
    found = {"True"} if text in ("True", "False") or macro == "SCAN" else set()
    if re.fullmatch(r"-?\d+\.\d*|\d\.?\d*e-?\d+", text):
        found.add("0.5")
    if macro == "EMA_DECAY":
        found.add("0.5")
    if macro in ("START", "STOP_IDS"):  # ids
        found.add("[1]")
    if macro == "VOCABULARIES":  # of any feature: the task says which
        found.add("{'a': -1}")
    if macro == "LOSS_NORMALIZING_FACTOR":  # one of three words, any number above 0, or None
        found |= {"0.5", "None"}
    return found | ({"'four'"} if macro in NAMES else set())


class Commands:
    """What is said to values of a recipe's macros from the command line."""

    def __init__(self, recipe: str, capsys, folder: Path):
        self.recipe, self.capsys, self.folder = recipe, capsys, folder
        self.words = ["bench", SUBJECTS[recipe]] if recipe in SUBJECTS else ["train", "--dry_run"]

    def asked(self) -> dict[str, str]:
        """Returns macro -> its text, of those that the command asks for: a benchmark does not for all of them."""
        macros = MACROS[self.recipe]
        if self.recipe not in SUBJECTS:
            return macros
        given = Invocation("bench", SUBJECTS[self.recipe], (f"recipes/{self.recipe}.gin",))
        settings = config.load(given, import_unreferenced=False).settings(f"bench.{SUBJECTS[self.recipe]}.measure", ())
        return {name: text for name, text in macros.items() if name == "LAYOUT" or f"/{name}" in settings}

    def refused(self, value: str, *macros: str) -> set[str]:
        """Returns which of the macros are named where all have this value: exit code 2, one message that names one at
        least, no traceback, nothing written."""
        words = [*self.words, f"--gin_file={RESOLVED / self.recipe}.gin"]
        if self.words[0] == "train" and "MODEL_DIR" not in macros:
            words.append(f"--gin.MODEL_DIR={self.folder / 'run'}")
        assert cli.main([*words, *[f"--gin.{macro}={value}" for macro in macros]]) == 2, (value, macros)
        error = self.capsys.readouterr().err
        assert error.count("meshway: error: ") == 1 and "Traceback" not in error, (value, error)
        assert not list(self.folder.iterdir())
        named = {
            *re.findall(r"--gin\.([A-Z_0-9]+)\b(?!: nothing uses)", error),
            *re.findall(r"error: ([A-Z_0-9]+)\b", error),
        }
        assert named & {*macros}, (value, macros, error)
        return named & {*macros}


@pytest.mark.parametrize("recipe, macro", tiers([*ALONE, *ALONE_SLOW], quick=ALONE, slow=ALONE_SLOW))
def test_a_macro_of_a_shipped_recipe_takes_nothing_that_it_cannot_be(recipe, macro, capsys, tmp_path):
    commands = Commands(recipe, capsys, tmp_path)
    for value in {*IMPOSSIBLE, NOWHERE} - possible(macro, commands.asked()[macro]):
        commands.refused(value, macro)


@pytest.mark.proofs
@pytest.mark.parametrize("recipe", MACROS)
def test_no_macro_of_a_shipped_recipe_takes_what_it_cannot_be(recipe, capsys, tmp_path):
    """With each value all plain macros at once, since a check looks at one binding; what is not named then, and what
    others hang on, by itself. And each macro by itself with one value, in turn."""
    commands = Commands(recipe, capsys, tmp_path)
    macros = commands.asked()
    assert macros
    for number, value in enumerate([*IMPOSSIBLE, NOWHERE]):
        cannot = [name for name, text in macros.items() if value not in possible(name, text)]
        together = [name for name in cannot if name != "LAYOUT" and not re.search("[@%]", macros[name])]
        named = commands.refused(value, *together) if together else set()
        for place, name in enumerate(macros):
            if name in cannot and (name not in named or place % len(IMPOSSIBLE) == number):
                commands.refused(value, name)


IMPOSSIBLE_HERE = [
    ("TRAIN_STEPS=4.5", "TRAIN_STEPS = 4.5, taken by loop.Periods.total: a whole number or None is needed"),
    ("LEARNING_RATE='1e-3'", "LEARNING_RATE = '1e-3', taken by schedules.t5_factors.base_learning_rate: a number"),
    ("DTYPE=floot32", "DTYPE = 'floot32', taken by .*: no such dtype; did you mean 'float32'"),
    ("D_MODEL=0", "D_MODEL = 0, taken by .*: it must be at least 1"),
    ("TASK_FEATURE_LENGTHS={'inputs': 0}", "TASK_FEATURE_LENGTHS = {'inputs': 0}, .*: it must be at least 1"),
    ("TASK_FEATURE_LENGTHS=512", "TASK_FEATURE_LENGTHS = 512, .*: a mapping {name: value} is needed"),
    ("BATCH_SIZE='4'", "BATCH_SIZE = '4', taken by .*: a whole number is needed"),
    (
        "OPTIMIZER=adamw",
        "OPTIMIZER = 'adamw', .*: a reference .* is needed; --gin_file=optimizers/adamw brings one",
    ),
    ("SEQIO_CACHE_DIRS=('a', '')", "SEQIO_CACHE_DIRS = .*seqio_cache_dirs: it must not hold an empty text"),
    ("MIXTURE_OR_TASK_MODULE=['']", "MIXTURE_OR_TASK_MODULE = .*module: it must not hold an empty text"),
    ("INITIAL_CHECKPOINT_PATH=''", "INITIAL_CHECKPOINT_PATH = '', taken by mapping.Initial.path: it must not be empty"),
    ("DROPOUT_RATE=1.5", "DROPOUT_RATE = 1.5, .*: it must be at least 0 and below 1"),
    ("LABEL_SMOOTHING=1.0", "LABEL_SMOOTHING = 1.0, .*: it must be at least 0 and below 1"),
    ("EVAL_PERIOD=0", "EVAL_PERIOD = 0, .*: it must be at least 1"),
    ("CHECKPOINT_PERIOD='often'", "CHECKPOINT_PERIOD = 'often', .*: a whole number or None is needed"),
    ("PACK=1", "PACK = 1, .*: True or False is needed"),
    ("SEED=-1", "SEED = -1, .*: it must be at least 0"),
    ("SEED=4294967296", "SEED = 4294967296, .*: it must be at least 0 and below 2"),
    ("D_MODEL=99999999999", "D_MODEL = 99999999999, .*: it must be below 2"),
    ("TRAIN_STEPS_RELATIVE=0", "TRAIN_STEPS_RELATIVE = 0, .*: it must be at least 1"),
    (
        "MODEL=@objectives.EncoderDecoder",
        r"MODEL = @.*a reference .* is needed; write @objectives.EncoderDecoder\(\)",
    ),
    ("MODEL=@loop.Periods()", r"Periods\(\), .*: it gives a Periods, which is no Model \(with axes, batch_spec, "),
    ("DATA=@features.EncoderDecoder()", "it gives a EncoderDecoder, which is no DataSource"),
    ("train.train.keep=@manager.Keep", r"is needed; write @manager.Keep\(\)"),
    ("ATTENTION_KERNEL=@auto.SplashAttention", r"it makes what is needed, .*; write @auto.SplashAttention\(\)$"),
    ("optimizers.Optimizer.learning_rate=@schedules.t5_factors", r"; write @schedules.t5_factors\(\)"),
    ("program.TrainProgram.statistics=@program.WeightStatistics", r"; write @program.WeightStatistics\(\)"),
    ("TRAIN_EVAL=[@schedule.EvalDataset]", r"a list of a reference \(@module.Name\(\)\) or None is needed"),
    ("mesh.MeshShape.ici={5: 1}", "ici = {5: 1}: a mapping {name: value} is needed"),
    ("MODEL_DIR=3", "MODEL_DIR = 3, .*: text is needed"),
    (f"MODEL_DIR='{'a' * 300}'", r"MODEL_DIR = 'a{39}\.\.\., taken by .*: a{40}\.\.\. is a name of 300 bytes"),
    ("DTYPE=int32", "DTYPE = 'int32', .*: no such dtype"),
    ("DTYPE=float64", "DTYPE = 'float64', .*: no such dtype"),
    ("attention.Attention.cache_dtype=int32", "'int32': no such dtype; did you mean 'int8'"),
    ("manager.Keep.latest=0", "manager.Keep.latest = 0: it must be at least 1"),
    ("manager.Keep.every=-1", "manager.Keep.every = -1: it must be at least 1"),
    ("grain_loader.CachedData.num_workers=-1", "CachedData.num_workers = -1: it must be at least 0"),
    ("optimizers.muon.beta=1.5", "optimizers.muon.beta = 1.5: it must be at least 0 and below 1"),
    ("evaluation.Evaluation.max_batches=0", "max_batches = 0: it must be at least 1"),
    ("mlp.Mlp.activations=gelu", "mlp.Mlp.activations = 'gelu': a list of text is needed"),
    ("attention.Attention.kernel=splash", "attention.Attention.kernel = 'splash': a reference"),
    ("TASK_FEATURE_LENGTHS={'inputs': %LEARNING_RATE, 'targets': 8}", "RATE = 0.015, taken by .*: a whole number"),
    (
        "mlp.Mlp.activations=['gelu', %LEARNING_RATE]",
        "LEARNING_RATE = 0.015, taken by mlp.Mlp.activations: text is",
    ),
]


@pytest.mark.parametrize("binding, message", tiers(IMPOSSIBLE_HERE, quick=IMPOSSIBLE_HERE[::3], slow=IMPOSSIBLE_HERE))
def test_a_value_that_cannot_be_is_named_where_it_is_written(binding, message):
    with pytest.raises(UserError, match=message):
        load(["recipes/quickstart.gin"], *MORE, binding, verb="train")


@pytest.mark.parametrize(
    "binding, message",
    [
        ("rates = {'a': -1.0}", "rates.gin:6: mixing.Rates.rates = {'a': -1.0}: 'a' is -1.0: it must be at least 0"),
        ("rates = {'a': 2, 'b': 'x'}", "rates.gin:6: mixing.Rates.rates = .*: 'b' is 'x': a number is needed"),
        ("from_step = -5", "rates.gin:6: mixing.Rates.from_step = -5: it must be at least 0"),
        (
            "rates = {'a': %RATE}\nRATE = -0.5",
            "rates.gin:7: RATE = -0.5, taken by mixing.Rates.rates: it must be at least 0",
        ),
        ("rates = {'a': 1, 'b': %R}\nR = 'x'", "rates.gin:7: R = 'x', taken by mixing.Rates.rates: a number is needed"),
        ("rates = %BOTH\nBOTH = {'a': %R}\nR = -1", "rates.gin:8: R = -1, taken by mixing.Rates.rates: it must be at"),
    ],
)
def test_mixing_rates_are_named_where_they_are_written(binding, message, tmp_path):
    (tmp_path / "rates.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom meshway.framework.data import grain_loader\n"
        "from meshway.framework.data.rows import mixing\nmixing.Rates.from_step = 2\nmixing.Rates.rates = {'a': 1}\n"
        f"mixing.Rates.{binding}\n"
        "grain_loader.CachedData.rates = [@mixing.Rates()]\n"
    )
    with pytest.raises(UserError, match=message):
        load(["recipes/quickstart.gin", str(tmp_path / "rates.gin")], *MORE, verb="train")


def test_whole_numbers_and_dtypes_may_be_written_in_other_ways():
    recipe = load(
        ["recipes/quickstart.gin"], "MODEL_DIR='run'", "TRAIN_STEPS=1e5", "DTYPE=bf16", "BATCH_SIZE=4.0",
        "TASK_FEATURE_LENGTHS={'inputs': 32.0, 'targets': 16}", "EVAL_PERIOD=None", "LEARNING_RATE=1", verb="train",
    )  # fmt: skip
    for line in (
        "TRAIN_STEPS = 100000",
        "DTYPE = 'bfloat16'",
        "BATCH_SIZE = 4",
        "LEARNING_RATE = 1",
        "EVAL_PERIOD = None",
    ):
        assert f"\n{line}\n" in recipe.resolved
    assert "'inputs': 32," in recipe.resolved


FIRST = """
import json, sys
from meshway.framework.errors import UserError
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
try:
    config.load(Invocation(**json.loads(sys.argv[1])))
except UserError as error:
    print(error)
"""


FIRST_FILES = [["recipes/quickstart.gin"], ["models/mixtral/tiny.gin", "optimizers/adamw.gin"]]


@pytest.mark.parametrize("files", tiers(FIRST_FILES, quick=FIRST_FILES[:1], slow=FIRST_FILES[1:]))
def test_the_first_recipe_of_a_process_is_checked_like_any_other(files):
    """What Python's defaults lead to is imported as the recipe is walked: a command has not imported it before."""
    given = [*MORE, "HEAD_DIM=31.5", "NUM_HEADS=2.5", "D_FF='wide'", "NORM_EPSILON=-1.0", "TRAIN_STEPS=1"]
    given += ["BATCH_SIZE=8", "WARMUP_STEPS=1", "LEARNING_RATE=0.1"]
    asked = {"verb": "train", "gin_files": files, "bindings": given}
    words = [sys.executable, "-c", FIRST, json.dumps(asked)]
    first = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    with pytest.raises(UserError) as later:
        load(files, *given, verb="train")
    assert first.splitlines() == str(later.value).splitlines()
    assert first.count("attention.Attention.") == 2 and ".d_ff" in first and "norm.RMSNorm.epsilon" in first


DATA_ALONE = """
import sys
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
for verb, subject in [("cache", None), ("inspect", "data"), ("bench", "data")]:
    config.load(Invocation(verb, subject, ("quickstart",), ()))
assert "meshway.models.objectives" not in sys.modules
"""


def test_verbs_that_import_no_model_do_not_judge_what_is_bound_of_it():
    done = subprocess.run([sys.executable, "-c", DATA_ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_name_means_in_a_module_of_the_users_is_the_users(tmp_path, monkeypatch):
    (tmp_path / "hooks_of_mine.py").write_text(
        "class Hook:\n    def __init__(self, factor: float, dtype: str, k: int): self.all = (factor, dtype, k)\n"
        "    def after_step(self, step): ...\n    def close(self): ...\n"
        "class Bare: ...\n"
    )
    (tmp_path / "mine.gin").write_text(
        "from __gin__ import dynamic_registration\nimport hooks_of_mine\nfrom meshway.launch import train\n"
        "train.train.hooks = [@hooks_of_mine.Hook()]\n"
        "hooks_of_mine.Hook:\n  factor = -1.5\n  dtype = 'uint8'\n  k = 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    files = ["recipes/quickstart.gin", str(tmp_path / "mine.gin")]
    assert "hooks_of_mine.Hook.factor = -1.5\n" in load(files, *MORE, verb="train").resolved
    with pytest.raises(UserError, match=r"hooks_of_mine.Hook.k = 0.5: a whole number is needed"):
        load(files, *MORE, "hooks_of_mine.Hook.k=0.5", verb="train")
    with pytest.raises(UserError, match=r"it gives a Bare, which is no Hook \(with after_step, close, ...\)"):
        load(files, *MORE, "train.train.hooks=[@hooks_of_mine.Bare()]", verb="train")
