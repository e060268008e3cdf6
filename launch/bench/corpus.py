"""meshway bench data --corpus_size=N,N: what it takes to open a corpus of N examples and to go anywhere in it.

The corpora are synthetic, and made of the files of a real cache: index, sizes of every example (log-normal), and shards
of array_record with their own index. Only the tokens are not real: an example of n tokens has one id n times, and all
shards are one file with as many names. So reading tokens from a cold disk is not measured.

Each figure is of a fresh process. Memory is the most that it had resident, less what its imports took.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data.cache import format as cache_format
from meshway.framework.data.cache.shards import write_index, write_shard
from meshway.framework.data.grain_loader import CachedData, CachedTask
from meshway.framework.data.objective import Converter, FeatureInfo, VocabularyInfo
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.vocabularies import Bytes
from meshway.framework.data.windowed_text import WindowedTextConverter
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.terminal import format_columns
from meshway.launch.bench.rounds import resident_mib

NAME = "corpus"
_SHARD = 250_000  # examples
_ID = 7  # of all tokens
_PASS = 5  # the pass into which one figure seeks, from 1
_TO = {"first batch": 0, "end of a pass": 1, "fifth pass": _PASS}


def measure(data: CachedData, sizes: str | int, as_json: bool = False) -> dict[str, Any]:
    """Makes corpora of these sizes one after the other, measures each, and prints a table of all.

    Args:
      data: the recipe's; its converter and lengths are those of the corpora.
      sizes: how many examples, as '1000000,50000000'.
      as_json: print everything as JSON too, on one line that begins with RESULT.

    Returns:
      `corpora`, a list: examples; rows, seconds and MiB of counting the rows of a pass; and by figure of `_TO` the
      batch, seconds to open, seconds in all, and MiB.

    Raises:
      UserError: a size is no number above 0.
    """
    found = []
    for size in _numbers(sizes):
        with tempfile.TemporaryDirectory(prefix="meshway-corpus-") as directory:
            count = write(Path(directory) / NAME, size, data.converter, data.lengths)
            given = (data.lengths, data.batch_size, data.converter, directory)
            rows = _in_fresh_process(_count, given)
            last = int(rows["rows"]) // data.batch_size - 1  # the last whole batch of the first pass
            batches = {name: last * number + (number > 1) for name, number in _TO.items()}
            figures = {name: _in_fresh_process(_go, given, batch) for name, batch in batches.items()}
        found.append({"examples": count, "rows": rows, "figures": figures})
    print(format_table(found, data))
    if as_json:
        print(f"\nRESULT {json.dumps({'corpora': found})}", flush=True)
    return {"corpora": found}


def _numbers(text: str | int) -> list[int]:
    parts = str(text).replace("_", "").split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(
            f"bench.data.measure.corpus_size must be numbers of examples, such as 1000000,50000000, not {text!r}"
        )
    return [int(part) for part in parts]


def write(task_directory: Path, count: int, converter: Converter, lengths: Mapping[str, int]) -> int:
    """Writes the cache of a synthetic task, its split `train` with about `count` examples; returns how many."""
    # Of text, a converter that makes pairs of it reads the targets alone, and divides those that are too long.
    is_text = isinstance(converter, WindowedTextConverter)
    names = ["targets"] if is_text else list(converter.task_features)
    vocabulary = Bytes(100)
    feature = FeatureInfo("int32", (None,), VocabularyInfo(vocabulary.size, vocabulary.eos_id, vocabulary.extra_ids))
    features = dict.fromkeys(names, feature)
    split, work = task_directory / "train", task_directory / "work"
    for path in (split, work, task_directory / "vocabularies"):
        path.mkdir(parents=True, exist_ok=True)
    for name in names:
        vocabulary.save(task_directory / "vocabularies", name)
    described = cache_format.features_to_json(features)
    info = {"format": cache_format.FORMAT, "task": task_directory.name, "fingerprint": NAME, "online": []}
    info |= {"features": described, "declared": described, "parts": {}, "cut": {"cached": [], "online": []}}
    (task_directory / "info.json").write_text(json.dumps(info))
    random = np.random.default_rng(0)
    shard = min(_SHARD, count)
    columns = {}
    for place, name in enumerate(names):
        length = sum(lengths.values()) if is_text else lengths[name]
        longest, median = length * (4 if len(names) == 1 else 1), max(1.0, min(np.exp(5 - 2 * place), length / 3))
        columns[name] = np.clip(random.lognormal(np.log(median), 0.8, shard), 1, longest).astype(np.int32)
    made = write_shard(
        ({name: np.full(columns[name][at], _ID, np.int32) for name in names} for at in range(shard)),
        *(features, split, 0, 1, NAME, [], work),
    )
    whole = count // shard
    if whole > 1:
        for number in range(whole):
            os.link(split / cache_format.shard_name(0, 1), split / cache_format.shard_name(number, whole))
        (split / cache_format.shard_name(0, 1)).unlink()
    write_index(split, [made] * whole, NAME, work)
    return whole * shard


def _open(given: tuple[Mapping[str, int], int, Converter, str]) -> RowStream:
    lengths, batch_size, converter, directory = given
    data = CachedData(NAME, lengths, batch_size, converter, cache_dir=directory, num_workers=0)
    data.tasks = [CachedTask(NAME, 1.0, Path(directory) / NAME, None)]  # seqio does not know it
    stream = data.train(slice(0, batch_size))
    assert isinstance(stream, RowStream)
    return stream


def _count(given: Any) -> dict[str, float]:
    """Counts the rows of the first pass, as `meshway cache` and a run in the background do."""
    stream = _open(given)
    (source,) = stream.sources
    assert isinstance(source, RowSource)
    return {"rows": source.rows_in_round(0), "processes": os.cpu_count() or 1}


def _go(given: Any, batch: int) -> dict[str, float]:
    """Opens the corpus and makes batch number `batch`."""
    begin = time.perf_counter()
    stream = _open(given)
    opened = time.perf_counter() - begin
    stream.seek(batch)
    next(stream)
    return {"batch": batch, "open": opened}


def _in_fresh_process(work: Any, *arguments: Any) -> dict[str, float]:
    """Returns what work(*arguments) returns in a fresh process, with the seconds it took and the MiB it added."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        process.join()
        ended = f"exit code {process.exitcode}; a negative one is the signal that killed it"
        raise EnvironmentFailure(f"the process that measures a corpus died ({ended}); see above") from error
    finally:
        process.join()


