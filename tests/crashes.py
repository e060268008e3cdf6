"""Crashes at every change of the file system: what is left must be enough to go on."""

import contextlib
import itertools
import os

import pytest

STEPS = ("replace", "unlink", "mkdir", "rmdir", "fsync", "pwrite")


class Crash(BaseException):
    pass


class Disk:
    """The file system of processes that crash, and what of it would survive a power cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._files: set[int] = set()  # whose content is on disk
        self._renamed_in: set[int] = set()  # folders whose names are not on disk yet

    @contextlib.contextmanager
    def crashing(self, step: int):
        """After `step` changes of the file system, no further one happens: cleaning up neither.

        Also checks that each file is on disk before it is renamed, and its new name before the next one. Locks left
        are given back at the end, as a process's are. Yields a list that is not empty once the crash has come.
        """
        crashed: list[bool] = []
        locks: set[int] = set()
        count = itertools.count()

        def wrapped(name, original):
            def call(*args, **options):
                if crashed or next(count) == step:
                    crashed.append(True)
                    raise Crash
                if name == "fsync":
                    inode = os.fstat(args[0]).st_ino
                    self._files.add(inode)
                    self._renamed_in.discard(inode)
                    return None  # no test cuts the power
                if name == "replace":
                    assert os.stat(args[0]).st_ino in self._files and not self._renamed_in, args
                    self._renamed_in.add(os.stat(os.path.dirname(args[1])).st_ino)
                return original(*args, **options)

            return call

        def opened(path, *args, original=os.open, **options):
            descriptor = original(path, *args, **options)
            if str(path).endswith("lock"):
                locks.add(descriptor)
            return descriptor

        def closed(descriptor, original=os.close):
            locks.discard(descriptor)
            original(descriptor)

        with self._monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, wrapped(name, getattr(os, name)))
            patch.setattr(os, "open", opened)
            patch.setattr(os, "close", closed)
            with contextlib.suppress(Crash):
                yield crashed
        self._renamed_in.clear()  # the rerun finds what it finds
        for descriptor in locks:
            os.close(descriptor)
