"""Continuous batching: requests that sample, or take the likeliest token, each in a slot of its own."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import FREE
from meshway.framework.inference.predictor import Session
from meshway.framework.interfaces import Cache
from meshway.framework.serving.drawing import Choice, Chosen, Turn
from meshway.framework.serving.generation import Generation, Made
from meshway.framework.serving.slot_arrays import SlotArrays


@dataclasses.dataclass
class _Occupant:
    """A request in a slot.

    Attributes:
      number: tells it from all others that had a slot.
      generation: what is asked for.
      prompt: what is read before the first step, in chunks; of a prompt that is read in one piece, the inputs.
      first, start: what is fed first, and its position.
      choice: what its steps must do.
      matcher: of its grammar.
      seen: what guesses are made from; None where none are made.
      read: how many tokens of the prompt were read; `ready`: whether all were.
      made: how many tokens it has so far, that of a step that was not read yet included.
      unread: whether there is such a step.
      over: whether its grammar lets nothing follow.
      error: why it cannot go on; "" while it can.
    """

    number: int
    generation: Generation
    prompt: list[int]
    first: int
    start: int
    choice: Choice
    matcher: Any
    seen: "Lookup | None"
    read: int = 0
    ready: bool = False
    made: int = 0
    unread: bool = False
    over: bool = False
    error: str = ""

    @property
    def joins(self) -> bool:
        """Whether it takes part in the next step: what a grammar allows, and what may be guessed, is known once the
        tokens before were read."""
        waits = self.unread and (self.matcher is not None or self.seen is not None)
        return self.ready and not waits and not self.error and self.made < self.generation.max_tokens

    def allowed(self, vocab: int) -> np.ndarray:
        """Returns which tokens its grammar allows next, bool [vocab]; all where it has none, or cannot be followed,
        which `error` then tells."""
        if self.matcher is None:
            return np.ones(vocab, bool)
        found = np.zeros(vocab, bool)  # a model may have more logits than there are tokens
        try:
            allowed = self.matcher.mask()[:vocab]
        except UserError as error:
            self.error = str(error)
            return ~found
        found[: len(allowed)] = allowed
        if not found.any():
            self.error = "the grammar allows no token here"
        return found

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes the tokens of a step that was read."""
        self.unread = False
        self.made += len(tokens) - 1
        if self.seen is not None:
            self.seen.add(tokens)
        try:
            for token in () if self.matcher is None or self.error else tokens:
                self.over = bool(self.matcher.accept(token))
        except (UserError, ValueError) as error:  # a forced token may be one that the grammar does not allow
            self.error = str(error)


class Lookup:
    """Guesses how a text goes on: as it did where its last few tokens stood before."""

    SIZES = (3, 2)  # of what is looked up, the longest first

    def __init__(self, tokens: Sequence[int]):
        """Begins with the tokens of a prompt."""
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the place behind each few tokens, the last one
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Goes on with these."""
        for token in tokens:
            for size in self.SIZES:
                if len(self._tokens) >= size:
                    self._after[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Returns at most `count` tokens that may come next; few, or none, where nothing like it stood before."""
        for size in self.SIZES:
            place = self._after.get(tuple(self._tokens[-size:]))
            if place is not None:
                return self._tokens[place : place + count]
        return []


class Step(NamedTuple):
    """A step that was started: what it chose, and the numbers of the requests, by slot, that it was made for."""

    chosen: Chosen
    occupants: Mapping[int, int]


