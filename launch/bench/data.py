"""meshway bench data: how fast a recipe's examples become batches, stage by stage, beside seqio doing the same work.

    meshway bench data --gin_file=recipes/quickstart.gin
    meshway bench data --batches=100000 --gin_file=...    # and how much memory that takes
    meshway bench data --corpus_size=1000000,50000000 --gin_file=...    # instead, corpora of such sizes

Every stage gets a slice of each round, and the order is reversed from one round to the next, so that what
slows the machine down for a while slows both sides. Figures are medians over rounds, ratios are of medians.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meshway.framework.data import seqio_adapter
from meshway.framework.data.cached_task import bare_split
from meshway.framework.data.features import EncoderDecoder, LanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.objective import FeatureInfo, Objective, TaskInfo, VocabularyInfo
from meshway.framework.data.prefetch import prefetch
from meshway.framework.data.rows.examples import Examples, InMemory
from meshway.framework.errors import UserError
from meshway.framework.terminal import format_columns
from meshway.launch.bench import caching, corpus, stages
from meshway.launch.bench.rounds import STATUS, require_at_least, resident_mib
from meshway.launch.bench.stages import Loading, Packing, Planning, Reading, Sample, Seeking, Stage, log_normal

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation

_ROUNDS = 5  # as many as the stages' shares of the time are for
_MEMORY_SHARE = 0.15  # of the time, where the number of batches is not given
_SEEK = 1_000_000
_PACKED = 34  # examples packed from memory in a round, by second of the whole: what seqio manages in its slice
_MOST_IN_MEMORY = 8192
_PER_CORE = "examples/s a core"
_MIXES: tuple[dict[str, int], ...] = ({"inputs": 512, "targets": 114}, {"targets": 2048})

MakeData = Callable[..., CachedData]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One task of what the recipe reads.

    Attributes:
      name: its name.
      objective: the recipe's, bound to it.
      examples: of the training split, as cached.
      online: whether steps in TensorFlow run between the cache and the objective.
      twin: the seqio feature converter that does what the objective does, None if there is none.
    """

    name: str
    objective: Objective
    examples: Examples
    online: bool
    twin: str | None


