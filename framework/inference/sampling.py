"""Draws predictions token by token, after filters and penalties over logits; greedy search is temperature 0.

Settings are numbers, or arrays [rows] with one number a row. A filter sets the logits that it leaves out to -inf.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshway.framework.axes import placement
from meshway.framework.inference.decoding import FREE, Decoded, LogitCallback, Progress, Stop, forced_tokens, prompts
from meshway.framework.interfaces import Batch, Decodes, Params

Setting = float | jax.Array


def penalize(
    logits: jax.Array,
    generated: jax.Array,
    prompted: jax.Array,
    repetition: Setting = 1.0,
    presence: Setting = 0.0,
    frequency: Setting = 0.0,
) -> jax.Array:
    """Lowers the logits of tokens that have occurred before.

    Args:
      logits: float32 [rows, vocab].
      generated: int32 [rows, vocab], how often each token was generated so far.
      prompted: bool [rows, vocab], whether the prompt holds it.
      repetition: divides positive logits, and multiplies negative ones, of what was generated or prompted (Keskar et
        al. 2019, section 4.1); 1 is none.
      presence, frequency: subtracted once, and once for every time, from what was generated; 0 is none.
    """
    repetition = _column(repetition)
    known = prompted | (generated > 0)
    logits = jnp.where(known, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - _column(frequency) * generated - _column(presence) * (generated > 0)


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest of each row of x [batch, n], the largest first, and their indices, [batch, k] both.

    Like `lax.top_k`, for which XLA would gather all rows on every device: here each device takes its own rows.
    """

    def find(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, places = jax.lax.top_k(x, k)
        return values, places

    where = placement(("batch", None), x.shape)
    if where is not None and where.mesh.size > 1:
        specs = (where.spec, where.spec)
        find = jax.shard_map(find, mesh=where.mesh, in_specs=where.spec, out_specs=specs, check_vma=False)
    return find(x)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest logits of each row, and those equal to the last of them; k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    least = largest(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def top_p(logits: jax.Array, p: Setting, ordered: jax.Array | None = None) -> jax.Array:
    """Keeps the fewest tokens whose probabilities sum to at least p, and those as likely as the last of them (nucleus
    sampling, Holtzman et al. 2020, eq. 2); `ordered` are the logits, the largest first, where that is known."""
    ordered = jnp.sort(logits, axis=-1, descending=True) if ordered is None else ordered
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    least = jnp.min(jnp.where(before < _column(p), ordered, jnp.inf), axis=-1, keepdims=True)
    # The likeliest token is kept for any p.
    return jnp.where(logits >= jnp.minimum(least, ordered[..., :1]), logits, -jnp.inf)


def min_p(logits: jax.Array, p: Setting) -> jax.Array:
    """Keeps tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits >= least, logits, -jnp.inf)


def filtered(logits: jax.Array, k: int | jax.Array, p: Setting, least: Setting) -> jax.Array:
    """Keeps what `top_k`, then `top_p`, then `min_p` keep; settings of 0, 1 and 0 keep all.

    Args:
      logits: float32 [rows, vocab].
      k, p, least: of these three; numbers, or arrays [rows] all of them: logits are then sorted, whatever the settings.
    """
    if not isinstance(k, jax.Array):
        logits = top_k(logits, k)
        if p < 1:
            logits = top_p(logits, p)
        return min_p(logits, least) if least > 0 else logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    place = jnp.clip(k, 1, logits.shape[-1])[:, None] - 1
    kth = jnp.where(k[:, None] > 0, jnp.take_along_axis(ordered, place, axis=-1), -jnp.inf)
    logits, ordered = (jnp.where(x >= kth, x, -jnp.inf) for x in (logits, ordered))
    # Where p is 1, rounded sums of shares could leave out the least likely.
    logits = jnp.where(_column(p) < 1, top_p(logits, p, ordered), logits)
    return min_p(logits, least)


def draw(logits: jax.Array, keys: jax.Array, made: jax.Array) -> jax.Array:
    """Draws a token of each row, int32 [rows], from logits [rows, vocab]; `keys` [rows] are the rows' own, and `made`,
    int32 scalar or [rows], says how many tokens each has so far."""

    def one(key: jax.Array, made: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, made), logits).astype(jnp.int32)

    return jax.vmap(one)(keys, jnp.broadcast_to(made, keys.shape), logits)


def row_key(seed: jax.Array, id: jax.Array | int, decode: jax.Array) -> jax.Array:
    """Returns the random key of a prediction: `decode` of example `id`, under a key made of the seed."""
    return jax.random.fold_in(jax.random.fold_in(seed, id), decode)


def _column(setting: Setting) -> jax.Array:
    return jnp.asarray(setting, jnp.float32).reshape(-1, 1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: penalties, callbacks, temperature, top-k, top-p, min-p, in this order.

    Attributes:
      temperature: divides logits; 0 takes the likeliest token.
      top_k, top_p, min_p: see the functions of these names; 0, 1 and 0 are none.
      repetition_penalty, presence_penalty, frequency_penalty: see `penalize`; 1, 0 and 0 are none.
      num_decodes: predictions of each example.
      callbacks: change logits [rows, vocab], knowing what was generated so far.
      rescale_log_probs: whether log-probabilities, and so scores, are those of the distribution that tokens are drawn
        from, as T5X's are: 0 for the likeliest token at temperature 0, and for a token that was forced. If not, they
        are the model's.
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
    rescale_log_probs: bool = False

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
        model: Decodes,
        params: Params,
        batch: Batch,
        max_length: int,
        stop: Stop,
        ids: jax.Array,
        seed: jax.Array,
        forced: jax.Array | None = None,
    ) -> Decoded:
        """Draws predictions. Those of a row depend on its inputs, its id and the seed, not on its place or neighbours.

        Args:
          model: decodes with a cache.
          params: its parameters.
          batch: inputs or prompts, as `model.prefill` reads them.
          max_length: maximal tokens of a prediction.
          stop: what ends one.
          ids: int32 [batch], a number for each example; a token's random key is made of (seed, id, which decode of the
            example, position).
          seed: a random key.
          forced: int32 [batch, n], tokens that predictions must begin with, FREE (-1) where they are any.
        """
        drawing = jax.lax.while_loop(
            lambda drawing: (drawing.made < max_length) & ~jnp.all(drawing.done),
            lambda drawing: self.step(model, params, stop, drawing),
            self.begin(model, params, batch, max_length, ids, seed, forced),
        )
        shape = (-1, self.num_decodes, max_length)
        log_probs = drawing.log_probs.reshape(shape)
        lengths = drawing.lengths.reshape(shape[:2])
        return Decoded(drawing.output.reshape(shape), lengths, log_probs, log_probs.sum(-1))

    def begin(
        self,
        model: Decodes,
        params: Params,
        batch: Batch,
        max_length: int,
        ids: jax.Array,
        seed: jax.Array,
        forced: jax.Array | None = None,
    ) -> "DecodeState":
        """Reads inputs; arguments as those of a call. Each `step` then adds a token to every row: `max_length` steps
        give the predictions that a call returns."""
        first, start, cache = model.prefill(params, batch, max_length)
        examples, decodes, prompted, generated = first.shape[0], self.num_decodes, None, None
        if decodes > 1:
            cache = model.fork(cache, decodes)
            first, start = jnp.repeat(first, decodes, axis=0), jnp.repeat(start, decodes, axis=0)
        ids, which = jnp.repeat(jnp.asarray(ids), decodes), jnp.tile(jnp.arange(decodes), examples)
        if self.penalizes:
            vocab = jax.eval_shape(model.decode, params, first, start, cache)[0].shape[-1]
            generated = jnp.zeros((first.shape[0], vocab), jnp.int32)
            prompted = _held(prompts(batch), vocab, decodes, first.shape[0])
        return DecodeState(
            start,
            forced_tokens(forced, max_length, decodes),
            ids,
            jax.vmap(row_key, in_axes=(None, 0, 0))(seed, ids, which),
            prompted,
            jnp.zeros((), jnp.int32),
            first,
            cache,
            jnp.zeros((first.shape[0], max_length), jnp.int32),
            jnp.zeros((first.shape[0], max_length), jnp.float32),
            jnp.zeros(first.shape[0], jnp.int32),
            jnp.zeros(first.shape[0], bool),
            generated,
        )

    def step(self, model: Decodes, params: Params, stop: Stop, at: "DecodeState") -> "DecodeState":
        """Adds a token to every row that is not done."""
        logits, cache = model.decode(params, at.tokens, at.start + at.made, at.cache)
        chosen, drawn_from = self._choose(logits, at)
        counted = ~at.done
        if at.forced is not None:
            forced = jax.lax.dynamic_index_in_dim(at.forced, at.made, axis=1, keepdims=False)
            chosen = jnp.where(forced == FREE, chosen, forced)
            counted &= (forced == FREE) | (not self.rescale_log_probs)
        chosen = jnp.where(at.done, 0, chosen)
        said = drawn_from if self.rescale_log_probs else logits
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(said), chosen[:, None], axis=1)
        log_prob = jnp.where(counted[:, None], log_prob, 0.0)
        output = jax.lax.dynamic_update_slice_in_dim(at.output, chosen[:, None], at.made, axis=1)
        generated = at.generated
        if generated is not None:
            generated = jax.vmap(lambda counts, token, new: counts.at[token].add(new))(generated, chosen, ~at.done)
        return at._replace(
            made=at.made + 1,
            tokens=chosen[:, None],
            cache=cache,
            output=output,
            log_probs=jax.lax.dynamic_update_slice_in_dim(at.log_probs, log_prob, at.made, axis=1),
            lengths=at.lengths + ~at.done,
            done=at.done | stop.ended(output, at.made),
            generated=generated,
        )

    def _choose(self, logits: jax.Array, at: "DecodeState") -> tuple[jax.Array, jax.Array]:
        """Returns the next token of each row, int32 [rows], and the logits that it is drawn from, [rows, vocab]."""
        if at.generated is not None and at.prompted is not None:
            penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
            logits = penalize(logits, at.generated, at.prompted, *penalties)
        for callback in self.callbacks:
            logits = callback(logits, Progress(at.made, at.output, at.ids))
        if self.temperature == 0:
            likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            only = jax.nn.one_hot(likeliest, logits.shape[-1], dtype=bool)
            return likeliest, jnp.where(only, 0.0, -jnp.inf)
        logits = filtered(logits / self.temperature, self.top_k, self.top_p, self.min_p)
        return draw(logits, at.keys, at.made), logits


class DecodeState(NamedTuple):
    """Unfinished predictions, one a row.

    Attributes:
      start: [rows], the position of the first predicted token.
      forced: [rows, length], tokens to begin with, FREE where they are any; None without any.
      ids: [rows], of the example.
      keys: [rows], random keys.
      prompted: bool [rows, vocab], which tokens the prompt holds; None without penalties.
      made: how many tokens each row has so far.
      tokens: [rows, 1], what is fed next.
      cache: of the model.
      output, log_probs: [rows, length].
      lengths: [rows].
      done: bool [rows].
      generated: int32 [rows, vocab], counts; None without penalties.
    """

    start: jax.Array
    forced: jax.Array | None
    ids: jax.Array
    keys: jax.Array
    prompted: jax.Array | None
    made: jax.Array
    tokens: jax.Array
    cache: Any
    output: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    done: jax.Array
    generated: jax.Array | None


def _held(tokens: jax.Array | None, vocab: int, decodes: int, rows: int) -> jax.Array:
    """Returns which tokens each row of `tokens` holds, FREE apart: bool [rows, vocab]."""
    if tokens is None:
        return jnp.zeros((rows, vocab), bool)
    places = jnp.where(tokens == FREE, vocab, tokens)  # past the end
    held = jax.vmap(lambda row: jnp.zeros(vocab, bool).at[row].set(True, mode="drop"))(places)
    return jnp.repeat(held, decodes, axis=0)
