"""All families that can be converted, and which of them a directory is of."""

from collections.abc import Mapping
from typing import Any

from meshway.framework.conversion.families.decoders import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3
from meshway.framework.conversion.families.gemma import GEMMA2, GEMMA3
from meshway.framework.conversion.families.gpt2 import GPT2
from meshway.framework.conversion.families.t5 import MT5, T5
from meshway.framework.conversion.family import Family
from meshway.framework.errors import UserError, did_you_mean

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (T5, MT5, GPT2, LLAMA, GEMMA2, GEMMA3, QWEN2, QWEN3, MISTRAL, MIXTRAL)
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