class Bench:
    """The stages of one recipe.

    Args:
      make_data: the recipe's `CachedData`, to be called with other arguments.
      seconds: for all stages together, and memory where `batches` is not given.
      workers: the loader is timed with 1, 2, ... so many processes, beside a thread.
      cores: how many processes can run at once.

    Attributes:
      notes: what a reader of the table must know.
    """

    def __init__(self, make_data: MakeData, seconds: float, workers: int, cores: int) -> None:
        self.make_data = make_data
        self.data = make_data(num_workers=0)
        self.seconds = seconds
        self.cores = cores
        self.notes: list[str] = []
        self.stages: list[Stage] = []
        self.pairs: list[tuple[str, str]] = []  # names: ours, seqio's
        self._workers = workers
        self._split = bare_split(self.data.train_split)
        self._leaves = [self._leaf(task) for task in self.data.tasks if self._split in task.splits]
        self._with_seqio = seqio_adapter.installed()
        if self._with_seqio and self._split != self.data.train_split:
            self.notes.append(f"caches, and what seqio reads from its source, are of all of {self._split!r}")
        if not self._with_seqio:
            self.notes.append("seqio is not installed: nothing to compare with")

    def add_stages(self) -> None:
        """Makes all stages; seqio's where it can do the same work."""
        self.stages.append(Reading([leaf.examples for leaf in self._leaves]))
        for leaf in self._leaves:
            if leaf.online:
                self.notes.append(f"{leaf.name} has steps of TensorFlow after its cache: it is not packed on its own")
            elif leaf.objective.row_lengths and self.data.converter.pack:
                self._add_packing(leaf)
        for lengths in _MIXES:
            self._add_packing(_mix(lengths))
        self._add_loaders()
        self.stages.append(Seeking(lambda: self._stream(self.data.name, 0), _SEEK))

    def measure_memory(self, batches: int | None) -> dict[str, float]:
        """Reads batches as training does; returns how many, and MiB resident at the start and along the way.

        Returns {}, with a note, where the system does not tell: on Linux it does.
        """
        if not STATUS.is_file():
            self.notes.append(f"memory is not measured: there is no {STATUS}")
            return {}
        start = resident_mib()
        limit = self.seconds * _MEMORY_SHARE
        seen: list[tuple[int, float]] = []
        begin, done = time.perf_counter(), 0
        with contextlib.closing(prefetch(self._stream(self.data.name, 0))) as stream:
            while True:
                next(stream)
                done += 1
                passed = time.perf_counter() - begin
                share = done / batches if batches else passed / limit
                if share >= (len(seen) + 1) / 100:
                    seen.append((done, resident_mib()))
                if share >= 1:
                    break
        result: dict[str, float] = {"batches": done, "seconds": passed, "start MiB": start}
        for percent in (10, 50, 100):
            result[f"{percent} % MiB"] = next(mib for at, mib in seen if at >= done * percent / 100)
        return result

    def _leaf(self, task: Any) -> Leaf:
        objective, examples, online = self.data.open_task(task, self.data.train_split)
        twin = None if online else stages.twin(objective, examples.sizes)
        return Leaf(task.name, objective, examples, online, twin)

    def _stream(self, name: str, workers: int) -> Any:
        data = self.data
        if workers or name != data.name:
            data = self.make_data(mixture_or_task_name=name, num_workers=workers)
        return data.train(slice(0, data.batch_size))

    def _add_packing(self, leaf: Leaf) -> None:
        self.stages.append(Planning(f"plan {leaf.name}", leaf.objective, leaf.examples))
        least = max(leaf.objective.row_lengths.values())  # seqio packs so many examples together, on one core
        count = int(np.clip(self.seconds * _PACKED, 64, 16384))
        if count >= least:
            count = max(count // least, self.cores) * least
        chosen = np.sort(np.random.default_rng(0).permutation(len(leaf.examples))[:count])
        ours = Packing(f"pack {leaf.name}", leaf.objective, InMemory(leaf.examples.read(chosen)))
        self.stages.append(ours)
        if self._with_seqio and leaf.twin:
            name = f"pack {leaf.name}: seqio"
            lengths = leaf.objective.row_lengths
            self._add_twin(ours.name, lambda: stages.SeqioPacking(name, ours.converted, lengths, self.data.batch_size))

    def _add_loaders(self) -> None:
        name = self.data.name
        counts = [0] if any(leaf.online for leaf in self._leaves) else range(self._workers + 1)
        for workers in counts:
            self.stages.append(Loading(_loader(name, workers), functools.partial(self._stream, name, workers), workers))
        if not self._with_seqio:
            return
        leaf = next((leaf for leaf in self._leaves if leaf.twin), None)
        if leaf is None:
            self.notes.append(
                "seqio has no feature converter that does what this recipe's does: its loader stands alone"
            )
            return
        if not all(one.twin for one in self._leaves):
            self.notes.append(
                f"seqio has no twin of {type(self.data.converter).__name__}: its pipeline is compared on {leaf.name} "
                "alone, whose examples pass through as they are"
            )
            name = leaf.name
            self.stages.append(Loading(_loader(name, 0), functools.partial(self._stream, name, 0), 0))
        self._add_pipelines(leaf, name)

    def _add_pipelines(self, leaf: Leaf, name: str) -> None:
        assert leaf.twin is not None
        data, ours = self.data, _loader(name, 0)
        lengths = {feature: data.lengths[feature] for feature in data.converter.task_features}
        arguments = (lengths, leaf.twin, data.converter.pack, data.batch_size, 0)
        title = f"load {name}: seqio"
        self._add_twin(
            ours,
            lambda: stages.SeqioLoading(f"{title}, its source", stages.pipeline(name, self._split, *arguments)),
        )
        if len(self._leaves) == 1 or name != data.name:
            examples = leaf.examples.read(np.arange(min(len(leaf.examples), _MOST_IN_MEMORY)))
            self._add_twin(
                ours,
                lambda: stages.SeqioLoading(f"{title}, from memory", stages.pipeline_from_memory(examples, *arguments)),
            )

    def _add_twin(self, ours: str, make: Callable[[], Stage]) -> None:
        """Adds a stage of seqio's, or a note where seqio cannot do it."""
        try:
            stage = make()
            self.pairs.append((ours, stage.name))
            self.stages.append(stage)
        except UserError as error:
            self.notes.append(f"seqio cannot: {error}")

    def warm_up(self, seconds: float) -> None:
        """Runs each stage for a moment: starts what it needs, drops, with a note, what seqio turns out not to do."""
        for stage in list(self.stages):
            try:
                stage.once(seconds / len(self.stages))
            except UserError as error:
                if not isinstance(stage, (stages.SeqioPacking, stages.SeqioLoading)):
                    raise
                self.stages.remove(stage)
                self.pairs = [pair for pair in self.pairs if pair[1] != stage.name]
                self.notes.append(f"seqio cannot: {error}")


def measure(
    data: MakeData,
    seconds: float = 45,
    batches: int | None = None,
    workers: int | None = None,
    as_json: bool = False,
    imported: Sequence[str] = (),
    corpus_size: str | int | None = None,
) -> dict[str, Any]:
    """Times the path from a recipe's examples to batches and prints what it found.

    Args:
      data: the recipe's `CachedData`, called with other arguments than the recipe's.
      seconds: for all that is timed in turn. Starting it and building a cache come on top, and `batches` where that
        is given.
      batches: over how many batches memory is watched; None for as many as fit the time.
      workers: the loader is timed with 1, 2, ... so many processes; None for one a core, 4 at most.
      as_json: print everything as JSON too, on one line that begins with RESULT.
      imported: modules that the recipe itself imports, which may register tasks.
      corpus_size: `sizes` of `corpus.measure`, which is then called instead.

    Returns:
      what was printed, as JSON holds it.

    Raises:
      UserError: an argument is out of range, or the recipe's data cannot be read.
    """
    require_at_least(1, "bench.data.measure", seconds=seconds, batches=batches)
    require_at_least(0, "bench.data.measure", workers=workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def make(**given: Any) -> CachedData:
        made = data(**given)
        made.import_first(imported)
        return made

    if corpus_size is not None:
        return corpus.measure(make(num_workers=0), corpus_size, as_json)
    bench = Bench(make, seconds, min(cores, 4) if workers is None else workers, cores)
    _say(f"watching memory while {bench.data.name} is read")
    memory = bench.measure_memory(batches)
    cached: dict[str, dict[str, Any]] = {}
    if seqio_adapter.installed():
        _say("building the cache once more, in a temporary directory")
        cached = {name: summary([sample]) for name, sample in caching.measure(bench.data).items()}
        bench.pairs.append(("cache", "cache: seqio"))
    samples = _timed(bench)
    timed = cached | {name: summary(taken) for name, taken in samples.items()}
    ratios = [{"ours": ours, "seqio": theirs, "ratio": _ratio(timed, ours, theirs)} for ours, theirs in bench.pairs]
    found = {
        "name": bench.data.name,
        "lengths": bench.data.lengths,
        "batch_size": bench.data.batch_size,
        "cores": cores,
        "rounds": len(next(iter(samples.values()))),
        "stages": timed,
        "ratios": ratios,
        "memory": memory,
        "notes": bench.notes,
    }
    print(format_table(found))
    if as_json:
        print(f"\nRESULT {json.dumps(found)}", flush=True)
    return found


def _timed(bench: Bench) -> dict[str, list[Sample]]:
    """Times all stages of a bench in turn; returns their samples by name."""
    with contextlib.ExitStack() as stack:
        bench.add_stages()
        for stage in bench.stages:
            if isinstance(stage, Loading):
                stack.callback(stage.close)
        _say(f"starting {len(bench.stages)} stages, to be timed in turn for {bench.seconds:.0f} s")
        bench.warm_up(bench.seconds / _ROUNDS / 4)
        return interleaved(bench.stages, bench.seconds * (1 - _MEMORY_SHARE))


def interleaved(timed: Sequence[Stage], seconds: float) -> dict[str, list[Sample]]:
    """Times stages in turn until the time is over, at least once each; returns the samples of each, by name."""
    whole = sum(stage.share for stage in timed) * _ROUNDS
    samples: dict[str, list[Sample]] = {stage.name: [] for stage in timed}
    begin = time.perf_counter()
    for number in itertools.count(1):
        for stage in timed if number % 2 else reversed(timed):
            samples[stage.name].append(stage.once(seconds * stage.share / whole))
        passed = time.perf_counter() - begin
        if passed + passed / number / 2 > seconds:
            break
    return samples


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Returns the medians over samples: seconds, every count by the second, densities."""
    found: dict[str, Any] = {"seconds": statistics.median(sample.seconds for sample in samples)}
    for name in samples[0].counts:
        found[f"{name}/s"] = statistics.median(sample.counts[name] / sample.seconds for sample in samples)
    if all(sample.core_seconds for sample in samples):
        rates = [sample.counts["examples"] / sample.core_seconds for sample in samples]
        found[_PER_CORE] = statistics.median(rates)
    if samples[0].density:
        names = samples[0].density
        found["density"] = {name: statistics.median(sample.density[name] for sample in samples) for name in names}
    return found


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _ratio(timed: Mapping[str, Mapping[str, float]], ours: str, theirs: str) -> float:
    usual = "tokens/s" if timed[theirs]["tokens/s"] else "examples/s"
    unit = _PER_CORE if _PER_CORE in timed[theirs] else usual
    return timed[ours][unit] / timed[theirs][unit]


def _mix(lengths: dict[str, int]) -> Leaf:
    """Returns a synthetic task of log-normal lengths."""
    converter = EncoderDecoder() if "inputs" in lengths else LanguageModel()
    feature = FeatureInfo("int32", (None,), VocabularyInfo(1000, 1))
    objective = converter.bind(TaskInfo("log-normal", dict.fromkeys(lengths, feature)), lengths)
    examples = log_normal(lengths, 16384)
    name = f"log-normal {'/'.join(map(str, lengths.values()))}"
    return Leaf(name, objective, examples, False, stages.twin(objective, examples.sizes))


def _loader(name: str, workers: int) -> str:
    return f"load {name}: {f'{workers} processes' if workers > 1 else '1 process' if workers else 'thread'}"


def format_table(found: Mapping[str, Any]) -> str:
    """Returns what `measure` found as text."""
    rows = [["stage", "examples/s", "tokens/s", "batches/s", ""]]
    ratios = {entry["seqio"]: entry["ratio"] for entry in found["ratios"]}
    for name, stage in found["stages"].items():
        if name == "seek":
            continue
        cells = [f"{stage[unit]:,.0f}" if stage.get(unit) else "-" for unit in rows[0][1:4]]
        details = [f"{feature} {share:.1%} dense" for feature, share in stage.get("density", {}).items()]
        if "megabytes/s" in stage:
            details.append(f"{stage['megabytes/s']:.1f} MB/s, {stage['seconds']:.1f} s in all")
        if each := stage.get(_PER_CORE):
            details.append(f"{each:,.0f} {_PER_CORE}")
        if name in ratios:
            details.append(f"meshway: {ratios[name]:.1f} times as fast{' a core' if each else ''}")
        rows.append([name, *cells, ", ".join(details)])
    lines = format_columns(rows, right=range(1, 4))
    lines += [
        "",
        f"seek to batch {_SEEK:,}, stream opened and planned anew: {found['stages']['seek']['seconds']:.3f} s",
    ]
    if memory := found["memory"]:
        resident = ", ".join(f"{memory[f'{percent} % MiB']:,.1f} at {percent} %" for percent in (10, 50, 100))
        lines.append(
            f"resident MiB over {memory['batches']:,} batches in {memory['seconds']:.0f} s: "
            f"{memory['start MiB']:,.1f} at the start, {resident}"
        )
    lines.append(
        f"{found['name']}, {found['lengths']}, batch size {found['batch_size']}; {found['cores']} cores; medians of "
        f"{found['rounds']} rounds in turn"
    )
    return "\n".join([*lines, *found["notes"]])


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench data`."""
    from meshway.launch.recipe import config

    recipe = config.load(invocation)
    measure(**recipe.build("bench.data.measure"), imported=recipe.registering)
