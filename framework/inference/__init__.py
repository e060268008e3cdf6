"""Inference as a library: `Predictor` opens a run's checkpoint."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshway.framework.inference.predictor import Predictor as Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """Imports `Predictor` when it is asked for: modules of this folder import each other without it."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from meshway.framework.inference.predictor import Predictor

    return Predictor
