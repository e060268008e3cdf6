"""A Ray cluster: one actor a process, all of them started again together when one dies."""

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.launch.cluster import job as jobs
from meshway.launch.cluster.job import Job
from meshway.launch.flags import flag

_USER_ERROR = 2  # the exit code of a wrong command or recipe: another try would end the same
_LAST_WORDS_SECONDS = 5.0  # how long the others may still report why they end, after the first
_REACH_SECONDS = 10.0
_OBJECT_STORE_BYTES = 80 * 2**20  # nothing goes through it; the least that Ray takes


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """A Ray cluster, or this machine where no address is given.

    Raises:
      UserError: resources that are not `NAME=N`.
    """

    common: ClassVar[tuple[str, ...]] = ("restarts", "env", "workdir", "unchecked")

    processes: int = flag("how many processes run together, each in an actor", "N")
    devices: int | None = flag("CPU devices that each process simulates (default: the real devices)", "N", None)
    resources: tuple[str, ...] = flag("what a process takes, as TPU=4 or GPU=8; repeat for more", "NAME=N", ())
    address: str | None = flag("the cluster (default: RAY_ADDRESS, or a Ray of its own on this machine)", "HOST", None)
    wait: int = flag("seconds to wait for the resources (default: 60)", "S", 60)

    def __post_init__(self) -> None:
        for pair in self.resources:
            name, _, number = pair.partition("=")
            if not (name and number.isdecimal() and int(number)):
                raise UserError(f"--resources={pair}: write --resources=NAME=N, as TPU=4")

    @property
    def shared_directory(self) -> bool:
        """Whether several hosts may take part: not in a Ray that is started here."""
        return _named(self.address) is not None

    def run(self, job: Job) -> int:
        """Runs the job in `processes` actors; returns the exit code."""
        resources = {name: int(number) for name, number in (pair.split("=") for pair in self.resources)}
        return run_on_ray(
            job.words,
            self.processes,
            self.devices,
            job.restarts,
            resources,
            job.environment,
            job.workdir,
            self.address,
            self.wait,
        )


class Process:
    """An actor that runs one process of the run, so that the exit code is the program's own."""

    def __init__(self, workdir: str):
        self._workdir = workdir
        self._child: subprocess.Popen | None = None
        self._told = False

    def place(self) -> tuple[str, int, int]:
        """Returns (address of the node, a free port there, the actor's process id).

        Raises:
          FileNotFoundError: the node has no such folder as `workdir`.
        """
        import ray

        os.stat(self._workdir)
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1], os.getpid()

    def run(self, words: Sequence[str]) -> int:
        """Runs a command to its end; returns its exit code, or minus the signal that ended it."""
        self._child = subprocess.Popen(jobs.command(words), cwd=self._workdir, stdin=subprocess.PIPE)
        if self._told:
            self._child.terminate()
        return self._child.wait()

    def stop(self) -> None:
        """Tells the command to save and stop; runs beside `run`, in another thread of the actor."""
        self._told = True
        if self._child is not None:
            self._child.terminate()


def run_on_ray(
    words: Sequence[str],
    processes: int,
    devices: int | None = None,
    restarts: int = 0,
    resources: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    workdir: str | None = None,
    address: str | None = None,
    patience: float = 60.0,
) -> int:
    """Runs `meshway WORDS` in `processes` actors of one placement group.

    When an actor dies or fails, all are ended and started again, and go on from the last checkpoint. SIGTERM here is
    handed to them, so that they save; a second one ends them.

    Args:
      words: a verb and its flags.
      processes: how many actors.
      devices: CPU devices that each simulates; None for the real ones.
      restarts: how often all may be started again.
      resources: what each actor takes beside a CPU core, as {"TPU": 4}.
      environment: variables of the actors.
      workdir: the folder that they run in; by default this one.
      address: of the cluster; by default RAY_ADDRESS, or a Ray started on this machine and for this run.
      patience: seconds to wait for the resources.

    Returns:
      the exit code: that of the command, or 1 when the restarts are used up.

    Raises:
      UserError: Ray is not installed.
      EnvironmentFailure: the cluster cannot be reached or has not the resources.
    """
    from meshway.launch.cluster.supervisor import Notice  # imports jax, which `--help` must not

    ray = _connect(address, processes)
    variables = {"MESHWAY_CLUSTER": "none", **(environment or {})}  # the ranks are given, whatever the nodes are
    actor = ray.remote(runtime_env={"env_vars": variables}, max_restarts=0, max_concurrency=2)(Process)
    bundle = {"CPU": 1.0, **{name: float(number) for name, number in (resources or {}).items()}}
    try:
        with Notice() as notice:  # after Ray has set handlers of its own
            for attempt in range(restarts + 1):
                with _actors(actor, bundle, processes, workdir or os.getcwd(), patience) as actors:
                    code, cause = _run_once(actors, words, devices, notice)
                if not code or code == _USER_ERROR or notice.count:
                    return code or notice.code(stopped=0)
                left = restarts - attempt
                _say(f"{cause}; " + (f"starting all again, {left} left" if left else "no restarts are left"))
            return code
    finally:
        ray.shutdown()


