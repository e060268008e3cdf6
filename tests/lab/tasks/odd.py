"""Tasks as real data make them: empty, too high, broken, of another vocabulary, with line ends of other scripts."""

import dataclasses

import seqio
import tensorflow as tf

from meshway.tasks.hugging_face import HuggingFaceVocabulary

BYTES = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def add(name, inputs, targets, feature=BYTES, steps=STEPS, splits=("train", "validation"), **others):
    """Registers a task of these examples, the same in each split."""

    counts = dict.fromkeys(splits, len(inputs))

    def read(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=list(splits), num_input_examples=counts),
        preprocessors=steps,
        output_features={"inputs": feature, "targets": feature},
        **others,
    )


def tokens_of(name, high):
    """Registers a task of token ids, the highest (or the lowest) of which no token has."""
    ids = seqio.Feature(seqio.PassThroughVocabulary(269, eos_id=1), add_eos=False)
    rows = tf.constant([[5, 6, 7]] * 7 + [[5, high, 7]])
    add(name, rows, rows, feature=ids, steps=[])


def refuse_three(dataset):
    def check(example):
        refused = tf.debugging.assert_none_equal(example["inputs"], "3", message="[a bad record]")
        with tf.control_dependencies([refused]):
            return {name: tf.identity(value) for name, value in example.items()}

    return dataset.map(check)


def same(targets, predictions):
    return {"same": sum(t == p for t, p in zip(targets, predictions)), "letters": sum(t.count("b") for t in targets)}


def mean_score(targets, scores):
    return {"mean_score": sum(scores) / len(scores)}


@dataclasses.dataclass(frozen=True)
class Tokens(seqio.metrics.Metric):
    """A metric class that asks for scores, and what a model computes beside them."""

    model_output_type: seqio.metrics.ModelOutputType = seqio.metrics.ModelOutputType.SCORE_WITH_INTERMEDIATES

    @classmethod
    def from_model_output(cls, inputs, scores, intermediates, features):
        return cls()

    def compute(self):
        return {"asked": 1.0}


NUMBERS = [str(number) for number in range(24)]
add("odd_empty", NUMBERS, [""] * 24, steps=STEPS[:1])
add("odd_bad", NUMBERS, NUMBERS, steps=[refuse_three, *STEPS])
add("odd_lines", NUMBERS[:3], ["a\u2028b", "c\u0085d", "e\x0cf\rg"], metric_fns=[same])
add("odd_few", NUMBERS[:20], NUMBERS[:20])
add("odd_many", NUMBERS * 20, NUMBERS * 20)
add("odd_spelt", NUMBERS, [f"{number}</s>" for number in NUMBERS], feature=seqio.Feature(
    HuggingFaceVocabulary("letters", eos_token="</s>"), add_eos=True))  # fmt: skip
add("odd_letters", ["a", "b"] * 12, ["bcbc", "cbcb"] * 12, metric_fns=[same, mean_score], feature=seqio.Feature(
    HuggingFaceVocabulary("letters", eos_token="</s>"), add_eos=True))  # fmt: skip
add("odd_metric", NUMBERS, NUMBERS, metric_fns=[same], metric_objs=[Tokens])
tokens_of("odd_minus", -1)
tokens_of("odd_high", 300)
seqio.MixtureRegistry.add("odd_counted", [("odd_few", seqio.mixing_rate_num_examples), ("odd_many",
                          seqio.mixing_rate_num_examples)])  # fmt: skip
seqio.MixtureRegistry.add("odd_rates", [("odd_few", 1.0), ("odd_many", -1.0)])
