"""Structured output: which tokens a text may go on with, so that it becomes what a grammar says, by llguidance.

Grammars are of bytes, and an id is to them the bytes that it adds to a text (`Vocabulary.bytes_of_ids`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import UserError

MAX_SIZE = 2**17  # characters of a schema, a regular expression or all choices: more would compile for seconds
_WHITESPACE = r"[ \n\r\t]{1,32}"  # between two parts of a JSON text; endless, it would fill a text that never ends


class Grammars:
    """Compiles what texts of a model must be. Making it takes a second for 100,000 ids: make one for each model.

    What cannot be compiled, is too large or fits no text is a UserError that says why.

    Attributes:
      num_logits: how many ids a mask is of.
      ends: the mask of a text that is over: the ids that end a prediction, or all where there are none.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[int], num_logits: int | None = None) -> None:
        """Args:
          vocabulary: what the predicted ids mean.
          stop: the ids that end a prediction; they are allowed where the text is complete.
          num_logits: how many ids the model predicts, if not as many as the vocabulary has.

        Raises:
          UserError: llguidance is not installed, or the text of an id depends on other ids.
        """
        try:
            import llguidance
        except ImportError as error:
            raise UserError("structured output needs the package llguidance: pip install 'meshway[serve]'") from error
        try:
            first, later = vocabulary.bytes_of_ids()
        except ValueError as error:
            raise UserError(f"a {vocabulary} cannot follow a grammar: {error}") from error
        for token in stop:
            first[token] = later[token] = b""
        self.num_logits = vocabulary.size if num_logits is None else num_logits
        self._stop, self._known = list(stop), min(vocabulary.size, self.num_logits)
        self.ends = np.isin(np.arange(self.num_logits), self._stop) if self._stop else np.ones(self.num_logits, bool)
        # An id that adds other bytes at the beginning of a text, such as a word without its space, has an alias for
        # that place. The last id is the end, for all of `stop`.
        self._aliased = np.array([n for n in range(self._known) if first[n] != later[n]], np.int64)
        tokens = [*later[: self._known], *(first[token] for token in self._aliased)]
        self._end = len(tokens)
        table = llguidance.TokenizerWrapper(_Table([*tokens, b"<end>"]))
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._tokenizer = llguidance.LLTokenizer(table, n_vocab=self._end + 1, eos_token=self._end)

    def of_json_schema(self, schema: Mapping[str, Any] | bool) -> "Grammar":
        """Returns the grammar of JSON texts that a JSON schema describes, properties in its order.

        A keyword that cannot be followed, such as `not`, is an error.
        """
        if not isinstance(schema, Mapping | bool):
            raise UserError(f'json_schema: a schema is an object, as {{"type": "object"}}, not {schema!r:.60}')
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        return self._of_json("json_schema", schema)

    def of_json_object(self) -> "Grammar":
        """Returns the grammar of any JSON object."""
        return self._of_json("json_object", {"type": "object"})

    def of_regex(self, regex: str) -> "Grammar":
        """Returns the grammar of texts that a regular expression, in the syntax of Rust's `regex`, matches as a whole:
        without look-around and back-references."""
        return self._compiled("regex", f"/{self._library.regex_to_lark(_bounded('regex', regex), '')}/")

    def of_choices(self, choices: Sequence[str]) -> "Grammar":
        """Returns the grammar of some texts, none of them empty."""
        if isinstance(choices, str) or not all(isinstance(each, str) and each for each in choices) or not choices:
            raise UserError(f"choice: give a list of texts, none empty, not {choices!r:.60}")
        regex = _bounded("choice", "|".join(map(re.escape, choices)))
        return self._compiled("choice", f"/{self._library.regex_to_lark(regex, '')}/")

    def allowed(self, matcher: Any, at_start: bool) -> np.ndarray:
        """Returns which ids may come next, bool [num_logits]."""
        found = np.frombuffer(matcher.compute_logit_bias(), np.uint8) != 0
        mask = np.zeros(self.num_logits, bool)
        mask[: self._known] = found[: self._known]
        if at_start:
            mask[self._aliased] = found[self._known : self._end]
        mask[self._stop] = found[self._end]
        return mask

    def known_as(self, token: int, at_start: bool) -> int:
        """Returns the number of an id among the tokens of the grammar."""
        if token in self._stop:
            return self._end
        place = int(np.searchsorted(self._aliased, token))
        if at_start and place < len(self._aliased) and self._aliased[place] == token:
            return self._known + place
        return token

    def _of_json(self, what: str, schema: Mapping[str, Any]) -> "Grammar":
        own = schema.get("x-guidance", {})  # llguidance's, such as {"lenient": true}
        if not isinstance(own, Mapping):
            raise UserError(f"{what}: x-guidance must be an object, not {own!r:.60}")
        options = {**own, "whitespace_pattern": _WHITESPACE}
        try:
            text = json.dumps({**schema, "x-guidance": options}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{what}: not JSON: {error}") from error
        return self._compiled(what, f"%json {_bounded(what, text)}")

    def _compiled(self, what: str, rule: str) -> "Grammar":
        """Returns the grammar of a rule of llguidance's variant of Lark; `what` names it in messages."""
        # Where a grammar leaves no choice of bytes there is still one of tokens, which the model makes.
        source = f'%llguidance {{"no_forcing": true}}\nstart: {rule}'
        matcher = self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UserError(f"{what}: {_reason(matcher.get_error())}")
        allowed = self.allowed(matcher, at_start=True)
        if failed := failure(matcher):
            raise UserError(f"{what}: {failed}")
        if not allowed.any():
            raise UserError(f"{what}: no text of this model fits")
        return Grammar(self, matcher)


class Grammar:
    """What a text must be, compiled; any number of texts may follow it, each with its own `matcher`."""

    def __init__(self, tokens: Grammars, compiled: Any) -> None:
        self._tokens, self._compiled = tokens, compiled

    def matcher(self) -> "Matcher":
        """Returns what follows one text, from its beginning."""
        return Matcher(self._tokens, self._compiled.deep_copy())


class Matcher:
    """Follows one text, token by token; of what comes after its end nothing counts.

    Attributes:
      over: whether the text was ended, or nothing can follow it.
    """

    def __init__(self, tokens: Grammars, matcher: Any) -> None:
        self._tokens, self._matcher, self._at_start, self.over = tokens, matcher, True, False

    @property
    def complete(self) -> bool:
        """Whether the text so far is one that the grammar asks for."""
        return bool(self._matcher.is_accepting())

    def mask(self) -> np.ndarray:
        """Returns which ids may come next, bool [num_logits]; those that end a prediction where the text is complete.

        Raises:
          UserError: the grammar became too complex to follow.
        """
        if self.over:
            return self._tokens.ends
        allowed = self._tokens.allowed(self._matcher, self._at_start)
        self._check()
        return allowed

    def accept(self, token: int) -> bool:
        """Takes the next id of the text; returns whether it is over.

        Raises:
          ValueError: `mask` does not allow it.
          UserError: the grammar became too complex to follow.
        """
        if self.over:
            return True
        known_as = self._tokens.known_as(token, self._at_start)
        if not self._matcher.validate_tokens([known_as]):
            self._check()
            raise ValueError(f"the grammar does not allow token {token} here")
        self._matcher.consume_token(known_as)
        self._at_start = False
        self._check()
        self.over = bool(self._matcher.is_stopped())
        return self.over

    def _check(self) -> None:
        if failed := failure(self._matcher):
            raise UserError(f"the grammar cannot be followed: {failed}")


def failure(matcher: Any) -> str:
    """Returns why an `LLMatcher` cannot go on, "" where it can."""
    if matcher.is_error() or matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex", "InternalError"):
        return _reason(matcher.get_error())
    return ""


class _Table:
    """What llguidance asks of a tokenizer: the bytes of tokens, and which is the end; it encodes no text here."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return []


def _bounded(what: str, text: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what}: must be a text, not {text!r:.60}")
    if len(text) > MAX_SIZE:
        raise UserError(f"{what}: {len(text):,} characters are more than the {MAX_SIZE:,} that are compiled")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: not a text: {error.reason}") from error
    return text


def _reason(message: str) -> str:
    """Returns llguidance's message in a line: of a regular expression's, which shows the place, what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    wrong = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    found = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", (wrong or lines or [""])[0])[:300]
    return "no text fits" if found in ("", "NoExtension", "NoExtensionBias") else found
