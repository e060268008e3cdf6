"""Objectives over text, as seqio preprocessors.

`tokenize_text` encodes each text, which reads no lengths and so can be cached offline. The objectives join its
dataset of {'targets'} into one stream of tokens and split it into windows, so a long document fills several
examples, short ones share one, and nothing is left out. Randomness comes from seqio's stateless seeds.
"""

import functools
from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

Features = Mapping[str, seqio.Feature]
Step = Callable[..., tf.data.Dataset]
_ROWS = 64  # windows corrupted at a time


def tokenize_text(dataset: tf.data.Dataset, output_features: Features, end: str = "") -> tf.data.Dataset:
    """Encodes each {'text'}, with `end` behind it, as `targets`; without EOS and whole."""
    vocabulary = output_features["targets"].vocabulary

    def encode(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {"targets": vocabulary.encode_tf(tf.strings.join([example["text"], end]))}

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)


def text_to_text() -> list[Step]:
    """Returns the steps of a task whose source yields `inputs` and `targets` as texts; their tokens can be cached.

    They are trimmed so that EOS fits, and the texts are kept as `inputs_pretokenized`, `targets_pretokenized`.
    """
    return [
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ]


def whole_text(*steps: Step, end: str = "") -> list[Step]:
    """Returns the steps of a task whose source yields {'text'}: tokenizing, which can be cached, then `steps`."""
    return [functools.partial(tokenize_text, end=end), seqio.CacheDatasetPlaceholder(), *steps]


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
    def corrupt(tokens: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.RaggedTensor]:
        full = tf.size(tokens) // window
        sizes = tf.fill([full], window)
        rest = tf.size(tokens) - full * window
        sizes = tf.cond(rest > 0, lambda: tf.concat([sizes, [rest]], axis=0), lambda: sizes)
        padded = tf.pad(tokens, [[0, tf.size(sizes) * window - tf.size(tokens)]])
        rows = tf.reshape(padded, [-1, window])
        noise, spans = tf.unstack(tf.gather(tf.constant(counts), sizes - 1), axis=1)
        examples = _corrupt(rows, sizes, noise, spans, vocabulary.vocab_size - 1, seed)
        return {name: _with_eos(examples[name], output_features[name]) for name in examples}

    # Many windows at a time: for a single one TensorFlow's overhead is ten times the computation.
    return _unbatched(corrupt(_stream(dataset).rebatch(_ROWS * window)))


def language_model(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Features
) -> tf.data.Dataset:
    """Windows of the stream as `targets`, each document ending in EOS if the feature adds one."""
    length = _lengths(sequence_length, "targets")["targets"]
    stream = _stream(seqio.preprocessors.append_eos(dataset, output_features))
    return stream.rebatch(length).map(lambda tokens: {"targets": tokens})


