"""The command line of `meshway launch KIND [options] -- VERB ...`, and places that are this machine. Light: no JAX."""

import argparse
import dataclasses
import os
import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar, NoReturn

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import local_path
from meshway.launch.cluster.gke import Gke, Xpk
from meshway.launch.cluster.job import Job, Renderer
from meshway.launch.cluster.queues import SkyPilot, Slurm
from meshway.launch.cluster.ray_cluster import RayCluster
from meshway.launch.cluster.tpu_vm import TpuVm
from meshway.launch.flags import Flag, Parser, add_flags, flag, flags_of, given, refuse_unknown, sentence
from meshway.launch.invocation import Invocation


@dataclasses.dataclass(frozen=True)
class Local:
    """Several processes on this machine, each with simulated CPU devices."""

    common: ClassVar[tuple[str, ...]] = ("restarts", "env")
    shared_directory: ClassVar[bool] = False

    processes: int = flag("how many processes run together", "N")
    devices: int = flag("CPU devices that each of them simulates (default: 1)", "N", 1)
    elastic: bool = flag("go on with fewer processes after each failure: the next number that divides N", default=False)
    log_dir: str | None = flag("a folder for a log of each process (default: `logs` in MODEL_DIR)", "DIR", None)

    def run(self, job: Job) -> int:
        """Runs the job in `processes` processes; returns the exit code."""
        from meshway.launch.cluster.supervisor import run_local

        os.environ.update(job.environment)
        return run_local(job.words, self.processes, self.devices, job.restarts, self.elastic, self.log_dir)


@dataclasses.dataclass(frozen=True)
class Worker:
    """One process, on a host of a cluster that runs this on each of its hosts."""

    common: ClassVar[tuple[str, ...]] = ("restarts", "env")
    shared_directory: ClassVar[bool] = False

    def run(self, job: Job) -> int:
        """Runs the job in one supervised process; returns the exit code."""
        from meshway.launch.cluster.supervisor import supervise

        os.environ.update(job.environment)
        return supervise(job.words, job.restarts)


@dataclasses.dataclass(frozen=True)
class JobFile:
    """Where a job file goes."""

    output: str | None = flag("write the file, do not print it", "FILE", None)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A place to launch on: its class, whose fields are its flags, and how it is described."""

    place: Any  # a dataclass that is a Runner or a Renderer
    help: str
    examples: tuple[str, ...]

    @property
    def renders(self) -> bool:
        """Whether it writes a file for the place's own client, instead of running the job."""
        return issubclass(self.place, Renderer)

    @property
    def flags(self) -> list[Flag]:
        """Those of the place, those of every job that it honours, and where a job file goes."""
        common = [each for each in flags_of(Job) if each.field in self.place.common]
        return [*flags_of(self.place), *common, *(flags_of(JobFile) if self.renders else ())]


