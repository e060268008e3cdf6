"""How tokens spread over the experts of a mixture-of-experts run, layer by layer."""

import re
from collections.abc import Mapping

from meshway.framework.training.report.elements import figure, section
from meshway.framework.training.report.plots import Points
from meshway.framework.training.report.run_files import Run

# The scalars of one layer's router: `decoder/router/load_max/layer_03`.
_ROUTER = re.compile(r"(?P<stack>\w+)/router/(?P<statistic>\w+)/layer_(?P<layer>\d+)")
# Of each statistic: its title, and whether it is a share.
_STATISTICS = {
    "load_max": ("busiest expert (1 is even)", False),
    "load_min": ("idlest expert (1 is even)", False),
    "entropy": ("entropy of the router, in nats", False),
    "drop_rate": ("dropped token choices", True),
}
_LOSSES = {
    "router_load_loss": "Router loss: load",
    "router_importance_loss": "Router loss: importance",
    "router_z_loss": "Router loss: z",
}


def is_of_router(name: str) -> bool:
    """Whether a metric is one of those that the section on experts shows."""
    return name in _LOSSES or _ROUTER.fullmatch(name) is not None


def experts(run: Run) -> str:
    """Returns a plot a stack and statistic with a line a layer, and the router's losses; nothing for a dense model."""
    plots = [
        _layers(stack, statistic, layers) for (stack, statistic), layers in sorted(_curves(run).items(), key=_place)
    ]
    plots += [figure(title, {name: run.curve(name)}, from_zero=True) for name, title in _LOSSES.items()]
    return section("Experts", plots, "") if any(plots) else ""


def _curves(run: Run) -> dict[tuple[str, str], dict[int, Points]]:
    """Returns the curves by layer of each (stack, statistic)."""
    found: dict[tuple[str, str], dict[int, Points]] = {}
    for name in sorted({name for line in run.reports for name in line}):
        if match := _ROUTER.fullmatch(name):
            layers = found.setdefault((match["stack"], match["statistic"]), {})
            layers[int(match["layer"])] = run.curve(name)
    return found


def _place(item: tuple[tuple[str, str], object]) -> tuple[str, int, str]:
    """Sorts by stack, then statistics in the order above, then those that are not there."""
    stack, statistic = item[0]
    known = list(_STATISTICS)
    return stack, known.index(statistic) if statistic in known else len(known), statistic


def _layers(stack: str, statistic: str, layers: Mapping[int, Points]) -> str:
    title, is_share = _STATISTICS.get(statistic, (statistic.replace("_", " "), False))
    series = {f"layer {layer}": layers[layer] for layer in sorted(layers)}
    where = stack.capitalize() if len(series) > 1 else f"{stack.capitalize()}, {next(iter(series))}"
    return figure(f"{where}: {title}", series, percent=is_share, from_zero=True, shaded=True)
