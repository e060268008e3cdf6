"""The first meeting of a run's processes, before jax joins them.

jax aborts the program when process 0 does not answer, when a process is counted twice or not at all. Here each comes to
process 0 with a card of who it is, on the port that jax's coordinator takes afterwards, and all get the same answer.
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
_ANSWER_SECONDS = 2.0  # for one line over a connection that is there
_RETRY_SECONDS = 0.3
_LATE_SECONDS = 5.0
_SAY_SECONDS = 20.0  # between lines that say who is awaited


@dataclasses.dataclass(frozen=True)
class Card:
    """What a process says of itself."""

    process_id: int
    num_processes: int
    host: str
    version: str

    def line(self) -> bytes:
        """Returns it as one line of JSON."""
        return (json.dumps({"magic": _MAGIC, **dataclasses.asdict(self)}) + "\n").encode()


def meet(address: str, card: Card, seconds: float) -> None:
    """Returns once all processes have come to process 0 and agree on who they are.

    Args:
      address: host:port of process 0, where it listens for the time of the call.
      card: this process.
      seconds: how long to wait.

    Raises:
      UserError: two processes are the same one, their counts differ, or their versions of meshway.
      EnvironmentFailure: processes did not come in time, process 0 does not answer, or the port is taken.
    """
    if card.process_id == 0:
        _Host(address, card, seconds).gather()
    else:
        _visit(address, card, seconds)


class _Host:
    """Process 0's side."""

    def __init__(self, address: str, card: Card, seconds: float) -> None:
        self._card, self._seconds, self._address = card, seconds, address
        self._server = _listen(address)
        self._visitors: dict[int, tuple[Card, socket.socket]] = {}

    def gather(self) -> None:
        """Waits for all, answers all, and leaves the port."""
        kind, problem = "environment", ""
        try:
            kind, problem = self._await_all()
        finally:
            answer = (json.dumps({"magic": _MAGIC, "kind": kind, "problem": problem}) + "\n").encode()
            for _, connection in self._visitors.values():
                _send_and_close(connection, answer)
            if kind == "user":
                self._tell_late_comers(answer)
            self._server.close()
        if problem:
            _fail(kind, problem)

    def _tell_late_comers(self, answer: bytes) -> None:
        """Those that come a little later would else look for process 0 until their deadline."""
        end = time.monotonic() + _LATE_SECONDS
        awaited = self._card.num_processes - 1 - len(self._visitors)
        while awaited > 0 and time.monotonic() < end:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            awaited -= _read_card(connection) is not None
            _send_and_close(connection, answer)

    def _await_all(self) -> tuple[str, str]:
        """Returns the kind of problem and its message; an empty message when all have come."""
        begin = time.monotonic()
        said = begin
        while len(self._visitors) < self._card.num_processes - 1 or self._forget_the_ended():
            now = time.monotonic()
            missing = set(range(1, self._card.num_processes)) - self._visitors.keys()
            awaited = named(missing, self._card.num_processes)
            if now - begin > self._seconds:
                return "environment", f"{awaited} did not come to process 0 at {self._address} in {self._seconds:g} s"
            if now - said > _SAY_SECONDS:
                print(f"meshway: waiting for {awaited} at {self._address}", file=sys.stderr, flush=True)
                said = now
            if problem := self._receive():
                return "user", problem
        return "", ""

    def _forget_the_ended(self) -> bool:
        """Leaves out the visitors that have gone again; returns whether there were any."""
        ended = [process for process, (_, connection) in self._visitors.items() if not _is_open(connection)]
        for process in ended:
            self._visitors.pop(process)[1].close()
        return bool(ended)

    def _receive(self) -> str:
        """Takes one visitor, if one comes; returns what is wrong with it."""
        self._server.settimeout(_RETRY_SECONDS)
        try:
            connection, _ = self._server.accept()
        except TimeoutError:
            return ""
        card = _read_card(connection)
        if card is None:
            connection.close()
            return ""
        before = self._visitors.get(card.process_id)
        self._visitors[card.process_id] = (card, connection)
        if before is not None:
            before_card, before_connection = before
            if _is_open(before_connection):
                self._visitors[-1] = before  # it gets the answer as well
                return (
                    f"two processes were started as --process_id={card.process_id}, on {before_card.host} and on "
                    f"{card.host}; give each a number of its own"
                )
            before_connection.close()  # it was ended, and started again meanwhile
        return self._differences(card)

    def _differences(self, card: Card) -> str:
        who = f"process {card.process_id} (on {card.host})"
        if card.num_processes != self._card.num_processes:
            return (
                f"{who} was started with --num_processes={card.num_processes}, process 0 (on {self._card.host}) with "
                f"--num_processes={self._card.num_processes}; give all the same"
            )
        if card.version != self._card.version:
            return f"{who} has meshway {card.version}, process 0 {self._card.version}; install one version everywhere"
        return ""


def _visit(address: str, card: Card, seconds: float) -> None:
    """The others' side: tries until process 0 is there, then waits for its answer."""
    host, port = split_address(address)
    end = time.monotonic() + seconds
    last = "nothing was tried"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
                connection.sendall(card.line())
                connection.settimeout(end - time.monotonic() + 2 * _ANSWER_SECONDS)  # process 0 says who is late
                answer = _read_line(connection)
            if answer is not None and answer.get("magic") == _MAGIC:
                if answer["problem"]:
                    _fail(answer["kind"], answer["problem"])
                return
            last = "what answers there is no meshway process 0 that waits for others"
        except OSError as error:
            last = error.strerror or str(error)
        time.sleep(_RETRY_SECONDS)
    raise EnvironmentFailure(
        f"process {card.process_id} of {card.num_processes}: process 0 does not answer at {address} in {seconds:g} s "
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


def _read_card(connection: socket.socket) -> Card | None:
    """Returns the card; None for what is none, such as a port scanner."""
    connection.settimeout(_ANSWER_SECONDS)
    said = _read_line(connection)
    fields = {field.name for field in dataclasses.fields(Card)}
    if said is None or said.get("magic") != _MAGIC or not fields <= said.keys():
        return None
    return Card(**{name: said[name] for name in fields})


def _read_line(connection: socket.socket) -> dict | None:
    try:
        with connection.makefile("rb") as lines:
            said = json.loads(lines.readline(4096))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end still waits."""
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
        pass  # that process has ended: jax's own start will miss it
    connection.close()
