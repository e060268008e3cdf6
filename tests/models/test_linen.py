"""A user's own flax.linen module, and a model written for T5X, train as their own loops would, on any layout."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics as clu
from flax import linen as nn
from flax.core import meta
from tiny import greedy, loaded

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.errors import UserError
from meshway.framework.optimizers.optimizers import Optimizer
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.planning.comparison import setting_of
from meshway.framework.training.program import TrainProgram
from meshway.models.linen import Linen, LinenClassifier
from meshway.models.t5x_model import T5XModel, T5XTransformer, as_sums

LENGTHS = {"targets": 12}
VOCAB = 32


def lab():
    return loaded("models/linen_lm.py")


def layout(where, *shared):
    """One device, or eight of a mesh in three ways, `shared` over `model`."""
    if where == "single":
        return Layout(MeshShape(ici={"data": 1}), [("*", None)], [("batch", "data"), ("*", None)])
    rules = [(name, "model") for name in shared]
    # As shipped layouts have it: this module has no heads for keys and values apart.
    keys = [("kv_heads", "model | None")] if "heads" in shared else []
    stored = [*rules, *keys, ("embed", "fsdp"), ("*", None)]
    activations = [("batch", ("data", "fsdp")), *rules, ("*", None)]
    return Layout(MeshShape(ici={"fsdp": 2, "data": 2, "model": 2}), stored, activations)


def made(model, layout, **options):
    return TrainProgram(model, Optimizer(optax.adam, 0.01), layout, 8, LENGTHS, **options)


def batches(program, count):
    """Batches whose rows have different weights."""
    for seed in range(count):
        batch = program.synthetic_batch(seed)
        tokens = np.random.default_rng(seed).integers(1, VOCAB, (8, 13), np.int32)
        weights = np.where(np.arange(12) < np.arange(4, 12)[:, None], 1.0, 0.0).astype(np.float32)
        yield batch | {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_loss_weights": weights,
        }


def trained(program, count=4):
    step, state, losses = program.compile_step(), program.init(), []
    for batch in batches(program, count):
        state, metrics = step(state, program.shard_batch(batch))
        losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    return losses, state


def by_hand(module, loss_of, program, variables, count=4):
    """The loop that a user of Linen and optax writes."""
    params, optimizer, losses = variables["params"], optax.adam(0.01), []
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    for batch in batches(program, count):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses, params


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(found), expected)


@pytest.mark.parametrize("where", [pytest.param("single", marks=pytest.mark.slow), "sharded"])
def test_a_linen_module_trains_as_its_own_loop(where):
    module = lab().Boxed(VOCAB)
    program = made(Linen(module, LENGTHS), layout(where, "vocab", "mlp"))
    if where == "sharded":
        assert program.state_shardings.params["wi"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", "model")
        for pass_ in (lambda *a: program.model.loss(*a, None), lambda *a: program.model.observe(*a, ["wi"])):
            with program.partitioner.activate():
                text = str(jax.make_jaxpr(pass_)(program.param_shapes, program.abstract_batch))
            assert "(('data', 'fsdp'), None, 'model')" in text, "flax's own constraint follows our rules"
        with jax.set_mesh(program.partitioner.mesh), pytest.raises(ValueError, match="a mesh is set but no layout"):
            program.model.loss(program.param_shapes, program.abstract_batch, None)
    losses, state = trained(program)

    def loss_of(params, batch):
        logits = module.apply({"params": params}, batch["decoder_input_tokens"])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["decoder_target_tokens"])
        return jnp.sum(nats * batch["decoder_loss_weights"]) / jnp.sum(batch["decoder_loss_weights"])

    variables = module.init(jax.random.key(0), jnp.ones((1, 12), jnp.int32))
    expected, params = by_hand(module, loss_of, program, meta.unbox(variables))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    close(state.params, params)


@pytest.mark.parametrize("where", ["single", pytest.param("sharded", marks=pytest.mark.slow)])
def test_a_model_of_t5x_trains_as_its_own_loop(where):
    """With the sum of its loss, as T5X's trainer has it."""
    theirs = lab().BaseModel(lab().T5XStyle(VOCAB))
    model = T5XTransformer(theirs, LENGTHS, encoder=False)
    program = made(model, layout(where, "vocab", "heads"), loss_normalizing_factor=None)
    if where == "sharded":
        assert program.state_shardings.params["layers"]["kernel"].spec[-1] == "model", "joined_kv is our heads"
    losses, state = trained(program)
    shape = {"decoder_input_tokens": (1, 12)}
    variables = theirs.get_initial_variables(jax.random.key(0), shape)
    expected, params = by_hand(None, lambda p, batch: theirs.loss_fn(p, batch, None)[0], program, variables)
    weights = [batch["decoder_loss_weights"].sum() for batch in batches(program, 4)]
    np.testing.assert_allclose(losses, np.divide(expected, weights), rtol=1e-5)
    close(state.params, params)


