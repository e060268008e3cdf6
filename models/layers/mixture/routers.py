"""Routers of a mixture of experts: which experts take a token, and the weight of each.

A router is a module called with tokens x [batch, length, d_model]; it computes in float32 for any dtype of x, since
rounding flips choices. It reports its auxiliary losses and statistics itself (`router_losses`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.mixture import router_losses
from meshway.models.layers.mlp import Initializer, fan_in_init
from meshway.models.layers.side_outputs import add_loss
from meshway.models.module import param

PRIORITIES = ("order", "score")


@dataclasses.dataclass(frozen=True)
class TokenChoices:
    """Each token chose `k` experts, its first choice first.

    Attributes:
      experts: int32 [batch, length, k].
      gates: float32 [batch, length, k], the weight of each chosen expert's output.
      priority: float32 [batch, length]: tokens of higher priority take slots first; None for the order of the tokens.
    """

    experts: jax.Array
    gates: jax.Array
    priority: jax.Array | None = None

    def combine(self, outputs: jax.Array) -> jax.Array:
        """outputs [batch * length * k, d_model], one for each choice -> float32 [batch * length, d_model], their sums
        weighted by gates."""
        gates = self.gates.reshape(-1, self.gates.shape[-1])
        outputs = outputs.reshape(*gates.shape, -1)
        return jnp.einsum("nk,nkd->nd", gates, outputs.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class ExpertScores:
    """Each expert will choose its highest-scoring tokens, as many as it has slots.

    Attributes:
      scores: float32 [batch, length, experts], in [0, 1]; also the weight of an expert that takes the token.
    """

    scores: jax.Array


Choices = TokenChoices | ExpertScores
jax.tree_util.register_dataclass(TokenChoices, ["experts", "gates", "priority"], [])
jax.tree_util.register_dataclass(ExpertScores, ["scores"], [])


class RouterFactory(Protocol):
    """A router class with its other arguments bound, as gin makes it."""

    def __call__(self, *, d_model: int, num_experts: int, rngs: nnx.Rngs) -> Any: ...


class _Router(nnx.Module):
    """The base of routers: the projection to one logit for each expert."""

    def __init__(self, d_model: int, num_experts: int, init: Callable[[int], Initializer], rngs: nnx.Rngs):
        self.kernel = param(init(1)(rngs.params(), (d_model, num_experts), jnp.float32), ("embed", "expert"))
        self.num_experts = num_experts

    def logits(self, x: jax.Array) -> jax.Array:
        """x [batch, length, d_model] -> float32 [batch, length, experts], at full precision on every platform."""
        x, kernel = x.astype(jnp.float32), constrain(self.kernel[...].astype(jnp.float32), (None, None))
        logits = jax.lax.dot_general(x, kernel, (((2,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        return constrain(logits, ("batch", "length", None))


class TopK(_Router):
    """Softmax over the experts, of which each token takes its `k` best.

    With k=1, normalize=False it is Switch Transformer (Fedus et al. 2022, eq. 1-2; `jitter` their section 2.2). With
    normalize=True the chosen gates sum to one: GShard's top 2 (Lepikhin et al. 2021, algorithm 1, without its random
    skipping of second choices), and equally Mixtral's softmax over the chosen logits (Jiang et al. 2024, section 2.1).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        k: int = 2,
        eval_k: int | None = None,
        normalize: bool = True,
        jitter: float = 0.0,
        priority: Literal["order", "score"] = "order",
        load_loss: float = 0.01,
        importance_loss: float = 0.0,
        z_loss: float = 0.0,
        init: Callable[[int], Initializer] = fan_in_init(),
    ):
        """Args:
          d_model, num_experts: features of a token, experts to choose from.
          rngs: for the initial kernel.
          k: experts a token takes; `eval_k` at inference, None for the same.
          normalize: scale the gates of the chosen experts to sum to one.
          jitter: in training the router reads x times uniform(1 - jitter, 1 + jitter).
          priority: which tokens take slots first: in "order" of the group, or by highest gate ("score", Batch Priority
            Routing, Riquelme et al. 2021, section 4).
          load_loss, importance_loss, z_loss: coefficients of `router_losses.load`, `importance` and `z`.
          init: of the kernel; Switch uses `fan_in_init(scale=0.1)`.

        Raises:
          ValueError: k is out of range, normalize=True with k=1 (each gate would be 1 and the router not learn), or an
            unknown priority.
        """
        super().__init__(d_model, num_experts, init, rngs)
        _check_k(type(self).__name__, k, eval_k, num_experts, priority)
        if normalize and k == 1:
            raise ValueError(
                "TopK: with k=1 and normalize=True every gate is 1 and the router gets no gradient; "
                "bind routers.TopK.normalize = False, as in Switch Transformer"
            )
        self.k, self.eval_k, self.normalize, self.jitter, self.priority = k, eval_k or k, normalize, jitter, priority
        self.load_loss, self.importance_loss, self.z_loss = load_loss, importance_loss, z_loss

    def __call__(self, x: jax.Array, *, real: jax.Array, rng: jax.Array | None = None) -> TokenChoices:
        """x [batch, length, d_model], `real` float32 [batch, length] (0 on padding); `rng` None means inference."""
        k = self.eval_k if rng is None else self.k
        if rng is not None and self.jitter:
            x = x.astype(jnp.float32) * jax.random.uniform(rng, x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        logits = self.logits(x)
        experts, probabilities = _best(logits, k), jax.nn.softmax(logits)
        gates = jax.nn.softmax(_at(logits, experts)) if self.normalize else _at(probabilities, experts)
        loads = _report_statistics(probabilities, experts, real)
        _add_losses(
            rng,
            load=(self.load_loss, lambda: router_losses.load(probabilities, loads, real)),
            importance=(self.importance_loss, lambda: router_losses.importance(probabilities, real)),
            z=(self.z_loss, lambda: router_losses.z(logits, real)),
        )
        return TokenChoices(experts, gates, _priority(gates, self.priority))


class NoisyTopK(_Router):
    """V-MoE's router: the `k` best of softmax(logits + noise), not normalised again (Riquelme et al. 2021, eq. 2).

    The noise, normal with deviation noise / num_experts, exists in training only.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        k: int = 2,
        eval_k: int | None = None,
        noise: float = 1.0,
        priority: Literal["order", "score"] = "score",
        load_loss: float = 0.005,
        importance_loss: float = 0.005,
        z_loss: float = 0.0,
        init: Callable[[int], Initializer] = fan_in_init(),
    ):
        """`load_loss` is the coefficient of `router_losses.noisy_load`; the rest is as in `TopK`.

        Raises:
          ValueError: k is out of range, noise is negative, load_loss without noise, or an unknown priority.
        """
        super().__init__(d_model, num_experts, init, rngs)
        _check_k("NoisyTopK", k, eval_k, num_experts, priority)
        if noise < 0 or (noise == 0 and load_loss):
            raise ValueError(f"NoisyTopK: its load loss needs noise above 0, not {noise}; or bind load_loss = 0")
        self.k, self.eval_k, self.noise, self.priority = k, eval_k or k, noise, priority
        self.load_loss, self.importance_loss, self.z_loss = load_loss, importance_loss, z_loss

    def __call__(self, x: jax.Array, *, real: jax.Array, rng: jax.Array | None = None) -> TokenChoices:
        """x [batch, length, d_model], `real` float32 [batch, length] (0 on padding); `rng` None means inference."""
        k, deviation = (self.eval_k if rng is None else self.k), self.noise / self.num_experts
        clean = noisy = self.logits(x)
        if rng is not None and self.noise:
            noisy = clean + deviation * jax.random.normal(rng, clean.shape)
        experts = _best(noisy, k)
        gates = _at(jax.nn.softmax(noisy), experts)
        probabilities = jax.nn.softmax(clean)
        _report_statistics(probabilities, experts, real)
        threshold = _at(noisy, experts[..., -1:])
        _add_losses(
            rng,
            load=(self.load_loss, lambda: router_losses.noisy_load(clean, threshold, deviation, real)),
            importance=(self.importance_loss, lambda: router_losses.importance(probabilities, real)),
            z=(self.z_loss, lambda: router_losses.z(clean, real)),
        )
        return TokenChoices(experts, gates, _priority(gates, self.priority))


class SigmoidTopK(_Router):
    """DeepSeek-V3's router, balanced by a bias instead of a loss (DeepSeek-AI 2024, section 2.1.2, eq. 12-16).

    The `k` best of sigmoid(logits) + bias are chosen; the gates are the chosen sigmoids without bias, normalised to sum
    to `gate_scale`. The gradient of `bias` [experts] is each expert's share of the choices less the mean share: sign
    descent on it is the paper's b += speed * sign(mean load - load). An optimizer must do just that for parameters
    named "bias" of a router, without clipping, momentum or decay.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        k: int = 2,
        eval_k: int | None = None,
        gate_scale: float = 1.0,
        priority: Literal["order", "score"] = "order",
        load_loss: float = 0.0,
        z_loss: float = 0.0,
        init: Callable[[int], Initializer] = fan_in_init(),
    ):
        """`gate_scale` is the sum of a token's gates (2.5 in DeepSeek-V3); the rest is as in `TopK`.

        Raises:
          ValueError: k is out of range, or an unknown priority.
        """
        super().__init__(d_model, num_experts, init, rngs)
        _check_k("SigmoidTopK", k, eval_k, num_experts, priority)
        self.bias = param(jnp.zeros((num_experts,)), ("expert",))
        self.k, self.eval_k, self.gate_scale, self.priority = k, eval_k or k, gate_scale, priority
        self.load_loss, self.z_loss = load_loss, z_loss

    def __call__(self, x: jax.Array, *, real: jax.Array, rng: jax.Array | None = None) -> TokenChoices:
        """x [batch, length, d_model], `real` float32 [batch, length] (0 on padding); `rng` None means inference."""
        logits, bias = self.logits(x), self.bias[...]
        scores = jax.nn.sigmoid(logits)
        experts = _best(scores + bias, self.eval_k if rng is None else self.k)
        chosen = _at(scores, experts)
        gates = self.gate_scale * chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        loads = _report_statistics(probabilities, experts, real)
        _add_losses(
            rng,
            bias=(1.0, lambda: router_losses.bias_balance(bias, loads)),
            load=(self.load_loss, lambda: router_losses.load(probabilities, loads, real)),
            z=(self.z_loss, lambda: router_losses.z(logits, real)),
        )
        return TokenChoices(experts, gates, _priority(gates, self.priority))


