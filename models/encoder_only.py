"""The encoder-only objective: hidden tokens restored from all others. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Mapping
from typing import Any

import jax

from meshway.models.layers.masks import AttentionMetadata, make_attention_mask
from meshway.models.losses import CrossEntropy, TokenSpec, token_spec, token_targets
from meshway.models.module import Batch, NetworkFactory, Objective


class EncoderOnly(Objective):
    """Masked language modelling (Devlin et al. 2019, section 3.1, task 1), for a network like `bert.Bert`.

    The batch says which tokens are hidden, and so have weight.
    """

    def __init__(self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0):
        super().__init__(network, CrossEntropy(z_loss, label_smoothing))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets"."""
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        return token_spec(batch_size, lengths["targets"], "encoder", names)

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits at each position, float32 [batch, length, vocab]."""
        tokens = AttentionMetadata(batch["encoder_segment_ids"])
        network = self.bind(params)
        return network(
            batch["encoder_input_tokens"], batch["encoder_positions"], make_attention_mask(tokens, tokens), rng=rng
        )

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens, weights), [batch, length] each; hidden tokens alone have weight."""
        return token_targets(batch, "encoder")
