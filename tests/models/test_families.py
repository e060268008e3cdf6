"""Every family decodes with a cache what it scores in full; what a family's recipe turns on has its effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DECODERS, program

from meshway.framework.errors import UserError
from meshway.framework.trees import map_paths
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

LENGTH, PROMPT = 7, 3
VARIANTS = {  # of the language model: ways to know places that no family above ships
    "alibi": ("lm", "ROTARY=None", "attention.Attention.alibi=True"),
    "yarn": ("lm", "ROPE_SCALING=@rotary.YaRN()", "rotary.YaRN.factor=4.0", "rotary.YaRN.original_length=8"),
    "rerope": ("llama", "ROTARY=@rotary.ReRoPE()", "rotary.ReRoPE.window=3", "rotary.ReRoPE.base=%ROPE_BASE"),
    "partial_rotary": ("lm", "rotary.Rotary.fraction=0.5"),
    "bloom": (
        "gpt2",
        "lm.LanguageModel.position_embedding=None",
        "lm.LanguageModel.embedding_norm=@norm.LayerNorm",
        "attention.Attention.alibi=True",
    ),
    "gpt_j": ("palm", "lm.LanguageModel.logits_bias=True", "TIED_LOGITS=False"),
    "tied_bias": ("qwen3", "lm.LanguageModel.logits_bias=True"),
    "sinks": ("llama", "attention.Attention.sinks=True", "WINDOW=3"),
}
LENGTHS = {  # gin/lengths/: what its files ask for
    "linear": ("LENGTH_FACTOR=2.0",),
    "ntk": ("LENGTH_FACTOR=50.0",),
    "rerope": ("REROPE_WINDOW=2",),
    "yarn": ("LENGTH_FACTOR=2.0", "ORIGINAL_LENGTH=4"),
}


def made(family, *bindings, seed=0):
    """Returns a tiny model, parameters in which no scale, bias or sink is at its start, and a batch."""
    built = program(family, f"TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}", "BATCH_SIZE=2", *bindings)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 0.3 if leaf.ndim < 3 or "embedding" in jax.tree_util.keystr(path) else leaf.shape[1] ** -0.5
        return random.normal(0.2, scale, leaf.shape).astype(np.float32)

    return built.model, jax.tree_util.tree_map_with_path(draw, built.param_shapes), built.synthetic_batch()


def decoded(model, params, batch):
    """Returns the logits of the places from the prompt's last on, each from one step of decoding by layer."""
    stacked = set(model.stacked())
    params = map_paths(lambda path, leaf: tuple(leaf) if path in stacked else leaf, params)
    prompt = {name: x[:, :PROMPT] for name, x in batch.items()}
    _, last, cache = model.prefill(params, prompt, LENGTH - PROMPT)
    assert last.tolist() == [PROMPT - 1] * 2
    found = []
    for place in range(PROMPT - 1, LENGTH):
        tokens = batch["decoder_input_tokens"][:, place : place + 1]
        logits, cache = model.decode(params, tokens, jnp.full((2,), place), cache)
        found.append(logits)
    return jnp.stack(found, axis=1)


SLOW = (
    "alibi",
    "bloom",
    "chinchilla",
    "gemma2",
    "gemma3",
    "gpt_j",
    "llama",
    "mistral",
    "palm",
    "partial_rotary",
    "qwen2_5",
    "qwen3",
    "rerope",
    "sinks",
    "t5x_decoder",
    "tied_bias",
    "yarn",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in (*DECODERS, *VARIANTS)]
)
def test_decoding_with_a_cache_is_the_full_forward_pass(name):
    model, params, batch = made(*VARIANTS.get(name, (name,)))
    full = np.asarray(model.logits(params, batch, None))
    assert np.abs(full).max() > 0.1
    np.testing.assert_allclose(decoded(model, params, batch), full[:, PROMPT - 1 :], atol=1e-5 * np.abs(full).max())


