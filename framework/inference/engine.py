"""Parameters on a mesh, ready to predict and to score: one compiled program for each shape of a batch.

`TokenSteps` decodes token by token: a step consumes the cache and returns it in the same memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import FREE, Decoded, Decoder, Stop, decoding_model
from meshway.framework.inference.rows import RowFormat, Tokens
from meshway.framework.inference.sampling import DecodeState, Sampling
from meshway.framework.interfaces import Batch, Cache, Decodes, Params
from meshway.framework.partitioning.sharded_model import ProgramCache, ShardedBatch, ShardedModel

SCORE_INSTEAD = "it may score given targets (--mode=score)"


def prompt_batch(sharded: ShardedModel, batch_size: int, length: int) -> ShardedBatch:
    """Returns what `TokenSteps.prefill` reads: prompts of up to `length` tokens, as `RowFormat` makes them.

    Raises:
      UserError: the model does not predict text, or the batch size is not divisible over the mesh.
    """
    rows = RowFormat.of(sharded.model)
    lengths = {"inputs": length, "targets": 1} if rows.has_encoder else {"inputs": 0, "targets": length}
    whole = sharded.batch(batch_size, lengths)
    names = rows.prompts([], length)
    return dataclasses.replace(
        whole,
        spec={name: whole.spec[name] for name in names},
        shardings={name: whole.shardings[name] for name in names},
    )


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch to predict.

    Attributes:
      batch: examples.
      prompt, new_tokens: the most of each.
      decoder: how.
    """

    batch: int
    prompt: int
    new_tokens: int
    decoder: Decoder = Sampling(temperature=0.0)

    @property
    def decodes(self) -> int:
        """Rows that are decoded of each example: beams, or predictions."""
        return int(getattr(self.decoder, "num_beams", getattr(self.decoder, "num_decodes", 1)))


def trace_decoding(sharded: ShardedModel, work: Workload) -> Cache:
    """Traces the prediction of a batch and compiles nothing; returns the cache after the prompts, as shapes.

    Raises:
      UserError: the model does not decode, or it, the batch or an array does not fit the layout.
    """
    model = decoding_model(sharded.model, SCORE_INSTEAD)
    prompts, _ = prompt_batch(sharded, work.batch, work.prompt), sharded.param_shardings
    ids, key = jax.ShapeDtypeStruct((work.batch,), np.int32), jax.eval_shape(lambda: jax.random.key(0))

    def predict(params: Params, batch: Batch, ids: jax.Array, key: jax.Array) -> tuple[Decoded, Cache]:
        _, _, cache = model.prefill(params, batch, work.new_tokens)
        return work.decoder(model, params, batch, work.new_tokens, Stop(()), ids, key), cache

    try:
        with sharded.partitioner.activate():
            _, cache = jax.eval_shape(predict, sharded.param_shapes, prompts.abstract, ids, key)
    except ValueError as error:
        raise UserError(f"{type(sharded.model).__name__}: {error}") from error
    return cache


def compile_score(sharded: ShardedModel, batch: ShardedBatch) -> jax.stages.Compiled:
    """Compiles the scoring of the targets of a batch.

    Raises:
      UserError: the model or the batch does not fit the layout.
    """
    try:
        return sharded.partitioner.compile(
            sharded.model.score,
            sharded.param_shapes,
            batch.abstract,
            in_shardings=(sharded.param_shardings, batch.shardings),
            out_shardings=sharded.partitioner.replicated,
        )
    except ValueError as error:
        raise UserError(f"{type(sharded.model).__name__}, score: {error}") from error


