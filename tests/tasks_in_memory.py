"""Tasks without seqio, for tests of what reads them."""

import numpy as np

from meshway.framework.data.objective import FeatureInfo, Items, TaskInfo, VocabularyInfo
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.packing import best_fit, one_each

VOCABULARY = VocabularyInfo(size=1000, eos_id=1, extra_ids=100)
TOKENS = FeatureInfo("int32", (None,), VOCABULARY)


def task(*features, name="a_task"):
    """A task whose features are all token ids."""
    return TaskInfo(name, dict.fromkeys(features, TOKENS))


def random_examples(count, features=("inputs", "targets"), longest=20, seed=0):
    """Examples of random length, 0 included; each token tells its example and its place, 0 being one of them."""
    random = np.random.default_rng(seed)
    return InMemory(
        [
            {name: np.arange(random.integers(0, longest + 1), dtype=np.int32) * (i + 1) for name in features}
            for i in range(count)
        ]
    )


def lay(objective, examples, packed, epoch=0, seed=0):
    """Lays all examples out, in their order where they are not packed."""
    examples = InMemory(examples) if isinstance(examples, list) else examples
    sizes = {name: np.asarray(column) for name, column in examples.sizes.items()}
    index = np.repeat(np.arange(len(examples)), objective.parts(sizes))
    part = np.concatenate([np.arange(n) for n in objective.parts(sizes)] or [np.zeros(0, int)]).astype(int)
    items = Items(index, part, np.full(len(index), epoch))
    measured = objective.measure({name: column[index] for name, column in sizes.items()}, items)
    converted = [
        objective.convert(examples.read([i])[0], i, p, epoch, seed + 1000 * i + p)
        for i, p in zip(index.tolist(), part.tolist(), strict=True)
    ]
    for name, column in measured.items():
        assert [len(item[name]) for item in converted] == column.tolist(), name
    placement = best_fit(measured, objective.row_lengths) if packed else one_each(len(index), list(measured))
    return objective.lay(converted, placement)
