"""A `seqio.FeatureConverter`, one of seqio's or a user's subclass, in place of our own conversion.

Rows are planned from sizes, as for any other converter; the examples of a row, cut to their lengths, then go through
the converter by themselves, and it must make one row of them. So batch i stays a pure function of (recipe, seed, i); a
converter that packs packs what was planned. TensorFlow is needed as batches are made.
"""

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_steps
from meshway.framework.data.objective import FeatureInfo, Items, Sizes, Spec, TaskInfo
from meshway.framework.data.rows.packing import Arrays, Example, Placement, one_each
from meshway.framework.data.seqio_adapter import (
    columns_of,
    dataset_of,
    draws_random_numbers,
    import_seqio,
    in_order,
    seqio_lock,
)
from meshway.framework.data.token_rows import Overlong
from meshway.framework.errors import UserError, did_you_mean

_ROW = "meshway: row"  # a name that no feature has
_OURS = {"decoder_causal_attention": "decoder_prefix_mask"}  # seqio's name of a feature -> ours
_NARROW = {"int64": np.int32, "uint32": np.int32, "float64": np.float32, "bool": np.int32}


class SeqioConverter:
    """Runs a `seqio.FeatureConverter`.

    Batches hold what it makes, 64 bits narrowed to 32 and loss weights as float32, under its names, but
    `decoder_prefix_mask` for `decoder_causal_attention`. Where it makes no segment ids or positions, as unpacked, they
    are what T5X's models assume: a segment of the tokens that are not 0.

    Args:
      converter_cls: the class (a gin reference without parentheses), called with `pack`; or a converter.
      pack: whether training rows hold several examples; a converter that is given decides itself.
      shapes: task feature of rank 2 or more -> its sizes after the first, as {'inputs': (512,)}.
      left_out: features of its that the model does not read.
    """

    needs_tensorflow = True  # so it does not run in worker processes

    def __init__(
        self,
        converter_cls: Callable[..., Any],
        pack: bool = True,
        shapes: Mapping[str, Sequence[int]] | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        seqio = import_seqio()
        converter: Any = converter_cls
        self.name = getattr(converter_cls, "__name__", type(converter_cls).__name__)
        if not isinstance(converter, seqio.FeatureConverter):
            with _errors(f"{self.name}(pack={pack})"):
                converter = converter_cls(pack=pack)
        if not isinstance(converter, seqio.FeatureConverter):
            raise UserError(f"SeqioConverter.converter_cls is {self.name}, which is no seqio.FeatureConverter")
        if type(converter) is seqio.PassThroughFeatureConverter:
            raise UserError(
                "seqio.PassThroughFeatureConverter is passthrough.PassThrough here, which is told shapes and dtypes"
            )
        self.name = type(converter).__name__
        self.converter = self._described = converter  # what converts, and what says which features there are
        self.pack = bool(getattr(converter, "_pack", False))
        self._shapes = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        self._left_out = set(left_out)

    def under(self, lengths: Mapping[str, int]) -> "SeqioConverter":
        """Returns the converter that it is under lengths: seqio's for decoders is one of three."""
        seqio = import_seqio()
        if not isinstance(self._described, seqio.feature_converters.DecoderFeatureConverter):
            return self
        kind = "prefixsuffixlm" if "suffixes" in lengths else "prefixlm" if "inputs" in lengths else "strictlm"
        found = copy.copy(self)
        found._described = getattr(self.converter, f"{kind}_feature_converter")
        return found

    @property
    def task_features(self) -> tuple[str, ...]:
        """The features of a task that it reads, under some lengths at least."""
        seqio = import_seqio()
        if isinstance(self._described, seqio.feature_converters.DecoderFeatureConverter):
            return ("inputs", "targets", "suffixes")
        return tuple(self._reads({}))

    @property
    def can_predict(self) -> bool:
        """Whether batches tell what a prediction begins from: an encoder's inputs, or a prefix."""
        made = {*getattr(self._described, "MODEL_FEATURES", ()), *getattr(self._described, "BATCH_FEATURES", ())}
        return "decoder_input_tokens" in made and bool(made & {"encoder_input_tokens", "decoder_causal_attention"})

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, ...), dtype) of a batch: of what the converter makes of an example of full length.

        Raises:
          UserError: `lengths` are not those of its task features, or what it makes does not fit what it promises.
        """
        return {name: ((batch_size, *x.shape[1:]), x.dtype) for name, x in self._probe(lengths).items()}

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "SeqioObjective":
        """Returns the objective of a task.

        Raises:
          UserError: the task's features, the lengths and the converter do not fit.
        """
        if (under := self.under(lengths)) is not self:
            return under.bind(task, lengths)
        self._probe(lengths)
        reads = self._reads(lengths)
        for name, info in reads.items():
            if name not in task.features:
                raise UserError(f"{task.lacks(name, self.name)}{did_you_mean(name, task.features)}")
            found = task.features[name]
            if (found.dtype, len(found.shape)) != (info.dtype, len(info.shape)):
                raise UserError(
                    f"task {task.name!r}: feature {name!r} is {found.dtype} of rank {len(found.shape)}, but "
                    f"{self.name}.TASK_FEATURES says {info.dtype} of rank {len(info.shape)}"
                )
        bos = getattr(self.converter, "_bos_id", None)
        if bos is not None and self.can_predict and task.start != (bos,):
            raise UserError(
                f"task {task.name!r}: decoders start from {list(task.start)}, but {self.name} from its bos_id {bos}; "
                f"give it that id, or set the data's `start` to [{bos}], as CachedData.start"
            )
        return SeqioObjective(task.name, self, reads, dict(lengths))

    def _reads(self, lengths: Mapping[str, int]) -> dict[str, FeatureInfo]:
        """Returns the task features that it reads under `lengths`, by name."""
        seqio = import_seqio()
        converter = self.under(lengths)._described
        if isinstance(converter, seqio.feature_converters.PrePackedLMFeatureConverter):
            return {name: FeatureInfo("int32", (None,)) for name in converter.BATCH_FEATURES}
        specs = {**converter.TASK_FEATURES, **getattr(converter, "_passthrough_features", {})}
        if texts := [name for name, spec in specs.items() if spec.dtype.name == "string"]:
            raise UserError(
                f"{self.name} passes {texts} through, which is text: no device computes with it; leave it out"
            )
        return {
            name: FeatureInfo(spec.dtype.name, (None,) * min(spec.rank, 1) + self._inner(name, spec.rank))
            for name, spec in specs.items()
        }

    def _inner(self, name: str, rank: int) -> tuple[int, ...]:
        """Returns the sizes of a feature after the first."""
        inner = self._shapes.get(name, ())
        if len(inner) != max(rank - 1, 0):
            raise UserError(
                f"{self.name} reads {name!r} of rank {rank}: SeqioConverter.shapes[{name!r}] must give its "
                f"{rank - 1} sizes after the first, not {list(inner)}"
            )
        return inner

    @functools.cached_property
    def _probes(self) -> dict[tuple, Arrays]:
        return {}

    def _probe(self, lengths: Mapping[str, int]) -> Arrays:
        """Returns what becomes of one example of full length, [1, ...]; checks the lengths, and packing of two."""
        key = tuple(sorted(lengths.items()))
        if key in self._probes:
            return self._probes[key]
        self._check_lengths(lengths)
        reads = self._reads(lengths)

        # Of packed examples, whose features have no lengths of their own.
        row = sum(lengths.values()) if "decoder_causal_attention" in reads else lengths.get("targets", 1)

        def example(share: int) -> Example:
            found = {}
            for name, info in reads.items():
                size = max(1, lengths.get(name, row) // share)
                found[name] = np.ones([size if each is None else each for each in info.shape], info.dtype)
            return found

        made = self.convert([example(1)], one_each(1, list(lengths)), lengths, "one example of full length")
        if self.pack and all(length > 1 for length in lengths.values()):
            two = Placement(np.zeros(2, np.int64), np.array([1, 2], np.int32), {}, 1)
            self.convert([example(2), example(2)], two, lengths, "two examples of half the lengths")
        self._probes[key] = made
        return made

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        seqio = import_seqio()
        prepacked = isinstance(self.converter, seqio.feature_converters.PrePackedLMFeatureConverter)
        needed = {"targets", "inputs"} & set(lengths) if prepacked else set(self._reads(lengths))
        for name in sorted(needed ^ set(lengths)):
            what = f"lacks {name!r}, which" if name in needed else f"has {name!r}, which is no task feature that"
            raise UserError(
                f"TASK_FEATURE_LENGTHS={dict(lengths)} {what} {self.name} reads: it reads {sorted(needed)}"
                f"{did_you_mean(name, needed - set(lengths))}"
            )
        for name, length in lengths.items():
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise UserError(f"TASK_FEATURE_LENGTHS[{name!r}] must be a whole number of at least 1, not {length!r}")

    def convert(self, items: Sequence[Example], placement: Placement, lengths: Mapping[str, int], what: str) -> Arrays:
        """Returns the batch features [placement.num_rows, ...] of items, by the converter; rows without any are 0.

        Raises:
          UserError: it fails, or does not make one row of the items of a row; told of `what`.
        """
        order = np.lexsort((placement.segments, placement.rows))
        rows, first = np.unique(placement.rows[order], return_index=True)
        columns = columns_of([items[place] for place in order.tolist()], self._reads(lengths))
        label = f"TASK_FEATURE_LENGTHS {dict(lengths)}, {what}"
        starts = np.array([*first, len(items)], np.int64)
        with _errors(f"{self.name} ({label})"), seqio_lock:
            results = self._function(tuple(sorted(lengths.items())))(columns, starts)
            made = {name: x.numpy() for name, x in results.items()}
        numbers = made.pop(_ROW)
        if not np.array_equal(numbers, np.arange(len(rows))):
            raise UserError(
                f"{self.name} makes {len(numbers)} rows of what is planned as {len(rows)} ({label}): its lengths do "
                "not fit; examples that fit TASK_FEATURE_LENGTHS together must make one row"
                + (", or give it pack=False" if self.pack else "")
            )
        return {name: _spread(x, rows, placement.num_rows) for name, x in _completed(made, self._left_out).items()}

    @functools.cached_property
    def _functions(self) -> dict[tuple, Callable[..., Mapping[str, Any]]]:
        return {}

    def _function(self, key: tuple) -> Callable[..., Mapping[str, Any]]:
        """Returns (columns of all items, first item of each row and one past the last) -> features of the rows made."""
        if key in self._functions:
            return self._functions[key]
        import tensorflow as tf
        from tensorflow.python.autograph.core import ag_ctx

        lengths = dict(key)
        features = self._reads(lengths)

        def rows_of(columns: Any, starts: Any) -> Any:
            if not self.pack:
                made = self.converter(dataset_of(columns, features, 0, starts[-1]), lengths)
                return made.enumerate().map(lambda row, example: {**example, _ROW: row})

            @tf.autograph.experimental.do_not_convert
            def row_of(row: Any) -> Any:
                # The converter's own code runs as Python, as it does by itself; what it maps is converted.
                with ag_ctx.ControlStatusCtx(status=ag_ctx.Status.UNSPECIFIED):
                    made = self.converter(dataset_of(columns, features, starts[row], starts[row + 1]), lengths)
                    return made.map(lambda example: {**example, _ROW: row})

            return tf.data.Dataset.range(tf.size(starts, tf.int64) - 1).flat_map(row_of)

        def run(columns: Any, starts: Any) -> Any:
            made = in_order(rows_of(columns, starts))
            if draws_random_numbers(made):
                raise UserError(
                    f"{self.name} draws random numbers, so that a run could not be repeated; let a preprocessor of the "
                    "task draw them"
                )
            batch = made.batch(tf.size(starts, tf.int64))  # one more than there may be: shows that there are too many
            none = {name: tf.zeros([0] * (1 + x.shape.rank), x.dtype) for name, x in made.element_spec.items()}
            return batch.take(1).reduce(none, lambda before, found: found)

        signature = {
            name: (
                tf.TensorSpec([None], info.dtype),
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([None, len(info.shape)], tf.int32),
            )
            for name, info in features.items()
        }
        arguments = [signature, tf.TensorSpec([None], tf.int64)]
        self._functions[key] = tf.function(run, input_signature=arguments, autograph=False)
        return self._functions[key]


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Turns what a converter raises into one message: a failed check of seqio's, else the first line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        checked = re.search(r"assertion failed: \[(.*?)\]", str(error))
        told = checked[1].replace("\\'", "'") if checked else f"{type(error).__name__}: {seqio_steps.cause(error)}"
        raise UserError(f"{what}: {told}") from error


def adapted(converter: Any, lengths: Mapping[str, int]) -> Any:
    """Returns a converter of ours as it is, and one of seqio's within a `SeqioConverter`, as it is under `lengths`."""
    if hasattr(converter, "get_model_feature_lengths") and not hasattr(converter, "bind"):
        converter = SeqioConverter(converter)
    return converter.under(lengths) if isinstance(converter, SeqioConverter) else converter


