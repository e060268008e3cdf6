"""Feature converters of examples as their task made them: encoder-decoder, language model, prefix LM.

Objectives that make their own inputs and targets of plain text are in `denoising.py` and `encoder_only.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Items, Sizes, Spec, TaskInfo
from meshway.framework.data.overlong import WHOLE, Overlong, check_policy
from meshway.framework.data.rows import packing
from meshway.framework.data.rows.packing import Arrays, Example, Placement
from meshway.framework.data.token_rows import (
    BOS_ID,
    DECODER,
    ENCODER,
    check_tokens,
    decoder_arrays,
    encoder_arrays,
    shift_right,
    token_spec,
)
from meshway.framework.errors import UserError


class EncoderDecoder:
    """`inputs` to the encoder, `targets` to the decoder.

    Args:
      pack: whether training rows hold several examples.
      overlong: what becomes of an example longer than its lengths: 'truncate', 'skip' or 'error'.
    """

    can_predict = True
    task_features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, pack: bool = True, overlong: str = "truncate") -> None:
        self.pack = pack
        self.overlong = check_policy(overlong, "EncoderDecoder", WHOLE)

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        encoder = token_spec(ENCODER, batch_size, lengths["inputs"])
        return encoder | token_spec(DECODER, batch_size, lengths["targets"])

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "EncoderDecoderObjective":
        """Returns the objective of a task; UserError when task, lengths and converter do not fit."""
        check_tokens("EncoderDecoder", task, lengths, self.task_features)
        return EncoderDecoderObjective(Overlong(self.overlong, task.name, dict(lengths)))


class LanguageModel:
    """`targets` to a causal decoder, loss on every token.

    Args:
      pack: whether training rows hold several examples.
      overlong: what becomes of an example longer than its length: 'split' into windows, which loses nothing,
        'truncate', 'skip' or 'error'.
    """

    can_predict = False
    task_features: tuple[str, ...] = ("targets",)

    def __init__(self, pack: bool = True, overlong: str = "split") -> None:
        self.pack = pack
        self.overlong = check_policy(overlong, "LanguageModel")

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        return token_spec(DECODER, batch_size, lengths["targets"])

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "LanguageModelObjective":
        """Returns the objective of a task; UserError as `EncoderDecoder.bind`, and for a task with inputs."""
        if "inputs" in task.features:
            raise UserError(
                f"task {task.name!r} has 'inputs', which LanguageModel never reads; "
                "use the converter PrefixLanguageModel, or a task with 'targets' alone"
            )
        check_tokens("LanguageModel", task, lengths, self.task_features)
        return LanguageModelObjective(Overlong(self.overlong, task.name, {"targets": lengths["targets"]}))


class PrefixLanguageModel:
    """`inputs` then `targets` to one decoder, which sees the inputs in both directions.

    The decoder's length is the sum of both feature lengths. `decoder_prefix_mask` is 1 where the decoder
    reads its start token or an input, the positions that may attend to each other in both directions.

    Args:
      pack: whether training rows hold several examples.
      loss_on_targets_only: whether inputs carry no loss. When they do carry it, the prefix mask is 0
        everywhere: a decoder that sees the inputs in both directions would only copy them.
      overlong: what becomes of an example longer than its lengths: 'truncate', 'skip' or 'error'.
    """

    can_predict = True
    task_features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, pack: bool = True, loss_on_targets_only: bool = True, overlong: str = "truncate") -> None:
        self.pack = pack
        self.loss_on_targets_only = loss_on_targets_only
        self.overlong = check_policy(overlong, "PrefixLanguageModel", WHOLE)

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        dtypes = {**DECODER, "decoder_prefix_mask": np.int32}
        return token_spec(dtypes, batch_size, lengths["inputs"] + lengths["targets"])

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "PrefixLanguageModelObjective":
        """Returns the objective of a task; UserError when task, lengths and converter do not fit."""
        check_tokens("PrefixLanguageModel", task, lengths, self.task_features)
        return PrefixLanguageModelObjective(
            Overlong(self.overlong, task.name, dict(lengths)), self.loss_on_targets_only
        )


@dataclasses.dataclass(frozen=True)
class EncoderDecoderObjective:
    """`EncoderDecoder` of one task."""

    overlong: Overlong
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return self.overlong.limits

    @property
    def trims(self) -> Mapping[str, int]:
        return self.overlong.trims

    def parts(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.parts(sizes)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.lost(sizes)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        return self.overlong.measure(sizes, items.part)

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        return self.overlong.cut(example, part)

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        laid = packing.lay_out(items, self.row_lengths, placement)
        return encoder_arrays(laid) | decoder_arrays(laid, "targets")

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        items = [self.overlong.cut(example, 0) for example in examples]
        lengths = {"inputs": self.row_lengths["inputs"]}
        return encoder_arrays(packing.lay_out(items, lengths, packing.one_each(len(items), list(lengths))))


@dataclasses.dataclass(frozen=True)
class LanguageModelObjective:
    """`LanguageModel` of one task."""

    overlong: Overlong
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return self.overlong.limits

    @property
    def trims(self) -> Mapping[str, int]:
        return self.overlong.trims

    def parts(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.parts(sizes)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.lost(sizes)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        return self.overlong.measure(sizes, items.part)

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        return self.overlong.cut(example, part)

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        return decoder_arrays(packing.lay_out(items, self.row_lengths, placement), "targets")

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        raise UserError("LanguageModel tasks have no inputs to predict from; use PrefixLanguageModel for prediction")


@dataclasses.dataclass(frozen=True)
class PrefixLanguageModelObjective:
    """`PrefixLanguageModel` of one task: a row's one feature is `sequence`, inputs and targets joined."""

    overlong: Overlong
    loss_on_targets_only: bool
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return {"sequence": sum(self.overlong.limits.values())}

    @property
    def trims(self) -> Mapping[str, int]:
        return self.overlong.trims

    def parts(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.parts(sizes)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self.overlong.lost(sizes)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        kept = self.overlong.measure(sizes, items.part)
        return {"sequence": kept["inputs"] + kept["targets"]}

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        kept = self.overlong.cut(example, part)
        sequence = np.concatenate([kept["inputs"], kept["targets"]])
        return {"sequence": sequence, "is_input": np.arange(len(sequence)) < len(kept["inputs"])}

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        return prefix_arrays(items, self.row_lengths["sequence"], placement, self.loss_on_targets_only)

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        """Returns [examples, 1 + inputs length] arrays: `decoder_input_tokens` is the start token, then the inputs.

        Targets and weights are 0. With `loss_on_targets_only` off the prefix mask is 0, as it was in training.
        """
        kept = [self.overlong.cut(example, 0)["inputs"] for example in examples]
        starts = [{"sequence": np.concatenate([[BOS_ID], inputs])} for inputs in kept]
        lengths = {"sequence": self.overlong.limits["inputs"] + 1}
        laid = packing.lay_out(starts, lengths, packing.one_each(len(starts), list(lengths)))
        real = laid["sequence_segment_ids"]
        return {
            "decoder_input_tokens": laid["sequence"],
            "decoder_target_tokens": np.zeros_like(real),
            "decoder_loss_weights": np.zeros(real.shape, np.float32),
            "decoder_segment_ids": real,
            "decoder_positions": laid["sequence_positions"],
            "decoder_prefix_mask": real.copy() if self.loss_on_targets_only else np.zeros_like(real),
        }


def prefix_arrays(
    items: Sequence[Example], length: int, placement: Placement, loss_on_targets_only: bool = True
) -> Arrays:
    """Returns the decoder's batch features of {'sequence', 'is_input'} items, with `decoder_prefix_mask`."""
    offset = placement.offsets["sequence"]
    both = dataclasses.replace(placement, offsets={"sequence": offset, "is_input": offset})
    laid = packing.lay_out(items, {"sequence": length, "is_input": length}, both)
    arrays = decoder_arrays(laid, "sequence")
    if not loss_on_targets_only:
        return arrays | {"decoder_prefix_mask": np.zeros_like(laid["is_input"])}
    real = laid["sequence_segment_ids"] > 0
    # The start token belongs to the prefix, hence 1 at the head of each segment.
    arrays["decoder_prefix_mask"] = shift_right(laid["is_input"], laid["sequence_positions"], 1) * real
    arrays["decoder_loss_weights"] *= 1 - laid["is_input"]
    return arrays
