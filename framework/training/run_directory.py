"""The run directory: what lies where in MODEL_DIR, and whether it can be written."""

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from meshway.framework.data.vocabularies import FRAMING
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import holder_of, in_bucket, io_errors, is_disk_trouble, locked, replace_file
from meshway.framework.partitioning.sharded_model import Row, format_rows, replicated_share
from meshway.framework.planning.memory import Memory
from meshway.framework.terminal import format_bytes
from meshway.framework.training.program import TrainProgram


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths inside MODEL_DIR: a contract that scripts rely on."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """One folder a step."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a report."""
        return self.root / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        """Where the time went, attempt by attempt."""
        return self.root / "timeline.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def vocabularies(self) -> Path:
        """The vocabularies of the task's features, as files; `vocabularies.json` beside it lists them."""
        return self.root / "vocabularies"

    @property
    def evaluations(self) -> Path:
        """One file a task, of one JSON object a step: metrics, and some predictions."""
        return self.root / "eval"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here; `meshway status` reads who that is."""
        return self.root / ".lock"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other trainings out for the time of a `with` block; one that is refused in it before it wrote anything
        leaves no folder behind.

        Raises:
          UserError: another process trains here, or the directory cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                if not self.root.exists():
                    stack.push(_remove_refused(self.root))
                self.root.mkdir(parents=True, exist_ok=True)
                alone = stack.enter_context(locked(self.lock))
            except OSError as error:
                raise self._refused(error) from error
            if not alone:
                raise UserError(
                    f"MODEL_DIR={str(self.root)!r} is being trained by {holder_of(self.lock) or 'another process'}: "
                    "wait for it, stop it, or give another folder: --gin.MODEL_DIR=..."
                )
            stack.push(_remove_refused(self.checkpoints))
            yield

    def _refused(self, error: OSError) -> UserError | EnvironmentFailure:
        at = f" ({error.filename})" if error.filename else ""
        said = f"MODEL_DIR={str(self.root)!r} cannot be written: {error.strerror or error}{at}; "
        if is_disk_trouble(error):
            return EnvironmentFailure(f"{said}make room there, and run it again")
        return UserError(f"{said}give a folder you may write to: --gin.MODEL_DIR=...")

    def prepare(self, rows: Sequence[Row]) -> None:
        """Makes the directory and tries to write in it, before anything costly.

        Args:
          rows: `TrainProgram.explain()`: what a checkpoint will hold, besides rows of the batch.

        Raises:
          UserError: it cannot be made or written, or the disk has less room than one checkpoint needs.
          EnvironmentFailure: the disk is full already.
        """
        probe = self.root / ".probe"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"meshway")
            probe.unlink()
            self._check_room(self.root, rows)
        except OSError as error:
            raise self._refused(error) from error

    def check(self, rows: Sequence[Row]) -> None:
        """Says beforehand what `prepare` would, as far as that can be told without writing; raises as it does."""
        if in_bucket(self.root):
            self.root.exists()  # raises where the bucket is missing or forbidden
            return
        there = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        try:
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.root))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
            self._check_room(there, rows)
        except OSError as error:
            raise self._refused(error) from error

    def _check_room(self, folder: Path, rows: Sequence[Row]) -> None:
        if in_bucket(folder):
            return  # buckets do not fill up
        needed_bytes = sum(row.total_bytes for row in rows if not row.name.startswith("batch"))
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise UserError(
                f"the disk of MODEL_DIR={str(self.root)!r} has {format_bytes(free)} free, and one checkpoint needs "
                f"{format_bytes(needed_bytes)}; free some space or give another --gin.MODEL_DIR=..."
            )

    def save_vocabularies(self, vocabularies: Mapping[str, Vocabulary], framing: Framing | None = None) -> None:
        """Writes `vocabularies/FEATURE.*`, then `vocabularies.json`, which tells their kinds and fingerprints.

        Args:
          vocabularies: by feature.
          framing: what stands around text, where there is any.

        Raises:
          UserError: the disk refuses.
        """
        for feature, vocabulary in vocabularies.items():
            vocabulary.save(self.vocabularies, feature)
        entries = {
            feature: {"kind": each.kind, "fingerprint": each.fingerprint, "description": str(each)}
            for feature, each in vocabularies.items()
        }
        index: dict[str, Any] = {"python": platform.python_version(), "features": entries}
        if framing is not None:
            index |= {"start": list(framing.start), "stop": list(framing.stop)}
            index |= {} if framing.append_eos is None else {"append_eos": framing.append_eos}
        self._write("vocabularies.json", json.dumps(index, indent=1) + "\n")

    def save_framing(self, framing: Framing) -> None:
        """Writes `framing.json`: what stands around the token ids of a run without vocabularies.

        Raises:
          UserError: the disk refuses.
        """
        said = {"start": list(framing.start), "append_eos": framing.append_eos, "stop": list(framing.stop)}
        self._write(FRAMING, json.dumps(said, indent=1) + "\n")

    def check_vocabularies(self, vocabularies: Mapping[str, Vocabulary], framing: Framing | None = None) -> None:
        """Compares the data's vocabularies, by task feature, and its start, with those of this run.

        Features that only one side has are not compared: a recipe may read other features than before.

        Raises:
          UserError: a feature's vocabulary or the start is another one, or `vocabularies.json` cannot be read.
        """
        path = self.root / "vocabularies.json"
        try:
            index = json.loads(path.read_text("utf-8"))
            before = {
                feature: (entry["fingerprint"], entry["description"]) for feature, entry in index["features"].items()
            }
            python, start = index["python"], index.get("start", [0])  # older versions wrote none, and had 0
        except FileNotFoundError:
            return  # a run of an earlier version: there is nothing to compare with
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {error}; remove it to go on without this check") from error
        for feature, vocabulary in vocabularies.items():
            fingerprint, description = before.get(feature, (vocabulary.fingerprint, ""))
            if fingerprint not in (vocabulary.fingerprint, vocabulary.former):
                raise UserError(
                    f"feature {feature!r}: this run has been trained with a {description}, and its task now has a "
                    f"{vocabulary}: the same ids mean other text. Give the task the run's own vocabulary, "
                    f"{self.vocabularies / feature}.*, or take another MODEL_DIR. (One that is trained on this "
                    "machine differs with the text it finds there, that of pydocs with the version of Python: "
                    f"{python} then, {platform.python_version()} now.)"
                )
        if framing is not None and "targets" in before and start != list(framing.start):
            raise UserError(
                f"this run's decoder has been trained to start from {start}, and its data now starts it from "
                f"{list(framing.start)}: bind the data's `start` to {start} (CachedData.start, SeqioData.start), or "
                "take another MODEL_DIR"
            )

    def describe(self, config: str, rows: Sequence[Row], summary: str) -> None:
        """Writes `config.gin` (the resolved recipe), `model_info.txt` and `layout.json`."""
        self._write("config.gin", config)
        self._write("model_info.txt", f"{summary}\n\n{format_rows(rows)}\n")
        self._write("layout.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")

    def config(self) -> str:
        """Returns the resolved recipe of the run's last attempt; "" where there is none."""
        path = self.root / "config.gin"
        with io_errors(path):
            return path.read_text("utf-8") if path.exists() else ""

    def _write(self, name: str, text: str) -> None:
        with io_errors(self.root / name):
            replace_file(self.root / name, text.encode())


