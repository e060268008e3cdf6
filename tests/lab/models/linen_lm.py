"""Models as T5X's users have them: flax.linen modules, with axes by either of flax's ways, and a `BaseModel`."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import partitioning


class Boxed(nn.Module):
    """Averages of what came before, through one hidden layer; axes by `with_logical_partitioning`."""

    vocab_size: int
    d_model: int = 16
    d_ff: int = 32
    dropout_rate: float = 0.0
    names: tuple = ("embed", "mlp")

    @nn.compact
    def __call__(self, decoder_input_tokens, decoder_segment_ids=None, deterministic=True):
        def boxed(*names):
            return nn.with_logical_partitioning(nn.initializers.normal(0.5), names)

        table = self.param("table", boxed("vocab", "embed"), (self.vocab_size, self.d_model))
        x = jnp.take(table, decoder_input_tokens, axis=0)
        x = jnp.cumsum(x, axis=1) / (1.0 + jnp.arange(x.shape[1]))[:, None] + x
        wi = nn.Dense(self.d_ff, use_bias=False, kernel_init=boxed(*self.names), name="wi")
        x = nn.with_logical_constraint(jnp.tanh(wi(x)), ("batch", "length", "mlp"))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return nn.Dense(self.d_model, use_bias=False, kernel_init=boxed("mlp", "embed"), name="wo")(x) @ table.T


class Scaled(nn.Module):
    """A layer as T5X writes them: parameters and activations with axes."""

    @nn.compact
    def __call__(self, x, scanned=None):
        kernel = partitioning.param_with_axes(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], 16), jnp.float32, axes=("embed", "joined_kv")
        )
        return partitioning.with_sharding_constraint(x + jnp.tanh(x @ kernel), ("batch", "length", "embed")), None


class T5XStyle(nn.Module):
    """T5X's own way: `param_with_axes`, and a stack by `scan_with_axes`."""

    vocab_size: int

    @nn.compact
    def __call__(self, decoder_input_tokens, decoder_target_tokens, enable_dropout=True, decode=False):
        table = partitioning.param_with_axes(
            "embedding", nn.initializers.normal(0.5), (self.vocab_size, 16), jnp.float32, axes=("vocab", "embed")
        )
        x = jnp.take(table, decoder_input_tokens, axis=0)
        x = jnp.where(decoder_target_tokens[..., None] > 0, x, 0.0)
        x = x + jnp.cumsum(x, axis=1) / 8.0
        stack = partitioning.scan_with_axes(
            Scaled, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, axis_name="layers",
            axes_collections=("params", "params_axes"), variable_broadcast=False,
        )  # fmt: skip
        x, _ = stack(name="layers")(x, None)
        return x @ table.T


class BaseModel:
    """The methods of T5X's `BaseTransformerModel`, over `T5XStyle`; the loss is a sum, as theirs."""

    def __init__(self, module):
        self.module = module

    def get_initial_variables(self, rng, input_shapes, input_types=None):
        ones = functools.partial(jnp.ones, dtype=jnp.int32)
        shape = input_shapes["decoder_input_tokens"]
        return self.module.init({"params": rng}, ones(shape), ones(shape), enable_dropout=False)

    def _compute_logits(self, params, batch, dropout_rng=None):
        return self.module.apply(
            {"params": params}, batch["decoder_input_tokens"], batch["decoder_target_tokens"], enable_dropout=False
        )

    def loss_fn(self, params, batch, dropout_rng):
        log_probs = jax.nn.log_softmax(self._compute_logits(params, batch, dropout_rng))
        chosen = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[..., 0]
        weights = batch["decoder_loss_weights"]
        loss = -jnp.sum(chosen * weights)
        return loss, {"nats": (loss, jnp.sum(weights)), "rows": jnp.asarray(float(weights.shape[0]))}


class Normed(nn.Module):
    """A classifier of images with batch statistics."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, train=False):
        kernel = nn.with_logical_partitioning(nn.initializers.normal(0.3), (None, "mlp"))
        x = nn.Dense(16, use_bias=False, kernel_init=kernel)(image.reshape(image.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(self.num_classes, name="out")(jnp.tanh(x))
