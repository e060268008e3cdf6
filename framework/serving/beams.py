"""Beam searches that come and go: `BeamPool`, whose slots have a search each, all advanced by one program."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import BeamSearch, SearchState, best_first, hypotheses
from meshway.framework.inference.decoding import FREE, Decoded, Stop, decoding_model
from meshway.framework.inference.engine import prompt_batch
from meshway.framework.inference.predictor import Session
from meshway.framework.inference.rows import Buckets, doubling
from meshway.framework.interfaces import Batch, Cache, Params
from meshway.framework.partitioning.partitioner import Partitioner
from meshway.framework.partitioning.sharded_model import ShardedBatch
from meshway.framework.serving.generation import Generation, Hypothesis, Made

_TOKENS = {True: "encoder_input_tokens", False: "decoder_input_tokens"}  # of a prompt, by whether there is an encoder
_PLAIN = Generation((0,), 1)
_DRAWN_BY = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that was started: the searches after it, without their cache, and the requests they are of, by slot."""

    searches: SearchState
    occupants: Mapping[int, int]


class BeamPool:
    """Slots of beam searches by T5X's rules; meets `generation.Pool`.

    Each slot has rows for `max_beams` beams. Its search finds what `BeamSearch(num_beams, alpha)` finds for the request
    alone: slots stand at different places, and a step adds a token to the beams of every one. A search that is over
    stays as it is until its slot is free.

    Attributes:
      num_slots: how many searches go on at a time.
    """

    def __init__(self, session: Session, num_slots: int, max_beams: int, max_length: int, max_input_length: int):
        """Args:
          session: the model; its stop tokens end a hypothesis.
          num_slots: a multiple of the devices that share a batch.
          max_beams: the most beams of a request.
          max_length: the most new tokens of a request.
          max_input_length: the most tokens of a prompt.

        Raises:
          UserError: the model does not decode; one of the sizes is below 1; slots do not divide over the mesh; there
            are more beams than tokens to begin with.
        """
        sizes = {"num_slots": num_slots, "max_beams": max_beams, "max_length": max_length}
        for name, size in (sizes | {"max_input_length": max_input_length}).items():
            if size < 1:
                raise UserError(f"{name} must be at least 1, not {size}")
        self.num_slots, self._session, self._how, self._max_length = (
            num_slots,
            session,
            BeamSearch(max_beams),
            max_length,
        )
        decoding_model(session.sharded.model)
        session.engine(self._how, num_slots)  # refuses what cannot be searched
        self._room = session.row_format.room(max_input_length, max_length, scores=False)["inputs"]
        self._buckets = doubling({"inputs": self._room})
        self._requests = dict[int, Generation]()  # by slot
        self._occupants, self._count = dict[int, int](), 0  # by slot that searches, the number of its request

    def warm_up(self) -> None:
        """Compiles and runs every program once; the pool is empty then.

        Raises:
          UserError: the model refuses these lengths, or an array does not fit the layout.
        """
        self._programs = _Programs(self._session, self._how, self.num_slots, self._buckets, self._max_length)
        self._searches = self._programs.empty()
        for bucket in range(len(self._buckets.shapes)):
            self._searches = self._programs.admit(self._searches, 0, _PLAIN, bucket)
        self._programs.read(self._advance().searches)
        self._searches = self._programs.empty()

    def refusal(self, generation: Generation) -> str | None:
        """Returns why this request can never be served here, else None."""
        size = self._session.row_format.prompt_size(generation.prompt)
        drawn_by = [name for name in _DRAWN_BY if getattr(generation, name) != getattr(_PLAIN, name)]
        if generation.temperature not in (0, 1):
            drawn_by.append("temperature")
        if not 1 <= generation.num_beams <= self._how.num_beams:
            return f"{generation.num_beams} beams are asked for, and a search has 1 to {self._how.num_beams}"
        if not 0 <= generation.alpha < math.inf:
            return f"the length penalty of a beam search must be 0 or more, not {generation.alpha}"
        if not 1 <= generation.max_tokens <= self._max_length:
            return f"{generation.max_tokens} tokens are asked for, and a beam search makes 1 to {self._max_length}"
        if not 1 <= size <= self._room:
            return f"the prompt has {size} tokens, and a beam search has room for 1 to {self._room}"
        if generation.grammar is not None:
            return "a beam search cannot follow a grammar: leave out either"
        if generation.top_log_probs:
            return "a beam search does not tell the likeliest tokens at each place: leave out either"
        if drawn_by:
            return f"a beam search draws nothing, so it cannot honour {', '.join(drawn_by)}: leave out either"
        return None

    def start(self, slot: int, generation: Generation) -> None:
        """Gives a free slot to a request that `refusal` does not refuse."""
        assert slot not in self._requests and self.refusal(generation) is None
        self._requests[slot] = generation

    def prefill(self, slot: int) -> bool:
        """Reads the whole prompt of a slot, so that its search joins the next step; True."""
        generation = self._requests[slot]
        bucket = self._buckets.of({"inputs": self._session.row_format.prompt_size(generation.prompt)})
        assert bucket is not None, "`refusal` lets through only what fits"
        self._searches = self._programs.admit(self._searches, slot, generation, bucket)
        self._count += 1
        self._occupants[slot] = self._count
        return True

    def step(self) -> _Step | None:
        """Starts a step of all searches; None where there are none. What it returns is for `read`."""
        return self._advance() if self._occupants else None

    def read(self, step: _Step) -> Mapping[int, Made]:
        """Waits for a step; of a search that is over then, returns the hypotheses, once."""
        still = [slot for slot, number in step.occupants.items() if self._occupants.get(slot) == number]
        is_open = np.asarray(step.searches.open)
        made = {slot: Made((), ()) for slot in still}
        if over := [slot for slot in still if not is_open[slot]]:
            found = self._programs.read(step.searches)
            for slot in over:
                made[slot] = Made((), (), hypotheses=_hypotheses_of(found, slot))
                del self._occupants[slot]
        return made

    def free(self, slot: int) -> None:
        """Ends the request of a slot, at any time after `start`; its results are dropped."""
        del self._requests[slot]
        self._occupants.pop(slot, None)

    def _advance(self) -> _Step:
        self._searches = self._programs.step(self._searches)
        return _Step(self._searches._replace(cache=None), dict(self._occupants))