def prefix_language_model(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, output_features: Features
) -> tf.data.Dataset:
    """Windows split in two at a random position where both parts fit: `inputs` before it, `targets` after it.

    With EOS a window has half as many tokens as inputs and targets together, so that two fill a packed row.
    """
    lengths = _lengths(sequence_length, "inputs", "targets")
    room = {name: lengths[name] - int(output_features[name].add_eos) for name in lengths}
    if min(room.values()) < 1:
        raise ValueError(f"prefix LM needs room for a token and EOS in inputs and targets, not {lengths}")

    @seqio.map_over_dataset(num_seeds=1)
    def cut(tokens: tf.Tensor, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        most = tf.minimum(room["inputs"], tf.size(tokens) - 1)
        least = tf.minimum(tf.maximum(1, tf.size(tokens) - room["targets"]), most)
        at = tf.random.stateless_uniform([], seed, least, most + 1, tf.int32)
        return {"inputs": tokens[:at], "targets": tokens[at:]}

    window = max(1, sum(lengths.values()) // 2 - sum(int(output_features[name].add_eos) for name in lengths))
    dataset = cut(_stream(dataset).rebatch(window))
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
    tokens: tf.Tensor,
    sizes: tf.Tensor,
    noise: tf.Tensor,
    spans: tf.Tensor,
    first_sentinel: int,
    seed: tf.Tensor,
) -> dict[str, tf.RaggedTensor]:
    """Drops `noise` [rows] of each row's `sizes` [rows] tokens in `spans` [rows] spans, each after a kept one."""
    width = tf.shape(tokens)[1]
    seeds = tf.random.experimental.stateless_split(seed, 2)
    kept = _random_parts(sizes - noise, spans, width, seeds[0])
    lost = _random_parts(noise, spans, width, seeds[1])
    # In each row piece 0 is kept, 1 dropped, 2 kept, ...; sorting puts each piece's tokens side by side.
    piece = tf.sort(tf.concat([2 * kept, 2 * lost + 1], axis=1))[:, :width]
    real = tf.sequence_mask(sizes, width)
    dropped = tf.logical_and(piece % 2 == 1, real)
    before = tf.pad(piece[:, :-1], [[0, 0], [1, 0]], constant_values=-1)
    begins = tf.logical_and(dropped, piece != before)
    sentinels = tf.cast(first_sentinel - piece // 2, tokens.dtype)
    keeps = tf.logical_and(real, tf.logical_or(begins, ~dropped))
    pairs = tf.reshape(tf.stack([sentinels, tokens], axis=2), [-1, 2 * width])
    in_targets = tf.reshape(tf.stack([begins, dropped], axis=2), [-1, 2 * width])
    return {"inputs": _masked(tf.where(begins, sentinels, tokens), keeps), "targets": _masked(pairs, in_targets)}


def _masked(tokens: tf.Tensor, mask: tf.Tensor) -> tf.RaggedTensor:
    """Returns each row's tokens where `mask` is true; row splits are int32, which oneDNN always supports."""
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
    return tf.RaggedTensor.from_row_lengths(tf.boolean_mask(tokens, mask), lengths, validate=False)


def _random_parts(totals: tf.Tensor, parts: tf.Tensor, width: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Divides each row's first `totals` [rows] items into `parts` [rows] runs, all compositions equally likely.

    Returns the run (0, 1, ...) of each item, int32 [rows, width]; past the row's total a number above any run.
    """
    item = tf.range(width)[tf.newaxis]
    # Each item i > 0 may begin a run; the parts - 1 of them with the lowest scores do.
    may_begin = tf.logical_and(item > 0, item < totals[:, tf.newaxis])
    scores = tf.random.stateless_uniform([tf.size(totals), width], seed)
    rank = tf.argsort(tf.argsort(tf.where(may_begin, scores, 2.0), axis=1, stable=True), axis=1, stable=True)
    begins = tf.logical_and(may_begin, rank < parts[:, tf.newaxis] - 1)
    run = tf.cumsum(tf.cast(begins, tf.int32), axis=1)
    return tf.where(item < totals[:, tf.newaxis], run, 2**29)


def _stream(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the pieces of one stream of tokens: each example's `targets`."""
    return dataset.map(lambda example: example["targets"])


def _with_eos(tokens: tf.Tensor | tf.RaggedTensor, feature: seqio.Feature) -> tf.Tensor | tf.RaggedTensor:
    return _append(tokens, feature.vocabulary.eos_id) if feature.add_eos else tokens


def _append(tokens: tf.Tensor | tf.RaggedTensor, token: int) -> tf.Tensor | tf.RaggedTensor:
    """Appends `token` to [n], or to each row of [rows, (n)]."""
    if isinstance(tokens, tf.RaggedTensor):
        tokens = tokens.with_row_splits_dtype(tf.int32)
        return tf.concat([tokens, tf.fill([tokens.nrows(), 1], tf.cast(token, tokens.dtype))], axis=1)
    return tf.concat([tokens, [tf.cast(token, tokens.dtype)]], axis=0)


def _unbatched(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turns elements of ragged rows into one element per row."""
    return dataset.unbatch().map(lambda example: {name: tf.identity(row) for name, row in example.items()})


def _lengths(sequence_length: Mapping[str, int] | None, *names: str) -> dict[str, int]:
    missing = [name for name in names if not (sequence_length or {}).get(name)]
    if missing:
        raise ValueError(f"windows are cut to length, so sequence_length must give one for {missing}")
    return {name: sequence_length[name] for name in names} if sequence_length else {}
