"""A hook that captures a profile of a few steps."""

import os

import jax

from meshway.framework.errors import UserError
from meshway.framework.files import local_path


class Profile:
    """Captures a `jax.profiler` trace of steps `start_step + 1` to `start_step + num_steps` of a run.

    Open the folder with XProf or TensorBoard's profile plugin, or the `.trace.json.gz` in Perfetto. Keep to a
    few steps, after the first ones, which compile. A run that resumes after `start_step` captures nothing.
    """

    def __init__(self, model_dir: str | os.PathLike[str], start_step: int = 10, num_steps: int = 3) -> None:
        """Prepares a trace into `model_dir`/profile. Raises UserError for steps that cannot be."""
        if start_step < 1 or num_steps < 1:
            raise UserError(f"Profile: start_step and num_steps must be at least 1, got {start_step}, {num_steps}")
        self._folder = local_path(os.fspath(model_dir)) / "profile"
        self._start_step, self._num_steps = start_step, num_steps
        self._tracing = False

    def after_step(self, step: int) -> None:
        """Starts or stops the trace when `step` has been dispatched; waits for the devices at both ends."""
        if step == self._start_step:
            _wait_for_devices()
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step >= self._start_step + self._num_steps:
            self.close()

    def close(self) -> None:
        """Stops a trace that is still running."""
        if self._tracing:
            _wait_for_devices()
            jax.profiler.stop_trace()
            self._tracing = False


def _wait_for_devices() -> None:
    # Steps are dispatched ahead of the devices: the newest of all live arrays are the last step's results.
    jax.block_until_ready(jax.live_arrays())