def test_what_a_model_of_t5x_says_is_reported_and_scored():
    theirs, batch = lab().BaseModel(lab().T5XStyle(VOCAB)), None
    model = T5XTransformer(theirs, LENGTHS, encoder=False)
    program = made(model, layout("single"))
    params, batch = program.init().params, next(batches(program, 1))
    loss, weight, metrics = model.loss(params, batch, None)
    assert metrics["nats"] == (loss, weight) and float(metrics["rows"][0]) == 8 and set(metrics) == {"nats", "rows"}
    np.testing.assert_allclose(jnp.sum(model.score(params, batch)), -loss, rtol=1e-6)
    rules = []
    theirs.score_batch = lambda params, batch: (rules.extend(nn.get_logical_axis_rules()), jnp.zeros(8))[1]
    with program.partitioner.activate():
        assert T5XModel(theirs, LENGTHS, encoder=False).score(params, batch).shape == (8, 1)
    assert ("batch", None) in rules, "its constraints are given the layout's rules"
    theirs._loss_normalizing_factor = "NUM_REAL_TARGET_TOKENS"
    with pytest.raises(ValueError, match="bind LOSS_NORMALIZING_FACTOR"):
        T5XModel(theirs, LENGTHS, encoder=False)
    mean = T5XModel(theirs, LENGTHS, encoder=False, loss_is_mean=True)
    np.testing.assert_allclose(mean.loss(params, batch, None)[0], loss * weight, rtol=1e-6)


def test_metrics_of_clu_are_sums_over_counts_or_refused():
    values, mask = np.array([1.0, 2.0, 6.0]), np.array([1, 1, 0])
    mean = clu.Average.from_model_output(values, mask=mask)

    @flax.struct.dataclass
    class Both(clu.Collection):
        mean: clu.Average
        largest: clu.LastValue

    both = Both(mean=mean, largest=clu.LastValue.from_model_output(np.float32(6)), _reduction_counter=None)
    for given in ({"mean": mean, "rows": 3, "pair": (jnp.ones(()), jnp.ones(()))}, both):
        found = as_sums(given)
        assert float(found["mean"][0] / found["mean"][1]) == float(mean.compute()) == 1.5
    assert float(found["largest"][0] / found["largest"][1]) == 6
    for metric in (clu.Std.from_model_output(values), clu.CollectingMetric({"a": values})):
        with pytest.raises(ValueError, match=f"metric 'x' is a {type(metric).__name__}, which is no sum over a count"):
            as_sums({"x": metric})


@pytest.mark.slow
@pytest.mark.parametrize("style", ["Boxed", "T5XStyle"])
def test_predictions_recompute_rows(style):
    """Greedy decoding from prompts of different lengths finds what the module itself says after each prefix."""
    module = getattr(lab(), style)(VOCAB)
    model = Linen(module, LENGTHS)
    params = model.init(jax.random.key(3))
    prompts = np.array([[0, 5, 9, 0], [0, 7, 0, 0]], np.int32)
    lengths = np.array([3, 2])
    batch = {name: np.zeros((2, 4), spec.dtype) for name, spec in model.batch_spec(2, {"targets": 4}).items()}
    batch |= {"decoder_input_tokens": prompts, "decoder_segment_ids": np.int32(np.arange(4) < lengths[:, None])}
    found = np.asarray(greedy(model, params, batch, 5, eos_id=-1))
    for row, length in enumerate(lengths):
        known = list(prompts[row, :length])
        for token in found[row]:
            inputs = np.array([known], np.int32)
            more = {} if style == "Boxed" else {"decoder_target_tokens": np.ones_like(inputs), "enable_dropout": False}
            logits = module.apply({"params": params}, inputs, **more)
            assert int(jnp.argmax(logits[0, -1])) == token
            known.append(token)


def test_dropout_is_drawn_from_the_steps_key():
    program = made(Linen(lab().Boxed(VOCAB, dropout_rate=0.5), LENGTHS), layout("single"))
    model, params, batch = program.model, program.init().params, next(batches(program, 1))
    without, first, second = (
        float(model.loss(params, batch, key)[0]) for key in (None, jax.random.key(1), jax.random.key(2))
    )
    assert len({without, first, second}) == 3 and first == float(model.loss(params, batch, jax.random.key(1))[0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Linen(lab().Boxed(VOCAB, names=("embed",)), LENGTHS).axes(), r"wi/kernel of shape \[16, 32\] has"),
        (lambda: Linen(lab().Boxed(VOCAB), {"targets": 4}, param_axes=[("no", ())]).axes(), "'no' matches no param"),
        (lambda: Linen(lab().Boxed(VOCAB), LENGTHS, param_axes=[("(no", ())]), r"'\(no' is not a regular expression"),
        (lambda: Linen(lab().Boxed(VOCAB), LENGTHS, arguments={"ids": "decoder_positions"}), "no argument 'ids'"),
        (lambda: Linen(lab().Scaled(), LENGTHS), "argument 'x' of Scaled.__call__ is no feature of a batch"),
        (lambda: T5XTransformer(lab().Boxed(VOCAB), LENGTHS), "Boxed has no method get_initial_variables"),
        (
            lambda: made(Linen(lab().Boxed(VOCAB, names=("embed", "mpl")), LENGTHS), layout("single")).state_shardings,
            "'mpl'",
        ),
    ],
)
def test_what_is_missing_is_told_once(wrong, message):
    with pytest.raises((ValueError, UserError), match=message) as told:
        wrong()
    assert str(told.value).count("\n") == 0


