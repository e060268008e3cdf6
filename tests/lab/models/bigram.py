"""A model of one's own: two embeddings, in plain JAX. It meets meshway's `Model` by shape and inherits nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import constrain


@dataclasses.dataclass(frozen=True)
class Spec:
    shape: tuple
    dtype: object
    axes: tuple = ("batch", "length")


class Bigram:
    """Predicts each byte from the one before: logits = out[code(in[token])]."""

    def __init__(self, vocab_size: int, num_codes: int):
        self.vocab_size, self.num_codes = vocab_size, num_codes

    def init(self, rng):
        first, second = jax.random.split(rng)
        return {
            "inner": jax.random.normal(first, (self.vocab_size, self.num_codes)),
            "outer": 0.1 * jax.random.normal(second, (self.num_codes, self.vocab_size)),
        }

    def axes(self):
        return {"inner": ("vocab", "codes"), "outer": ("codes", "vocab")}

    def batch_spec(self, batch_size, lengths):
        shape = (batch_size, lengths["targets"])
        names = ("input_tokens", "target_tokens", "segment_ids", "positions")
        spec = {f"decoder_{name}": Spec(shape, np.dtype("int32")) for name in names}
        return spec | {"decoder_loss_weights": Spec(shape, np.dtype("float32"))}

    def _log_probs(self, params, batch):
        hidden = constrain(jnp.tanh(params["inner"][batch["decoder_input_tokens"]]), ("batch", "length", "codes"))
        log_probs = jax.nn.log_softmax(hidden @ params["outer"])
        return jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[..., 0]

    def loss(self, params, batch, rng):
        weights = batch["decoder_loss_weights"]
        return -jnp.sum(self._log_probs(params, batch) * weights), jnp.sum(weights), {}

    def score(self, params, batch):
        return self._log_probs(params, batch) * batch["decoder_loss_weights"]
