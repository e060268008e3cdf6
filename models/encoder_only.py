"""The encoder-only objective: hidden tokens restored from all others. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Mapping
from typing import Any

import jax

from meshway.models.layers.masks import AttentionMetadata, make_attention_mask
from meshway.models.losses import CrossEntropy, OutputLayer, TokenSpec, token_spec, token_targets
from meshway.models.module import NetworkFactory
from meshway.models.objective import Batch, Objective


class EncoderOnly(Objective):
    """Masked language modelling (Devlin et al. 2019, section 3.1, task 1), for a network like `bert.Bert`.

    The batch says which tokens are hidden, and so have weight.
    """

    def __init__(
        self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0, num_loss_chunks: int = 1
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets"."""
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        return token_spec(batch_size, lengths["targets"], "encoder", names)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads at each position, [batch, length, d_model], and that layer."""
        tokens = AttentionMetadata(batch["encoder_segment_ids"])
        network = self.bind(params)
        x = network.hidden(
            batch["encoder_input_tokens"], batch["encoder_positions"], make_attention_mask(tokens, tokens), rng=rng
        )
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens, weights), [batch, length] each; hidden tokens alone have weight."""
        return token_targets(batch, "encoder")
