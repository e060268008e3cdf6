"""Importing TensorFlow, by whomever: without the notes that its C++ writes as it loads, and without accelerators.

Nothing here imports it, or seqio.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_NAME = "tensorflow"
# That CUDA cannot start is no error either: TensorFlow gets no accelerator here.
_NOTE = re.compile(rb"[IW]\d{4} |WARNING: All log messages before absl|To enable the following|E\d{4} .*cuInit")


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Lets TensorFlow come quietly, and without accelerators, if it comes in the time of a `with` block.

    Only what is written while TensorFlow itself is being imported is looked at: what a module says that imports it is
    heard at once.
    """
    if _NAME in sys.modules:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors stay; information and warnings go
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of no use to data, and it complains about integers
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders after it find, and lets TensorFlow's module run quietly."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _NAME:
            return None
        others = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next((found for found in others if found is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_quietly(module: ModuleType) -> None:
                del loader.exec_module
                with without_notes():
                    run(module)
                    hide_accelerators(module)

            loader.exec_module = run_quietly
        return spec


def hide_accelerators(tensorflow: Any) -> None:
    """Leaves the machine's accelerators to JAX.

    Raises:
      RuntimeError: TensorFlow holds them already.
    """
    for kind in ("GPU", "TPU"):
        tensorflow.config.set_visible_devices([], kind)


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Drops notes from standard error, and passes on all other lines.

    They come before any log level is read, so the stream itself is caught. Nothing is dropped when the block fails.
    """
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        os.dup2(caught.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught:
                if failed or not _NOTE.match(line):
                    os.write(2, line)
