"""Parameters on a mesh, ready to predict and to score: one compiled program for each shape of a batch.

and returns it in the same memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import FREE, Decoded, Decoder, Stop
from meshway.framework.inference.rows import RowFormat, Tokens
from meshway.framework.inference.sampling import DecodeState, Sampling
from meshway.framework.interfaces import ArraySpec, Cache, Params
from meshway.framework.partitioning.sharded_model import PlacedBatch, ShardedModel
from meshway.framework.planning.hardware import free_memory
from meshway.framework.terminal import format_bytes


def prompt_batch(placed: ShardedModel, batch_size: int, length: int) -> PlacedBatch:
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
        placed: ShardedModel,
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

        def prefill(params: Params, batch: dict[str, jax.Array], ids: jax.Array, key: jax.Array) -> DecodeState:
            return sampling.begin(placed.model, params, batch, max_length, ids, key)

        try:
            with partitioner.activate():
                self.shapes: DecodeState = jax.eval_shape(prefill, self._params, *given)
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

    def prefill(self, params: Params, batch: dict[str, jax.Array], ids: np.ndarray, key: jax.Array) -> DecodeState:
        """Reads prompts, which `prompts.put` has placed, and returns what the first step starts from.

        Args:
          params, batch: parameters and prompts.
          ids: int32 [batch], what tells examples apart.
          key: the seed.
        """
        return self._prefill(params, batch, ids, key)

    def step(self, params: Params, at: DecodeState) -> DecodeState:
        """Feeds a token of each row and returns what the next step starts from: its tokens are those just predicted.

        `at.cache` is consumed, the rest stays. The call returns before the device is done: read the tokens of one step
        after asking for the next, and the host costs no time.
        """
        return self._step(params, at._replace(cache=None), at.cache)

    def compile_loop(self, count: int) -> Callable[[Params, DecodeState], DecodeState]:
        """Returns `count` steps as one program, in which the host takes no part; it consumes the cache too."""

        def loop(params: Params, at: DecodeState, cache: Cache) -> DecodeState:
            whole = at._replace(cache=cache)
            return jax.lax.fori_loop(
                0, count, lambda _, at: self._sampling.step(self._model, params, self._stop, at), whole
            )

        compiled = self._compile(loop)
        return lambda params, at: compiled(params, at._replace(cache=None), at.cache)

    def memory(self) -> Any:
        """Returns what the compiler says of a step's memory: `temp_size_in_bytes`, `alias_size_in_bytes` and others."""
        return self._step.memory_analysis()

    def _once(self, params: Params, at: DecodeState, cache: Cache) -> DecodeState:
        return self._sampling.step(self._model, params, self._stop, at._replace(cache=cache))

    def _compile(self, function: Callable[..., DecodeState]) -> jax.stages.Compiled:
        return self._partitioner.compile(
            function,
            self._params,
            self.shapes._replace(cache=None),
            self.shapes.cache,
            in_shardings=(self._param_shardings, self.shardings._replace(cache=None), self.shardings.cache),
            out_shardings=self.shardings,
            donate=(2,),
        )


Arrays = Mapping[str, np.ndarray]


