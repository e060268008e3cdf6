"""Lengths that batches are padded to: few, so that little is compiled, and close, so that little is padded."""

import bisect
from collections.abc import Mapping, Sequence

from meshway.framework.errors import UserError

SMALLEST = 16


class Buckets:
    """Increasing shapes of one batch, in tokens by feature; an example belongs to the first that it fits into.

    An example's bucket depends on its own size alone, so what is computed of it does not depend on its neighbours.
    """

    def __init__(self, shapes: Sequence[Mapping[str, int]]):
        """Raises UserError where there are none, or one is no larger than the one before."""
        if not shapes:
            raise UserError("buckets: there must be at least one length")
        self.shapes = [dict(shape) for shape in shapes]
        for small, large in zip(self.shapes, self.shapes[1:]):
            if small.keys() != large.keys() or any(small[name] > large[name] for name in small) or small == large:
                raise UserError(f"buckets must grow: {large} does not follow {small}")
        if any(length < 1 for shape in self.shapes for length in shape.values()):
            raise UserError(f"buckets: lengths must be at least 1 token, not {self.shapes[0]}")

    @property
    def largest(self) -> Mapping[str, int]:
        """The shape that any example must fit into."""
        return self.shapes[-1]

    def of(self, sizes: Mapping[str, int]) -> int | None:
        """Returns which shape an example of `sizes` belongs to, None where it fits into none."""
        found = bisect.bisect_left(
            self.shapes, True, key=lambda shape: all(sizes[name] <= shape[name] for name in sizes)
        )
        return found if found < len(self.shapes) else None


def doubling(longest: Mapping[str, int], smallest: int = SMALLEST) -> Buckets:
    """Returns buckets that halve `longest`, all features together, until the longest of them is about `smallest`."""
    shapes = [dict(longest)]
    while max(shapes[-1].values()) > smallest:
        halved = {name: max(1, -(-length // 2)) for name, length in shapes[-1].items()}
        if halved == shapes[-1]:
            break
        shapes.append(halved)
    return Buckets(shapes[::-1])
