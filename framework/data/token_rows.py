"""Laid-out tokens as batch features, under T5X's names, and what becomes of examples longer than a row.

Segment ids and positions are always there, packed or not: 0 in a segment id is padding, and token 0 anywhere
else is data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from meshway.framework.data.objective import Items, Sizes, Spec, TaskInfo
from meshway.framework.data.rows.packing import Arrays, Example, Placement
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


class Rows(Protocol):
    """How examples of one task, once short enough, become rows: the part in which converters of text differ."""

    def lengths(self, limits: Mapping[str, int]) -> Mapping[str, int]:
        """Returns row feature -> tokens of a row, where items have up to `limits` tokens by task feature."""
        ...

    def measure(self, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns row feature -> tokens of each item [items], of its tokens by task feature [items]."""
        ...

    def item(self, tokens: dict[str, np.ndarray], example: Example, first: int, seed: int) -> dict[str, np.ndarray]:
        """Returns one item's row features.

        Args:
          tokens: task feature -> the item's tokens.
          example: the whole example.
          first: the number of the item's first token in its example, 0 unless that was split.
          seed: of this item in this epoch.
        """
        ...

    def lay(self, items: Sequence[Example], lengths: Mapping[str, int], placement: Placement) -> Arrays:
        """Returns the batch features of items, as `Objective.lay`; `lengths` are those of a row."""
        ...

    def prompts(self, examples: Sequence[dict[str, np.ndarray]], limits: Mapping[str, int]) -> Arrays:
        """Returns what prediction reads of examples' tokens; UserError where there is nothing to predict."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenObjective:
    """A converter of token ids bound to one task: the `Objective` of all that read text as their task made it.

    Attributes:
      overlong: what becomes of long examples.
      rows: what is made of what remains.
    """

    overlong: Overlong
    rows: Rows
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return self.rows.lengths(self.overlong.limits)

    @property
    def trims(self) -> Mapping[str, int]:
        return self.overlong.trims

    def parts(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.parts(sizes)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.lost(sizes)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        return self.rows.measure(self.overlong.measure(sizes, items.part))

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        first = part * next(iter(self.overlong.limits.values()))  # an example that is split has one feature
        return self.rows.item(self.overlong.cut(example, part), example, first, seed)

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        return self.rows.lay(items, self.row_lengths, placement)

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        return self.rows.prompts([self.overlong.cut(example, 0) for example in examples], self.overlong.limits)


DECODER: Mapping[str, type] = {
    "decoder_input_tokens": np.int32,
    "decoder_target_tokens": np.int32,
    "decoder_loss_weights": np.float32,
    "decoder_segment_ids": np.int32,
    "decoder_positions": np.int32,
}
ENCODER: Mapping[str, type] = {
    "encoder_input_tokens": np.int32,
    "encoder_segment_ids": np.int32,
    "encoder_positions": np.int32,
}


def token_spec(dtypes: Mapping[str, type], batch_size: int, length: int) -> Spec:
    """Returns name -> ((batch, length), dtype)."""
    return {name: ((batch_size, length), np.dtype(dtype)) for name, dtype in dtypes.items()}


def encoder_arrays(laid: Arrays) -> Arrays:
    """Returns the encoder's batch features of `packing.lay_out`'s arrays of `inputs`."""
    return {
        "encoder_input_tokens": laid["inputs"],
        "encoder_segment_ids": laid["inputs_segment_ids"],
        "encoder_positions": laid["inputs_positions"],
    }


@dataclasses.dataclass(frozen=True)
class Start:
    """What a decoder reads before each segment of a row.

    A segment may bring its start along, or there may be none: its tokens are then read where they lie, the first of
    them is predicted by nothing, and what the others carry moves to the place before, where they are predicted.

    Attributes:
      ids: the id; () for none.
      bos: the id where a text may spell it out itself, see `Framing.bos`; else ().
    """

    ids: tuple[int, ...]
    bos: tuple[int, ...] = ()

    def read(self, laid: Arrays, name: str) -> np.ndarray:
        """Returns the tokens of row feature `name` of `packing.lay_out`'s arrays as the decoder reads them."""
        tokens, first = laid[name], self.ids[0] if self.ids else 0
        shifted = np.where(laid[f"{name}_segment_ids"] > 0, shift_right(tokens, laid[f"{name}_positions"], first), 0)
        return np.where(self._brought(laid, name), tokens, shifted)

    def predicted(self, values: np.ndarray, laid: Arrays, name: str) -> np.ndarray:
        """Returns values of the tokens of `name` [rows, length] where each is predicted; 0 where none is."""
        return np.where(self._brought(laid, name), shift_left(values, laid[f"{name}_positions"]), values)

    def prefix(self, is_input: np.ndarray, laid: Arrays, name: str) -> np.ndarray:
        """Returns where the decoder reads a start or a token that `is_input`, int32 [rows, length]."""
        positions, real = laid[f"{name}_positions"], laid[f"{name}_segment_ids"] > 0
        return np.where(self._brought(laid, name), is_input, shift_right(is_input, positions, 1)) * real

    def _brought(self, laid: Arrays, name: str) -> np.ndarray:
        """Returns which tokens are of a segment that nothing is put before, bool [rows, length]."""
        tokens, positions = laid[name], laid[f"{name}_positions"]
        if not self.ids or not self.bos:
            return np.full(tokens.shape, not self.ids)
        begins = (positions == 0) & (laid[f"{name}_segment_ids"] > 0) & (tokens == self.bos[0])
        heads = np.maximum.accumulate(np.where(positions == 0, np.arange(tokens.shape[1]), 0), axis=1)
        return np.take_along_axis(begins, heads, axis=1)


