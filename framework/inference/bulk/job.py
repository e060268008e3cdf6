"""A batch job over an input, chunk by chunk, each computed and committed once; and what a person sees of it."""

import collections
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.batches import Work, compute
from meshway.framework.inference.bulk.inputs import Example, Reader, Record, Share
from meshway.framework.inference.bulk.sources import Source
from meshway.framework.inference.bulk.store import ChunkStore
from meshway.framework.progress import Bar, Display, Screen, seconds_left
from meshway.framework.terminal import count_of


class JobProgress(Display):
    """Shows how many examples are done, how fast, and when it ends: on standard error, as standard output may be the
    result."""

    def __init__(self, total: int | None, **screen: Unpack[Screen]) -> None:
        """`total` counts records of the whole input, or of a share of it; None where nobody knows."""
        self._total, self._began = total, time.monotonic()
        self._done = self._skipped = self._tokens = 0
        super().__init__(sys.stderr, **screen)

    def skip(self, records: int) -> None:
        """Takes records that an earlier attempt computed."""
        self._skipped += records
        self.changed()

    def advance(self, examples: int, tokens: int) -> None:
        """Takes examples that were computed."""
        self._done += examples
        self._tokens += tokens
        self.changed()

    def bar(self) -> Bar:
        elapsed, total = max(time.monotonic() - self._began, 1e-9), self._total
        there = self._skipped + self._done
        of = "" if total is None else f" of {total:,}"
        left = seconds_left(elapsed, self._done, None if total is None else total - self._skipped)
        rates = [f"{self._done / elapsed:,.1f} examples/s", f"{self._tokens / elapsed:,.0f} tokens/s"]
        return Bar(f"{there:,}{of} examples", there, total, left, rates)


