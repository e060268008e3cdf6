"""The decoder-only objective: each token from those before it. Meets `Model` and `Decodes` by shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.cache import DecodingCache, take_copies
from meshway.models.layers.masks import Mask, make_attention_mask, row_metadata, row_positions
from meshway.models.losses import CrossEntropy, OutputLayer, TokenSpec, text_spec, token_targets
from meshway.models.module import NetworkFactory
from meshway.models.objective import Batch, Objective


class DecoderOnly(Objective):
    """Maximum likelihood of a sequence, for a network like `lm.LanguageModel`.

    With `prefix` the batch marks inputs in `decoder_prefix_mask`: they see each other both ways (prefix LM).
    """

    def __init__(
        self,
        network: NetworkFactory,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        prefix: bool = False,
        num_loss_chunks: int = 1,
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))
        self._prefix = prefix

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets", and for a prefix LM "inputs"; rows hold both."""
        return text_spec(batch_size, lengths, encoder=False, prefix=self._prefix)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, length, d_model], and that layer."""
        network = self.bind(params)
        x, _ = network.hidden(batch["decoder_input_tokens"], batch["decoder_positions"], self._mask(batch), rng=rng)
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (target tokens, weights), [batch, length] each."""
        return token_targets(batch, "decoder")

    def prefill(
        self, params: dict[str, Any], batch: Batch, max_length: int
    ) -> tuple[jax.Array, jax.Array, DecodingCache]:
        """Reads prompts of different lengths, left-aligned in `decoder_input_tokens` with segment 1.

        The last prompt token is fed again by the first `decode`, which rewrites its own entry of the cache.
        """
        tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
        rows, length = tokens.shape
        network = self.bind(params)
        positions = jnp.broadcast_to(row_positions(length), (rows, length))
        mask = Mask(jnp.pad(self._mask(batch).dense, ((0, 0), (0, 0), (0, 0), (0, max_length))))
        layers = network.empty_cache(rows, length + max_length)
        _, layers = network.hidden(tokens, positions, mask, cache=layers, cache_index=positions)
        last = jnp.sum(segments != 0, axis=1) - 1
        return jnp.take_along_axis(tokens, last[:, None], axis=1), last, DecodingCache(layers, length + max_length)

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        logits, layers = self.bind(params).decode_cached(tokens, positions[:, None], cache.layers, cache.length)
        return logits[:, 0], dataclasses.replace(cache, layers=layers)

    def fork(self, cache: DecodingCache, times: int) -> DecodingCache:
        """Returns a cache of `times` copies of each row, one after the other."""
        layers = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache.layers)
        return dataclasses.replace(cache, layers=layers)

    def reorder(self, cache: DecodingCache, chosen: jax.Array) -> DecodingCache:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        layers = jax.tree.map(lambda x: take_copies(x, chosen), cache.layers)
        return dataclasses.replace(cache, layers=layers)

    def _mask(self, batch: Batch) -> Mask:
        segments = batch["decoder_segment_ids"]
        prefix = batch["decoder_prefix_mask"] if self._prefix else None
        tokens = row_metadata(segments.shape[1], segments, prefix)
        return make_attention_mask(tokens, tokens, causal=True)
