"""seqio tasks over about 30 MB of English technical prose, botocore's manuals; importing this module registers them.

They need the extra `prose` (botocore). Registering is cheap: the manuals are read, and the vocabulary trained,
when a task is first read.

    prose_text   prose_bytes_text   targets: whole documents, without EOS, for objectives that corrupt or split them
    prose_lm     prose_bytes_lm     targets: windows of the documents, each ending in EOS
"""

import seqio
import tensorflow as tf

from meshway.tasks import manuals, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_task, text_features


def text_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'text'} of each document of a split, in the corpus's order whatever `shuffle_files` says."""
    return tf.data.Dataset.from_tensor_slices({"text": [document.text for document in manuals.documents(split)]})


def _count_documents(split: str) -> int:
    return len(manuals.documents(split))


def _add_all() -> None:
    source = CountedSource(text_dataset, manuals.SPLITS, _count_documents)
    for prefix, vocabulary in (("prose", vocabularies.prose()), ("prose_bytes", vocabularies.byte())):
        add_task(f"{prefix}_text", source, text_features(vocabulary), preprocessors.whole_text())
        add_task(
            f"{prefix}_lm",
            source,
            {"targets": seqio.Feature(vocabulary, add_eos=True)},
            preprocessors.whole_text(preprocessors.language_model),
        )


_add_all()
