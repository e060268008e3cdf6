"""A host between stand-ins, and a job for it."""

import pytest
from hosts import FLAGS, GCLOUD, SRUN, WORDS, Host

from meshway.launch.cluster.job import Job


@pytest.fixture
def host(tmp_path) -> Host:
    (tmp_path / "bin").mkdir()
    (tmp_path / "my lab").mkdir()
    made = Host(tmp_path)
    for name, more in {"meshway": "", "gcloud": GCLOUD, "srun": SRUN, "scancel": "", "scontrol": ""}.items():
        made.command(name, more)
    return made


@pytest.fixture
def job(host) -> Job:
    """A job that runs in a folder of the stand-in host."""
    folder = str(host.folder / "my lab")
    return Job(WORDS, "lab", 3, (f"XLA_FLAGS={FLAGS}",), folder, ("export NOTE=set",))
