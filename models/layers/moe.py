"""A mixture-of-experts feed-forward layer: each token passes through a few of many experts."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meshway.framework.axes import constrain
from meshway.models.layers.integer_products import IntegerProduct
from meshway.models.layers.mixture import dispatch as dispatch_lib
from meshway.models.layers.mixture.dispatch import Dispatched, Groups, Routed, capacity_of
from meshway.models.layers.mixture.dropless import dropless, ragged
from meshway.models.layers.mixture.expert_mesh import ExpertMesh, expert_mesh
from meshway.models.layers.mixture.experts import Experts
from meshway.models.layers.mixture.routers import Choices, RouterFactory, TokenChoices, TopK
from meshway.models.layers.mlp import Mlp
from meshway.models.layers.norm import dropout, split_key
from meshway.models.layers.side_outputs import add_metric, padding_mask

DISPATCHES: dict[str, Callable[..., Dispatched]] = {
    "all_to_all": dispatch_lib.all_to_all,
    "einsum": dispatch_lib.einsum,
    "dropless": dropless,
    "ragged": ragged,
}
SLOTLESS = ("dropless", "ragged")


class MoeMlp(nnx.Module):
    """A mixture of experts, which replaces `mlp.Mlp` in a block (Shazeer et al. 2017; Fedus et al. 2022).

    Parameters: router/kernel [embed, expert]; experts/wi_0, wi_1 .. [expert, embed, mlp] and experts/wo [expert, mlp,
    embed]; shared/.. those of an `Mlp` of num_shared_experts * d_ff hidden units, which every token passes through with
    a weight of 1 (DeepSeek-V3).

    It reports "router/load_max" and "router/load_min" (the largest and smallest expert's share of the choices, 1 is
    even), "router/entropy" (nats, mean over tokens) and "router/drop_rate" (the share of choices dropped for lack of a
    slot; where experts choose, of tokens that no expert took), all over real tokens.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        rngs: nnx.Rngs,
        router: RouterFactory = TopK,
        dispatch: Literal["all_to_all", "einsum", "dropless", "ragged"] = "all_to_all",
        activations: Sequence[str] = ("gelu", "linear"),
        num_shared_experts: int = 0,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float | None = None,
        group_rows: int = 1,
        groups_per_row: int = 1,
        dropout_rate: float = 0.0,
        products: IntegerProduct | None = None,
    ):
        """Args:
          d_model, d_ff: features of a token, hidden units of one expert.
          num_experts: experts to choose from.
          rngs: for the initial parameters.
          router: one of `routers`.
          dispatch: "all_to_all" moves tokens to slots; "einsum" does the same by one-hot products; "dropless" has no
            slots, drops nothing and ignores the capacity factors: where experts are sharded it gathers tokens; "ragged"
            sends them instead, by a ragged all-to-all (TPUs and GPUs; on CPU emulated by a gather, for tests).
          activations: names of `mlp.ACTIVATIONS`.
          num_shared_experts: experts that take every token.
          capacity_factor: an expert's slots in a group over its even share of the choices; `eval_capacity_factor` at
            inference, None for the same.
          group_rows: how many rows of the batch share slots. With 1, the result of a row depends on no other row.
          groups_per_row: into how many groups a row is split instead, for layouts that shard the length.
          dropout_rate: of hidden units; tokens of a group share a mask, as those of a row do in an `Mlp`.
          products: computes the experts' products in integers; a router's stay as they are.

        Raises:
          ValueError: an unknown option, a number out of range, or an argument that the router refuses.
        """
        if dispatch not in DISPATCHES:
            raise ValueError(f"MoeMlp.dispatch must be one of {sorted(DISPATCHES)}, not {dispatch!r}")
        _check_positive(num_experts=num_experts, group_rows=group_rows, groups_per_row=groups_per_row)
        _check_positive(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        if group_rows > 1 and groups_per_row > 1:
            raise ValueError(
                f"MoeMlp: group_rows={group_rows} joins rows, groups_per_row={groups_per_row} splits them; "
                "one must be 1"
            )
        self.router = router(d_model=d_model, num_experts=num_experts, rngs=rngs)
        self.experts = Experts(d_model, d_ff, num_experts, activations, rngs=rngs, products=products)
        self.shared: Mlp | None
        if num_shared_experts:
            self.shared = Mlp(
                d_model,
                num_shared_experts * d_ff,
                rngs=rngs,
                activations=activations,
                dropout_rate=dropout_rate,
                products=products,
            )
        else:
            self.shared = None
        self.d_ff, self.num_experts, self.dispatch, self.dropout_rate = d_ff, num_experts, dispatch, dropout_rate
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.group_rows, self.groups_per_row = group_rows, groups_per_row

    def __call__(self, x: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
        """x [batch, length, d_model] -> the same shape; `rng` None means inference.

        Raises:
          ValueError: groups do not divide the batch, or are split across devices; "expert" is mapped to mesh axes of
            which only some shard the tokens.
        """
        keys = split_key(rng, 3)
        x = constrain(x, ("batch", "length", "embed"), free_for="mlp")
        real = padding_mask(x)
        weights = self.experts.weights(x.dtype)
        mesh = expert_mesh(x.shape, weights.inputs[0].shape)
        choices = self.router(x, real=real, rng=keys[0])
        rows, parts = self._num_groups(x.shape, mesh)
        groups = self._groups(x.shape[0] * x.shape[1] // (rows * parts), choices, inference=rng is None)
        masks = None
        if keys[1] is not None and self.dropout_rate:
            masks = dropout(jnp.ones((rows, parts, self.d_ff), x.dtype), self.dropout_rate, keys[1], shared_axis=None)
        y, kept = DISPATCHES[self.dispatch](Routed(x, choices, real), weights, masks, groups, mesh)
        _report_drops(kept, choices, real)
        if self.shared is not None:
            y = y + self.shared(x, rng=keys[2])
        return checkpoint_name(constrain(y, ("batch", "length", "embed")), "mlp_wo")

    def _num_groups(self, shape: tuple[int, ...], mesh: ExpertMesh | None) -> tuple[int, int]:
        """Returns (groups along the batch, groups along each row)."""
        batch, length = shape[:2]
        if self.dispatch in SLOTLESS:
            return batch, 1
        rows, parts = self.group_rows, 1 if length == 1 else self.groups_per_row
        if batch % rows or length % parts:
            raise ValueError(
                f"MoeMlp: a batch of {batch} rows of {length} tokens is not divisible into groups of {rows} rows or "
                f"into {parts} groups a row; change group_rows or groups_per_row, or bind dispatch = 'dropless'"
            )
        by_batch, by_length = (1, 1) if mesh is None else (mesh.size(mesh.batch), mesh.size(mesh.length))
        if batch // rows % by_batch:
            raise ValueError(
                f"MoeMlp: {batch} rows in groups of {rows} give {batch // rows} groups, which the {by_batch} devices "
                "that shard the batch cannot share evenly; lower MoeMlp.group_rows"
            )
        if parts % by_length:
            raise ValueError(
                f"MoeMlp: the layout shards the length {by_length} ways, across groups that share slots; bind "
                f"moe.MoeMlp.groups_per_row to a multiple of {by_length}, or dispatch = 'dropless'"
            )
        return batch // rows, parts

    def _groups(self, tokens: int, choices: Choices, inference: bool) -> Groups:
        per_token = choices.experts.shape[-1] if isinstance(choices, TokenChoices) else 1
        factor = self.eval_capacity_factor if inference else self.capacity_factor
        return Groups(tokens, capacity_of(tokens, per_token, self.num_experts, factor))


def _report_drops(kept: jax.Array, choices: Choices, real: jax.Array) -> None:
    wanted = choices.experts.shape[-1] if isinstance(choices, TokenChoices) else 1
    found = jnp.minimum(kept, wanted) * real
    add_metric("router/drop_rate", 1.0 - jnp.sum(found) / (wanted * jnp.maximum(jnp.sum(real), 1.0)))


def _check_positive(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise ValueError(f"MoeMlp.{name} must be positive, not {value}")
