"""meshway bench serve: requests to a running server, so many at a time or at random moments, and what users would see.

    meshway bench serve --url=http://127.0.0.1:8000 --concurrency=16
    meshway bench serve --rate=4 --requests=500 --slo_ttft=0.5 --slo_itl=0.05

With `--concurrency` each answer is followed by the next request (closed loop). With `--rate` requests come at the
moments of a Poisson process, however slow the answers are (open loop), which is how users come. Prompts are random
token ids, so that none is known from before. Goodput counts the requests within both limits: DistServe (Zhong et al.
2024, section 2). The client takes a core: where it shares the server's, both are slower.
"""

import asyncio
import collections
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import numpy as np

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import local_path
from meshway.framework.terminal import count_of, format_columns, stage
from meshway.launch.bench_flags import BenchServeFlags
from meshway.launch.invocation import Invocation

try:
    import httpx2
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise UserError(f"meshway bench serve needs more packages: pip install 'meshway[serve]' ({error})") from error

PATH = "/v1/completions"
PERCENTILES = (50, 90, 99)
_FIRST_ID = 3  # those before it are padding, end and unknown in most vocabularies
_TIMEOUT = 120.0  # seconds without a byte
_LOST = 0  # in place of a status: the connection failed or was closed
_AGREES_WITHIN = 2.0  # seconds, in which a server counts what it has answered


@dataclasses.dataclass(frozen=True)
class Answered:
    """How a request was answered; times are in seconds.

    Attributes:
      status: of HTTP; 0 where the connection was lost.
      sent, ended: by the clock of `time.perf_counter`.
      pieces: when each piece of text came.
      prompt_tokens, completion_tokens: as the server counts them.
      error: what it said, where the status is not 200.
    """

    status: int
    sent: float
    ended: float
    pieces: Sequence[float] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def seconds(self) -> float:
        """From the request to the end of its answer."""
        return self.ended - self.sent

    @property
    def first(self) -> float:
        """From the request to its first piece, or to its end where no token made text."""
        return (self.pieces[0] if self.pieces else self.ended) - self.sent

    @property
    def between(self) -> float:
        """The mean between tokens, after the first."""
        return (self.seconds - self.first) / max(self.completion_tokens - 1, 1)

    def is_good(self, ttft: float | None, itl: float | None) -> bool:
        """Returns whether it was answered within limits of the first token and of the mean between tokens."""
        return self.status == 200 and self.first <= (ttft or np.inf) and self.between <= (itl or np.inf)


Counts = collections.Counter[str]  # of requests by status, and of tokens


def run(invocation: Invocation) -> int:
    """Sends the requests and prints what came of them.

    Returns:
      1 where the server's own counts differ from what was received, else 0.

    Raises:
      UserError: the flags contradict each other, or the server refuses all requests.
      EnvironmentFailure: the server cannot be reached, or answers none.
    """
    flags: BenchServeFlags = invocation.options
    if flags.rate is not None and flags.concurrency is not None:
        raise UserError("give --rate, requests at random moments, or --concurrency, so many at a time; not both")
    if not flags.url.startswith(("http://", "https://")):
        raise UserError(f"--url={flags.url} must begin with http:// or https://")
    with stage(f"{count_of(flags.requests, 'request')} to {flags.url}"):
        model, answers, differences = asyncio.run(_measure(flags))
    if not any(answer.status == 200 for answer in answers):
        first = answers[0]
        is_refused = all(400 <= answer.status < 500 and answer.status != 429 for answer in answers)
        message = f"{flags.url} answered none of {len(answers)} requests: {first.status or 'lost'}: {first.error}"
        raise (UserError if is_refused else EnvironmentFailure)(message)
    print("\n".join(_report(flags, model, answers)))
    if differences is None:
        print(f"{flags.url} has no /metrics of meshway's: nothing to compare with")
        return 0
    for difference in differences:
        print(f"/metrics differs: {difference}")
    if not differences:
        print("/metrics has counted the same requests and tokens")
    return int(bool(differences))


