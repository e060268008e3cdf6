"""Rematerialisation: which activations of a layer are kept for the backward pass, and where; others are made again."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax

Policy = Callable[..., Any]  # (primitive, *arrays, **params) -> whether the operation's result is saved

# Names that layers give their activations (`jax.ad_checkpoint.checkpoint_name`), for `by_name`.
NAMES = {
    "layer_input": "the residual stream before each period of a stack's pattern of blocks",
    "query_proj": "queries as they are projected",
    "key_proj": "keys as they are projected",
    "value_proj": "values as they are projected",
    "attention_out": "weighted sums of values, before they are projected",
    "out_proj": "what attention returns",
    "mlp_wi": "hidden units before their activation; of a gated layer both products",
    "mlp_wo": "what a feed-forward layer, or a mixture of experts, returns",
}
DEVICE, OFFLOAD = "device", "offload"

# Primitives that only move numbers: cheap to recompute.
MOVES = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "dynamic_slice",
        "gather",
        "name",
        "reshape",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    ]
)


def _through_calls(policy: Policy) -> Policy:
    """Returns a policy that looks into functions with a custom derivative, such as `mlp.project`: jax asks about the
    call as a whole, for which a policy about products would save nothing."""

    def keeps(primitive: Any, *arrays: Any, **params: Any) -> Any:
        inner = params.get("call_jaxpr")
        if inner is None:
            return policy(primitive, *arrays, **params)
        # What goes by name answers with objects, and no name is inside a call.
        return any(keeps(e.primitive, *[v.aval for v in e.invars], **e.params) is True for e in inner.jaxpr.eqns)

    return keeps


POLICIES: dict[str, Policy | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _through_calls(jax.checkpoint_policies.dots_saveable),
    # Keeps projections, not scores.
    "minimal": _through_calls(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def policy_of(remat: str | Mapping[str, str]) -> Policy | None:
    """Returns the policy that `Stack.remat` asks for, None to keep all.

    Args:
      remat: a policy of `POLICIES`; or some of `NAMES`, each with 'device', to keep it there, or 'offload', to keep it
        in the host's memory until the backward pass. All others are computed again.

    Raises:
      ValueError: no such policy, name or place, or the devices' host has no memory for them.
    """
    if isinstance(remat, str):
        if remat not in POLICIES:
            near = _near(remat, POLICIES)
            raise ValueError(f"Stack.remat: unknown policy {remat!r}{near}; known are {sorted(POLICIES)}")
        return POLICIES[remat]
    for name, place in remat.items():
        if name not in NAMES:
            raise ValueError(
                f"Stack.remat: no activation is called {name!r}{_near(name, NAMES)}; there are {list(NAMES)}"
            )
        if place not in (DEVICE, OFFLOAD):
            raise ValueError(f"Stack.remat: {name!r} is kept in {place!r}; it is {DEVICE!r} or {OFFLOAD!r}")
    offloaded = [name for name, place in remat.items() if place == OFFLOAD]
    device = jax.local_devices()[0]
    if offloaded and "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"Stack.remat: {offloaded[0]!r} is to be offloaded, and jax shows no pinned_host memory beside "
            f"{device.device_kind}: keep it on the {DEVICE!r}, or leave it out to compute it again"
        )
    policy: Policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in remat if name not in offloaded],
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )
    return policy


def _near(name: str, known: Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy that recomputes MOVES, and nothing else."""
    return primitive.name not in MOVES


def of_one_stage(policy: Policy) -> Policy:
    """Returns a policy for all stages of a pipeline at once that decides as `policy` does for one: under the `vmap`
    over stages each product has one more batch axis."""

    def decides(primitive: Any, *arrays: Any, **params: Any) -> Any:
        if primitive is jax.lax.dot_general_p:
            contracted, (left, right) = params["dimension_numbers"]
            params = params | {"dimension_numbers": (contracted, (left[1:], right[1:]))}
        return policy(primitive, *arrays, **params)

    return _through_calls(decides)
