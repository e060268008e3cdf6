"""meshway status: the state of a run, from what it has written. Reads files alone: no JAX, no recipe, within a moment.

meshway status runs/mine
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshway.framework.errors import UserError
from meshway.framework.evaluation.records import Records, complete_steps
from meshway.framework.files import Holder, holder_of, no_directory, open_path
from meshway.framework.telemetry.timeline import Goodput, goodput, in_one_line, read_goodput
from meshway.framework.telemetry.writers import strict
from meshway.framework.terminal import format_duration

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation


@dataclasses.dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
      model_dir: the run directory.
      holder: who trains it now; None for nobody.
      step, total: the last step that was reported, and the one at which it ends; None where nothing tells. A run that
        ended without a word goes on from the last of `checkpoints`.
      steps_per_second: of the last report.
      checkpoints: steps of complete checkpoints.
      evaluations: task -> (step, metrics) of its last evaluation.
      goodput: where the time went.
    """

    model_dir: Path
    holder: Holder | None
    step: int | None
    total: int | None
    steps_per_second: float | None
    checkpoints: list[int]
    evaluations: dict[str, tuple[int, dict[str, float]]]
    goodput: Goodput

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step at the last rate; None where nobody works on it or nothing tells."""
        if self.holder is None or not self.steps_per_second or self.step is None or self.total is None:
            return None
        return (self.total - self.step) / self.steps_per_second

    def as_json(self) -> dict[str, Any]:
        """Returns it as strict JSON holds it: what is not finite is null, and told by the key `nonfinite`."""
        found = {
            "model_dir": str(self.model_dir),
            "running": None if self.holder is None else dataclasses.asdict(self.holder),
            "step": self.step,
            "total": self.total,
            "steps_per_second": self.steps_per_second,
            "eta_seconds": self.eta_seconds,
            "saved_step": self.checkpoints[-1] if self.checkpoints else None,
            "checkpoints": self.checkpoints,
            "evaluations": {task: {"step": step, **metrics} for task, (step, metrics) in self.evaluations.items()},
            "goodput": self.goodput.shares,
            "attempts": len(self.goodput.attempts),
        }
        return strict(found)


def read_status(model_dir: Path) -> Status:
    """Reads the state of a run.

    Raises:
      UserError: there is no run.
    """
    if not model_dir.is_dir():
        raise UserError(f"{model_dir}: {no_directory(model_dir)}")
    if not any((model_dir / name).exists() for name in ("metrics.jsonl", "timeline.jsonl", "checkpoints", ".lock")):
        raise UserError(f"{model_dir} is not a run directory: it holds no metrics.jsonl, timeline.jsonl or checkpoints")
    last = _last_line(model_dir / "metrics.jsonl")
    timeline = model_dir / "timeline.jsonl"
    seconds = last.get("step_seconds")
    evaluations = {}
    for path in sorted((model_dir / "eval").glob("*.jsonl")):
        if records := Records(path.parent).read(path.stem):
            step = max(records)
            evaluations[path.stem] = (step, records[step].get("metrics", {}))
    return Status(
        model_dir,
        holder_of(model_dir / ".lock"),
        last.get("step"),
        _total(model_dir / "config.gin"),
        1 / seconds if isinstance(seconds, (int, float)) and seconds > 0 else None,
        complete_steps(model_dir / "checkpoints"),
        evaluations,
        read_goodput(timeline) if timeline.exists() else goodput([]),
    )


def text_of(status: Status) -> str:
    """Returns it for a terminal."""
    of = "" if status.total is None else f" of {status.total:,}"
    lines = [f"{status.model_dir}: {'nobody works on it' if status.holder is None else status.holder}"]
    saved = f"{status.checkpoints[-1]:,} saved" if status.checkpoints else "none saved"
    if status.step is not None:
        rate = "" if not status.steps_per_second else f", {status.steps_per_second:.3g} steps/s"
        eta = "" if status.eta_seconds is None else f", {format_duration(status.eta_seconds)} to go"
        lines.append(f"step {status.step:,}{of} reported, {saved}{rate}{eta}")
    else:
        lines.append(f"no step reported, {saved}{of}")
    for task, (step, metrics) in status.evaluations.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))
        lines.append(f"last evaluation of {task}: step {step:,}: {shown}")
    if status.goodput.attempts:
        lines.append(in_one_line(status.goodput))
    return "\n".join(lines)


def _last_line(path: Path) -> dict[str, Any]:
    """Returns the last whole object of a JSON-lines file, {} for none."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _total(config: Path) -> int | None:
    """Returns TRAIN_STEPS of a resolved recipe; None where it is not there."""
    found = re.search(r"^TRAIN_STEPS = (\d+)$", config.read_text("utf-8"), re.MULTILINE) if config.is_file() else None
    return None if found is None else int(found[1])


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    status = read_status(open_path(invocation.options.model_dir))
    print(json.dumps(status.as_json()) if invocation.options.json else text_of(status))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["status", *sys.argv[1:]]))
