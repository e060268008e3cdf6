"""Builds the offline cache of seqio tasks: all splits of all leaves of a mixture, in several processes.

Each shard is moved into place when it is complete, so a build that is killed loses only unfinished shards, and
continues when it is run again. A directory holds one version of a task: its fingerprint is written first.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data import seqio_adapter, seqio_caches, seqio_sources, seqio_steps
from meshway.framework.data.cache import fingerprint as task_fingerprint
from meshway.framework.data.cache import format as cache_format
from meshway.framework.data.cache import shards as cache_shards
from meshway.framework.data.cache.shards import BuiltSplit, Shard, failures_of, finished_shard, replace, working
from meshway.framework.data.cache.workers import CacheProgress, Job, run_jobs
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.seqio_caches import SeqioCache
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import local_path

NUM_SHARDS = 8
_TINY = 20_000  # source examples that are written in less time than another process needs to import TensorFlow


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A task to be cached."""

    task: Any
    provider: str
    splits: list[str]
    num_shards: int
    directory: Path
    info: dict[str, Any]
    imported: SeqioCache | None

    @property
    def features(self) -> dict[str, FeatureInfo]:
        return cache_format.features_from_json(self.info["features"])

    @property
    def fingerprint(self) -> str:
        return self.info["fingerprint"]


