"""The objectives: what a network is trained for, which gives it losses, scores, intermediates and, for text, decoding.

They meet `Model` of `framework.interfaces` by shape, those that decode `Decodes` too: DecoderOnly (each token from
those before it), EncoderDecoder (targets predicted from inputs), EncoderOnly (hidden tokens restored from all others),
Classifier (one label an image). What they share follows from hidden states and targets.
"""

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import prefill
from meshway.models.layers.cache import DecodingCache, take_copies
from meshway.models.layers.masks import AttentionMetadata, Mask, make_attention_mask, row_metadata, row_positions
from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, Metrics, OutputLayer, TokenSpec, text_spec, token_spec, token_targets
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class TargetLoss(abc.ABC):
    """Loss and scores of targets, from the hidden states that predict them and their output layer."""

    def __init__(self, criterion: CrossEntropy):
        self._criterion = criterion

    @abc.abstractmethod
    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, ..., d_model], and that layer, to be called
        within the same trace; `rng` None means no dropout."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (targets, weights) of a batch, [batch, ...] each."""

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, ..., classes]; `rng` None means no dropout."""
        hidden, output_layer = self.hidden(params, batch, rng)
        return output_layer(hidden)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics) over weighted targets; `rng` None means no dropout."""
        with capture() as reports:
            hidden, output_layer = self.hidden(params, batch, rng)
        return self._criterion(output_layer, hidden, *self.targets(batch), reports)

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each target, float32 [batch, length], 0 where its weight is 0."""
        hidden, output_layer = self.hidden(params, batch, None)
        return self._criterion.score(output_layer, hidden, *self.targets(batch))


class Objective(Network, TargetLoss):
    """A loss over a network's predictions; meets `framework.interfaces.Model` by shape, once a subclass adds
    `batch_spec`, `hidden` and `targets`."""

    def __init__(self, network: NetworkFactory, criterion: CrossEntropy):
        Network.__init__(self, network)
        TargetLoss.__init__(self, criterion)

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of the pass that `score` makes, by name, [batch, length, ...].

        Raises:
          ValueError: a name that the network does not know; says which it does.
        """
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found


class RowDecoding:
    """Predictions of a model with `logits` and a batch of texts: for each token whole rows are computed again, since a
    module's own cache has no common form. Right for evaluation on small sets, slow for long outputs."""

    _encoder: bool
    _prefix: bool
    logits: Callable[..., jax.Array]

    def prefill(self, params: dict[str, Any], batch: Batch, max_length: int) -> tuple[jax.Array, jax.Array, Batch]:
        """Makes room for `max_length` tokens behind the prompt; the rows themselves are the cache."""
        tokens = jnp.asarray(batch["decoder_input_tokens"])
        rows, length = tokens.shape
        room = max_length if self._encoder else length + max_length
        cache = {name: jnp.asarray(x) for name, x in batch.items() if name.startswith("encoder_")}
        if self._encoder:
            first, last, segments = tokens[:, :1], jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, room), jnp.int32)
        else:
            segments = jnp.pad(batch["decoder_segment_ids"], ((0, 0), (0, max_length)))
            last = jnp.sum(segments != 0, axis=1) - 1
            first = jnp.take_along_axis(tokens, last[:, None], axis=1)
        known = jnp.pad(tokens, ((0, 0), (0, max(0, room - length))))[:, :room]
        if self._prefix:
            cache["decoder_prefix_mask"] = jnp.pad(batch["decoder_prefix_mask"], ((0, 0), (0, max_length)))
        cache |= {
            "decoder_input_tokens": known,
            # T5X's decoders take a target of 0 for padding.
            "decoder_target_tokens": jnp.where(segments != 0, jnp.maximum(jnp.roll(known, -1, axis=1), 1), 0),
            "decoder_loss_weights": jnp.zeros((rows, room), jnp.float32),
            "decoder_segment_ids": segments,
            "decoder_positions": jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (rows, room)),
        }
        return first, last, cache

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Batch
    ) -> tuple[jax.Array, Batch]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""

        def put(name: str, values: jax.Array) -> jax.Array:
            # Not x.at[arange, positions]: where the batch is sharded, XLA gathers for that.
            one_row = jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop"))
            return one_row(cache[name], positions, values)

        one = jnp.ones_like(positions)
        fed = {"decoder_input_tokens": put("decoder_input_tokens", tokens[:, 0])}
        fed |= {name: put(name, one) for name in ("decoder_target_tokens", "decoder_segment_ids")}
        batch = {**cache, **fed}
        logits = self.logits(params, batch, None)
        return jnp.take_along_axis(logits, positions[:, None, None], axis=1)[:, 0], batch

    def fork(self, cache: Batch, times: int) -> Batch:
        """Returns a cache of `times` copies of each row, one after the other."""
        return {name: jnp.repeat(x, times, axis=0) for name, x in cache.items()}

    def reorder(self, cache: Batch, chosen: jax.Array) -> Batch:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return {name: take_copies(x, chosen, axis=0) for name, x in cache.items()}


