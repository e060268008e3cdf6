"""Chats as prompts: messages through the Jinja template that came with a model, then to token ids.

Templates see what transformers' `apply_chat_template` gives them. They run in a sandbox, and what people write stays
text: the text of a control token in a message is not that token.
"""

import datetime
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.conversion import tokenizer_files
from meshway.framework.data.vocabularies import SentencePiece
from meshway.framework.data.vocabulary import HuggingFace, Vocabulary
from meshway.framework.errors import UserError, first_line

Message = Mapping[str, Any]


class ChatTemplate:
    """Makes prompts of messages."""

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str], vocabulary: Vocabulary) -> None:
        """Args:
          templates: Jinja sources by name: "default", and "tool_use" where there is another for tools.
          tokens: the special tokens that they may name, as `bos_token`.
          vocabulary: of prompts.

        Raises:
          UserError: jinja2 is not installed; a template is not Jinja.
        """
        self._templates = {name: _compiled(name, source) for name, source in templates.items()}
        self._tokens, self._vocabulary, self._plain = tokens, vocabulary, vocabulary
        self._control = dict[str, int]()
        if isinstance(vocabulary, HuggingFace):
            self._control = {text: token for token, text in vocabulary.special_tokens.items()}
            self._plain = vocabulary.literal
        elif isinstance(vocabulary, SentencePiece):
            self._control = {text: token for text, token in vocabulary.ids.items() if token in vocabulary.marks}
        texts = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._any_control = re.compile("|".join(texts) if texts else r"(?!)")

    @classmethod
    def read(cls, directory: Path, vocabulary: Vocabulary) -> "ChatTemplate | None":
        """Returns that of a Hugging Face directory, or of the files that a converted run keeps of one; None where there
        is none.

        Raises:
          UserError: a file is damaged; see the constructor.
        """
        templates, tokens = tokenizer_files.read_chat_templates(directory)
        return cls(templates, tokens, vocabulary) if templates else None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **more: Any) -> list[int]:
        """Returns the ids of the prompt that asks for the next message; see `text` for the arguments.

        Raises:
          UserError: see `text`.
        """
        held = _Held(self._any_control)
        text = self._rendered(held.without(messages), held.without(tools), more)
        if not held.texts and isinstance(self._vocabulary, HuggingFace):
            return self._vocabulary.encode(text)
        found, at = list[int](), 0
        for control in [*self._any_control.finditer(text), None]:
            between = held.restored(text[at : control.start() if control else len(text)])
            found += self._plain.encode(between) if between else []
            if control:
                found.append(self._control[control[0]])
                at = control.end()
        return found

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **more: Any) -> str:
        """Returns that prompt as text.

        Args:
          messages: as OpenAI's API has them: {"role": "user", "content": "..."}, or parts of type text as content.
          tools: descriptions of functions.
          **more: other variables of the template, such as enable_thinking=False.

        Raises:
          UserError: a message is none; the template refuses them, or fails.
        """
        return self._rendered(messages, tools, more)

    def _rendered(self, messages: Any, tools: Any, more: Mapping[str, Any]) -> str:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise UserError("messages must be a list of messages, and not an empty one")
        plain = [_message(place, each) for place, each in enumerate(messages)]
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UserError(f"the chat templates of this model are {sorted(self._templates)}: none is 'default'")
        given = {"add_generation_prompt": True, "tools": list(tools) or None, "documents": None, **self._tokens, **more}
        try:
            text: str = self._templates[name].render({**given, "messages": plain})
        except Exception as error:  # a template's own refusal, or any error of its code
            raise UserError(f"the model's chat template does not take these messages: {first_line(error)}") from error
        return text


class _Held:
    """Texts of control tokens in messages, taken out before a template sees them, and put back as text."""

    def __init__(self, control: re.Pattern[str]) -> None:
        self.texts, self._control, self._key = list[str](), control, secrets.token_hex(8)

    def without(self, value: Any) -> Any:
        """Returns a JSON value whose strings have a mark in place of each such text."""
        if isinstance(value, str):
            return self._control.sub(self._mark, value)
        if isinstance(value, Mapping):
            return {self.without(key): self.without(each) for key, each in value.items()}
        return [self.without(each) for each in value] if isinstance(value, Sequence) else value

    def restored(self, text: str) -> str:
        return re.sub(f"\ue000{self._key}\\.([0-9]+)\ue001", lambda found: self.texts[int(found[1])], text)

    def _mark(self, found: re.Match[str]) -> str:
        self.texts.append(found[0])
        return f"\ue000{self._key}.{len(self.texts) - 1}\ue001"


def _message(place: int, message: Any) -> dict[str, Any]:
    """Returns a message as templates read it: content as text, arguments of calls as objects."""
    where = f"messages[{place}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f'{where} must be an object with a role, as {{"role": "user", "content": "..."}}')
    found = dict(message)
    content = found.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [
            each.get("text") if isinstance(each, Mapping) and each.get("type") == "text" else None for each in content
        ]
        if not all(isinstance(each, str) for each in parts):
            raise UserError(f"{where}.content: this model reads text only: parts of type text")
        found["content"] = "\n".join(map(str, parts))
    elif content is not None and not isinstance(content, str):
        raise UserError(f"{where}.content must be a text, not {type(content).__name__}")
    calls = found.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or not all(isinstance(each, Mapping) for each in calls):
            raise UserError(f"{where}.tool_calls must be a list of calls")
        found["tool_calls"] = [_call(each) for each in calls]
    return found


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call whose arguments, JSON in a text as OpenAI's API has them, are an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)  # a model's own, perhaps broken: as it wrote them
    return {**call, "function": {**function, "arguments": arguments}}


def _compiled(name: str, source: str) -> Any:
    """Returns a Jinja template, in the environment that transformers gives one."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise UserError("a chat template needs the package jinja2: pip install 'meshway[serve]'") from error

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks for training what the assistant says; here it is what it holds."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own writes for HTML
    environment.globals["raise_exception"] = _refusing(jinja2.TemplateError)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template {name!r} is not Jinja: {first_line(error)}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refusing(kind: type[Exception]) -> Callable[[str], None]:
    def raise_exception(message: str) -> None:
        raise kind(message)

    return raise_exception
