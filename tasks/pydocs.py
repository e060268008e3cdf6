"""seqio tasks over the text that comes with Python; importing this module registers them.

Registering is cheap: the corpus is read, and the vocabulary trained, when a task is first read.

    pydocs_span_corruption   pydocs_bytes_span_corruption   inputs, targets: T5's denoising
    pydocs_lm                pydocs_bytes_lm                targets: windows
    pydocs_prefix_lm                                        inputs, targets: a window split in two
    pydocs_summary           pydocs_bytes_summary           function source -> first sentence of its docstring
    pydocs_text              pydocs_bytes_text              targets: whole documents, without EOS
    pydocs_mix               span corruption and summary, half and half
    pydocs_denoise_mix       text and summary, half and half: for objectives that corrupt text as it is read

Tokenizing, the part of a task that does not depend on its lengths, can be cached offline.
"""

import functools

import seqio
import tensorflow as tf

from meshway.tasks import corpus, metrics, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_mixture, add_task, text_features

SUMMARY_PREFIX = "summarize: "  # names the task to the model, as in T5
BYTES_MEAN_SPAN = 20.0  # ByT5's (Xue et al. 2021, section 3.1): a span of 3 bytes is less than a word


def text_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'text'} of each document of a split, in the corpus's order whatever `shuffle_files` says."""
    return tf.data.Dataset.from_tensor_slices({"text": [document.text for document in corpus.documents(split)]})


def function_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'inputs', 'targets'} texts of each function of a split, in the corpus's order."""
    functions = corpus.functions(split)
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [SUMMARY_PREFIX + function.source for function in functions],
            "targets": [function.summary for function in functions],
        }
    )


def _count_documents(split: str) -> int:
    return len(corpus.documents(split))


def _count_functions(split: str) -> int:
    return len(corpus.functions(split))


TEXT = CountedSource(text_dataset, corpus.SPLITS, _count_documents)
FUNCTIONS = CountedSource(function_dataset, corpus.SPLITS, _count_functions)


def _add_tasks(prefix: str, vocabulary: seqio.Vocabulary, mean_span: float) -> None:
    """Registers the tasks that every vocabulary has."""
    with_eos = seqio.Feature(vocabulary, add_eos=True)
    corrupt = functools.partial(preprocessors.span_corruption, mean_span_length=mean_span)
    add_task(f"{prefix}_text", TEXT, text_features(vocabulary), preprocessors.whole_text())
    add_task(
        f"{prefix}_span_corruption",
        TEXT,
        {"inputs": with_eos, "targets": with_eos},
        preprocessors.whole_text(corrupt, end="\n"),
    )
    add_task(f"{prefix}_lm", TEXT, {"targets": with_eos}, preprocessors.whole_text(preprocessors.language_model))
    add_task(
        f"{prefix}_summary",
        FUNCTIONS,
        {"inputs": with_eos, "targets": with_eos},
        preprocessors.text_to_text(),
        [metrics.token_f1, metrics.exact_match],
    )


def _add_all() -> None:
    pieces = vocabularies.pydocs()
    _add_tasks("pydocs", pieces, mean_span=3.0)
    _add_tasks("pydocs_bytes", vocabularies.byte(), mean_span=BYTES_MEAN_SPAN)
    add_task(
        "pydocs_prefix_lm",
        TEXT,
        # A prefix continues in the targets, so it has no EOS.
        {"inputs": seqio.Feature(pieces, add_eos=False), "targets": seqio.Feature(pieces, add_eos=True)},
        preprocessors.whole_text(preprocessors.prefix_language_model, end="\n"),
    )
    add_mixture("pydocs_mix", ["pydocs_span_corruption", "pydocs_summary"], 1.0)
    add_mixture("pydocs_denoise_mix", ["pydocs_text", "pydocs_summary"], 1.0)


_add_all()
