"""Beam search, with the length penalty, order and termination of T5X or of transformers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from meshway.framework.inference.decoding import FREE, Decoded, LogitCallback, Progress, Stop, forced_tokens
from meshway.framework.inference.sampling import largest
from meshway.framework.interfaces import Batch, Decodes, Params

NEVER = -1.0e7  # the score of what must not be chosen; finite, so that differences of scores are numbers


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Keeps the likeliest `num_beams` beginnings of each example, and as many of the best that have ended.

    T5X's rules: a hypothesis of n tokens, its end included, scores (sum of log-probabilities) / ((5 + n) / 6)^alpha (Wu
    et al. 2016, eq. 14). The search of an example is over when no beginning can score better than the worst ended one
    any more, or at the greatest length; an example of which none has ended returns its beginnings, with their sums as
    scores.

    Those of transformers' `generate(num_beams=num_beams, length_penalty=alpha)`, whose default is alpha=1.0, with
    early_stopping=False: a hypothesis scores (sum of log-probabilities) / n^alpha. Among the continuations of a step
    only the `num_beams` likeliest may end, and what the greatest length cuts off has ended there. The search is over
    when the likeliest beginning, were it cut off now, would not score better than the worst ended one: one that would
    have come to score better by its length is missed.

    Attributes:
      num_beams: how many are kept, and returned in increasing score: the best is the last.
      alpha: the length penalty; 0 is none.
      rules: "t5x" or "transformers".
      callbacks: change logits [rows, vocab], knowing what was generated so far.
    """

    num_beams: int = 4
    alpha: float = 0.6
    callbacks: Sequence[LogitCallback] = ()
    rules: Literal["t5x", "transformers"] = "t5x"

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError("BeamSearch.num_beams must be 1 or more")
        if self.rules not in ("t5x", "transformers"):
            raise ValueError(f"BeamSearch.rules must be 't5x' or 'transformers', not {self.rules!r}")
        if self.alpha < 0 and self.rules == "t5x":
            raise ValueError("BeamSearch.alpha must not be negative: the search could not know when to stop")

    @property
    def num_decodes(self) -> int:
        """Predictions of each example."""
        return self.num_beams

    def penalty(self, length: jax.Array | int) -> jax.Array:
        """Returns the divisor of the summed log-probability of `length` tokens."""
        return (length if self.rules == "transformers" else (5.0 + length) / 6.0) ** jnp.float32(self.alpha)

    def __call__(
        self,
        model: Decodes,
        params: Params,
        batch: Batch,
        max_length: int,
        stop: Stop,
        ids: jax.Array,
        seed: jax.Array,
        forced: jax.Array | None = None,
    ) -> Decoded:
        """Searches; arguments as those of `sampling.Sampling`. `seed` is not read."""
        del seed
        first, start, cache = model.prefill(params, batch, max_length)
        rows, beams = first.shape[0], self.num_beams
        ids, forced = jnp.repeat(jnp.asarray(ids), beams), forced_tokens(forced, max_length, beams)
        search = _Search(self, model, params, stop, jnp.repeat(start, beams), ids, forced, max_length)
        state = _State(
            made=jnp.zeros((), jnp.int32),
            tokens=jnp.repeat(first, beams, axis=0),
            cache=model.fork(cache, beams),
            # At first all beams are equal: only one may grow.
            live=_hypotheses(rows, beams, max_length)._replace(
                score=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (rows, 1))
            ),
            ended=_hypotheses(rows, beams, max_length),
            open=jnp.ones(rows, bool),
        )
        state = jax.lax.while_loop(
            lambda state: (state.made < max_length) & jnp.any(state.open),
            search.step,
            state,
        )
        none = ~jnp.any(state.ended.score > NEVER / 2, axis=1)
        found = jax.tree.map(lambda ended, live: jnp.where(_like(none, ended), live, ended), state.ended, state.live)
        order = jnp.argsort(found.score, axis=1)
        found = _take(found, order)
        return Decoded(found.tokens, found.lengths, found.log_probs, found.score)


class _Hypotheses(NamedTuple):
    """tokens and log_probs [batch, n, length], lengths [batch, n], score [batch, n]."""

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    score: jax.Array


class _State(NamedTuple):
    """What a step changes: `live` is scored by its sum of log-probabilities, `ended` by that and its length; `open`
    [batch] says which examples are still searched."""

    made: jax.Array
    tokens: jax.Array  # [batch * beams, 1], what is fed next
    cache: Any
    live: _Hypotheses
    ended: _Hypotheses
    open: jax.Array


