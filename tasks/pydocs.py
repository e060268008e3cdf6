"""seqio tasks over the text that comes with Python; importing this module registers them.

Registering is cheap: the corpus is read, and the vocabulary trained, when a task is first read.

    pydocs_span_corruption   pydocs_bytes_span_corruption   inputs, targets: T5's denoising
    pydocs_lm                pydocs_bytes_lm                targets
    pydocs_prefix_lm                                        inputs, targets: a window cut in two
    pydocs_summary           pydocs_bytes_summary           function source -> first sentence of its docstring
    pydocs_mix               span corruption and summary, half and half
"""

import functools
from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

from meshway.tasks import corpus, metrics, preprocessors, vocabularies

SUMMARY_PREFIX = "summarize: "  # tells the model which task of a mixture it is doing
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


def _add_task(
    name: str,
    dataset_fn: Callable[..., tf.data.Dataset],
    features: Mapping[str, seqio.Feature],
    steps: list[Callable[..., tf.data.Dataset]],
    metric_fns: list[Callable[..., dict[str, float]]] | None = None,
) -> None:
    seqio.TaskRegistry.remove(name)  # the module may be imported again
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=corpus.SPLITS),
        preprocessors=steps,
        output_features=dict(features),
        metric_fns=metric_fns or [],
    )


def _add_tasks(prefix: str, vocabulary: seqio.Vocabulary, mean_span: float) -> None:
    """Registers the tasks that every vocabulary has."""
    with_eos = seqio.Feature(vocabulary, add_eos=True)
    _add_task(
        f"{prefix}_span_corruption",
        text_dataset,
        {"inputs": with_eos, "targets": with_eos},
        [functools.partial(preprocessors.span_corruption, mean_span_length=mean_span)],
    )
    _add_task(f"{prefix}_lm", text_dataset, {"targets": with_eos}, [preprocessors.language_model])
    _add_task(
        f"{prefix}_summary",
        function_dataset,
        {"inputs": with_eos, "targets": with_eos},
        [preprocessors.text_to_text],
        [metrics.token_f1, metrics.exact_match],
    )


def _add_all() -> None:
    pieces = vocabularies.pydocs()
    _add_tasks("pydocs", pieces, mean_span=3.0)
    _add_tasks("pydocs_bytes", vocabularies.byte(), mean_span=BYTES_MEAN_SPAN)
    _add_task(
        "pydocs_prefix_lm",
        text_dataset,
        # A prefix goes on, so it has no end.
        {"inputs": seqio.Feature(pieces, add_eos=False), "targets": seqio.Feature(pieces, add_eos=True)},
        [preprocessors.prefix_language_model],
    )
    seqio.MixtureRegistry.remove("pydocs_mix")
    seqio.MixtureRegistry.add("pydocs_mix", ["pydocs_span_corruption", "pydocs_summary"], default_rate=1.0)


_add_all()
