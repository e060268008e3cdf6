"""Examples of fixed shapes (images, labels, vectors), one per row, unchanged."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Items, Sizes, Spec, TaskInfo
from meshway.framework.data.rows.packing import Arrays, Example, Placement
from meshway.framework.errors import UserError, did_you_mean

_KINDS = "biuf"  # bool, integers, floats: what a device computes with


class PassThrough:
    """Each row is one example; each feature has one fixed shape. TASK_FEATURE_LENGTHS is {}.

    Args:
      shapes: task feature -> shape of an example, as {'image': (8, 8, 1), 'label': ()}.
      dtypes: task feature -> numpy's name of its dtype in the batch; needed for every feature. The task's values are
        cast to it, if it is of the same kind (numpy's `same_kind`) and can hold every integer.
      weights: name of the batch feature, float32 [batch], that is 1 on rows that hold an example and 0 on padding.
    """

    pack = False
    can_predict = False

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str], weights: str = "loss_weights"
    ) -> None:
        if not shapes or set(shapes) != set(dtypes):
            raise UserError(
                "PassThrough.shapes and dtypes must name the same features, at least one: "
                f"shapes has {list(shapes)}, dtypes {list(dtypes)}"
            )
        if weights in shapes:
            raise UserError(f"PassThrough.weights is {weights!r}, the name of a feature; give it another name")
        self.shapes = {name: _shape(name, shape) for name, shape in shapes.items()}
        self.dtypes = {name: _dtype(name, dtypes[name]) for name in shapes}
        self.weights = weights
        self.task_features: tuple[str, ...] = tuple(shapes)

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, ...), dtype) of a batch; `lengths` are not read."""
        spec: Spec = {name: ((batch_size, *shape), self.dtypes[name]) for name, shape in self.shapes.items()}
        return spec | {self.weights: ((batch_size,), np.dtype(np.float32))}

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "PassThroughObjective":
        """Returns the objective of a task.

        Raises:
          UserError: a feature is missing, of another shape or of a dtype that cannot be cast, or `lengths` contradicts
            `shapes`.
        """
        for name, shape in self.shapes.items():
            if name not in task.features:
                raise UserError(f"{task.lacks(name, 'PassThrough')}{did_you_mean(name, task.features)}")
            info = task.features[name]
            if not _may_have_shape(info.shape, shape):
                raise UserError(
                    f"task {task.name!r}: feature {name!r} has shape {list(info.shape)} (None where it varies), but "
                    f"PassThrough.shapes gives {list(shape)}"
                )
            dtype = self.dtypes[name]
            if info.dtype == "bytes" or not np.can_cast(np.dtype(info.dtype), dtype, "same_kind"):
                raise UserError(
                    f"task {task.name!r}: feature {name!r} is {info.dtype}, which cannot be cast to {dtype.name}, as "
                    "PassThrough.dtypes asks; let the task decode or convert it"
                )
        for name, length in lengths.items():
            if name not in self.shapes:
                raise UserError(
                    f"TASK_FEATURE_LENGTHS gives a length for {name!r}, which PassThrough.shapes does not list: it has "
                    f"{list(self.shapes)}{did_you_mean(name, self.shapes)}"
                )
            if self.shapes[name][:1] != (length,):
                raise UserError(
                    f"TASK_FEATURE_LENGTHS[{name!r}] is {length!r}, but PassThrough.shapes gives "
                    f"{list(self.shapes[name])}; leave {name!r} out of TASK_FEATURE_LENGTHS"
                )
        return PassThroughObjective(task.name, self.shapes, self.dtypes, self.weights)


@dataclasses.dataclass(frozen=True)
class PassThroughObjective:
    """`PassThrough` of one task."""

    task_name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    weights: str
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return {}

    @property
    def trims(self) -> Mapping[str, int]:
        return {}

    def parts(self, sizes: Sizes) -> np.ndarray:
        return np.ones(_count(sizes), np.int64)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return np.zeros(_count(sizes), np.int64)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        return {}

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Returns the features, cast.

        Raises:
          UserError: this example has another shape, or an integer that the dtype cannot hold.
        """
        item = {}
        for name, shape in self.shapes.items():
            array = np.asarray(example[name])
            if array.shape != shape:
                raise UserError(
                    f"task {self.task_name!r}: feature {name!r} of example {index} has shape {list(array.shape)}, but "
                    f"PassThrough.shapes gives {list(shape)}"
                )
            item[name] = array.astype(self.dtypes[name])
            if (
                array.dtype.kind in "iu"
                and not np.can_cast(array.dtype, item[name].dtype)
                and (item[name] != array).any()
            ):
                raise UserError(
                    f"task {self.task_name!r}: feature {name!r} of example {index} has integers from {array.min()} to "
                    f"{array.max()}, which {item[name].dtype.name}, as PassThrough.dtypes asks, cannot hold"
                )
        return item

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        weights = np.zeros(placement.num_rows, np.float32)
        weights[placement.rows] = 1
        arrays: Arrays = {self.weights: weights}
        for name, shape in self.shapes.items():
            arrays[name] = np.zeros((placement.num_rows, *shape), self.dtypes[name])
            for row, item in zip(placement.rows.tolist(), items, strict=True):
                arrays[name][row] = item[name]
        return arrays

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        raise UserError("PassThrough has nothing to predict from; its tasks are evaluated by their loss")


def _shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or not all(type(size) is int and size >= 1 for size in shape):
        raise UserError(f"PassThrough.shapes[{name!r}] must be whole numbers of 1 and above, not {shape!r}")
    return tuple(shape)


def _dtype(name: str, dtype: str) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.kind not in _KINDS:
        raise UserError(
            f"PassThrough.dtypes[{name!r}] is {dtype!r}, but must be one of bool, integers or floats, as 'float32'"
        )
    return found


def _may_have_shape(varying: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(varying) == len(shape) and all(
        size in (None, wanted) for size, wanted in zip(varying, shape, strict=True)
    )


def _count(sizes: Sizes) -> int:
    return len(next(iter(sizes.values())))
