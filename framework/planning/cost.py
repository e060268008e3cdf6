"""What a layer of inference sends and keeps on a mesh of chips: closed forms of Pope et al. 2022 ("ESTI").

Efficiently Scaling Transformer Inference, arXiv:2211.05102. A mesh has three axes x, y, z. Weights of a feed-forward
layer rest sharded [d_model over x, d_ff over y and z] (2D), or [d_ff over all three] (1D); a layout says what moves:
activations, or weights gathered over some axes. Attention shards its cache over heads, or over the batch. Volumes are
section 3's and appendix A's; the factor (K-1)/K of a collective over K chips, which the paper drops, is kept. Time
comes from two readings of the wires:

- flat: each collective has all of a chip's links, as in the paper, and within a switch;
- torus: it has those of the axes that it spans (How to Scale Your Model, chapter 3), and takes at least a microsecond
  for each hop to the farthest chip (appendix C there).

Pure Python, without JAX.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from meshway.framework.planning.topology import Ring, shared_bandwidth

HOP = 1e-6  # seconds


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes of a dense transformer that its costs depend on.

    Attributes:
      layers: of the decoder, or of a model without encoder.
      gated: whether the feed-forward layer multiplies two projections of its input.
      parallel: whether attention and feed-forward part read the same input, and are added (PaLM).
      encoder_layers: of an encoder, whose output each layer of the decoder attends to; 0 for none.
      tied: whether the vocabulary's embeddings are its logits' weights, too.
    """

    layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    parallel: bool = False
    encoder_layers: int = 0
    tied: bool = True

    @property
    def mlp_matrices(self) -> int:
        """Matrices [d_model, d_ff] of a feed-forward layer."""
        return 3 if self.gated else 2

    @property
    def attention_params(self) -> int:
        """Weights of an attention layer's four projections."""
        return 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def mlp_params(self) -> int:
        """Weights of a feed-forward layer."""
        return self.mlp_matrices * self.d_model * self.d_ff

    @property
    def encoder_params(self) -> int:
        """Weights of the encoder's layers."""
        return self.encoder_layers * (self.attention_params + self.mlp_params)

    @property
    def decoder_params(self) -> int:
        """Weights of the decoder's layers, attention to an encoder included."""
        return self.layers * (self.attentions * self.attention_params + self.mlp_params)

    @property
    def crossed_params(self) -> int:
        """Weights that make keys and values of an encoder's output, once for all steps of decoding."""
        return self.layers * 2 * self.d_model * self.head_dim * self.num_kv_heads if self.encoder_layers else 0

    @property
    def logits_params(self) -> int:
        """Weights that the logits are made with."""
        return self.vocab_size * self.d_model

    @property
    def num_params(self) -> int:
        """All weights but the norms', which are too few to matter."""
        embeddings = self.logits_params * (1 if self.tied else 2)
        return self.encoder_params + self.decoder_params + embeddings

    @property
    def attentions(self) -> int:
        """Attention layers in a layer of the decoder."""
        return 2 if self.encoder_layers else 1


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Axes x, y and z of a mesh, each of rings of a topology.

    Attributes:
      flat: bytes/s of a chip's links together, which each collective has; None where it has those of its axes.
    """

    x: tuple[Ring, ...]
    y: tuple[Ring, ...]
    z: tuple[Ring, ...]
    flat: float | None = None

    def rings(self, axes: str) -> list[Ring]:
        """Returns the rings of more than one chip along these axes."""
        return [ring for axis in axes for ring in getattr(self, axis) if ring.size > 1]

    def size(self, axes: str) -> int:
        """Returns the chips along these axes together."""
        return math.prod(ring.size for ring in self.rings(axes))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes of x, y and z."""
        return self.size("x"), self.size("y"), self.size("z")


