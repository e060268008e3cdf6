"""Slots of plain Python that keep the contract of `Pool`, and complain where a scheduler does not."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from meshway.framework.data.vocabularies import Bytes
from meshway.framework.inference.rows import Text
from meshway.framework.serving.generation import Generation, Hypothesis, Made

VOCABULARY = Bytes(100)
EOS = VOCABULARY.eos_id
TEXT = Text(VOCABULARY, VOCABULARY, (), (EOS,), ())


def made_of(generation: Generation, place: int) -> tuple[int, float]:
    """Returns token `place` of a request and its log-probability, which depend on nothing else."""
    seed = generation.seed if generation.temperature > 0 and generation.num_beams == 1 else 0
    draw = random.Random(repr((generation.prompt, seed, generation.decode, place)))
    ends = generation.temperature > 0 and draw.random() < 0.04
    return (EOS if ends else 3 + draw.choice(b"abcdefgh ")), -draw.random()


def alone(generation: Generation) -> list[int]:
    """Returns the tokens of a request, the one that ends it among them."""
    tokens: list[int] = []
    while len(tokens) < generation.max_tokens and (not tokens or tokens[-1] != EOS):
        tokens.append(made_of(generation, len(tokens))[0])
    return tokens


class FakePool:
    """One token a step and slot; a prompt is read by `chunk` tokens at a time.

    Attributes:
      order: prompts in the order in which they got slots.
      fails_at: the step that raises, if any.
      stuck: a prompt whose request cannot go on, if any.
    """

    def __init__(self, num_slots: int = 3, chunk: int = 4, room: int = 1000, searches: bool = False):
        self.num_slots, self.order = num_slots, []
        self.fails_at: int | None = None
        self.steps, self.stuck = 0, None
        self._chunk, self._room, self._searches = chunk, room, searches
        self._slots: dict[int, dict[str, Any]] = {}
        self._flying = 0

    def warm_up(self) -> None:
        pass

    def refusal(self, generation: Generation) -> str | None:
        size = len(generation.prompt) + generation.max_tokens
        return None if size <= self._room else f"{size} tokens are more than the {self._room} of a slot"

    def start(self, slot: int, generation: Generation) -> None:
        assert slot not in self._slots and 0 <= slot < self.num_slots
        self.order.append(generation.prompt)
        self._slots[slot] = {"generation": generation, "left": len(generation.prompt), "made": 0}

    def prefill(self, slot: int) -> bool:
        state = self._slots[slot]
        assert state["left"] is not None, "a prompt is read once"
        state["left"] -= self._chunk
        if state["left"] > 0:
            return False
        state["left"] = None
        return True

    def step(self) -> Any | None:
        ready = {slot: state for slot, state in self._slots.items() if state["left"] is None}
        if not ready:
            return None
        self.steps += 1
        self._flying += 1
        assert self._flying <= 2, "at most one step is ahead of what was read"
        if self.steps == self.fails_at:
            raise RuntimeError("the device is gone")
        found = {}
        for slot, state in ready.items():
            found[slot] = (state, state["made"])
            state["made"] += 1
        return found

    def read(self, step: Any) -> Mapping[int, Made]:
        self._flying -= 1
        found = {}
        for slot, (state, place) in step.items():
            if self._slots.get(slot) is state:
                found[slot] = self._made(state["generation"], place)
        return found

    def _made(self, generation: Generation, place: int) -> Made:
        if self._searches:
            tokens = alone(generation)
            if place + 1 < len(tokens):
                return Made((), ())
            found = [Hypothesis(tokens, [-1.0] * len(tokens), -float(n)) for n in range(generation.num_beams)]
            return Made((), (), (), found)
        token, log_prob = made_of(generation, place)
        if generation.prompt == self.stuck and place == 3:
            return Made((), (), error="the grammar became too complex")
        return Made([token], [log_prob], [[(token, log_prob)][: generation.top_log_probs]])

    def free(self, slot: int) -> None:
        del self._slots[slot]


class FakeScorer:
    """Scores by the ids alone."""

    max_top = 5

    def score(self, inputs, targets) -> list[float]:
        return [-float(token) / 100 for token in targets]

    def scored(self, inputs, targets, top_log_probs: int = 0) -> list[Made]:
        found = []
        for new in targets:
            scores = self.score((), new)
            top = [[(token, score), (0, -9.0)][:top_log_probs] for token, score in zip(new, scores, strict=True)]
            found.append(Made(new, scores, top))
        return found

    def embed(self, inputs) -> np.ndarray:
        if not inputs:
            raise ValueError("no token to embed")
        return np.array([len(inputs), inputs[0], 0.5], np.float32)
