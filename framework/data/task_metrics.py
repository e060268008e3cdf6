"""A seqio task's own metrics: functions, seqio's and clu's metric classes, and the values that they return.

Nothing here imports seqio: what its classes are is told by their attributes.
"""

import base64
import functools
import io
import struct
import wave
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.source import Measured
from meshway.framework.errors import UserError, described, first_line

# seqio.metrics.ModelOutputType
PREDICTION, SCORE, PREDICTION_WITH_AUX, SCORE_WITH_INTERMEDIATES = 1, 2, 3, 4
_OF_PREDICTIONS, _OF_SCORES = (PREDICTION, PREDICTION_WITH_AUX), (SCORE, SCORE_WITH_INTERMEDIATES)
_FUNCTIONS = {
    PREDICTION: "predict_metric_fns",
    SCORE: "score_metric_fns",
    PREDICTION_WITH_AUX: "predict_with_aux_metric_fns",
}


class TaskMetrics:
    """The metrics of a task, by what of a model they are computed from.

    Args:
      name: the task's name.
      task: the seqio Task; None: no metrics.

    Raises:
      UserError: seqio cannot tell what a metric function takes, or a metric object is none of seqio's kind.
    """

    def __init__(self, name: str, task: Any) -> None:
        self._name, self._task = name, task
        self._functions: dict[int, list[Callable[..., Any]]] = {}
        for kind, attribute in _FUNCTIONS.items():
            try:
                self._functions[kind] = [] if task is None else list(getattr(task, attribute))
            except ValueError as error:
                raise UserError(f"task {name!r}: {first_line(error)}") from error
        self._objects: dict[int, list[Any]] = {}
        for each in _own_objects(task):
            self._objects.setdefault(self._kind(each), []).append(each)

    @property
    def of_predictions(self) -> list[str]:
        """The names of the metrics of predictions."""
        return self._names(_OF_PREDICTIONS)

    @property
    def of_intermediates(self) -> list[str]:
        """The names of those of scores that need what the model computes beside them."""
        return self._names((SCORE_WITH_INTERMEDIATES,))

    @property
    def of_scores(self) -> list[str]:
        """The names of the metrics of scores."""
        return self._names(_OF_SCORES)

    def merging(self, read: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]], paired: bool) -> "MergedMetrics":
        """Returns what the metric objects that merge are gathered in; see `MergedMetrics` for the arguments."""
        merged = {kind: [each for each in objects if _merges(each)] for kind, objects in self._objects.items()}
        rest = {kind for kind, objects in self._objects.items() if len(merged[kind]) < len(objects)}
        functions = {kind for kind, listed in self._functions.items() if listed}
        beside = SCORE_WITH_INTERMEDIATES in rest or (paired and SCORE in rest | functions)
        needs = (bool(functions & {*_OF_PREDICTIONS}), bool(rest & {*_OF_PREDICTIONS}), beside)
        features = self._task.output_features if merged else {}
        return MergedMetrics(merged, features, read, paired, *needs)

    def run(
        self,
        kind: int,
        given: Mapping[str, Any] | None,
        output: Any,
        targets: Callable[[], Sequence[Any]],
        examples: Callable[[], Sequence[Mapping[str, Any]]],
        found: Measured,
        merged: "MergedMetrics | None" = None,
    ) -> None:
        """Adds to `found` what the metrics of one kind make of a model's outputs; one that raises is named there.

        Args:
          kind: PREDICTION, ...
          given: keyword arguments of metric functions, beside `targets`; None: they are not run.
          output: what the model made, for metric objects; None: they are not run.
          targets: what metric functions compare with; called where there is one.
          examples: those that `output` is of; called where there is a metric object.
          found: what is added to.
          merged: the values of metric objects that merge, which are not run on `output` then.
        """
        calls: list[tuple[str, Callable[[], Any]]] = []
        if given is not None and (listed := self._functions.get(kind)):
            arguments = {"targets": targets(), **given}
            calls += [(_name(each), functools.partial(each, **arguments)) for each in listed]
        own = self._objects.get(kind, ())
        at_once = [each for each in own if merged is None or not _merges(each)]
        if output is not None and at_once:
            calls += [(_name(each), functools.partial(self._compute, each, examples(), output)) for each in at_once]
        if merged is not None:
            calls += merged.calls(kind)
        for name, call in calls:
            try:
                scalars, shown = plain_values(call())
                if twice := sorted((scalars | shown).keys() & (found.values | found.shown).keys()):
                    raise ValueError(f"another metric function returns {twice[0]!r} too")
                found.values.update(scalars)
                found.shown.update(shown)
            except Exception as error:
                found.failures[name] = described(error)

    def _compute(self, metric: Any, examples: Sequence[Mapping[str, Any]], output: Any) -> Mapping[str, Any]:
        """Runs a metric object as seqio's Evaluator does: over all examples at once."""
        features = self._task.output_features
        made = metric.from_model_output(examples, output, features, "targets")
        if hasattr(made, "actual_compute"):  # a CollectingMetric
            value, _ = made.actual_compute(examples, features, "targets", None)
        else:
            value = made.compute()
        return _named(metric, value)

    def _kind(self, metric: Any) -> int:
        try:
            kind = int(metric.model_output_type)
        except (AttributeError, TypeError, ValueError):
            kind = 0
        lacks = [name for name in ("from_model_output", "compute") if not callable(getattr(metric, name, None))]
        if kind not in (*_OF_PREDICTIONS, *_OF_SCORES) or lacks:
            what = (
                f"no method {' or '.join(lacks)}" if lacks else "no model_output_type of seqio.metrics.ModelOutputType"
            )
            raise UserError(
                f"task {self._name!r}: its metric object {_name(metric)} has {what}, so nothing says what it is "
                "computed from. Metric objects are as seqio.metrics.Metric has them (model_output_type, "
                "from_model_output, compute); or write a metric function of (targets, predictions)"
            )
        return kind

    def _names(self, kinds: Sequence[int]) -> list[str]:
        return [
            _name(each) for kind in kinds for each in (*self._functions.get(kind, ()), *self._objects.get(kind, ()))
        ]


