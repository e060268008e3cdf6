"""What loggers to services of others share: which steps are still to be given, and which run of theirs goes on."""

import ast
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.files import io_errors, replace_file
from meshway.framework.interfaces import Attempt

Values = Mapping[str, Mapping[str, Any]]
_STATE = "trackers.json"


class Tracker:
    """What trackers share: which steps are still to be given, and the id of their run.

    Values besides numbers wait for the report of their step: steps never fall. What is refused once training has begun,
    because a server is down, is said once, kept, and given again with the next report: training goes on.
    """

    kind = ""
    extra = ""  # of setup.py; "" where nothing more needs to be installed
    module = ""

    def __init__(self) -> None:
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            raise UserError(
                f"{type(self).__name__} needs the package {self.module}: pip install 'meshway[{self.extra}]', or leave "
                "it out of `loggers`"
            )
        self._after, self._values, self._open = -1, dict[int, Values](), False
        self._waiting: list[tuple[int, Mapping[str, float], Values]] = []
        self._warned = False

    def begin(self, attempt: Attempt) -> None:
        """Opens the run, or goes on with the one of earlier attempts; called once, before anything is written.

        Raises:
          UserError: it refuses; the message has its own words.
        """
        key = f"{self.kind}-evaluations" if attempt.evaluation else self.kind
        state = _read(attempt.directory / _STATE)
        recipe = hashlib.sha256(attempt.recipe.encode()).hexdigest()[:16]
        before = state.get(key, {})
        # An attempt without a checkpoint begins at 0; under another recipe it is another run.
        known = before if attempt.start or attempt.evaluation or before.get("recipe") == recipe else {}
        reported = max(known.get("reported", -1), attempt.reported) if known else -1
        self._after = -1 if attempt.evaluation else reported
        with _explained(type(self).__name__):
            run_id = self._begin(attempt, known.get("id"))
        self._open = True
        entry = {"id": run_id, "recipe": recipe, "reported": reported}
        path = attempt.directory / _STATE
        with io_errors(path):
            replace_file(path, json.dumps(_read(path) | {key: entry}, indent=1).encode() + b"\n")
        if known and not attempt.evaluation:
            self._repeat(attempt)

    def _repeat(self, attempt: Attempt) -> None:
        """Gives reports up to the checkpoint which metrics.jsonl has and the service lacks, as after a crash."""
        last = self._last_step(attempt)
        if last is None:
            return
        self._after = last
        path = attempt.directory / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for record in (json.loads(line) for line in lines if line):
            if record["step"] <= attempt.start:
                scalars = {name: value for name, value in record.items() if isinstance(value, float) and name != "step"}
                self._give(record["step"], scalars, {})

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Gives the scalars of a step, with the values that wait for it."""
        for earlier in sorted(at for at in self._values if at < step):
            self._give(earlier, {}, self._values.pop(earlier))
        self._give(step, scalars, self._values.pop(step, {}))

    def write_values(self, step: int, values: Values) -> None:
        """Keeps texts, images, sounds and histograms until the report of their step."""
        self._values[step] = {**self._values.get(step, {}), **values}

    def close(self) -> None:
        """Gives what waits and ends this attempt at the run; says how many reports could not be given."""
        if not self._open:
            return
        for step in sorted(self._values):
            self._give(step, {}, self._values.pop(step))
        self._open = False
        try:
            self._end()
        except Exception as error:
            self._warn(f"it could not be closed: {_said(error)}")
        if self._waiting:
            steps = f"steps {self._waiting[0][0]} to {self._waiting[-1][0]}"
            self._warn(f"{len(self._waiting)} reports, {steps}, were not taken; metrics.jsonl has them")

    def _give(self, step: int, scalars: Mapping[str, float], values: Values) -> None:
        if step <= self._after or not self._open:
            return
        self._waiting.append((step, scalars, values))
        try:
            while self._waiting:
                self._log(*self._waiting[0])
                del self._waiting[0]
        except Exception as error:
            if not self._warned:
                self._warn(f"{_said(error)}; reports are kept and given later")
            self._warned = True

    def _warn(self, text: str) -> None:
        print(f"{type(self).__name__}: {text}", file=sys.stderr, flush=True)

    def _begin(self, attempt: Attempt, run_id: str | None) -> str:
        """Opens the run of this id, or a new one; returns its id."""
        raise NotImplementedError

    def _last_step(self, attempt: Attempt) -> int | None:
        """Returns the last step that the run of earlier attempts kept, -1 for none; None where all that was given is
        kept at once."""
        return None

    def _log(self, step: int, scalars: Mapping[str, float], values: Values) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


def hyperparameters(recipe: str) -> dict[str, Any]:
    """Returns the macros and bindings of a resolved recipe: numbers, texts and truths as such, the rest as written."""
    found: dict[str, Any] = {}
    for line in re.sub(r"\\\n\s*", "", recipe).splitlines():
        if match := re.match(r"([A-Za-z_][\w./]*) = (.+)$", line):
            value: Any = match[2]
            with suppress(ValueError, SyntaxError):
                literal = ast.literal_eval(match[2])
                value = literal if isinstance(literal, (str, int, float, bool)) else match[2]
            found[match[1]] = value
    return found


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what a library raises into one message: the network, a key, a run that was removed."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:
        raise UserError(f"{name} refused: {_said(error)}; mend it, or leave it out of `loggers`") from error


def _said(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it to report to new runs") from error
