"""Drawing predictions token by token; greedy search is temperature 0."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshway.framework.inference import filters
from meshway.framework.inference.decoding import Decoded, LogitCallback, Progress, Stop, prompts
from meshway.framework.interfaces import Batch, Model, Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: penalties, callbacks, temperature, top-k, top-p, min-p, in this order.

    Attributes:
      temperature: divides logits; 0 takes the likeliest token.
      top_k, top_p, min_p: see `filters`; 0, 1 and 0 are none.
      repetition_penalty, presence_penalty, frequency_penalty: see `filters.penalize`; 1, 0 and 0 are none.
      num_decodes: predictions of each example.
      callbacks: change logits [rows, vocab], knowing what was generated so far.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_decodes: int = 1
    callbacks: Sequence[LogitCallback] = ()

    def __post_init__(self) -> None:
        wrong = {
            "temperature must not be negative": self.temperature < 0,
            "top_k must not be negative": self.top_k < 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "min_p must be at least 0 and below 1": not 0 <= self.min_p < 1,
            "repetition_penalty must be positive": self.repetition_penalty <= 0,
            "num_decodes must be 1 or more": self.num_decodes < 1,
        }
        for problem, is_so in wrong.items():
            if is_so:
                raise ValueError(f"Sampling.{problem}")

    @property
    def penalizes(self) -> bool:
        """Whether what was generated before matters."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def __call__(
        self,
        model: Model,
        params: Params,
        batch: Batch,
        max_length: int,
        stop: Stop,
        ids: jax.Array,
        seed: jax.Array,
        forced: jax.Array | None = None,
    ) -> Decoded:
        """Draws predictions. A row's depend on its own inputs, its id and the seed: not on its place or neighbours.

        Args:
          model: decodes with a cache.
          params: its parameters.
          batch: inputs or prompts, as `model.prefill` reads them.
          max_length: the most tokens of a prediction.
          stop: what ends one.
          ids: int32 [batch], what tells examples apart; the randomness of a token is that of (seed, id, which decode of
            the example, place).
          seed: a random key.
          forced: int32 [batch, n], tokens that predictions must begin with, 0 where they are free.
        """
        first, start, cache = model.prefill(params, batch, max_length)
        rows, decodes = first.shape[0], self.num_decodes
        if decodes > 1:
            cache = model.fork(cache, decodes)
            first, start = jnp.repeat(first, decodes, axis=0), jnp.repeat(start, decodes, axis=0)
        drawing = _Drawing(self, model, params, stop, start, _forced(forced, max_length, decodes), ids, seed)
        state = drawing.run(first, cache, max_length, batch)
        shape = (rows, decodes, max_length)
        log_probs = state.log_probs.reshape(shape)
        return Decoded(state.output.reshape(shape), state.lengths.reshape(shape[:2]), log_probs, log_probs.sum(-1))


class _State(NamedTuple):
    """What a step changes.

    Attributes:
      made: how many tokens there are.
      tokens: [rows, 1], what is fed next.
      cache: the model's.
      output, log_probs: [rows, length].
      lengths: [rows].
      done: bool [rows].
      generated: int32 [rows, vocab], counts; None without penalties.
    """

    made: jax.Array
    tokens: jax.Array
    cache: Any
    output: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    done: jax.Array
    generated: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """One call of `Sampling`: what no step changes."""

    sampling: Sampling
    model: Model
    params: Params
    stop: Stop
    start: jax.Array
    forced: jax.Array | None
    ids: jax.Array
    seed: jax.Array

    def run(self, first: jax.Array, cache: Any, max_length: int, batch: Batch) -> _State:
        rows, prompted, generated = first.shape[0], None, None
        if self.sampling.penalizes:
            vocab = jax.eval_shape(self.model.decode, self.params, first, self.start, cache)[0].shape[-1]
            generated = jnp.zeros((rows, vocab), jnp.int32)
            prompted = _held(prompts(batch), vocab, self.sampling.num_decodes, rows)
        state = _State(
            jnp.zeros((), jnp.int32),
            first,
            cache,
            jnp.zeros((rows, max_length), jnp.int32),
            jnp.zeros((rows, max_length), jnp.float32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, bool),
            generated,
        )
        return jax.lax.while_loop(
            lambda state: (state.made < max_length) & ~jnp.all(state.done),
            lambda state: self.step(state, prompted),
            state,
        )

    def step(self, state: _State, prompted: jax.Array | None) -> _State:
        logits, cache = self.model.decode(self.params, state.tokens, self.start + state.made, state.cache)
        chosen = self.choose(logits, state, prompted)
        if self.forced is not None:
            forced = jax.lax.dynamic_index_in_dim(self.forced, state.made, axis=1, keepdims=False)
            chosen = jnp.where(forced != 0, forced, chosen)
        chosen = jnp.where(state.done, 0, chosen)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)
        log_prob = jnp.where(state.done[:, None], 0.0, log_prob)
        output = jax.lax.dynamic_update_slice_in_dim(state.output, chosen[:, None], state.made, axis=1)
        generated = state.generated
        if generated is not None:
            generated = generated.at[jnp.arange(chosen.shape[0]), chosen].add(~state.done)
        return _State(
            state.made + 1,
            chosen[:, None],
            cache,
            output,
            jax.lax.dynamic_update_slice_in_dim(state.log_probs, log_prob, state.made, axis=1),
            state.lengths + ~state.done,
            state.done | self.stop.ended(output, state.made),
            generated,
        )

    def choose(self, logits: jax.Array, state: _State, prompted: jax.Array | None) -> jax.Array:
        """Returns the next token of each row, int32 [rows]."""
        how, decodes = self.sampling, self.sampling.num_decodes
        if state.generated is not None and prompted is not None:
            penalties = (how.repetition_penalty, how.presence_penalty, how.frequency_penalty)
            logits = filters.penalize(logits, state.generated, prompted, *penalties)
        for callback in how.callbacks:
            logits = callback(logits, Progress(state.made, state.output, jnp.repeat(self.ids, decodes)))
        if how.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filters.top_k(logits / how.temperature, how.top_k)
        if how.top_p < 1:
            logits = filters.top_p(logits, how.top_p)
        if how.min_p > 0:
            logits = filters.min_p(logits, how.min_p)

        def draw(id: jax.Array, decode: jax.Array, logits: jax.Array) -> jax.Array:
            key = self.seed
            for part in (id, decode, state.made):
                key = jax.random.fold_in(key, part)
            return jax.random.categorical(key, logits).astype(jnp.int32)

        examples = self.ids.shape[0]
        return jax.vmap(draw)(jnp.repeat(self.ids, decodes), jnp.tile(jnp.arange(decodes), examples), logits)


def _forced(forced: jax.Array | None, max_length: int, decodes: int) -> jax.Array | None:
    if forced is None:
        return None
    room = jnp.zeros((forced.shape[0], max_length), jnp.int32)
    return jnp.repeat(room.at[:, : forced.shape[1]].set(forced[:, :max_length]), decodes, axis=0)


def _held(tokens: jax.Array | None, vocab: int, decodes: int, rows: int) -> jax.Array:
    """Returns which tokens each row of `tokens` holds, 0 apart: bool [rows, vocab]."""
    if tokens is None:
        return jnp.zeros((rows, vocab), bool)
    held = jnp.zeros((tokens.shape[0], vocab), bool)
    held = held.at[jnp.arange(tokens.shape[0])[:, None], tokens].set(True).at[:, 0].set(False)
    return jnp.repeat(held, decodes, axis=0)
