"""Results of a job, committed chunk by chunk: each once, whatever moment the process is killed."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.files import io_errors
from meshway.framework.inference.bulk.batches import Encoding, JsonLines, TextLines, plain
from meshway.framework.inference.bulk.existing_output import (
    WRITTEN_BY,
    abandon,
    claimed,
    clear,
    refuse_strangers,
    settle,
)
from meshway.framework.inference.bulk.inputs import nearest
from meshway.framework.inference.bulk.outputs import OutputLock, move_durably, output_paths, remove, write_durably
from meshway.framework.inference.bulk.parquet import ParquetRows
from meshway.framework.terminal import count_of


@dataclasses.dataclass(frozen=True)
class Committed:
    """What is known of a chunk that is done.

    Attributes:
      digest: of the records that it answers, as given to `commit`.
      num_rows: its rows.
      counts: what the job counted, such as tokens.
      skipped: the records that have no row, and why.
    """

    digest: str
    num_rows: int
    counts: Mapping[str, float]
    skipped: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A committed chunk, and what its file must be: the content of its side file."""

    committed: Committed
    size: int
    sha256: str

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), allow_nan=False).encode()

    @staticmethod
    def from_json(content: bytes) -> "_Chunk":
        record = json.loads(content)
        return _Chunk(Committed(**record["committed"]), record["size"], record["sha256"])


