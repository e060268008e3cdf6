"""Predictions on the way from the engine to a client: whole answers, and pieces of a stream, in OpenAI's form."""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.serving.metrics import Metrics
from meshway.framework.serving.openai_requests import Completion, Prompt, ServedModel
from meshway.framework.serving.parameters import RequestError
from meshway.framework.serving.scheduler import Busy, Call, Priority, Request, Scheduler, Unavailable
from meshway.framework.serving.writing import CANCELLED, ERROR, LENGTH, REFUSED, STOP, TIMEOUT, Written

_LEAST_LOG_PROB = -9999.0  # instead of -inf, which JSON has not; OpenAI's
_T = TypeVar("_T")


class Mailbox:
    """What the engine delivers of one request, until its reader comes: of a slow one, the pieces are joined."""

    def __init__(self) -> None:
        self._loop, self._some = asyncio.get_running_loop(), asyncio.Event()
        self._news: dict[int, Written] = {}

    def deliver(self, news: Mapping[int, Written]) -> None:
        """Takes news, on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._put, news)

    def _put(self, news: Mapping[int, Written]) -> None:
        for index, written in news.items():
            self._news[index] = self._news[index].then(written) if index in self._news else written
        self._some.set()

    async def take(self) -> dict[int, Written]:
        """Returns all news since the last call, by generation; waits for some."""
        await self._some.wait()
        self._some.clear()
        news, self._news = self._news, {}
        return news


@dataclasses.dataclass
class _Choice:
    """One answer of several, as JSON: all of it, or a piece."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float | None] = dataclasses.field(default_factory=list)
    top: list[Sequence[tuple[int, float]] | None] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    reason: str = ""

    def add(self, written: Written, before: int = 0) -> None:
        """Adds what was written, behind a text of `before` characters."""
        self.text += written.text
        self.tokens += written.tokens
        self.log_probs += written.log_probs
        self.top += written.top
        self.offsets += [before + each for each in written.offsets]
        self.reason = written.reason or self.reason


