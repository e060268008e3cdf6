"""Which inference layout is best for a pass: what each costs in time and memory, and their order.

The closed forms are those of `cost.py`; here they are added up for a whole pass of a model: its products, what it reads
from the chips' memory, and what it sends (ESTI, section 2 and appendix A). Pure Python, without JAX.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from meshway.framework.planning.cost import (
    BATCH_OVER,
    FEED_FORWARD,
    GATHERED_OVER,
    Arrangement,
    AttentionLayout,
    Collective,
    FeedForward,
    RingKind,
    Transformer,
    cache_bytes,
    mfu,
    products,
    ring_seconds,
)
from meshway.framework.planning.topology import Chip, Topology

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass over a batch.

    Attributes:
      length: new tokens of each sequence: the prompt's in prefill, 1 in decoding.
      context: tokens of each sequence that attention reads, the new ones included; of the encoder's output in the
        attention to it, `inputs`.
      weight_bytes, cache_bytes, activation_bytes: of an element.
      overlap: whether communication goes on beside the products.
    """

    phase: Phase
    batch: int
    length: int
    context: int
    inputs: int = 0
    weight_bytes: float = 2
    cache_bytes: float = 2
    activation_bytes: float = 2
    overlap: bool = False

    @property
    def tokens(self) -> int:
        """New tokens of the batch."""
        return self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a pass costs by one layout of one arrangement.

    Attributes:
      compute, memory, communication: seconds that products, reads of the chip's memory, and collectives take alone.
      weights, cache, activations: bytes on a chip; gathered weights of a layer are among the activations.
      sent: bytes that a chip sends in the pass.
      params: that a token is multiplied with.
      one_way, bidirectional: seconds of the pass if collectives go around rings beside their products, in one direction
        or both (`Layout.products`).
    """

    model: Transformer
    what: Pass
    chip: Chip
    mesh: Arrangement
    feed_forward: FeedForward
    attention: AttentionLayout
    compute: float
    memory: float
    communication: float
    weights: float
    cache: float
    activations: float
    sent: float
    params: int
    num_collectives: int
    one_way: float
    bidirectional: float

    @property
    def seconds(self) -> float:
        """Of the pass: products wait for memory, and, without overlap, for collectives."""
        busy = max(self.compute, self.memory)
        return max(busy, self.communication) if self.what.overlap else busy + self.communication

    @property
    def bound(self) -> str:
        """What takes longest."""
        terms = {"compute": self.compute, "memory": self.memory, "communication": self.communication}
        return max(terms, key=lambda name: terms[name])

    @property
    def bytes(self) -> float:
        """On each chip, together."""
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds them."""
        return self.bytes <= self.chip.memory_bytes

    @property
    def mfu(self) -> float:
        """The share of the chips' peak."""
        return mfu(self.params, self.what.tokens, self.mesh.size("xyz"), self.chip.bfloat16, self.seconds)

    @property
    def chip_seconds_per_token(self) -> float:
        """The price of a token."""
        return self.mesh.size("xyz") / self.chip.cores * self.seconds / self.what.tokens

    @property
    def rank(self) -> tuple[bool, float, float, int]:
        """The order of preference: what fits; then time; where something hides the rest, the sum of all; then fewer
        collectives."""
        total = self.compute + self.memory + self.communication
        return not self.fits, self.seconds, total, self.num_collectives


def estimate(
    model: Transformer,
    what: Pass,
    chip: Chip,
    mesh: Arrangement,
    feed_forward: FeedForward,
    attention: AttentionLayout,
) -> Estimate:
    """Returns what a pass costs."""
    devices = mesh.size("xyz")
    layers, attentions, params = _run_by(model, what)
    pairs, exchanges = _layer(model, what, mesh, feed_forward, attention, attentions)
    collectives = [*(each for _, found in pairs for each in found), *exchanges]
    communication = layers * sum(each.seconds(mesh, _itemsize(what, each)) for each in collectives)
    gathered = mesh.size(GATHERED_OVER.get(feed_forward, ""))
    cache = _cache(model, what, attention, mesh)
    scores = 4 * layers * what.tokens * model.num_heads * model.head_dim * _read(model, what)
    weights = model.num_params * what.weight_bytes / devices
    read = params * what.weight_bytes * gathered / devices + (cache if what.phase == "decode" else 0)
    layer = (attentions * model.attention_params + model.mlp_params) * what.weight_bytes * gathered / devices
    width = (model.mlp_matrices - 1) * model.d_ff + model.d_model
    hidden = what.tokens * width * what.activation_bytes / mesh.size("yz" if feed_forward == "2D" else "xyz")
    compute, memory = (2 * params * what.tokens + scores) / (devices * chip.bfloat16), read / chip.memory_bandwidth

    def in_rings(ring: RingKind) -> float:
        alone = together = sum(each.seconds(mesh, what.activation_bytes) for each in exchanges)
        for width, found in pairs:
            operations, bytes_read = 2 * what.tokens * model.d_model * width, model.d_model * width * what.weight_bytes
            product = max(operations / chip.bfloat16, bytes_read * gathered / chip.memory_bandwidth) / devices
            sizes = [_itemsize(what, each) for each in found]
            together += ring_seconds(found, product, mesh, sizes, chip.link_bandwidth, ring)
            alone += product
        return layers * together + max(0.0, max(compute, memory) - layers * alone)

    return Estimate(
        model=model,
        what=what,
        chip=chip,
        mesh=mesh,
        feed_forward=feed_forward,
        attention=attention,
        compute=compute,
        memory=memory,
        communication=communication,
        weights=weights,
        cache=cache,
        activations=hidden + (layer if gathered > 1 else 0),
        sent=layers * sum(each.moved(mesh) * _itemsize(what, each) for each in collectives),
        params=params,
        num_collectives=sum(mesh.size(each.axes) > 1 for each in collectives),
        one_way=in_rings("one_way"),
        bidirectional=in_rings("bidirectional"),
    )


