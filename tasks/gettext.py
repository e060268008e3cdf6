"""seqio tasks of translation: Django's messages in 96 languages, as bytes; importing this module registers them.

django (BSD-3-Clause) has them in some 98 languages, up to 920 messages each. They are parsed by polib.

They need the extra `gettext` (django, polib, sacrebleu). Registering only lists the catalogues and reads none.

    django_po_LOCALE     inputs 'translate to Polish: Yes', targets 'Tak'; a plural adds its count ([n=5]), and
                         a message that has a context names it ([alt. month])
    django_po            all languages, by their number of messages, tempered
    django_po_european   eight of them, likewise

A message is in the same split in all languages.
"""

import dataclasses
import functools
import gettext
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from meshway.tasks import metrics, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_mixture, add_task, cached_file, not_installed, package_directory

SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5
# This salt gives each language 4.1 to 5.9 % of its messages, and all of them 5.1 % of their text (Django 5.2).
_SALT = "45/"
_LAYOUT = 1  # increase it whenever the same catalogues would yield other messages
_LEAST_BYTES = 10_000  # of a language's compiled catalogues: about 100 messages
_COUNTS = (1, 2, 3, 5, 8, 11, 20, 0, 1_000_000)  # each plural form of each language has one of these


@dataclasses.dataclass(frozen=True)
class Message:
    """An English message and its translation.

    Attributes:
      key: what decides its split: the English message, in its singular.
      context: what tells it from another message of the same words, or 'n=5' for a plural; '' for most.
      english: the message.
      translation: its translation.
    """

    key: str
    context: str
    english: str
    translation: str


def locales() -> list[str]:
    """Returns the codes of the languages that have enough messages, sorted: 'pt_BR'. No catalogue is read.

    Raises:
      ValueError: django is not installed.
    """
    sizes: dict[str, int] = {}
    for path in _catalogues("*", "mo"):  # a .po lists what is not translated too
        sizes[path.parts[-3]] = sizes.get(path.parts[-3], 0) + path.stat().st_size
    return sorted(locale for locale, size in sizes.items() if size >= _LEAST_BYTES)


def language(locale: str) -> str:
    """Returns the English name of a language: 'Brazilian Portuguese'; its code where Django has no name for it."""
    from django.conf.locale import LANG_INFO

    return LANG_INFO.get(locale.lower().replace("_", "-"), {}).get("name", locale)


@functools.cache
def messages(locale: str, split: str) -> tuple[Message, ...]:
    """Returns the messages of a language in 'train' or 'validation', in a fixed order, none twice.

    Raises:
      ValueError: django or polib is not installed.
    """
    return tuple(message for message in _messages(locale) if split_of(message.key) == split)


def split_of(key: str) -> str:
    """Returns the split of an English message, the same in all languages, by a hash of its letters and digits."""
    letters = re.sub(r"[\W_]+", " ", key.lower()).strip()
    bucket = int.from_bytes(hashlib.sha256((_SALT + letters).encode()).digest()[:8], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


@functools.cache
def _messages(locale: str) -> list[Message]:
    """Returns all messages of a language, cached by its catalogues' hash."""
    digest = hashlib.sha256(f"{_LAYOUT}\n".encode())
    paths = _catalogues(locale, "po")
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{len(content)}\n".encode() + content)
    path = cached_file(f"catalogue-{locale}-{digest.hexdigest()[:16]}.json", lambda: _extract(paths))
    return [Message(*entry) for entry in json.loads(path.read_text("utf-8"))]


def _catalogues(locale: str, kind: str) -> list[Path]:
    """Returns the catalogues of a language (or '*'), those of Django's core first."""
    root = package_directory("django", "gettext")
    where = f"locale/{locale}/LC_MESSAGES/django*.{kind}"
    return [*sorted(root.glob(f"conf/{where}")), *sorted(root.glob(f"contrib/*/{where}"))]


def _extract(paths: list[Path]) -> bytes:
    """Returns the messages of catalogues as JSON; one that several have is kept where it comes first."""
    try:
        import polib
    except ImportError as error:
        raise not_installed("polib", "gettext") from error
    found: dict[tuple[str, str], tuple[str, str, str, str]] = {}
    for path in paths:
        catalogue = polib.pofile(str(path))
        translations = gettext.GNUTranslations(io.BytesIO(catalogue.to_binary()))  # knows the rule of plurals
        for entry in catalogue.translated_entries():  # neither fuzzy nor obsolete
            for context, english, translation in _forms(entry, translations):
                if translation.strip():
                    found.setdefault((context, english), (entry.msgid, context, english, translation))
    return json.dumps(list(found.values())).encode()


def _forms(entry: Any, translations: gettext.GNUTranslations) -> Iterator[tuple[str, str, str]]:
    """Yields (context, English, translation) of an entry: one, or one for each plural form at its first count."""
    context = entry.msgctxt or ""
    if not entry.msgid_plural:
        yield context, entry.msgid, entry.msgstr
        return
    seen = set()
    for count in _COUNTS:
        english = entry.msgid if count == 1 else entry.msgid_plural
        if context:
            translation = translations.npgettext(context, entry.msgid, entry.msgid_plural, count)
        else:
            translation = translations.ngettext(entry.msgid, entry.msgid_plural, count)
        if (english, translation) not in seen:
            seen.add((english, translation))
            yield f"{context}, n={count}".lstrip(", "), english, translation


RATE_EXPONENT = 0.3  # mT5's (Xue et al. 2021, section 3.1): small languages are sampled above their share of messages
EUROPEAN = ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")


def message_dataset(locale: str, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'inputs', 'targets'} texts of each message of a split, in the catalogues' order."""
    name = language(locale)
    found = messages(locale, split)
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [prompt(name, message) for message in found],
            "targets": [message.translation for message in found],
        }
    )


def prompt(language: str, message: Message) -> str:
    """Returns what the model is asked."""
    context = f" [{message.context}]" if message.context else ""
    return f"translate to {language}{context}: {message.english}"


def count_messages(locale: str, split: str) -> int:
    """Returns the number of a language's messages in a split."""
    return len(messages(locale, split))


def rate(task: seqio.Task) -> float:
    """Returns a language's mixing rate, from the number of its messages.

    It equals `seqio.mixing_rate_num_examples` at a temperature of 1 / 0.3, without that function's warning at each
    call that the task is not cached; seqio makes some ten thousand calls for one mixture.
    """
    return task.num_input_examples("train") ** RATE_EXPONENT


def _add_all() -> None:
    feature = seqio.Feature(vocabularies.byte(), add_eos=True)
    names = {locale: f"django_po_{locale}" for locale in locales()}
    for locale, name in names.items():
        add_task(
            name,
            CountedSource(
                functools.partial(message_dataset, locale),
                SPLITS,
                functools.partial(count_messages, locale),
            ),
            {"inputs": feature, "targets": feature},
            preprocessors.text_to_text(),
            [metrics.chrf, metrics.exact_match],
        )
    add_mixture("django_po", list(names.values()), rate)
    add_mixture("django_po_european", [names[locale] for locale in EUROPEAN], rate)


_add_all()
