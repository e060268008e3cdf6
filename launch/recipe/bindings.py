"""A recipe's text as plain values: what conversion reads of one, and what it writes."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.conversion.settings import Reference as Converted
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Model
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config, configurables
from meshway.launch.recipe.text import Binding, Import, Macro, Reference, Target, format_binding, map_leaves, parse

# The modules that selectors of written recipes begin with.
MODULES: Mapping[str, str] = {
    "attention": "meshway.models.layers.attention",
    "blocks": "meshway.models.layers.blocks",
    "decoder_only": "meshway.models.decoder_only",
    "embedding": "meshway.models.layers.embedding",
    "encoder_decoder": "meshway.models.encoder_decoder",
    "grain_loader": "meshway.framework.data.grain_loader",
    "lm": "meshway.models.language.lm",
    "mapping": "meshway.framework.checkpoints.mapping",
    "mlp": "meshway.models.layers.mlp",
    "moe": "meshway.models.layers.moe",
    "norm": "meshway.models.layers.norm",
    "optimizers": "meshway.framework.optimizers.optimizers",
    "positions": "meshway.models.layers.positions",
    "rotary": "meshway.models.layers.rotary",
    "routers": "meshway.models.layers.mixture.routers",
    "schedules": "meshway.framework.optimizers.schedules",
    "stack": "meshway.models.layers.stack",
    "t5": "meshway.models.language.t5",
    "train": "meshway.launch.train",
    "vocabularies": "meshway.framework.data.vocabularies",
}
# Parameters of models/ for how a model is trained or run, not what it computes: class or * -> names.
_RUNNING: Mapping[str, Collection[str]] = {
    "*": ("dropout_rate", "dtype", "kernel", "remat", "scan", "pipeline", "one_hot", "stddev", "init"),
    "DecoderOnly": ("z_loss", "label_smoothing"),
    "EncoderDecoder": ("z_loss", "label_smoothing"),
    "MoeMlp": ("dispatch", "capacity_factor", "eval_capacity_factor", "group_rows", "groups_per_row"),
    "TopK": ("load_loss", "z_loss", "jitter"),
}


def bindings_of(text: str, file: str) -> dict[str, Any]:
    """Returns macros and bindings of a resolved recipe by name, each selector as `module.Class.parameter` with the
    module's last word, macros replaced by their values.

    Raises:
      UserError: the text does not parse.
    """
    statements = parse(text, file)
    modules = {each.bound_name: each.bound_module for each in statements if isinstance(each, Import)}
    bindings = [each for each in statements if isinstance(each, Binding)]
    macros = {each.parameter: each.value for each in bindings if each.is_macro}

    def word(selector: str) -> str:
        first, dot, rest = selector.partition(".")
        return modules.get(first, first).rpartition(".")[2] + dot + rest

    def leaf(value: Any) -> Any:
        if isinstance(value, Macro):
            return map_leaves(leaf, macros.get(value.name))
        if isinstance(value, Reference):
            scope = f"{value.scope}/" if value.scope else ""
            return Converted(scope + word(value.selector), value.evaluate)
        return value

    found = {}
    for each in bindings:
        scope = f"{each.scope}/" if each.scope else ""
        name = each.parameter if each.is_macro else f"{scope}{word(each.selector)}.{each.parameter}"
        found[name] = map_leaves(leaf, each.value)
    return found


def model_of(text: str, file: str) -> dict[str, Any]:
    """Returns the bindings of a resolved recipe that decide what its MODEL computes."""
    bindings = bindings_of(text, file)
    reached: set[str] = set()
    found: list[str] = []

    def reach(value: Any) -> Any:
        if isinstance(value, Converted):
            found.append(value.selector.rpartition("/")[2])
        return value

    map_leaves(reach, bindings.get("MODEL"))
    while found:
        selector = found.pop()
        if selector not in reached:
            reached.add(selector)
            for name, value in bindings.items():
                if _selector(name) == selector:
                    map_leaves(reach, value)
    return {
        name: value
        for name, value in bindings.items()
        if _selector(name) in reached and not _is_running(_selector(name), name.rpartition(".")[2])
    }


def _selector(name: str) -> str:
    """Returns `module.Class` of `scope/module.Class.parameter`; '' for a macro."""
    return name.rpartition("/")[2].rpartition(".")[0]


def _is_running(selector: str, parameter: str) -> bool:
    return parameter in (*_RUNNING["*"], *_RUNNING.get(selector.rpartition(".")[2], ()))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Returns the names of `model_of` whose values differ; what is not bound has its unscoped value or its default."""

    def value(bindings: Mapping[str, Any], name: str) -> Any:
        unscoped = name.rpartition("/")[2]
        return _plain(bindings.get(name, bindings.get(unscoped, _default(unscoped))))

    return [name for name in sorted({*found, *expected}) if value(found, name) != value(expected, name)]


def _default(name: str) -> Any:
    """Returns the default of a parameter `module.Class.parameter`; for a module that is not known here, a value that
    nothing equals."""
    word, *path, parameter = name.split(".")
    if word not in MODULES:
        return float("nan")
    found = configurables.find(Target(MODULES[word], tuple(path)), importing=True)
    references = configurables.parameters(found).references
    if parameter in references:
        return map_leaves(_converted, references[parameter])
    # flax's metaclass hides a class's own parameters.
    return inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters[parameter].default


def _converted(value: Any) -> Any:
    return Converted(value.selector, value.evaluate) if isinstance(value, Reference) else value


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def build_network(path: Path) -> tuple[Model, config.Recipe]:
    """Returns the model that a recipe file describes, and the recipe.

    Raises:
      UserError: the recipe is wrong.
    """
    recipe = config.load(Invocation("convert", "network", gin_files=(str(path),)), import_unreferenced=False)
    return recipe.build("convert.network")["model"], recipe


def text_of(includes: str | Sequence[str], bindings: Mapping[str, Any], heading: str = "") -> str:
    """Returns a recipe that includes shipped files, one or several, and then binds `bindings`; macros come first.

    Raises:
      UserError: a binding's module is not one that recipes of converted models name.
    """
    words = [name.rpartition("/")[2].partition(".")[0] for name in bindings if "." in name]

    def leaf(value: Any) -> Any:
        if isinstance(value, Converted):
            words.append(value.selector.rpartition("/")[2].partition(".")[0])
        return value

    for value in bindings.values():
        map_leaves(leaf, value)
    unknown = sorted(set(words) - set(MODULES))
    if unknown:
        raise UserError(f"no recipe of a converted model names {unknown[0]!r}")
    imports = [MODULES[word].rpartition(".") for word in sorted(set(words))]
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    lines += ["from __gin__ import dynamic_registration", ""]
    lines += [f"from {parent} import {name}" for parent, _, name in imports] + ([""] if imports else [])
    lines += [f"include {each!r}" for each in ([includes] if isinstance(includes, str) else includes)] + [""]
    lines += [format_binding(name, value) for name, value in bindings.items() if "." not in name]
    dotted = [format_binding(name, value) for name, value in bindings.items() if "." in name]
    return "\n".join([*lines, *([""] if dotted else []), *dotted]) + "\n"
