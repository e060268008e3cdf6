"""A prediction as it is written: ids from a slot become text, until one of them or a text ends it."""

import dataclasses
from collections.abc import Sequence

from meshway.framework.inference.rows import Text
from meshway.framework.serving.generation import Generation, Hypothesis, Made

STOP, LENGTH, CANCELLED, TIMEOUT = "stop", "length", "cancelled", "timeout"
REFUSED, ERROR = "refused", "error"


@dataclasses.dataclass(frozen=True)
class Written:
    """What a step added to a prediction.

    Attributes:
      text: what is certain now; the pieces of a prediction, joined, are its text.
      tokens, log_probs, top: the new ids, see `Made`; the one that ends the prediction is among them.
      offsets: for each of `tokens`, how many characters of the prediction were written before it.
      reason: why the prediction ended: STOP (an id or a text that ends it), LENGTH (as many tokens as were asked for),
        CANCELLED, TIMEOUT, REFUSED (it cannot go on as it was asked for), ERROR (of the engine); "" where it goes on.
      hypotheses: of a search that is over.
      message: what failed, of TIMEOUT, REFUSED and ERROR.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    top: Sequence[Sequence[tuple[int, float]]] = ()
    offsets: Sequence[int] = ()
    reason: str = ""
    hypotheses: Sequence[Hypothesis] | None = None
    message: str = ""

    def then(self, more: "Written") -> "Written":
        """Returns this and what a later step added, as one."""
        return Written(
            self.text + more.text,
            [*self.tokens, *more.tokens],
            [*self.log_probs, *more.log_probs],
            [*self.top, *more.top],
            [*self.offsets, *more.offsets],
            more.reason,
            more.hypotheses,
            more.message,
        )


class Writer:
    """Writes one prediction. Unlike `TextStream`, it leaves out the text that stops unless that is asked for, as the
    clients of servers expect; so it holds back what may become such a text."""

    def __init__(self, text: Text, generation: Generation, stops: Sequence[str] = (), include_stop: bool = False):
        self._stream = dataclasses.replace(text, stops=()).stream()
        self._max_tokens, self._stops, self._include = generation.max_tokens, tuple(stops), include_stop
        self._held, self._made, self._length = "", 0, 0
        self._stopped = False

    def add(self, made: Made) -> Written:
        """Returns what the tokens of a step add; those behind the end are dropped."""
        if made.error:
            return Written(reason=REFUSED, message=made.error)
        if made.hypotheses is not None:
            return Written(reason=STOP, hypotheses=made.hypotheses)
        pieces, tokens, offsets, reason = [], [], [], ""
        for token in made.tokens:
            tokens.append(token)
            offsets.append(self._length)
            self._made += 1
            pieces.append(self._let_through(self._stream.feed(token)))
            if self._stopped or self._stream.ended:
                reason = STOP
            elif self._made >= self._max_tokens:
                pieces.append(self._let_through(self._stream.finish()))
                reason = STOP if self._stopped else LENGTH
            if reason:
                break
        if made.over and reason != STOP:
            pieces.append(self._let_through(self._stream.finish()))
            reason = STOP
        if reason:
            pieces.append(self.rest())
        kept = len(tokens)
        return Written("".join(pieces), tokens, made.log_probs[:kept], made.top[:kept], offsets, reason)

    def rest(self) -> str:
        """Returns the text that is held back, once nothing follows."""
        rest, self._held = self._held, ""
        self._length += len(rest)
        return rest

    def _let_through(self, piece: str) -> str:
        """Returns the text that is certain with one more piece: up to the first stop to be complete."""
        if self._stopped:
            return ""
        held = self._held + piece
        ends = [(held.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in held]
        if ends:
            end, size = min(ends)
            self._stopped, self._held = True, ""
            through = held[:end] if self._include else held[: end + size]
        else:
            kept = max((_overlap(held, stop) for stop in self._stops), default=0)
            through, self._held = held[: len(held) - kept], held[len(held) - kept :]
        self._length += len(through)
        return through


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text are the beginning of `stop`, which is not in it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
