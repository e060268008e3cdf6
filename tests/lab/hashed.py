"""A data source of one's own: another one, whose every row leaves its hash in a file."""

import hashlib
import json
from pathlib import Path


class Hashed:
    """Wraps a data source; the stream of process rows [i, j) writes to `folder`/rows-i.jsonl."""

    def __init__(self, data, folder):
        self._data = data
        self._folder = Path(folder)
        self.batch_size, self.lengths = data.batch_size, data.lengths
        self.vocabularies, self.eval_tasks = data.vocabularies, data.eval_tasks

    def train(self, rows):
        return HashedStream(self._data.train(rows), range(self.batch_size)[rows], self._folder)


class HashedStream:
    def __init__(self, stream, rows, folder):
        self._stream = stream
        self._rows = rows
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(  # noqa: SIM115 for as long as the stream lives
            folder / f"rows-{rows[0]}-{len(rows)}.jsonl", "a"
        )
        self.state, self.restore, self.spec = stream.state, stream.restore, stream.spec

    def __iter__(self):
        return self

    def __next__(self):
        number = self._stream.state()["batch"]
        batch = next(self._stream)
        for place, row in enumerate(self._rows):
            digest = hashlib.sha256()
            for name in sorted(batch):
                digest.update(name.encode() + batch[name][place].tobytes())
            print(json.dumps([number, row, digest.hexdigest()]), file=self._file, flush=True)
        return batch
