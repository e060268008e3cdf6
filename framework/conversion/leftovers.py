"""Weights that lie in a model directory and are not read: named, and refused where they say something else."""

import json
import re
from pathlib import Path

from meshway.framework.conversion.tensor_files import INDEX, SINGLE, TensorFiles, same_values
from meshway.framework.errors import UserError

_OWN = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # what transformers would call the model's own weights
_OTHERS = ("*.safetensors", "*.safetensors.index*.json", "*.bin", "*.pth", "*.msgpack", "*.h5", "*.gguf")
_ADAPTER = "adapter_config.json"  # peft's; transformers puts the adapter on top of the weights


def find_leftovers(tensors: TensorFiles) -> list[str]:
    """Returns the names of weights in a model directory that are not read.

    Of files that could be the model's own, as an older set of shards or a `model.safetensors` beside an index, all
    tensors are compared with those that are read.

    Raises:
      UserError: they differ, or an adapter lies there that transformers would apply.
    """
    directory = tensors.directory
    if (directory / _ADAPTER).is_file():
        raise UserError(
            f"{directory} holds {_ADAPTER}: transformers would change the weights by that adapter. Merge it into them "
            "(peft's merge_and_unload), or remove its files"
        )
    read = {path.name for path in tensors.files}
    found = sorted({path.name for each in _OTHERS for path in directory.glob(each) if path.is_file()} - read)
    left = [name for name in found if not (name == INDEX and _is_index_of(directory / INDEX, tensors))]
    for name in left:
        if name == INDEX:
            _check_index(directory / INDEX, tensors)
        elif _OWN.fullmatch(name):
            _check_same(TensorFiles(directory, name), name, tensors)
    return left


def _listed(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{index}, beside {SINGLE}, cannot be read: {error}; remove the one that is not meant"
        ) from error


def _is_index_of(index: Path, tensors: TensorFiles) -> bool:
    """Whether an index names no other files than those that were read."""
    return set(_listed(index).values()) <= {path.name for path in tensors.files}


def _check_index(index: Path, tensors: TensorFiles) -> None:
    """Raises UserError where an index beside `model.safetensors` lists other tensors than that holds."""
    other = sorted(set(_listed(index)) ^ set(tensors))
    if other:
        has, lacks = (INDEX, SINGLE) if other[0] not in tensors else (SINGLE, INDEX)
        raise _differ(tensors, SINGLE, INDEX, f"{has} has tensor {other[0]!r} and {lacks} has not")


def _check_same(left: TensorFiles, name: str, tensors: TensorFiles) -> None:
    """Raises UserError where a file that is not read holds a tensor that the model has otherwise."""
    read = SINGLE if tensors.files[0].name == SINGLE else INDEX
    for tensor in left:
        if tensor not in tensors:
            raise _differ(tensors, read, name, f"{name} has tensor {tensor!r} and {read} has not")
        if not same_values(tensors, tensor, left, tensor):
            raise _differ(tensors, read, name, f"tensor {tensor!r} is another in each")


def _differ(tensors: TensorFiles, one: str, other: str, how: str) -> UserError:
    return UserError(
        f"{tensors.directory} holds two sets of weights, {one} and {other}, and {how}: remove the one that is not "
        f"meant (transformers would read {one})"
    )
