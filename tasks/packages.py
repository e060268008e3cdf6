"""Finding what an extra of setup.py installs, without importing it."""

import importlib.util
from pathlib import Path


def package_directory(name: str, extra: str) -> Path:
    """Returns the directory of installed package `name`, which is not imported.

    Raises:
      ValueError: it is not installed; names the `extra` that installs it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise not_installed(name, extra)
    return Path(spec.submodule_search_locations[0])


def not_installed(name: str, extra: str) -> ValueError:
    """Returns the error that says which extra installs package `name`."""
    return ValueError(f"package {name!r}, which these tasks read, is not installed: pip install 'meshway[{extra}]'")
