"""Data sources without seqio, over byte-level tasks in memory, for tests of what looks at data."""

import types

import numpy as np

from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.passthrough import PassThrough
from meshway.framework.data.rows.examples import InMemory, Stepped
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.vocabularies import Bytes

VOCABULARY = Bytes(100)
TOKENS = FeatureInfo("int32", (None,), VOCABULARY.info)
LENGTHS = {"inputs": 24, "targets": 12}


def encoded(*texts):
    return [np.array([*VOCABULARY.encode(text), 1], np.int32) for text in texts]


def memory(converter, tasks, lengths=LENGTHS, rates=None, changes=(), batch_size=4, wrap=lambda stream: stream):
    """A data source over {task: its examples}; or over {task: a source that is made already}."""

    def train(rows):
        sources = []
        for name, examples in tasks.items():
            if not isinstance(examples, list | InMemory | Stepped):
                sources.append(examples)
                continue
            examples = InMemory(examples) if isinstance(examples, list) else examples
            info = TaskInfo(name, {feature: TOKENS for feature in examples.sizes})
            if isinstance(converter, PassThrough):
                shapes = {feature: FeatureInfo("uint8", shape) for feature, shape in converter.shapes.items()}
                info = TaskInfo(name, shapes)
            sources.append(RowSource(name, examples, converter.bind(info, lengths), converter.pack))
        spec = converter.spec(lengths, batch_size)
        weights = rates or dict.fromkeys(tasks, 1.0)
        return wrap(RowStream("mix", sources, weights, changes, spec, batch_size, rows))

    vocabularies = {feature: VOCABULARY for feature in lengths}
    return types.SimpleNamespace(
        name="mix",
        lengths=lengths,
        batch_size=batch_size,
        converter=converter,
        train=train,
        vocabularies=lambda: vocabularies,
    )
