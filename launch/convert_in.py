"""A Hugging Face directory or a T5X checkpoint as a run directory: checkpoint, recipe, vocabulary."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshway.framework.checkpoints.stored import write_checkpoint
from meshway.framework.conversion import tokenizer_files
from meshway.framework.conversion.hugging_face import HuggingFaceModel, open_model
from meshway.framework.conversion.mesh_tensorflow import MeshTensorFlowFiles, open_checkpoint
from meshway.framework.conversion.rules import Shape
from meshway.framework.conversion.settings import Bindings, Reference
from meshway.framework.conversion.t5x_optimizer import schedule_of
from meshway.framework.conversion.values import Tensors, Values
from meshway.framework.data.vocabulary import Framing
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.interfaces import Model
from meshway.framework.progress import progress_of_bytes
from meshway.framework.terminal import count_of, format_bytes
from meshway.framework.training.run_directory import RunDirectory
from meshway.framework.trees import flatten
from meshway.launch.recipe import bindings as recipe_bindings
from meshway.launch.recipe.text import Macro

ORIGIN, NOTES, RECIPE = "hugging_face", "conversion.json", "recipe.gin"
T5X_NOTES = "t5x.json"  # how layers lay in the T5X checkpoint, for the way back


def from_hugging_face(
    source: Path, folder: Path, goal: Path, family: str | None, dtype: np.dtype | None, ignoring: Sequence[str]
) -> dict[str, str]:
    """Makes a run directory of a Hugging Face directory.

    Args:
      source: the Hugging Face directory.
      folder: where it is made, empty.
      goal: where it will be in the end, for paths in the recipe.
      family, dtype, ignoring: see `convert.convert`.

    Returns:
      what was done, for people.

    Raises:
      UserError: see `open_model`; the tokenizer is not the model's; the disk refuses.
    """
    model = open_model(source, family, ignoring)
    vocabulary = tokenizer_files.read_vocabulary(source, model.config)
    if vocabulary is not None:
        tokenizer_files.check_size(vocabulary, model.bindings["VOCAB_SIZE"], source)
    features = features_of(model.bindings)
    has_encoder = "inputs" in features
    if vocabulary is not None:
        framing = tokenizer_files.read_framing(source, model.config, has_encoder, vocabulary)
        bindings = vocabulary_bindings(goal, features, framing)
    else:
        framing = tokenizer_files.framing_of_ids(source, model.config, has_encoder, model.bindings["VOCAB_SIZE"])
        bindings = framing_bindings(framing)
    text = recipe_text(
        f"{model.family.name} model",
        model.directory.absolute(),
        [model.family.include(model.config)],
        model.bindings | bindings,
        goal,
        f"Not read of its config.json: {', '.join(ignoring)}." if ignoring else "",
    )
    values = write_run(folder, text, lambda shapes: model.values(shapes, dtype))
    copied = _keep_origin(model, folder / ORIGIN)
    if vocabulary is not None:
        RunDirectory(folder).save_vocabularies(dict.fromkeys(features, vocabulary), framing)
    else:
        RunDirectory(folder).save_framing(framing)
    return {
        "family": model.family.name,
        **described(values, model.tensors),
        "tokenizer": "none was found; the recipe binds no vocabulary" if vocabulary is None else str(vocabulary),
        "kept beside": ", ".join(copied),
        **({"not read": ", ".join(model.left_over)} if model.left_over else {}),
        "recipe": str(goal / RECIPE),
    }


def recipe_text(
    what: str, source: Path, includes: Sequence[str], bindings: Bindings, goal: Path, note: str = ""
) -> str:
    """Returns the recipe of a converted model, from whose weights runs start.

    Args:
      what: the model, in two or three words.
      source: where it was read.
      includes: the shipped files that the recipe begins with.
      bindings: further bindings of the recipe.
      goal: the run directory, where it will be in the end.
      note: a last line for people.
    """
    heading = (
        f"A {what}, converted by `meshway convert` from {source}.\n"
        f"Runs that include this file start from its weights: if this directory moves, change its path below.\n{note}"
    )
    initial = {"train.train.initial": Reference("mapping.Initial"), "mapping.Initial.path": str(goal)}
    return recipe_bindings.text_of(includes, initial | bindings, heading)


def write_run(
    folder: Path,
    text: str,
    values_for: Callable[[Mapping[str, Shape]], dict[str, Values]],
    step: int = 0,
    rest_for: Callable[[Model], dict[str, Any]] | None = None,
) -> dict[str, Values]:
    """Makes a run directory of one checkpoint.

    Args:
      folder: where, empty.
      text: the recipe to write.
      values_for: returns the parameters of its model, given their shapes.
      step: the number of its checkpoint.
      rest_for: returns other parts of the state; see `write_checkpoint`.

    Returns:
      the parameters, written.

    Raises:
      UserError: the recipe's model cannot be built; a tensor cannot be read; the disk refuses, or has too little room.
    """
    path = folder / RECIPE
    path.write_text(text, encoding="utf-8")
    built, recipe = recipe_bindings.build_network(path)
    values = values_for(shapes_of(built))
    rest = rest_for(built) if rest_for else {}
    total = sum(each.nbytes for each in (*values.values(), *jax.tree.leaves(rest)))
    _check_room(folder, total)
    with progress_of_bytes(total, "reading tensors") as wrote:
        write_checkpoint(folder / "checkpoints", step, values, recipe.resolved, wrote, rest)
    (folder / "config.gin").write_text(recipe.resolved, encoding="utf-8")
    return values


def described(values: Mapping[str, Values], tensors: Tensors) -> dict[str, str]:
    """Returns how many parameters were written and as what, for people."""
    num_params, num_tensors = sum(each.size for each in values.values()), len(list(tensors))
    return {
        "parameters": f"{num_params:,} in {count_of(len(values), 'array')}, from {count_of(num_tensors, 'tensor')}",
        "dtype": ", ".join(sorted({each.dtype.name for each in values.values()})),
        "size": format_bytes(sum(each.nbytes for each in values.values())),
    }


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter of a model; nothing is allocated.

    Raises:
      UserError: the network refuses its sizes.
    """
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise UserError(f"the model of the recipe cannot be built: {str(error).splitlines()[0]}") from error
    return {name: tuple(leaf.shape) for name, leaf in flatten(shapes).items()}