class Completions:
    """Answers requests for completions by one engine."""

    def __init__(self, model: ServedModel, scheduler: Scheduler, scorer: Any, metrics: Metrics):
        """Prepares; `scorer` scores prompts that are echoed, or is None."""
        self._model, self._scheduler, self._scorer, self._metrics = model, scheduler, scorer, metrics

    async def whole(self, asked: Completion, priority: Priority, seconds: float | None) -> dict[str, Any]:
        """Returns the answer to a request.

        Args:
          asked: the request, checked.
          priority: see `scheduler.Request`.
          seconds: that it may take; None for any number.

        Raises:
          RequestError: the engine is busy (429), shuts down or took too long (503), or failed (500).
        """
        choices = [await self._echoed(asked, number, priority) for number in range(len(asked.prompts))]
        found: dict[int, _Choice] = {number: _Choice() for number in range(len(asked.generations))}
        searched: dict[int, Written] = {}
        count = 0
        async with contextlib.aclosing(self._news(asked, priority, seconds)) as all_news:
            async for news in all_news:
                for index, written in news.items():
                    found[index].add(written, len(choices[index // asked.best_of].text))
                    count += _made_in(written)
                    if written.hypotheses is not None:
                        searched[index] = written
        answers: list[_Choice] = []
        for number, echoed in enumerate(choices):
            made = [found[number * asked.best_of + n] for n in range(asked.best_of if asked.generations else 0)]
            if number in searched:
                made = [self._of_hypothesis(searched[number], n) for n in range(asked.n)]
            elif asked.best_of > asked.n:
                made = sorted(made, key=_mean_log_prob, reverse=True)[: asked.n]
            answers += [_after(echoed, each) for each in made] or [echoed]
        usage = self._usage(asked, count)
        shown = [self._choice(asked, index, answer) for index, answer in enumerate(answers)]
        return self._answer(asked, _new_id(asked), shown) | {"usage": usage}

    async def pieces(
        self, asked: Completion, priority: Priority, seconds: float | None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yields the chunks of an answer as they are made; raises as `whole`."""
        id, count, begun = _new_id(asked), 0, set[int]()
        more = {"usage": None} if asked.include_usage else {}
        echoed = [await self._echoed(asked, number, priority) for number in range(len(asked.prompts))]

        def chunk(index: int, made: _Choice, first: bool = False) -> dict[str, Any]:
            return self._answer(asked, id, [self._piece(asked, index, made, first)], chunk=True) | more

        for number in range(0 if asked.generations else len(asked.prompts)):
            yield chunk(number, echoed[number])
        async with contextlib.aclosing(self._news(asked, priority, seconds)) as all_news:
            async for news in all_news:
                for index, written in sorted(news.items()):
                    before = echoed[index // asked.best_of]
                    for place, made in self._parts(asked, index, written, len(before.text)):
                        if place not in begun and (asked.echo or asked.is_chat):
                            yield chunk(place, before, first=True)
                        begun.add(place)
                        if made.text or made.reason or (made.tokens and asked.log_probs is not None):
                            yield chunk(place, made)
                    count += _made_in(written)
        if asked.include_usage:
            yield self._answer(asked, id, [], chunk=True) | {"usage": self._usage(asked, count)}

    def _parts(self, asked: Completion, index: int, written: Written, before: int) -> list[tuple[int, _Choice]]:
        """Returns what news of a generation are of each answer."""
        if written.hypotheses is not None:
            return [(index * asked.n + n, self._of_hypothesis(written, n)) for n in range(asked.n)]
        made = _Choice()
        made.add(written, before)
        return [(index, made)]

    async def call(self, compute: Callable[[], _T], priority: Priority) -> _T:
        """Returns what a function makes on the engine's thread; raises what it raises, and RequestError."""
        loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(result: Any) -> None:
            if found.cancelled():
                return
            if isinstance(result, Unavailable):
                found.set_exception(RequestError(503, str(result), None, "unavailable"))
            elif isinstance(result, Exception):
                found.set_exception(result)
            else:
                found.set_result(result)

        self._submit(Call(compute, lambda result: loop.call_soon_threadsafe(settle, result), priority))
        return await found

    def _submit(self, work: Request | Call) -> None:
        try:
            self._scheduler.submit(work)
        except Busy as error:
            raise RequestError(429, f"{error}: come again", None, "queue_full") from None
        except Unavailable as error:
            status = 500 if self._scheduler.failure else 503
            raise RequestError(status, str(error), None, "unavailable") from None

    async def _news(
        self, asked: Completion, priority: Priority, seconds: float | None
    ) -> AsyncGenerator[dict[int, Written]]:
        """Yields what the engine makes of a request, until all of it is over; left early, the request is cancelled."""
        left = set(range(len(asked.generations)))
        if not left:
            return
        mailbox, began = Mailbox(), time.monotonic()
        deadline = None if seconds is None else began + seconds
        request = Request(asked.generations, mailbox.deliver, asked.stops, asked.include_stop, priority, deadline)
        for generation in asked.generations:
            if why := self._scheduler.refusal(generation):
                raise RequestError(400, why, "prompt", "context_length_exceeded")
        self._submit(request)
        self._metrics.prompt_tokens.inc(sum(len(prompt.ids) for prompt in asked.prompts))
        last: dict[int, float] = {}
        try:
            while left:
                news = await mailbox.take()
                self._count(news, last, began)
                for index, written in news.items():
                    if written.reason:
                        left.discard(index)
                    _raise_failure(written)
                yield news
            self._metrics.request_seconds.observe(time.monotonic() - began)
        finally:
            if left:
                self._scheduler.cancel(request)

    def _count(self, news: Mapping[int, Written], last: dict[int, float], began: float) -> None:
        now = time.monotonic()
        for index, written in news.items():
            self._metrics.generated_tokens.inc(_made_in(written))
            if written.tokens and index not in last:
                self._metrics.first_token_seconds.observe(now - began)
            elif written.tokens:
                self._metrics.between_tokens_seconds.observe((now - last[index]) / len(written.tokens))
            last[index] = now

    async def _echoed(self, asked: Completion, number: int, priority: Priority) -> _Choice:
        """Returns what an answer begins with: the prompt, with its log-probabilities where they are asked for."""
        if not asked.echo:
            return _Choice()
        prompt, targets = asked.prompts[number], asked.targets
        scored = prompt if targets is None else targets[number]
        text = scored.text
        if asked.log_probs is None:
            return _Choice(text, reason=LENGTH)
        if self._scorer is None:
            raise RequestError(400, "logprobs: this model scores no prompts", "logprobs")
        known: Sequence[int] = () if targets is None else prompt.ids
        tops, scorer = asked.log_probs, self._scorer
        if tops > scorer.max_top:
            message = f"logprobs: of prompts at most {scorer.max_top} of the likeliest are told"
            raise RequestError(400, message, "logprobs")
        try:
            scores = (await self.call(lambda: scorer.scored([known], [scored.ids], tops), priority))[0]
        except ValueError as error:
            raise RequestError(400, f"echo: {error}", "echo", "context_length_exceeded") from None
        vocabulary = self._model.text.targets
        blank = int(targets is None and not self._model.row_format.start)  # nothing predicts the first token
        log_probs = [None] * blank + [each for each in scores.log_probs[blank:]]
        top = [None] * blank + list(scores.top[blank:])
        return _Choice(text, list(scored.ids), log_probs, top, _offsets(vocabulary, scored, len(text)), LENGTH)

    def _of_hypothesis(self, searched: Written, n: int) -> _Choice:
        assert searched.hypotheses is not None
        each = searched.hypotheses[n]
        ended = bool(each.tokens) and each.tokens[-1] in self._model.text.stop
        text, count = self._model.text.write(each.tokens), len(each.tokens)
        stream, offsets = self._model.text.stream(), []
        length = 0
        for token in each.tokens:
            offsets.append(length)
            length += len(stream.feed(token))
        return _Choice(text, list(each.tokens), list(each.log_probs), [()] * count, offsets, STOP if ended else LENGTH)

    def _usage(self, asked: Completion, made: int) -> dict[str, int]:
        known = sum(len(prompt.ids) for prompt in asked.prompts)
        return {"prompt_tokens": known, "completion_tokens": made, "total_tokens": known + made}

    def _answer(self, asked: Completion, id: str, choices: list[dict], chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if asked.is_chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": id, "object": kind, "created": int(time.time()), "model": self._model.name, "choices": choices}

    def _choice(self, asked: Completion, index: int, made: _Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "logprobs": self._log_probs(asked, made), "finish_reason": made.reason}
        if asked.is_chat:
            return found | {"message": {"role": "assistant", "content": made.text, "refusal": None}}
        return found | {"text": made.text}

    def _piece(self, asked: Completion, index: int, made: _Choice, first: bool = False) -> dict[str, Any]:
        reason = None if first and asked.generations else made.reason or None
        found: dict[str, Any] = {"index": index, "logprobs": self._log_probs(asked, made), "finish_reason": reason}
        if not asked.is_chat:
            return found | {"text": made.text}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        return found | {"delta": delta | {"content": made.text}}

    def _log_probs(self, asked: Completion, made: _Choice) -> dict[str, Any] | None:
        if asked.log_probs is None or not made.tokens:
            return None
        vocabulary = self._model.text.targets
        pieces = vocabulary.pieces(made.tokens)
        log_probs = [None if each is None else _finite(each) for each in made.log_probs]
        tops = [None if top is None else _named(vocabulary, top[: asked.log_probs]) for top in made.top]
        if not asked.is_chat:
            shown = [None if top is None else dict(reversed(top)) for top in tops] if asked.log_probs else None
            return {"tokens": pieces, "token_logprobs": log_probs, "top_logprobs": shown, "text_offset": made.offsets}
        content = [
            {
                "token": piece,
                "logprob": log_prob,
                "bytes": None,
                "top_logprobs": [{"token": name, "logprob": value, "bytes": None} for name, value in top or ()],
            }
            for piece, log_prob, top in zip(pieces, log_probs, tops, strict=True)
        ]
        return {"content": content, "refusal": None}


def _made_in(written: Written) -> int:
    """Returns how many tokens were made in a step."""
    return len(written.tokens) + sum(len(each.tokens) for each in written.hypotheses or ())


def _raise_failure(written: Written) -> None:
    if written.reason == ERROR:
        raise RequestError(500, "the engine has failed", None, "engine_failed")
    if written.reason == REFUSED:
        raise RequestError(422, written.message, None, "grammar_failed")
    if written.reason == TIMEOUT:
        raise RequestError(503, written.message, None, "timeout")
    if written.reason == CANCELLED:
        raise RequestError(503, "the server is shutting down", None, "unavailable")


def _after(echoed: _Choice, made: _Choice) -> _Choice:
    """Returns an answer behind what is echoed."""
    return _Choice(
        echoed.text + made.text,
        echoed.tokens + made.tokens,
        echoed.log_probs + made.log_probs,
        echoed.top + made.top,
        echoed.offsets + made.offsets,
        made.reason,
    )


def _mean_log_prob(made: _Choice) -> float:
    return sum(each or 0.0 for each in made.log_probs) / max(1, len(made.log_probs))


def _new_id(asked: Completion) -> str:
    return f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}"


def _named(vocabulary: Vocabulary, top: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    pieces = vocabulary.pieces([token for token, _ in top])
    return [(piece, _finite(log_prob)) for piece, (_, log_prob) in zip(pieces, top, strict=True)]


def _finite(log_prob: float) -> float:
    return max(float(log_prob), _LEAST_LOG_PROB) if not math.isnan(log_prob) else _LEAST_LOG_PROB


def _offsets(vocabulary: Vocabulary, scored: Prompt, length: int) -> list[int]:
    """Returns how many characters of a text stand before each of its ids."""
    written, offsets, so_far = vocabulary.detokenizer(), [], 0
    for token in scored.ids:
        offsets.append(min(so_far, length))
        so_far += len(written.feed(vocabulary.known(token)))
    return offsets
