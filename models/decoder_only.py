"""The decoder-only objective: each token from those before it. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.cache import take_copies
from meshway.models.layers.masks import Mask, make_attention_mask, row_metadata, row_positions
from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, TokenSpec, constrain_like_logits, target_log_probs, token_spec
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class DecoderOnly:
    """Maximum likelihood of a sequence, for a network like `lm.LanguageModel`.

    With `prefix` the batch marks inputs in `decoder_prefix_mask`: they see each other both ways (prefix LM).
    """

    def __init__(
        self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0, prefix: bool = False
    ):
        self._network = Network(network)
        self._criterion = CrossEntropy(z_loss, label_smoothing)
        self._prefix = prefix

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh float32 parameters."""
        return self._network.init(rng)

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter."""
        return self._network.axes()

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets", and for a prefix LM "inputs"; rows hold both."""
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        if self._prefix:
            return token_spec(batch_size, lengths["targets"] + lengths["inputs"], "decoder", [*names, "prefix_mask"])
        return token_spec(batch_size, lengths["targets"] + lengths.get("inputs", 0), "decoder", names)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        """Returns (summed loss, summed weight, metrics) over weighted tokens; `rng` None means no dropout."""
        with capture() as reports:
            logits = self.logits(params, batch, rng)
        return self._criterion(
            logits, *constrain_like_logits(batch["decoder_target_tokens"], batch["decoder_loss_weights"]), reports
        )

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each target token, float32 [batch, length], 0 on padding."""
        logits = self.logits(params, batch, None)
        return target_log_probs(
            logits, *constrain_like_logits(batch["decoder_target_tokens"], batch["decoder_loss_weights"])
        )

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of a teacher-forced pass by name, [batch, length, ...] (`observed`).

        Raises:
          ValueError: a name that the network does not know; says which it does.
        """
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found

    def prefill(self, params: dict[str, Any], batch: Batch, max_length: int) -> tuple[jax.Array, jax.Array, Any]:
        """Reads prompts of different lengths, left-aligned in `decoder_input_tokens` with segment 1.

        The last prompt token is fed again by the first `decode`, which only rewrites its own slot.
        """
        tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
        rows, length = tokens.shape
        network = self._network.bind(params)
        positions = jnp.broadcast_to(row_positions(length), (rows, length))
        mask = Mask(jnp.pad(self._mask(batch).dense, ((0, 0), (0, 0), (0, 0), (0, max_length))))
        cache = network.empty_cache(rows, length + max_length)
        _, cache = network(tokens, positions, mask, cache=cache, cache_index=positions)
        last = jnp.sum(segments != 0, axis=1) - 1
        return (
            jnp.take_along_axis(tokens, last[:, None], axis=1),
            last,
            {"layers": cache, "slots": jnp.zeros(length + max_length)},
        )

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        network, length = self._network.bind(params), cache["slots"].shape[0]
        logits, layers = network.decode_cached(tokens, positions[:, None], cache["layers"], length)
        return logits[:, 0], cache | {"layers": layers}

    def fork(self, cache: Any, times: int) -> Any:
        """Returns a cache of `times` copies of each row, one after the other."""
        return cache | {"layers": jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache["layers"])}

    def reorder(self, cache: Any, chosen: jax.Array) -> Any:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return cache | {"layers": jax.tree.map(lambda x: take_copies(x, chosen), cache["layers"])}

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, length, vocab]."""
        network = self._network.bind(params)
        logits, _ = network(batch["decoder_input_tokens"], batch["decoder_positions"], self._mask(batch), rng=rng)
        return logits

    def _mask(self, batch: Batch) -> Mask:
        segments = batch["decoder_segment_ids"]
        prefix = batch["decoder_prefix_mask"] if self._prefix else None
        tokens = row_metadata(segments.shape[1], segments, prefix)
        return make_attention_mask(tokens, tokens, causal=True)
