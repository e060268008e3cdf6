"""The state of T5X's Adafactor comes in, training goes on with it as T5X's does, and it goes out as it came.

That T5X itself restores what goes out was seen by `tests/goldens/make_t5x.py restore`; the files are its own, byte for
byte.
"""

import resource
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
from converted import T5X, t5x_runs

from meshway.framework.checkpoints import continuation
from meshway.framework.conversion.t5x_files import T5XFiles, chunks_of, write_native
from meshway.framework.conversion.t5x_optimizer import Kind, schedule_of, settings_of
from meshway.framework.conversion.tensor_files import Spec
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.launch.convert import convert
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
from meshway.launch.train import train

KINDS = ("decoder_native", "scalable_orbax", "momentum_native", "sized_native")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of each run, as T5X leaves it: name -> path."""
    return t5x_runs(tmp_path_factory.mktemp("t5x"), *KINDS)


@pytest.fixture(scope="module")
def taken_in(runs, tmp_path_factory):
    """Returns the run directory of a kind, with its optimizer state."""
    folder, made = tmp_path_factory.mktemp("taken_in"), set()

    def of(kind):
        if kind not in made:
            convert(str(runs[kind]), str(folder / kind), optimizer_state=True)
            made.add(kind)
        return folder / kind

    return of


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["momentum_native", pytest.param("sized_native", marks=pytest.mark.slow)])
def test_t5x_own_files_come_out_byte_for_byte(runs, taken_in, tmp_path, kind):
    convert(str(taken_in(kind)), str(tmp_path / "out"), family="t5x", optimizer_state=True)
    expected = files_of(runs[kind] / "checkpoint_1239")
    assert files_of(tmp_path / "out" / "checkpoint_1239") == expected and "checkpoint" in expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder_native", "scalable_orbax"])
def test_arrays_are_the_same_in_either_format(runs, taken_in, tmp_path, kind):
    convert(str(taken_in(kind)), str(tmp_path / "out"), family="t5x", optimizer_state=True)
    theirs, ours = T5XFiles(runs[kind]), T5XFiles(tmp_path / "out")
    assert ours.step == theirs.step
    for before, after in ((theirs, ours), (theirs.moments, ours.moments)):
        assert sorted(before) == sorted(after)
        for name in before:
            assert before.dtype(name) == after.dtype(name) == np.float32
            np.testing.assert_array_equal(before.read(name), after.read(name))


def program_of(run, *bindings):
    """Returns (program, what it starts from) of a recipe that fine-tunes a converted run."""
    lengths = {"inputs": 11, "targets": 7} if "encoder" in (run / "t5x.json").read_text() else {"targets": 7}
    invocation = Invocation(
        verb="train",
        gin_files=(str(run / "recipe.gin"),),
        bindings=(
            "BATCH_SIZE=3",
            f"TASK_FEATURE_LENGTHS={lengths}",
            "MIXTURE_OR_TASK_NAME='none'",
            "MODEL_DIR='none'",
            "TRAIN_STEPS=2000",
            "LAYOUT='single'",
            "DROPOUT_RATE=0.0",
            "Z_LOSS=0.0",
            "LOSS_NORMALIZING_FACTOR=None",
            "LEARNING_RATE=0.01",
            "schedules.t5_factors.factors='constant'",
            *bindings,
        ),
    )
    recipe, found = config.load(invocation, import_unreferenced=False), {}
    with recipe.parts("train.train", given=["resolved", "began"]) as part:
        for name in signature(train).parameters.keys() - {"resolved", "began"}:
            found[name] = part(name)
    return found["program"], found["initial"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "direct"),
    [("scalable_orbax", False), ("momentum_native", True), ("sized_native", False)],
)
def test_the_next_losses_are_t5x_own(runs, taken_in, kind, direct):
    """From a converted run, and from T5X's checkpoint itself, read into the shards."""
    expected = np.load(T5X / f"{kind.partition('_')[0]}_expected.npz")
    bindings = [f"mapping.Initial.path={str(runs[kind])!r}"] if direct else []
    program, initial = program_of(taken_in(kind), *bindings)
    first = continuation.first_step(initial)
    continuation.check(initial, program.state_shapes, program.axes)
    state = continuation.begin(initial, program, first)
    assert first == int(state.step) == int(state.opt_state.step) == 1239
    batch = {name.removeprefix("batch/"): expected[name] for name in expected.files if name.startswith("batch/")}
    for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        if tokens in batch:
            shape = batch[tokens].shape
            batch[f"{side}_segment_ids"] = (batch[tokens] > 0).astype(np.int32)
            batch[f"{side}_positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    step, found = program.compile_step(), []
    for _ in range(3):
        given = {name: batch[name].astype(spec.dtype) for name, spec in program.batch_spec.items()}
        state, metrics = step(state, program.shard_batch(given))
        found.append(float(metrics["loss"][0]))
    np.testing.assert_allclose(found, expected["next_losses"], rtol=1e-5)


def test_another_optimizer_than_the_states_is_told(taken_in, runs):
    for path in (taken_in("momentum_native"), runs["momentum_native"]):
        bindings = (f"mapping.Initial.path={str(path)!r}", "optimizers.adafactor.beta1=None")
        program, initial = program_of(taken_in("momentum_native"), *bindings)
        with pytest.raises(UserError, match="Initial.optimizer_state: .* another optimizer than this"):
            continuation.check(initial, program.state_shapes, program.axes)


def rewritten(run, folder, state, config=""):
    """Writes a checkpoint with the parameters of `run` and another state, {name: array}; returns its folder."""
    files = T5XFiles(run)
    specs = {f"target/{name}": Spec(files.shape(name), files.dtype(name)) for name in files}
    inline = {f"state/param_states/{name}": value for name, value in state(files).items()}
    write_native(folder / "checkpoint_5", specs, lambda name: files.read(name.removeprefix("target/")), inline)
    (folder / "config.gin").write_text(config)
    return folder


def moments_of(files):
    return {name: files.moments.read(name) for name in files.moments}


ADAM = ("grad_ema", "grad_sq_ema")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda files: {f"{name}/{slot}": files.read(name) for name in files for slot in ADAM},
            "does not hold the state of T5X's Adafactor .* it has grad_ema, grad_sq_ema",
        ),
        (lambda files: {}, "has no optimizer state, only parameters"),
        (moments_of, "has Adafactor's momentum, and arrays do not tell its beta1"),
        (
            lambda files: (
                {name: value.reshape(-1) for name, value in moments_of(files).items() if not name.endswith("/m")}
                | {f"{name}/m": np.zeros(1, np.float32) for name in files}
            ),
            r"v_\w+ is \[\d+\], and T5X's standard factor rules with min_dim_size_to_factor=128 give \[",
        ),
    ],
    ids=["adam", "none", "momentum", "shapes"],
)
def test_other_states_are_refused_in_one_message(runs, tmp_path, state, message):
    run = rewritten(runs["momentum_native"], tmp_path / "run", state)
    with pytest.raises(UserError, match=message):
        convert(str(run), str(tmp_path / "out"), optimizer_state=True)
    assert not (tmp_path / "out").exists()


