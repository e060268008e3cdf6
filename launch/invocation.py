"""What the command line asks for, before any file is read. No gin and no JAX here: `--help` must be quick."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from meshway.launch.cluster.job import Job, Renderer, Runner

# Macro -> what it is. Every shipped recipe honours these; the same words serve the help and the errors.
MACROS = {
    "MODEL_DIR": "the run directory: logs, checkpoints, report",
    "MIXTURE_OR_TASK_NAME": "the seqio task or mixture to read",
    "MIXTURE_OR_TASK_MODULE": "the Python module(s) whose import registers it",
    "CACHE_DIR": "where tasks are cached, each in a folder of its name",
    "TASK_FEATURE_LENGTHS": "tokens by feature, as {'inputs': 256, 'targets': 64}",
    "EVAL_FEATURE_LENGTHS": "the same when evaluating; None: the longest of the split",
    "TRAIN_STEPS": "the step at which training ends",
    "TRAIN_STEPS_RELATIVE": "or how many steps to train beyond the checkpoint that a run starts from",
    "INITIAL_CHECKPOINT_PATH": "that checkpoint, of ours, of Hugging Face or of T5X; None: fresh parameters",
    "BATCH_SIZE": "examples in a global batch",
    "SEED": "the seed of parameters, dropout and data order",
    "CHECKPOINT_PERIOD": "steps between checkpoints",
    "EVAL_PERIOD": "steps between evaluations",
    "REPORT_PERIOD": "steps between reports of metrics",
    "DROPOUT_RATE": "the dropout rate of the model",
    "LAYOUT": "how arrays are sharded over the mesh: a shipped name (as fsdp) or a gin file",
}


@dataclasses.dataclass(frozen=True)
class Invocation:
    """One command: a verb, its recipe and its options.

    Attributes:
      verb: as `train`.
      subject: what the verb acts on, where it takes one (`train` in `meshway bench train`).
      gin_files: recipe files in order, as given: paths, or names among the shipped ones.
      bindings: `NAME=VALUE` in order, as written after `--gin.` or given by a flag.
      flags: the flag by which a name of these was given, `--task` of MIXTURE_OR_TASK_NAME, for messages.
      search_paths: folders to look for gin files in, before the shipped ones.
      dry_run: build everything and print it, run nothing, write nothing.
      coordinator_address: host:port of process 0 of a multi-process run, None for one process.
      num_processes: processes in the run, None to take it from the cluster.
      process_id: this process's rank, None to take it from the cluster.
      simulated_devices: CPU devices to simulate in this process, None for the real ones.
      options: the verb's own flags, of its dataclass in `verb_flags.py`.
      command: `launch`: the command after `--`, as its verb reads it.
      job: `launch`: what is launched, the command after `--` in it.
      place: `launch`: where, of the class that the subject names (`cluster/`).
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
    options: Any = None
    command: "Invocation | None" = None
    job: Job | None = None
    place: Runner | Renderer | None = None
    output: str | None = None

    @property
    def processes(self) -> tuple[str | None, int | None, int | None, int | None]:
        """The arguments of `processes.joined`."""
        return self.coordinator_address, self.num_processes, self.process_id, self.simulated_devices
