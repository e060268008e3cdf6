"""The families that can be converted, and a Hugging Face directory as parameters and bindings; what of it is left over
is named."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.conversion.families.decoders import GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3
from meshway.framework.conversion.families.t5 import LONGT5, MT5, T5, UMT5
from meshway.framework.conversion.family import Family, read_config
from meshway.framework.conversion.rules import Shape, pieces_of
from meshway.framework.conversion.settings import Bindings
from meshway.framework.conversion.tensor_files import INDEX, SINGLE, TensorFiles, same_values
from meshway.framework.conversion.values import Values, complete_values
from meshway.framework.errors import UserError, did_you_mean

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


_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class HuggingFaceModel:
    """A model directory, opened.

    Attributes:
      directory: where it lies.
      config: its config.json.
      family: what it is.
      base: the prefix of its tensors' names.
      tensors: its weights.
      copies: tensors that repeat another one: name -> the other.
      bindings: what a recipe says for config.json.
      left_over: names of weights beside them that are not read.
    """

    directory: Path
    config: Mapping[str, Any]
    family: Family
    base: str
    tensors: TensorFiles
    copies: Mapping[str, str]
    bindings: Bindings
    left_over: Sequence[str] = ()

    def values(self, shapes: Mapping[str, Shape], dtype: np.dtype | None = None) -> dict[str, Values]:
        """Returns the parameters [shapes], to be read piece by piece or shard by shard.

        Args:
          shapes: of all parameters of the model that `bindings` build.
          dtype: that they are converted to, None for their own.

        Raises:
          UserError: a tensor is missing, has no place, another shape or a dtype that is not converted.
        """
        family, pieces = self.family, pieces_of(self.family.rules, self.base, shapes)
        model = f"{family.name} model{self._sizes_taken()}"
        return complete_values(model, pieces, shapes, self.tensors, dtype, family.ignored, self.copies)

    def _sizes_taken(self) -> str:
        """Returns which sizes config.json leaves out, in words: tensors that do not fit may follow from them."""
        taken = [
            f"{name}, for which {value} is taken as transformers does"
            for name, value in self.family.defaults.items()
            if type(value) is int and name not in self.config and not name.endswith("_id")
        ]
        return f" (config.json has no {', no '.join(taken)})" if taken else ""


def is_model(directory: Path) -> bool:
    """Whether a directory looks like a Hugging Face model."""
    return any((directory / name).is_file() for name in ("config.json", SINGLE, INDEX))


def open_model(directory: Path, family: str | None = None, ignoring: Sequence[str] = ()) -> HuggingFaceModel:
    """Opens a model directory; reads config.json and the headers of the weights.

    Args:
      directory: with config.json, and `model.safetensors` or its shards and their index.
      family: what it must be, None to take what config.json says.
      ignoring: fields of config.json that the user says change nothing.

    Raises:
      UserError: no such directory, another family, a field that is not known, a file that is missing or truncated,
        other weights beside these that say something else.
    """
    directory = Path(directory)
    config = read_config(directory)
    found = detect(config, family)
    tensors = TensorFiles(directory)
    left_over = find_leftovers(tensors)
    base = found.base_of(list(tensors))
    _name_embedding(found, base, tensors, config)
    copies = _copies(found, base, tensors)
    bindings = found.read(config, _HEAD in tensors and _HEAD not in copies, ignoring)
    if not found.tied_by_tensors:
        copies = _checked(copies, tensors, bool(bindings["TIED_LOGITS"]))
    return HuggingFaceModel(directory, config, found, base, tensors, copies, bindings, left_over)


def _name_embedding(family: Family, base: str, tensors: TensorFiles, config: Mapping[str, Any]) -> None:
    """Gives a tensor that is there only as a copy the name of what it would repeat.

    Savers write tensors that are one in memory once, under any of their names; transformers loads each.
    """
    tied = config.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    names = sorted(family.copies, key=lambda name: name == _HEAD)
    for name in names if tied else [name for name in names if name != _HEAD]:
        wanted = family.copies[name].format(base=base)
        if name in tensors and wanted not in tensors:
            tensors.rename(name, wanted)


def _copies(family: Family, base: str, tensors: TensorFiles) -> dict[str, str]:
    """Returns the tensors that are there twice.

    Raises:
      UserError: one that can only be a copy differs.
    """
    copies = {}
    for name, other in ((name, other.format(base=base)) for name, other in family.copies.items()):
        if name not in tensors or other not in tensors:
            continue
        if name != _HEAD:
            if not same_values(tensors, name, tensors, other):
                raise UserError(f"{tensors.directory}: {name} differs from {other}, which it should repeat")
            copies[name] = other
        elif not family.tied_by_tensors or same_values(tensors, name, tensors, other):
            copies[name] = other
    return copies


def _checked(copies: Mapping[str, str], tensors: TensorFiles, tied: bool) -> dict[str, str]:
    """Returns the copies of a family whose config.json tells whether the output layer is one."""
    if not tied:
        return {name: other for name, other in copies.items() if name != _HEAD}
    if _HEAD in copies and not same_values(tensors, _HEAD, tensors, copies[_HEAD]):
        raise UserError(
            f"{tensors.directory}: config.json ties the output layer to the embeddings, but {_HEAD} differs from "
            f"{copies[_HEAD]}; set tie_word_embeddings to false if it is a layer of its own"
        )
    return dict(copies)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (T5, MT5, UMT5, LONGT5, GPT2, LLAMA, GEMMA2, GEMMA3, QWEN2, QWEN3, MISTRAL, MIXTRAL)
}


def named(name: str) -> Family:
    """Returns a family by its name; raises UserError where there is none."""
    if name not in FAMILIES:
        near = did_you_mean(name, FAMILIES) or f"; they are {', '.join(FAMILIES)}"
        raise UserError(f"--family={name}: there is no such family{near}")
    return FAMILIES[name]


def detect(config: Mapping[str, Any], wanted: str | None = None) -> Family:
    """Returns the family of a config.json.

    Args:
      config: config.json.
      wanted: the family the user named, None for none.

    Raises:
      UserError: the model is of an unknown family, or of another than `wanted`; or its head is not a language model's.
    """
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    found = next((family for family in FAMILIES.values() if kind in family.model_types), None)
    if found is None and kind is None and wanted is not None:
        found = named(wanted)
    if wanted is not None and found is not named(wanted):
        own = f"of family {found.name}" if found else "of no family known here"
        raise UserError(f"--family={wanted}, but config.json says model_type {kind!r}, {own}")
    if found is None:
        types = [each for family in FAMILIES.values() for each in family.model_types]
        near = did_you_mean(str(kind), types, limit=1) or f"; known are {', '.join(types)}"
        raise UserError(f"config.json: model_type {kind!r} is of no family that is converted{near}")
    if architectures and found.architecture not in architectures:
        raise UserError(
            f"config.json: architectures {architectures} is not {found.architecture}, the only one of model_type "
            f"{kind!r} that is converted"
        )
    return found