SHOWN = 5  # problems in one message


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a job cuts its input, and what it does with records that it cannot use.

    Attributes:
      chunk_size: records of a chunk, which is the unit that is committed.
      skip_bad: leave such records out and report them, instead of stopping.
      overwrite: compute chunks anew whose records have changed, instead of stopping.
      share: which chunks are computed.
    """

    chunk_size: int
    skip_bad: bool = False
    overwrite: bool = False
    share: Share = Share()

    def records_of_share(self, total: int) -> int:
        """Returns how many of `total` records are in the chunks of the share."""
        firsts = range(self.share.index * self.chunk_size, total, self.share.count * self.chunk_size)
        return sum(min(self.chunk_size, total - first) for first in firsts)


class Job:
    """Reads records, computes what they ask for, and commits the rows of each chunk.

    All processes of a run read the same input and compute together; only the first has a store and writes.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        work: Work,
        store: ChunkStore | None,
        policy: Policy,
        batch_size: int,
        progress: JobProgress,
    ):
        self._source, self._reader, self._work, self._store = source, reader, work, store
        self._policy, self._batch_size, self._progress = policy, batch_size, progress

    def run(self) -> list[str]:
        """Computes all chunks of its share that are not committed yet.

        Returns:
          the digest of the records of each chunk of the whole input.

        Raises:
          UserError: a record cannot be used, or is not what it was when its chunk was committed; the disk refuses.
        """
        done, digests = self._committed(), []

        def wanted(index: int) -> bool:
            number = index // self._policy.chunk_size
            return self._policy.share.owns(number) and (number not in done or self._policy.overwrite)

        records_of_all = self._source.records(wanted=wanted)
        for number, records in enumerate(_chunks(records_of_all, self._policy.chunk_size)):
            digest = _digest(records)
            digests.append(digest)
            if done.get(number, digest) != digest and not self._policy.overwrite:
                raise UserError(
                    f"chunk {number} ({records[0].place} to {records[-1].place}) is not what it was when it was "
                    "computed: the input has changed; give its old version, another --output, or --overwrite"
                )
            if not self._policy.share.owns(number):
                continue
            if done.get(number) == digest:
                self._progress.skip(len(records))
            else:
                self._compute(number, records, digest)
        return digests

    def _committed(self) -> dict[int, str]:
        """Returns the digest of each chunk that is there, on every process."""
        mine = {} if self._store is None else {n: each.digest for n, each in self._store.committed().items()}
        told = processes.barrier("what was computed before", None, json.dumps(mine))
        return {int(number): digest for number, digest in json.loads(told[0]).items()}

    def _compute(self, number: int, records: Sequence[Record], digest: str) -> None:
        began = time.monotonic()
        examples, problems = self._reader.read(records)
        if problems and not self._policy.skip_bad:
            more = f"\n  and {len(problems) - SHOWN} more in this chunk" if len(problems) > SHOWN else ""
            shown = "".join(f"\n  {problem}" for problem in problems[1:SHOWN]) + more
            raise UserError(
                f"{problems[0]}{shown}\nMend the input, or leave such records out: --on_bad=skip. What was computed "
                "before this chunk is kept"
            )
        rows, counts = self._rows(examples)
        counts |= {"examples": len(examples), "skipped": len(problems), "seconds": time.monotonic() - began}
        counts["truncated"] = sum(each.truncated for each in examples)
        if self._store is not None:
            self._store.commit(number, rows, digest, counts, problems)
        for problem in problems:
            self._progress.note(f"left out: {problem}")

    def _rows(self, examples: Sequence[Example]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Returns the output row of each example, in their order, and what was counted."""
        found: dict[int, dict[str, Any]] = {}
        counts: dict[str, float] = collections.defaultdict(float)
        for places, done in compute(self._work, examples, self._batch_size):
            found |= dict(zip(places, done.rows, strict=True))
            counts["read_tokens"] += done.read_tokens
            counts["made_tokens"] += done.made_tokens
            counts["padded_tokens"] += done.padded_tokens
            self._progress.advance(len(places), done.read_tokens + done.made_tokens)
        rows = [_row(each, found[place]) for place, each in enumerate(examples)]
        return rows, dict(counts)


def summary(store: ChunkStore) -> dict[str, Any]:
    """Returns what a job's chunks counted, those of earlier attempts too: examples, tokens, the share of places that
    were padding, and what was left out."""
    committed = store.committed()
    counts: dict[str, float] = collections.defaultdict(float)
    skipped: list[str] = []
    for number in sorted(committed):
        skipped += committed[number].skipped
        for name, value in committed[number].counts.items():
            counts[name] += value
    places = counts["read_tokens"] + counts["padded_tokens"]
    seconds = max(counts["seconds"], 1e-9)
    return {
        "examples": int(counts["examples"]),
        "skipped": int(counts["skipped"]),
        "truncated": int(counts["truncated"]),
        "read_tokens": int(counts["read_tokens"]),
        "made_tokens": int(counts["made_tokens"]),
        "padding": round(counts["padded_tokens"] / places, 4) if places else 0.0,
        "seconds": round(counts["seconds"], 3),
        "examples_per_second": round(counts["examples"] / seconds, 2),
        "tokens_per_second": round((counts["read_tokens"] + counts["made_tokens"]) / seconds, 1),
        "left_out": skipped,
    }


def lines_of(counts: Mapping[str, Any]) -> list[str]:
    """Returns a summary, with `programs` and `wall_seconds`, for people."""
    left_out = counts["left_out"]
    lines = [
        f"{counts['examples']:,} examples in {counts['wall_seconds']:,.1f} s: {counts['examples_per_second']:,} "
        f"examples/s, {counts['tokens_per_second']:,} tokens/s; {counts['read_tokens']:,} tokens read, "
        f"{counts['made_tokens']:,} made; {100 * counts['padding']:.1f} % of the input places were padding; "
        f"{counts['programs']} programs compiled",
        *of_truncated(counts["truncated"]),
        *(f"left out: {line}" for line in left_out[:20]),
    ]
    more = [f"left out: and {len(left_out) - 20:,} more, listed in the summary"] if len(left_out) > 20 else []
    return lines + more


def of_truncated(count: int) -> list[str]:
    """Returns how many examples were cut, for people; [] where none was."""
    return [f"truncated: the inputs of {count_of(count, 'example')}, which were too long"] if count else []


def of_shares(share: Share, num_chunks: int, missing: Sequence[int]) -> str:
    """Returns what a share that is done and has not made the result says of it, for people."""
    done = f"shard {share.index} of {share.count} is done"
    if num_chunks < share.count:
        done += f" ({count_of(num_chunks, 'chunk')} are too few for all: give a smaller --chunk_size)"
    if not missing:
        return f"{done}, and another job has made the result of all"
    shards = sorted({number % share.count for number in missing})
    whose = f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"
    return (
        f"{done}; {len(missing):,} of {count_of(num_chunks, 'chunk')} are to come from {whose}: the job that "
        "ends last makes the result, or the same command without --num_shards and --shard_id"
    )


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, size)):
        yield chunk


def _digest(records: Sequence[Record]) -> str:
    found = hashlib.sha256()
    for record in records:
        found.update(len(record.raw).to_bytes(8, "little"))
        found.update(record.raw)
    return found.hexdigest()


def _row(example: Example, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an output row: the place, the record's fields, what was computed. A field of the record whose name is
    taken, as where earlier results are read, is kept as `input_NAME`."""
    row: dict[str, Any] = {"index": example.index}
    for name, value in example.values.items():
        free = name
        while free in row or free in found or (free != name and free in example.values):
            free = f"input_{free}"
        row[free] = value
    return row | dict(found)
