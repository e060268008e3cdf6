"""A run's model, opened to be used: on the mesh, with its weights and its text."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from meshway.framework import stages
from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint, read_last
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Decoder, Stop
from meshway.framework.inference.engine import Engine
from meshway.framework.inference.rows import RowFormat
from meshway.framework.inference.text import Text, load_text, stop_texts
from meshway.framework.interfaces import Model, Params
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.partitioning.placed_model import PlacedModel

_LENGTH = 512  # of prompts, and a quarter of it of predictions, where nobody says


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a recipe says of inference.

    Attributes:
      model, layout: as they are bound.
      lengths: TASK_FEATURE_LENGTHS, if any.
    """

    model: Model
    layout: Layout
    lengths: Mapping[str, int] | None = None

    def limits(self, inputs: int | None, targets: int | None) -> dict[str, int]:
        """Returns the most tokens of a prompt and of a prediction; None goes by `lengths`.

        Raises:
          UserError: one is below 1.
        """
        lengths = self.lengths or {}
        if inputs is None:
            inputs = lengths.get("inputs", lengths.get("targets", _LENGTH))
        targets = lengths.get("targets", _LENGTH // 4) if targets is None else targets
        if inputs < 1 or targets < 1:
            raise UserError(f"max_input_length={inputs} and max_new_tokens={targets} must be at least 1")
        return {"inputs": inputs, "targets": targets}


OpenRecipe = Callable[[Path, Sequence[str]], Opened]  # (run directory or checkpoint, bindings) -> what its recipe says


@dataclasses.dataclass(frozen=True)
class Session:
    """A checkpoint of a run on the mesh.

    Attributes:
      placed: the model.
      params: its parameters, in their shards.
      text: what it reads and writes.
      row_format: how its batches hold that.
      run, step: which checkpoint it is.
    """

    placed: PlacedModel
    params: Params
    text: Text
    row_format: RowFormat
    run: Path
    step: int

    def engine(self, decoder: Decoder, batch_size: int, seed: int = 0) -> Engine:
        """Returns what computes batches.

        Args:
          decoder: how predictions are made.
          batch_size: rows of a batch, over all processes.
          seed: of sampling.

        Raises:
          UserError: a batch does not divide over the mesh; a text should stop a search.
        """
        if self.text.stops and isinstance(decoder, BeamSearch):
            raise UserError(
                "stop: beam search compares hypotheses that end by a token, and cannot end them by a text: leave out "
                "either"
            )
        ends = Stop(self.text.stop)
        return Engine(self.placed, self.params, self.row_format, decoder, ends, batch_size, seed)


def open_session(
    model: Model,
    layout: Layout,
    path: str | Path,
    step: int | None = None,
    append_eos: bool | None = None,
    stop: str | Sequence[str] = (),
    say: Callable[[str], object] = warnings.warn,
) -> Session:
    """Opens a checkpoint under a layout: any, whatever it was trained under.

    Args:
      model: of the run's recipe.
      layout: how it lies on the mesh.
      path: the run directory, or one of its checkpoints.
      step: which checkpoint; None for the latest that can be read.
      append_eos: see `load_text`.
      stop: text, or texts, that end a prediction; see `Text.stops`.
      say: is told of later checkpoints that cannot be read.

    Raises:
      UserError: there is no such run or step; it holds another model; its vocabularies cannot be read; the layout does
        not fit; a text of `stop` is empty.
      DamagedCheckpoint: the checkpoint asked for, or every one of the run, cannot be read.
    """
    stops = stop_texts(stop)
    directory = local_path(path)
    if not directory.is_dir():
        raise UserError(f"--model_dir={path}: there is no such directory")
    found = find_checkpoint(directory, step, "--model_dir")
    if found is None:
        raise UserError(f"--model_dir={path} is neither a run directory nor a checkpoint (no checkpoints/ in it)")
    folder, last = found
    asked_for = step is not None or directory.absolute() == (folder / str(last)).absolute()
    placed = PlacedModel(model, layout)
    text = load_text(folder.parent, RowFormat.of(model).has_encoder, append_eos, _vocabulary_size(placed))
    text = dataclasses.replace(text, stops=stops)
    checkpoints = Checkpoints(folder, read_only=True)

    def read(step: int) -> Params:
        with stages.stage(f"reading checkpoint {step}"):
            return checkpoints.load_params(step, placed.abstract_params)

    step, params = (last, read(last)) if asked_for else read_last(checkpoints, last, read, say)
    return Session(placed, params, text, RowFormat.of(model, text.start, text.bos), folder.parent, step)


def _vocabulary_size(placed: PlacedModel) -> int:
    """Returns how many ids the model knows, by its parameters."""
    axes = jax.tree.leaves(placed.model.axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves = zip(axes, jax.tree.leaves(placed.param_shapes), strict=True)
    named = ((name, size) for names, leaf in leaves for name, size in zip(names, leaf.shape, strict=True))
    return max((size for name, size in named if name == "vocab"), default=0)
