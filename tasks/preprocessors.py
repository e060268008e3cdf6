"""Self-supervised objectives over text, as seqio preprocessors.

Each joins a dataset of {'text'} into one stream of tokens and cuts it into windows, so a long document fills
several examples, short ones share one, and nothing is left out. Randomness comes from seqio's stateless
seeds.
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

Features = Mapping[str, seqio.Feature]


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None,
    output_features: Features,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> tf.data.Dataset:
    """T5's objective (Raffel et al. 2020, section 3.1.4): fill in the spans that were dropped.

    `inputs` is a window with each dropped span replaced by a sentinel; `targets` is each sentinel followed by
    its span. Sentinels are the vocabulary's extra ids, from the highest down. The window is the longest whose
    inputs and targets, EOS included, fit their lengths (inputs 512: 568 tokens, targets 114).

    Raises:
      ValueError: lengths are missing or too short, or the vocabulary has fewer sentinels than spans.
    """
    lengths = _lengths(sequence_length, "inputs", "targets")
    vocabulary = output_features["targets"].vocabulary
    eos = {name: int(output_features[name].add_eos) for name in ("inputs", "targets")}
    window = corruption_window(
        lengths["inputs"] - eos["inputs"],
        lengths["targets"] - eos["targets"],
        noise_density,
        mean_span_length,
    )
    counts = [noise_counts(length, noise_density, mean_span_length) for length in range(1, window + 1)]
    spans = max(count[1] for count in counts)
    if spans > vocabulary.extra_ids:
        raise ValueError(
            f"span corruption of {window} tokens drops {spans} spans, but the vocabulary has "
            f"{vocabulary.extra_ids} extra ids for sentinels; shorten inputs or lengthen the mean span"
        )

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["tokens"]
        noise, spans = tf.unstack(tf.gather(tf.constant(counts), tf.size(tokens) - 1))
        return _corrupt(tokens, noise, spans, vocabulary.vocab_size - 1, seed)

    dataset = corrupt(_windows(dataset, output_features["inputs"], window, end_with_eos=False))
    return seqio.preprocessors.append_eos(dataset, output_features)


def language_model(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Features
) -> tf.data.Dataset:
    """Windows of the stream as `targets`, each document ending in EOS if the feature adds one."""
    feature = output_features["targets"]
    length = _lengths(sequence_length, "targets")["targets"]
    dataset = _windows(dataset, feature, length, end_with_eos=feature.add_eos)
    return dataset.map(lambda example: {"targets": example["tokens"]}, num_parallel_calls=tf.data.AUTOTUNE)


def prefix_language_model(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Features
) -> tf.data.Dataset:
    """Windows cut in two at a random place: `inputs` before it, `targets` after it.

    The window is as long as the longer of the two features, and the cut lies where both parts fit.
    """
    lengths = _lengths(sequence_length, "inputs", "targets")
    room = {name: lengths[name] - int(output_features[name].add_eos) for name in lengths}
    if min(room.values()) < 1:
        raise ValueError(f"prefix LM needs room for a token and EOS in inputs and targets, not {lengths}")

    @seqio.map_over_dataset(num_seeds=1)
    def cut(example: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["tokens"]
        most = tf.minimum(room["inputs"], tf.size(tokens) - 1)
        least = tf.minimum(tf.maximum(1, tf.size(tokens) - room["targets"]), most)
        at = tf.random.stateless_uniform([], seed, least, most + 1, tf.int32)
        return {"inputs": tokens[:at], "targets": tokens[at:]}

    window = max(room.values())
    dataset = cut(_windows(dataset, output_features["inputs"], window, end_with_eos=False))
    return seqio.preprocessors.append_eos(dataset, output_features)


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Returns (tokens dropped, spans they form) of a window of `length` tokens, at least one of each."""
    noise = max(1, min(round(length * noise_density), length - 1))
    spans = max(1, min(round(noise / mean_span_length), noise, length - noise))
    return noise, spans


def corruption_window(inputs: int, targets: int, noise_density: float, mean_span_length: float) -> int:
    """Returns the longest window whose corrupted inputs and targets, EOS apart, fit; ValueError if none."""
    window = 0
    while True:
        noise, spans = noise_counts(window + 1, noise_density, mean_span_length)
        if window + 1 - noise + spans > inputs or noise + spans > targets:
            break
        window += 1
    if not window:
        raise ValueError("span corruption needs lengths of at least 2 for inputs and 3 for targets")
    return window


def _corrupt(
    tokens: tf.Tensor, noise: tf.Tensor, spans: tf.Tensor, first_sentinel: int, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Drops `noise` of `tokens` [n] in `spans` spans, each after a kept one."""
    seeds = tf.random.experimental.stateless_split(seed, 2)
    kept_lengths = _random_lengths(tf.size(tokens) - noise, spans, seeds[0])
    noise_lengths = _random_lengths(noise, spans, seeds[1])
    ends = tf.cumsum(tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1]))
    piece = tf.searchsorted(ends, tf.range(tf.size(tokens)), side="right")  # even: kept; odd: dropped
    dropped = piece % 2 == 1
    begins = tf.logical_and(dropped, piece != tf.concat([[-1], piece[:-1]], axis=0))
    sentinels = tf.cast(first_sentinel - piece // 2, tokens.dtype)
    inputs = tf.boolean_mask(tf.where(begins, sentinels, tokens), tf.logical_or(begins, ~dropped))
    pairs = tf.stack([sentinels, tokens], axis=1)
    targets = tf.boolean_mask(pairs, tf.stack([begins, dropped], axis=1))
    return {"inputs": inputs, "targets": targets}


def _random_lengths(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns `parts` random lengths, each at least 1, summing to `total`, all equally likely ([0] for 0)."""
    order = tf.argsort(tf.random.stateless_uniform([tf.maximum(total - 1, 0)], seed), stable=True)
    cuts = tf.sort(order[: parts - 1]) + 1
    return tf.concat([cuts, [total]], axis=0) - tf.concat([[0], cuts], axis=0)


def _windows(
    dataset: tf.data.Dataset, feature: seqio.Feature, length: int, end_with_eos: bool
) -> tf.data.Dataset:
    """Joins the tokens of {'text'} and cuts them into {'tokens' [length]}; the last window may be shorter."""
    vocabulary = feature.vocabulary

    def encode(example: dict[str, tf.Tensor]) -> tf.Tensor:
        if end_with_eos:
            return tf.concat([vocabulary.encode_tf(example["text"]), [vocabulary.eos_id]], axis=0)
        return vocabulary.encode_tf(tf.strings.join([example["text"], "\n"]))

    stream = dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
    return stream.rebatch(length).map(lambda tokens: {"tokens": tokens}, num_parallel_calls=tf.data.AUTOTUNE)


def _lengths(sequence_length: Mapping[str, int] | None, *names: str) -> dict[str, int]:
    missing = [name for name in names if not (sequence_length or {}).get(name)]
    if missing:
        raise ValueError(f"windows are cut to length, so sequence_length must give one for {missing}")
    return {name: sequence_length[name] for name in names} if sequence_length else {}
