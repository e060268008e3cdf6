"""What a recipe says of inference, and who reads recipes: the framework does not."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import Decoder
from meshway.framework.inference.engine import Workload
from meshway.framework.inference.rows import RowFormat
from meshway.framework.interfaces import Model
from meshway.framework.partitioning.partitioner import Layout

_LENGTH = 512  # of prompts, and a quarter of it of predictions, where nobody says


@dataclasses.dataclass(frozen=True)
class RecipeModel:
    """What a recipe says of inference.

    Attributes:
      model, layout: as they are bound.
      lengths: TASK_FEATURE_LENGTHS, if any.
      vocabularies: returns those of its task, see `load_text`; None where nobody looks for them.
      weights: the dtype that they are kept in, one of `weights.WEIGHTS`; None for that of the checkpoint.
    """

    model: Model
    layout: Layout
    lengths: Mapping[str, int] | None = None
    vocabularies: Callable[[], Mapping[str, Vocabulary]] | None = None
    weights: str | None = None

    def limits(self, inputs: int | None, targets: int | None) -> dict[str, int]:
        """Returns the most tokens of a prompt and of a prediction, see `limits_of`."""
        return limits_of(self.lengths or {}, inputs, targets)

    def largest(self, decoder: Decoder, batch_size: int, inputs: int | None, targets: int | None) -> Workload:
        """Returns the largest batch of prompts that may come; lengths as `limits` takes them."""
        limits = self.limits(inputs, targets)
        room = RowFormat.of(self.model).room(limits["inputs"], limits["targets"], scores=False)
        return Workload(batch_size, room["inputs"], room["targets"], decoder)


def limits_of(lengths: Mapping[str, int], inputs: int | None = None, targets: int | None = None) -> dict[str, int]:
    """Returns the most tokens of a prompt and of a prediction; None goes by `lengths`, TASK_FEATURE_LENGTHS.

    Raises:
      UserError: one is below 1.
    """
    if inputs is None:
        inputs = lengths.get("inputs", lengths.get("targets", _LENGTH))
    targets = lengths.get("targets", _LENGTH // 4) if targets is None else targets
    if inputs < 1 or targets < 1:
        raise UserError(f"max_input_length={inputs} and max_new_tokens={targets} must be at least 1")
    return {"inputs": inputs, "targets": targets}


# (run directory or checkpoint, bindings, the work that a layout of LAYOUT='auto' is for) -> what its recipe says
OpenRecipe = Callable[[Path, Sequence[str], Callable[[RecipeModel], Workload]], RecipeModel]
_GROUP, _NAME = "meshway.recipes", "open"  # who reads recipes says so by an entry point of this group


def recipe_reader() -> OpenRecipe:
    """Returns who reads recipes.

    Raises:
      UserError: nobody does.
    """
    for entry in importlib.metadata.entry_points(group=_GROUP, name=_NAME):
        reader: OpenRecipe = entry.load()
        return reader
    raise UserError(f"no installed package reads recipes (entry point {_NAME!r} of {_GROUP!r}): install meshway whole")
