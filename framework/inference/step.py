"""Decoding one token at a time from the host: two compiled programs, of which the second consumes the cache it is given
and returns it in the same memory."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshway.framework.errors import UserError
from meshway.framework.inference.rows import RowFormat
from meshway.framework.interfaces import Cache, Params
from meshway.framework.partitioning.placed_model import PlacedBatch, PlacedModel

Choose = Callable[[jax.Array], jax.Array]  # logits [batch, vocab] -> int32 [batch]


class Next(NamedTuple):
    """What decoding goes on from: what is fed next, tokens [batch, 1] at positions [batch], and the cache. A step
    consumes the cache; tokens and positions stay."""

    tokens: jax.Array
    positions: jax.Array
    cache: Cache


def likeliest(logits: jax.Array) -> jax.Array:
    """Returns the likeliest token of each row: greedy search."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def prompt_batch(placed: PlacedModel, batch_size: int, length: int) -> PlacedBatch:
    """Returns what `TokenSteps.prefill` reads: prompts of up to `length` tokens, as `RowFormat` makes them.

    Raises:
      UserError: the model does not predict text, or the batch does not divide over the mesh.
    """
    rows = RowFormat.of(placed.model)
    lengths = {"inputs": length, "targets": 1} if rows.has_encoder else {"inputs": 0, "targets": length}
    whole = placed.batch(batch_size, lengths)
    names = rows.prompts([], length)
    return dataclasses.replace(
        whole,
        spec={name: whole.spec[name] for name in names},
        shardings={name: whole.shardings[name] for name in names},
    )


class TokenSteps:
    """The programs of one shape: `prefill` reads prompts, `step` adds a token to each row.

    Everything is compiled here: calls compile nothing. The cache lies as the layout puts keys and values.
    """

    def __init__(
        self,
        placed: PlacedModel,
        prompts: PlacedBatch,
        max_length: int,
        choose: Choose = likeliest,
        params: Params | None = None,
    ):
        """Args:
          placed: the model on its mesh.
          prompts: what is read (`prompt_batch`).
          max_length: for how many new tokens the cache has room; more would be lost without a word.
          choose: picks the next tokens by their logits.
          params: real or abstract parameters, where their dtypes are not those of `model.init`.

        Raises:
          UserError: the model refuses these lengths, or an array does not fit the layout.
        """
        self._model, self._choose, self._partitioner = placed.model, choose, placed.partitioner
        given = placed.param_shapes if params is None else params
        self._params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
        partitioner, batch = placed.partitioner, prompts.abstract

        def prefill(params: Params, batch: dict[str, jax.Array]) -> Next:
            return Next(*placed.model.prefill(params, batch, max_length))

        try:
            with partitioner.activate():
                self.shapes: Next = jax.eval_shape(prefill, self._params, batch)
        except ValueError as error:
            raise UserError(f"{type(placed.model).__name__}: {error}") from error
        tokens: Any = partitioner.sharding(("batch", None), self.shapes.tokens.shape)
        positions: Any = partitioner.sharding(("batch",), self.shapes.positions.shape)
        self._prefill = partitioner.compile(
            prefill,
            self._params,
            batch,
            in_shardings=(placed.param_shardings, prompts.shardings),
            out_shardings=Next(tokens, positions, None),  # the cache as the model constrains it
        )
        lies: Any = self._prefill.output_shardings
        self.shardings: Next = lies
        self._param_shardings = placed.param_shardings
        self._step = self._compile(self._once)

    def prefill(self, params: Params, batch: dict[str, jax.Array]) -> Next:
        """Reads prompts, which `prompts.put` has placed, and returns what the first step starts from."""
        return self._prefill(params, batch)

    def step(self, params: Params, at: Next) -> Next:
        """Feeds a token of each row and returns what the next step starts from: its tokens are those just predicted.

        `at.cache` is consumed. The call returns before the device is done: read the tokens of one step after asking for
        the next, and the host costs no time.
        """
        return self._step(params, *at)

    def compile_loop(self, count: int) -> Callable[[Params, Next], Next]:
        """Returns `count` steps as one program, in which the host takes no part; it consumes the cache too."""

        def loop(params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> Next:
            return jax.lax.fori_loop(0, count, lambda _, at: self._once(params, *at), Next(tokens, positions, cache))

        compiled = self._compile(loop)
        return lambda params, at: compiled(params, *at)

    def memory(self) -> Any:
        """Returns what the compiler says of a step's memory: `temp_size_in_bytes`, `alias_size_in_bytes` and others."""
        return self._step.memory_analysis()

    def _once(self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> Next:
        logits, cache = self._model.decode(params, tokens, positions, cache)
        return Next(self._choose(logits)[:, None], positions + 1, cache)

    def _compile(self, function: Callable[..., Next]) -> jax.stages.Compiled:
        return self._partitioner.compile(
            function,
            self._params,
            *self.shapes,
            in_shardings=(self._param_shardings, *self.shardings),
            out_shardings=self.shardings,
            donate=(3,),
        )