class Classifier(Objective):
    """Maximum likelihood of each image's label, for a network like `vit.VisionTransformer`.

    A batch has `image` float32 [batch, *image_shape], `label` int32 [batch] and `loss_weights` float32 [batch], which
    `framework.data.passthrough.PassThrough` makes.
    """

    def __init__(self, network: NetworkFactory, image_shape: Sequence[int], label_smoothing: float = 0.0):
        super().__init__(network, CrossEntropy(label_smoothing=label_smoothing))
        self._image_shape = tuple(image_shape)

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` are not read."""
        return image_spec(batch_size, self._image_shape)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns the logits of each class, float32 [batch, classes]: nothing is gained by computing them later."""
        return self.bind(params)(batch["image"], batch["loss_weights"] > 0, rng=rng), lambda logits: logits

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (labels, weights), [batch] each."""
        return batch["label"], batch["loss_weights"]

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each label, float32 [batch, 1], 0 on padding."""
        return super().score(params, batch)[:, None]


def image_spec(batch_size: int, image_shape: Sequence[int]) -> dict[str, TokenSpec]:
    """Returns the features of a batch of labelled images."""
    return {
        "image": TokenSpec((batch_size, *image_shape), np.dtype("float32"), ("batch", *[None] * len(image_shape))),
        "label": TokenSpec((batch_size,), np.dtype("int32"), ("batch",)),
        "loss_weights": TokenSpec((batch_size,), np.dtype("float32"), ("batch",)),
    }


class EncoderOnly(Objective):
    """Masked language modelling (Devlin et al. 2019, section 3.1, task 1), for a network like `bert.Bert`.

    The batch says which tokens are hidden, and so have weight.
    """

    def __init__(
        self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0, num_loss_chunks: int = 1
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets"."""
        names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
        return token_spec(batch_size, lengths["targets"], "encoder", names)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads at each position, [batch, length, d_model], and that layer."""
        tokens = AttentionMetadata(batch["encoder_segment_ids"])
        network = self.bind(params)
        x = network.hidden(
            batch["encoder_input_tokens"], batch["encoder_positions"], make_attention_mask(tokens, tokens), rng=rng
        )
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens, weights), [batch, length] each; hidden tokens alone have weight."""
        return token_targets(batch, "encoder")


class EncoderDecoder(Objective):
    """Maximum likelihood of targets given inputs, for a network with `encode`, `decode` and `score` (see `t5.T5`)."""

    def __init__(
        self, network: NetworkFactory, z_loss: float = 0.0, label_smoothing: float = 0.0, num_loss_chunks: int = 1
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "inputs" and "targets"."""
        return text_spec(batch_size, lengths, encoder=True)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, length, d_model], and that layer."""
        network = self.bind(params)
        encoder_key, decoder_key = (None, None) if rng is None else jax.random.split(rng)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments, encoder_key)
        x = network.decode(batch["decoder_input_tokens"], batch["decoder_segment_ids"], encoded, segments, decoder_key)
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (target tokens, weights), [batch, length] each."""
        return token_targets(batch, "decoder")

    @prefill()
    def prefill(
        self, params: dict[str, Any], batch: Batch, max_length: int
    ) -> tuple[jax.Array, jax.Array, DecodingCache]:
        """Encodes the inputs; decoding starts from the first of `decoder_input_tokens` (0 without) at position 0."""
        network = self.bind(params)
        segments = batch["encoder_segment_ids"]
        encoded = network.encode(batch["encoder_input_tokens"], segments)
        cache = DecodingCache(network.empty_cache(encoded, max_length), max_length, segments)
        rows = segments.shape[0]
        given = batch.get("decoder_input_tokens")
        start = jnp.zeros((rows, 1), jnp.int32) if given is None else jnp.asarray(given)[:, :1]
        return start, jnp.zeros((rows,), jnp.int32), cache

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        logits, cache = self.extend(params, tokens, positions[:, None], cache)
        return logits[:, 0], cache

    def extend(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, n] at positions [batch, n]; returns (logits [batch, n, vocab], cache)."""
        logits, layers = self.bind(params).decode_cached(
            tokens, positions, cache.layers, cache.encoder_segments, cache.length
        )
        return logits, dataclasses.replace(cache, layers=layers)

    def fork(self, cache: DecodingCache, times: int) -> DecodingCache:
        """Returns a cache of `times` copies of each row, one after the other; these share what was encoded."""
        return _each_own(lambda x: jnp.repeat(x, times, axis=cache.row_axis), cache)

    def reorder(self, cache: DecodingCache, chosen: jax.Array) -> DecodingCache:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return _each_own(lambda x: take_copies(x, chosen, cache.row_axis), cache)


def _each_own(change: Callable[[jax.Array], jax.Array], cache: DecodingCache) -> DecodingCache:
    """Applies `change` to the entries that each prediction has of its own; the predictions of an example share the
    others."""
    layers = type(cache.layers)(block | {"own": jax.tree.map(change, block["own"])} for block in cache.layers)
    return dataclasses.replace(cache, layers=layers)


class DecoderOnly(Objective):
    """Maximum likelihood of a sequence, for a network like `lm.LanguageModel`.

    With `prefix` the batch marks inputs in `decoder_prefix_mask`: they see each other both ways (prefix LM).
    """

    def __init__(
        self,
        network: NetworkFactory,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        prefix: bool = False,
        num_loss_chunks: int = 1,
    ):
        """`num_loss_chunks` bounds the memory that logits take: see `losses.CrossEntropy`."""
        super().__init__(network, CrossEntropy(z_loss, label_smoothing, num_loss_chunks))
        self._prefix = prefix

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` needs "targets", and for a prefix LM "inputs"; rows hold both."""
        return text_spec(batch_size, lengths, encoder=False, prefix=self._prefix)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, length, d_model], and that layer."""
        network = self.bind(params)
        x, _ = network.hidden(batch["decoder_input_tokens"], batch["decoder_positions"], self._mask(batch), rng=rng)
        return x, network.score

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (target tokens, weights), [batch, length] each."""
        return token_targets(batch, "decoder")

    @prefill()
    def prefill(
        self, params: dict[str, Any], batch: Batch, max_length: int
    ) -> tuple[jax.Array, jax.Array, DecodingCache]:
        """Reads prompts of different lengths, left-aligned in `decoder_input_tokens` with segment 1.

        The last prompt token is fed again by the first `decode`, which rewrites its own entry of the cache.
        """
        tokens, segments = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
        rows, length = tokens.shape
        network = self.bind(params)
        positions = jnp.broadcast_to(row_positions(length), (rows, length))
        mask = Mask(jnp.pad(self._mask(batch).dense, ((0, 0), (0, 0), (0, 0), (0, max_length))))
        layers = network.empty_cache(rows, length + max_length)
        _, layers = network.hidden(tokens, positions, mask, cache=layers, cache_index=positions)
        last = jnp.sum(segments != 0, axis=1) - 1
        return jnp.take_along_axis(tokens, last[:, None], axis=1), last, DecodingCache(layers, length + max_length)

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        logits, cache = self.extend(params, tokens, positions[:, None], cache)
        return logits[:, 0], cache

    def extend(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Feeds tokens [batch, n] at positions [batch, n]; returns (logits [batch, n, vocab], cache)."""
        logits, layers = self.bind(params).decode_cached(tokens, positions, cache.layers, cache.length)
        return logits, dataclasses.replace(cache, layers=layers)

    def fork(self, cache: DecodingCache, times: int) -> DecodingCache:
        """Returns a cache of `times` copies of each row, one after the other."""
        layers = jax.tree.map(lambda x: jnp.repeat(x, times, axis=cache.row_axis), cache.layers)
        return dataclasses.replace(cache, layers=layers)

    def reorder(self, cache: DecodingCache, chosen: jax.Array) -> DecodingCache:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        layers = jax.tree.map(lambda x: take_copies(x, chosen, cache.row_axis), cache.layers)
        return dataclasses.replace(cache, layers=layers)

    def _mask(self, batch: Batch) -> Mask:
        segments = batch["decoder_segment_ids"]
        prefix = batch["decoder_prefix_mask"] if self._prefix else None
        tokens = row_metadata(segments.shape[1], segments, prefix)
        return make_attention_mask(tokens, tokens, causal=True)
