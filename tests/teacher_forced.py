"""What a tiny model makes of given targets: through its cache, from prompts of different lengths, and at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, and what of it is read first.

    Attributes:
      batch: rows in full.
      prompt: what a prefill reads of them.
      targets: int32 [rows, steps], what is then fed, one by one.
      places: int32 [rows, steps], where each of the targets is predicted in the full row.
      real: bool [rows, steps], whether the row goes so far.
    """

    batch: dict
    prompt: dict
    targets: np.ndarray
    places: np.ndarray
    real: np.ndarray


def case(made, prefix=False):
    """Returns rows of random tokens. Prompts have 1, 2 ... 8 tokens, from which each row goes on to its end; encoders'
    inputs are of different lengths. With `prefix` the tokens of a prompt see each other both ways."""
    batch = {name: np.array(x) for name, x in made.synthetic_batch().items()}
    tokens = batch["decoder_target_tokens"]
    rows, length = tokens.shape
    batch["decoder_input_tokens"] = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    if "encoder_segment_ids" in batch:
        inputs = batch["encoder_segment_ids"]
        inputs[:] = np.arange(inputs.shape[1]) < (3 + 5 * np.arange(rows) % 20)[:, None]
        places = np.broadcast_to(np.arange(length), tokens.shape)
        return Case(batch, batch, tokens, places, places >= 0)
    prompts = (1 + np.arange(rows) % 8)[:, None]
    read = (np.arange(length) < prompts).astype(np.int32)
    if prefix:
        batch["decoder_prefix_mask"] = read
    prompt = batch | {"decoder_segment_ids": read, "decoder_input_tokens": batch["decoder_input_tokens"] * read}
    places = prompts - 1 + np.arange(length)
    real, places = places < length, np.minimum(places, length - 1)
    return Case(batch, prompt, np.take_along_axis(tokens, places, axis=1), places, real)


def log_probs_at_once(made, params, case):
    """Returns the log-probability of every token at each target's place, float32 [rows, steps, vocab]."""
    logits = jax.jit(lambda params, batch: made.model.logits(params, batch, None))(params, case.batch)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), case.places[..., None], axis=1)


def log_probs_through_cache(made, params, case):
    """As `log_probs_at_once`, one step of decoding for each target, under the program's layout."""
    model, steps = made.model, case.targets.shape[1]

    def decode(params, prompt, targets):
        tokens, start, cache = model.prefill(params, prompt, steps)

        def advance(carry, inputs):
            tokens, cache = carry
            index, target = inputs
            logits, cache = model.decode(params, tokens, start + index, cache)
            return (target[:, None], cache), jax.nn.log_softmax(logits)

        return jnp.swapaxes(jax.lax.scan(advance, (tokens, cache), (jnp.arange(steps), targets.T))[1], 0, 1)

    with made.partitioner.activate():
        placed = jax.device_put(params, made.state_shardings.params)
        return np.asarray(jax.jit(decode)(placed, made.shard_batch(case.prompt), case.targets))


def assert_same(made, params, case, wanted):
    """Compares what comes through the cache with what comes at once, at every place."""
    found = log_probs_through_cache(made, params, case)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found[case.real], wanted[case.real], rtol=0, atol=1e-5)
