"""seqio tasks of translation: Django's messages in 96 languages, as bytes; importing this module registers them.

They need the extra `gettext` (django, polib, sacrebleu). Registering looks only at which catalogues there are.

    django_po_LOCALE     inputs 'translate to Polish: Yes', targets 'Tak'; a plural adds its count ([n=5]), and
                         a message that has a context names it ([alt. month])
    django_po            all languages, by their number of messages, tempered
    django_po_european   eight of them, likewise

A message is in the same split in all languages.
"""

import functools

import seqio
import tensorflow as tf

from meshway.tasks import catalogues, metrics, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_mixture, add_task

RATE_EXPONENT = 0.3  # mT5's (Xue et al. 2021, section 3.1): a small language is seen more often than it is large
EUROPEAN = ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")


def message_dataset(locale: str, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'inputs', 'targets'} texts of each message of a split, in the catalogues' order."""
    name = catalogues.language(locale)
    found = catalogues.messages(locale, split)
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [prompt(name, message) for message in found],
            "targets": [message.translation for message in found],
        }
    )


def prompt(language: str, message: catalogues.Message) -> str:
    """Returns what the model is asked."""
    context = f" [{message.context}]" if message.context else ""
    return f"translate to {language}{context}: {message.english}"


def count_messages(locale: str, split: str) -> int:
    """Returns the number of a language's messages in a split."""
    return len(catalogues.messages(locale, split))


def rate(task: seqio.Task) -> float:
    """Returns a language's mixing rate, from the number of its messages.

    It is what `seqio.mixing_rate_num_examples` gives at a temperature of 1 / 0.3, without a warning for each
    call that the task is not cached; seqio makes some ten thousand of them for one mixture.
    """
    return task.num_input_examples("train") ** RATE_EXPONENT


def _add_all() -> None:
    feature = seqio.Feature(vocabularies.byte(), add_eos=True)
    names = {locale: f"django_po_{locale}" for locale in catalogues.locales()}
    for locale, name in names.items():
        add_task(
            name,
            CountedSource(
                functools.partial(message_dataset, locale),
                catalogues.SPLITS,
                functools.partial(count_messages, locale),
            ),
            {"inputs": feature, "targets": feature},
            preprocessors.text_to_text(),
            [metrics.chrf, metrics.exact_match],
        )
    add_mixture("django_po", list(names.values()), rate)
    add_mixture("django_po_european", [names[locale] for locale in EUROPEAN], rate)


_add_all()