def test_axes_by_pattern_stand_before_those_of_the_module():
    model = Linen(lab().Boxed(VOCAB, names=("embed",)), LENGTHS, param_axes=[("wi/.*", ("embed", None))])
    assert model.axes()["wi"]["kernel"] == ("embed", None) and model.axes()["wo"]["kernel"] == ("mlp", "embed")


NORMED_AXES = [("norm/.*", ("mlp",)), (".*/bias", (None,)), ("out/kernel", ("mlp", None))]


def images(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.standard_normal((8, 4, 4)).astype(np.float32),
        "label": random.integers(0, 10, 8, np.int32),
        "loss_weights": np.ones(8, np.float32),
    }


def normed(**options):
    rules = [("mlp", "model"), ("*", None)]
    where = Layout(MeshShape(ici={"data": 4, "model": 2}), rules, [("batch", "data"), ("mlp", "model"), ("*", None)])
    model = LinenClassifier(lab().Normed(), (4, 4), param_axes=NORMED_AXES, collections=["batch_stats"])
    return TrainProgram(model, Optimizer(optax.adam, 0.01), where, 8, {}, **options)


def test_a_loss_in_training_may_be_asked_for_without_the_statistics_that_it_updates():
    """As `meshway bench parallel` and `meshway inspect` ask for it."""
    program = normed()
    assert setting_of(program).mesh == {"data": 4, "model": 2}
    params, key = program.model.init(jax.random.key(0)), jax.random.key(1)
    found = program.model.loss(params, images(0), key)[0]
    assert found == program.model.loss_and_updates(params, images(0), key)[0]


def test_a_module_is_traced_once_for_its_shapes(monkeypatch):
    model, made = normed().model, []  # whose program has asked for both
    monkeypatch.setattr(type(model), "initial_variables", lambda self, rng: made.append(rng))
    assert model.axes()["norm"]["scale"] == ("mlp",) and model.untrained() and not made


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_batch_statistics_are_updated_as_by_ones_own_loop(microbatches, tmp_path):
    """Microbatches hand them on one to the next, as T5X's do; a step that is left out leaves them; they are saved."""
    program, module = normed(num_microbatches=microbatches), lab().Normed()
    statistics = {"batch_stats/norm/mean", "batch_stats/norm/var"}
    assert program.model.untrained() == statistics and not statistics & program.optimizer.trainable
    step, state = program.compile_step(), program.init()
    variables = meta.unbox(module.init(jax.random.key(0), jnp.ones((1, 4, 4))))
    params, stats, optimizer = variables["params"], variables["batch_stats"], optax.adam(0.01)
    moments = optimizer.init(params)

    def loss_of(params, stats, batch):
        total = 0.0
        for at in range(microbatches):
            part = {name: value[at::microbatches] for name, value in batch.items()}
            logits, new = module.apply(
                {"params": params, "batch_stats": stats}, part["image"], train=True, mutable=["batch_stats"]
            )
            stats = new["batch_stats"]
            total += jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, part["label"]))
        return total / 8, stats

    gradient_of = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    for seed in range(3):
        state, metrics = step(state, program.shard_batch(images(seed)))
        (loss, stats), gradients = gradient_of(params, stats, images(seed))
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-5)
        assert "variables" not in metrics
    close(state.params, {**params, "batch_stats": stats})
    logits = module.apply({"params": params, "batch_stats": stats}, images(9)["image"])
    score = jnp.take_along_axis(jax.nn.log_softmax(logits), images(9)["label"][:, None], axis=1)
    np.testing.assert_allclose(program.model.score(jax.device_get(state.params), images(9)), score, rtol=1e-4)
    before = jax.device_get(state.params)
    state, _ = step(state, program.shard_batch(images(4) | {"loss_weights": np.full(8, np.inf, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 4, {}, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(4, program.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_batch_statistics_must_be_asked_for():
    with pytest.raises(ValueError, match=r"bind linen.Linen.collections = \('batch_stats',\)"):
        LinenClassifier(lab().Normed(), (4, 4), param_axes=NORMED_AXES).axes()
