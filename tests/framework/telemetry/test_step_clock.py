import threading
import time

from meshway.framework.telemetry.reporter import StepClock


class Output:
    """What a step gives back: `finish` is when the device is done with it."""

    def __init__(self) -> None:
        self._done, self.error = threading.Event(), False

    def block_until_ready(self) -> None:
        self._done.wait()
        if self.error:
            raise RuntimeError("the step failed")

    def finish(self) -> None:
        self._done.set()


def wait_until_idle(clock: StepClock) -> float:
    for _ in range(10_000):
        since = clock.idle_since()
        if since is not None:
            return since
        time.sleep(0.001)
    raise AssertionError("the clock did not notice the end of the last step")


def test_devices_are_idle_once_their_last_step_is_done() -> None:
    clock = StepClock()
    begin = time.perf_counter()
    assert wait_until_idle(clock) <= begin
    first, second = Output(), Output()
    clock.started(first)
    clock.started(second)
    first.finish()
    assert clock.idle_since() is None
    second.error = True
    before = time.perf_counter()
    second.finish()
    assert before <= wait_until_idle(clock) <= time.perf_counter()
    clock.close()
    clock._thread.join(10)
    assert not clock._thread.is_alive()
