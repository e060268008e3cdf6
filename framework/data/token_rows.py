"""Laid-out tokens as batch features, under T5X's names. Shared by the objectives over tokens.

Segment ids and positions are always there, packed or not: 0 in a segment id is padding, and token 0 anywhere
else is data.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Spec, TaskInfo
from meshway.framework.data.rows.packing import Arrays
from meshway.framework.errors import UserError, did_you_mean

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


def decoder_arrays(laid: Arrays, name: str, start: Sequence[int]) -> Arrays:
    """Returns the decoder's batch features of `packing.lay_out`'s arrays of row feature `name`.

    Args:
      laid: the arrays.
      name: the row feature.
      start: the id that the decoder reads before each segment; () for none: then nothing predicts its first token.
    """
    tokens, segment_ids, positions = laid[name], laid[f"{name}_segment_ids"], laid[f"{name}_positions"]
    real = (segment_ids > 0).astype(np.float32)
    read = np.where(segment_ids > 0, shift_right(tokens, positions, start[0]), 0) if start else tokens
    return {
        "decoder_input_tokens": read,
        "decoder_target_tokens": tokens if start else shift_left(tokens, positions),
        "decoder_loss_weights": real if start else shift_left(real, positions),
        "decoder_segment_ids": segment_ids,
        "decoder_positions": positions,
    }


def shift_right(tokens: np.ndarray, positions: np.ndarray, first: int) -> np.ndarray:
    """Shifts each segment right by one, `first` at its head; [rows, length] each."""
    return np.where(positions == 0, np.int32(first), np.roll(tokens, 1, axis=1))


def shift_left(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Shifts each segment left by one, 0 at its end; [rows, length] each."""
    following, rest = np.roll(values, -1, axis=1), np.roll(positions, -1, axis=1) == positions + 1
    rest[:, -1:] = False
    return np.where(rest, following, np.zeros((), values.dtype))


def check_start(kind: str, task: TaskInfo, least: int) -> None:
    """Raises UserError unless the task's decoder starts from one id, or from none where `least` is 0."""
    if not least <= len(task.start) <= 1:
        raise UserError(
            f"task {task.name!r}: under {kind} a decoder starts from {'one id' if least else 'one id or none'}, not "
            f"from {list(task.start)}; say which by the data's setting `start`, such as CachedData.start = [0]"
        )


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
