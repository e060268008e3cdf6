"""What becomes of an example that is longer than a row: the arithmetic of four policies, from sizes alone."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Sizes
from meshway.framework.data.rows.packing import Example
from meshway.framework.errors import UserError, did_you_mean

POLICIES = ("truncate", "split", "skip", "error")
WHOLE = ("truncate", "skip", "error")  # those that keep an example in one piece


@dataclasses.dataclass(frozen=True)
class Overlong:
    """A policy for one task's features.

    Attributes:
      policy: 'truncate' cuts each feature at its end, as seqio does; 'split' makes windows of a single feature,
        which lose nothing (an empty one makes none); 'skip' leaves the whole example out; 'error' raises.
      task_name: for messages.
      limits: task feature -> tokens of it that an item may have.
    """

    policy: str
    task_name: str
    limits: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.policy == "split" and len(self.limits) != 1:
            raise ValueError(f"'split' makes windows of one feature, not of {list(self.limits)}")

    @property
    def trims(self) -> Mapping[str, int]:
        """The features that are cut at their end, and to how many tokens, as `Objective.trims`."""
        return self.limits if self.policy == "truncate" else {}

    def parts(self, sizes: Sizes) -> np.ndarray:
        """Returns how many items each example makes, int64 [examples], as `Objective.parts`.

        Raises:
          UserError: the policy is 'error' and an example is too long.
        """
        if self.policy == "split":
            ((name, limit),) = self.limits.items()
            return windows(sizes[name], limit)
        fits = self._fits(sizes)
        if self.policy == "error" and not fits.all():
            raise UserError(self._complaint(sizes, fits))
        return fits.astype(np.int64) if self.policy == "skip" else np.ones(len(fits), np.int64)

    def lost(self, sizes: Sizes) -> np.ndarray:
        """Returns how many tokens of each example no item shows, int64 [examples]."""
        whole = {name: np.asarray(sizes[name], np.int64) for name in self.limits}
        if self.policy == "truncate":
            return np.sum([np.maximum(whole[name] - limit, 0) for name, limit in self.limits.items()], axis=0)
        if self.policy == "skip":
            return np.sum(list(whole.values()), axis=0) * ~self._fits(sizes)
        return np.zeros(len(next(iter(whole.values()))), np.int64)

    def measure(self, sizes: Sizes, part: np.ndarray) -> dict[str, np.ndarray]:
        """Returns task feature -> tokens of part `part` [items] of examples of `sizes` [items], int64 [items]."""
        return {name: window_size(sizes[name], part, limit) for name, limit in self.limits.items()}

    def cut(self, example: Example, part: int) -> dict[str, np.ndarray]:
        """Returns task feature -> the tokens of part `part` of `example`, as many as `measure` says."""
        return {
            name: np.asarray(example[name])[part * limit : (part + 1) * limit] for name, limit in self.limits.items()
        }

    def _fits(self, sizes: Sizes) -> np.ndarray:
        return np.all([np.asarray(sizes[name]) <= limit for name, limit in self.limits.items()], axis=0)

    def _complaint(self, sizes: Sizes, fits: np.ndarray) -> str:
        longest = {name: int(np.max(sizes[name])) for name in self.limits}
        found = ", ".join(
            f"{name!r} has up to {longest[name]} tokens where {limit} fit"
            for name, limit in self.limits.items()
            if longest[name] > limit
        )
        count = int((~fits).sum())
        return (
            f"task {self.task_name!r}: {count:,} of {len(fits):,} examples are longer than a row ({found}) and "
            "overlong is 'error'; raise TASK_FEATURE_LENGTHS, or choose another overlong policy"
        )


def windows(size: np.ndarray, limit: int) -> np.ndarray:
    """Returns how many windows of at most `limit` tokens hold `size` [n] tokens, int64 [n]; none for no token."""
    return -(-np.asarray(size, np.int64) // limit)


def window_size(size: np.ndarray, part: np.ndarray, limit: int) -> np.ndarray:
    """Returns how many of `size` [n] tokens lie in window number `part` [n] of `limit`, int64 [n]."""
    return np.clip(np.asarray(size, np.int64) - np.asarray(part, np.int64) * limit, 0, limit)


def check_policy(policy: str, converter: str, allowed: Sequence[str] = POLICIES) -> str:
    """Returns `policy`; UserError naming the converter when it is not among `allowed`."""
    if policy not in allowed:
        near = did_you_mean(str(policy), allowed)
        raise UserError(f"{converter}.overlong is {policy!r}, but may be one of {list(allowed)}{near}")
    return policy