@dataclasses.dataclass(frozen=True)
class SeqioObjective:
    """A `SeqioConverter` of one task: the `Objective`.

    Attributes:
      task_name: for messages.
      source: the converter.
      reads: the task features that it reads.
      limits: TASK_FEATURE_LENGTHS.
    """

    task_name: str
    source: SeqioConverter
    reads: Mapping[str, FeatureInfo]
    limits: Mapping[str, int]
    cycle = 1

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return {name: self.limits[name] for name, info in self.reads.items() if info.shape and name in self.limits}

    @property
    def trims(self) -> Mapping[str, int]:
        return self.row_lengths

    @property
    def _overlong(self) -> Overlong:
        return Overlong("truncate", self.task_name, self.row_lengths)

    def parts(self, sizes: Sizes) -> np.ndarray:
        return np.ones(len(next(iter(sizes.values()))), np.int64)

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self._overlong.lost(sizes) if self.row_lengths else np.zeros(len(self.parts(sizes)), np.int64)

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        return self._overlong.measure(sizes, items.part)

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        item = {name: np.asarray(example[name]) for name in self.reads}
        return item | self._overlong.cut(example, 0)

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        if items:
            return self.source.convert(items, placement, self.limits, f"task {self.task_name!r}")
        return {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in self.source.spec(self.limits, placement.num_rows).items()
        }

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        if not self.source.can_predict:
            raise UserError(f"{self.source.name} makes neither an encoder's inputs nor a prefix to predict from")
        placement = one_each(len(examples), list(self.limits))
        rows = self.lay([self.convert(example, 0, 0, 0, 0) for example in examples], placement)
        if "encoder_input_tokens" in rows:
            kept = {name: x for name, x in rows.items() if name.startswith("encoder_")}
            return kept | {"decoder_input_tokens": rows["decoder_input_tokens"][:, :1]}
        real = (rows["decoder_prefix_mask"] > 0).astype(np.int32)[:, : self.limits["inputs"] + 1]
        length = real.shape[1]
        return {
            "decoder_input_tokens": rows["decoder_input_tokens"][:, :length] * real,
            "decoder_target_tokens": np.zeros_like(real),
            "decoder_loss_weights": np.zeros(real.shape, np.float32),
            "decoder_segment_ids": real,
            "decoder_positions": np.arange(length, dtype=np.int32) * real,
            "decoder_prefix_mask": real,
        }


