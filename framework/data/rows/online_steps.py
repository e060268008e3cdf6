"""Numpy twins of the seqio preprocessors that usually come after a cache, so that reading it needs no TensorFlow.

info.json lists a task's steps after the cut, as [{"step": "append_eos", "features": {"targets": 1}}]: the
features that get an EOS, with its id. It says TENSORFLOW where a step has no twin.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.objective import FeatureInfo, Sizes
from meshway.framework.data.rows.packing import Example

TWINS = ("append_eos", "append_eos_after_trim")  # of seqio.preprocessors
TENSORFLOW = "tensorflow"


@dataclasses.dataclass(frozen=True)
class AppendEos:
    """seqio.preprocessors.append_eos, or with `trims` append_eos_after_trim: along a feature's last axis.

    Attributes:
      eos: feature -> the id.
      ranks: feature -> number of dimensions.
      trims: cut a feature to its length less one first, where a length is given.
    """

    eos: Mapping[str, int]
    ranks: Mapping[str, int]
    trims: bool

    def apply(self, example: Example, lengths: Mapping[str, int]) -> Example:
        """Returns an example with its ends."""
        result = dict(example)
        for name, eos in self.eos.items():
            if name in result:
                value = result[name][..., : self._room(name, lengths)]
                ended = np.empty((*value.shape[:-1], value.shape[-1] + 1), value.dtype)
                ended[..., :-1], ended[..., -1] = value, eos
                result[name] = ended
        return result

    def sizes(self, sizes: Sizes, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Returns the sizes [examples] that `apply` leaves, by feature, from those it finds."""
        result = dict(sizes)
        for name in self.eos:
            if name in result and self.ranks[name] == 1:
                room = self._room(name, lengths)
                kept = result[name]
                if room is not None:
                    kept = np.minimum(kept, room) if room >= 0 else np.maximum(kept + room, 0)
                result[name] = kept + 1
        return result

    def _room(self, name: str, lengths: Mapping[str, int]) -> int | None:
        return lengths[name] - 1 if self.trims and lengths.get(name) is not None else None


def numpy_steps(
    entries: Sequence[Mapping[str, Any]] | str, features: Mapping[str, FeatureInfo]
) -> list[AppendEos] | None:
    """Returns the steps of info.json's `online`, for the cached `features`; None if they need TensorFlow."""
    if isinstance(entries, str):
        return None
    ranks = {name: len(info.shape) for name, info in features.items()}
    return [AppendEos(entry["features"], ranks, entry["step"] == "append_eos_after_trim") for entry in entries]
