"""Beam search, with the length penalty, order and termination of T5X or of transformers.

Searches of a batch advance together and may stand at different places: each has its own number of beams, length penalty
and greatest length (`SearchState`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    def penalty(self, length: jax.Array | int, alpha: jax.Array) -> jax.Array:
        """Returns the divisor of the summed log-probability of `length` tokens."""
        return (length if self.rules == "transformers" else (5.0 + length) / 6.0) ** alpha

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
        searching = jax.lax.while_loop(
            lambda searching: jnp.any(searching.open),
            lambda searching: self.step(model, params, stop, searching),
            self.begin(model, params, batch, max_length, ids, forced),
        )
        return hypotheses(searching)

    def begin(
        self,
        model: Decodes,
        params: Params,
        batch: Batch,
        max_length: int,
        ids: jax.Array,
        forced: jax.Array | None = None,
        spare: int = 0,
    ) -> "SearchState":
        """Reads inputs; arguments as those of a call, and `spare` positions more that the cache is to have. Each `step`
        then adds a token to every beam of the searches that are open."""
        first, start, cache = model.prefill(params, batch, max_length + spare)
        rows, beams = first.shape[0], self.num_beams
        none = _none_yet(rows, beams, max_length)
        return SearchState(
            start=start,
            forced=forced_tokens(forced, max_length, 1),
            ids=jnp.asarray(ids),
            num_beams=jnp.full(rows, beams, jnp.int32),
            alpha=jnp.full(rows, self.alpha, jnp.float32),
            limit=jnp.full(rows, max_length, jnp.int32),
            made=jnp.zeros(rows, jnp.int32),
            tokens=jnp.repeat(first, beams, axis=0),
            cache=model.fork(cache, beams),
            # At first all beams are equal: only one may grow.
            live=none._replace(score=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (rows, 1))),
            ended=none,
            open=jnp.full(rows, max_length > 0),
        )

    def step(self, model: Decodes, params: Params, stop: Stop, at: "SearchState") -> "SearchState":
        """Adds a token to every beam of the searches that are open; the others stay as they are, but for the cache."""
        beams, as_transformers, length = self.num_beams, self.rules == "transformers", at.made + 1
        logits, cache = model.decode(params, at.tokens, jnp.repeat(at.start + at.made, beams), at.cache)
        candidates, parents = self._candidates(self._log_probs(logits, at), at, stop)
        ends, places = stop.ended(candidates.tokens, at.made[:, None]), jnp.arange(parents.shape[1])
        possible = at.open[:, None] & (candidates.score > NEVER / 2)
        if as_transformers:
            ends |= (length == at.limit)[:, None]
            possible &= places < at.num_beams[:, None]
        score = jnp.where(ends & possible, candidates.score / self.penalty(length, at.alpha)[:, None], NEVER)
        ended = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1), at.ended, candidates._replace(score=score)
        )
        used = jnp.arange(beams) >= beams - at.num_beams[:, None]  # the best are the last
        ended = _only(used, _take(ended, _best(ended.score, beams)))
        alive = jnp.where(ends, NEVER, candidates.score)
        chosen = _best(alive, beams)
        live = _only(used, _take(candidates._replace(score=alive), chosen))
        cache = model.reorder(cache, jnp.take_along_axis(parents, chosen, axis=1))
        hope = live.score.max(axis=1) / self.penalty(length if as_transformers else at.limit, at.alpha)
        worst = jnp.where(used, ended.score, jnp.inf).min(axis=1)
        last = jnp.broadcast_to(at.made[:, None, None], (*live.score.shape, 1))
        return at._replace(
            made=at.made + at.open,
            tokens=jnp.take_along_axis(live.tokens, last, axis=2, mode="clip").reshape(-1, 1),
            cache=cache,
            live=jax.tree.map(lambda new, old: jnp.where(_like(at.open, new), new, old), live, at.live),
            ended=ended,
            open=at.open & (hope >= worst) & (length < at.limit),
        )

    def _log_probs(self, logits: jax.Array, at: "SearchState") -> jax.Array:
        """Returns the log-probability of each next token, float32 [batch, beams, vocab]."""
        for callback in self.callbacks:
            tokens = at.live.tokens.reshape(logits.shape[0], -1)
            # Of searches that begin together, those that are still open have made the most.
            logits = callback(logits, Progress(at.made.max(), tokens, jnp.repeat(at.ids, self.num_beams)))
        log_probs = jax.nn.log_softmax(logits).reshape(-1, self.num_beams, logits.shape[-1])
        if at.forced is None:
            return log_probs
        token = jnp.take_along_axis(at.forced, at.made[:, None], axis=1, mode="clip")[..., None]
        return jnp.where((token == FREE) | (jnp.arange(logits.shape[-1]) == token), log_probs, NEVER)

    def _candidates(self, log_probs: jax.Array, at: "SearchState", stop: Stop) -> tuple["_Hypotheses", jax.Array]:
        """Returns the likeliest continuations of all beams, best first, and which beam each continues [batch, n]."""
        batch, beams, vocab = log_probs.shape
        sums = (at.live.score[..., None] + log_probs).reshape(batch, beams * vocab)
        # As many continuations of a beam may end it as there are ends: so many more leave enough that go on.
        each = 1 + max(1, len(stop.tokens) + len(stop.sequences))
        score, flat = largest(sums, min(each * beams, beams * vocab))
        parents, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        known = _take(at.live, parents)
        new = jnp.take_along_axis(log_probs.reshape(batch, -1), flat, axis=1)
        here = jnp.arange(known.tokens.shape[-1]) == at.made[:, None, None]
        return (
            _Hypotheses(
                jnp.where(here, token[..., None], known.tokens),
                jnp.where(here, new[..., None], known.log_probs),
                jnp.broadcast_to(at.made[:, None] + 1, token.shape),
                jnp.where(jnp.arange(score.shape[1]) < each * at.num_beams[:, None], score, NEVER),
            ),
            parents,
        )


class _Hypotheses(NamedTuple):
    """tokens and log_probs [batch, n, length], lengths [batch, n], score [batch, n]."""

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    score: jax.Array


class SearchState(NamedTuple):
    """Unfinished searches, one an example.

    Attributes:
      start: [batch], the position of the first predicted token.
      forced: [batch, length], tokens to begin with, FREE where they are any; None without any.
      ids: [batch], of the example.
      num_beams: [batch], how many beams a search has, of those there is room for.
      alpha: float32 [batch], the length penalty.
      limit: [batch], the most tokens of a prediction.
      made: [batch], how many tokens the beams of an example have so far.
      tokens: [batch * beams, 1], what is fed next.
      cache: of the model.
      live: the beams, scored by their sums of log-probabilities, in increasing order.
      ended: the best that have ended, scored by that and their length, in increasing order.
      open: bool [batch], which examples are still searched.
    """

    start: jax.Array
    forced: jax.Array | None
    ids: jax.Array
    num_beams: jax.Array
    alpha: jax.Array
    limit: jax.Array
    made: jax.Array
    tokens: jax.Array
    cache: Any
    live: _Hypotheses
    ended: _Hypotheses
    open: jax.Array


def hypotheses(at: SearchState) -> Decoded:
    """Returns the hypotheses of searches, in increasing score; those that there are not have a score of NEVER."""
    none = ~jnp.any(at.ended.score > NEVER / 2, axis=1)
    kept = jax.tree.map(lambda ended, live: jnp.where(_like(none, ended), live, ended), at.ended, at.live)
    kept = _take(kept, jnp.argsort(kept.score, axis=1))
    return Decoded(kept.tokens, kept.lengths, kept.log_probs, kept.score)


def best_first(scores: Sequence[float] | np.ndarray) -> list[int]:
    """Returns the places of the decodes of an example, the best first, without what a search did not find: fewer
    hypotheses than there are beams may have ended."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [place for place in order if scores[place] > NEVER / 2] or order[:1]


def _none_yet(rows: int, beams: int, length: int) -> _Hypotheses:
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


def _only(used: jax.Array, hypotheses: _Hypotheses) -> _Hypotheses:
    """Gives hypotheses [batch, n] that are not `used` [batch, n] a score of NEVER."""
    return hypotheses._replace(score=jnp.where(used, hypotheses.score, NEVER))


def _like(flag: jax.Array, x: jax.Array) -> jax.Array:
    """[batch] -> [batch, 1, ...] as broad as x."""
    return flag.reshape(-1, *[1] * (x.ndim - 1))
