"""A T5X checkpoint as a run directory: checkpoint and recipe."""

from pathlib import Path

import numpy as np

from meshway.framework.conversion import tokenizer_files
from meshway.framework.conversion.t5x import network_of
from meshway.framework.conversion.t5x_files import T5XFiles
from meshway.framework.data.vocabulary import Framing
from meshway.framework.files import local_path
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import convert_in


def from_t5x(
    source: Path, folder: Path, goal: Path, dtype: np.dtype | None, step: int | None, vocabulary: str | None = None
) -> dict[str, str]:
    """Makes a run directory of the parameters in a T5X checkpoint; the optimizer's state is left out.

    Args:
      source: a folder of `checkpoint_STEP` folders, or one of those.
      folder: where it is made, empty.
      goal: where it will lie in the end, for paths in the recipe.
      dtype: what weights are written as, None for what they are.
      step: which checkpoint, None for the latest.
      vocabulary: the SentencePiece model of its task, None for no text.

    Returns:
      what was done, for people.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another network; the vocabulary cannot be read
        or is not the network's; the disk refuses.
    """
    files = T5XFiles(source, step)
    network = network_of(files)
    text = None if vocabulary is None else tokenizer_files.read_sentence_pieces(local_path(vocabulary))
    if text is not None:
        tokenizer_files.check_size(text, network.bindings["VOCAB_SIZE"], Path(str(vocabulary)))
    features = convert_in.features_of(network.bindings)
    framing = None if text is None else Framing.of(text, start=(0,))  # T5X starts from 0, whatever the vocabulary
    bindings = network.bindings | (convert_in.vocabulary_bindings(goal, features, framing) if framing else {})

    recipe = convert_in.recipe_text("network of T5X", files.directory, network.include, bindings, goal)
    written = convert_in.write_run(folder, recipe, lambda shapes: network.values(files, shapes, dtype))
    if text is not None:
        RunDirectory(folder).save_vocabularies(dict.fromkeys(features, text), framing)
    return {
        "network": network.include,
        "checkpoint": f"step {files.step} of {files.directory}",
        "left out": "the optimizer's state",
        **convert_in.described(written, files),
        "activations": f"{network.bindings['ACTIVATIONS']}; arrays do not tell: if it had others, bind ACTIVATIONS",
        "tokenizer": "T5X keeps none: for text give its task's, --vocabulary=FILE.model" if text is None else str(text),
        "recipe": str(goal / convert_in.RECIPE),
    }