class MergedMetrics:
    """A task's metric objects whose values merge, over one evaluation: each batch's outputs become values, which are
    merged into those of the batches before, as seqio's MetricManager has it; nothing else is kept of a batch.

    All other metrics are computed once, from all examples: functions, and objects that collect what they are given
    (`actual_compute`) or have no `merge` of their own, as seqio's LegacyMetric.

    Args:
      objects: those that merge, by kind.
      features: the task's output features.
      read: indices -> the examples.
      paired: whether metrics of scores get (scores, intermediates) in their place.
      needs_predictions, needs_tokens, needs_intermediates: what the other metrics need of all examples: postprocessed
        predictions, their token ids, what the model computed beside scores.
      takes_scores: whether `scored` gives what it gets to any metric.
    """

    def __init__(
        self,
        objects: Mapping[int, Sequence[Any]],
        features: Mapping[str, Any],
        read: Callable[[Sequence[int]], Sequence[Mapping[str, Any]]],
        paired: bool,
        needs_predictions: bool,
        needs_tokens: bool,
        needs_intermediates: bool,
    ) -> None:
        self._objects, self._features, self._read, self._paired = objects, features, read, paired
        self.needs_predictions, self.needs_tokens = needs_predictions, needs_tokens
        self.needs_intermediates = needs_intermediates
        self.takes_scores = any(objects.get(kind) for kind in (SCORE, SCORE_WITH_INTERMEDIATES))
        self._merged: dict[tuple[int, int], Any] = {}
        self._errors: dict[tuple[int, int], Exception] = {}

    def predicted(self, indices: Sequence[int], tokens: np.ndarray, scores: Sequence[Any]) -> None:
        """Takes the predictions of some examples, ids [examples, ..., length], and their scores."""
        examples = functools.cache(lambda: self._read(indices))
        self._add(PREDICTION, examples, tokens)
        self._add(PREDICTION_WITH_AUX, examples, (tokens, {"scores": np.asarray(scores)}))

    def scored(self, indices: Sequence[int], scores: Sequence[float], intermediates: Any) -> None:
        """Takes the scores of some examples, and what the model computed beside them, None where nothing needs it."""
        values, examples = np.array(scores), functools.cache(lambda: self._read(indices))
        self._add(SCORE, examples, (values, intermediates) if self._paired else values)
        if intermediates is not None:
            self._add(SCORE_WITH_INTERMEDIATES, examples, (values, intermediates))

    def _add(self, kind: int, examples: Callable[[], Sequence[Mapping[str, Any]]], output: Any) -> None:
        for number, metric in enumerate(self._objects.get(kind, ())):
            place = kind, number
            if place in self._errors:
                continue
            try:
                made = metric.from_model_output(examples(), output, self._features, "targets")
                self._merged[place] = self._merged[place].merge(made) if place in self._merged else made
            except Exception as error:
                self._errors[place] = error

    def calls(self, kind: int) -> list[tuple[str, Callable[[], Mapping[str, Any]]]]:
        """Returns (name, what computes it) of the metrics of one kind that some batch was given for."""
        places = [(kind, number) for number in range(len(self._objects.get(kind, ())))]
        found = [place for place in places if place in self._merged or place in self._errors]
        return [(_name(self._objects[kind][place[1]]), functools.partial(self._compute, place)) for place in found]

    def _compute(self, place: tuple[int, int]) -> Mapping[str, Any]:
        if place in self._errors:
            raise self._errors[place]
        return _named(self._objects[place[0]][place[1]], self._merged[place].compute())