def test_learned_positions_are_not_exceeded():
    model, params, batch = made("gpt2", "NUM_POSITIONS=6")
    with pytest.raises(ValueError, match="rows of 7 tokens are longer than the 6 positions that were learned"):
        model.logits(params, batch, None)
    prompt = {name: x[:, :PROMPT] for name, x in batch.items()}
    with pytest.raises(ValueError, match="rows of 8 tokens"):
        model.prefill(params, prompt, 5)


def test_learned_positions_count_in_their_segment():
    """The same text gets the same logits as the second of two segments, where its places in the row are others."""
    model, params, batch = made("gpt2")
    batch = {name: np.array(x) for name, x in batch.items()}
    alone = {name: x[:, 3:] for name, x in batch.items()}
    alone["decoder_positions"] = alone["decoder_positions"] - 3
    batch["decoder_segment_ids"][:, 3:], batch["decoder_positions"][:, 3:] = 2, alone["decoder_positions"]
    np.testing.assert_allclose(
        model.logits(params, batch, None)[:, 3:], model.logits(params, alone, None), rtol=1e-4, atol=1e-5
    )


def test_gemma_scales_what_it_embeds_and_caps_its_logits():
    model, params, batch = made("gemma2")
    logits = model.logits(params, batch, None)
    bound, _, _ = made("gemma2", "LOGITS_SOFT_CAP=0.5")
    uncapped, _, _ = made("gemma2", "LOGITS_SOFT_CAP=None")
    raw = uncapped.logits(params, batch, None)
    np.testing.assert_allclose(bound.logits(params, batch, None), 0.5 * jnp.tanh(raw / 0.5), rtol=1e-4, atol=1e-6)
    unscaled, _, _ = made("gemma2", "lm.LanguageModel.scale_embedding=False", "lm.LanguageModel.scale_tied_logits=True")
    table = params["token_embedding"]["embedding"]
    scaled = params | {"token_embedding": {"embedding": table * 8.0}}  # sqrt(d_model) of 64
    np.testing.assert_allclose(unscaled.logits(scaled, batch, None), logits, rtol=1e-3, atol=1e-5)


def test_a_window_and_its_pattern_hide_what_is_far():
    """One local layer sees WINDOW tokens; a global one beside it sees all."""
    alone = ("NUM_LAYERS=1", "WINDOW=4")
    for family, bindings, far in (("mistral", alone, False), ("gemma2", alone, False), ("gemma2", ("WINDOW=4",), True)):
        model, params, batch = made(family, *bindings)
        changed = dict(batch, decoder_input_tokens=np.array(batch["decoder_input_tokens"]))
        changed["decoder_input_tokens"][:, 0] += 1
        difference = np.abs(model.logits(params, changed, None) - model.logits(params, batch, None)).max(axis=(0, 2))
        assert difference[:4].min() > 1e-4
        assert (difference[4:].max() > 1e-4) == far, family


def test_a_cap_of_nothing():
    with pytest.raises(UserError, match="LOGITS_SOFT_CAP = 0.0, taken by .*logits_soft_cap: it must be above 0"):
        made("gemma2", "LOGITS_SOFT_CAP=0.0")


@pytest.mark.parametrize("name", sorted(LENGTHS))
def test_a_scheme_for_long_rows_changes_scores_and_no_parameter(name):
    """The files of gin/lengths/, given beside a model's as they would be to evaluate it."""
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=("models/lm/tiny.gin", "optimizers/sgd.gin", f"lengths/{name}.gin"),
        bindings=(*LENGTHS[name], "bench.train.measure.program=%MODEL", "VOCAB_SIZE=256"),
    )
    model = config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    model.axes()  # builds it, while the process has its recipe
    plain, params, batch = made("lm", "NUM_LAYERS=2")
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    changed = jnp.abs(model.logits(params, batch, None) - plain.logits(params, batch, None)).max(axis=(0, 2))
    same = 3 if name == "rerope" else 1  # places that see no distance which the scheme changes
    assert changed[:same].max() < 1e-5
    assert changed[same:].min() > 2e-5 and changed[-1] > 1e-3