async def _measure(flags: BenchServeFlags) -> tuple[str, list[Answered], list[str] | None]:
    """Returns the model's name, the answers in the order of the requests, and how the server's counts differ."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(
        base_url=flags.url, headers=_headers(flags), timeout=_TIMEOUT, limits=limits, trust_env=False
    ) as client:
        model = await _model(client)
        before = await _counted(client)
        answers = await _send(flags, lambda number: _complete(client, _body(flags, model, number)))
        if before is None:
            return model, answers, None
        received, until = _received(answers), time.monotonic() + _AGREES_WITHIN
        while True:
            differences = _differences(received, before, await _counted(client) or Counts())
            if not differences or time.monotonic() > until:
                return model, answers, differences
            await asyncio.sleep(0.1)


def _headers(flags: BenchServeFlags) -> dict[str, str]:
    """Returns what a request is allowed by.

    Raises:
      UserError: there is no such file, or no token in it.
    """
    if flags.token_file is None:
        return {}
    try:
        tokens = local_path(flags.token_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token_file={flags.token_file}: {error}") from error
    if not tokens:
        raise UserError(f"--token_file={flags.token_file} holds no token")
    return {"authorization": f"Bearer {tokens[0]}"}


async def _model(client: httpx2.AsyncClient) -> str:
    """Returns the name of the first model served.

    Raises:
      UserError: the server refuses to tell.
      EnvironmentFailure: it cannot be reached, or is no such server.
    """
    try:
        response = await client.get("/v1/models")
    except httpx2.HTTPError as error:
        raise EnvironmentFailure(f"cannot reach {client.base_url}: {error or type(error).__name__}") from error
    if response.status_code == 401:
        raise UserError(f"{client.base_url} wants a token: give --token_file=FILE")
    try:
        return response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        status = response.status_code
        raise EnvironmentFailure(f"{client.base_url}v1/models lists no model (status {status})") from error


def _body(flags: BenchServeFlags, model: str, number: int) -> dict[str, object]:
    """Returns request `number`: its prompt and its seed depend on nothing else."""
    random = np.random.default_rng([flags.seed, number])
    prompt = random.integers(_FIRST_ID, max(flags.vocab_size, _FIRST_ID + 1), flags.prompt_tokens)
    return {
        "model": model,
        "prompt": prompt.tolist(),
        "max_tokens": flags.max_tokens,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _send(flags: BenchServeFlags, ask: Callable[[int], Awaitable[Answered]]) -> list[Answered]:
    """Returns the answers in the order of the requests, sent in a closed or an open loop."""
    answers: dict[int, Answered] = {}

    async def one(number: int) -> None:
        answers[number] = await ask(number)

    async with asyncio.TaskGroup() as group:
        if flags.rate is None:
            numbers = iter(range(flags.requests))

            async def worker() -> None:
                for number in numbers:
                    await one(number)

            for _ in range(min(flags.concurrency or 8, flags.requests)):
                group.create_task(worker())
        else:
            async for number in _arrivals(flags.requests, flags.rate, flags.seed):
                group.create_task(one(number))
    return [answers[number] for number in range(flags.requests)]


async def _arrivals(requests: int, rate: float, seed: int) -> AsyncIterator[int]:
    """Yields the numbers of requests at the moments of a Poisson process, `rate` a second. None waits
    for another."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for number, moment in enumerate(itertools.accumulate(gaps)):
        await asyncio.sleep(begin + moment - loop.time())
        yield number


async def _complete(client: httpx2.AsyncClient, body: dict[str, object]) -> Answered:
    """Asks for one completion, and reads it as it comes."""
    clock = time.perf_counter
    sent, pieces, prompt_tokens, completion_tokens = clock(), list[float](), 0, 0
    try:
        async with client.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answered(response.status_code, sent, clock(), error=text[:500])
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return Answered(200, sent, clock(), pieces, prompt_tokens, completion_tokens)
                record = json.loads(event.data)
                if "error" in record:
                    return Answered(_LOST, sent, clock(), pieces, error=str(record["error"])[:500])
                if any(choice["text"] for choice in record["choices"]):
                    pieces.append(clock())
                if usage := record.get("usage"):
                    prompt_tokens, completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        error = "the stream ended too early"
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Answered(_LOST, sent, clock(), pieces, error=error[:500])


