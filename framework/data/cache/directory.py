"""Where tasks are cached when nobody says where."""

import os
from pathlib import Path

from meshway.framework.files import local_path


def cache_directory() -> Path:
    """Returns $MESHWAY_CACHE_DIR/tasks, else $XDG_CACHE_HOME/meshway/tasks, else ~/.cache/meshway/tasks."""
    if own := os.environ.get("MESHWAY_CACHE_DIR"):
        return local_path(own) / "tasks"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meshway" / "tasks"
