"""What is asked of a model that serves, as tokens, and the slots that answer: `Pool`, which a scheduler drives.

A pool has a fixed number of slots, each for one request at a time, that decode together in programs compiled once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

DEFAULT_ALPHA = 0.6  # the length penalty of beam search, T5X's


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prediction to make, checked and in tokens.

    Attributes:
      prompt: ids of the inputs, as `Text.read_inputs` has them: an encoder's, or what the prediction goes on from.
      max_tokens: the most tokens to make.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: see `Sampling`.
      logit_bias: is added to the logits of these ids before anything else changes them.
      seed, decode: what randomness is made of: token t is drawn by the key that `Sampling` has for (seed, id 0, decode,
        t); `decode` tells the n predictions of one request from each other.
      num_beams: beams of a search instead of sampling, if above 1; `alpha` is its length penalty.
      top_log_probs: how many of the likeliest tokens are told at each place.
      forced: ids that the prediction begins with.
      grammar: what the text must be, as `grammar.Grammar` compiled it; None for any text.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    decode: int = 0
    num_beams: int = 1
    alpha: float = DEFAULT_ALPHA
    top_log_probs: int = 0
    forced: tuple[int, ...] = ()
    grammar: Any = None


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A whole prediction of a search: its ids, with the one that ended it, their log-probabilities, and its score."""

    tokens: Sequence[int]
    log_probs: Sequence[float]
    score: float


@dataclasses.dataclass(frozen=True)
class Made:
    """What a step made in a slot.

    Attributes:
      tokens: new ids, in order; one, or several where a step verifies guesses; none while a search goes on.
      log_probs: of each, under the model before biases, penalties and filters, as `Decoded.log_probs`.
      top: for each, the likeliest (id, log-probability), the likeliest first; empty lists where nobody asked.
      hypotheses: of a search that is over, the best first; None of one that is not, and of sampling.
      over: whether a grammar lets nothing follow these tokens: they end the prediction, whether or not by an id for it.
      error: why this request cannot go on, and must be freed; "" while it can. It is the request's own: others go on.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float]
    top: Sequence[Sequence[tuple[int, float]]] = ()
    hypotheses: Sequence[Hypothesis] | None = None
    over: bool = False
    error: str = ""


class Pool(Protocol):
    """Slots that decode together. One thread drives a pool; all its programs are compiled by `warm_up`.

    Attributes:
      num_slots: how many requests it decodes at a time.
    """

    num_slots: int

    def warm_up(self) -> None:
        """Compiles and runs every program once."""
        ...

    def refusal(self, generation: Generation) -> str | None:
        """Returns why this request can never be served here (a prompt longer than there is room for), else None."""
        ...

    def start(self, slot: int, generation: Generation) -> None:
        """Gives a free slot to a request."""
        ...

    def prefill(self, slot: int) -> bool:
        """Reads the next part of a slot's prompt; returns whether all is read, so that it joins the next step."""
        ...

    def step(self) -> Any | None:
        """Starts a step of all slots that have read their prompts, and returns before the device is done; None where
        there are none. What it returns is for `read`."""
        ...

    def read(self, step: Any) -> Mapping[int, Made]:
        """Waits for a step, and returns what it made by slot, of those that still have the request of that step."""
        ...

    def free(self, slot: int) -> None:
        """Ends the request of a slot, at any time after `start`; its results are dropped."""
        ...
