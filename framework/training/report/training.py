"""How training went: curves over steps."""

from meshway.framework.training.report.elements import figure, section
from meshway.framework.training.report.plots import Points
from meshway.framework.training.report.run_files import Run

_MEMORY = {"in use": "device_bytes_in_use", "peak": "device_peak_bytes_in_use", "limit": "device_bytes_limit"}


def training(run: Run) -> str:
    """Returns the curves of what every run reports."""
    losses = {"train": run.curve("loss")}
    if validation := run.curve("validation/loss"):
        losses["validation"] = validation
    else:
        losses |= {f"validation, {task}": run.metric(task, "loss") for task in run.evaluations}
    plots = [
        figure("Loss", losses),
        figure("Learning rate", {"learning rate": run.curve("learning_rate")}, from_zero=True),
        figure("Tokens per second", {"tokens/s": run.curve("tokens_per_second")}, from_zero=True),
        figure(
            "Time spent waiting for data",
            {"share": run.curve("data_wait_fraction")},
            percent=True,
            from_zero=True,
        ),
        figure("Gradient norm", {"norm": run.curve("grad_norm")}, from_zero=True),
        figure("Share of matmul peak (MFU)", {"share": run.curve("mfu")}, percent=True, from_zero=True),
        figure("Device memory, GiB", _memory(run), from_zero=True),
    ]
    return section("Training", plots, "No step has been reported yet.")


def _memory(run: Run) -> dict[str, Points]:
    """Returns the memory of the fullest device; nothing where no backend counted it."""
    curves = {name: [(step, value / 2**30) for step, value in run.curve(key)] for name, key in _MEMORY.items()}
    return {name: points for name, points in curves.items() if points}
