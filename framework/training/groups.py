"""Groups of parameters, chosen by patterns over their paths, each trained by a transformation of its own."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import optax

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Axes, Params
from meshway.framework.training.schedules import Schedule
from meshway.framework.training.transforms import AxesAware, Factory, made_by
from meshway.framework.training.trees import flatten, merge, select


def by_pattern(learning_rate: float | Schedule, patterns: Sequence[tuple[str, Factory]]) -> AxesAware:
    """Trains groups of parameters by different optimizers.

    Args:
      learning_rate: given to each factory.
      patterns: (regex over the whole '/'-joined parameter path, factory) in order: the first match decides.

    Raises:
      UserError: from `Optimizer.bind`, for a pattern without a parameter of its own, or a parameter that
        matches none.
    """

    def build(axes: Axes) -> optax.GradientTransformation:
        left = flatten(axes)
        groups = []
        for pattern, factory in patterns:
            members = frozenset(matching(pattern, left, "by_pattern.patterns"))
            left = {path: names for path, names in left.items() if path not in members}
            groups.append((members, made_by(factory, learning_rate, select(axes, members), pattern)))
        if left:
            raise UserError(
                f"by_pattern: no pattern matches parameter {next(iter(left))!r} ({len(left)} such); "
                "end with ('.*', ...) for all the rest"
            )
        return grouped(groups)

    return AxesAware(build)


def grouped(groups: Sequence[tuple[frozenset[str], optax.GradientTransformation]]) -> optax.GradientTransformation:
    """Returns the transformation that gives each group of paths to its own; its state is a tuple, one state a group."""

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(transformation.init(select(params, members)) for members, transformation in groups)

    def update(grads: Params, state: tuple[Any, ...], params: Params) -> tuple[Params, tuple[Any, ...]]:
        updates, states = grads, []
        for (members, transformation), inner in zip(groups, state, strict=True):
            part, inner = transformation.update(select(grads, members), inner, select(params, members))
            updates = merge(updates, part)
            states.append(inner)
        return updates, tuple(states)

    return optax.GradientTransformation(init, update)


def matching(pattern: str, paths: Iterable[str], where: str) -> list[str]:
    """Returns the paths that a regex, which the recipe gives at `where`, matches whole.

    Raises:
      UserError: it matches none, or is no regex.
    """
    try:
        matched = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if not matched:
        hint = did_you_mean(pattern, paths) or f"; parameters left are {', '.join(sorted(paths)[:5])}, ..."
        raise UserError(f"{where}: {pattern!r} matches no (remaining) parameter{hint}")
    return matched