class TokenSteps:
    """The programs of one shape: `prefill` reads prompts, `step` adds a token to each row.

    Everything is compiled by the constructor; calls compile nothing. The cache is sharded as the layout shards keys and
    values.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        prompts: ShardedBatch,
        max_length: int,
        sampling: Sampling = Sampling(temperature=0.0),
        stop: Stop = Stop(()),
        params: Params | None = None,
    ):
        """Args:
          sharded: the model on its mesh.
          prompts: what is read (`prompt_batch`).
          max_length: how many new tokens the cache has room for; further ones would be lost silently.
          sampling, stop: how tokens are drawn, and what ends a prediction; by default greedily, and nothing.
          params: real or abstract parameters, if their dtypes differ from those of `model.init`.

        Raises:
          UserError: the model refuses these lengths, or an array does not fit the layout.
        """
        model = decoding_model(sharded.model, SCORE_INSTEAD)
        self._model, self._sampling, self._stop, self._partitioner = model, sampling, stop, sharded.partitioner
        self._params = sharded.abstract_params if params is None else params
        partitioner, key = sharded.partitioner, jax.eval_shape(lambda: jax.random.key(0))
        given = (prompts.abstract, jax.ShapeDtypeStruct((prompts.size,), np.int32), key)

        def prefill(params: Params, batch: dict[str, jax.Array], ids: jax.Array, key: jax.Array) -> DecodeState:
            return sampling.begin(model, params, batch, max_length, ids, key)

        try:
            with partitioner.activate():
                self.shapes: DecodeState = jax.eval_shape(prefill, self._params, *given)
        except ValueError as error:
            raise UserError(f"{type(sharded.model).__name__}: {error}") from error
        self._prefill = partitioner.compile(
            prefill,
            self._params,
            *given,
            in_shardings=(sharded.param_shardings, prompts.shardings, partitioner.replicated, partitioner.replicated),
            out_shardings=None,  # the cache is sharded by the model's own constraints
        )
        self.shardings: Any = self._prefill.output_shardings
        self._param_shardings = sharded.param_shardings
        self._step = self._compile(self._once)

    def prefill(self, params: Params, batch: dict[str, jax.Array], ids: np.ndarray, key: jax.Array) -> DecodeState:
        """Reads prompts, sharded by `prompts.shard`, and returns the state that the first step starts from.

        Args:
          params, batch: parameters and prompts.
          ids: int32 [batch], a number for each example.
          key: the seed.
        """
        return self._prefill(params, batch, ids, key)

    def step(self, params: Params, at: DecodeState) -> DecodeState:
        """Feeds a token of each row and returns the state of the next step, whose `tokens` are those just predicted.

        `at.cache` is consumed, the rest of `at` stays valid. The call returns before the device is done: read the
        tokens of one step after starting the next, so that the device never waits for the host.
        """
        return self._step(params, at._replace(cache=None), at.cache)

    def compile_loop(self, count: int) -> Callable[[Params, DecodeState], DecodeState]:
        """Returns `count` steps as one program, a loop on the device; it consumes the cache too."""

        def loop(params: Params, at: DecodeState, cache: Cache) -> DecodeState:
            whole = at._replace(cache=cache)
            return jax.lax.fori_loop(
                0, count, lambda _, at: self._sampling.step(self._model, params, self._stop, at), whole
            )

        compiled = self._compile(loop)
        return lambda params, at: compiled(params, at._replace(cache=None), at.cache)

    def memory(self) -> Any:
        """Returns the compiler's memory analysis of a step: `temp_size_in_bytes`, `alias_size_in_bytes` and others."""
        return self._step.memory_analysis()

    def texts(self) -> dict[str, str]:
        """Returns the optimised HLO of both programs, "prefill" and "decode"; the latter is given up `cache`."""
        return {"prefill": self._prefill.as_text() or "", "decode": self._step.as_text() or ""}

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


