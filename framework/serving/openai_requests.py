"""Bodies of requests to what an engine is asked for: tokens, and how predictions are made."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.inference.rows import RowFormat, Text
from meshway.framework.serving.generation import DEFAULT_ALPHA, Generation
from meshway.framework.serving.grammar import Grammar, Grammars
from meshway.framework.serving.parameters import (
    CHAT,
    COMPLETION,
    MOST_CHOICES,
    SAMPLING,
    SEEDS,
    RequestError,
    json_object,
    read,
    string,
    wrong,
)

_DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What requests are checked against.

    Attributes:
      name: by which requests call it.
      text, row_format: of its session.
      max_length: the most tokens of a slot: of prompt and prediction together, or of the prediction of an encoder's.
      max_input_length: the most tokens of a prompt.
      max_top_log_probs: how many likeliest tokens may be asked for at each place.
      max_beams: of a search; 1: none is served.
      max_predictions: the most predictions of one request.
      grammars: compile what a text must be; None where the model's texts cannot follow any.
      chat: renders messages to token ids; None where the model has no chat template.
    """

    name: str
    text: Text
    row_format: RowFormat
    max_length: int
    max_input_length: int
    max_top_log_probs: int = 0
    max_beams: int = 1
    max_predictions: int = MOST_CHOICES
    grammars: Grammars | None = None
    chat: Any = None

    def room(self, prompt: Sequence[int]) -> int:
        """Returns the most tokens that a prediction of this prompt may have."""
        return self.max_length - (0 if self.row_format.has_encoder else self.row_format.prompt_size(prompt))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: its ids, and its text where it is echoed."""

    ids: tuple[int, ...]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A checked request for completions.

    Attributes:
      is_chat: whether it is a chat's.
      prompts: what goes on.
      generations: `best_of` of each prompt, or one search; none where nothing is made (`max_tokens` 0).
      n: how many of them are returned.
      best_of: how many there are of each prompt.
      log_probs: how many likeliest tokens are told beside each; None where no log-probability is.
      echo: whether the text begins with the prompt.
      targets: what is scored behind each prompt instead of it; None for none.
      stream, include_usage: whether pieces come as they are made, and the count of tokens behind them.
      stops, include_stop: see `scheduler.Request`.
    """

    is_chat: bool
    prompts: Sequence[Prompt]
    generations: Sequence[Generation]
    n: int = 1
    best_of: int = 1
    log_probs: int | None = None
    echo: bool = False
    targets: Sequence[Prompt] | None = None
    stream: bool = False
    include_usage: bool = False
    stops: Sequence[str] = ()
    include_stop: bool = False


def prompts_of(name: str, value: Any, read_ids: Callable[[Any], list[int]], most: int) -> list[Prompt]:
    """Returns the ids of a text, of ids, or of a list of either.

    Args:
      name: of the parameter.
      value: as JSON holds it.
      read_ids: makes ids of one.
      most: of the list.

    Raises:
      RequestError: it is none of these.
    """
    if value is None:
        raise RequestError(400, f"{name} is missing", name, "missing_required_parameter")
    alone = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
    given = [value] if alone else value
    if not isinstance(given, list) or not given:
        raise wrong(name, value, "a text, a list of token ids, or a list of either")
    if len(given) > most:
        raise RequestError(400, f"{name}: {len(given):,} at once are more than {most:,}", name)
    found = []
    for each in given:
        try:
            text = string(name, each) if isinstance(each, str) else ""
            found.append(Prompt(tuple(read_ids(each)), text))
        except ValueError as error:
            raise RequestError(400, f"{name}: {error}", name) from None
    return found


