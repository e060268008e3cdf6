"""meshway convert: weights of Hugging Face models and of T5X's checkpoints in and out.

    meshway convert --from=DIR --to=runs/llama
    meshway convert --from=runs/llama --to=DIR
    meshway convert --from=runs/t5 --to=DIR --family=t5x

The first makes a run directory with a recipe, from which `meshway` goes on at once; the second a directory that
transformers loads, the third one that T5X does. Weights pass through memory tensor by tensor.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import in_bucket, is_disk_trouble, local_path, open_path
from meshway.framework.terminal import format_columns

if TYPE_CHECKING:
    import numpy as np

    from meshway.framework.interfaces import Model
    from meshway.launch.invocation import Invocation

DTYPES = ("keep", "float32", "bfloat16", "float16")
CONVERT = "convert"
_SHARD = "5GB"


def convert(
    source: str,
    target: str,
    family: str | None = None,
    dtype: str = "keep",
    step: int | None = None,
    max_shard_size: str | None = None,
    ignore_fields: str = "",
    vocabulary: str | None = None,
    optimizer_state: bool = False,
    averaged: bool = False,
) -> None:
    """Converts a Hugging Face directory or a T5X checkpoint to a run directory, or a run's checkpoint to one of these.

    Args:
      source: a Hugging Face directory, checkpoints of T5X or Mesh-TensorFlow or one of them, a run directory, or one of
        its checkpoints.
      target: the directory to make; it must not be there yet.
      family: what the model is, None to find out; 't5x' writes a run as a checkpoint of T5X.
      dtype: what weights are written as: 'float32', 'bfloat16', 'float16', or 'keep' for what they are.
      step: which checkpoint of a run, T5X's too, None for the latest.
      max_shard_size: of one safetensors file, as '800MB'; None for 5GB.
      ignore_fields: fields of config.json, 'a,b', that change nothing of what the model computes.
      optimizer_state: the state of T5X's Adafactor too, in (training then goes on from it and from its step) or out.
      vocabulary: a SentencePiece model for T5X's checkpoints, which keep none; T5's 100 sentinels go above it.
      averaged: whether to write out the averages of parameters that the run kept (EMA_DECAY).

    Raises:
      UserError: anything that does not fit; nothing is left behind then.
    """
    from meshway.framework.conversion import hugging_face, mesh_tensorflow, t5x_files
    from meshway.launch import convert_in, convert_out

    origin, goal = open_path(source), local_path(target)
    is_mesh = not in_bucket(origin) and mesh_tensorflow.is_checkpoint(origin)
    if not (is_mesh or origin.exists()):
        raise UserError(f"--from={source}: there is no such directory")
    wanted = _dtype(dtype)
    run = convert_out.find_run(origin, step, averaged)
    is_t5x = run is None and (is_mesh or t5x_files.is_run(origin))
    if run is None and not is_t5x and not hugging_face.is_model(origin):
        raise UserError(
            f"--from={source} is neither a Hugging Face directory (config.json, model.safetensors) nor a run directory "
            "(checkpoints/) nor a checkpoint, nor T5X's (checkpoint_STEP/) or Mesh-TensorFlow's (model.ckpt-STEP.index)"
        )
    if is_t5x and family is not None:
        raise UserError(
            "--family is not for T5X's or Mesh-TensorFlow's checkpoints, whose arrays tell what the model is"
        )
    to_t5x = run is not None and family == convert_out.T5X
    taken_in = None if run is not None else "t5x" if is_t5x else "hugging_face"
    _check_flags(taken_in, to_t5x, ignore_fields, vocabulary, averaged, optimizer_state, max_shard_size)
    with fresh_directory(goal) as folder:
        if run is not None and to_t5x:
            summary = convert_out.to_t5x(run, folder, wanted, optimizer_state)
        elif run is not None:
            summary = convert_out.to_hugging_face(run, folder, family, wanted, max_shard_size or _SHARD)
        elif is_t5x:
            summary = convert_in.from_t5x(origin, folder, goal.absolute(), wanted, step, vocabulary, optimizer_state)
        else:
            if step is not None:
                raise UserError("--step names a checkpoint of a run, and --from is a Hugging Face directory")
            ignoring = [field for field in ignore_fields.split(",") if field]
            summary = convert_in.from_hugging_face(origin, folder, goal.absolute(), family, wanted, ignoring)
    say(summary | {"written to": str(goal)})


def _check_flags(
    taken_in: str | None,
    to_t5x: bool,
    ignore_fields: str,
    vocabulary: str | None,
    averaged: bool,
    optimizer_state: bool,
    max_shard_size: str | None,
) -> None:
    """Raises UserError for a flag of `convert` that says nothing about what is converted.

    Args:
      taken_in: "t5x" or "hugging_face", what comes in; None where a run goes out.
      to_t5x: whether a run goes out as T5X's checkpoint.
      ignore_fields, vocabulary, averaged, optimizer_state, max_shard_size: as `convert` takes them.
    """
    if ignore_fields and taken_in != "hugging_face":
        raise UserError(
            "--ignore_fields is about config.json of a Hugging Face directory to take in, and --from is not one"
        )
    if vocabulary is not None and taken_in != "t5x":
        raise UserError("--vocabulary is for T5X's and Mesh-TensorFlow's checkpoints: other directories hold their own")
    if averaged and taken_in is not None:
        raise UserError("--averaged is about a run that kept averages, and --from is to be taken in")
    if optimizer_state and taken_in != "t5x" and not to_t5x:
        raise UserError("--optimizer_state is for T5X's checkpoints, in and (with --family=t5x) out")
    if max_shard_size is not None and (taken_in is not None or to_t5x):
        raise UserError("--max_shard_size is about safetensors files to write out, and none are written here")


def network(model: "Model") -> "Model":
    """Returns the model of a recipe: what `runs/convert.gin` binds."""
    return model


@contextlib.contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """Yields a directory beside `target` that takes its name once all went well, and is removed otherwise.

    Raises:
      UserError: `target` is there, or cannot be made; a file cannot be read or written.
      EnvironmentFailure: the disk is full or broken.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"--to={target} is there already: give a new directory, nothing is written over")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"--to={target} cannot be made: {error.strerror or error}") from error
    try:
        yield partial
        partial.rename(target)
    except OSError as error:
        if is_disk_trouble(error):
            raise EnvironmentFailure(f"cannot write {target}: {error.strerror}") from error
        raise UserError(f"--to={target} is not made: {error}") from error  # a file that may not be read, a folder gone
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def say(facts: Mapping[str, str]) -> None:
    """Prints what was done, a line a fact."""
    print("\n".join(format_columns(facts.items())))


def _dtype(name: str) -> "np.dtype | None":
    if name not in DTYPES:
        raise UserError(f"--dtype={name} is not one of {', '.join(DTYPES)}")
    if name == "keep":
        return None
    import jax.numpy as jnp

    return jnp.dtype(name)


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    import jax

    from meshway.launch.recipe import config

    jax.config.update("jax_platforms", "cpu")  # values only move: accelerators stay free
    own = f"{CONVERT}.{CONVERT}"
    if not any(binding.startswith(f"{own}.target=") for binding in invocation.bindings):
        raise UserError("meshway convert needs --to=DIR: the directory to make")
    recipe = config.load(dataclasses.replace(invocation, subject=CONVERT))
    convert(**recipe.build(own))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main([CONVERT, *sys.argv[1:]]))
