"""What is launched, wherever it is launched, and text of job files."""

import abc
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from meshway.framework.errors import UserError
from meshway.launch.flags import flag

END_WITH_STARTER = "--end_with_starter"  # the first word of such a command
PORT = 8476  # where process 0 listens, where the place itself names no port
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def quoted(word: str) -> str:
    """Returns a word as a shell reads it back, in double quotes where those are easier on the eye."""
    plain = "'" not in word or any(mark in word for mark in '"$`\\!')
    return shlex.quote(word) if plain else f'"{word}"'


def command(words: Sequence[str]) -> list[str]:
    """Returns the program that runs `meshway WORDS` as long as its starter lives, however that ends: its standard input
    is a pipe which the starter holds."""
    return [sys.executable, "-m", "meshway.launch.cli", END_WITH_STARTER, *words]


def variable(name: str, text: str) -> str:
    """Returns shell lines that set a variable to several lines of text, unchanged."""
    end = f"END_OF_{name}"
    while end in text.splitlines():
        end += "_"
    return f"IFS= read -r -d '' {name} << '{end}' || true\n{text}\n{end}\n"


@dataclasses.dataclass(frozen=True)
class Job:
    """One command to run, on every process of a run.

    Attributes:
      words: the words after `--`: a verb and its flags.
      name: what the cluster calls it.
      restarts: how often a failed process is started again.
      env: `KEY=VALUE`, set for every process.
      workdir: the folder to run in, on the hosts.
      setup: shell commands to run before, on every host.
      unchecked: whether the recipe is left to the hosts to read.
      needs: what must be there on every host, in words, for the head of a job file.

    Raises:
      UserError: a name that clusters refuse, or a variable that is not `KEY=VALUE`.
    """

    words: tuple[str, ...]
    name: str = flag("what the cluster calls the job (default: meshway)", "NAME", "meshway")
    restarts: int = flag("start a failed process again, at most N times (default: 0)", "N", 0, least=0)
    env: tuple[str, ...] = flag("a variable for every process, as XLA_FLAGS='...'; repeat for more", "KEY=VALUE", ())
    workdir: str | None = flag("the folder on the hosts to run in: paths of recipes are read from there", "DIR", None)
    setup: tuple[str, ...] = flag("a shell command to run before, on every host; repeat for more", "COMMAND", ())
    unchecked: bool = flag("do not read the recipe here: it, or what it imports, is on the hosts alone", default=False)
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name={self.name}: clusters take up to 40 lower-case letters, digits and dashes, "
                "from a letter on, without a dash at the end"
            )
        seen = set()
        for pair in self.env:
            key, equals, _ = pair.partition("=")
            if not (equals and _VARIABLE.fullmatch(key)):
                raise UserError(f"--env={pair}: write --env=KEY=VALUE")
            if key in seen:
                raise UserError(f"--env={key}=... is given twice")
            seen.add(key)

    @property
    def environment(self) -> dict[str, str]:
        """`env` as a mapping."""
        return dict(pair.split("=", 1) for pair in self.env)

    def comment(self) -> str:
        """Returns the lines of a comment at the head of a job file: the command, and what it needs."""
        needs = [" ".join(line.splitlines()) for line in self.needs]
        return "\n".join([f"# {self}", *(f"#   needs {line}" for line in needs)])

    def exports(self) -> list[str]:
        """Returns shell lines that set `env`."""
        return [f"export {key}={quoted(value)}" for key, value in self.environment.items()]

    def before(self) -> list[str]:
        """Returns the shell lines that come before the command on every host, `env` excepted."""
        return ([f"cd {quoted(self.workdir)}"] if self.workdir else []) + list(self.setup)

    def command(self, restarts: int | None = None, expanded: Sequence[str] = ()) -> str:
        """Returns the shell command of one host: a supervisor and what it runs.

        Args:
          restarts: as `restarts`, for a place that restarts by itself.
          expanded: further words as shell text, which the host's shell expands (`--process_id="$RANK"`).
        """
        supervisor = ["meshway", "launch", "worker", f"--restarts={self.restarts if restarts is None else restarts}"]
        return " ".join([*(quoted(word) for word in [*supervisor, "--", *self.words]), *expanded])

    def script(self, exports: bool = False, expanded: Sequence[str] = ()) -> str:
        """Returns the shell script of one host, which becomes the command.

        Args:
          exports: whether it sets `env`, for a place that does not.
          expanded: as of `command`.
        """
        before = [*(self.exports() if exports else ()), *self.before()]
        return "\n".join(["set -e", *before, f"exec {self.command(expanded=expanded)}"])

    def __str__(self) -> str:
        return " ".join(" ".join(quoted(word) for word in ["meshway", *self.words]).splitlines())  # for a comment


class Chips(NamedTuple):
    """The devices that a place is asked for.

    Attributes:
      devices: how many, over all hosts.
      hosts: on how many hosts, alike.
      words: the flags that ask for them.
    """

    devices: int
    hosts: int
    words: str


def tpu_chips(kind: str) -> int | None:
    """Returns the chips of a slice by its type, as v5p-128 (whose number counts cores, two a chip) or v6e-16; None for
    a type that is not known."""
    if found := re.fullmatch(r"v(\d+)([a-z]*)-(\d+)", kind):
        generation, variant, number = int(found[1]), found[2], int(found[3])
        if variant in ("e", "litepod"):
            return number
        if (generation, variant) in ((4, ""), (5, "p")) and number % 2 == 0:
            return number // 2
        if generation in (2, 3) and not variant:
            return number  # a core is a device
    return None


class Runner(Protocol):
    """A place where the job runs while `meshway launch` waits.

    Attributes:
      common: the fields of `Job` that are flags here.
    """

    common: ClassVar[tuple[str, ...]]

    @property
    def shared_directory(self) -> bool:
        """Whether MODEL_DIR must be a folder that several hosts see."""
        ...

    def run(self, job: Job) -> int:
        """Runs the job to its end; returns the exit code."""
        ...


class Renderer(abc.ABC):
    """A place that takes a file: the file is written here and submitted by the place's own client.

    Attributes:
      common: the fields of `Job` that are flags here.
      shared_directory: whether MODEL_DIR must be a folder that several hosts see.
      suffix: of the file's name.
    """

    common: ClassVar[tuple[str, ...]] = ("name", "restarts", "env", "workdir", "setup", "unchecked")
    shared_directory: ClassVar[bool] = True
    suffix: ClassVar[str]

    @property
    @abc.abstractmethod
    def chips(self) -> Chips | None:
        """The devices that are asked for; None where that is not told."""

    @abc.abstractmethod
    def render(self, job: Job) -> str:
        """Returns the text of the job file."""

    @abc.abstractmethod
    def submit(self, path: str) -> str:
        """Returns the command that submits the file at `path`."""


def yaml_text(document: dict[str, Any]) -> str:
    """Returns a document of dicts, lists, text, numbers and booleans as YAML; entries that are None are left out."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(_given(document), Dumper=Dumper, sort_keys=False, width=1000, allow_unicode=True)


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_given(inner) for inner in value]
    return value