def completion(body: Mapping[str, Any], model: ServedModel) -> Completion:
    """Returns what a body of /v1/completions asks for.

    Raises:
      RequestError: something of it is wrong.
    """
    given = read(body, COMPLETION, model.name)
    prompts = prompts_of("prompt", given.get("prompt"), model.text.read_inputs, model.max_predictions)
    echo, max_tokens = given.get("echo", False), given.get("max_tokens", _DEFAULT_MAX_TOKENS)
    if echo:
        decode = model.text.inputs.decode
        prompts = [dataclasses.replace(each, text=each.text or decode(each.ids)) for each in prompts]
    targets = None
    if "targets" in given:
        targets = prompts_of("targets", given["targets"], model.text.read_begun, model.max_predictions)
        decode = model.text.targets.decode
        targets = [dataclasses.replace(each, text=each.text or decode(each.ids)) for each in targets]
        if not echo or max_tokens or "logprobs" not in given or len(targets) != len(prompts):
            message = "targets, one a prompt, are scored: they go with echo, logprobs and max_tokens=0"
            raise RequestError(400, message, "targets")
    if not max_tokens and not echo:
        raise RequestError(400, "max_tokens: 0 is for echo alone: nothing would be made", "max_tokens")
    n, best_of = given.get("n", 1), given.get("best_of", given.get("n", 1))
    if best_of < n:
        raise RequestError(400, f"best_of: {best_of} predictions are fewer than the {n} of n", "best_of")
    if best_of > n and given.get("stream"):
        raise RequestError(400, "best_of: which are the best is not known while they stream", "best_of")
    log_probs = given.get("logprobs")
    _check_top("logprobs", log_probs, model)
    if echo and log_probs is not None and model.row_format.has_encoder and targets is None:
        message = "echo: the prompt goes to an encoder, which predicts no token of it: give targets to score"
        raise RequestError(400, message, "echo")
    top = max(log_probs or 0, 0)
    made = _generations(prompts, given, model, max_tokens, best_of, top) if max_tokens else []
    return _completion(False, prompts, made, given, n, best_of, log_probs, echo, targets)


def chat_completion(body: Mapping[str, Any], model: ServedModel) -> Completion:
    """Returns what a body of /v1/chat/completions asks for.

    Raises:
      RequestError: something of it is wrong, or the model has no chat template.
    """
    given = read(body, CHAT, model.name)
    if model.chat is None:
        message = f"{model.name} has no chat template: ask /v1/completions instead"
        raise RequestError(400, message, "messages", "no_chat_template")
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list of messages", "messages", "missing_required_parameter")
    try:
        prompt = Prompt(tuple(model.chat.render(messages)))
    except (UserError, ValueError) as error:
        raise RequestError(400, f"messages: {error}", "messages") from None
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise RequestError(400, "max_tokens and max_completion_tokens are the same: give one", "max_tokens")
    asked = given.get("max_completion_tokens", given.get("max_tokens"))
    if asked == 0:
        raise RequestError(400, "max_tokens: 0 is not a whole number of at least 1", "max_tokens")
    max_tokens = max(1, model.room(prompt.ids)) if asked is None else asked
    if "top_logprobs" in given and not given.get("logprobs"):
        raise RequestError(400, "top_logprobs goes with logprobs=true", "top_logprobs")
    log_probs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    _check_top("top_logprobs", log_probs, model)
    n = given.get("n", 1)
    made = _generations([prompt], given, model, max_tokens, n, log_probs or 0)
    return _completion(True, [prompt], made, given, n, n, log_probs, False, None)


def _completion(
    is_chat: bool,
    prompts: Sequence[Prompt],
    made: Sequence[Generation],
    given: Mapping[str, Any],
    n: int,
    best_of: int,
    log_probs: int | None,
    echo: bool,
    targets: Sequence[Prompt] | None,
) -> Completion:
    stream, usage = given.get("stream", False), given.get("stream_options", False)
    if "stream_options" in given and not stream:
        raise RequestError(400, "stream_options goes with stream=true", "stream_options")
    stops = given.get("stop", ())
    if stops and any(each.num_beams > 1 for each in made):
        raise RequestError(400, "stop: a search compares hypotheses that end by a token, not by a text", "stop")
    include = given.get("include_stop_str_in_output", False)
    best_of = 1 if any(each.num_beams > 1 for each in made) else best_of
    return Completion(is_chat, prompts, made, n, best_of, log_probs, echo, targets, stream, usage, stops, include)


