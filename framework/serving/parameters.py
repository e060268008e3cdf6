"""The parameters of requests, as OpenAI's clients write them: what each may be, and how a wrong one is refused.

A parameter that is not served is refused by name: nothing is accepted that would have no effect, but for `user`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from meshway.framework.errors import did_you_mean

MOST_CHOICES, MOST_STOPS, MOST_BIASES, MOST_TEXTS = 128, 16, 1024, 1000
SEEDS = 2**31  # seeds are below
_KINDS: dict[type, str] = {list: "list", dict: "object"}


class RequestError(Exception):
    """A request that is refused: an HTTP status, and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


Reader = Callable[[str, Any], Any]  # (name, value as JSON holds it) -> value; raises RequestError


def wrong(name: str, value: Any, wanted: str) -> RequestError:
    """Returns the refusal of a value; `wanted` is in words what would be right."""
    shown = json.dumps(value)[:60] if isinstance(value, str | int | float | None) else f"this {_KINDS[type(value)]}"
    return RequestError(400, f"{name}: {shown} is not {wanted}", name)


def _number(least: float, most: float, above: bool = False) -> Reader:
    def read(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or (above and value == least):
            raise wrong(name, value, f"a number {'above' if above else 'of at least'} {least:g}, at most {most:g}")
        return float(value)

    return read


def _whole(least: int, most: int) -> Reader:
    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}")
        return value

    return read


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"{name}: a surrogate without its other half is no text", name) from None
    return value


def strings(most: int) -> Reader:
    def read(name: str, value: Any) -> tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        if (
            not isinstance(given, list)
            or len(given) > most
            or not all(isinstance(each, str) and each for each in given)
        ):
            raise wrong(name, value, f"a text, or a list of at most {most}, none empty")
        return tuple(string(name, each) for each in given)

    return read


def json_object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def _biases(name: str, value: Any) -> dict[int, float]:
    given = json_object(name, value)
    if len(given) > MOST_BIASES or not all(key.isdecimal() and len(key) < 10 for key in given):
        raise wrong(name, value, f"an object of at most {MOST_BIASES} biases by token id")
    return {int(key): _number(-100, 100)(name, bias) for key, bias in given.items()}


def _any(name: str, value: Any) -> Any:
    return value


def _stream_options(name: str, value: Any) -> bool:
    given = json_object(name, value)
    if wrong := [key for key in given if key != "include_usage"]:
        raise RequestError(400, f"{name}.{wrong[0]} is not known; there is include_usage", name, "unknown_parameter")
    return _flag(f"{name}.include_usage", given.get("include_usage", False))


SAMPLING: dict[str, Reader] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1, above=True),
    "top_k": _whole(0, 1_000_000_000),
    "min_p": _number(0, 0.999),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 100, above=True),
}
_COMMON: dict[str, Reader] = {
    **SAMPLING,
    "model": string,
    "user": string,
    "n": _whole(1, MOST_CHOICES),
    "seed": _whole(0, SEEDS - 1),
    "stop": strings(MOST_STOPS),
    "include_stop_str_in_output": _flag,
    "logit_bias": _biases,
    "stream": _flag,
    "stream_options": _stream_options,
    "max_tokens": _whole(0, 1_000_000_000),
    "num_beams": _whole(1, 1024),
    "length_penalty": _number(0, 100),
    "response_format": json_object,
    "regex": string,
    "choice": strings(MOST_TEXTS),
}
COMPLETION: dict[str, Reader] = {
    **_COMMON,
    "prompt": _any,
    "best_of": _whole(1, MOST_CHOICES),
    "echo": _flag,
    "logprobs": _whole(0, 1000),
    "targets": _any,
}
CHAT: dict[str, Reader] = {
    **_COMMON,
    "messages": _any,
    "max_completion_tokens": _whole(1, 1_000_000_000),
    "logprobs": _flag,
    "top_logprobs": _whole(0, 1000),
}
SCORE: dict[str, Reader] = {"model": string, "inputs": _any, "targets": _any, "user": string}
EMBEDDINGS: dict[str, Reader] = {"model": string, "input": _any, "encoding_format": string, "user": string}
TOKENIZE: dict[str, Reader] = {"model": string, "text": _any}
_ALTERNATIVES = {"suffix", "tools", "tool_choice", "functions", "dimensions", "modalities", "audio", "store"}


def parse_json(data: bytes) -> dict[str, Any]:
    """Returns the object that a body holds; RequestError for any other."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:120]
        raise RequestError(400, f"the body is not JSON: {reason}", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError(400, "the body must be a JSON object", None, "invalid_json")
    return found


def read(body: Mapping[str, Any], readers: Mapping[str, Reader], model: str) -> dict[str, Any]:
    """Returns the parameters that a body gives, each checked; null is as if it were left out.

    Raises:
      RequestError: one is unknown or wrong, or another model is asked for (404).
    """
    found = {}
    for name, value in body.items():
        if name not in readers:
            served = " is not served here" if name in _ALTERNATIVES else " is not known"
            near = did_you_mean(name, readers)
            raise RequestError(400, f"the parameter {name[:60]!r}{served}{near}", name[:60], "unknown_parameter")
        if value is not None:
            found[name] = readers[name](name, value)
    if found.get("model", model) != model:
        message = f"there is no model {found['model'][:60]!r} here, only {model!r}"
        raise RequestError(404, message, "model", "model_not_found")
    return found
