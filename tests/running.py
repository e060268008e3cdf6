"""Whole runs as a user starts them: real processes, in the lab's folder (a user's own package)."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

LAB = Path(__file__).parent / "lab"
TIMEOUT = 400


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "meshway.launch.cli", *words]


def environment() -> dict[str, str]:
    return os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}


def meshway(*words: str, cwd: Path = LAB) -> subprocess.CompletedProcess:
    """Runs one command to its end."""
    return subprocess.run(command(*words), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)


def start(*words: str, cwd: Path = LAB, **variables: str) -> subprocess.Popen:
    """Starts one command, with more environment variables; the caller ends it."""
    return subprocess.Popen(
        command(*words),
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def python_after(program: str, cwd: Path = LAB) -> set[str]:
    """Returns the modules that a fresh Python has loaded once it has run a program."""
    words = [sys.executable, "-c", f"{program}; import sys; print('modules:', *sys.modules)"]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("modules:")[2].split())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """Returns what processes say until they end; none outlives the call."""
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def copy_lab(folder: Path) -> Path:
    """Returns a copy of the lab outside of the repository."""
    return Path(shutil.copytree(LAB, folder / "lab", ignore=shutil.ignore_patterns("__pycache__")))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_hash(model_dir: Path, step: int) -> str:
    """Returns a hash of every byte of a checkpoint's state."""
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(model_dir / "checkpoints" / str(step) / "state")
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.update(repr((jax.tree_util.keystr(path), np.shape(leaf))).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def answer(*words: str, cwd: Path = LAB, exits: int = 0, says: str | tuple[str, ...] = (), given: str = "") -> str:
    """Runs one command to its end, checks how it ends, and returns what it said.

    Args:
      *words: of the command.
      cwd: where it runs.
      exits: the exit code wanted. With another than 0 there must be one message, with 0 none.
      says: what must be in what it says.
      given: its standard input.

    Returns:
      its output and errors, together.
    """
    done = subprocess.run(
        command(*words), cwd=cwd, env=environment(), input=given, capture_output=True, text=True, timeout=TIMEOUT
    )
    said = done.stdout + done.stderr
    assert done.returncode == exits, f"{words} ended with {done.returncode}: {said}"
    assert "Traceback" not in said, said
    assert done.stderr.count("meshway: error: ") == int(exits != 0), said
    for part in (says,) if isinstance(says, str) else says:
        assert part in said, f"{part!r} is not in: {said}"
    return said
