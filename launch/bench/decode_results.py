"""What `meshway bench decode` found."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found at one batch size; bytes are of all devices together, each counting what it holds.

    Attributes:
      batch_size: rows.
      step: seconds a token of each row takes where the host asks for each and reads the one before, as a stream does.
      on_device: the same for as many steps in one program.
      prefill: seconds to read the prompts.
      prefill_flops: matmul operations that takes, each attention in full.
      weights: bytes of parameters that a step reads.
      live: bytes of the cache that hold something, as the mean over the steps.
      padded: bytes of the whole cache that a step reads.
      temporary: bytes that a step needs on a device beside arguments and results.
      bandwidth: bytes a second of the streaming read, the faster one.
      peak: matmul peak, FLOP/s.
      donated: whether a step gave the cache back in the same memory.
    """

    batch_size: int
    step: float
    on_device: float
    prefill: float
    prefill_flops: float
    weights: float
    live: float
    padded: float
    temporary: int
    bandwidth: float
    peak: float
    donated: bool

    @property
    def host_gap(self) -> float:
        """Seconds a step that the host adds."""
        return self.step - self.on_device

    @property
    def floor(self) -> float:
        """Seconds a step takes at least: weights and the live cache, read once."""
        return (self.weights + self.live) / self.bandwidth

    @property
    def padded_floor(self) -> float:
        """The same with the whole cache."""
        return (self.weights + self.padded) / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Found:
    """All results, and how many programs a job of mixed lengths compiled once each length had had a batch."""

    results: list[Result]
    compilations: int
    mixed_lengths: list[int]
    mesh: dict[str, int]
    peak_source: str
