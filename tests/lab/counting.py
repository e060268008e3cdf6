"""A data source of one's own with nothing to prepare: batch i is a pure function of i. Needs no TensorFlow."""

import os
import time

import numpy as np


class Counting:
    """Rows that count up in small steps, with noise; `pause` seconds a batch, for tests that need time to act."""

    def __init__(self, lengths, batch_size, vocab_size, pause=0.0):
        self.lengths, self.batch_size = lengths, batch_size
        self._vocab_size, self._pause = vocab_size, pause

    def vocabularies(self):
        return {}

    def train(self, rows):
        return CountingStream(self.batch_size, self.lengths["targets"], self._vocab_size, rows, self._pause)

    def eval_tasks(self):
        return []


class CountingStream:
    def __init__(self, batch_size, length, vocab_size, rows, pause):
        self._shape, self._vocab_size, self._rows, self._pause = (batch_size, length), vocab_size, rows, pause
        self._batch = 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng(self._batch)
        time.sleep(self._pause)
        self._batch += 1
        if str(self._batch) == os.environ.get("LAB_FAILS_AT_BATCH"):
            raise RuntimeError("the disk of this machine is gone")
        start = rng.integers(1, self._vocab_size, (self._shape[0], 1))
        tokens = start + np.cumsum(rng.integers(0, 4, (self._shape[0], self._shape[1] + 1)), 1)
        tokens = (tokens % self._vocab_size).astype(np.int32)[self._rows]
        ones = np.ones(tokens[:, 1:].shape, np.int32)
        return {
            "decoder_input_tokens": tokens[:, :-1],
            "decoder_target_tokens": tokens[:, 1:],
            "decoder_segment_ids": ones,
            "decoder_positions": np.broadcast_to(np.arange(self._shape[1], dtype=np.int32), ones.shape),
            "decoder_loss_weights": ones.astype(np.float32),
        }

    def state(self):
        return {"batch": self._batch}

    def restore(self, state):
        self._batch = state["batch"]

    def spec(self):
        names = ("input_tokens", "target_tokens", "segment_ids", "positions")
        spec = {f"decoder_{name}": (self._shape, np.dtype("int32")) for name in names}
        return spec | {"decoder_loss_weights": (self._shape, np.dtype("float32"))}