def _merges(metric: Any) -> bool:
    """Whether a metric object's values are merged: it has a `merge` other than clu's, which raises."""
    merge = getattr(metric, "merge", None)
    is_base = (getattr(merge, "__module__", ""), getattr(merge, "__qualname__", "")) == ("clu.metrics", "Metric.merge")
    return callable(merge) and not is_base and not hasattr(metric, "actual_compute")


def _named(metric: Any, value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {_name(metric): value}


def _own_objects(task: Any) -> list[Any]:
    """Returns a task's `metric_objs` without those that seqio makes of its metric functions, which come last."""
    objects = list(getattr(task, "metric_objs", ()))
    return objects[: len(objects) - len(task.metric_fns)] if objects else []


def _name(metric: Any) -> str:
    """Returns what people call a metric, through functools.partial."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return getattr(metric, "__name__", type(metric).__name__)


def plain_values(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Returns what a metric returned as (numbers, what else can be shown); mappings are flattened ('a/b').

    What else can be shown, as JSON has it: {'kind': 'text', 'text'}, {'kind': 'image', 'png'},
    {'kind': 'audio', 'wav'}, {'kind': 'histogram', 'edges', 'counts'}, {'kind': 'tensor', ...}; bytes in base64.

    Raises:
      ValueError: an image, a sound or a histogram is not what seqio's classes say it is.
    """
    scalars: dict[str, float] = {}
    shown: dict[str, dict[str, Any]] = {}
    for name, value in _flat(values, ""):
        if (plain := _shown(name, value)) is not None:
            shown[name] = plain
            continue
        value = getattr(value, "value", value)  # a seqio Scalar carries its number there
        if isinstance(value, bool | int | float | np.number) or getattr(value, "shape", None) == ():
            scalars[name] = float(value)
    return scalars, shown


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        inner = getattr(value, "value", value)
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _shown(name: str, value: Any) -> dict[str, Any] | None:
    """Returns a value of seqio.metrics other than Scalar; None for anything else."""
    if hasattr(value, "textdata"):
        text = value.textdata
        if not isinstance(text, str | bytes):
            raise ValueError(f"{name}: the text of a seqio Text is {type(text).__name__}, not str or bytes")
        return {"kind": "text", "text": text.decode("utf-8", "replace") if isinstance(text, bytes) else text}
    if hasattr(value, "image"):
        images = np.asarray(value.image)
        if images.ndim != 4 or images.shape[-1] not in (1, 2, 3, 4):
            raise ValueError(f"{name}: an Image has shape {images.shape}, not (images, height, width, 1 to 4)")
        return {"kind": "image", "png": [_text(_png(each)) for each in images[: value.max_outputs]]}
    if hasattr(value, "audiodata"):
        sounds = np.asarray(value.audiodata, np.float32)
        if sounds.ndim != 3:
            raise ValueError(f"{name}: an Audio has shape {sounds.shape}, not (sounds, samples, channels)")
        rate = int(value.sample_rate)
        return {"kind": "audio", "wav": [_text(_wav(each, rate)) for each in sounds[: value.max_outputs]]}
    if hasattr(value, "values") and hasattr(value, "bins"):
        counts, edges = np.histogram(np.asarray(value.values, np.float64), bins=value.bins or 30)
        return {"kind": "histogram", "edges": edges.tolist(), "counts": counts.tolist()}
    if hasattr(value, "tensor") and hasattr(value, "metadata"):
        array = np.asarray(value.tensor)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: the tensor of a Generic is {array.dtype}, not numbers")
        metadata = _text(value.metadata.SerializeToString())
        return {
            "kind": "tensor",
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "data": _text(array.tobytes()),
            "metadata": metadata,
        }
    return None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _png(image: np.ndarray) -> bytes:
    """Returns an image [height, width, channels], uint8 or floats from 0 to 1, as PNG."""
    if image.dtype.kind == "f":
        image = np.clip(image * 255.5, 0, 255)  # as TensorFlow rounds
    pixels = image.astype(np.uint8)
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Returns samples [time, channels] from -1 to 1 as WAV, 16 bits."""
    scaled = samples * 32768.0  # as TensorFlow has it
    whole = np.clip(np.trunc(scaled + np.copysign(0.5, scaled)), -32768, 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(whole.tobytes())
    return file.getvalue()
