"""Feature converters: from a task's tokenised examples to the arrays a model reads, under T5X's names.

Segment ids and positions are always emitted, packed or not: 0 in a segment id is padding, and token 0
anywhere else is data. A feature longer than its TASK_FEATURE_LENGTHS entry is trimmed at its end, as seqio
does; a task that wants EOS to survive the trim appends it with `seqio.preprocessors.append_eos_after_trim`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from meshway.framework.data import packing
from meshway.framework.data.packing import Arrays, Example
from meshway.framework.errors import UserError, did_you_mean

Spec = dict[str, tuple[tuple[int, int], np.dtype]]
BOS_ID = 0  # what the decoder reads first, T5's choice: the padding id doubles as the start token

_DECODER = {
    "decoder_input_tokens": np.int32,
    "decoder_target_tokens": np.int32,
    "decoder_loss_weights": np.float32,
    "decoder_segment_ids": np.int32,
    "decoder_positions": np.int32,
}
_ENCODER = {
    "encoder_input_tokens": np.int32,
    "encoder_segment_ids": np.int32,
    "encoder_positions": np.int32,
}


class Converter(Protocol):
    """What a data source asks of a feature converter; a user's own meets it by shape."""

    pack: bool
    can_predict: bool  # whether `prompts` works
    task_features: tuple[str, ...]  # the features of a task it reads

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec: ...

    def check(self, task_name: str, example_features: Collection[str], lengths: Mapping[str, int]) -> None: ...

    def rows(self, examples: Sequence[Example], lengths: Mapping[str, int], packed: bool) -> Arrays: ...

    def prompts(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> Arrays: ...


class EncoderDecoder:
    """`inputs` to the encoder, `targets` to the decoder.

    Args:
      pack: whether training rows hold several examples.
    """

    can_predict = True
    task_features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, pack: bool = True) -> None:
        self.pack = pack

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        encoder = _spec(_ENCODER, batch_size, lengths["inputs"])
        return encoder | _spec(_DECODER, batch_size, lengths["targets"])

    def check(self, task_name: str, example_features: Collection[str], lengths: Mapping[str, int]) -> None:
        """Raises UserError when `lengths` and the task's features do not fit this converter or each other."""
        _check(self, task_name, example_features, lengths)

    def rows(self, examples: Sequence[Example], lengths: Mapping[str, int], packed: bool) -> Arrays:
        """Returns the arrays [rows, length] of `spec`; unpacked, row i is example i."""
        laid = _lay(examples, {name: lengths[name] for name in self.task_features}, packed)
        return _encoder_arrays(laid) | _decoder_arrays(laid, "targets")

    def prompts(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> Arrays:
        """Returns the encoder's arrays [examples, inputs length], row i of example i."""
        return _encoder_arrays(_lay(examples, {"inputs": lengths["inputs"]}, packed=False))


class LanguageModel:
    """`targets` to a causal decoder, loss on every token.

    Args:
      pack: whether training rows hold several examples.
    """

    can_predict = False
    task_features: tuple[str, ...] = ("targets",)

    def __init__(self, pack: bool = True) -> None:
        self.pack = pack

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        return _spec(_DECODER, batch_size, lengths["targets"])

    def check(self, task_name: str, example_features: Collection[str], lengths: Mapping[str, int]) -> None:
        """Raises UserError as `EncoderDecoder.check` does, and for a task with inputs."""
        if "inputs" in example_features:
            raise UserError(
                f"task {task_name!r} has 'inputs', which LanguageModel never reads; "
                "use the converter PrefixLanguageModel, or a task with 'targets' alone"
            )
        _check(self, task_name, example_features, lengths)

    def rows(self, examples: Sequence[Example], lengths: Mapping[str, int], packed: bool) -> Arrays:
        """Returns the arrays [rows, length] of `spec`; unpacked, row i is example i."""
        return _decoder_arrays(_lay(examples, {"targets": lengths["targets"]}, packed), "targets")

    def prompts(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> Arrays:
        """Raises UserError: such a task has nothing to be prompted with."""
        raise UserError("LanguageModel tasks have no inputs to predict from; use PrefixLanguageModel for prediction")


class PrefixLanguageModel:
    """`inputs` then `targets` to one decoder, which sees the inputs in both directions.

    The decoder's length is the sum of both feature lengths. `decoder_prefix_mask` is 1 where the decoder
    reads its start token or an input, the positions that may attend to each other in both directions.

    Args:
      pack: whether training rows hold several examples.
      loss_on_targets_only: whether inputs carry no loss. When they do carry it, the prefix mask is 0
        everywhere: a decoder that sees the inputs in both directions would only copy them.
    """

    can_predict = True
    task_features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, pack: bool = True, loss_on_targets_only: bool = True) -> None:
        self.pack = pack
        self.loss_on_targets_only = loss_on_targets_only

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        dtypes = _DECODER | {"decoder_prefix_mask": np.int32}
        return _spec(dtypes, batch_size, lengths["inputs"] + lengths["targets"])

    def check(self, task_name: str, example_features: Collection[str], lengths: Mapping[str, int]) -> None:
        """Raises UserError when `lengths` and the task's features do not fit this converter or each other."""
        _check(self, task_name, example_features, lengths)

    def rows(self, examples: Sequence[Example], lengths: Mapping[str, int], packed: bool) -> Arrays:
        """Returns the arrays [rows, inputs + targets length] of `spec`; unpacked, row i is example i."""
        joined = []
        for example in examples:
            inputs = np.asarray(example["inputs"])[: lengths["inputs"]]
            targets = np.asarray(example["targets"])[: lengths["targets"]]
            is_input = np.arange(len(inputs) + len(targets)) < len(inputs)
            joined.append({"sequence": np.concatenate([inputs, targets]), "is_input": is_input.astype(np.int32)})
        length = lengths["inputs"] + lengths["targets"]
        laid = _lay(joined, {"sequence": length, "is_input": length}, packed)
        arrays = _decoder_arrays(laid, "sequence")
        if self.loss_on_targets_only:
            real = laid["sequence_segment_ids"] > 0
            # The start token belongs to the prefix, hence 1 at the head of each segment.
            arrays["decoder_prefix_mask"] = _shift_right(laid["is_input"], laid["sequence_positions"], 1) * real
            arrays["decoder_loss_weights"] *= 1 - laid["is_input"]
        else:
            arrays["decoder_prefix_mask"] = np.zeros_like(laid["is_input"])
        return arrays

    def prompts(self, examples: Sequence[Example], lengths: Mapping[str, int]) -> Arrays:
        """Returns what prediction reads, row i of example i: arrays [examples, 1 + inputs length].

        `decoder_input_tokens` holds the start token and then the inputs, from the left; targets and weights
        are 0. With `loss_on_targets_only` off the prefix mask is 0, as it was in training.
        """
        starts = [
            {"sequence": np.concatenate([[BOS_ID], np.asarray(example["inputs"])[: lengths["inputs"]]])}
            for example in examples
        ]
        laid = packing.pad(starts, {"sequence": lengths["inputs"] + 1})
        real = laid["sequence_segment_ids"]
        return {
            "decoder_input_tokens": laid["sequence"],
            "decoder_target_tokens": np.zeros_like(real),
            "decoder_loss_weights": np.zeros(real.shape, np.float32),
            "decoder_segment_ids": real,
            "decoder_positions": laid["sequence_positions"],
            "decoder_prefix_mask": real.copy() if self.loss_on_targets_only else np.zeros_like(real),
        }


def _spec(dtypes: Mapping[str, type], batch_size: int, length: int) -> Spec:
    return {name: ((batch_size, length), np.dtype(dtype)) for name, dtype in dtypes.items()}


def _check(converter: Converter, task_name: str, example_features: Collection[str], lengths: Mapping[str, int]) -> None:
    kind = type(converter).__name__
    for name in converter.task_features:
        if name not in example_features:
            raise UserError(
                f"task {task_name!r} has no feature {name!r}, which {kind} reads; it has {sorted(example_features)}"
            )
        if name not in lengths:
            near = did_you_mean(name, set(lengths) - set(example_features))
            example = {feature: lengths.get(feature, 128) for feature in converter.task_features}
            raise UserError(
                f"TASK_FEATURE_LENGTHS lacks {name!r}, a feature of task {task_name!r}{near}; "
                f'give --gin.TASK_FEATURE_LENGTHS="{example}"'
            )
    for name, length in lengths.items():
        if name not in converter.task_features:
            what = f"which {kind} never reads" if name in example_features else "which the task has not"
            raise UserError(
                f"TASK_FEATURE_LENGTHS gives a length for {name!r}, {what}: task {task_name!r} under {kind} "
                f"has {list(converter.task_features)}{did_you_mean(name, converter.task_features)}"
            )
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise UserError(f"TASK_FEATURE_LENGTHS[{name!r}] must be a whole number of tokens, not {length!r}")


def _lay(examples: Sequence[Example], lengths: Mapping[str, int], packed: bool) -> Arrays:
    trimmed = [{name: np.asarray(example[name])[:length] for name, length in lengths.items()} for example in examples]
    return packing.pack(trimmed, lengths) if packed else packing.pad(trimmed, lengths)


def _shift_right(tokens: np.ndarray, positions: np.ndarray, first: int) -> np.ndarray:
    """Shifts each segment right by one, `first` at its head; [rows, length] each."""
    return np.where(positions == 0, np.int32(first), np.roll(tokens, 1, axis=1))


def _encoder_arrays(laid: Arrays) -> Arrays:
    return {
        "encoder_input_tokens": laid["inputs"],
        "encoder_segment_ids": laid["inputs_segment_ids"],
        "encoder_positions": laid["inputs_positions"],
    }


def _decoder_arrays(laid: Arrays, name: str) -> Arrays:
    segment_ids, positions = laid[f"{name}_segment_ids"], laid[f"{name}_positions"]
    return {
        "decoder_input_tokens": _shift_right(laid[name], positions, BOS_ID),
        "decoder_target_tokens": laid[name],
        "decoder_loss_weights": (segment_ids > 0).astype(np.float32),
        "decoder_segment_ids": segment_ids,
        "decoder_positions": positions,
    }
