"""What the command line said, before any file is read. No gin and no JAX here: `--help` must be quick."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from meshway.framework.errors import UserError, did_you_mean
from meshway.launch.cluster.job import Job, Renderer, Runner

# Macro -> what it is. Every shipped recipe honours these; the same words serve the help and the errors.
MACROS = {
    "MODEL_DIR": "the run directory: logs, checkpoints, report",
    "MIXTURE_OR_TASK_NAME": "the seqio task or mixture to read",
    "MIXTURE_OR_TASK_MODULE": "the Python module(s) whose import registers it",
    "CACHE_DIR": "where tasks are cached, each in a folder of its name",
    "TASK_FEATURE_LENGTHS": "tokens by feature, as {'inputs': 256, 'targets': 64}",
    "TRAIN_STEPS": "the step at which training ends",
    "BATCH_SIZE": "examples in a global batch",
    "SEED": "the seed of parameters, dropout and data order",
    "CHECKPOINT_PERIOD": "steps between checkpoints",
    "EVAL_PERIOD": "steps between evaluations",
    "REPORT_PERIOD": "steps between reports of metrics",
    "DROPOUT_RATE": "the dropout rate of the model",
    "LAYOUT": "how arrays lie on the mesh: a shipped name (as fsdp) or a gin file",
}


@dataclasses.dataclass(frozen=True)
class Invocation:
    """One command: a verb, its recipe and its options.

    Attributes:
      verb: as `train`.
      subject: what the verb acts on, where it takes one (`train` in `meshway bench train`).
      gin_files: recipe files in order, as given: paths, or names among the shipped ones.
      bindings: `NAME=VALUE` in order, as written after `--gin.` or said by a flag.
      flags: the flag by which a name of these was given, `--task` of MIXTURE_OR_TASK_NAME, for messages.
      search_paths: folders to look for gin files in, before the shipped ones.
      dry_run: build everything and print it, run nothing, write nothing.
      coordinator_address: host:port of process 0 of a multi-process run, None for one process.
      num_processes: processes in the run, None to let the cluster say.
      process_id: this process's rank, None to let the cluster say.
      simulated_devices: CPU devices to simulate in this process, None for the real ones.
      command: `launch`: the command after `--`, as its verb reads it.
      job: `launch`: what is launched, the command after `--` in it.
      place: `launch`: where, of the class that the subject names (`launchers/`).
      output: `launch`: the job file to write, None to print it.
    """

    verb: str
    subject: str | None = None
    gin_files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    search_paths: tuple[str, ...] = ()
    dry_run: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    simulated_devices: int | None = None
    command: "Invocation | None" = None
    job: Job | None = None
    place: Runner | Renderer | None = None
    output: str | None = None

    @property
    def processes(self) -> tuple[str | None, int | None, int | None, int | None]:
        """The arguments of `processes.joined`."""
        return self.coordinator_address, self.num_processes, self.process_id, self.simulated_devices


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a user's errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Returns the formatter of every help."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def positive_int(text: str) -> int:
    """Returns a whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Returns a whole number of at least 0, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Returns what reads one of several words, as the type of an argument."""

    def read(text: str) -> str:
        if text not in choices:
            near = did_you_mean(text, choices)
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{near}")
        return text

    return read


def not_negative(text: str) -> float:
    """Returns a finite number of at least 0, as the type of an argument."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def share(text: str) -> float:
    """Returns a number above 0, at most 1, as the type of an argument."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _number(text: str, holds: Callable[[float], bool], words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value