CollectiveKind = Literal["all-gather", "reduce-scatter", "all-to-all"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange over the chips along some axes.

    Attributes:
      elements: on each chip: of the output of an all-gather, of the input of the others.
      weights: whether weights are exchanged, not activations.
    """

    kind: CollectiveKind
    axes: str
    elements: float
    weights: bool = False

    def share(self, arrangement: Arrangement) -> float:
        """Returns (K-1)/K over K chips: what of all is another chip's."""
        return 1 - 1 / arrangement.size(self.axes)

    def moved(self, arrangement: Arrangement) -> float:
        """Returns the elements that a chip sends, (K-1)/K of all over K chips (ESTI, appendix A.1)."""
        parts = arrangement.size(self.axes)
        return self.elements * (parts - 1) / parts

    def seconds(self, arrangement: Arrangement, itemsize: float) -> float:
        """Returns how long it takes, alone."""
        rings = arrangement.rings(self.axes)
        if not rings:
            return 0.0
        sent = self.moved(arrangement) * itemsize
        if arrangement.flat:
            return sent / arrangement.flat
        hops = HOP * sum(ring.size / 2 for ring in rings)
        if self.kind == "all-to-all":  # a quarter of the all-gather of the same array along a ring, one after the other
            whole = self.elements * itemsize
            return max(hops, sum(whole * ring.size / 4 / ring.bandwidth for ring in rings))
        return max(hops, sent / shared_bandwidth(rings))


FeedForward = Literal["1D", "2D", "WG-X", "WG-XY", "WG-XYZ"]
FEED_FORWARD: tuple[FeedForward, ...] = ("1D", "2D", "WG-X", "WG-XY", "WG-XYZ")
GATHERED_OVER: dict[FeedForward, str] = {"WG-X": "x", "WG-XY": "xy", "WG-XYZ": "xyz"}
_REST: dict[str, str] = {"x": "yz", "xy": "z", "xyz": ""}

AttentionLayout = Literal["heads", "batch-z", "batch-yz", "batch-xyz"]
BATCH_OVER: dict[AttentionLayout, str] = {"heads": "", "batch-z": "z", "batch-yz": "yz", "batch-xyz": "xyz"}


def products(
    layout: FeedForward, tokens: float, d_model: int, width_in: float, width_out: float, mesh: Arrangement
) -> list[Collective]:
    """Returns the collectives, in order, of a product from d_model to `width_in`, and one from `width_out` back.

    A feed-forward layer has widths (d_ff, d_ff), a gated one (2 d_ff, d_ff), attention's projections (num_heads x
    head_dim, twice), a parallel block the sums of both (ESTI, sections 3.2 to 3.4, figure 2).

    Args:
      tokens: of the whole batch in this pass.
    """
    x, _, _ = mesh.sizes
    if layout == "1D":
        whole = tokens * d_model
        return [Collective("all-gather", "xyz", whole), Collective("reduce-scatter", "xyz", whole)]
    if layout == "2D":
        stream, hidden = tokens * d_model / x, tokens / mesh.size("yz")
        return [
            Collective("all-gather", "yz", stream),
            Collective("reduce-scatter", "x", hidden * width_in),
            Collective("all-gather", "x", hidden * width_out),
            Collective("reduce-scatter", "yz", stream),
        ]
    over = GATHERED_OVER[layout]
    rest, parts = _REST[over], mesh.size(over)
    stream, share = tokens * d_model / parts, d_model * parts / mesh.size("xyz")
    return [
        Collective("all-gather", over, share * width_in, weights=True),
        Collective("all-gather", rest, stream),
        Collective("all-gather", over, share * width_out, weights=True),
        Collective("reduce-scatter", rest, stream),
    ]


RingKind = Literal["one_way", "bidirectional"]  # as `Layout.products` names them


def ring_seconds(
    collectives: Sequence[Collective],
    product: float,
    mesh: Arrangement,
    itemsizes: Sequence[float],
    link: float,
    ring: RingKind,
) -> float:
    """Returns how long a product takes whose collectives go around rings beside it (`layers/collective_matmul.py`).

    Either the weights' collectives or the activations' do, whichever send more; the others come before or after. In
    each round devices pass on a chunk and multiply another, so a round takes the longer of both (Wang et al. 2023,
    "Overlap Communication with Dependent Computation via Decomposition": decomposed, a collective and its product take
    the longer of the two and what begins or ends alone, instead of their sum). What is gathered is multiplied for the
    first block of a sum that is scattered, and the other blocks as sums go around.

    Args:
      collectives: of the product, in order: gathers, then a reduce-scatter.
      product: its seconds alone.
      itemsizes: bytes of an element of each.
      link: bytes/s of one link, one way: what a ring in one direction has.
    """
    sent = {True: 0.0, False: 0.0}
    for each in collectives:
        sent[each.weights] += each.moved(mesh)
    total, blocks, left = 0.0, 1, product
    for each, itemsize in zip(collectives, itemsizes, strict=True):
        if each.weights != (sent[True] > sent[False]):
            total += each.seconds(mesh, itemsize)
        elif each.kind == "reduce-scatter":
            blocks = mesh.size(each.axes)
    for each, itemsize in zip(collectives, itemsizes, strict=True):
        if each.weights == (sent[True] > sent[False]):
            beside = product / (blocks if each.kind == "all-gather" else 1) * each.share(mesh)
            total += _rounds_seconds(each, beside, mesh, itemsize, link, ring)
            left -= beside
    return total + max(left, 0.0)


def _rounds_seconds(
    collective: Collective, beside: float, mesh: Arrangement, itemsize: float, link: float, ring: RingKind
) -> float:
    """Returns the seconds of a collective in rounds, each beside an equal share, by chunks, of `beside` seconds."""
    rings = mesh.rings(collective.axes)
    count = math.prod(each.size for each in rings)
    total, chunk, chunks = 0.0, collective.elements / max(count, 1) * itemsize, 1
    for each in rings:  # nested: what was gathered inside goes around outside
        rounds = each.size - 1 if ring == "one_way" else each.size // 2
        bandwidth = min(link, each.bandwidth) if ring == "one_way" else each.bandwidth
        passed = max(HOP * rounds, (each.size - 1) * chunk * chunks / bandwidth)
        total += max(passed, beside * (each.size - 1) * chunks / (count - 1))
        chunks *= each.size
    return total


def volume(collectives: Iterable[Collective], mesh: Arrangement) -> float:
    """Returns the elements that a chip sends."""
    return sum(each.moved(mesh) for each in collectives)


def crossover(
    first: FeedForward, second: FeedForward, d_model: int, d_ff: int, gated: bool, mesh: Arrangement
) -> float:
    """Returns the tokens of a pass from which a feed-forward layer sends less by the second layout than by the first.

    Both volumes are linear in the tokens. inf if it never does.
    """
    width = (2 if gated else 1) * d_ff

    def line(layout: FeedForward) -> tuple[float, float]:
        at = [volume(products(layout, tokens, d_model, width, d_ff, mesh), mesh) for tokens in (0, 1)]
        return at[0], at[1] - at[0]

    (base_1, slope_1), (base_2, slope_2) = line(first), line(second)
    return (base_2 - base_1) / (slope_1 - slope_2) if slope_1 > slope_2 else math.inf


def best_split(num_chips: int, d_model: int, d_ff: int, torus: bool = False) -> tuple[float, float]:
    """Returns the sizes of x, and of y and z together, by which a 2D layer sends for the shortest time.

    Flat: x = sqrt(n d_model / d_ff) (ESTI, appendix A.2.1). In a torus the collectives over y and z have twice the
    links of those over x: x is smaller by sqrt(2) (How to Scale Your Model, chapter 7). Real numbers.
    """
    x = math.sqrt(num_chips * d_model / d_ff / (2 if torus else 1))
    return x, num_chips / x


def stationary_seconds(
    layout: Literal["1D", "2D"], num_chips: int, d_model: int, d_ff: int, axis_bandwidth: float, torus: bool = False
) -> float:
    """Returns the seconds that an ungated layer sends a token's elements, one byte each, at the best split.

    (K-1)/K and hops are dropped. Flat, where a collective has the links of all three axes: 2 d_model / bandwidth for
    1D, 8 d_model / (sqrt(n) bandwidth) for 2D and d_ff = 4 d_model (ESTI, section 3.2.1 and appendix A.2.1).

    Args:
      axis_bandwidth: bytes/s along one axis, both ways together.
    """
    if layout == "1D":
        return 2 * d_model / (3 * axis_bandwidth)
    x, yz = best_split(num_chips, d_model, d_ff, torus)
    over_yz, over_x = (2, 1) if torus else (3, 3)
    return 2 * (d_model / x / over_yz + d_ff / yz / over_x) / axis_bandwidth


def best_gather(tokens: float, num_chips: int, d_ff: int) -> float:
    """Returns over how many chips weights are best gathered, sqrt(tokens n / d_ff) (ESTI, appendix A.2.2)."""
    return math.sqrt(tokens * num_chips / d_ff)


def mfu(params: float, tokens: float, num_chips: int, peak: float, seconds: float) -> float:
    """Returns the share of the chips' peak FLOP/s that 2 `params` for each token take (ESTI, section 2)."""
    return 2 * params * tokens / (num_chips * peak * seconds)


def cache_bytes(
    model: Transformer, batch: int, context: int, layout: AttentionLayout, mesh: Arrangement, itemsize: float
) -> float:
    """Returns the bytes of keys and values of one layer's attention on a chip (ESTI, section 3.3).

    Along the axes that do not shard the batch, key-value heads are sharded, as far as there are any; where there are
    fewer than chips, each chip holds one, or those that its query heads meet where these are not adjacent.
    """
    rows = math.ceil(batch / mesh.size(BATCH_OVER[layout]))
    return 2 * rows * context * _kv_heads(model, layout, mesh) * model.head_dim * itemsize


def _kv_heads(model: Transformer, layout: AttentionLayout, mesh: Arrangement) -> int:
    """Returns the heads of keys that a chip holds, for its examples.

    With attention over the batch along some axes, a chip has blocks of query heads from as many chips, adjacent in each
    alone; grouped heads of keys that do not divide as these do are copied as often as queries of a group are apart.
    """
    over, chips = mesh.size(BATCH_OVER[layout]), mesh.size("xyz")
    if over in (1, chips) or model.num_kv_heads == 1 or model.num_kv_heads % chips == 0:
        return math.ceil(model.num_kv_heads * over / chips)
    block = model.num_heads // (chips if model.num_heads % chips == 0 else mesh.size("yz"))
    here = model.num_heads * over // chips
    return max(1, here // math.gcd(block, here, model.num_heads // model.num_kv_heads))


def max_context(
    model: Transformer,
    batch: int,
    layout: AttentionLayout,
    mesh: Arrangement,
    memory: float,
    itemsize: float = 2,
) -> int:
    """Returns the longest context whose cache fits in `memory` bytes of each chip (ESTI, table 1)."""
    token = model.layers * cache_bytes(model, batch, 1, layout, mesh, itemsize)
    return int(memory / token)
