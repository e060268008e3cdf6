"""Feature converters of examples as their task made them: encoder-decoder, language model, prefix LM.

Objectives that make their own inputs and targets of plain text are in `denoising.py` and `encoder_only.py`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Spec, TaskInfo
from meshway.framework.data.rows import packing
from meshway.framework.data.rows.packing import Arrays, Example, Placement
from meshway.framework.data.token_rows import (
    DECODER,
    ENCODER,
    POLICIES,
    WHOLE,
    Overlong,
    Start,
    TokenObjective,
    check_policy,
    check_tokens,
    decoder_arrays,
    encoder_arrays,
    start_of,
    token_spec,
)
from meshway.framework.data.vocabulary import after_start
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

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> TokenObjective:
        """Returns the objective of a task; UserError when task, lengths and converter do not fit."""
        check_tokens("EncoderDecoder", task, lengths, self.task_features)
        start = start_of("EncoderDecoder", task, least=1)
        return TokenObjective(Overlong(self.overlong, task.name, dict(lengths)), EncoderDecoderRows(start))


class LanguageModel:
    """Tokens to a causal decoder, loss on every one of them, or on part of them.

    Args:
      pack: whether training rows hold several examples.
      overlong: what becomes of an example longer than its lengths: 'split' into windows, which loses nothing,
        'truncate', 'skip' or 'error'. None splits `targets`, and truncates where there are inputs.
      inputs: whether `inputs` come before `targets`, without loss; still every token sees only those before it.
      weights: whether the feature `weights` of the task, a number for each target, weighs the loss: 0 leaves it out.
    """

    def __init__(
        self, pack: bool = True, overlong: str | None = None, inputs: bool = False, weights: bool = False
    ) -> None:
        self.pack, self.inputs, self.weights, self.can_predict = pack, inputs, weights, inputs
        self.task_features: tuple[str, ...] = ("inputs", "targets") if inputs else ("targets",)
        overlong = overlong or ("truncate" if inputs else "split")
        self.overlong = check_policy(overlong, "LanguageModel", WHOLE if inputs else POLICIES)

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        return token_spec(DECODER, batch_size, sum(lengths[name] for name in self.task_features))

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> TokenObjective:
        """Returns the objective of a task; UserError as `EncoderDecoder.bind`, and for a task with unread inputs."""
        if "targets" not in task.features:  # the better cause, where there are inputs too
            raise UserError(task.lacks("targets", "LanguageModel"))
        if "inputs" in task.features and not self.inputs:
            raise UserError(
                f"task {task.name!r} has 'inputs', which LanguageModel reads where LanguageModel.inputs is True; or "
                "use the converter PrefixLanguageModel, or a task with 'targets' alone"
            )
        check_tokens("LanguageModel", task, lengths, self.task_features)
        start = start_of("LanguageModel", task, least=0)
        if self.weights:
            _check_weights(task)
        overlong = Overlong(self.overlong, task.name, {name: lengths[name] for name in self.task_features})
        if self.inputs:
            return TokenObjective(overlong, JoinedRows(task.name, start, prefix=False, weighted=self.weights))
        return TokenObjective(overlong, LanguageModelRows(start, task.name if self.weights else None))


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

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> TokenObjective:
        """Returns the objective of a task; UserError when task, lengths and converter do not fit."""
        check_tokens("PrefixLanguageModel", task, lengths, self.task_features)
        start = start_of("PrefixLanguageModel", task, least=0)
        overlong = Overlong(self.overlong, task.name, dict(lengths))
        return TokenObjective(overlong, JoinedRows(task.name, start, self.loss_on_targets_only))


@dataclasses.dataclass(frozen=True)
class EncoderDecoderRows:
    """Rows of `EncoderDecoder`: `inputs` beside `targets`."""

    start: Start

    def lengths(self, limits: Mapping[str, int]) -> Mapping[str, int]:
        return limits

    def measure(self, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return sizes

    def item(self, tokens: dict[str, np.ndarray], example: Example, first: int, seed: int) -> dict[str, np.ndarray]:
        return tokens

    def lay(self, items: Sequence[Example], lengths: Mapping[str, int], placement: Placement) -> Arrays:
        laid = packing.lay_out(items, lengths, placement)
        return encoder_arrays(laid) | decoder_arrays(laid, "targets", self.start)

    def prompts(self, examples: Sequence[dict[str, np.ndarray]], limits: Mapping[str, int]) -> Arrays:
        lengths = {"inputs": limits["inputs"]}
        arrays = encoder_arrays(packing.lay_out(examples, lengths, packing.one_each(len(examples), list(lengths))))
        return arrays | {"decoder_input_tokens": np.full((len(examples), 1), self.start.ids[0], np.int32)}


@dataclasses.dataclass(frozen=True)
class LanguageModelRows:
    """Rows of `LanguageModel` without inputs: `targets` alone.

    Attributes:
      start: what the decoder reads first.
      weighted: the task, where its `weights` weigh the loss; None where they do not.
    """

    start: Start
    weighted: str | None

    def lengths(self, limits: Mapping[str, int]) -> Mapping[str, int]:
        return limits

    def measure(self, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return sizes

    def item(self, tokens: dict[str, np.ndarray], example: Example, first: int, seed: int) -> dict[str, np.ndarray]:
        if self.weighted is None:
            return tokens
        return tokens | {"weights": _weights_of(example, self.weighted)[first : first + len(tokens["targets"])]}

    def lay(self, items: Sequence[Example], lengths: Mapping[str, int], placement: Placement) -> Arrays:
        laid = packing.lay_out(items, lengths, placement)
        arrays = decoder_arrays(laid, "targets", self.start)
        if self.weighted is not None:
            arrays["decoder_loss_weights"] *= _beside(items, "weights", "targets", laid, placement, self.start)
        return arrays

    def prompts(self, examples: Sequence[dict[str, np.ndarray]], limits: Mapping[str, int]) -> Arrays:
        raise UserError(
            "LanguageModel tasks have no inputs to predict from; set LanguageModel.inputs, or use PrefixLanguageModel"
        )


@dataclasses.dataclass(frozen=True)
class JoinedRows:
    """Rows of `PrefixLanguageModel`, or of `LanguageModel` with inputs: their one feature is `sequence`, inputs and
    targets joined.

    Attributes:
      task_name: for messages.
      start: what the decoder reads first.
      loss_on_targets_only: whether inputs carry no loss.
      prefix: whether batches have `decoder_prefix_mask`.
      weighted: whether `weights` weigh the loss of targets.
    """

    task_name: str
    start: Start
    loss_on_targets_only: bool = True
    prefix: bool = True
    weighted: bool = False

    def lengths(self, limits: Mapping[str, int]) -> Mapping[str, int]:
        return {"sequence": sum(limits.values())}

    def measure(self, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"sequence": sizes["inputs"] + sizes["targets"]}

    def item(self, tokens: dict[str, np.ndarray], example: Example, first: int, seed: int) -> dict[str, np.ndarray]:
        inputs, targets = tokens["inputs"], tokens["targets"]
        sequence = np.concatenate([inputs, targets])
        item = {"sequence": sequence, "is_input": np.arange(len(sequence)) < len(inputs)}
        if self.weighted:
            weights = _weights_of(example, self.task_name)[: len(targets)]
            item["weights"] = np.concatenate([np.zeros(len(inputs), np.float32), weights])
        return item

    def lay(self, items: Sequence[Example], lengths: Mapping[str, int], placement: Placement) -> Arrays:
        laid = packing.lay_out(items, lengths, placement)
        arrays = decoder_arrays(laid, "sequence", self.start)
        is_input = _beside(items, "is_input", "sequence", laid, placement, self.start)
        if self.loss_on_targets_only:
            arrays["decoder_loss_weights"] *= 1 - is_input
        if self.weighted:
            arrays["decoder_loss_weights"] *= _beside(items, "weights", "sequence", laid, placement, self.start)
        if self.prefix:
            arrays["decoder_prefix_mask"] = self._prefix_mask(items, laid, placement)
        return arrays

    def _prefix_mask(self, items: Sequence[Example], laid: Arrays, placement: Placement) -> np.ndarray:
        if not self.loss_on_targets_only:
            return np.zeros(laid["sequence"].shape, np.int32)
        is_input = _lay_beside(items, "is_input", "sequence", laid, placement).astype(np.int32)
        return self.start.prefix(is_input, laid, "sequence")

    def prompts(self, examples: Sequence[dict[str, np.ndarray]], limits: Mapping[str, int]) -> Arrays:
        """Returns [examples, start + inputs length] arrays: `decoder_input_tokens` is the start, then the inputs.

        Targets and weights are 0. With `loss_on_targets_only` off the prefix mask is 0, as it was in training.
        """
        start, bos = np.array(self.start.ids, np.int32), self.start.bos
        starts = [{"sequence": np.concatenate([start, after_start(each["inputs"], bos)])} for each in examples]
        if not all(len(each["sequence"]) for each in starts):
            raise UserError(
                f"task {self.task_name!r} has an example without inputs, and the decoder starts from nothing: "
                "there is nothing to predict from"
            )
        lengths = {"sequence": limits["inputs"] + len(start)}
        laid = packing.lay_out(starts, lengths, packing.one_each(len(starts), list(lengths)))
        real = laid["sequence_segment_ids"]
        arrays = {
            "decoder_input_tokens": laid["sequence"],
            "decoder_target_tokens": np.zeros_like(real),
            "decoder_loss_weights": np.zeros(real.shape, np.float32),
            "decoder_segment_ids": real,
            "decoder_positions": laid["sequence_positions"],
        }
        mask = {"decoder_prefix_mask": real.copy() if self.loss_on_targets_only else np.zeros_like(real)}
        return arrays | (mask if self.prefix else {})


def _lay_beside(items: Sequence[Example], name: str, feature: str, laid: Arrays, placement: Placement) -> np.ndarray:
    """Returns the items' `name`, a number for each token of row feature `feature`, laid out as that, float32."""
    values = [np.zeros(1, np.float32), *[np.asarray(item[name], np.float32) for item in items]]
    ends = np.cumsum([len(each) for each in values])
    places = [{feature: np.arange(begin, end)} for begin, end in itertools.pairwise(ends)]
    # Places of numbers are laid out, as tokens are whole; 0 is where there is none.
    return np.concatenate(values)[packing.lay_out(places, {feature: laid[feature].shape[1]}, placement)[feature]]


def _beside(
    items: Sequence[Example], name: str, feature: str, laid: Arrays, placement: Placement, start: Start
) -> np.ndarray:
    """Returns the same where each token is predicted."""
    return start.predicted(_lay_beside(items, name, feature, laid, placement), laid, feature)


def _check_weights(task: TaskInfo) -> None:
    info = task.features.get("weights")
    if info is None or len(info.shape) != 1 or info.dtype == "bytes":
        found = "has none" if info is None else f"has {info.dtype} {list(info.shape)}"
        raise UserError(
            f"task {task.name!r}: LanguageModel.weights needs a feature 'weights', a number for each target; it {found}"
        )


def _weights_of(example: Example, task_name: str) -> np.ndarray:
    """Returns an example's loss weights, float32 [targets]."""
    weights, targets = np.asarray(example["weights"], np.float32), len(example["targets"])
    if len(weights) != targets:
        raise UserError(
            f"task {task_name!r}: an example has {targets} targets and {len(weights)} weights; each target, EOS too, "
            "needs one"
        )
    return weights