def decoder_arrays(laid: Arrays, name: str, start: Start) -> Arrays:
    """Returns the decoder's batch features of `packing.lay_out`'s arrays of row feature `name`."""
    segment_ids = laid[f"{name}_segment_ids"]
    return {
        "decoder_input_tokens": start.read(laid, name),
        "decoder_target_tokens": start.predicted(laid[name], laid, name),
        "decoder_loss_weights": start.predicted((segment_ids > 0).astype(np.float32), laid, name),
        "decoder_segment_ids": segment_ids,
        "decoder_positions": laid[f"{name}_positions"],
    }


def shift_right(tokens: np.ndarray, positions: np.ndarray, first: int) -> np.ndarray:
    """Shifts each segment right by one, `first` at its head; [rows, length] each."""
    return np.where(positions == 0, np.int32(first), np.roll(tokens, 1, axis=1))


def shift_left(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Shifts each segment left by one, 0 at its end; [rows, length] each."""
    following, rest = np.roll(values, -1, axis=1), np.roll(positions, -1, axis=1) == positions + 1
    rest[:, -1:] = False
    return np.where(rest, following, np.zeros((), values.dtype))


def start_of(kind: str, task: TaskInfo, least: int) -> Start:
    """Returns what the task's decoder starts from; UserError unless it is one id, or none where `least` is 0."""
    if not least <= len(task.start) <= 1:
        raise UserError(
            f"task {task.name!r}: under {kind} a decoder starts from {'one id' if least else 'one id or none'}, not "
            f"from {list(task.start)}; say which by the data's setting `start`, such as CachedData.start = [0]"
        )
    return Start(task.start, task.bos)


def check_tokens(kind: str, task: TaskInfo, lengths: Mapping[str, int], features: Sequence[str]) -> None:
    """Checks that `features` are in the task, hold token ids, and that `lengths` lists them and nothing else.

    Args:
      kind: the converter's name, for messages.
      task: the task.
      lengths: TASK_FEATURE_LENGTHS.
      features: the features the converter reads.

    Raises:
      UserError: they do not; names the feature, the task and the shape at fault.
    """
    for name in features:
        if name not in task.features:
            raise UserError(task.lacks(name, kind))
        check_token_feature(task, name)
        if name not in lengths:
            near = did_you_mean(name, set(lengths) - set(task.features))
            example = {feature: lengths.get(feature, 128) for feature in features}
            raise UserError(
                f"TASK_FEATURE_LENGTHS lacks {name!r}, a feature of task {task.name!r}{near}; "
                f'give --gin.TASK_FEATURE_LENGTHS="{example}"'
            )
    for name, length in lengths.items():
        if name not in features:
            what = f"which {kind} never reads" if name in task.features else "which the task has not"
            raise UserError(
                f"TASK_FEATURE_LENGTHS gives a length for {name!r}, {what}: task {task.name!r} under {kind} "
                f"has {list(features)}{did_you_mean(name, features)}"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise UserError(f"TASK_FEATURE_LENGTHS[{name!r}] must be a whole number of tokens, not {length!r}")


def check_token_feature(task: TaskInfo, name: str) -> None:
    """Raises UserError unless feature `name` of the task holds token ids: integers, rank 1."""
    info = task.features[name]
    if len(info.shape) != 1 or np.dtype(info.dtype if info.dtype != "bytes" else object).kind not in "iu":
        raise UserError(
            f"task {task.name!r}: feature {name!r} has dtype {info.dtype} and shape {list(info.shape)}; "
            "a converter of text reads token ids, integers of rank 1"
        )
