"""The encoder-decoder objective: targets predicted from inputs. Meets `Model` and `Decodes` by shape."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.cache import DecodingCache, take_copies
from meshway.models.losses import CrossEntropy, OutputLayer, TokenSpec, text_spec, token_targets
from meshway.models.module import NetworkFactory
from meshway.models.objective import Batch, Objective


class EncoderDecoder(Objective):
    """Maximum likelihood of targets given inputs, for a network with `encode`, `decode` and `score` (see `t5.T5`)."""

    def __init__(
        self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0, num_loss_chunks: int = 1
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "inputs" and "targets"."""
        return text_spec(batch_size, lengths, encoder=True)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, length, d_model], and that layer."""
        network = self.bind(params)
        encoder_key, decoder_key = (None, None) if rng is None else jax.random.split(rng)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments, encoder_key)
        x = network.decode(batch["decoder_input_tokens"], batch["decoder_segment_ids"], encoded, segments, decoder_key)
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (target tokens, weights), [batch, length] each."""
        return token_targets(batch, "decoder")

    def prefill(
        self, params: dict[str, Any], batch: Batch, max_length: int
    ) -> tuple[jax.Array, jax.Array, DecodingCache]:
        """Encodes the inputs; decoding starts from the first of `decoder_input_tokens` (0 without) at position 0."""
        network = self.bind(params)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments)
        cache = DecodingCache(network.empty_cache(encoded, max_length), max_length, segments)
        rows = segments.shape[0]
        given = batch.get("decoder_input_tokens")
        start = jnp.zeros((rows, 1), jnp.int32) if given is None else jnp.asarray(given)[:, :1]
        return start, jnp.zeros((rows,), jnp.int32), cache

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        logits, layers = self.bind(params).decode_cached(
            tokens, positions[:, None], cache.layers, cache.encoder_segments, cache.length
        )
        return logits[:, 0], dataclasses.replace(cache, layers=layers)

    def fork(self, cache: DecodingCache, times: int) -> DecodingCache:
        """Returns a cache of `times` copies of each row, one after the other; these share what was encoded."""
        return _each_own(lambda x: jnp.repeat(x, times, axis=1), cache)

    def reorder(self, cache: DecodingCache, chosen: jax.Array) -> DecodingCache:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return _each_own(lambda x: take_copies(x, chosen), cache)


def _each_own(change: Callable[[jax.Array], jax.Array], cache: DecodingCache) -> DecodingCache:
    """Applies `change` to the entries that each prediction has of its own, [layers, rows, ...]; the predictions of an
    example share the others."""
    layers = [block | {"own": jax.tree.map(change, block["own"])} for block in cache.layers]
    return dataclasses.replace(cache, layers=layers)