class Engine:
    """Computes batches of `batch_size` rows, over all processes: rows without an example repeat the last one.

    In one shape of a batch a row's results depend neither on its place nor on the other rows. With several processes
    each calls the same methods with the same examples, and gets all results.

    Attributes:
      placed: the model on the mesh.
      format: how it reads text.
      batch_size: rows of a batch.
      num_compiled: programs that were compiled so far.
    """

    def __init__(
        self,
        placed: ShardedModel,
        params: Params,
        row_format: RowFormat,
        decoder: Decoder,
        stop: Stop,
        batch_size: int,
        seed: int = 0,
    ):
        """Raises UserError where `batch_size` is below 1 or does not divide over the mesh."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        self.placed, self.format, self.batch_size = placed, row_format, batch_size
        self.num_compiled = 0
        self._params, self._decoder, self._stop = params, decoder, stop
        self._key = jax.random.key(seed)
        self._rows = placed.partitioner.process_rows(batch_size)
        self._programs: dict[Any, Any] = {}

    def predict(
        self, inputs: Sequence[Tokens], ids: Sequence[int], length: int, max_length: int, forced: Sequence[Tokens] = ()
    ) -> Decoded:
        """Starts predicting of at most `batch_size` examples; what it returns may still be on its way.

        Args:
          inputs: token ids of each example.
          ids: a number that tells each example from all others: all its randomness hangs on it and the seed.
          length: what prompts are padded to, in tokens.
          max_length: the most tokens of a prediction.
          forced: tokens that each example's prediction begins with; () for none.
        """
        batch = self.format.prompts(self._filled(inputs), length)
        begun = np.full((self.batch_size, max_length if forced else 0), FREE, np.int32)
        for row, tokens in zip(begun, self._filled(forced) if forced else ()):
            row[: len(tokens)] = tokens[:max_length]
        program = self._compiled("predict", batch, (begun.shape[1], max_length))
        return program(self._params, self._put(batch), self._numbers(ids), begun, self._key)

    def stream(self, inputs: Tokens, id: int, length: int, max_length: int) -> Iterator[int]:
        """Yields the tokens of one example's prediction as they are drawn: those that `predict` returns at once.

        Raises:
          UserError: the decoder is none that draws token by token.
        """
        if not isinstance(self._decoder, Sampling) or self._decoder.num_decodes != 1:
            raise UserError(f"{self._decoder} cannot stream: only Sampling of one decode makes a token at a time")
        key = ("stream", length, max_length)
        if key not in self._programs:
            prompts = prompt_batch(self.placed, self.batch_size, length)
            steps = TokenSteps(self.placed, prompts, max_length, self._decoder, self._stop, self._params)
            self._programs[key] = steps
            self.num_compiled += 1
        batch = self._put(self.format.prompts(self._filled([inputs]), length))
        at, before = self._programs[key].prefill(self._params, batch, self._numbers([id]), self._key), None
        for _ in range(max_length):
            at = self._programs[key].step(self._params, at)
            if before is not None:  # read while the device is at the next
                yield int(before.tokens[0, 0])
                if before.done[0]:
                    return
            before = at
        yield int(at.tokens[0, 0])

    def score(self, inputs: Sequence[Tokens], targets: Sequence[Tokens], lengths: Mapping[str, int]) -> jax.Array:
        """Starts scoring; returns the log-probability of each place of each row, float32 [batch_size, length]:
        `RowFormat.of_targets` finds the targets in it."""
        batch = self.format.scored(self._filled(inputs), self._filled(targets), lengths)
        return self._compiled("score", batch)(self._params, self._put(batch))

    def observe(
        self,
        inputs: Sequence[Tokens],
        targets: Sequence[Tokens],
        lengths: Mapping[str, int],
        names: Collection[str],
    ) -> dict[str, jax.Array]:
        """Starts computing intermediate values by name, [batch_size, length, ...], where `targets` follow `inputs`.

        Raises:
          UserError: a name that the model does not know.
        """
        batch = self.format.scored(self._filled(inputs), self._filled(targets), lengths)
        return self._compiled("observe", batch, tuple(sorted(names)))(self._params, self._put(batch))

    def _numbers(self, ids: Sequence[int]) -> np.ndarray:
        """Returns ids as int32 [batch_size]; those of huge inputs wrap around."""
        return np.array(self._filled(ids), np.int64).astype(np.uint32).astype(np.int32)

    def _filled(self, rows: Sequence[Any]) -> list[Any]:
        """Returns `batch_size` rows: a repeated row ends when the one that it repeats does."""
        if not 0 < len(rows) <= self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} rows cannot hold {len(rows)} examples")
        return [*rows, *[rows[-1]] * (self.batch_size - len(rows))]

    def _put(self, batch: Arrays) -> dict[str, jax.Array]:
        mine = {name: rows[self._rows] for name, rows in batch.items()}
        return self.placed.partitioner.put_batch(mine, self._shardings(batch), self.batch_size)

    def _shardings(self, batch: Arrays) -> dict[str, Any]:
        spec = {name: ArraySpec(x.shape, x.dtype, ("batch", *[None] * (x.ndim - 1))) for name, x in batch.items()}
        return self.placed.partitioner.batch_shardings(spec)

    def _compiled(self, kind: str, batch: Arrays, static: tuple[Any, ...] = ()) -> Any:
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        key = (kind, static, tuple(sorted((name, x.shape) for name, x in batch.items())))
        if key not in self._programs:
            self._programs[key] = self._compile(kind, shapes, self._shardings(batch), static)
            self.num_compiled += 1
        return self._programs[key]

    def _compile(self, kind: str, shapes: Mapping[str, Any], shardings: Any, static: tuple[Any, ...]) -> Any:
        model, partitioner = self.placed.model, self.placed.partitioner
        function: Callable[..., Any] = model.score
        others: list[jax.ShapeDtypeStruct] = []
        if kind == "observe":
            function = functools.partial(model.observe, names=static)
        elif kind == "predict":
            num_forced, max_length = static
            others = [
                jax.ShapeDtypeStruct((self.batch_size,), np.int32),
                jax.ShapeDtypeStruct((self.batch_size, num_forced), np.int32),
                jax.ShapeDtypeStruct(self._key.shape, self._key.dtype),
            ]

            def function(params: Params, batch: Any, ids: jax.Array, forced: jax.Array, key: jax.Array) -> Decoded:
                begun = forced if num_forced else None
                return self._decoder(model, params, batch, max_length, self._stop, ids, key, begun)

        try:
            program = partitioner.compile(
                function,
                self.placed.param_shapes,
                dict(shapes),
                *others,
                in_shardings=(self.placed.param_shardings, shardings, *[partitioner.replicated] * len(others)),
                out_shardings=partitioner.replicated,
            )
        except ValueError as error:
            raise UserError(f"{type(model).__name__}, {kind}: {error}") from error
        self._check_room(program, kind)
        return program

    def _check_room(self, program: jax.stages.Compiled, kind: str) -> None:
        """Raises UserError where a device has no room for what a program makes: it would end the process."""
        try:
            memory: Any = program.memory_analysis()
            needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
        except (AttributeError, NotImplementedError, RuntimeError):  # XLA's own errors are RuntimeErrors
            return
        room = free_memory(jax.local_devices()[0])
        if room is not None and needed > room:
            decodes = f" with {self._decoder.num_decodes:,} predictions of each" if kind == "predict" else ""
            raise UserError(
                f"a batch of {self.batch_size:,} examples{decodes} needs {format_bytes(needed)} of each device, which "
                f"has {format_bytes(room)} free: give a smaller batch_size, or fewer predictions or tokens"
            )