@dataclasses.dataclass(frozen=True)
class _Search:
    """The constants of one call of `BeamSearch`; start, ids and forced have a row for each beam."""

    how: BeamSearch
    model: Decodes
    params: Params
    stop: Stop
    start: jax.Array
    ids: jax.Array
    forced: jax.Array | None
    max_length: int

    def step(self, state: _State) -> _State:
        beams, index, as_transformers = self.how.num_beams, state.made, self.how.rules == "transformers"
        logits, cache = self.model.decode(self.params, state.tokens, self.start + index, state.cache)
        candidates, parents = self.candidates(self.log_probs(logits, state), state)
        ends = self.stop.ended(candidates.tokens, index)
        possible = state.open[:, None] & (candidates.score > NEVER / 2)
        if as_transformers:
            ends |= index + 1 == self.max_length
            possible &= jnp.arange(ends.shape[1]) < beams
        score = jnp.where(ends & possible, candidates.score / self.how.penalty(index + 1), NEVER)
        ended = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1), state.ended, candidates._replace(score=score)
        )
        ended = _take(ended, _best(ended.score, beams))
        alive = jnp.where(ends, NEVER, candidates.score)
        chosen = _best(alive, beams)
        live = _take(candidates._replace(score=alive), chosen)
        last = jax.lax.dynamic_index_in_dim(live.tokens, index, axis=2, keepdims=False)
        cache = self.model.reorder(cache, jnp.take_along_axis(parents, chosen, axis=1))
        hope = live.score.max(axis=1) / self.how.penalty(index + 1 if as_transformers else self.max_length)
        is_open = state.open & (hope >= ended.score.min(axis=1))
        return _State(index + 1, last.reshape(-1, 1), cache, live, ended, is_open)

    def log_probs(self, logits: jax.Array, state: _State) -> jax.Array:
        """Returns the log-probability of each next token, float32 [batch, beams, vocab]."""
        for callback in self.how.callbacks:
            tokens = state.live.tokens.reshape(-1, self.max_length)
            logits = callback(logits, Progress(state.made, tokens, self.ids))
        log_probs = jax.nn.log_softmax(logits)
        if self.forced is not None:
            token = jax.lax.dynamic_index_in_dim(self.forced, state.made, axis=1)
            allowed = (token == FREE) | (jnp.arange(logits.shape[-1]) == token)
            log_probs = jnp.where(allowed, log_probs, NEVER)
        return log_probs.reshape(-1, self.how.num_beams, logits.shape[-1])

    def candidates(self, log_probs: jax.Array, state: _State) -> tuple[_Hypotheses, jax.Array]:
        """Returns the likeliest continuations of all beams, best first, and which beam each continues [batch, n]."""
        batch, beams, vocab = log_probs.shape
        sums = (state.live.score[..., None] + log_probs).reshape(batch, beams * vocab)
        count = min((1 + self.num_stops) * beams, beams * vocab)
        score, flat = largest(sums, count)
        parents, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        found = _take(state.live, parents)
        new = jnp.take_along_axis(log_probs.reshape(batch, -1), flat, axis=1)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.made, axis=2)
        return (
            _Hypotheses(
                put(found.tokens, token[..., None]),
                put(found.log_probs, new[..., None]),
                jnp.full_like(found.lengths, state.made + 1),
                score,
            ),
            parents,
        )

    @property
    def num_stops(self) -> int:
        """How many continuations of one beam may end it: so many more candidates leave enough that go on."""
        return max(1, len(self.stop.tokens) + len(self.stop.sequences))


def _hypotheses(rows: int, beams: int, length: int) -> _Hypotheses:
    return _Hypotheses(
        jnp.zeros((rows, beams, length), jnp.int32),
        jnp.zeros((rows, beams, length), jnp.float32),
        jnp.zeros((rows, beams), jnp.int32),
        jnp.full((rows, beams), NEVER, jnp.float32),
    )


def _best(score: jax.Array, count: int) -> jax.Array:
    """Returns the places of the best scores [batch, n], in increasing order."""
    return jnp.flip(largest(score, count)[1], axis=1)


def _take(hypotheses: _Hypotheses, index: jax.Array) -> _Hypotheses:
    """Takes hypotheses [batch, n] by index [batch, m]."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1), hypotheses
    )


def _like(flag: jax.Array, x: jax.Array) -> jax.Array:
    """[batch] -> [batch, 1, ...] as broad as x."""
    return flag.reshape(-1, *[1] * (x.ndim - 1))
