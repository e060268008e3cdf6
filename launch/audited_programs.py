"""The programs of a recipe whose compiled form `meshway inspect --hlo` reads: a train step, and those of inference."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.inference.engine import TokenSteps, compile_score, prompt_batch
from meshway.framework.inference.rows import RowFormat
from meshway.framework.planning.audit import audit, format_audit

if TYPE_CHECKING:
    from meshway.framework.training.program import TrainProgram

# Program -> what it does, and the argument that it is given up to write its result into.
PROGRAMS: Mapping[str, tuple[str, str]] = {
    "step": ("a train step", "state"),
    "score": ("scoring a batch", ""),
    "prefill": ("prefill of a batch", ""),
    "decode": ("a step of decoding", "cache"),
}


def audits(program: "TrainProgram", names: str = "step") -> str:
    """Compiles programs of a recipe and returns what their HLO does, as text; nothing is allocated.

    Args:
      program: the recipe. Prompts are as long as its inputs, or as its targets where it has no encoder, and the cache
        has room for the targets' length in new tokens.
      names: of PROGRAMS, with commas between.

    Raises:
      UserError: an unknown program, the model does not decode, or it does not fit the layout.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in PROGRAMS:
            raise UserError(
                f"--programs={names}: {name!r} is none of {', '.join(PROGRAMS)}{did_you_mean(name, PROGRAMS)}"
            )
    if not asked:
        raise UserError(f"--programs names none of {', '.join(PROGRAMS)}")
    texts: dict[str, str] = {}
    makers: dict[str, Callable[[], dict[str, str]]] = {
        "step": lambda: {"step": program.compile_step().as_text() or ""},
        "score": lambda: {"score": compile_score(program.sharded, program.batch).as_text() or ""},
        "prefill": lambda: _decoding(program),
        "decode": lambda: _decoding(program),
    }
    found = []
    for name in dict.fromkeys(asked):
        if name not in texts:
            texts |= makers[name]()
        what, donated = PROGRAMS[name]
        mesh = program.partitioner.mesh.shape
        found.append(format_audit(what, audit(texts[name], mesh, [donated] if donated else [])))
    return "\n\n".join(found)


def _decoding(program: "TrainProgram") -> dict[str, str]:
    prompt = "inputs" if RowFormat.of(program.sharded.model).has_encoder else "targets"
    prompts = prompt_batch(program.sharded, program.batch_size, program.lengths[prompt])
    return TokenSteps(program.sharded, prompts, program.lengths["targets"]).texts()
