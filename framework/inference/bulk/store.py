"""Results of a job, committed chunk by chunk: each exactly once, even if the process is killed at any moment."""

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
from meshway.framework.inference.bulk.batches import Encoding, JsonLines, OwnFormat, TextLines, plain
from meshway.framework.inference.bulk.inputs import Share, nearest
from meshway.framework.inference.bulk.outputs import (
    WRITTEN_BY,
    OutputLock,
    abandon,
    claimed,
    clear,
    move_durably,
    output_paths,
    refuse_foreign_files,
    remove,
    settle,
    write_durably,
)
from meshway.framework.inference.bulk.parquet import ParquetRows
from meshway.framework.terminal import count_of


@dataclasses.dataclass(frozen=True)
class Committed:
    """A committed chunk.

    Attributes:
      digest: of the records that it was computed from, as given to `commit`.
      num_rows: number of rows.
      counts: the job's counts, such as tokens.
      skipped: the records without a row, and why.
    """

    digest: str
    num_rows: int
    counts: Mapping[str, float]
    skipped: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """The content of a chunk's side file: the committed chunk, and the size and hash of its file."""

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

    `OUTPUT.jsonl` (or .json, .parquet, .txt) is a single file; until it is finished its chunks are in
    `OUTPUT.jsonl.parts/`, and its summary is `OUTPUT.jsonl.summary.json`. Another name is a folder: its chunks are in
    `OUTPUT/_parts/` and become its shards `part-00000-of-00012.jsonl`, and its summary is `OUTPUT/_summary.json`. A
    `.txt` has predictions only (see `batches.TextLines`).

    A kill at any moment loses nothing and repeats nothing: a chunk's file is written, synced and renamed; then, in the
    same way, its side file, with the size and hash of the first. A chunk is committed once its side file exists.
    Finishing first claims the names of the result, then makes it of the chunks, then writes the summary, then removes
    the chunks; all of it can be repeated until the summary exists, which marks the result as complete.

    Several processes may each compute a share of the chunks into one output, started and killed at any time. Whichever
    finds all chunks committed (`missing`) finishes; the result is that of a single process.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        job: Mapping[str, str],
        format: str | None = None,
        overwrite: bool = False,
        share: Share = Share(),
        writer: OwnFormat | None = None,
    ) -> None:
        """Checks names only; `open` reads and writes files.

        Args:
          output: the file or folder.
          job: name -> value of what identifies the job; chunks of different jobs are never mixed.
          format: 'jsonl' or 'parquet', of shards; that of a single file follows from its name.
          overwrite: remove another job's chunks or result, or this job's finished result, and replace chunks made
            from an input that has changed since. Other unfinished chunks of this job are always kept, so that the
            same command continues after a kill. Only files written by a ChunkStore are ever removed.
          share: the chunks that this process computes.
          writer: a format of one's own, instead of `format`.

        Raises:
          UserError: the format contradicts the name, or the folder to write in does not exist.
        """
        self._paths = output_paths(Path(output), format, share, writer.suffix if writer else None)
        self._writer = writer
        self._job = dict(job)
        self._overwrite = overwrite
        self._lock = OutputLock(self._paths)
        self._rows: Encoding | None = None
        self._chunks: dict[int, _Chunk] = {}
        self._finished = False
        self._made_folder = False
        parent = self._paths.output.parent
        if not parent.is_dir():
            raise UserError(f"output {output}: no folder {str(parent)!r}{nearest(parent.name, parent.parent)}")

    def open(self) -> None:
        """Locks the output and reads what exists there.

        Raises:
          UserError: another process is working on it, it was written by another job or not by us, or it cannot be
            written.
        """
        paths = self._paths
        if paths.sharded and not paths.output.exists():
            with io_errors(paths.output), contextlib.suppress(FileExistsError):
                os.mkdir(paths.output)
                self._made_folder = True
        try:
            self._lock.acquire()
            self._lock.take_turn()
            self._finished = settle(paths, self._job, self._overwrite, self._lock.others())
            if not self._finished:
                self._recover()
            self._lock.end_turn()
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> bool:
        """Whether this job has finished here, before `open` or by `finish`."""
        return self._finished

    def committed(self) -> dict[int, Committed]:
        """Returns the committed chunks, by number, in order."""
        return {number: self._chunks[number].committed for number in sorted(self._chunks)}

    def commit(
        self,
        number: int,
        rows: Sequence[Mapping[str, Any]],
        digest: str,
        counts: Mapping[str, float],
        skipped: Sequence[str],
    ) -> None:
        """Writes a chunk durably; does nothing if it has been committed from the same records.

        Args:
          number: its index among the chunks. One that was committed from other records is replaced, if the store may
            overwrite.
          rows: its results: text, numbers, lists, dicts, numpy arrays, None.
          digest: sha256 of the raw bytes of the records that it was computed from.
          counts: finite numbers.
          skipped: a line for each record without a row.

        Raises:
          UserError: the chunk was committed from other records, it cannot be written, or the format cannot hold the
            rows.
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

    def missing(self, digests: Sequence[str]) -> list[int]:
        """Returns which chunks are not committed from these records; if none, the result can be made, or `finished`.

        A share waits for its turn, keeps it until it has finished or is closed, and reads what others have committed.

        Args:
          digests: of the records of each chunk, as given to `commit`.

        Raises:
          UserError: the output cannot be read.
        """
        if not self._paths.share.is_whole:
            self._lock.take_turn()
            self._finished = settle(self._paths, self._job, False)
            if self._finished:
                return []
            self._recover()
        found = {number: chunk.committed.digest for number, chunk in self._chunks.items()}
        return [number for number, digest in enumerate(digests) if found.get(number) != digest]

    def finish(self, num_chunks: int, summary: Mapping[str, Any]) -> Path:
        """Makes the result of all chunks, in order, writes the summary and removes the chunks.

        Args:
          num_chunks: number of chunks.
          summary: further entries of the summary, beside `written_by`, `job`, `files`, `num_chunks` and `num_rows`;
            `left_out` is by default the lines of skipped records.

        Returns:
          the file, or the folder of shards.

        Raises:
          UserError: more chunks are committed (the input has changed) and the store may not overwrite, a chunk's file
            was changed, a file that we have not written has the result's name, or the result cannot be written.
          ValueError: a chunk is missing, or `summary` has a reserved name.
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
        """Unlocks the output, and removes our files from it if no chunk was committed."""
        self._rows = None
        if not self._lock.held:
            return
        try:
            if self._lock.take_turn(wait=False) and not self._lock.others():
                abandon(self._paths, self._job)
        finally:
            self._lock.discard()
            if self._made_folder:
                with contextlib.suppress(OSError):
                    os.rmdir(self._paths.output)  # if it is empty

    def _opened(self) -> Encoding:
        if self._rows is None:
            raise ValueError("the output is not open, or has finished")
        return self._rows

    def _row_format(self) -> Encoding:
        if self._writer is not None:
            return self._writer
        if self._paths.format != "parquet":
            return JsonLines() if self._paths.format == "jsonl" else TextLines()
        num_chunks = claimed(self._paths)
        return ParquetRows([self._content(number, num_chunks) for number in sorted(self._chunks)])

    def _content(self, number: int, num_chunks: int | None) -> Path:
        """Returns the file of a chunk's rows: the chunk's own, or the shard of `num_chunks` that it was renamed to."""
        path = self._paths.chunk(number)
        if num_chunks is None or not self._paths.sharded or path.exists():
            return path
        return self._paths.shard(number, num_chunks)

    def _recover(self) -> None:
        """Reads what is committed, and how it is encoded."""
        self._chunks = self._recovered()
        self._rows = self._row_format()

    def _recovered(self) -> dict[int, _Chunk]:
        """Returns the complete chunks; removes side files of this share without their chunk."""
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
            if self._paths.share.owns(number):  # another share may be replacing its chunk now
                remove(side)
        return chunks

    def _drop(self, number: int) -> None:
        """Removes a chunk's side file, so that it is no longer committed."""
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
        """Raises UserError unless a chunk's file has the hash of what was written."""
        path = self._content(number, num_chunks)
        with io_errors(path), open(path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == self._chunks[number].sha256
        if not same:
            self._drop(number)
            raise UserError(f"{path} was changed after it was written; run again to compute this chunk again")

    def _claim(self, num_chunks: int) -> None:
        if claimed(self._paths) is None:
            refuse_foreign_files(self._paths)
            content = json.dumps({"num_chunks": num_chunks}).encode()
            write_durably(self._paths.claim, self._paths.temporary, lambda file: file.write(content))

    def _make_shards(self, rows: Encoding, num_chunks: int) -> None:
        for number in range(num_chunks):
            chunk, shard = self._paths.chunk(number), self._paths.shard(number, num_chunks)
            if not chunk.exists():
                continue  # renamed by an earlier attempt
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
            raise ValueError(f"the summary has its own {', '.join(taken)}")
        skipped = [line for chunk in chunks for line in chunk.skipped]
        text = json.dumps(
            {**record, "left_out": skipped, **plain(extra, strict=True)}, indent=2, ensure_ascii=False, allow_nan=False
        )
        return (text + "\n").encode("utf-8", "backslashreplace")
