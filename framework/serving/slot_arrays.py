"""Slots on the devices: a cache with a row for each, and the programs that read prompts and make steps in its place."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import FREE, decoding_model
from meshway.framework.inference.engine import SCORE_INSTEAD, prompt_batch
from meshway.framework.inference.predictor import Session
from meshway.framework.inference.rows import Buckets, doubling
from meshway.framework.inference.sampling import largest
from meshway.framework.interfaces import Cache
from meshway.framework.partitioning.mesh import free_memory
from meshway.framework.partitioning.sharded_model import ShardedBatch
from meshway.framework.serving.drawing import Choice, Chosen, Logits, Turn, asked, begun, chooser, undrawn
from meshway.framework.serving.generation import Generation
from meshway.framework.terminal import format_bytes


class SlotArrays:
    """The arrays of `num_slots` slots, and the programs over them, which `compile` makes.

    A prompt of a decoder is read in chunks by models that have `Extends`, else, and for an encoder, in one piece,
    padded to a bucket. Every model is taken to begin as those of `objectives` do: by the last token of the prompt at
    its place, which chunks leave out, or, behind an encoder, by the start token at 0. What is fed at a place changes
    nothing that those before it see: slots that take no part in a step are fed at their last place.

    Attributes:
      vocab: how many logits there are.
      max_top: how many of the likeliest tokens a step can tell.
      buckets: of prompts that are read in one piece; None where they are read in chunks.
    """

    def __init__(
        self,
        session: Session,
        num_slots: int,
        max_length: int,
        max_input_length: int,
        chunk: int,
        max_top: int,
        kept_rows: int,
        width: int,
    ):
        """`SlotPool` documents the arguments, where `kept_rows` are `kept_prompts`, and `width` is one more than
        `guesses`; it raises what this does."""
        self._params, self._format, self._sharded = session.params, session.row_format, session.sharded
        self._partitioner = session.sharded.partitioner
        self._model: Any = decoding_model(session.sharded.model, SCORE_INSTEAD)
        self._num_slots, self._length, self._chunk, self._width = num_slots, max_length, chunk, width
        if width > 1 and not hasattr(self._model, "extend"):
            raise UserError(
                f"{type(self._model).__name__} reads one token at a time (it has no method extend, see Extends in "
                "framework/interfaces.py), so guesses cannot be verified together: leave them out (guesses=0)"
            )
        chunks = not (self._format.has_encoder or self._format.has_prefix) and hasattr(self._model, "extend")
        longest = max_input_length if self._format.has_encoder else max_length - 1
        self.buckets: Buckets | None = None if chunks else doubling({"inputs": longest})
        self._longest = 1 if chunks else longest
        self._rows, self._row = self._least_rows()
        shapes = self._prefilled(num_slots)
        self._pieces: dict[int, tuple[ShardedBatch, jax.stages.Compiled]] = {}
        self._row_axes = jax.tree.map(_first_difference, self._row, self._prefilled(self._rows + num_slots))
        self._row = jax.tree.map(_placed, self._row, self._cache_shardings())
        self._shapes = jax.tree.map(lambda leaf, row: _placed(leaf, row.sharding), shapes, self._row)
        tokens = jax.ShapeDtypeStruct((num_slots, 1), np.int32)
        with self._partitioner.activate():
            logits = jax.eval_shape(self._model.decode, self._params, tokens, _ints(num_slots), self._shapes)[0]
        self.vocab: int = logits.shape[-1]
        self.max_top = min(max_top, self.vocab)
        self._check_room(kept_rows)

    def compile(self) -> None:
        """Compiles all programs, and clears all slots.

        Raises:
          UserError: the model does not fit the layout.
        """
        count, vocab = self._num_slots, self.vocab
        cache, replicated = self._shapes, self._partitioner.replicated
        shardings = jax.tree.map(lambda leaf: leaf.sharding, cache)
        drawing = jax.eval_shape(lambda: undrawn(count, vocab))
        tokens, slot, turn = _ints(count), _ints(), Turn.idle(count, self._width, 0)
        logits = jax.eval_shape(Logits.of, jax.ShapeDtypeStruct((count, self._width, vocab), np.float32))
        if self.buckets is None:
            rows = _ints(self._rows, self._chunk)
            self._extend = self._compiled(
                self._extended, shardings, 1, self._params, cache, slot, jax.ShapeDtypeStruct((), bool), rows, rows
            )
        else:
            for shape in self.buckets.shapes:
                self._piece(shape["inputs"], shardings)
        row = self._row
        if self.buckets is None:
            row = jax.tree.map(self._one_row, cache, self._row_axes)
            self._copy = self._compiled(self._copied, jax.tree.map(lambda x: x.sharding, row), None, cache, slot)
        self._insert = self._compiled(self._inserted, shardings, 0, cache, slot, row)
        self._feed = self._compiled(self._fed, (replicated, shardings), 1, self._params, cache, tokens, turn)
        self._begin = self._compiled(begun, replicated, 0, drawing, slot, *asked(Generation((), 0), (), vocab))
        self._choose = {}
        for choice in Choice:
            masks = [jax.ShapeDtypeStruct((count, vocab), bool)] if choice == Choice.MASKED else []
            self._choose[choice] = self._compiled(chooser(choice), replicated, 0, drawing, logits, tokens, turn, *masks)
        self._likeliest = self._compiled(self._top, replicated, None, logits)
        empty = self._compiled(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache), shardings)
        self._cache: Cache = empty()
        start = self._compiled(lambda: (undrawn(count, vocab), jnp.zeros(count, jnp.int32)), replicated)
        self._drawing, self._tokens = start()

    def begin(self, slot: int, generation: Generation, prompted: Sequence[int]) -> None:
        """Says how a slot draws; `prompted` are the tokens that a repetition penalty counts as seen."""
        self._drawing = self._begin(self._drawing, np.int32(slot), *asked(generation, prompted, self.vocab))

    def read_chunk(self, slot: int, tokens: Sequence[int], start: int) -> None:
        """Reads at most `chunk` tokens of a slot's prompt, at positions `start` and on; those from 0 clear it first."""
        padding = self._chunk - len(tokens)
        # Padding is written at the last place of the cache, which nothing sees before it is written anew.
        places = [*range(start, start + len(tokens)), *[self._length - 1] * padding]
        rows = (np.tile(np.array(each, np.int32), (self._rows, 1)) for each in ([*tokens, *[0] * padding], places))
        self._cache = self._extend(self._params, self._cache, np.int32(slot), np.bool_(start == 0), *rows)

    def read_piece(self, slot: int, inputs: Sequence[int]) -> None:
        """Reads a slot's whole prompt, which fits into the largest bucket."""
        assert self.buckets is not None
        size = self._format.prompt_size(inputs)
        length = next(shape["inputs"] for shape in self.buckets.shapes if size <= shape["inputs"])
        prompts, program = self._pieces[length]
        rows = self._format.prompts([inputs] * self._rows, length)
        self.put_row(slot, program(self._params, prompts.shard(rows)))

    def copy_row(self, slot: int) -> Cache:
        """Returns a copy of a slot's cache, where prompts are read in chunks."""
        return self._copy(self._cache, np.int32(slot))

    def put_row(self, slot: int, row: Cache) -> None:
        """Puts a copied cache into a slot."""
        self._cache = self._insert(self._cache, np.int32(slot), row)

    def step(self, turn: Turn, choice: Choice, mask: np.ndarray | None, top: bool) -> Chosen:
        """Starts a step of the slots that are active in it: feeds their tokens and chooses the next.

        Args:
          turn: what is done in each slot.
          choice: at least what every active slot needs.
          mask: bool [slots, vocab], the tokens that may be chosen; of MASKED alone.
          top: whether to tell the likeliest tokens.
        """
        logits, self._cache = self._feed(self._params, self._cache, self._tokens, turn)
        masks = () if mask is None else (mask,)
        self._drawing, self._tokens, made = self._choose[choice](self._drawing, logits, self._tokens, turn, *masks)
        tokens, log_probs, counts = made
        return Chosen(tokens, log_probs, counts, self._likeliest(logits) if top else None)

    def memory(self) -> Any:
        """Returns the compiler's memory analysis of the program that feeds tokens, as `TokenSteps.memory`."""
        return self._feed.memory_analysis()

    def _least_rows(self) -> tuple[int, Cache]:
        """Returns the fewest rows of a batch that the layout takes, and their cache as shapes."""
        size = self._partitioner.mesh.size
        for rows in range(1, size + 1):
            try:
                return rows, self._prefilled(rows)
            except UserError:
                if rows == size:
                    raise
        raise AssertionError

    def _prefilled(self, rows: int) -> Cache:
        """Returns the shapes of a cache of so many rows, as a slot has it."""
        prompts = prompt_batch(self._sharded, rows, self._longest)
        try:
            with self._partitioner.activate():
                return jax.eval_shape(self._reader(self._longest), self._params, prompts.abstract)
        except ValueError as error:
            raise UserError(f"{type(self._model).__name__}: {error}") from error

    def _reader(self, length: int) -> Callable[[Any, Any], Cache]:
        room = self._length if self._format.has_encoder else self._length - length
        return lambda params, batch: self._model.prefill(params, batch, room)[2]

    def _piece(self, length: int, out_shardings: Any) -> jax.stages.Compiled:
        """Returns the program that reads prompts of `length` tokens, padded; it is compiled once."""
        if length not in self._pieces:
            prompts, read = prompt_batch(self._sharded, self._rows, length), self._reader(length)

            def padded(x: jax.Array, slot: jax.ShapeDtypeStruct) -> jax.Array:
                return jnp.pad(x, [(0, size - own) for size, own in zip(slot.shape, x.shape, strict=True)])

            program = self._partitioner.compile(
                lambda params, batch: jax.tree.map(padded, read(params, batch), self._row),
                self._params,
                prompts.abstract,
                in_shardings=(self._sharded.param_shardings, prompts.shardings),
                out_shardings=out_shardings,
            )
            self._pieces[length] = prompts, program
        return self._pieces[length][1]

    def _cache_shardings(self) -> Cache:
        """Returns the shardings of the cache: those of the model's own constraints, as a compiled program has them."""
        if self._partitioner.mesh.size == 1:
            return jax.tree.map(lambda _: self._partitioner.replicated, self._row)
        return self._piece(self._longest, None).output_shardings

    def _compiled(
        self, function: Callable[..., Any], out_shardings: Any, donated: int | None = None, *arguments: Any
    ) -> jax.stages.Compiled:
        """Compiles a function of arguments that are sharded as they say, or else replicated."""
        replicated = self._partitioner.replicated
        placed = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or replicated, arguments)
        try:
            return self._partitioner.compile(
                function,
                *arguments,
                in_shardings=placed,
                out_shardings=out_shardings,
                donate=() if donated is None else (donated,),
            )
        except ValueError as error:
            raise UserError(f"{type(self._model).__name__}: {error}") from error

    def _extended(
        self, params: Any, cache: Cache, slot: jax.Array, clear: jax.Array, tokens: jax.Array, positions: jax.Array
    ) -> Cache:
        def row_of(x: jax.Array, axis: int) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis)
            return jnp.repeat(jnp.where(clear, jnp.zeros_like(own), own), self._rows, axis)

        row = jax.tree.map(row_of, cache, self._row_axes)
        return self._inserted(cache, slot, self._model.extend(params, tokens, positions, row)[1])

    def _inserted(self, cache: Cache, slot: jax.Array, row: Cache) -> Cache:
        """Returns the cache with the first row of another in a slot."""

        def put(x: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.slice_in_dim(new, 0, 1, axis=axis), slot, axis)

        return jax.tree.map(put, cache, row, self._row_axes)

    def _copied(self, cache: Cache, slot: jax.Array) -> Cache:
        return jax.tree.map(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis), cache, self._row_axes)

    def _one_row(self, leaf: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        """Returns what a copy of a slot's cache is: of one row, which no device can have a part of."""
        where: Any = leaf.sharding
        if self._partitioner.mesh.size > 1:
            spec = [None if dim == axis else axes for dim, axes in enumerate(where.spec)]
            where = NamedSharding(where.mesh, PartitionSpec(*spec))
        return _placed(jax.ShapeDtypeStruct((*leaf.shape[:axis], 1, *leaf.shape[axis + 1 :]), leaf.dtype), where)

    def _fed(self, params: Any, cache: Cache, tokens: jax.Array, turn: Turn) -> tuple[Logits, Cache]:
        fed = jnp.where(turn.fed == FREE, tokens[:, None], turn.fed)
        if self._width > 1:
            logits, cache = self._model.extend(params, fed, turn.positions, cache)
        else:
            logits, cache = self._model.decode(params, fed, turn.positions[:, 0], cache)
            logits = logits[:, None]
        return Logits.of(logits), cache

    def _top(self, logits: Logits) -> tuple[jax.Array, jax.Array]:
        def found(logits: Logits) -> tuple[jax.Array, jax.Array]:
            values, ids = largest(logits.values, self.max_top)
            return ids, logits.log_probs(values)

        return jax.tree.map(
            lambda *each: jnp.stack(each, axis=1),
            *[found(jax.tree.map(lambda x, place=place: x[:, place], logits)) for place in range(self._width)],
        )

    def _check_room(self, kept_rows: int) -> None:
        """Raises UserError where a device has no room for the arrays of all slots, and so many copied rows."""
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self._shapes))
        held += held * kept_rows // self._num_slots
        held += self._num_slots * self.vocab * 9  # `Drawing`
        room = free_memory(jax.local_devices()[0])
        if room is not None and held > room:
            raise UserError(
                f"{self._num_slots:,} slots of {self._length:,} tokens need {format_bytes(held)} of each device, which "
                f"has {format_bytes(room)} free: give fewer slots (--slots), or shorter ones (--max_length)"
            )


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_difference(one: jax.ShapeDtypeStruct, other: jax.ShapeDtypeStruct) -> int:
    """Returns the first dimension in which two shapes differ."""
    return next(dim for dim, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1])