def summarize(program: TrainProgram, rows: Sequence[Row], memory: Memory | None = None) -> str:
    """Returns the lines beside a layout table: parameters, mesh, FLOPs of a step, bytes per device by kind, those of
    activations too where `memory` is given."""
    kinds: dict[str, int] = {}
    for row in rows:
        kind = row.name.split("/")[0]
        kinds[kind] = kinds.get(kind, 0) + row.bytes_per_device
    params, optimizer = kinds.get("params", 0), kinds.get("opt_state", 0) + kinds.get("average", 0)
    gradients = params if memory is None else memory.gradients
    others = "activations are not counted"
    if memory is not None:
        others = f"activations {format_bytes(memory.activations)}; in all {format_bytes(memory.total)}"
    state = [row for row in rows if not row.name.startswith("batch")]
    mesh = ", ".join(f"{name}={size}" for name, size in program.partitioner.mesh.shape.items())
    return "\n".join(
        [
            f"parameters: {program.num_params:,}",
            f"mesh: {mesh} ({program.partitioner.mesh.size} of {jax.device_count()} devices)",
            f"model FLOPs per step: {program.flops:.4g}",
            f"bytes per device: parameters {format_bytes(params)}, "
            f"optimizer {format_bytes(optimizer)}, gradients {format_bytes(gradients)}, "
            f"batch {format_bytes(kinds.get('batch', 0))}; {others}",
            f"replicated on every device: {100 * replicated_share(state):.1f} % of the state's bytes on a device",
        ]
    )


def _remove_refused(folder: Path) -> Callable[[type[BaseException] | None, BaseException | None, object], None]:
    """Returns what removes an empty folder where a user's mistake ends a `with` block."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError):
            with contextlib.suppress(OSError):  # something is in it, or it is not there
                folder.rmdir()

    return leave
