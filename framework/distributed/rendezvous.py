"""A check of a run's processes before jax joins them.

jax aborts the program if process 0 does not answer, or if a process is missing or started twice. Here each process
first connects to process 0 and sends its `ProcessInfo`, on the port that jax's coordinator uses afterwards, and all get
the same answer.
"""

import dataclasses
import json
import socket
import sys
import time
from typing import NoReturn

from meshway.framework.distributed.barrier import named
from meshway.framework.distributed.cluster import split_address
from meshway.framework.errors import EnvironmentFailure, UserError

_MAGIC = "meshway 1"
_ANSWER_SECONDS = 2.0  # for one line over an open connection
_RETRY_SECONDS = 0.3
_LATE_SECONDS = 5.0
_NOTE_SECONDS = 20.0  # between messages about missing processes


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """What a process sends about itself."""

    process_id: int
    num_processes: int
    host: str
    version: str

    def line(self) -> bytes:
        """Returns it as one line of JSON."""
        return (json.dumps({"magic": _MAGIC, **dataclasses.asdict(self)}) + "\n").encode()


def meet(address: str, info: ProcessInfo, seconds: float) -> None:
    """Returns once all processes have connected to process 0 and their numbers and versions agree.

    Args:
      address: host:port of process 0, where it listens during the call.
      info: this process.
      seconds: how long to wait.

    Raises:
      UserError: two processes have the same number, or the processes' counts or versions of meshway differ.
      EnvironmentFailure: processes did not connect in time, process 0 does not answer, or the port is taken.
    """
    if info.process_id == 0:
        _Host(address, info, seconds).gather()
    else:
        _visit(address, info, seconds)


class _Host:
    """The side of process 0."""

    def __init__(self, address: str, info: ProcessInfo, seconds: float) -> None:
        self._info, self._seconds, self._address = info, seconds, address
        self._server = _listen(address)
        self._visitors: dict[int, tuple[ProcessInfo, socket.socket]] = {}

    def gather(self) -> None:
        """Waits for all, answers all, and closes the port."""
        kind, problem = "environment", ""
        try:
            kind, problem = self._await_all()
        finally:
            answer = (json.dumps({"magic": _MAGIC, "kind": kind, "problem": problem}) + "\n").encode()
            for _, connection in self._visitors.values():
                _send_and_close(connection, answer)
            if kind == "user":
                self._answer_late(answer)
            self._server.close()
        if problem:
            _fail(kind, problem)

    def _answer_late(self, answer: bytes) -> None:
        """Answers processes that connect a little later, which would otherwise retry until their deadline."""
        end = time.monotonic() + _LATE_SECONDS
        awaited = self._info.num_processes - 1 - len(self._visitors)
        while awaited > 0 and time.monotonic() < end:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            awaited -= _read_info(connection) is not None
            _send_and_close(connection, answer)

    def _await_all(self) -> tuple[str, str]:
        """Returns the kind of problem and its message; an empty message when all have connected."""
        begin = noted = time.monotonic()
        while len(self._visitors) < self._info.num_processes - 1 or self._drop_ended():
            now = time.monotonic()
            missing = set(range(1, self._info.num_processes)) - self._visitors.keys()
            awaited = named(missing, self._info.num_processes)
            if now - begin > self._seconds:
                return "environment", f"{awaited} did not reach process 0 at {self._address} in {self._seconds:g} s"
            if now - noted > _NOTE_SECONDS:
                print(f"meshway: waiting for {awaited} at {self._address}", file=sys.stderr, flush=True)
                noted = now
            if problem := self._receive():
                return "user", problem
        return "", ""

    def _drop_ended(self) -> bool:
        """Removes the processes that have closed their connection; returns whether there were any."""
        ended = [process for process, (_, connection) in self._visitors.items() if not _is_open(connection)]
        for process in ended:
            self._visitors.pop(process)[1].close()
        return bool(ended)

    def _receive(self) -> str:
        """Accepts one process, if one connects; returns what is wrong with it, "" for nothing."""
        self._server.settimeout(_RETRY_SECONDS)
        try:
            connection, _ = self._server.accept()
        except TimeoutError:
            return ""
        info = _read_info(connection)
        if info is None:
            connection.close()
            return ""
        before = self._visitors.get(info.process_id)
        self._visitors[info.process_id] = (info, connection)
        if before is not None:
            before_info, before_connection = before
            if _is_open(before_connection):
                self._visitors[-1] = before  # to be answered as well
                return (
                    f"two processes were started as --process_id={info.process_id}, on {before_info.host} and on "
                    f"{info.host}; give each a number of its own"
                )
            before_connection.close()  # it ended and was started again meanwhile
        return self._differences(info)

    def _differences(self, info: ProcessInfo) -> str:
        who = f"process {info.process_id} (on {info.host})"
        if info.num_processes != self._info.num_processes:
            return (
                f"{who} was started with --num_processes={info.num_processes}, process 0 (on {self._info.host}) with "
                f"--num_processes={self._info.num_processes}; give all the same"
            )
        if info.version != self._info.version:
            return f"{who} has meshway {info.version}, process 0 {self._info.version}; install one version everywhere"
        return ""


def _visit(address: str, info: ProcessInfo, seconds: float) -> None:
    """The side of the other processes: tries until process 0 listens, then waits for its answer."""
    host, port = split_address(address)
    end = time.monotonic() + seconds
    last = "no attempt was made"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
                connection.sendall(info.line())
                connection.settimeout(end - time.monotonic() + 2 * _ANSWER_SECONDS)  # process 0 may wait that long
                answer = _read_line(connection)
            if answer is not None and answer.get("magic") == _MAGIC:
                if answer["problem"]:
                    _fail(answer["kind"], answer["problem"])
                return
            last = "a program that is not a waiting meshway process 0 answers there"
        except OSError as error:
            last = error.strerror or str(error)
        time.sleep(_RETRY_SECONDS)
    raise EnvironmentFailure(
        f"process {info.process_id} of {info.num_processes}: process 0 does not answer at {address} in {seconds:g} s "
        f"({last}); is it running, and is that its address?"
    )


def _fail(kind: str, problem: str) -> NoReturn:
    raise UserError(problem) if kind == "user" else EnvironmentFailure(problem)


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        if host in ("localhost", "127.0.0.1"):
            return socket.create_server(("127.0.0.1", port), backlog=128)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise EnvironmentFailure(
            f"process 0 cannot listen on port {port} of {address}: {error.strerror or error}; give another port"
        ) from error


def _read_info(connection: socket.socket) -> ProcessInfo | None:
    """Returns what a process sent; None for anything else, such as a port scanner."""
    connection.settimeout(_ANSWER_SECONDS)
    line = _read_line(connection)
    fields = {field.name for field in dataclasses.fields(ProcessInfo)}
    if line is None or line.get("magic") != _MAGIC or not fields <= line.keys():
        return None
    return ProcessInfo(**{name: line[name] for name in fields})


def _read_line(connection: socket.socket) -> dict | None:
    try:
        with connection.makefile("rb") as lines:
            line = json.loads(lines.readline(4096))
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) else None


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end is still connected."""
    connection.settimeout(0.05)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def _send_and_close(connection: socket.socket, answer: bytes) -> None:
    try:
        connection.settimeout(_ANSWER_SECONDS)
        connection.sendall(answer)
    except OSError:
        pass  # that process has ended: `jax.distributed.initialize` will report it
    connection.close()