class ChunkStore:
    """The output of one job: chunks in any order, one file or a folder of shards when all are there.

    `OUTPUT.jsonl` (or .json, .parquet, .txt) is one file in the end, its chunks lie in `OUTPUT.jsonl.parts/` until
    then, and `OUTPUT.jsonl.summary.json` tells of it. Another name is a folder: chunks lie in `OUTPUT/_parts/`, become
    its shards `part-00000-of-00012.jsonl`, and `OUTPUT/_summary.json` tells of them. A `.txt` holds predictions only
    (see `rows.TextLines`).

    How a kill at any moment loses nothing and repeats nothing: a chunk's file is written, put on disk and renamed;
    then, in the same way, its side file, which knows the size and hash of the first. A chunk is committed once its
    side file is there. Finishing first claims the names of the result, then makes it out of the chunks, then writes
    the summary, then removes the chunks; all of it can be done again until the summary is there, which says that the
    result is whole.
    """

    def __init__(
        self, output: str | os.PathLike[str], job: Mapping[str, str], format: str | None = None, overwrite: bool = False
    ) -> None:
        """Looks at names only.

        Args:
          output: the file or folder.
          job: what makes this job what it is, by name; chunks of one job never go on with those of another.
          format: 'jsonl' or 'parquet', of shards; a file's name tells its own.
          overwrite: remove another job's chunks or result, or this job's finished result, and replace chunks made
            from an input that has changed since. Other unfinished chunks of this very job are always gone on with,
            so that the same command goes on after a kill. Only files written by a ChunkStore are ever removed.

        Raises:
          UserError: the format does not fit the name, or there is no folder to write in.
        """
        self._paths = output_paths(Path(output), format)
        self._job = dict(job)
        self._overwrite = overwrite
        self._lock = OutputLock(self._paths.lock)
        self._rows: Encoding | None = None
        self._chunks: dict[int, _Chunk] = {}
        self._finished = False
        self._made_folder = False
        parent = self._paths.output.parent
        if not parent.is_dir():
            raise UserError(f"output {output}: no folder {str(parent)!r}{nearest(parent.name, parent.parent)}")

    def open(self) -> None:
        """Locks the output and reads what is there.

        Raises:
          UserError: another process is at work on it, it is another job's or not ours, or cannot be written.
        """
        paths = self._paths
        if paths.sharded and not paths.output.exists():
            with io_errors(paths.output), contextlib.suppress(FileExistsError):
                os.mkdir(paths.output)
                self._made_folder = True
        try:
            self._lock.acquire()
            self._finished = settle(paths, self._job, self._overwrite)
            if not self._finished:
                self._chunks = self._recovered()
                self._rows = self._row_format()
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> bool:
        """Whether this very job has finished here, before or by `finish`."""
        return self._finished

    def committed(self) -> dict[int, Committed]:
        """Returns the chunks that are done, by number, in order."""
        return {number: self._chunks[number].committed for number in sorted(self._chunks)}

    def commit(
        self,
        number: int,
        rows: Sequence[Mapping[str, Any]],
        digest: str,
        counts: Mapping[str, float],
        skipped: Sequence[str],
    ) -> None:
        """Writes a chunk; after return it survives the machine. One that is there already is left as it is.

        Args:
          number: its place among the chunks, from 0. One that was committed from other records is replaced, if the
            store may overwrite.
          rows: its results: text, numbers, lists, dicts, numpy arrays, None.
          digest: sha256 of the raw bytes of the records that it answers.
          counts: finite numbers.
          skipped: a line for each record that has no row.

        Raises:
          UserError: the chunk was committed from other records, the disk refuses, or the format cannot hold the rows.
        """
        known = self._chunks.get(number)
        if known is not None and known.committed.digest == digest:
            return
        if known is not None and not self._overwrite:
            raise UserError(
                f"chunk {number} of {self._paths.output} was made from other records: the input has changed since"
            )
        content = self._opened().encode(rows, f"chunk {number}")
        committed = Committed(digest, len(rows), plain(counts, strict=False), list(skipped))
        chunk = _Chunk(committed, len(content), hashlib.sha256(content).hexdigest())
        side = chunk.to_json()
        if known is not None:
            self._drop(number)
        write_durably(self._paths.chunk(number), self._paths.temporary, lambda file: file.write(content))
        write_durably(self._paths.side(number), self._paths.temporary, lambda file: file.write(side))
        self._chunks[number] = chunk

    def finish(self, num_chunks: int, summary: Mapping[str, Any]) -> Path:
        """Makes the result of all chunks, in order, writes the summary, removes the chunks.

        Args:
          num_chunks: how many there are.
          summary: what else the summary tells, beside `written_by`, `job`, `files`, `num_chunks` and `num_rows`; the
            lines of what was skipped are `left_out`, unless it says otherwise.

        Returns:
          the file, or the folder of shards.

        Raises:
          UserError: there are more chunks than that (the input has changed) and the store may not overwrite, a
            chunk's file was changed, somebody else's file lies where the result belongs, or the disk refuses.
          ValueError: a chunk is missing, or `summary` has a name that is taken.
        """
        if self._finished:
            return self._paths.output
        rows = self._opened()
        self._check_chunks(num_chunks)
        for number in range(num_chunks):
            self._check_content(number, num_chunks)
        self._claim(num_chunks)
        with io_errors(self._paths.output):
            if self._paths.sharded:
                self._make_shards(rows, num_chunks)
            else:
                chunks = [self._paths.chunk(number) for number in range(num_chunks)]
                write_durably(self._paths.output, self._paths.temporary, lambda file: rows.merge(chunks, file))
        content = self._summary(num_chunks, summary)
        write_durably(self._paths.summary, self._paths.temporary, lambda file: file.write(content))
        self._finished, self._rows = True, None
        clear(self._paths)
        self._lock.discard()
        return self._paths.output

    def close(self) -> None:
        """Gives the output back, with nothing of ours in it if no chunk was committed."""
        self._rows = None
        if not self._lock.held:
            return
        try:
            abandon(self._paths, self._job)
        finally:
            self._lock.discard()
            if self._made_folder:
                with contextlib.suppress(OSError):
                    os.rmdir(self._paths.output)  # if nothing is in it

    def _opened(self) -> Encoding:
        if self._rows is None:
            raise ValueError("the output is not open, or has finished")
        return self._rows

    def _row_format(self) -> Encoding:
        if self._paths.format != "parquet":
            return JsonLines() if self._paths.format == "jsonl" else TextLines()
        num_chunks = claimed(self._paths)
        return ParquetRows([self._content(number, num_chunks) for number in sorted(self._chunks)])

    def _content(self, number: int, num_chunks: int | None) -> Path:
        """Returns where a chunk's rows lie: under its own name until it was made a shard of `num_chunks`."""
        path = self._paths.chunk(number)
        if num_chunks is None or not self._paths.sharded or path.exists():
            return path
        return self._paths.shard(number, num_chunks)

    def _recovered(self) -> dict[int, _Chunk]:
        """Returns the chunks that are whole; side files without their chunk are removed."""
        chunks, num_chunks = {}, claimed(self._paths)
        for number, side in self._paths.sides():
            path = self._content(number, num_chunks)
            try:
                chunk = _Chunk.from_json(side.read_bytes())
                if path.stat().st_size == chunk.size:
                    chunks[number] = chunk
                    continue
            except FileNotFoundError:
                pass
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{side} is not what {WRITTEN_BY} wrote there ({error}): remove it") from error
            remove(side)
        return chunks

    def _drop(self, number: int) -> None:
        """Removes a chunk, if there is one."""
        remove(self._paths.side(number))
        self._chunks.pop(number, None)

    def _check_chunks(self, num_chunks: int) -> None:
        missing = [number for number in range(num_chunks) if number not in self._chunks]
        if missing:
            raise ValueError(f"{len(missing)} of {num_chunks} chunks are not committed, the first is {missing[0]}")
        before = claimed(self._paths)
        if self._overwrite and before is None:
            for number in [number for number in self._chunks if number >= num_chunks]:
                self._drop(number)
        if len(self._chunks) > num_chunks or before not in (None, num_chunks):
            held = count_of(before or len(self._chunks), "chunk")
            raise UserError(
                f"{self._paths.output} has {held} of this job, the input makes only {num_chunks} now: "
                "it has changed since"
            )

    def _check_content(self, number: int, num_chunks: int) -> None:
        """Raises UserError unless a chunk's file is what was written, to the byte."""
        path = self._content(number, num_chunks)
        with io_errors(path), open(path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == self._chunks[number].sha256
        if not same:
            self._drop(number)
            raise UserError(f"{path} was changed after it was written; run again to make this chunk anew")

    def _claim(self, num_chunks: int) -> None:
        if claimed(self._paths) is None:
            refuse_strangers(self._paths)
            content = json.dumps({"num_chunks": num_chunks}).encode()
            write_durably(self._paths.claim, self._paths.temporary, lambda file: file.write(content))

    def _make_shards(self, rows: Encoding, num_chunks: int) -> None:
        for number in range(num_chunks):
            chunk, shard = self._paths.chunk(number), self._paths.shard(number, num_chunks)
            if not chunk.exists():
                continue  # was renamed before this process
            if rows.is_final(chunk):
                move_durably(chunk, shard)
            else:
                write_durably(shard, self._paths.temporary, partial(rows.merge, [chunk]))

    def _summary(self, num_chunks: int, extra: Mapping[str, Any]) -> bytes:
        chunks = [self._chunks[number].committed for number in range(num_chunks)]
        record = {
            "written_by": WRITTEN_BY,
            "job": self._job,
            "files": [{"name": p.name, "bytes": p.stat().st_size} for p in self._paths.results(num_chunks)],
            "num_chunks": num_chunks,
            "num_rows": sum(chunk.num_rows for chunk in chunks),
        }
        taken = [name for name in extra if name in record]
        if taken:
            raise ValueError(f"the summary tells {', '.join(taken)} by itself")
        skipped = [line for chunk in chunks for line in chunk.skipped]
        text = json.dumps(
            {**record, "left_out": skipped, **plain(extra, strict=True)}, indent=2, ensure_ascii=False, allow_nan=False
        )
        return (text + "\n").encode("utf-8", "backslashreplace")