async def _counted(client: httpx2.AsyncClient) -> Counts | None:
    """Returns what the server has counted, None where it has no such page."""
    try:
        response = await client.get("/metrics")
        samples = [each for family in text_string_to_metric_families(response.text) for each in family.samples]
    except (httpx2.HTTPError, ValueError):
        return None
    counts = Counts()
    for sample in samples:
        if sample.name == "meshway_requests_total" and sample.labels.get("endpoint") == PATH:
            counts[f"requests of status {sample.labels['status']}"] += round(sample.value)
        if sample.name in ("meshway_prompt_tokens_total", "meshway_generated_tokens_total"):
            counts[sample.name.removeprefix("meshway_").removesuffix("_total").replace("_", " ")] += round(sample.value)
    return counts if response.status_code == 200 and "generated tokens" in counts else None


def _received(answers: Iterable[Answered]) -> Counts:
    """Returns what the server should have counted."""
    counts = Counts()
    for answer in answers:
        if answer.status != _LOST:
            counts[f"requests of status {answer.status}"] += 1
            counts["prompt tokens"] += answer.prompt_tokens
            counts["generated tokens"] += answer.completion_tokens
    return counts


def _differences(received: Counts, before: Counts, after: Counts) -> list[str]:
    """Returns in words which of the server's counts rose by another number than was received."""
    return [
        f"{after[name] - before[name]:,} {name} counted there, {received[name]:,} received here"
        for name in sorted({*received, *before, *after})
        if after[name] - before[name] != received[name]
    ]


def _report(flags: BenchServeFlags, model: str, answers: Sequence[Answered]) -> list[str]:
    """Returns the lines of the report; at least one answer has status 200."""
    good = [answer for answer in answers if answer.status == 200]
    seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    made, read = (sum(getattr(each, name) for each in good) for name in ("completion_tokens", "prompt_tokens"))
    way = f"{flags.rate:g} a second at random moments" if flags.rate else f"{flags.concurrency or 8} at a time"
    asked = f"{flags.prompt_tokens} prompt tokens, at most {flags.max_tokens} new ones"
    statuses = collections.Counter(answer.status for answer in answers)
    told = ", ".join(f"{status or 'lost'}: {count:,}" for status, count in sorted(statuses.items()))
    gaps = [gap for answer in good for gap in np.diff(answer.pieces)]
    rows = {
        "to the first token": [answer.first for answer in good],
        "between pieces of text": gaps,
        "to the last token": [answer.seconds for answer in good],
    }
    table = [["milliseconds", *(f"p{each}" for each in PERCENTILES), "most"]]
    for name, values in rows.items():
        cells = [*np.percentile(values, PERCENTILES), max(values)] if values else []
        table.append([name, *(f"{1000 * cell:,.1f}" for cell in cells)] if cells else [name, *["-"] * 4])
    lines = [
        f"{model} at {flags.url}: {count_of(len(answers), 'request')}, {way}; {asked}",
        f"answers by status: {told}",
        f"in {seconds:.2f} s: {len(good) / seconds:,.2f} answers, {made / seconds:,.1f} new tokens and "
        f"{read / seconds:,.1f} prompt tokens a second",
        "",
        *format_columns(table, right=range(1, 5)),
        "",
    ]
    if failed := next((answer for answer in answers if answer.status not in (200, 429)), None):
        lines.append(f"the first that failed: {failed.status or 'lost'}: {failed.error}")
    if flags.slo_ttft or flags.slo_itl:
        within = sum(answer.is_good(flags.slo_ttft, flags.slo_itl) for answer in answers)
        bounds = [f"first token within {flags.slo_ttft:g} s"] if flags.slo_ttft else []
        bounds += [f"tokens {flags.slo_itl:g} s apart on average"] if flags.slo_itl else []
        share = within / len(answers)
        lines.append(f"goodput ({', '.join(bounds)}): {within / seconds:,.2f} a second, {share:.1%} of all requests")
    return lines