KINDS = {
    "local": Kind(
        Local,
        "run processes of simulated devices on this machine, and again when one dies",
        (
            "meshway launch local --processes=4 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/four",
            "meshway launch local --processes=4 --restarts=3 --elastic -- train --gin_file=my.gin",
        ),
    ),
    "ray": Kind(
        RayCluster,
        "run one Ray actor a process, and all of them again when one dies",
        (
            "meshway launch ray --processes=2 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/ray",
            "meshway launch ray --address=auto --processes=4 --resources=TPU=4 --restarts=5 --workdir=/data/lab "
            "-- train --gin_file=my.gin --gin.MODEL_DIR=/data/runs/one",
        ),
    ),
    "worker": Kind(
        Worker,
        "run one process of a cluster's host, and again when it fails: what job files run",
        ("meshway launch worker --restarts=3 -- train --gin_file=my.gin --gin.MODEL_DIR=/data/runs/one",),
    ),
    "slurm": Kind(
        Slurm,
        "write an sbatch file",
        (
            "meshway launch slurm --nodes=4 --gpus_per_node=8 --time=24:00:00 --restarts=3 --output=job.sbatch "
            "--workdir=/data/lab -- train --gin_file=my.gin --gin.MODEL_DIR=/data/runs/one",
        ),
    ),
    "tpu_vm": Kind(
        TpuVm,
        "write a script for Cloud TPU VMs, one slice or several",
        (
            "meshway launch tpu_vm --zone=us-east5-a --accelerator=v5p-128 --runtime_version=v2-alpha-tpuv5 "
            "--num_slices=2 --workdir=/mnt/lab --output=job.sh -- train --gin_file=my.gin --gin.MODEL_DIR=/mnt/runs/a",
        ),
    ),
    "gke": Kind(
        Gke,
        "write a JobSet for Google Kubernetes Engine",
        (
            "meshway launch gke --accelerator=tpu-v5p-slice --topology=2x2x4 --image=gcr.io/me/lab "
            "--volume=runs:/mnt/runs --workdir=/lab --output=job.yaml "
            "-- train --gin_file=my.gin --gin.MODEL_DIR=/mnt/runs/a",
        ),
    ),
    "xpk": Kind(
        Xpk,
        "write the xpk command for a cluster made with it",
        (
            "meshway launch xpk --cluster=pods --tpu_type=v5p-128 --num_slices=2 --image=gcr.io/me/lab "
            "--workdir=/lab --output=job.sh -- train --gin_file=my.gin --gin.MODEL_DIR=/mnt/runs/a",
        ),
    ),
    "skypilot": Kind(
        SkyPilot,
        "write a SkyPilot task",
        (
            "meshway launch skypilot --accelerators=H100:8 --nodes=2 --upload=. --output=job.yaml "
            "-- train --gin_file=my.gin --gin.MODEL_DIR=/mnt/runs/a",
        ),
    ),
}


def parse_launch(
    words: Sequence[str], parse: Callable[[Sequence[str]], Invocation | None], runnable: Collection[str]
) -> Invocation | None:
    """Returns what `meshway launch WORDS` asks for; None when it asked for help, which is printed.

    Args:
      words: those after `launch`.
      parse: reads the command after `--`.
      runnable: the verbs that may come there.

    Raises:
      UserError: the command line, or the one after `--`, is wrong.
    """
    own, inner = _split(words)
    parser, children = parsers()
    if not own or own[0] in ("-h", "--help"):
        parser.print_help()
        return None
    name = own[0]
    if name not in KINDS:
        near = did_you_mean(name, KINDS) or f"; they are {', '.join(KINDS)}"
        raise UserError(f"meshway launch: there is no kind {name!r}{near}")
    if "-h" in own or "--help" in own:
        children[name].print_help()
        return None
    options, unknown = parser.parse_known_args(own)
    if unknown:
        _refuse(name, unknown[0], inner is not None)
    kind, command = KINDS[name], f"meshway launch {name}"
    if not inner:
        raise UserError(f"{command} needs the command to run after --, as: {kind.examples[0]}")
    place = kind.place(**given(flags_of(kind.place), options, command))
    job = Job(tuple(inner), **given([each for each in kind.flags if each in flags_of(Job)], options, command))
    output = JobFile(**given(flags_of(JobFile), options, command)).output
    parsed = _check(name, place, job, parse, runnable)
    if parsed is None:
        return None
    return Invocation("launch", name, command=parsed, job=job, place=place, output=output)


