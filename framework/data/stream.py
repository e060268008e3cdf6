"""The endless training stream over tasks held in memory: numpy only, and a position instead of hidden state.

A stream is a sequence of epochs; an epoch is a list of examples, a pure function of (seed, epoch, position of
its tasks), laid out in rows. Batch i is rows [i * B, (i + 1) * B) of all epochs' rows in a line, so a batch
may straddle two epochs and nothing is dropped.
"""

import dataclasses
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from meshway.framework.data.features import Converter
from meshway.framework.data.packing import Arrays, Example
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch

SLOW_SECONDS = 5.0  # an epoch that takes longer to read than this is worth a line
ROUND_EXAMPLES = 8192  # at most this many examples in one epoch of a mixture
ROUND_EPOCHS = 16  # and at most this many epochs of its smallest task


@dataclasses.dataclass(frozen=True)
class Source:
    """One task of a stream.

    Attributes:
      name: the task's name.
      rate: its share of a mixture, relative to the other sources' rates.
      read: epoch number -> that epoch's examples, in the task's own order; the same each time it is called.
    """

    name: str
    rate: float
    read: Callable[[int], list[Example]]


def epoch_seed(seed: int, name: str, epoch: int) -> int:
    """Returns the seed, below 2**31 - 2**16, of task `name`'s own randomness in one epoch."""
    state = np.random.SeedSequence([seed, epoch, zlib.crc32(name.encode()), 1]).generate_state(1)[0]
    return int(state) % (2**31 - 2**16)


def permutation(seed: int, name: str, epoch: int, count: int) -> np.ndarray:
    """Returns a random order of `count` examples, from Philox keyed by (seed, epoch, name).

    It sorts raw bits, whose stream numpy promises never to change; `Generator.permutation` has no such
    promise.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, zlib.crc32(name.encode())]))
    return np.argsort(bits.random_raw(count), kind="stable")


class Mixer:
    """Draws the examples of one epoch from one or several sources.

    With one source an epoch is the source's epoch. With several, each keeps its own endless stream of epochs,
    and an epoch of the mixture takes the next rate-proportional number of examples from each: no task's
    tail is lost because another ran out, and shares are exact rather than sampled. How many examples such
    an epoch has is fixed at the start of the run (`ROUND_EXAMPLES`, `ROUND_EPOCHS`, at most all tasks'
    examples together).
    """

    def __init__(self, sources: Sequence[Source], seed: int, shuffle: bool) -> None:
        self._sources = list(sources)
        self._seed = seed
        self._shuffle = shuffle
        self._loaded: dict[str, tuple[int, list[Example]]] = {}
        total = sum(source.rate for source in sources)
        self._shares = [source.rate / total for source in sources]

    def start(self) -> dict[str, int]:
        """Returns the position before the first epoch: {} with one source."""
        if len(self._sources) == 1:
            return {}
        sizes = [len(self._task_epoch(source, 0)) for source in self._sources]
        smallest = min(size / share for size, share in zip(sizes, self._shares, strict=True))
        examples = max(1, min(ROUND_EXAMPLES, sum(sizes), round(ROUND_EPOCHS * smallest)))
        position = {"examples": examples}
        for source in self._sources:
            position |= {f"{source.name}.epoch": 0, f"{source.name}.index": 0}
        return position

    def position_keys(self) -> set[str]:
        """Returns the keys of a position."""
        if len(self._sources) == 1:
            return set()
        return {"examples"} | {f"{s.name}.{part}" for s in self._sources for part in ("epoch", "index")}

    def epoch(self, epoch: int, position: Mapping[str, int]) -> tuple[list[Example], dict[str, int]]:
        """Returns (examples of `epoch`, which begins at `position`; position where the next begins)."""
        if len(self._sources) == 1:
            source = self._sources[0]
            examples = self._task_epoch(source, epoch)
            self._loaded.clear()  # no later epoch reads it again
            return examples, {}
        after = dict(position)
        drawn: list[Example] = []
        places: list[np.ndarray] = []
        for source, share in zip(self._sources, self._shares, strict=True):
            per_epoch = position["examples"] * share
            count = round((epoch + 1) * per_epoch) - round(epoch * per_epoch)
            drawn += self._take(source, count, after)
            places.append((np.arange(count) + 0.5) / max(count, 1))
        if self._shuffle:
            order = permutation(self._seed, "", epoch, len(drawn))
        else:
            order = np.argsort(np.concatenate(places), kind="stable")  # evenly interleaved
        return [drawn[i] for i in order], after

    def _take(self, source: Source, count: int, position: dict[str, int]) -> list[Example]:
        """Returns the next `count` examples of a source's endless stream and moves its position on."""
        taken: list[Example] = []
        epoch, index = position[f"{source.name}.epoch"], position[f"{source.name}.index"]
        while len(taken) < count:
            examples = self._task_epoch(source, epoch)
            part = examples[index : index + count - len(taken)]
            taken += part
            index += len(part)
            if index >= len(examples):
                epoch, index = epoch + 1, 0
        position |= {f"{source.name}.epoch": epoch, f"{source.name}.index": index}
        return taken

    def _task_epoch(self, source: Source, epoch: int) -> list[Example]:
        """Returns one epoch of a source in the order it is drawn; the last one read is kept."""
        loaded = self._loaded.get(source.name)
        if loaded is None or loaded[0] != epoch:
            examples = source.read(epoch)
            if not examples:
                raise UserError(f"task {source.name!r} has no examples to train on (epoch {epoch} is empty)")
            if self._shuffle:
                order = permutation(self._seed, source.name, epoch, len(examples))
                examples = [examples[i] for i in order]
            loaded = self._loaded[source.name] = (epoch, examples)
        return loaded[1]