def build(
    names: Sequence[str],
    modules: Sequence[str],
    directory: str | Path,
    splits: Sequence[str] | None = None,
    num_shards: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    max_bad_examples: int = 0,
    progress: bool = True,
    from_seqio: str | None = None,
    part: tuple[int, int] = (1, 1),
) -> list[BuiltSplit]:
    """Caches tasks; complete shards of an earlier build are kept.

    What seqio's script has cached, in `from_seqio` or one of seqio's global cache directories, is taken from there.

    Args:
      names: of registered tasks and mixtures; of a mixture every leaf is cached.
      modules: names of the Python modules whose import registers them.
      directory: CACHE_DIR; each task gets a folder of its name in it.
      splits: which, None for all a task has.
      num_shards: of each split; None for as many as an existing cache has (seqio's, for one), else 8.
      num_workers: processes; None for one per core, or only this process if there is little data.
      overwrite: first remove the tasks' caches, with all their splits.
      max_bad_examples: source examples of a split that may fail in a preprocessor; they are left out and counted.
      progress: show progress.
      from_seqio: where seqio's script cached these tasks, all of them; None looks in its global cache directories.
      part: (I, N): build the I-th of N parts of the shards, as other machines do the others in the same directory, or
        in one of their own that is copied together. Whoever finds all shards there completes the cache.

    Returns:
      the requested splits, task by task; without those of tasks that other parts have not finished.

    Raises:
      UserError: a task, an example or an argument is at fault, or the directory holds another version of a task.
      EnvironmentFailure: a worker died, or the disk cannot be written.
    """
    for name, value, least in (
        ("num_shards", num_shards, 1),
        ("num_workers", num_workers, 1),
        ("max_bad_examples", max_bad_examples, 0),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if overwrite and part != (1, 1):
        raise UserError("--overwrite with --part would remove what other machines have made: remove the cache first")
    root = local_path(directory)
    with contextlib.ExitStack() as stack:
        stack.callback(seqio_sources.release)
        leaves: dict[str, tuple[str, Any]] = {}  # and the provider of each
        for name in names:
            for task in _leaves(name, modules, root, splits, from_seqio, overwrite):
                leaves.setdefault(task.name, (name, task))
        for name in leaves:
            cache_shards.check_folder(root / name)
        for name in leaves if overwrite else ():
            with failures_of(root / name), contextlib.suppress(FileNotFoundError):
                shutil.rmtree(root / name)
        imported = {name: seqio_caches.origin(task, root / name, from_seqio) for name, (_, task) in leaves.items()}
        shards = {name: num_shards or _num_shards(root / name, imported[name]) for name in leaves}
        _check_part(part, shards)  # before anything is written
        plans, works = [], {}
        for name, (provider, task) in leaves.items():
            works[name] = stack.enter_context(working(root / name, part == (1, 1)))
            plans.append(_plan(task, provider, root, splits, shards[name], works[name], imported[name]))
        return _build(plans, works, tuple(modules), num_workers, max_bad_examples, progress, part)


def _check_part(part: tuple[int, int], shards: Mapping[str, int]) -> None:
    index, count = part
    if not 1 <= index <= count:
        raise UserError(f"--part={index}/{count}: parts are numbered from 1, as 1/{max(count, 1)} for the first")
    for name, num_shards in shards.items():
        if count > num_shards:
            raise UserError(
                f"--part={index}/{count}: task {name!r} has {num_shards} shards a split, too few for "
                f"{count} parts; give all parts --num_shards={count} or more"
            )


def ensure(
    name: str,
    modules: Sequence[str],
    directory: str | Path,
    splits: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Path]:
    """Returns where each leaf of a task or mixture is cached: checks existing caches, and builds missing ones.

    Args:
      name: the registered task or mixture.
      modules: names of the Python modules whose import registers it.
      directory: CACHE_DIR.
      splits: which must be cached, as far as a task has them; None for all.
      options: of `build`, used if something is missing.

    Raises:
      UserError: a cache is stale, naming what changed; or as `build`.
    """
    root = local_path(directory)
    refuse_stale(name, modules, root, splits)
    if missing(name, modules, root, splits):
        build([name], modules, root, splits, **options)
    return {task.name: root / task.name for task in _leaves(name, modules, root, splits)}


def refuse_stale(name: str, modules: Sequence[str], directory: str | Path, splits: Sequence[str] | None = None) -> None:
    """Checks those leaves of a task or mixture that are cached; UserError for a stale one, naming what changed."""
    root = local_path(directory)
    for task in _leaves(name, modules, root, splits):
        if (root / task.name / "info.json").is_file():
            task_fingerprint.refuse(root / task.name, task_fingerprint.stale(root / task.name, task))


def missing(name: str, modules: Sequence[str], directory: str | Path, splits: Sequence[str] | None = None) -> list[str]:
    """Returns the splits, as 'TASK/SPLIT', that `ensure` would build, or check again because later steps changed."""
    root = local_path(directory)
    found = []
    for task in _leaves(name, modules, root, splits):
        moved = (root / task.name / "info.json").is_file() and task_fingerprint.later_steps_differ(
            root / task.name, task
        )
        for split in _wanted(task, root, splits):
            if moved or not (root / task.name / split / "index.json").is_file():
                found.append(f"{task.name}/{split}")
    return found


def _leaves(
    name: str,
    modules: Sequence[str],
    root: Path,
    splits: Sequence[str] | None,
    from_seqio: str | None = None,
    anew: bool = False,
) -> list[Any]:
    """Returns the tasks of a task or mixture, without those that have none of `splits`; `anew`: whatever is cached."""
    tasks = seqio_adapter.subtasks(seqio_adapter.find_provider(name, modules))
    having = {task.name: seqio_caches.splits(task, None if anew else root / task.name, from_seqio) for task in tasks}
    for split in splits or ():
        known = sorted({each for own in having.values() for each in own})
        if split not in known:
            raise UserError(f"{name!r} has no split {split!r} to cache; it has {known}{did_you_mean(split, known)}")
    return [task for task in tasks if splits is None or set(splits) & set(having[task.name])]


def _wanted(task: Any, root: Path, splits: Sequence[str] | None) -> list[str]:
    known = seqio_caches.splits(task, root / task.name)
    return [split for split in known if splits is None or split in splits]


def _num_shards(directory: Path, imported: SeqioCache | None) -> int:
    """Returns how many shards a split has where nobody says: as many as there are, or as seqio's cache has."""
    path = directory / "info.json"
    if path.is_file():
        return cache_format.read_json(path)["parts"]["number of shards"]
    return imported.num_shards if imported else NUM_SHARDS


def _plan(
    task: Any,
    provider: str,
    root: Path,
    splits: Sequence[str] | None,
    num_shards: int,
    work: Path,
    imported: SeqioCache | None,
) -> _Plan:
    """Reads or writes a task's info.json."""
    directory = root / task.name
    path = directory / "info.json"
    old = cache_format.read_json(path) if path.is_file() else None
    wanted = [split for split in (imported or task).splits if splits is None or split in splits]
    divided = seqio_steps.divide_steps(task)
    with seqio_adapter.task_errors(task.name, "fingerprint"):
        parts = task_fingerprint.parts(task, divided.cached, num_shards, imported.identity if imported else None)
    reading = {  # what may change without the examples
        "cut": {
            "cached": [task_fingerprint.qualified_name(step) for step in divided.cached],
            "online": [task_fingerprint.qualified_name(step) for step in divided.online],
            "online_from": divided.online_from,
            "reason": divided.reason,
        },
        "online": seqio_steps.online_entries(task),
    }
    if old is None:
        info = {
            "format": cache_format.FORMAT,
            "task": task.name,
            "fingerprint": task_fingerprint.fingerprint(parts),
            "parts": parts,
            "features": cache_format.features_to_json(
                seqio_caches.features(task, imported) if imported else seqio_steps.features(task, wanted)
            ),
            "declared": cache_format.features_to_json(seqio_steps.declared(task)),
            "vocabularies": cache_shards.save_vocabularies(task, directory, work),
        }
        if imported:
            info["seqio_cache"] = dataclasses.asdict(imported)
        with failures_of(path):
            _write_first(path, info | reading, work)
        old = cache_format.read_json(path)  # another builder may have written it first
    task_fingerprint.refuse(directory, task_fingerprint.changes(old["parts"], parts))
    if {name: old[name] for name in reading} != reading:
        old |= reading
        with failures_of(path):
            replace(path, _text(old), work)
    return _Plan(task, provider, wanted, num_shards, directory, old, imported)


def _text(info: dict[str, Any]) -> bytes:
    return (json.dumps(info, indent=1) + "\n").encode()


def _write_first(path: Path, content: dict[str, Any], work: Path) -> None:
    """Writes a file unless it exists: of two builders that start together, one decides the version."""
    temporary = work / path.name
    temporary.write_bytes(_text(content))
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)


