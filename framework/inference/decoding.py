"""What decoding is asked for and what it returns; `sampling` and `beam_search` do it.

`(params, tokens, positions, cache) -> (logits, cache)`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from meshway.framework.interfaces import Batch, Model, Params

FREE = -1  # in place of a token id: none is given


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Predictions of a batch, several for each example.

    Attributes:
      tokens: int32 [batch, decodes, length]: each prediction with the stop token that ended it, then zeros.
      lengths: int32 [batch, decodes], how many tokens that is.
      log_probs: float32 [batch, decodes, length], of each token under the model, before penalties and filters; 0
        past the end.
      scores: float32 [batch, decodes], by which decodes of an example are compared: their sum, or what beam search
        made of it.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    scores: jax.Array


jax.tree_util.register_dataclass(Decoded, ["tokens", "lengths", "log_probs", "scores"], [])


@dataclasses.dataclass(frozen=True)
class Stop:
    """What ends a prediction: a token of `tokens`, or that its last tokens are one of `sequences`."""

    tokens: Sequence[int] = ()
    sequences: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if any(not sequence for sequence in self.sequences):
            raise ValueError("Stop.sequences: a stop sequence needs a token")

    def ended(self, output: jax.Array, index: jax.Array) -> jax.Array:
        """Returns which rows end with the token at `index`: output [..., length] -> bool [...]."""
        last = jax.lax.dynamic_index_in_dim(output, index, axis=-1, keepdims=False)
        ended = jnp.zeros(last.shape, bool)
        for token in self.tokens:
            ended |= last == token
        for sequence in self.sequences:
            size = len(sequence)
            if size > output.shape[-1]:
                continue
            tail = jax.lax.dynamic_slice_in_dim(output, index - size + 1, size, axis=-1)
            ended |= (index >= size - 1) & jnp.all(tail == jnp.asarray(sequence), axis=-1)
        return ended


class Decoder(Protocol):
    """A way to decode: `sampling.Sampling` says what all of them take and return."""

    @property
    def num_decodes(self) -> int:
        """Predictions of each example."""
        ...

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
    ) -> Decoded: ...


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a logit callback may look at.

    Attributes:
      made: int32 scalar, how many tokens each row has.
      tokens: int32 [rows, length], those so far.
      ids: int32 [rows], the example of each row.
    """

    made: jax.Array
    tokens: jax.Array
    ids: jax.Array


LogitCallback = Callable[[jax.Array, Progress], jax.Array]  # (logits [rows, vocab], progress) -> logits


def prompts(batch: Batch) -> jax.Array | None:
    """Returns what each row's prediction goes on from, int32 [batch, length] with FREE elsewhere; None where
    predictions start afresh, from an encoder's inputs."""
    if "encoder_input_tokens" in batch or "decoder_input_tokens" not in batch:
        return None
    return jnp.where(batch["decoder_segment_ids"] != 0, batch["decoder_input_tokens"], FREE)


def forced_tokens(forced: jax.Array | None, max_length: int, decodes: int) -> jax.Array | None:
    """Returns what each prediction must begin with, int32 [batch * decodes, max_length], FREE where it may be any, from
    `forced` [batch, n] of any n; None of None."""
    if forced is None:
        return None
    room = jnp.full((forced.shape[0], max_length), FREE, jnp.int32)
    return jnp.repeat(room.at[:, : forced.shape[1]].set(forced[:, :max_length]), decodes, axis=0)


T = TypeVar("T")


def one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields what has been started once the next is started too: devices work while the host reads and writes."""
    waiting: list[T] = []
    for each in started:
        waiting.append(each)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