class KeptPrompts:
    """Caches of prompts that were read, those used last: a prompt that begins with the same whole chunks needs none of
    them again. They were read by the same programs at the same places, so nothing that follows changes by a bit."""

    def __init__(self, chunk: int, size: int):
        """Keeps `size` prompts, by chunks of so many tokens."""
        self._chunk, self._size = chunk, size
        self._rows: dict[tuple[int, ...], Cache] = {}  # by tokens of whole chunks, the one used last at the end

    def find(self, prompt: Sequence[int]) -> tuple[int, Cache | None]:
        """Returns how many tokens of a prompt are in a kept cache, and the one with the most; (0, None) without any."""
        most, best = 0, None
        for kept in self._rows:
            if (shared := self._shared(prompt, kept)) > most:
                most, best = shared, kept
        if best is None:
            return 0, None
        self._rows[best] = self._rows.pop(best)
        return most, self._rows[best]

    def wants(self, prompt: Sequence[int]) -> bool:
        """Returns whether a prompt has whole chunks that no kept one has."""
        whole = len(prompt) // self._chunk * self._chunk
        return bool(self._size and whole) and not any(self._shared(prompt, kept) == whole for kept in self._rows)

    def keep(self, prompt: Sequence[int], row: Cache) -> None:
        """Keeps the cache of a prompt, in place of those that it goes on from, or of the one used longest ago."""
        tokens = tuple(prompt[: len(prompt) // self._chunk * self._chunk])
        self._rows = {kept: its for kept, its in self._rows.items() if self._shared(tokens, kept) < len(kept)}
        self._rows[tokens] = row
        while len(self._rows) > self._size:
            del self._rows[next(iter(self._rows))]

    def _shared(self, prompt: Sequence[int], kept: tuple[int, ...]) -> int:
        """Returns how many tokens of the whole chunks that a prompt begins with are those of a kept one."""
        place = 0
        while kept[place : place + self._chunk] and kept[place : place + self._chunk] == tuple(
            prompt[place : place + self._chunk]
        ):
            place += self._chunk
        return place


class SlotPool:
    """`Pool` for all requests but those that search.

    A request's tokens and log-probabilities are the same whatever its slot and its neighbours, bit for bit, and its
    tokens are those that `Sampling` draws by the same numbers, for id 0.

    Attributes:
      num_slots: how many requests it decodes at a time.
      prefix_hits, reused_tokens: how many prompts began like one that was kept, and their tokens that were not read.
    """

    def __init__(
        self,
        session: Session,
        num_slots: int,
        max_length: int,
        max_input_length: int = 0,
        chunk: int = 64,
        max_top_log_probs: int = 20,
        kept_prompts: int = 4,
        guesses: int = 0,
    ):
        """Args:
          session: the model on its mesh.
          num_slots: slots; a layout that shards the batch must divide them.
          max_length: the tokens of a slot: prompt and prediction or, behind an encoder, the prediction alone.
          max_input_length: the most tokens of an encoder's inputs.
          chunk: tokens of a prompt that are read between two steps of other slots.
          kept_prompts: of how many prompts that were read in chunks a copy is kept, the memory of a slot each: one that
            begins with the same chunks begins from there.
          guesses: how many tokens are guessed in a step, from what followed the same few tokens before (prompt lookup,
            a form of Leviathan et al. 2023), and verified together: several tokens a step where text repeats itself.
            Every step then waits for the one before to be read. What is chosen stays what it is without, but for
            rounding.
          max_top_log_probs: the most likeliest tokens that a request may ask for at each place.

        Raises:
          UserError: the model does not decode, or not in these lengths; the slots do not divide over the mesh, or a
            device has no room for them.
        """
        numbers = {"slots": (num_slots, 1), "max_length": (max_length, 2), "chunk": (chunk, 1), "guesses": (guesses, 0)}
        if session.row_format.has_encoder:
            numbers["max_input_length"] = (max_input_length, 1)
        for name, (value, least) in numbers.items():
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        self.num_slots, self._length, self._guesses = num_slots, max_length, guesses
        self._format, self._chunk = session.row_format, min(chunk, max_length)
        self._arrays = SlotArrays(
            session, num_slots, max_length, max_input_length, self._chunk, max_top_log_probs, kept_prompts, 1 + guesses
        )
        self._kept = KeptPrompts(self._chunk, kept_prompts if self._arrays.buckets is None else 0)
        self.prefix_hits = self.reused_tokens = 0
        self._slots: list[_Occupant | None] = [None] * num_slots
        self._count = 0

    def warm_up(self) -> None:
        """Compiles and runs every program once."""
        self._arrays.compile()
        buckets, begun = self._arrays.buckets, len(self._format.begun([]))
        for size in [1] if buckets is None else [max(1, shape["inputs"] - begun) for shape in buckets.shapes]:
            self.start(0, Generation((0,) * size, 1, top_log_probs=self._arrays.max_top))
            while not self.prefill(0):
                pass
            self.free(0)
        if buckets is None:
            self._arrays.put_row(0, self._arrays.copy_row(0))
        turn, mask = self._idle(), np.ones((self.num_slots, self._arrays.vocab), bool)
        for choice in Choice:
            made = self._arrays.step(turn, choice, mask if choice == Choice.MASKED else None, self._arrays.max_top > 0)
            np.asarray(made.tokens)

    def refusal(self, generation: Generation) -> str | None:
        """Returns why this request can never be served here (a prompt longer than there is room for), else None."""
        if generation.num_beams > 1:
            return "these slots sample, and do not search: num_beams must be 1"
        if generation.max_tokens < 1:
            return f"max_tokens must be at least 1, not {generation.max_tokens}"
        if generation.top_log_probs > self._arrays.max_top:
            return f"at most {self._arrays.max_top} of the likeliest tokens are told at each place"
        named = [*generation.prompt, *generation.logit_bias, *generation.forced]
        if wrong := [token for token in named if not 0 <= token < self._arrays.vocab]:
            return f"id {wrong[0]} is none of the {self._arrays.vocab:,} tokens"
        size = self._format.prompt_size(generation.prompt)
        if not size:
            return "the prompt is empty, and the model knows no token to begin with"
        buckets, start = self._arrays.buckets, self._start(generation)
        if buckets is not None and size > buckets.largest["inputs"]:
            return f"the prompt has {size:,} tokens, and there is room for {buckets.largest['inputs']:,}"
        if start + generation.max_tokens > self._length:
            return (
                f"{start + 1:,} tokens to begin with and {generation.max_tokens:,} new ones need "
                f"{start + generation.max_tokens:,} places, and a slot has {self._length:,}"
            )
        return None

    def start(self, slot: int, generation: Generation) -> None:
        """Gives a free slot to a request.

        Raises:
          ValueError: the slot is taken, or the request can never be served (`refusal`).
        """
        if self._slots[slot] is not None:
            raise ValueError(f"slot {slot} is taken")
        if why := self.refusal(generation):
            raise ValueError(why)
        self._count += 1
        prompt, first = list(generation.prompt), self._format.start[0] if self._format.has_encoder else 0
        seen: list[int] = []
        if not self._format.has_encoder:
            seen = self._format.begun(prompt)
            first, prompt = seen[-1], seen[:-1] if self._arrays.buckets is None else prompt
        matcher = None if generation.grammar is None else generation.grammar.matcher()
        lookup = Lookup(seen or generation.prompt) if self._guesses else None
        self._slots[slot] = _Occupant(
            self._count, generation, prompt, first, self._start(generation), Choice.of(generation), matcher, lookup
        )
        self._arrays.begin(slot, generation, seen)

    def prefill(self, slot: int) -> bool:
        """Reads the next part of a slot's prompt; returns whether all is read, so that it joins the next step."""
        occupant = self._slots[slot]
        assert occupant is not None, "a slot is given away before its prompt is read"
        if not occupant.ready and self._arrays.buckets is not None:
            self._arrays.read_piece(slot, occupant.prompt)
            occupant.ready = True
        elif not occupant.ready:
            self._prefill_chunk(slot, occupant)
        return occupant.ready

    def _prefill_chunk(self, slot: int, occupant: _Occupant) -> None:
        prompt = occupant.prompt
        if not occupant.read:
            occupant.read, row = self._kept.find(prompt)
            if occupant.read:
                self._arrays.put_row(slot, row)
                self.prefix_hits, self.reused_tokens = self.prefix_hits + 1, self.reused_tokens + occupant.read
        if occupant.read < len(prompt) or not prompt:  # a chunk of none clears the slot
            part = prompt[occupant.read : occupant.read + self._chunk]
            self._arrays.read_chunk(slot, part, occupant.read)
            occupant.read += len(part)
        occupant.ready = occupant.read == len(prompt)
        if occupant.ready and self._kept.wants(prompt):
            self._kept.keep(prompt, self._arrays.copy_row(slot))

    def step(self) -> Step | None:
        """Starts a step of all slots that have read their prompts, and returns before the device is done; None where
        there are none. What it returns is for `read`."""
        joining = {slot: occupant for slot, occupant in self._occupied() if occupant.joins}
        if not joining:
            return None
        turn, mask = self._idle(), None
        choice = max(occupant.choice for occupant in joining.values())
        if choice == Choice.MASKED:
            mask = np.ones((self.num_slots, self._arrays.vocab), bool)
        for slot, occupant in joining.items():
            turn.positions[slot, 0], turn.made[slot] = occupant.start + occupant.made, occupant.made
            turn.fed[slot, 0] = FREE if occupant.made else occupant.first
            turn.active[slot, 0] = 1
            forced = occupant.generation.forced[occupant.made :][: 1 + self._guesses]
            turn.forced[slot, : len(forced)] = forced
            if mask is not None:
                mask[slot] = occupant.allowed(self._arrays.vocab)
            self._guess(turn, slot, occupant)
            occupant.made += 1
            occupant.unread = True
        top = any(occupant.generation.top_log_probs for occupant in joining.values())
        chosen = self._arrays.step(turn, choice, mask, top)
        return Step(chosen, {slot: occupant.number for slot, occupant in joining.items()})

    def read(self, step: Step) -> dict[int, Made]:
        """Waits for a step, and returns what it made by slot, of those that still have the request of that step."""
        tokens, log_probs, counts = (np.asarray(each) for each in step.chosen[:3])
        top = None if step.chosen.top is None else [np.asarray(each) for each in step.chosen.top]
        found = {}
        for slot, occupant in self._occupied():
            if step.occupants.get(slot) != occupant.number:
                continue
            count, asked = int(counts[slot]), occupant.generation.top_log_probs
            new, likeliest = tokens[slot, :count].tolist(), [list[tuple[int, float]]()] * count
            occupant.accept(new)
            if top is not None:
                ids, values = (each[slot, :count, :asked].tolist() for each in top)
                likeliest = [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
            made = Made(new, log_probs[slot, :count].tolist(), likeliest, over=occupant.over)
            found[slot] = Made((), (), error=occupant.error) if occupant.error else made
        return found

    def free(self, slot: int) -> None:
        """Ends the request of a slot, at any time after `start`; its results are dropped."""
        self._slots[slot] = None

    def _guess(self, turn: Turn, slot: int, occupant: _Occupant) -> None:
        """Puts guesses into the further places of a slot, of which no more is made than there is room for."""
        if occupant.seen is None or occupant.matcher is not None:
            return
        left = min(self._guesses, occupant.generation.max_tokens - occupant.made - 1)
        forced = occupant.generation.forced[occupant.made :][:left]
        guesses = forced or occupant.seen.guess(left)
        places = slice(1, 1 + len(guesses))
        ahead = np.arange(1, 1 + len(guesses))
        turn.fed[slot, places], turn.active[slot, places] = guesses, 1
        turn.positions[slot, places] = occupant.start + occupant.made + ahead
        turn.made[slot, places] = occupant.made + ahead

    def _occupied(self) -> Iterator[tuple[int, _Occupant]]:
        return ((slot, occupant) for slot, occupant in enumerate(self._slots) if occupant is not None)

    def _start(self, generation: Generation) -> int:
        """Returns the position of what is fed first."""
        return 0 if self._format.has_encoder else self._format.prompt_size(generation.prompt) - 1

    def _idle(self) -> Turn:
        """Returns a turn in which no slot takes part. They write at their last place, which nothing sees before it is
        written anew, and where guesses could be but are not, past it: nowhere."""
        turn = Turn.idle(self.num_slots, 1 + self._guesses, self._length)
        turn.positions[:, 0] = self._length - 1
        return turn