def _build(
    plans: Sequence[_Plan],
    works: dict[str, Path],
    modules: tuple[str, ...],
    num_workers: int | None,
    max_bad: int,
    progress: bool,
    part: tuple[int, int],
) -> list[BuiltSplit]:
    jobs: list[Job] = []
    notes: list[str] = []
    for plan in plans:
        how = f"imports {plan.imported.directory}, which is" if plan.imported else "caches"
        notes.append(f"task {plan.task.name}: {how} {plan.info['cut']['reason']}")
        there = 0
        shards = itertools.product(plan.splits, range(plan.num_shards))
        for split, shard in itertools.islice(shards, part[0] - 1, None, part[1]):
            found = finished_shard(plan.directory / split, shard, plan.num_shards, plan.fingerprint, check_bytes=True)
            there += isinstance(found, Shard)
            if isinstance(found, str):
                notes.append(f"{found}: it is built again")
            if not isinstance(found, Shard):
                (plan.directory / split / "index.json").unlink(missing_ok=True)
                names = (plan.provider, modules, plan.task.name, split, shard, plan.num_shards, max_bad)
                where = (plan.directory, works[plan.task.name], plan.imported)
                job = Job(len(jobs), *names, plan.features, plan.fingerprint, *where)
                jobs.append(job)
        if there:
            mine = len(range(part[0] - 1, len(plan.splits) * plan.num_shards, part[1]))
            notes.append(f"task {plan.task.name}: {there} of {mine} shards are there")
    times: dict[tuple[str, str], list[float]] = {}
    if jobs:
        expected = _expected(plans, jobs)
        if num_workers is None:
            tiny = expected is not None and expected <= _TINY
            num_workers = 1 if tiny else min(os.cpu_count() or 1, len(jobs))
        display = CacheProgress(len(jobs), expected) if progress else None
        with display or contextlib.nullcontext():
            for note in notes if display else ():
                display.note(note)  # type: ignore[union-attr]
            run_jobs(jobs, num_workers, functools.partial(_report, display, times))
    built = []
    for plan in plans:
        if part != (1, 1) and not all(
            isinstance(finished_shard(plan.directory / split, shard, plan.num_shards, plan.fingerprint, False), Shard)
            for split in plan.splits
            for shard in range(plan.num_shards)
        ):
            continue  # the last of the parts finishes it
        built += _finish(plan, works[plan.task.name], max_bad, times)
    return built


