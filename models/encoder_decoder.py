"""The encoder-decoder objective: targets predicted from inputs. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.cache import take_copies
from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, TokenSpec, constrain_like_logits, target_log_probs, token_spec
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class EncoderDecoder:
    """Maximum likelihood of targets given inputs, for a network with `encode` and `decode` (see `t5.T5`)."""

    def __init__(self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0):
        self._network = Network(network)
        self._criterion = CrossEntropy(z_loss, label_smoothing)

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh float32 parameters."""
        return self._network.init(rng)

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter."""
        return self._network.axes()

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "inputs" and "targets"."""
        encoder = token_spec(batch_size, lengths["inputs"], "encoder", ["input_tokens", "segment_ids", "positions"])
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        return encoder | token_spec(batch_size, lengths["targets"], "decoder", names)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        """Returns (summed loss, summed weight, metrics) over target tokens; `rng` None means no dropout."""
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
        """Encodes the inputs; decoding starts from the first of `decoder_input_tokens` (0 without) at position 0."""
        network = self._network.bind(params)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments)
        # A dry array carries the static length through jit beside the cache.
        cache = {
            "layers": network.empty_cache(encoded, max_length),
            "segments": segments,
            "slots": jnp.zeros(max_length),
        }
        rows = segments.shape[0]
        given = batch.get("decoder_input_tokens")
        start = jnp.zeros((rows, 1), jnp.int32) if given is None else jnp.asarray(given)[:, :1]
        return start, jnp.zeros((rows,), jnp.int32), cache

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        network, length = self._network.bind(params), cache["slots"].shape[0]
        logits, layers = network.decode_cached(tokens, positions[:, None], cache["layers"], cache["segments"], length)
        return logits[:, 0], cache | {"layers": layers}

    def fork(self, cache: Any, times: int) -> Any:
        """Returns a cache of `times` copies of each row, one after the other; these share what was encoded."""
        return _each_own(lambda x: jnp.repeat(x, times, axis=1), cache)

    def reorder(self, cache: Any, chosen: jax.Array) -> Any:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return _each_own(lambda x: take_copies(x, chosen), cache)

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, length, vocab]."""
        network = self._network.bind(params)
        encoder_key, decoder_key = (None, None) if rng is None else jax.random.split(rng)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments, encoder_key)
        return network.decode(
            batch["decoder_input_tokens"], batch["decoder_segment_ids"], encoded, segments, decoder_key
        )


def _each_own(change: Callable[[jax.Array], jax.Array], cache: Any) -> Any:
    """Changes what the cache holds of each prediction, [layers, rows, ...]; the rest is of examples."""
    layers = [block | {"own": jax.tree.map(change, block["own"])} for block in cache["layers"]]
    return cache | {"layers": layers}