def test_momentum_keeps_its_dtype_in_and_out(runs, tmp_path):
    """T5X's dtype_momentum, here bfloat16, is told by the arrays alone."""

    def state(files):
        found = moments_of(files)
        return {name: value.astype("bfloat16") if name.endswith("/m") else value for name, value in found.items()}

    run = rewritten(runs["momentum_native"], tmp_path / "run", state, "adafactor.Adafactor.beta1 = 0.9\n")
    convert(str(run), str(tmp_path / "in"), optimizer_state=True)
    assert "optimizers.adafactor.dtype_momentum = 'bfloat16'" in (tmp_path / "in" / "recipe.gin").read_text()
    convert(str(tmp_path / "in"), str(tmp_path / "out"), family="t5x", optimizer_state=True)
    before, after = T5XFiles(run).moments, T5XFiles(tmp_path / "out").moments
    for name in before:
        assert after.dtype(name) == before.dtype(name) == ("bfloat16" if name.endswith("/m") else np.float32)
        np.testing.assert_array_equal(after.read(name), before.read(name))
    for path in (tmp_path / "in", run):
        bindings = (f"mapping.Initial.path={str(path)!r}", "optimizers.adafactor.dtype_momentum=None")
        program, initial = program_of(tmp_path / "in", *bindings)
        with pytest.raises(UserError, match="Initial.optimizer_state: .* another optimizer than this .*bfloat16"):
            continuation.check(initial, program.state_shapes, program.axes)


def test_momentum_of_several_dtypes_is_refused(runs, tmp_path):
    def state(files):
        found = moments_of(files)
        first = next(name for name in found if name.endswith("/m"))
        return found | {first: found[first].astype("bfloat16")}

    run = rewritten(runs["momentum_native"], tmp_path / "run", state, "adafactor.Adafactor.beta1 = 0.9\n")
    with pytest.raises(UserError, match="momentum has several dtypes: .* is bfloat16"):
        convert(str(run), str(tmp_path / "out"), optimizer_state=True)


@pytest.mark.slow
def test_what_a_config_binds_to_adafactor_is_bound_here(runs, tmp_path):
    text = "adafactor.Adafactor:\n    beta1 = 0.9\n    decay_rate = 0.7\n    step_offset = 0\n"
    text += "    weight_decay_rate = 0.01\n    global_norm_clip_threshold = 2.0\n"
    text += "RATE = 0.5\nutils.create_learning_rate_scheduler:\n    base_learning_rate = %RATE\n"
    text += "    factors = 'constant * rsqrt_decay'\n"
    run = rewritten(runs["momentum_native"], tmp_path / "run", moments_of, text)
    convert(str(run), str(tmp_path / "in"), optimizer_state=True)
    recipe = (tmp_path / "in" / "recipe.gin").read_text()
    assert "optimizers.adafactor.decay_rate = 0.7" in recipe and "optimizers.adafactor.beta1 = 0.9" in recipe
    assert "\nLEARNING_RATE = 0.5\n" in recipe and "schedules.t5_factors.factors = 'constant * rsqrt_decay'" in recipe
    assert "optimizers.Optimizer.max_grad_norm = 2.0" in recipe
    assert "optimizers.adafactor.weight_decay_rate = 0.01" in recipe
    assert "optimizers.adafactor.decay_vectors = True" in recipe, "T5X's weight decay takes vectors too"
    assert "\nWARMUP_STEPS = 1000\n" in recipe, "T5X's default, not that of optimizers/adafactor.gin"
    assert "step_offset" not in recipe and "'kv_heads': 'column'" in recipe