class RowStream:
    """The `Dataset` of a training run.

    Args:
      name: what is read, for messages.
      mixer: where examples come from.
      converter: turns an epoch's examples into rows; packs them if `converter.pack`.
      lengths: TASK_FEATURE_LENGTHS, in tokens.
      batch_size: rows of a global batch.
      rows: this process's rows of each global batch.
    """

    def __init__(
        self,
        name: str,
        mixer: Mixer,
        converter: Converter,
        lengths: Mapping[str, int],
        batch_size: int,
        rows: slice,
    ) -> None:
        self._name = name
        self._mixer = mixer
        self._converter = converter
        self._lengths = dict(lengths)
        self._batch_size = batch_size
        self._rows = rows
        self._epoch = 0
        self._row = 0
        self._position: dict[str, int] | None = None  # where the epoch begins; None until it is first needed
        self._next_position: dict[str, int] = {}
        self._arrays: Arrays | None = None  # all rows of the epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts: list[Arrays] = []
        missing = self._batch_size
        while missing:
            arrays, count = self._load()
            if self._row >= count:
                self._epoch, self._row = self._epoch + 1, 0
                self._position, self._arrays = self._next_position, None
                continue
            stop = min(self._row + missing, count)
            parts.append({name: array[self._row : stop] for name, array in arrays.items()})
            missing -= stop - self._row
            self._row = stop
        return {name: np.concatenate([part[name] for part in parts])[self._rows] for name in parts[0]}

    def state(self) -> dict[str, int]:
        """Returns {'epoch', 'row'} after the last batch; for a mixture also where its tasks stand."""
        if self._position is None:
            self._position = self._mixer.start()
        return {"epoch": self._epoch, "row": self._row} | self._position

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a position, reading no epoch before it; raises UserError if it belongs to other tasks."""
        expected = {"epoch", "row"} | self._mixer.position_keys()
        if set(state) != expected:
            raise UserError(
                f"the saved data position does not fit {self._name!r}: it has {sorted(state)}, not "
                f"{sorted(expected)}; was the checkpoint made with another MIXTURE_OR_TASK_NAME?"
            )
        if (self._epoch, self._position) != (state["epoch"], self._mixer_part(state)):
            self._arrays = None
        self._epoch, self._row = int(state["epoch"]), int(state["row"])
        self._position = self._mixer_part(state)

    def spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._converter.spec(self._lengths, self._batch_size))

    def _mixer_part(self, state: Mapping[str, int]) -> dict[str, int]:
        return {key: int(state[key]) for key in self._mixer.position_keys()}

    def _load(self) -> tuple[Arrays, int]:
        """Returns (the current epoch's arrays, how many rows they have), reading them if need be."""
        if self._arrays is None:
            began = time.perf_counter()
            if self._position is None:
                self._position = self._mixer.start()
            examples, self._next_position = self._mixer.epoch(self._epoch, self._position)
            self._arrays = self._converter.rows(examples, self._lengths, packed=self._converter.pack)
            seconds = time.perf_counter() - began
            if seconds > SLOW_SECONDS:
                rows = len(next(iter(self._arrays.values())))
                print(
                    f"data: read epoch {self._epoch} of {self._name} in {seconds:.1f} s: "
                    f"{len(examples):,} examples, {rows:,} rows",
                    file=sys.stderr,
                )
        return self._arrays, len(next(iter(self._arrays.values())))
