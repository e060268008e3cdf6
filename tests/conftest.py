"""Every test sees eight simulated CPU devices; compiled programs are kept between tests, workers and children."""

import os
import shutil
import tempfile
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
KEPT = Path(__file__).parent.parent / ".cache" / "meshway"

# Child processes inherit these, except for the device count, which each run sets itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Eight devices share two cores: a collective may wait for minutes, after which XLA would abort the process.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

# Not the user's own caches. Tasks are cached anew by each session; corpora and vocabularies carry hashes and are kept.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["MESHWAY_CACHE_DIR"] = tempfile.mkdtemp(prefix="meshway-tests-")
SESSION = Path(os.environ["MESHWAY_CACHE_DIR"])
if "PYTEST_XDIST_WORKER" not in os.environ and KEPT.is_dir():
    shutil.copytree(KEPT, SESSION, dirs_exist_ok=True)


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        KEPT.mkdir(parents=True, exist_ok=True)
        for path in SESSION.iterdir():
            if path.is_file() and not (KEPT / path.name).exists():
                shutil.copy(path, KEPT / path.name)
        shutil.rmtree(SESSION, ignore_errors=True)


import hypothesis  # noqa: E402
import jax  # noqa: E402

# A test that is slow on a busy machine is not wrong.
hypothesis.settings.register_profile("meshway", deadline=None)
hypothesis.settings.load_profile("meshway")

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # JAX begins here: a test that plays other numbers of devices would settle them for all that follow
