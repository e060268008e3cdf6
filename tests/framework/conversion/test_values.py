"""Parameters assembled from tensors: any part of one is what the whole has there."""

import numpy as np
import pytest

from meshway.framework.conversion.hugging_face import FAMILIES
from meshway.framework.conversion.rules import pieces_of
from meshway.framework.conversion.values import values_of
from meshway.framework.errors import UserError

BLOCK = "decoder/block_0/"
CASES = {
    "gpt2": {
        f"{BLOCK}attention/query/kernel": (2, 6, 3, 4),
        f"{BLOCK}attention/key/kernel": (2, 6, 3, 4),
        f"{BLOCK}attention/value/kernel": (2, 6, 3, 4),
        f"{BLOCK}attention/query/bias": (2, 3, 4),
        f"{BLOCK}attention/key/bias": (2, 3, 4),
        f"{BLOCK}attention/value/bias": (2, 3, 4),
    },
    "mixtral": {
        f"{BLOCK}attention/out/kernel": (3, 4, 2, 6),
        f"{BLOCK}mlp/experts/wi_1": (3, 4, 6, 5),
        f"{BLOCK}mlp/router/kernel": (3, 6, 4),
    },
}


class InMemory(dict):
    """Tensors by name, counting what is read."""

    count = 0

    def dtype(self, name):
        return self[name].dtype

    def read(self, name, box=()):
        value = self[name][tuple(box)]
        self.count += value.size
        return value


def case(family, dtype=None):
    shapes = CASES[family]
    pieces = pieces_of(FAMILIES[family].rules, "", shapes)
    random = np.random.default_rng(0)
    tensors = InMemory({piece.theirs: random.normal(size=piece.their_shape).astype(np.float32) for piece in pieces})
    return values_of(pieces, shapes, tensors, dtype), tensors


@pytest.mark.parametrize("family", CASES)
def test_any_shard_is_that_part_of_the_whole(family):
    values, tensors = case(family)
    random = np.random.default_rng(1)
    wholes = [each.shard((slice(None),) * each.ndim).ravel() for each in values.values()]
    everything = np.concatenate([tensor.ravel() for tensor in tensors.values()])
    np.testing.assert_array_equal(np.sort(np.concatenate(wholes)), np.sort(everything))
    for each in values.values():
        whole = each.shard((slice(None),) * each.ndim)
        for entry, value, _ in each.each():
            np.testing.assert_array_equal(whole[entry], value)
        for _ in range(20):
            starts = [int(random.integers(0, size)) for size in each.shape]
            index = tuple(slice(start, int(random.integers(start, size)) + 1)
                          for start, size in zip(starts, each.shape))  # fmt: skip
            np.testing.assert_array_equal(each.shard(index), whole[index])


def test_a_shard_reads_only_its_own_part():
    values, tensors = case("mixtral")
    values[f"{BLOCK}mlp/experts/wi_1"].shard((slice(1, 2), slice(2, 4), slice(0, 3), slice(None)))
    assert tensors.count == 1 * 2 * 3 * 5
    values, tensors = case("gpt2")
    values[f"{BLOCK}attention/key/kernel"].shard((slice(0, 1), slice(0, 2), slice(None), slice(None)))
    assert tensors.count == 2 * 3 * 4


def test_layers_of_several_dtypes_need_one():
    values, tensors = case("mixtral")
    name = next(iter(tensors))
    tensors[name] = tensors[name].astype(np.float16)
    pieces = pieces_of(FAMILIES["mixtral"].rules, "", CASES["mixtral"])
    with pytest.raises(UserError, match=r"several dtypes: .* is float16.*give --dtype"):
        values_of(pieces, CASES["mixtral"], tensors, None)
    values_of(pieces, CASES["mixtral"], tensors, np.dtype(np.float32))
