"""Decoding one token at a time from the host: two compiled programs, of which the second consumes the cache it is given
and returns it in the same memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.rows import RowFormat
from meshway.framework.inference.sampling import Drawing, Sampling
from meshway.framework.interfaces import Cache, Params
from meshway.framework.partitioning.placed_model import PlacedBatch, PlacedModel


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
        sampling: Sampling = Sampling(temperature=0.0),
        stop: Stop = Stop(()),
        params: Params | None = None,
    ):
        """Args:
          placed: the model on its mesh.
          prompts: what is read (`prompt_batch`).
          max_length: for how many new tokens the cache has room; more would be lost without a word.
          sampling, stop: how tokens are drawn, and what ends a prediction; by default greedily, and nothing.
          params: real or abstract parameters, where their dtypes are not those of `model.init`.

        Raises:
          UserError: the model refuses these lengths, or an array does not fit the layout.
        """
        self._model, self._sampling, self._stop, self._partitioner = placed.model, sampling, stop, placed.partitioner
        self._params = placed.abstract_params if params is None else params
        partitioner, key = placed.partitioner, jax.eval_shape(lambda: jax.random.key(0))
        given = (prompts.abstract, jax.ShapeDtypeStruct((prompts.size,), np.int32), key)

        def prefill(params: Params, batch: dict[str, jax.Array], ids: jax.Array, key: jax.Array) -> Drawing:
            return sampling.begin(placed.model, params, batch, max_length, ids, key)

        try:
            with partitioner.activate():
                self.shapes: Drawing = jax.eval_shape(prefill, self._params, *given)
        except ValueError as error:
            raise UserError(f"{type(placed.model).__name__}: {error}") from error
        self._prefill = partitioner.compile(
            prefill,
            self._params,
            *given,
            in_shardings=(placed.param_shardings, prompts.shardings, partitioner.replicated, partitioner.replicated),
            out_shardings=None,  # the cache as the model constrains it
        )
        self.shardings: Any = self._prefill.output_shardings
        self._param_shardings = placed.param_shardings
        self._step = self._compile(self._once)

    def prefill(self, params: Params, batch: dict[str, jax.Array], ids: np.ndarray, key: jax.Array) -> Drawing:
        """Reads prompts, which `prompts.put` has placed, and returns what the first step starts from.

        Args:
          params, batch: parameters and prompts.
          ids: int32 [batch], what tells examples apart.
          key: the seed.
        """
        return self._prefill(params, batch, ids, key)

    def step(self, params: Params, at: Drawing) -> Drawing:
        """Feeds a token of each row and returns what the next step starts from: its tokens are those just predicted.

        `at.cache` is consumed, the rest stays. The call returns before the device is done: read the tokens of one step
        after asking for the next, and the host costs no time.
        """
        return self._step(params, at._replace(cache=None), at.cache)

    def compile_loop(self, count: int) -> Callable[[Params, Drawing], Drawing]:
        """Returns `count` steps as one program, in which the host takes no part; it consumes the cache too."""

        def loop(params: Params, at: Drawing, cache: Cache) -> Drawing:
            whole = at._replace(cache=cache)
            return jax.lax.fori_loop(
                0, count, lambda _, at: self._sampling.step(self._model, params, self._stop, at), whole
            )

        compiled = self._compile(loop)
        return lambda params, at: compiled(params, at._replace(cache=None), at.cache)

    def memory(self) -> Any:
        """Returns what the compiler says of a step's memory: `temp_size_in_bytes`, `alias_size_in_bytes` and others."""
        return self._step.memory_analysis()

    def _once(self, params: Params, at: Drawing, cache: Cache) -> Drawing:
        return self._sampling.step(self._model, params, self._stop, at._replace(cache=cache))

    def _compile(self, function: Callable[..., Drawing]) -> jax.stages.Compiled:
        return self._partitioner.compile(
            function,
            self._params,
            self.shapes._replace(cache=None),
            self.shapes.cache,
            in_shardings=(self._param_shardings, self.shardings._replace(cache=None), self.shardings.cache),
            out_shardings=self.shardings,
            donate=(2,),
        )
