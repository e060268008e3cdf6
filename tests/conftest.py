"""Every test sees eight simulated CPU devices; compiled programs are kept between tests, workers and children."""

import os
import shutil
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
TASKS = Path(__file__).parent.parent / ".cache" / "meshway"

# Child processes inherit these, except for the device count, which each run sets itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Not the user's own caches. Corpora and vocabularies carry hashes and stay; tasks are cached anew by each session.
os.environ["MESHWAY_CACHE_DIR"] = str(TASKS)
if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(TASKS / "tasks", ignore_errors=True)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