class ExpertChoice(_Router):
    """Each expert takes the tokens that score highest for it (Zhou et al. 2022, section 3.2): perfectly balanced.

    `MoeMlp.capacity_factor` is the mean number of experts a token gets. A token's experts depend on its whole group,
    later tokens included: not for decoders that predict the next token.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        z_loss: float = 0.0,
        init: Callable[[int], Initializer] = fan_in_init(),
    ):
        """`z_loss` is the coefficient of `router_losses.z`."""
        super().__init__(d_model, num_experts, init, rngs)
        self.z_loss = z_loss

    def __call__(self, x: jax.Array, *, real: jax.Array, rng: jax.Array | None = None) -> ExpertScores:
        """x [batch, length, d_model], `real` float32 [batch, length] (0 on padding); `rng` None means inference."""
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits)
        router_losses.report_entropy(probabilities, real)
        _add_losses(rng, z=(self.z_loss, lambda: router_losses.z(logits, real)))
        return ExpertScores(probabilities)


def _check_k(router: str, k: int, eval_k: int | None, num_experts: int, priority: str) -> None:
    for name, value in (("k", k), ("eval_k", eval_k)):
        if value is not None and not 1 <= value <= num_experts:
            raise ValueError(f"{router}.{name}={value}: a token can take 1 to num_experts={num_experts} experts")
    if priority not in PRIORITIES:
        raise ValueError(f"{router}.priority must be one of {PRIORITIES}, not {priority!r}")


def _priority(gates: jax.Array, priority: str) -> jax.Array | None:
    return jax.lax.stop_gradient(jnp.max(gates, axis=-1)) if priority == "score" else None


def _best(scores: jax.Array, k: int) -> jax.Array:
    """Returns the k best experts, int32 [..., k], best first, the lower index first among equals.

    The same as `lax.top_k`, which XLA does not partition: every device would route the tokens of all.
    """
    scores, found = jax.lax.stop_gradient(scores), []
    for _ in range(k):
        found.append(jnp.argmax(scores, axis=-1).astype(jnp.int32))
        scores = jnp.where(jax.nn.one_hot(found[-1], scores.shape[-1], dtype=bool), -jnp.inf, scores)
    return jnp.stack(found, axis=-1)


def _at(values: jax.Array, experts: jax.Array) -> jax.Array:
    """values [..., experts] at experts [..., k]; by comparison, since the gradient of indexing is not partitioned."""
    chosen = jax.nn.one_hot(experts, values.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(chosen, values[..., None, :], 0.0), axis=-1)


def _report_statistics(probabilities: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Reports how even the choices are; returns each expert's share of them, [experts]."""
    loads = router_losses.shares(experts, probabilities.shape[-1], real)
    router_losses.report_loads(loads)
    router_losses.report_entropy(probabilities, real)
    return loads


def _add_losses(rng: jax.Array | None, **losses: tuple[float, Callable[[], jax.Array]]) -> None:
    """Adds coefficient * value of each to the training loss; at inference none."""
    for name, (coefficient, value) in losses.items():
        if rng is not None and coefficient:
            add_loss(f"router_{name}_loss", coefficient * value())