class _Programs:
    """The programs of a pool, all compiled by the constructor. They consume the cache of the searches they are given,
    and leave the rest valid."""

    def __init__(self, session: Session, how: BeamSearch, num_slots: int, buckets: Buckets, max_length: int):
        self._session, self._how, self._buckets, self._max_length = session, how, buckets, max_length
        self._model, self._num_slots = decoding_model(session.sharded.model), num_slots
        self._rows, stop = _fewest_rows(session.sharded.partitioner), Stop(session.text.stop)
        try:
            with session.sharded.partitioner.activate():
                small, double, self._whole = map(self._shapes, (self._rows, 2 * self._rows, num_slots))
        except ValueError as error:
            raise UserError(f"{type(session.sharded.model).__name__}: {error}") from error
        self._axes = jax.tree.map(_row_axis, small, double)
        self._all_rows, self._one = (
            [prompt_batch(session.sharded, rows, shape["inputs"]) for shape in buckets.shapes]
            for rows in (num_slots, self._rows)
        )
        # The cache is sharded by the model's own constraints; the other programs keep that.
        self._empty = self._compile(self._without_searches, self._all_rows[0], searches=False)
        self._shardings: Any = self._empty.output_shardings
        self._admit = [
            self._compile(functools.partial(self._admitted, bucket), prompts)
            for bucket, prompts in enumerate(self._one)
        ]
        self._step = self._compile(
            lambda params, at, cache: how.step(self._model, params, stop, at._replace(cache=cache))
        )
        partitioner, at = session.sharded.partitioner, self._whole._replace(cache=None)
        shardings = (self._shardings._replace(cache=None),)
        self._read = partitioner.compile(hypotheses, at, in_shardings=shardings, out_shardings=partitioner.replicated)

    def empty(self) -> SearchState:
        """Returns slots without a search."""
        made: SearchState = self._empty(self._session.params, *self._given(self._all_rows[0], 0, _PLAIN))
        return made

    def admit(self, at: SearchState, slot: int, generation: Generation, bucket: int) -> SearchState:
        """Returns the searches after a prompt, padded as `bucket` says, was read into a slot."""
        given = self._given(self._one[bucket], slot, generation)
        made: SearchState = self._admit[bucket](self._session.params, *given, at._replace(cache=None), at.cache)
        return made

    def step(self, at: SearchState) -> SearchState:
        """Returns the searches one token later; the devices may still be at it."""
        made: SearchState = self._step(self._session.params, at._replace(cache=None), at.cache)
        return made

    def read(self, at: SearchState) -> Decoded:
        """Returns the hypotheses of all slots, [slots, max_beams, ...], on the host; `at` is without its cache."""
        found: Decoded = jax.device_get(self._read(at))
        return found

    def _given(self, prompts: ShardedBatch, slot: int, one: Generation) -> tuple[Any, ...]:
        """Returns what `_asked` has the shapes of: rows of prompts, what is forced, numbers of the request."""
        length = prompts.spec[_TOKENS[self._session.row_format.has_encoder]].shape[1]
        rows = prompts.shard(self._session.row_format.prompts([one.prompt] * prompts.size, length))
        forced = np.full((prompts.size, self._max_length), FREE, np.int32)
        forced[:, : len(one.forced)] = one.forced[: self._max_length]
        return rows, forced, np.int32(slot), np.int32(one.num_beams), np.float32(one.alpha), np.int32(one.max_tokens)

    def _asked(self, prompts: ShardedBatch) -> list[Any]:
        numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32)]
        return [prompts.abstract, jax.ShapeDtypeStruct((prompts.size, self._max_length), jnp.int32), *numbers]

    def _shapes(self, rows: int) -> SearchState:
        """Returns the shapes of as many searches, with room for the longest prompt."""
        bucket = len(self._buckets.shapes) - 1
        prompts = prompt_batch(self._session.sharded, rows, self._buckets.largest["inputs"])
        begun = functools.partial(self._begun, bucket)
        found: SearchState = jax.eval_shape(begun, self._session.params, *self._asked(prompts)[:2])
        return found

    def _begun(self, bucket: int, params: Params, batch: Batch, forced: jax.Array) -> SearchState:
        """Reads prompts that are padded as `bucket` says; what a row has of its own is as long as in `_whole`."""
        missing = self._buckets.largest["inputs"] - self._buckets.shapes[bucket]["inputs"]
        spare = 0 if self._session.row_format.has_encoder else missing
        ids = jnp.zeros(forced.shape[0], jnp.int32)
        return self._how.begin(self._model, params, batch, self._max_length, ids, forced, spare)

    def _without_searches(self, params: Params, batch: Batch, forced: jax.Array, *_: jax.Array) -> SearchState:
        at = self._begun(0, params, batch, forced)
        padded = jax.tree.map(lambda x, whole: _padded(x, whole.shape), at, self._whole)
        return padded._replace(open=jnp.zeros_like(at.open))

    def _admitted(
        self,
        bucket: int,
        params: Params,
        batch: Batch,
        forced: jax.Array,
        slot: jax.Array,
        num_beams: jax.Array,
        alpha: jax.Array,
        limit: jax.Array,
        at: SearchState,
        cache: Cache,
    ) -> SearchState:
        one = self._begun(bucket, params, batch, forced)
        one = one._replace(
            num_beams=jnp.full_like(one.num_beams, num_beams),
            alpha=jnp.full_like(one.alpha, alpha),
            limit=jnp.full_like(one.limit, limit),
        )

        def put(whole: jax.Array, one: jax.Array, axis: int) -> jax.Array:
            # A slot has several rows of some leaves. As entry 1 of an axis of slots it goes where it belongs on devices
            # that share the slots, and they exchange nothing.
            rows = whole.shape[axis] // self._num_slots
            first = jax.lax.slice_in_dim(one, 0, rows, axis=axis)
            shape = (*whole.shape[:axis], rows, *whole.shape[axis + 1 :])
            by_slot = whole.reshape(*whole.shape[:axis], self._num_slots, *shape[axis:])
            new = jnp.expand_dims(_padded(first, shape), axis)
            return jax.lax.dynamic_update_slice_in_dim(by_slot, new, slot, axis).reshape(whole.shape)

        return jax.tree.map(put, at._replace(cache=cache), one, self._axes)

    def _compile(
        self, function: Callable[..., SearchState], prompts: ShardedBatch | None = None, searches: bool = True
    ) -> jax.stages.Compiled:
        """Compiles a function of parameters, of `_given` where it reads `prompts`, and of searches and their cache."""
        sharded, replicated = self._session.sharded, self._session.sharded.partitioner.replicated
        arguments: list[Any] = [self._session.params]
        shardings: list[Any] = [sharded.param_shardings]
        if prompts is not None:
            asked = self._asked(prompts)
            arguments += asked
            shardings += [prompts.shardings, *[replicated] * (len(asked) - 1)]
        if searches:
            arguments += [self._whole._replace(cache=None), self._whole.cache]
            shardings += [self._shardings._replace(cache=None), self._shardings.cache]
        return sharded.partitioner.compile(
            function,
            *arguments,
            in_shardings=tuple(shardings),
            out_shardings=self._shardings if searches else None,
            donate=(len(arguments) - 1,) if searches else (),
        )


