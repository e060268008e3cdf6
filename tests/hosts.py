"""A stand-in for a cluster's host: what job files call there writes down how it was called."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

# Everything that shells, YAML and people trip over.
WORDS = (
    "train",
    "--gin_file=t5.gin",
    "--gin.MODEL_DIR=/data/run",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64}",
    """--gin.NOTE='a "b" $HOME `id` $(id) \\ ! # : {x} $(HOME)'""",
)
FLAGS = "--xla_a=1 --xla_b='c d'"

RECORD = """#!{python} -SE
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    kept = {{k: v for k, v in os.environ.items() if k.startswith(("XLA", "MEGASCALE", "NOTE"))}}
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\t" + json.dumps(kept)
               + "\\t" + os.getcwd() + "\\n")
"""
GCLOUD = """
import subprocess
words = sys.argv[1:]
if "ssh" in words:
    command = next(word for word in words if word.startswith("--command="))[len("--command="):]
    home = os.path.join(os.environ["HOME"], words[words.index("ssh") + 1])
    os.makedirs(home, exist_ok=True)
    sys.exit(subprocess.run(["bash", "-c", command], env=dict(os.environ, HOME=home)).returncode)
if "--format=value(state.state)" in words:
    print("ACTIVE")
if "--format=value(networkEndpoints[0].ipAddress)" in words:
    print("10.0.0.7")
"""
SRUN = """
words = [word for word in sys.argv[1:] if not word.startswith("--")]
with open(os.environ["RECORD"] + ".srun", "w") as file:
    file.write(str(os.getpid()))
os.execvp(words[0], words)
"""


@dataclasses.dataclass
class Host:
    """A machine whose `meshway`, `gcloud` and Slurm commands are stand-ins."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "RECORD": str(self.folder / "record"), "SLURM_JOB_ID": "7"}

    def command(self, name: str, more: str = "", program: str = RECORD) -> None:
        """Makes a command."""
        path = self.folder / "bin" / name
        path.write_text(program.format(python=sys.executable) + more)
        path.chmod(0o755)

    def bash(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a script to its end; it must end well."""
        path = self.folder / "script.sh"
        path.write_text(script)
        done = subprocess.run(
            ["bash", str(path), *words],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str], str]]:
        """Returns (words, variables, folder) of each call of a command."""
        record = self.folder / "record"
        lines = [line.split("\t") for line in record.read_text().splitlines()] if record.exists() else []
        found = [(json.loads(words), json.loads(variables), cwd) for words, variables, cwd in lines]
        return [(words[1:], variables, cwd) for words, variables, cwd in found if words[0] == name]
