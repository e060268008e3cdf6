"""Flags of `meshway infer` and `export` that would change nothing beside others: they are refused, not passed over."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from meshway.framework.errors import UserError
from meshway.launch.flags import flags_of
from meshway.launch.verb_flags import ExportFlags, InferFlags

PREDICT, SCORE, WITH_AUX = MODES = ("predict", "score", "predict_with_aux")
_DRAWN = ("--temperature", "--top_k", "--top_p", "--num_decodes", "--seed")
_PREDICTED = (*_DRAWN, "--beams", "--stop", "--begin_field")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """`flags` do nothing where `when`, for the reason `why`; `instead` is what to do."""

    when: bool
    flags: Sequence[str]
    why: str
    instead: str = "leave out either"


def aux_names(mode: str, aux: str) -> list[str]:
    """Returns the intermediate values that --aux names; UserError for a mode that is none, or does not go with them."""
    names = [name for name in aux.split(",") if name]
    if mode not in MODES:
        raise UserError(f"--mode={mode} is not one of {', '.join(MODES)}")
    if (mode == WITH_AUX) != bool(names):
        raise UserError(
            "--mode=predict_with_aux goes with --aux=NAMES, intermediate values of the model, and only they do: "
            "as --mode=predict_with_aux --aux=decoder_output"
        )
    return names


def refuse_idle(bindings: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Checks which flags were given, under their own names or as `--gin.`, against what is asked for.

    Args:
      bindings: of the command line.
      arguments: those of `infer.infer`, built.

    Raises:
      UserError: a flag was given that has no effect; one is named, with the reason.
    """
    given = _given(bindings, InferFlags)
    _refuse(given, _rules(given, arguments))


def refuse_idle_in_export(bindings: Sequence[str], decoder: Any, modes: str, beams: int | None) -> None:
    """Does the same for `meshway export`, of whose arguments these three decide."""
    given = _given(bindings, ExportFlags)
    predicts, greedy = "predict" in modes, getattr(decoder, "temperature", None) == 0
    _refuse(given, _drawing(not predicts, "with --modes=score, which predicts nothing", beams is not None, greedy))


def _given(bindings: Sequence[str], flags: type) -> set[str]:
    """Returns the names of the flags that a command line has, under their own names or as `--gin.`."""
    names = {binding.partition("=")[0].strip() for binding in bindings}
    return {flag.name for flag in flags_of(flags) if flag.binding in names}


def _refuse(given: Collection[str], rules: Sequence[_Rule]) -> None:
    for rule in rules:
        for flag in rule.flags if rule.when else ():
            if flag in given:
                raise UserError(f"{flag} has no effect {rule.why}: {rule.instead}")


def _drawing(scores: bool, why: str, beams: bool, greedy: bool) -> list[_Rule]:
    """Returns the rules of flags that say how predictions are made."""
    return [
        _Rule(scores, _PREDICTED, why),
        _Rule(beams, _DRAWN, "with --beams: a beam search draws nothing, and returns as many predictions as beams"),
        _Rule(
            greedy,
            ("--top_k", "--top_p", "--num_decodes", "--seed"),
            "at temperature 0, where the likeliest token is always taken",
            "give --temperature above 0, or leave it out",
        ),
    ]


def by_flag(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns a recipe's settings by the flags that would change them: `--beams`, or `--gin.NAME` for what has none."""

    def written(name: str) -> str:
        for flag in flags_of(InferFlags):
            if name == flag.binding or (name.endswith(f".{flag.binding}") and "/" not in name):
                return flag.name
        return f"--gin.{name}"

    return {written(name.removeprefix("/")): value for name, value in settings.items()}


def made(writer: str) -> Any:
    """Returns an object of a class, called as `mylab.writers.Csv`, which needs no arguments.

    Raises:
      UserError: there is none, or it needs arguments.
    """
    from meshway.launch.recipe.configurables import Target, Unresolved, find

    module, _, name = writer.rpartition(".")
    if not module:
        raise UserError(f"--writer={writer} is no class in a module: write it as mylab.writers.{writer or 'Csv'}")
    try:
        return find(Target(module, (name,)), importing=True)()
    except Unresolved as error:
        raise UserError(f"--writer={writer}: {error}") from error
    except TypeError as error:
        raise UserError(
            f"--writer={writer} cannot be made without arguments ({error}): bind infer.Output.writer in a gin file"
        ) from error


def _rules(given: Collection[str], arguments: Mapping[str, Any]) -> list[_Rule]:
    inputs, decoder = arguments["inputs"], arguments["decoder"]
    scores, beams = arguments.get("mode") == "score", arguments.get("beams") is not None
    greedy = getattr(decoder, "temperature", None) == 0
    writer = arguments["output"].writer is not None
    output = "" if writer else str(arguments["output"].where)
    several = beams or decoder.num_decodes > 1
    return [
        *_drawing(scores, "with --mode=score, which predicts nothing", beams, greedy),
        _Rule(not scores, ("--targets_field",), "without --mode=score: only there are targets read"),
        _Rule(inputs.where is None, ("--format", "--columns"), "without --input: they define how a file is read"),
        _Rule(scores and bool(inputs.prompts), ("--mode",), "with --prompt, which has no targets to score"),
        _Rule(bool(inputs.prompts), ("--begin_field",), "with --prompt, which has no other fields"),
        _Rule(
            arguments["output"].where is None,
            ("--aux", "--mode", "--chunk_size", "--overwrite", "--output_format", "--on_bad", "--num_shards"),
            "without --output: predictions are printed",
            "give --output=FILE.jsonl, or leave it out",
        ),
        _Rule(
            inputs.split is None,
            ("--fields",),
            "without --split: all fields of a file are kept",
            "leave it out",
        ),
        _Rule(
            inputs.split is None,
            ("--task",),
            "without --split",
            "give --split=SPLIT, or the task whose preprocessors are meant as --preprocess=TASK",
        ),
        _Rule(
            inputs.split is None and inputs.preprocess is None,
            ("--module",),
            "without --split or --preprocess: only for them is a task looked up",
            "leave it out",
        ),
        _Rule(writer, ("--output_format",), "with --writer, which has a format of its own"),
        _Rule(
            output.endswith(".txt") and several and not scores,
            ("--num_decodes", "--beams"),
            "with a .txt output, which holds one prediction of each input",
            "end --output in .jsonl or .parquet, or leave it out",
        ),
        _Rule(
            output.endswith(".txt") and arguments.get("mode", "predict") != "predict",
            ("--aux", "--mode"),
            "with a .txt output, which holds predictions only",
            "end --output in .jsonl or .parquet",
        ),
    ]