def _itemsize(what: Pass, each: Collective) -> float:
    return what.weight_bytes if each.weights else what.activation_bytes


def _run_by(model: Transformer, what: Pass) -> tuple[int, int, int]:
    """Returns the layers that a pass goes through, attention layers in each, and the weights that meet each token."""
    if model.encoder_layers and what.phase == "prefill":
        return model.encoder_layers, 1, model.encoder_params + model.crossed_params
    return model.layers, model.attentions, model.decoder_params - model.crossed_params + model.logits_params


def _read(model: Transformer, what: Pass) -> float:
    """Returns how many tokens a new one attends to, on average, in all attention layers of a layer."""
    if not model.encoder_layers:
        return what.context - what.length + (what.length + 1) / 2
    return what.length if what.phase == "prefill" else what.context + what.inputs


def _cache(model: Transformer, what: Pass, attention: AttentionLayout, mesh: Arrangement) -> float:
    own = cache_bytes(model, what.batch, what.context, attention, mesh, what.cache_bytes)
    if not model.encoder_layers:
        return model.layers * own
    inputs = what.inputs if what.phase == "decode" else what.length
    crossed = cache_bytes(model, what.batch, inputs, attention, mesh, what.cache_bytes)
    return model.layers * (crossed + (own if what.phase == "decode" else 0))


def _layer(
    model: Transformer,
    what: Pass,
    mesh: Arrangement,
    feed_forward: FeedForward,
    attention: AttentionLayout,
    attentions: int,
) -> tuple[list[tuple[float, list[Collective]]], list[Collective]]:
    """Returns (width, collectives) of a layer's products with d_model, and its exchanges between shards of projections
    and of attention. Keys and values of the new tokens are left out: they are small."""
    heads, hidden = model.num_heads * model.head_dim, model.d_ff * (model.mlp_matrices - 1)
    widths = [(hidden + heads, model.d_ff + heads)] if model.parallel else [(hidden, model.d_ff)]
    widths += [] if model.parallel else attentions * [(heads, heads)]
    pairs: list[tuple[float, list[Collective]]] = []
    for width_in, width_out in widths:
        both = products(feed_forward, what.tokens, model.d_model, width_in, width_out, mesh)
        half = len(both) // 2
        pairs += [(width_in, both[:half]), (width_out, both[half:])]
    # Queries and outputs change between the axes that shard the batch in the products, and those that do in attention.
    products_over, attention_over = GATHERED_OVER.get(feed_forward, ""), BATCH_OVER[attention]
    changed = "".join(axis for axis in "xyz" if (axis in products_over) != (axis in attention_over))
    exchange = Collective("all-to-all", changed, what.tokens * heads / mesh.size("xyz"))
    return pairs, 2 * attentions * [exchange] if changed else []


def arrangements(topology: Topology, flat: bool) -> list[Arrangement]:
    """Returns the ways to give each ring of a topology to x, y or z, one for equal rings, evenly shared ones first."""
    total = topology.chip.sends if flat or not topology.chip.torus else None
    alike = Counter(topology.device_rings)
    shares = [
        [(x, y, count - x - y) for x in range(count + 1) for y in range(count + 1 - x)] for count in alike.values()
    ]
    found = []
    for share in itertools.product(*shares):
        x, y, z = (
            tuple(ring for ring, numbers in zip(alike, share, strict=True) for _ in range(numbers[axis]))
            for axis in range(3)
        )
        found.append(Arrangement(x, y, z, total))
    return sorted(found, key=lambda one: max(one.sizes))


