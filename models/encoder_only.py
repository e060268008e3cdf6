"""The encoder-only objective: hidden tokens restored from all others. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import jax

from meshway.models.layers.masks import AttentionMetadata, make_attention_mask
from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, TokenSpec, constrain_like_logits, target_log_probs, token_spec
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class EncoderOnly:
    """Masked language modelling (Devlin et al. 2019, section 3.1, task 1), for a network like `bert.Bert`.

    Which tokens are hidden, and so have weight, is the batch's matter.
    """

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
        """Returns the features of a batch; `lengths` needs "targets"."""
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        return token_spec(batch_size, lengths["targets"], "encoder", names)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        """Returns (summed loss, summed weight, metrics) over hidden tokens; `rng` None means no dropout."""
        with capture() as reports:
            logits = self.logits(params, batch, rng)
        return self._criterion(
            logits, *constrain_like_logits(batch["encoder_target_tokens"], batch["encoder_loss_weights"]), reports
        )

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each hidden token, float32 [batch, length], 0 elsewhere."""
        logits = self.logits(params, batch, None)
        return target_log_probs(
            logits, *constrain_like_logits(batch["encoder_target_tokens"], batch["encoder_loss_weights"])
        )

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each place, float32 [batch, length, vocab]."""
        tokens = AttentionMetadata(batch["encoder_segment_ids"])
        network = self._network.bind(params)
        return network(
            batch["encoder_input_tokens"], batch["encoder_positions"], make_attention_mask(tokens, tokens), rng=rng
        )

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values by name, [batch, ...] (`observed`); ValueError for a name that is none."""
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found

    def prefill(self, params: dict[str, Any], batch: Batch, max_length: int) -> NoReturn:
        """Raises ValueError: there are no tokens to produce."""
        raise ValueError("an EncoderOnly produces no tokens: there is nothing to decode; take its `score` or `logits`")

    def decode(self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Any) -> NoReturn:
        """Raises ValueError, as `prefill` does."""
        self.prefill(params, {}, 0)
