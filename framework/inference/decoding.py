"""The arguments and results of decoding, which `sampling` and `beam_search` implement over one function of a model:
`decode(params, tokens, positions, cache) -> (logits, cache)`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp

from meshway.framework.errors import UserError
from meshway.framework.inference.rows import RowFormat
from meshway.framework.interfaces import Batch, Decodes, Model, Params

FREE = -1  # in place of a token id: any token may be chosen


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Predictions of a batch, several for each example.

    Attributes:
      tokens: int32 [batch, decodes, length]: each prediction with the stop token that ended it, then zeros.
      lengths: int32 [batch, decodes], how many tokens that is.
      log_probs: float32 [batch, decodes, length], of each token under the model, before penalties and filters; 0
        past the end.
      scores: float32 [batch, decodes], which rank the decodes of an example: the sum of their log-probabilities, under
        beam search divided by its length penalty.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    scores: jax.Array


jax.tree_util.register_dataclass(Decoded, ["tokens", "lengths", "log_probs", "scores"], [])


@dataclasses.dataclass(frozen=True)
class Stop:
    """What ends a prediction: one of `tokens`, or one of `sequences` of tokens."""

    tokens: Sequence[int] = ()
    sequences: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if any(not sequence for sequence in self.sequences):
            raise ValueError("Stop.sequences: a stop sequence needs a token")

    def ended(self, output: jax.Array, index: jax.Array) -> jax.Array:
        """Returns which rows end with the token at `index`, one for all or each row's own: output [..., length], index
        broadcast to [...] -> bool [...]."""
        index = jnp.broadcast_to(index, output.shape[:-1])

        def tail(size: int) -> jax.Array:
            places = index[..., None] + jnp.arange(1 - size, 1)
            return jnp.take_along_axis(output, places, axis=-1, mode="clip")

        ended = jnp.zeros(index.shape, bool)
        for token in self.tokens:
            ended |= tail(1)[..., 0] == token
        for sequence in self.sequences:
            ended |= (index >= len(sequence) - 1) & jnp.all(tail(len(sequence)) == jnp.asarray(sequence), axis=-1)
        return ended


def decoding_model(model: Model, instead: str = "") -> Decodes:
    """Returns `model`, which decodes.

    Raises:
      UserError: it does not; says what it lacks, and what to do `instead`, if that is given.
    """
    missing = [name for name in ("prefill", "decode", "fork", "reorder") if not hasattr(model, name)]
    if missing:
        RowFormat.of(model)  # says the better cause, that it has no decoder
        raise UserError(
            f"{type(model).__name__} does not decode, so nothing can be predicted with it: it has no method "
            f"{' or '.join(missing)} (see Decodes in framework/interfaces.py){instead and '; '}{instead}"
        )
    return cast(Decodes, model)


def teacher_forced(model: Decodes, params: Params, prompt: Batch, targets: jax.Array) -> jax.Array:
    """Returns the log-probability of every token at each target's place, float32 [rows, steps, vocab], by one step of
    decoding for each target, through the cache.

    Args:
      model, params: what decodes.
      prompt: what is read first.
      targets: int32 [rows, steps], what is fed, one after the other.
    """
    steps = targets.shape[1]
    tokens, start, cache = model.prefill(params, prompt, steps)

    def advance(carry: Any, inputs: Any) -> Any:
        tokens, cache = carry
        index, target = inputs
        logits, cache = model.decode(params, tokens, start + index, cache)
        return (target[:, None], cache), jax.nn.log_softmax(logits)

    return jnp.swapaxes(jax.lax.scan(advance, (tokens, cache), (jnp.arange(steps), targets.T))[1], 0, 1)


class Decoder(Protocol):
    """A way to decode; `sampling.Sampling` documents the arguments and the result."""

    @property
    def num_decodes(self) -> int:
        """Predictions of each example."""
        ...

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
    ) -> Decoded: ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a logit callback may read.

    Attributes:
      made: int32 scalar, how many tokens each row that is not done has so far.
      tokens: int32 [rows, length], these tokens.
      ids: int32 [rows], the id of each row's example.
    """

    made: jax.Array
    tokens: jax.Array
    ids: jax.Array


LogitCallback = Callable[[jax.Array, Progress], jax.Array]  # (logits [rows, vocab], progress) -> logits


def prompts(batch: Batch) -> jax.Array | None:
    """Returns the prompt that each row's prediction continues, int32 [batch, length], FREE on padding; None where the
    inputs go to an encoder."""
    if "encoder_input_tokens" in batch or "decoder_input_tokens" not in batch:
        return None
    return jnp.where(batch["decoder_segment_ids"] != 0, batch["decoder_input_tokens"], FREE)


def forced_tokens(forced: jax.Array | None, max_length: int, decodes: int) -> jax.Array | None:
    """Returns the tokens that predictions must begin with, int32 [batch * decodes, max_length], FREE where any may be
    chosen, from `forced` [batch, n] for any n; None for None."""
    if forced is None:
        return None
    room = jnp.full((forced.shape[0], max_length), FREE, jnp.int32)
    return jnp.repeat(room.at[:, : forced.shape[1]].set(forced[:, :max_length]), decodes, axis=0)


T = TypeVar("T")


def one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields one step late, so that the devices run item n + 1 while the host reads item n."""
    waiting: list[T] = []
    for each in started:
        waiting.append(each)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
