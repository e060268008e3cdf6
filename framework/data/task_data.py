"""What the data sources of tasks share: checks of their arguments, vocabularies of what they read."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.data.objective import Converter
from meshway.framework.data.seqio_door import task_errors
from meshway.framework.data.seqio_steps import declared
from meshway.framework.data.vocabularies import check_named, of_seqio
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError, did_you_mean


def check_arguments(kind: str, batch_size: Any, seed: Any, eval_examples: Any) -> None:
    """Raises UserError, naming the argument of data source `kind`, unless these are usable numbers."""
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{kind}.{name} must be a whole number of at least {least}, not {value!r}")
    if eval_examples is not None and eval_examples < 1:
        raise UserError(f"{kind}.eval_examples must be at least 1 or None (all), not {eval_examples!r}")


def vocabularies_of(
    name: str, tasks: Sequence[Any], converter: Converter, named: Mapping[str, Any]
) -> dict[str, Vocabulary]:
    """Returns the vocabulary of each feature that the converter reads and a seqio task declares.

    Raises:
      UserError: a vocabulary cannot be loaded, or is not the one the recipe names.
    """
    with task_errors(name, "vocabulary"):
        texts = {feature for task in tasks for feature, info in declared(task).items() if info.vocabulary is not None}
        features = {feature: value for task in tasks for feature, value in task.output_features.items()}
        read = [feature for feature in converter.task_features if feature in texts]
        found = {feature: of_seqio(features[feature].vocabulary) for feature in read}
    check_named(name, {feature: features[feature].vocabulary for feature in read}, named)
    return found


def framing_of(
    vocabularies: Mapping[str, Vocabulary], start: Sequence[int] | None, stop_ids: Sequence[int] | None
) -> Framing | None:
    """Returns what stands around texts, None where no decoder's are read.

    Args:
      vocabularies: by feature.
      start: what the recipe says; None goes by the vocabulary of `targets`.
      stop_ids: what ends a prediction, beside the EOS of that vocabulary, with which tasks end their targets.

    Raises:
      UserError: these are no ids of it.
    """
    if "targets" not in vocabularies:
        return None
    targets = vocabularies["targets"]
    own = () if targets.eos_id is None else (targets.eos_id,)
    framing = Framing.of(targets, start, stop_ids)
    return dataclasses.replace(framing, stop=tuple(dict.fromkeys((*framing.stop, *own))))


def with_split(tasks: Mapping[str, Sequence[str]], split: str, purpose: str, name: str) -> list[str]:
    """Returns which of `tasks`, {name: its splits}, have `split`, saying which have not.

    Raises:
      UserError: none of the tasks of mixture `name` has it.
    """
    having = [task for task, splits in tasks.items() if split in splits]
    if not having:
        known = sorted({known for splits in tasks.values() for known in splits})
        raise UserError(f"{name!r} has no split {split!r} for {purpose}; it has {known}{did_you_mean(split, known)}")
    if lacking := [task for task in tasks if task not in having]:
        print(f"data: {purpose} leaves out {', '.join(lacking)}: no split {split!r}", file=sys.stderr)
    return having