def _split(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Returns the words before the first `--`, and those after it or None."""
    words = list(words)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _check(
    name: str, place: Any, job: Job, parse: Callable[[Sequence[str]], Invocation | None], runnable: Collection[str]
) -> Invocation | None:
    """Returns the command after `--`, read as it will be on the hosts; None when it asks for help.

    Raises:
      UserError: it is wrong, or cannot be launched there.
    """
    verb = job.words[0]
    try:
        parsed = parse(job.words)
    except UserError as error:
        raise UserError(f"after --: {error}") from None
    if parsed is None:
        return None
    if verb not in runnable:
        raise UserError(f"meshway {verb} runs in one process: start it without `launch` (what may come after --: "
                        f"{', '.join(runnable)})")  # fmt: skip
    ranks = {"coordinator_address", "num_processes", "process_id"} if name != "worker" else set()
    devices = {"simulated_devices"} if "devices" in vars(place) and not KINDS[name].renders else set()
    for key in sorted(ranks | devices):
        if getattr(parsed, key) is not None:
            instead = "use --devices=N before --" if key in devices else "the launcher gives it to each process"
            raise UserError(f"after --: leave out --{key}: {instead}")
    values = [binding.partition("=")[2].strip("'\"") for binding in parsed.bindings if binding.startswith("MODEL_DIR=")]
    for value in values[-1:]:
        check_model_dir(value, place)
    return parsed


def check_model_dir(value: str, place: Any) -> None:
    """Raises UserError for a run directory that the hosts of a place cannot share, or that goes with them."""
    if not place.shared_directory:
        return
    shared = "a folder on a file system that all hosts mount, by its full path"
    local_path(value)
    if not value.startswith(("/", "~", "%", "@")):
        raise UserError(f"--gin.MODEL_DIR={value} would be another folder on each host: give {shared}")
    if re.match(r"/(tmp|var/tmp|dev/shm)(/|$)", value):
        raise UserError(f"--gin.MODEL_DIR={value} is each host's own: give {shared}")
    mounts = getattr(place, "mounts", None)
    if mounts is None or value.startswith(("%", "@")):
        return
    if not any(PurePosixPath(value).is_relative_to(path) for path in mounts):
        there = f"; mounted are {', '.join(mounts)}" if mounts else ""
        raise UserError(
            f"--gin.MODEL_DIR={value} is in no volume that the pods mount, and would be lost with them: mount one "
            f"there by --volume=CLAIM:{PurePosixPath(value).parent}{there}"
        )


def _refuse(name: str, word: str, separated: bool) -> NoReturn:
    """Raises UserError for a word that this kind does not take."""
    if not word.startswith("-"):
        hint = "" if separated else "; the command to run comes after --"
        raise UserError(f"meshway launch {name} takes no argument {word!r}{hint}")
    key = word.partition("=")[0]
    if key.startswith(("--gin.", "--gin_")):
        raise UserError(f"{key} belongs to the command to run, after --: meshway launch {name} ... -- train {word}")
    others = {f"meshway launch {other}": kind.flags for other, kind in KINDS.items() if other != name}
    refuse_unknown(key, f"meshway launch {name}", KINDS[name].flags, others)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the words before `--`, and those of the kinds by name."""
    parser = Parser(
        prog="meshway launch",
        usage="meshway launch KIND [options] -- VERB ...",
        description="Runs a command on many processes.",
        epilog=_overview(),
    )
    listed = parser.add_subparsers(prog="meshway launch", help=argparse.SUPPRESS, parser_class=Parser)
    children: dict[str, Parser] = {}
    for name, kind in KINDS.items():
        needed = [each.usage for each in kind.flags if each.is_required]
        children[name] = listed.add_parser(
            name,
            usage=" ".join(["meshway launch", name, *needed, "[options] -- VERB ..."]),
            description=f"{sentence(kind.help)}\nThe command after -- is checked before anything starts.",
            epilog="\n".join(["examples:", *(f"  {_folded(example)}" for example in kind.examples)]),
        )
        add_flags(children[name], kind.flags)
    return parser, children


def _folded(example: str) -> str:
    lines = textwrap.wrap(example, 96, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * 6)
    return " \\\n".join(lines)


def _overview() -> str:
    """Returns the kinds and an example of each, for the help of `meshway launch`."""
    lines = []
    for heading, renders in (("kinds that run it", False), ("kinds that write a job file", True)):
        lines += [f"{heading}:", *(f"  {name:10}{k.help}" for name, k in KINDS.items() if k.renders == renders), ""]
    lines += ["examples:", *(f"  {_folded(kind.examples[0])}" for kind in KINDS.values()), ""]
    lines += ["The command after -- is checked here, so that a typing error costs no place in a queue."]
    lines += ["`meshway launch KIND --help` lists a kind's options."]
    return "\n".join(lines)