def _check_top(name: str, asked: int | None, model: ServedModel) -> None:
    if (asked or 0) > model.max_top_log_probs:
        raise RequestError(400, f"{name}: at most {model.max_top_log_probs} of each token are told here", name)


def _generations(
    prompts: Sequence[Prompt], given: Mapping[str, Any], model: ServedModel, max_tokens: int, count: int, top: int
) -> list[Generation]:
    """Returns `count` predictions of each prompt, or one search."""
    num_beams = given.get("num_beams", 1)
    if len(prompts) * count > model.max_predictions:
        message = f"n: {len(prompts) * count:,} predictions at once are more than {model.max_predictions:,}"
        raise RequestError(400, message, "n")
    for name in ("length_penalty",) if num_beams == 1 else (*SAMPLING, "seed", "best_of", "logit_bias"):
        if name in given:
            why = "without num_beams" if num_beams == 1 else "in a beam search, which draws nothing"
            raise RequestError(400, f"{name} has no effect {why}: leave out either", name)
    if num_beams > 1:
        _check_beams(num_beams, given, model)
        count = 1
    if unknown := [token for token in given.get("logit_bias", {}) if token >= model.text.targets.size]:
        raise RequestError(400, f"logit_bias: there is no token {unknown[0]}", "logit_bias")
    grammar = _grammar(given, model)
    seed = given.get("seed", secrets.randbelow(SEEDS))
    options = {name: given[name] for name in SAMPLING if name in given}
    found = []
    for prompt in prompts:
        size = model.row_format.prompt_size(prompt.ids)
        if not size:
            raise RequestError(400, "prompt: it is empty, and the model has no token to begin with", "prompt")
        if size > model.max_input_length:
            message = f"prompt: it has {size:,} tokens, and there is room for {model.max_input_length:,}"
            raise RequestError(400, message, "prompt", "context_length_exceeded")
        found += [
            Generation(
                prompt.ids,
                max_tokens,
                **options,
                logit_bias=given.get("logit_bias", {}),
                seed=seed,
                decode=decode,
                num_beams=num_beams,
                alpha=given.get("length_penalty", DEFAULT_ALPHA),
                top_log_probs=top,
                grammar=grammar,
            )
            for decode in range(count)
        ]
    return found


def _check_beams(num_beams: int, given: Mapping[str, Any], model: ServedModel) -> None:
    if num_beams > model.max_beams:
        served = f"at most {model.max_beams}" if model.max_beams > 1 else "none (meshway serve --beams=N)"
        raise RequestError(400, f"num_beams: {num_beams} beams are not served here: {served}", "num_beams")
    if given.get("n", 1) > num_beams:
        raise RequestError(400, f"n: a search of {num_beams} beams has no {given['n']} predictions", "n")


def _grammar(given: Mapping[str, Any], model: ServedModel) -> Grammar | None:
    """Returns what a text must be, compiled; None for any."""
    form = given.get("response_format", {"type": "text"})
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(400, "response_format.type is not text, json_object or json_schema", "response_format")
    asked = [name for name in ("regex", "choice") if name in given] + ["response_format"] * (kind != "text")
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError(400, f"{' and '.join(asked)}: a text can follow one of them", asked[0])
    if model.grammars is None or given.get("num_beams", 1) > 1:
        raise RequestError(400, f"{asked[0]} is not served here", asked[0], "not_served")
    try:
        if asked == ["regex"]:
            return model.grammars.of_regex(given["regex"])
        if asked == ["choice"]:
            return model.grammars.of_choices(given["choice"])
        if kind == "json_object":
            return model.grammars.of_json_object()
        schema = json_object("response_format.json_schema", form.get("json_schema")).get("schema")
        return model.grammars.of_json_schema(json_object("response_format.json_schema.schema", schema))
    except UserError as error:
        raise RequestError(422, f"{asked[0]}: {error}", asked[0]) from None