def features_of(bindings: Bindings) -> Sequence[str]:
    """Returns the features of tasks for a model."""
    return ("inputs", "targets") if "NUM_ENCODER_LAYERS" in bindings else ("targets",)


def vocabulary_bindings(run: Path, features: Sequence[str], framing: Framing) -> Bindings:
    """Returns the bindings of the vocabulary of a run directory, for all features of its tasks, and of the tokens
    around their texts."""
    return {
        "VOCABULARY": Reference("vocabularies.load"),
        "vocabularies.load.directory": str(run / "vocabularies"),
        "vocabularies.load.name": features[-1],
        "VOCABULARIES": {feature: Macro("VOCABULARY") for feature in features},
        "START": list(framing.start),
        "STOP_IDS": list(framing.stop),
    }


def framing_bindings(framing: Framing) -> Bindings:
    """Returns the bindings of what is known to stand around texts where there is no vocabulary."""
    said = {"START": list(framing.start), "STOP_IDS": list(framing.stop)}
    return {name: ids for name, ids in said.items() if ids}


def _keep_origin(model: HuggingFaceModel, folder: Path) -> list[str]:
    """Copies the small files of the source, and notes what export needs to give the same tensors back."""
    copied = tokenizer_files.copy_files(model.directory, folder, ("config.json", *tokenizer_files.FILES))
    notes: Mapping[str, Any] = {
        "family": model.family.name,
        "base": model.base,
        "copies": model.copies,
        "bindings": json.loads(json.dumps(model.bindings, default=repr)),
    }
    (folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    return copied


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the disk of {folder.parent} has {format_bytes(free)} free, and the weights need {format_bytes(needed)}"
        )


def from_t5x(
    source: Path,
    folder: Path,
    goal: Path,
    dtype: np.dtype | None,
    step: int | None,
    vocabulary: str | None = None,
    optimizer_state: bool = False,
) -> dict[str, str]:
    """Makes a run directory of a checkpoint of T5X or Mesh-TensorFlow, at its step.

    Args:
      source: a folder of `checkpoint_STEP` folders, or one of those; or Mesh-TensorFlow's, see `MeshTensorFlowFiles`.
      folder: where it is made, empty.
      goal: where it will be in the end, for paths in the recipe.
      dtype: what weights are written as, None for what they are.
      step: which checkpoint, None for the latest.
      vocabulary: the SentencePiece model of its task, None for no text.
      optimizer_state: whether Adafactor's state comes too, and training goes on from both; else it is left out.

    Returns:
      what was done, for people.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another network or optimizer; the vocabulary
        cannot be read or is not the network's; the disk refuses.
    """
    files, network = open_checkpoint(source, step)
    system = "Mesh-TensorFlow" if isinstance(files, MeshTensorFlowFiles) else "T5X"
    text = None if vocabulary is None else tokenizer_files.read_sentence_pieces(local_path(vocabulary))
    if text is not None:
        tokenizer_files.check_size(text, network.bindings["VOCAB_SIZE"], Path(str(vocabulary)))
    features = features_of(network.bindings)
    framing = None if text is None else Framing.of(text, start=(0,))  # T5X starts from 0, whatever the vocabulary
    bindings = network.bindings | (vocabulary_bindings(goal, features, framing) if framing else {})
    includes = [network.include]
    if optimizer_state:
        includes.append("optimizers/adafactor.gin")
        bindings |= {f"optimizers.adafactor.{name}": value for name, value in network.adafactor(files).items()}
        bindings |= schedule_of(files)
        bindings |= {"mapping.Initial.optimizer_state": True, "mapping.Initial.count_on": True}

    def state(model: Model) -> dict[str, Any]:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return {"opt_state": network.optimizer_state(files, shapes, model.axes())}

    recipe = recipe_text(f"network of {system}", files.directory, includes, bindings, goal)
    rest = state if optimizer_state else None
    written = write_run(folder, recipe, lambda shapes: network.values(files, shapes, dtype), files.step, rest)
    layouts = {stack: dataclasses.asdict(layout) for stack, layout in network.layouts.items()}
    (folder / T5X_NOTES).write_text(json.dumps(layouts, indent=1) + "\n", encoding="utf-8")
    if text is not None:
        RunDirectory(folder).save_vocabularies(dict.fromkeys(features, text), framing)
    more = "; --optimizer_state takes Adafactor's in" if system == "T5X" else ""
    left_out = {} if optimizer_state else {"left out": f"the optimizer's state{more}"}
    return {
        "network": network.include,
        "checkpoint": f"step {files.step} of {files.directory}",
        **({"optimizer": "Adafactor, with its state"} if optimizer_state else {}),
        **left_out,
        **described(written, files),
        "activations": f"{network.bindings['ACTIVATIONS']}; arrays do not tell: if it had others, bind ACTIVATIONS",
        "tokenizer": str(text or f"{system} keeps none: for text give its task's, --vocabulary=FILE.model"),
        "recipe": str(goal / RECIPE),
    }