def _expected(plans: Sequence[_Plan], jobs: Sequence[Job]) -> int | None:
    """Returns how many source examples the missing shards are made from; None if a source does not report it."""
    total = 0.0
    for plan in plans:
        for split in plan.splits:
            missing = sum((job.task, job.split) == (plan.task.name, split) for job in jobs)
            count = plan.imported.count(split) if plan.imported else None
            if count is None:
                count = seqio_sources.source_count(plan.task, split) if missing else 0
            if count is None:
                return None
            total += count * missing / plan.num_shards
    return round(total)


def _report(
    display: CacheProgress | None,
    times: dict[tuple[str, str], list[float]],
    job: Job,
    examples: int,
    done: bool,
) -> None:
    now = time.monotonic()
    times.setdefault((job.task, job.split), [now, now])[1] = now
    if display:
        (display.finish if done else display.update)(job.number, examples)


def _finish(plan: _Plan, work: Path, max_bad: int, times: dict[tuple[str, str], list[float]]) -> list[BuiltSplit]:
    """Writes the indices of a task's splits and its statistics; UserError if too many examples are bad, or none good.

    Files that are right already are written again, with the same bytes.
    """
    name, directory = plan.task.name, plan.directory
    found: dict[str, list[Shard]] = {}
    for split in plan.splits:
        shards = []
        for shard in range(plan.num_shards):
            one = finished_shard(directory / split, shard, plan.num_shards, plan.fingerprint, check_bytes=False)
            if not isinstance(one, Shard):
                raise UserError(f"{one or directory / split}: another process changes this cache; run it again")
            shards.append(one)
        found[split] = shards
        bad = [line for shard in shards for line in shard.bad]
        if plan.imported and sum(shard.examples for shard in shards) + len(bad) != plan.imported.count(split):
            raise UserError(
                f"the files of split {split!r} in {plan.imported.directory} hold "
                f"{sum(shard.examples for shard in shards) + len(bad):,} examples, but stats.{split}.json says "
                f"{plan.imported.count(split):,}: the cache is damaged, or written again since; write it once more"
            )
        if len(bad) > max_bad:
            raise UserError(
                f"task {name!r}, split {split!r} has {len(bad)} bad examples, {max_bad} allowed by --max_bad_examples; "
                f"the first: {bad[0]}"
            )
    if not any(shard.examples for shards in found.values() for shard in shards):
        raise UserError(f"task {name!r} has no examples to cache in {', '.join(map(repr, plan.splits))}")
    built = []
    for split, shards in found.items():
        cache_shards.write_index(directory / split, shards, plan.fingerprint, work)
        start, end = times.get((name, split), (0.0, 0.0))
        tokens = cache_shards.tokens(shards, plan.features)
        examples, size = sum(shard.examples for shard in shards), sum(shard.bytes for shard in shards)
        bad = [line for shard in shards for line in shard.bad]
        built.append(BuiltSplit(name, split, examples, tokens, size, bad, end - start))
    cache_shards.write_stats(directory, plan.features, work)
    return built
