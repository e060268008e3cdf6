"""Parts of one's own, configurable in their source, with a constant that recipes name."""

from pathlib import Path

import gin

gin.constant("mylab.PEAK", 0.25)


@gin.configurable
def ramp(peak, steps=100):
    """A learning rate: `peak` reached in `steps`."""
    return lambda step: peak * (step + 1) / steps


class Count:
    """A number that several hooks share."""

    value = 0


@gin.configurable
class Recorder:
    """A hook: after each step it counts, and writes its name, the step, the count and what it notes to a file."""

    def __init__(self, folder, count, name="nobody", notes=()):
        self._path, self._count, self._name, self._notes = Path(folder) / "recorded.txt", count, name, notes

    def after_step(self, step):
        self._count.value += 1
        with open(self._path, "a") as file:
            print(self._name, step, self._count.value, *self._notes, file=file)

    def close(self):
        pass
