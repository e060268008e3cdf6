"""How slots draw their next tokens: each by numbers of its own, all in one program of few.

One program feeds the tokens of every step (`slot_arrays`), whatever slots ask for beyond; what is chosen from its
logits depends on a slot's own request alone, bit for bit.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.inference.decoding import FREE
from meshway.framework.inference.sampling import draw, filtered, penalize, row_key
from meshway.framework.serving.generation import Generation

SETTINGS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Choice(enum.IntEnum):
    """How much a step does to choose tokens; each does what those before it do, and gives their slots the same."""

    GREEDY = 0
    DRAWN = 1  # biases, penalties, temperature
    FILTERED = 2  # top-k, top-p, min-p: logits are sorted
    MASKED = 3  # grammars

    @classmethod
    def of(cls, generation: Generation) -> "Choice":
        """Returns the least that does what is asked for."""
        drawn = generation.temperature > 0
        if generation.grammar is not None:
            return cls.MASKED
        if drawn and (generation.top_k > 0 or generation.top_p < 1 or generation.min_p > 0):
            return cls.FILTERED
        penalties = (generation.repetition_penalty, generation.presence_penalty, generation.frequency_penalty)
        return cls.DRAWN if drawn or penalties != (1, 0, 0) or generation.logit_bias else cls.GREEDY


class Turn(NamedTuple):
    """What a step does in each slot, int32 [slots, width], from the host. The first place of a slot feeds its next
    token, the others guesses of what follows; each chooses the token after it.

    Attributes:
      positions: of what is fed.
      fed: the token, FREE for the one that was chosen last.
      forced: the token that must be chosen, FREE for any.
      made: how many tokens the slot has before the one that is chosen.
      active: 1 where something is fed.
    """

    positions: Any
    fed: Any
    forced: Any
    made: Any
    active: Any

    @classmethod
    def idle(cls, num_slots: int, width: int, position: int) -> "Turn":
        """Returns a turn in which nothing takes part; what is fed all the same is fed at `position`."""
        free, zeros = np.full((num_slots, width), FREE, np.int32), np.zeros((num_slots, width), np.int32)
        return cls(np.full_like(free, position), free, free.copy(), zeros, zeros.copy())


class Drawing(NamedTuple):
    """How slots draw their tokens.

    Attributes:
      keys: uint32 [slots, ...], data of random keys.
      settings: float32 [slots, 6], by SETTINGS.
      top_k: int32 [slots].
      generated: int32 [slots, vocab], how often each token was generated; counted in steps that do more than GREEDY.
      prompted: bool [slots, vocab], whether the prompt holds it.
      bias: float32 [slots, vocab], is added to logits.
    """

    keys: jax.Array
    settings: jax.Array
    top_k: jax.Array
    generated: jax.Array
    prompted: jax.Array
    bias: jax.Array


class Logits(NamedTuple):
    """Logits float32 [..., vocab], and [..., 1] what a log-probability is less than its logit by."""

    values: jax.Array
    greatest: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, values: jax.Array) -> "Logits":
        greatest = jnp.max(values, axis=-1, keepdims=True)
        return cls(values, greatest, jnp.log(jnp.sum(jnp.exp(values - greatest), axis=-1, keepdims=True)))

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """Returns the log-probabilities of logits [..., n]: no sum, so that any program has the same."""
        return logits - self.greatest - self.total


class Chosen(NamedTuple):
    """Of a step, perhaps still being computed: tokens int32 [slots, width], their log-probabilities float32 [slots,
    width], how many of them count, int32 [slots], and the likeliest, [slots, width, n] each, or None."""

    tokens: jax.Array
    log_probs: jax.Array
    counts: jax.Array
    top: tuple[jax.Array, jax.Array] | None


def chooser(choice: Choice) -> Callable[..., tuple[Drawing, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]]:
    """Returns the function that chooses the next tokens of each slot: that after the first place of a turn and, for as
    long as guesses are what was chosen, those after guesses. So they are the tokens that would be chosen one by one."""

    def one(drawing: Drawing, logits: Logits, turn: Turn, mask: jax.Array | None) -> jax.Array:
        """Returns the token that each slot chooses, int32 [slots], from logits [slots, vocab]; turn [slots]."""
        temperature, p, least, *penalties = drawing.settings.T
        changed = logits.values
        if choice > Choice.GREEDY:
            changed = penalize(changed + drawing.bias, drawing.generated, drawing.prompted, *penalties)
        if mask is not None:
            changed = jnp.where(mask, changed, -jnp.inf)
        chosen = jnp.argmax(changed, axis=-1).astype(jnp.int32)
        if choice > Choice.GREEDY:
            scaled = changed / jnp.where(temperature > 0, temperature, 1.0)[:, None]
            if choice >= Choice.FILTERED:
                scaled = filtered(scaled, drawing.top_k, p, least)
            # Compiled by itself, so that all programs round alike.
            scaled = jax.lax.optimization_barrier(scaled)
            drawn = draw(scaled, jax.random.wrap_key_data(drawing.keys), turn.made)
            chosen = jnp.where(temperature > 0, drawn, chosen)
        return jnp.where(turn.forced == FREE, chosen, turn.forced)

    def choose(
        drawing: Drawing, logits: Logits, tokens: jax.Array, turn: Turn, mask: jax.Array | None = None
    ) -> tuple[Drawing, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        def place(carry: Any, at: tuple[Logits, Turn, jax.Array]) -> Any:
            (drawing, tokens, counts), (logits, turn, index) = carry, at
            guessed = (index == 0) | ((counts == index) & (turn.fed == tokens))
            counted = guessed & (turn.active == 1)
            # A grammar says what the first may be; its slots guess nothing.
            chosen = one(drawing, logits, turn, None if mask is None else mask | (index > 0))
            chosen = jnp.where(counted, chosen, tokens)
            if choice > Choice.GREEDY:
                count = jax.vmap(lambda counts, token, new: counts.at[token].add(new))
                drawing = drawing._replace(generated=count(drawing.generated, chosen, counted))
            said = logits.log_probs(jnp.take_along_axis(logits.values, chosen[:, None], axis=-1))[:, 0]
            return (drawing, chosen, counts + counted), (chosen, said)

        places = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (logits, turn))
        start = (drawing, tokens, jnp.zeros_like(tokens))
        (drawing, tokens, counts), made = jax.lax.scan(place, start, (*places, jnp.arange(turn.fed.shape[1])))
        return drawing, tokens, (made[0].T, made[1].T, counts)

    return choose


def undrawn(count: int, vocab: int) -> Drawing:
    """Returns what slots have before any request."""
    return Drawing(
        jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), count)),
        jnp.zeros((count, len(SETTINGS)), jnp.float32),
        jnp.zeros(count, jnp.int32),
        jnp.zeros((count, vocab), jnp.int32),
        jnp.zeros((count, vocab), bool),
        jnp.zeros((count, vocab), jnp.float32),
    )


def asked(generation: Generation, prompted: Sequence[int], vocab: int) -> tuple[np.ndarray, ...]:
    """Returns what `begun` takes beside the slot; `prompted` is what a repetition penalty counts as seen."""
    seen, bias = np.zeros(vocab, bool), np.zeros(vocab, np.float32)
    seen[list(prompted)] = True
    for token, value in generation.logit_bias.items():
        bias[token] = value
    settings = np.array([getattr(generation, name) for name in SETTINGS], np.float32)
    # As `jax.random.key` reads a Python int: of the seed the lowest 32 bits.
    seed = np.array(generation.seed & 0xFFFFFFFF, np.uint32).view(np.int32)
    return seed, np.array([generation.decode, generation.top_k], np.int32), settings, seen, bias


def begun(
    drawing: Drawing,
    slot: jax.Array,
    seed: jax.Array,
    numbers: jax.Array,
    settings: jax.Array,
    prompted: jax.Array,
    bias: jax.Array,
) -> Drawing:
    """Returns how slots draw, with a new request in one of them; `numbers` are its decode and top_k."""
    key = jax.random.key_data(row_key(jax.random.key(seed), 0, numbers[0]))
    new = Drawing(key, settings, numbers[1], jnp.zeros_like(drawing.generated[0]), prompted, bias)
    return jax.tree.map(lambda old, row: old.at[slot].set(row), drawing, new)