def _connect(address: str | None, processes: int) -> Any:
    """Returns the ray module, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # actors without GPUs keep the variables they have
    address = _named(address)
    if address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray keeps one in the user's home
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # listens on 127.0.0.1 only, on Linux too
    try:
        import ray
    except ImportError:
        raise UserError("meshway launch ray needs Ray: pip install 'meshway[ray]'") from None
    if address is not None:
        _reach(address)
        try:
            ray.init(address=address)
        except Exception as error:  # whatever the client raises, it is about the cluster
            raise EnvironmentFailure(f"the Ray cluster at {address} cannot be joined: {_first_line(error)}") from error
        return ray
    ray.init(
        address="local",
        num_cpus=processes,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    return ray


def _named(address: str | None) -> str | None:
    """Returns the address of a cluster that runs already; None for a Ray of the run's own."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def _reach(address: str) -> None:
    """Raises EnvironmentFailure unless somebody listens there: Ray's own client tries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto": Ray finds it
        return
    try:
        socket.create_connection((host, int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise EnvironmentFailure(f"the Ray cluster at {address} cannot be reached: {error}") from error


@contextlib.contextmanager
def _actors(actor: Any, bundle: dict[str, float], processes: int, workdir: str, patience: float) -> Iterator[list[Any]]:
    """Yields the actors of one attempt; ends them after it.

    Raises:
      EnvironmentFailure: the cluster has not the resources.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([bundle] * processes, strategy="PACK")
    started: list[Any] = []
    try:
        if not group.wait(patience):
            raise EnvironmentFailure(
                f"the Ray cluster gave no {processes} places of {_shown(bundle)} each within {patience:g} s; "
                f"it has {_shown(ray.cluster_resources())}, of which {_shown(ray.available_resources())} are free"
            )
        for index in range(processes):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            taken = {name: number for name, number in bundle.items() if name not in ("CPU", "GPU")}
            options = actor.options(
                num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), resources=taken, scheduling_strategy=where
            )
            started.append(options.remote(workdir))
        yield started
    finally:
        for one in started:
            ray.kill(one, no_restart=True)
        remove_placement_group(group)


def _run_once(actors: list[Any], words: Sequence[str], devices: int | None, notice: Any) -> tuple[int, str]:
    """Runs the command in all actors until they are done or one of them fails; returns (exit code, why)."""
    import ray

    try:
        places = ray.get([one.place.remote() for one in actors])
    except ray.exceptions.RayError as error:
        return 1, f"an actor did not start: {_first_line(error)}"
    host, port = places[0][:2]
    _say(", ".join(f"process {index} on {where} (actor {actor})" for index, (where, _, actor) in enumerate(places)))
    flags = [] if devices is None else [f"--simulated_devices={devices}"]
    runs = {}
    for index, one in enumerate(actors):
        rank = [f"--coordinator_address={host}:{port}", f"--num_processes={len(actors)}", f"--process_id={index}"]
        runs[one.run.remote([*words, *flags, *(rank if len(actors) > 1 else [])])] = index
    told = 0
    waiting = list(runs)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=1.0)
        if notice.count > told:
            if told:
                return 128 + signal.SIGTERM, "told to stop twice"
            told = notice.count
            for one in actors:
                one.stop.remote()
        for run in done:
            code, cause = _outcome(run, runs[run])
            if code:
                return _worst([(code, cause), *_last_words(waiting, runs)])
    return 0, ""


def _last_words(waiting: list[Any], runs: dict[Any, int]) -> list[tuple[int, str]]:
    """Returns the outcomes of those that end soon after the first: the cause may be theirs."""
    import ray

    done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_LAST_WORDS_SECONDS) if waiting else ([], [])
    return [_outcome(run, runs[run]) for run in done]


def _worst(outcomes: list[tuple[int, str]]) -> tuple[int, str]:
    """Returns a user's error if there is one, else one that began it, else the first outcome."""
    from meshway.framework.distributed.watch import LOST_A_PEER

    order = {_USER_ERROR: 0, LOST_A_PEER: 2}
    return min(outcomes, key=lambda outcome: order.get(outcome[0], 1))


def _outcome(run: Any, index: int) -> tuple[int, str]:
    """Returns (exit code, why) of one process that ended."""
    import ray

    try:
        code = ray.get(run)
        if code < 0:
            return 1, f"process {index} was ended by {signal.Signals(-code).name}"
        return code, f"process {index} ended with exit code {code}"
    except ray.exceptions.RayActorError as error:
        return 1, f"the actor of process {index} died ({_first_line(error)})"
    except ray.exceptions.RayError as error:
        return 1, f"process {index} failed: {_first_line(error)}"


def _shown(resources: Mapping[str, float]) -> str:
    """Returns the resources that a person asks for, not Ray's own marks of nodes and groups."""
    known = {name: number for name, number in resources.items() if name.isalnum() and name.upper() == name}
    return " ".join(f"{name}={number:g}" for name, number in sorted(known.items())) or "nothing"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _say(text: str) -> None:
    print(f"meshway launch ray: {text}", file=sys.stderr, flush=True)