def _measured(connection: Any, work: Any, arguments: Sequence[Any]) -> None:
    import array_record.python.array_record_module  # noqa: F401 an import is not what is measured

    before, begin = resident_mib(), time.perf_counter()
    found = dict(work(*arguments))
    found["seconds"] = time.perf_counter() - begin
    found["MiB"] = resident_mib(most=True) - before
    connection.send(found)
    os._exit(0)  # counting ahead needs no end


def format_table(found: Sequence[Mapping[str, Any]], data: CachedData) -> str:
    """Returns what `measure` found as text."""
    rows = [["examples", "", "open s", "in all s", "MiB"]]
    for one in found:
        counted = one["rows"]
        rows.append([f"{one['examples']:,}", f"rows counted by {counted['processes']} processes", "-"])
        rows[-1] += [f"{counted['seconds']:.2f}", f"{counted['MiB']:.0f}"]
        for name, figure in one["figures"].items():
            rows.append(["", name, f"{figure['open']:.2f}", f"{figure['seconds']:.2f}", f"{figure['MiB']:.0f}"])
    lines = format_columns(rows, right=(0, 2, 3, 4))
    kind = type(data.converter).__name__
    lines.append(f"{kind}, {data.lengths}, batch size {data.batch_size}; each figure of a fresh process, after imports")
    return "\n".join(lines)