BOUND = """
from t5x import utils
DECAY = %POWER
POWER = 0.7  # of the step
RATE = 1e-3
adafactor.Adafactor:
    decay_rate = %DECAY
    logical_factor_rules = @adafactor.standard_logical_factor_rules()
    epsilon2 = \\
        0.01
trainer.Trainer.learning_rate_fn = @utils.create_learning_rate_scheduler()
utils.create_learning_rate_scheduler:
    base_learning_rate = %RATE
    factors = \\
        ('constant * linear_warmup * '
         'rsqrt_decay')
    min_learning_rate = 1e-05
"""


def told(tmp_path, config):
    """What a config tells of the optimizer and of its rate."""
    files = SimpleNamespace(config=config, config_file=tmp_path / "config.gin", directory=tmp_path)
    return settings_of(files, Kind(None, True, None)), schedule_of(files)


def test_all_that_a_config_says_is_taken(tmp_path):
    settings, schedule = told(tmp_path, BOUND)
    assert settings == {"decay_rate": 0.7, "epsilon2": 0.01}
    assert schedule == {
        "schedules.t5_factors.factors": "constant * linear_warmup * rsqrt_decay",
        "schedules.t5_factors.min_learning_rate": 1e-5,
        "LEARNING_RATE": 1e-3,
        "WARMUP_STEPS": 1000,
    }


def test_a_line_that_is_a_comment_says_nothing(tmp_path):
    commented = "# adafactor.Adafactor.decay_rate = 0.5\n  # was: learning_rate_fn = @mine.rate()\n#POWER = 0.1\n"
    assert told(tmp_path, BOUND + commented) == told(tmp_path, BOUND)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("0.7  #", "@decays.mine() #", "Adafactor.decay_rate = %DECAY is a reference"),
        ("\n        0.01", "\n        @mine.epsilon()", "Adafactor.epsilon2 = @mine.epsilon.. is a reference"),
        ("RATE = 1e-3", "", "create_learning_rate_scheduler.base_learning_rate = %RATE is a reference"),
        ("1e-05", "@mine.least()", "create_learning_rate_scheduler.min_learning_rate = @mine.least"),
        ("@utils.create_learning_rate_scheduler()", "@mine.rate()", "learning_rate_fn = @mine.rate.. is not T5X's"),
        (
            "@utils.create_learning_rate_scheduler()",
            "\\\n    @mine.rate()",
            "learning_rate_fn = @mine.rate.. is not T5X's",
        ),
        (
            "@utils.create_learning_rate_scheduler()",
            "%RULE\nRULE = @mine.rate()",
            "learning_rate_fn = %RULE is not T5X's",
        ),
    ],
)
def test_what_a_config_does_not_say_is_refused(tmp_path, old, new, said):
    with pytest.raises(UserError, match=f"config.gin: {said}"):
        told(tmp_path, BOUND.replace(old, new))


def test_parameters_alone_keep_their_step(runs, tmp_path):
    """In, and out for T5X: without a state it restores parameters as for inference."""
    convert(str(runs["momentum_native"]), str(tmp_path / "in"))
    assert [path.name for path in (tmp_path / "in" / "checkpoints").iterdir()] == ["1239"]
    convert(str(tmp_path / "in"), str(tmp_path / "out"), family="t5x")
    files = T5XFiles(tmp_path / "out")
    assert files.step == 1239 and sorted(files) == sorted(T5XFiles(runs["momentum_native"]))
    with pytest.raises(UserError, match="has no optimizer state"):
        _ = files.moments
    with pytest.raises(UserError, match="holds no state of Adafactor for all parameters"):
        convert(str(tmp_path / "in"), str(tmp_path / "again"), family="t5x", optimizer_state=True)


def test_large_arrays_are_cut_in_equal_chunks():
    assert chunks_of(Spec((3, 2**23), np.dtype(np.float32))) == [3, 2**22]
    assert chunks_of(Spec((), np.dtype(np.float32))) == []


@pytest.mark.parametrize("size, place", [(64, "checkpoint"), (4096, r"target\.table/")])
def test_a_full_disk_ends_with_the_file_that_could_not_be_written(tmp_path, size, place):
    """A limit on files' sizes stands for it."""
    table = np.random.default_rng(0).normal(size=size).astype(np.float32)
    specs, limits = {"target/table": Spec(table.shape, table.dtype)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    inline = {"state/step": np.zeros(500)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(EnvironmentFailure, match=f"cannot write .*checkpoint_5/{place}: .*File too large"):
            write_native(tmp_path / "checkpoint_5", specs, lambda name: table, inline)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