def estimates(
    model: Transformer,
    what: Pass,
    topology: Topology,
    flat: bool = True,
    feed_forward: Sequence[FeedForward] = FEED_FORWARD,
) -> list[Estimate]:
    """Returns what a pass costs by every layout on every arrangement of a topology, the best first.

    Attention is sharded over the batch only where it has a row for each part, and weights are gathered only over axes
    that can shard the batch instead.

    Args:
      flat: how the wires are read, see above. The paper's measurements on 64 chips follow the flat reading.
    """
    found = []
    for mesh in arrangements(topology, flat):
        for layout in feed_forward:
            over = GATHERED_OVER.get(layout, "")
            if over and (what.batch % mesh.size(over) or mesh.size(over) == 1):
                continue
            found += [
                estimate(model, what, topology.chip, mesh, layout, attention)
                for attention in _attentions(what.batch, mesh)
            ]
    return sorted(found, key=lambda each: each.rank)


_NAMES: dict[FeedForward, str] = {
    "1D": "1d",
    "2D": "2d",
    "WG-X": "weight_gathered_x",
    "WG-XY": "weight_gathered_xy",
    "WG-XYZ": "weight_gathered_xyz",
}
ONE_CHIP = "single"  # the layout where nothing is sharded


def shipped() -> dict[tuple[FeedForward, FeedForward, AttentionLayout], str]:
    """Returns (feed-forward layout of prompts, of decoding, attention's of both) -> the layout file that runs them with
    one copy of the weights, and with keys and values that stay where they are made."""
    stationary: tuple[FeedForward, ...] = ("1D", "2D")
    over: tuple[AttentionLayout, ...] = ("heads", "batch-xyz")
    pairs: list[tuple[FeedForward, FeedForward, AttentionLayout]] = [
        *((each, each, attention) for each in stationary for attention in BATCH_OVER),
        *((each, each, "heads") for each in GATHERED_OVER),
        ("WG-XYZ", "WG-XYZ", "batch-xyz"),
        *((each, "2D", attention) for each in GATHERED_OVER for attention in over),
    ]
    found: dict[tuple[FeedForward, FeedForward, AttentionLayout], str] = {}
    for first, then, attention in pairs:
        name = _NAMES[then] + ("" if attention == "heads" else f"_{attention.replace('-', '_')}")
        found[first, then, attention] = f"inference/{name}" + ("" if first == then else f"_after_{_NAMES[first]}")
    return found


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout file on a mesh, for a prompt and the steps of decoding that follow it.

    Attributes:
      layout: the file's name.
      prefill, decode: what a prompt costs, and a step.
      steps: how many follow a prompt.
    """

    layout: str
    prefill: Estimate
    decode: Estimate
    steps: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of x, y and z."""
        return self.prefill.mesh.sizes

    @property
    def seconds(self) -> float:
        """Of a prompt and the steps after it."""
        return self.prefill.seconds + self.steps * self.decode.seconds

    @property
    def largest(self) -> Estimate:
        """The phase that keeps most on a chip."""
        return max(self.prefill, self.decode, key=lambda each: each.bytes)

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds either phase."""
        return self.largest.fits

    @property
    def rank(self) -> tuple[bool, float, float, int]:
        """The order of preference, as `Estimate.rank` has it."""
        first, then = self.prefill.rank, self.decode.rank
        total = first[2] + self.steps * then[2]
        return not self.fits, self.seconds, total, first[3] + self.steps * then[3]


def candidates(prefills: Iterable[Estimate], decodes: Iterable[Estimate], steps: int) -> list[Candidate]:
    """Returns the layout files that run two phases on the meshes of their estimates, the best first."""
    first, then = (
        {(each.mesh, each.attention, each.feed_forward): each for each in found} for found in (prefills, decodes)
    )
    found = [
        Candidate(name, first[mesh, attention, prompts], step, steps)
        for (mesh, attention, decoding), step in then.items()
        for (prompts, other, same), name in shipped().items()
        if (other, same) == (decoding, attention) and (mesh, attention, prompts) in first
    ]
    if found and found[0].mesh == (1, 1, 1):
        found = [dataclasses.replace(found[0], layout=ONE_CHIP)]
    return sorted(found, key=lambda each: each.rank)


def why_behind(other: Candidate, best: Candidate) -> str:
    """Returns why one candidate comes behind another: what it needs too much of, or takes longer for."""
    if not other.fits and best.fits:
        return "a chip has no room for it"
    parts = {
        f"{phase}'s {term}": often * (getattr(getattr(other, phase), term) - getattr(getattr(best, phase), term))
        for phase, often in (("prefill", 1), ("decode", best.steps))
        for term in ("compute", "memory", "communication")
    }
    worst = max(parts, key=lambda name: parts[name])
    slower = other.seconds / best.seconds - 1
    if parts[worst] <= 0:
        return "it sends in more collectives" if other.rank[3] > best.rank[3] else "its numbers are the same"
    return f"{slower:.1%} slower, most of all by {worst}" if slower >= 5e-4 else f"no quicker, with more of {worst}"


def _attentions(batch: int, mesh: Arrangement) -> Iterator[AttentionLayout]:
    seen = set()
    for name, over in BATCH_OVER.items():
        size = mesh.size(over)
        if size <= batch and size not in seen:
            seen.add(size)
            yield name
