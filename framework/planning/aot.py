"""Compiling a step for devices that are not there, and what the compiler says of it."""

import dataclasses
import re
import time
from typing import Any

import jax

from meshway.framework.errors import UserError, first_line
from meshway.framework.planning.collectives import Collective, read_collectives


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, bytes on one device.

    Attributes:
      seconds: that compiling took.
      arguments: state and batch as they lie in memory, padded.
      outputs: results that do not reuse an argument's buffer.
      temporaries: everything that is made and freed within the step: gradients, activations, buffers of collectives.
      code: of the program.
      collectives: what it sends; empty where the program cannot be read.
      unread: why it cannot be, "" where it can.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    collectives: tuple[Collective, ...]
    unread: str = ""

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.outputs + self.temporaries + self.code


class TooLarge(UserError):
    """The compiler found no room for a step."""


def compile_step(program: Any) -> CompiledStep:
    """Compiles the step of a `training.program.TrainProgram` for its devices.

    Raises:
      TooLarge: a device's memory does not hold it.
      UserError: the model does not fit the layout, or the compiler refuses an operation.
    """
    start = time.perf_counter()
    try:
        compiled = program.compile_step()
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(error) from error
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    unread, text = "", ""
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:  # jaxlib does not print all of what libtpu makes
        unread = first_line(error)
    rows = read_collectives(text, dict(program.partitioner.mesh.shape)) if text else []
    return CompiledStep(
        seconds,
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        tuple(rows),
        unread,
    )


def _refusal(error: jax.errors.JaxRuntimeError) -> UserError:
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
        return TooLarge(f"the step does not fit: {first_line(error)}")
    if option := re.search(r"\bxla_\w+", text):
        return UserError(
            f"the compiler refuses the step, by its option {option[0]}: {first_line(error)}; mend "
            "Layout.compiler_options in the layout file"
        )
    operation = re.search(r'op_name="([^"]*)"', text)
    where = f" at {operation[1]}" if operation else ""
    return UserError(
        f"the compiler refuses the step{where}: {first_line(error)}; try a layout whose axes of this operation are "
        "sharded otherwise (powers of two divide best), or another attention kernel"
    )
