"""The flags of the subjects of `meshway bench`, as `verb_flags.py` has those of verbs. Light, too."""

import dataclasses
from typing import Literal

from meshway.launch.flags import above_zero, binds, flag


@dataclasses.dataclass(frozen=True)
class BenchTrainFlags:
    interleave: bool = binds(
        "bench.train.measure.interleave",
        "speak the burst protocol on a pipe, to be timed in turn with other programs",
    )


@dataclasses.dataclass(frozen=True)
class BenchDataFlags:
    seconds: int | None = binds("bench.data.measure.seconds", "how long to time (default: 45)", "N")
    batches: int | None = binds("bench.data.measure.batches", "over how many batches memory is watched", "N")
    workers: int | None = binds("bench.data.measure.workers", "processes (default: one a core, 4 at most)", "N")
    corpus_size: str | None = binds(
        "bench.data.measure.corpus_size", "measure synthetic corpora of so many examples instead", "N,N"
    )
    json: bool = binds("bench.data.measure.as_json", "print the results as JSON too")


@dataclasses.dataclass(frozen=True)
class BenchParallelFlags:
    layouts: str | None = binds(
        "bench.parallel.measure.layouts", "which (fsdp,model_1d; default: all shipped)", "LAYOUTS"
    )
    steps: int | None = binds("bench.parallel.measure.steps", "steps to time too (default: none)", "N")


@dataclasses.dataclass(frozen=True)
class BenchPlanFlags:
    table: Literal["times", "memory", "flops"] | None = flag("which (default: all)", "TABLE", default=None)
    recipes: str | None = flag("of memory and flops: which recipes (default: six)", "RECIPES", default=None)


@dataclasses.dataclass(frozen=True)
class BenchRoutingFlags:
    seeds: int | None = binds("bench.routing.Routing.seeds", "how many seeds to train from (default: 4)", "N")


@dataclasses.dataclass(frozen=True)
class BenchDecodeFlags:
    prompt_length: int | None = binds("bench.decode.Setting.prompt_length", "tokens a prompt (default: 128)", "N")
    new_tokens: int | None = binds("bench.decode.Setting.new_tokens", "new tokens in a turn (default: 16)", "N")
    interleave: bool = binds(
        "bench.decode.measure.interleave",
        "speak the burst protocol on a pipe, to be timed in turn with other programs",
    )


@dataclasses.dataclass(frozen=True)
class BenchAcceleratorFlags:
    small: bool = flag("everything in small, on any machine: what is measured then says nothing", default=False)


@dataclasses.dataclass(frozen=True)
class BenchServeFlags:
    url: str = flag("where the server is (default: http://127.0.0.1:8000)", "URL", default="http://127.0.0.1:8000")
    concurrency: int | None = flag("requests at a time, each after an answer (default: 8)", "N", default=None)
    rate: float | None = flag("or requests a second, at random moments", "R", default=None, reads=above_zero)
    requests: int = flag("requests in all (default: 100)", "N", default=100)
    prompt_tokens: int = flag("tokens a prompt (default: 128)", "N", default=128)
    max_tokens: int = flag("the most new tokens of each (default: 32)", "N", default=32)
    vocab_size: int = flag("prompts are of token ids below it (default: 128)", "N", default=128)
    slo_ttft: float | None = flag(
        "seconds to the first token within which an answer is good", "S", default=None, reads=above_zero
    )
    slo_itl: float | None = flag(
        "seconds between tokens, on average, within which it is good", "S", default=None, reads=above_zero
    )
    seed: int = flag("of prompts and moments (default: 0)", "N", default=0, least=0)
    token_file: str | None = flag("the server's bearer tokens; the first is used", "FILE", default=None)
