"""Looks into a tf.data.Dataset: whether anything in it is random. Handed a dataset, it imports no TensorFlow."""

import re
from collections.abc import Iterator
from typing import Any

# Names of TensorFlow's kernels and datasets whose result differs from call to call.
_RANDOM = re.compile(
    r"Random|Shuffle|TruncatedNormal|Parameterized|Multinomial|SampleDistorted|Stateful(Uniform|Standard|Truncated)"
    r"|Rng|NonDeterministicInts|.*CandidateSampler"
)


def draws(dataset: Any) -> bool:
    """Says whether anything of a dataset draws random numbers, its order included."""
    kinds = (re.sub(r"^_", "", type(part).__name__) for part in _parts(dataset))
    return any(_RANDOM.match(kind) for kind in kinds) or maps_randomly(dataset)


def maps_randomly(dataset: Any) -> bool:
    """Says whether a function mapped over a dataset has a random operation, at any depth."""
    for part in _parts(dataset):
        for function in part._functions():
            graph = function.function.graph.as_graph_def()
            nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
            if any(_RANDOM.match(node.op) for node in nodes):
                return True
    return False


def _parts(dataset: Any) -> Iterator[Any]:
    yield dataset
    for part in dataset._inputs():
        yield from _parts(part)
