"""Who evaluates what: programs beside each other divide the steps of a run among themselves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from meshway.framework.files import io_errors, locked


class Claims:
    """Claims on pieces of work by name, each held by one process, which loses it when it ends, however it ends.

    Args:
      folder: of lock files, made when it is needed; a claim's file is gone once it is released.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Holds the claim on `name` for the time of a `with` block, which is told whether it is held; else another
        process holds it.

        Raises:
          UserError: the disk refuses.
        """
        with contextlib.ExitStack() as stack:
            with io_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(self._folder / name))
            yield held
