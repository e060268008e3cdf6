"""The masked language model as a feature converter: an encoder alone, told to restore what was hidden."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.noise import lowest, random_bits
from meshway.framework.data.objective import Spec, TaskInfo, VocabularyInfo
from meshway.framework.data.rows import packing
from meshway.framework.data.rows.packing import Arrays, Example, Placement
from meshway.framework.data.token_rows import Overlong, TokenObjective, check_policy, check_tokens, token_spec
from meshway.framework.errors import UserError

_SPEC: Mapping[str, type] = {
    "encoder_input_tokens": np.int32,
    "encoder_target_tokens": np.int32,
    "encoder_loss_weights": np.float32,
    "encoder_segment_ids": np.int32,
    "encoder_positions": np.int32,
}
_COLUMNS = ("targets", "inputs", "weights")  # of an item, all as long as the text


class MaskedLanguageModel:
    """BERT's objective over the text in `targets` (Devlin et al. 2019, section 3.1, task 1).

    Of each item's tokens but EOS, a share is chosen at random, anew in every epoch: `encoder_loss_weights` is 1
    there, `encoder_target_tokens` holds the text. Of the chosen ones `encoder_input_tokens` has 80 % replaced
    by the mask and 10 % by a random token of the vocabulary, its extra ids apart.

    Args:
      pack: whether training rows hold several items.
      mask_rate: share of the tokens that is chosen, rounded, one at least.
      mask_id: the mask; None is the vocabulary's highest extra id.
      overlong: what becomes of a text longer than its length: 'split' into windows, which loses nothing,
        'truncate', 'skip' or 'error'.
    """

    can_predict = False
    task_features: tuple[str, ...] = ("targets",)

    def __init__(
        self, pack: bool = True, mask_rate: float = 0.15, mask_id: int | None = None, overlong: str = "split"
    ) -> None:
        if isinstance(mask_rate, str) or not 0 < mask_rate <= 1:
            raise UserError(f"MaskedLanguageModel.mask_rate must be above 0 and at most 1, not {mask_rate!r}")
        self.pack = pack
        self.mask_rate = mask_rate
        self.mask_id = mask_id
        self.overlong = check_policy(overlong, "MaskedLanguageModel")

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        return token_spec(_SPEC, batch_size, lengths["targets"])

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> TokenObjective:
        """Returns the objective of a task.

        Raises:
          UserError: the task has inputs or no vocabulary, there is no mask in it, or `lengths` do not fit.
        """
        if "targets" not in task.features:  # the better cause, where there are inputs too
            raise UserError(task.lacks("targets", "MaskedLanguageModel"))
        if "inputs" in task.features:
            raise UserError(
                f"task {task.name!r} has 'inputs', which MaskedLanguageModel never reads; "
                "use a task with 'targets' alone"
            )
        check_tokens("MaskedLanguageModel", task, lengths, self.task_features)
        vocabulary = task.features["targets"].vocabulary
        if vocabulary is None:
            raise UserError(f"task {task.name!r}: feature 'targets' has no vocabulary, which MaskedLanguageModel needs")
        overlong = Overlong(self.overlong, task.name, {"targets": lengths["targets"]})
        rows = MaskedRows(vocabulary, self.mask_rate, self._mask(task.name, vocabulary))
        return TokenObjective(overlong, rows)

    def _mask(self, task_name: str, vocabulary: VocabularyInfo) -> int:
        mask_id = self.mask_id
        if mask_id is None:
            if not vocabulary.extra_ids:
                raise UserError(
                    f"the vocabulary of task {task_name!r} has no extra ids to mask tokens with; "
                    "give it some, or set MaskedLanguageModel.mask_id"
                )
            return vocabulary.sentinel_ids[0]
        if isinstance(mask_id, bool) or not isinstance(mask_id, int) or not 0 <= mask_id < vocabulary.size:
            raise UserError(
                f"MaskedLanguageModel.mask_id is {mask_id!r}, but the ids of task {task_name!r} are "
                f"0 to {vocabulary.size - 1}"
            )
        return mask_id


@dataclasses.dataclass(frozen=True)
class MaskedRows:
    """Rows of `MaskedLanguageModel`."""

    vocabulary: VocabularyInfo
    mask_rate: float
    mask_id: int

    def lengths(self, limits: Mapping[str, int]) -> Mapping[str, int]:
        return limits

    def measure(self, sizes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return sizes

    def item(self, tokens: dict[str, np.ndarray], example: Example, first: int, seed: int) -> dict[str, np.ndarray]:
        targets = tokens["targets"]
        maskable = np.arange(len(targets))
        if self.vocabulary.eos_id is not None:
            maskable = (targets != self.vocabulary.eos_id).nonzero()[0]
        count = min(len(maskable), max(1, round(len(maskable) * self.mask_rate)))
        bits = random_bits(seed, len(maskable) + 2 * count)
        chosen = maskable[lowest(bits[: len(maskable)], count)]
        fate = bits[len(maskable) : len(maskable) + count] % np.uint64(10)  # 0-7 mask, 8 a random token, 9 as it is
        ordinary = np.uint64(min(self.vocabulary.sentinel_ids, default=self.vocabulary.size))
        inputs = targets.astype(np.int32)
        inputs[chosen[fate < 8]] = self.mask_id
        inputs[chosen[fate == 8]] = bits[len(maskable) + count :][fate == 8] % ordinary
        weights = np.zeros(len(targets), np.int32)
        weights[chosen] = 1
        return {"targets": targets, "inputs": inputs, "weights": weights}

    def lay(self, items: Sequence[Example], lengths: Mapping[str, int], placement: Placement) -> Arrays:
        length = lengths["targets"]
        aligned = dataclasses.replace(placement, offsets=dict.fromkeys(_COLUMNS, placement.offsets["targets"]))
        laid = packing.lay_out(items, dict.fromkeys(_COLUMNS, length), aligned)
        return {
            "encoder_input_tokens": laid["inputs"],
            "encoder_target_tokens": laid["targets"],
            "encoder_loss_weights": laid["weights"].astype(np.float32),
            "encoder_segment_ids": laid["targets_segment_ids"],
            "encoder_positions": laid["targets_positions"],
        }

    def prompts(self, examples: Sequence[dict[str, np.ndarray]], limits: Mapping[str, int]) -> Arrays:
        raise UserError("MaskedLanguageModel predicts nothing from a prompt; its tasks are evaluated by their loss")
