"""Remat policies: what a layer keeps for its backward pass; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

Policy = Callable[..., bool]  # asked of each operation: (primitive, *arrays, **params) -> whether its result is kept

# What only moves numbers: cheap to do again.
MOVES = frozenset(
    [
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "dynamic_slice",
        "gather",
        "reshape",
        "sharding_constraint",
        "slice",
        "squeeze",
        "transpose",
    ]
)


def _through_calls(policy: Policy) -> Policy:
    """Returns a policy that looks into functions with a derivative of their own, such as `linear.project`: jax asks of
    them as a whole, and a policy about products would keep none."""

    def keeps(primitive: Any, *arrays: Any, **params: Any) -> bool:
        inner = params.get("call_jaxpr")
        if inner is None:
            return policy(primitive, *arrays, **params)
        return any(keeps(e.primitive, *[v.aval for v in e.invars], **e.params) for e in inner.jaxpr.eqns)

    return keeps


# By the name that `Stack.remat` takes.
POLICIES: dict[str, Policy | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _through_calls(jax.checkpoint_policies.dots_saveable),
    # Keeps projections, not scores.
    "minimal": _through_calls(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy that computes MOVES again, and nothing else."""
    return primitive.name not in MOVES


def of_one_stage(policy: Policy) -> Policy:
    """Returns a policy for all stages of a pipeline at once that decides as `policy` does for one: where stages are an
    axis of a `vmap`, each product has a batch axis more."""

    def decides(primitive: Any, *arrays: Any, **params: Any) -> bool:
        if primitive is jax.lax.dot_general_p:
            contracted, (left, right) = params["dimension_numbers"]
            params = params | {"dimension_numbers": (contracted, (left[1:], right[1:]))}
        return policy(primitive, *arrays, **params)

    return _through_calls(decides)