def _completed(made: Arrays, left_out: set[str]) -> Arrays:
    """Returns a converter's features under our names and dtypes, with the segment ids and positions it has not."""
    arrays: Arrays = {}
    for name, array in made.items():
        dtype = np.float32 if name.endswith("loss_weights") else _NARROW.get(array.dtype.name, array.dtype)
        if array.dtype.kind not in "biuf":
            raise UserError(f"the converter makes {name!r} of {array.dtype}, which no device computes with")
        arrays[_OURS.get(name, name)] = array.astype(dtype)
    for side, told in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        if told in arrays and arrays[told].ndim > 1:
            tokens = arrays[told]
            real = (tokens > 0 if tokens.ndim == 2 else np.ones(tokens.shape[:2])).astype(np.int32)
            arrays.setdefault(f"{side}_segment_ids", real)
            arrays.setdefault(f"{side}_positions", np.arange(real.shape[1], dtype=np.int32) * real)
    return {name: array for name, array in arrays.items() if name not in left_out}


def _spread(array: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns [num_rows, ...] with `array` [rows, ...] at `rows`, 0 elsewhere."""
    if len(rows) == num_rows:
        return array
    spread = np.zeros((num_rows, *array.shape[1:]), array.dtype)
    spread[rows] = array
    return spread