class Engine:
    """Computes batches of `batch_size` rows over all processes; rows without an example repeat the last one.

    For batches of one shape, a row's results depend neither on its place nor on the other rows. All processes call the
    same methods with the same examples, and each gets all results.

    Attributes:
      sharded: the model on the mesh.
      format: how it reads text.
      batch_size: rows of a batch.
      params: the parameters; others of the same shapes and shardings may take their place, and programs stay.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        params: Params,
        row_format: RowFormat,
        decoder: Decoder,
        stop: Stop,
        batch_size: int,
        seed: int = 0,
    ):
        """Raises UserError if `batch_size` is below 1 or not divisible over the mesh."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        self.sharded, self.format, self.batch_size = sharded, row_format, batch_size
        self.params, self._decoder, self._stop = params, decoder, stop
        self._key = jax.random.key(seed)
        self._programs = ProgramCache(sharded, batch_size)

    @property
    def num_compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._programs.count

    def predict(
        self, inputs: Sequence[Tokens], ids: Sequence[int], length: int, max_length: int, forced: Sequence[Tokens] = ()
    ) -> Decoded:
        """Starts predictions for at most `batch_size` examples; the arrays it returns may still be being computed.

        Args:
          inputs: token ids of each example.
          ids: a number that is each example's own: its randomness depends on that and the seed alone.
          length: tokens that prompts are padded to.
          max_length: maximal tokens of a prediction.
          forced: tokens that each example's prediction begins with; () for none.

        Raises:
          UserError: the model does not decode, or not in these lengths.
        """
        model, decoder, stop = self._model, self._decoder, self._stop
        batch = self.format.prompts(self._filled(inputs), length)
        begun = np.full((self.batch_size, max_length if forced else 0), FREE, np.int32)
        for row, tokens in zip(begun, self._filled(forced) if forced else ()):
            row[: len(tokens)] = tokens[:max_length]

        def predict(params: Params, batch: Batch, ids: jax.Array, forced: jax.Array, key: jax.Array) -> Decoded:
            return decoder(model, params, batch, max_length, stop, ids, key, forced if forced.shape[1] else None)

        others = (self._numbers(ids), begun, self._key)
        return self._programs.run("predict", predict, self.params, batch, *others, static=max_length)

    def stream(self, inputs: Tokens, id: int, length: int, max_length: int) -> Iterator[int]:
        """Yields the tokens of one example's prediction as they are drawn, the same as `predict` returns together.

        Raises:
          UserError: the decoder does not draw token by token, or the model does not decode.
        """
        decoder = self._decoder
        if not isinstance(decoder, Sampling) or decoder.num_decodes != 1:
            raise UserError(f"{decoder} cannot stream: only Sampling of one decode makes a token at a time")

        def compiled() -> tuple[ShardedBatch, TokenSteps]:
            prompts = prompt_batch(self.sharded, self.batch_size, length)
            return prompts, TokenSteps(self.sharded, prompts, max_length, decoder, self._stop, self.params)

        prompts, steps = self._programs.get(("stream", length, max_length), compiled)
        batch = prompts.shard(self._programs.own_rows(self.format.prompts(self._filled([inputs]), length)))
        at, before = steps.prefill(self.params, batch, self._numbers([id]), self._key), None
        for _ in range(max_length):
            at = steps.step(self.params, at)
            if before is not None:  # read while the device computes the next
                yield int(before.tokens[0, 0])
                if before.done[0]:
                    return
            before = at
        yield int(at.tokens[0, 0])

    def score(self, inputs: Sequence[Tokens], targets: Sequence[Tokens], lengths: Mapping[str, int]) -> jax.Array:
        """Starts scoring; returns the log-probability at each position of each row, float32 [batch_size, length], in
        which `RowFormat.of_targets` finds those of the targets."""
        batch = self.format.scored(self._filled(inputs), self._filled(targets), lengths)
        return self._programs.run("score", self.sharded.model.score, self.params, batch)

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
        asked = tuple(sorted(names))
        observe = functools.partial(self.sharded.model.observe, names=asked)
        return self._programs.run("observe", observe, self.params, batch, static=asked)

    @functools.cached_property
    def _model(self) -> Decodes:
        return decoding_model(self.sharded.model, SCORE_INSTEAD)

    def _numbers(self, ids: Sequence[int]) -> np.ndarray:
        """Returns ids as int32 [batch_size]; those above 2**32 wrap around."""
        return np.array(self._filled(ids), np.int64).astype(np.uint32).astype(np.int32)

    def _filled(self, rows: Sequence[Any]) -> list[Any]:
        """Returns `batch_size` rows, the last one repeated: it stops decoding when the row that it repeats does."""
        if not 0 < len(rows) <= self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} rows cannot hold {len(rows)} examples")
        return [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