def _fewest_rows(partitioner: Partitioner) -> int:
    """Returns the fewest examples that the devices can share, wherever a layout cuts a batch."""
    sizes = partitioner.mesh.shape
    return math.lcm(
        *(
            math.prod(sizes[axis] for axis in rules.axes_of(name))
            for rules in (partitioner.activation_rules, partitioner.prefill_rules)
            for name in ("batch", "attention_batch")
        )
    )


def _row_axis(small: jax.ShapeDtypeStruct, double: jax.ShapeDtypeStruct) -> int:
    """Returns which axis of an array is that of rows, by its shapes for some rows and for twice as many."""
    differ = [axis for axis, (one, two) in enumerate(zip(small.shape, double.shape, strict=True)) if one != two]
    if len(differ) != 1:
        raise UserError(
            f"the model's cache has an array of shape {small.shape} that is not one of rows: its requests cannot come "
            "and go by themselves"
        )
    return differ[0]


def _padded(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns x with zeros at the ends of its axes, up to `shape`."""
    return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])


def _hypotheses_of(found: Decoded, slot: int) -> list[Hypothesis]:
    """Returns the hypotheses of a slot, the best first."""
    made = []
    for place in best_first(np.asarray(found.scores[slot])):
        count = int(found.lengths[slot, place])
        tokens, log_probs = found.tokens[slot, place, :count], found.log_probs[slot, place, :count]
        made.append(Hypothesis(tokens.tolist(), log_probs.tolist(), float(found.scores[slot, place])))
    return made
