"""A model of one's own in plain JAX: a sum of what was read so far, with or without a fault."""

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.interfaces import ArraySpec


class Sums:
    """Predicts each token from the sum of the embeddings of those before it; `fault` is the check that it fails."""

    def __init__(self, fault=None):
        self.fault = fault

    def init(self, rng):
        first, second = jax.random.split(rng)
        table = jax.random.normal(first, (64, 8)) * (jnp.nan if self.fault == "finite" else 1.0)
        return {"table": table, "outer": jax.random.normal(second, (8, 64))}

    def axes(self):
        return {"table": ("vocab", "embedd" if self.fault == "parameters" else "embed"), "outer": ("embed", "vocab")}

    def batch_spec(self, batch_size, lengths):
        shape, axes = (batch_size, lengths["targets"]), ("batch", "length")
        names = ("input_tokens", "target_tokens", "segment_ids", "positions")
        spec = {f"decoder_{name}": ArraySpec(shape, np.dtype("int32"), axes) for name in names}
        return spec | {"decoder_loss_weights": ArraySpec(shape, np.dtype("float32"), axes)}

    def logits(self, params, batch, rng):
        segments = batch["decoder_segment_ids"]
        length = segments.shape[1]
        seen = jnp.tril(jnp.ones((length, length))) * (segments[:, :, None] == segments[:, None])
        if self.fault == "segments":
            seen = jnp.tril(jnp.ones((length, length))) * (segments[:, None] > 0)
        if self.fault == "padding":
            seen = seen + 0.1 * (segments[:, None] == 0)
        hidden = seen @ params["table"][batch["decoder_input_tokens"]]
        if self.fault == "order":
            hidden = hidden * jnp.arange(len(hidden))[:, None, None]
        return jnp.tanh(hidden) @ params["outer"]

    def _log_probs(self, params, batch):
        log_probs = jax.nn.log_softmax(self.logits(params, batch, None))
        chosen = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[..., 0]
        return chosen * batch["decoder_loss_weights"]

    def loss(self, params, batch, rng):
        total, weight = -jnp.sum(self._log_probs(params, batch)), jnp.sum(batch["decoder_loss_weights"])
        metrics = {"cross_entropy": (total, weight)}
        if self.fault == "loss":
            return total, 0.0 * weight, metrics
        if self.fault == "halves":
            return total / weight, weight, metrics
        if self.fault == "gradients" and not jax.sharding.get_abstract_mesh().empty:
            return 2 * total, weight, metrics
        return total, weight, metrics

    def score(self, params, batch):
        return self._log_probs(params, batch) * (2.0 if self.fault == "score" else 1.0)

    def prefill(self, params, batch, max_length):
        tokens, read = batch["decoder_input_tokens"], batch["decoder_segment_ids"] > 0
        last = jnp.sum(read, axis=1) - 1
        before = jnp.arange(tokens.shape[1]) < last[:, None]
        cache = jnp.sum(params["table"][tokens] * before[..., None], axis=1)
        return jnp.take_along_axis(tokens, last[:, None], axis=1), last, cache

    def decode(self, params, tokens, positions, cache):
        cache = (0 if self.fault == "decoding" else cache) + params["table"][tokens[:, 0]]
        return jnp.tanh(cache) @ params["outer"], cache

    def fork(self, cache, times):
        return jnp.repeat(cache, times, axis=0)

    def reorder(self, cache, chosen):
        rows = cache.reshape(*chosen.shape, -1)
        return jnp.take_along_axis(rows, chosen[..., None], axis=1).reshape(cache.shape)
