"""A store of a run's processes without a run: the processes are threads."""

import threading


class StoreInMemory:
    def __init__(self):
        self.values = {}
        self.down = False  # whether process 0, which holds the store, is gone
        self._changed = threading.Condition()

    def set(self, key, value):
        self._check()
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def claim(self, key, value):
        self._check()
        with self._changed:
            if key in self.values:
                return False
            self.values[key] = value
            self._changed.notify_all()
            return True

    def get(self, key):
        self._check()
        return self.values.get(key)

    def list(self, folder):
        self._check()
        with self._changed:
            return {key.removeprefix(f"{folder}/"): v for key, v in self.values.items() if key.startswith(f"{folder}/")}

    def wait(self, key, seconds):
        self._check()
        with self._changed:
            self._changed.wait_for(lambda: key in self.values, seconds)
            return self.values.get(key)

    def _check(self):
        if self.down:
            raise RuntimeError("UNAVAILABLE: connection refused")
