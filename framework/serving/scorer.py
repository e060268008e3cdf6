"""Log-probabilities of given texts, and texts as vectors: batches of few shapes, compiled once."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.inference.bulk.batches import Done, compute
from meshway.framework.inference.bulk.inputs import Example
from meshway.framework.inference.predictor import Session
from meshway.framework.inference.rows import Buckets, Tokens, doubling
from meshway.framework.interfaces import Batch, Params
from meshway.framework.partitioning.sharded_model import ProgramCache
from meshway.framework.serving.generation import Made

SMALLEST = 64  # tokens of the smallest batches: each shape is compiled before the server is ready
ANY = (0,)  # a target whose score nobody reads: what stands before it is read whole


@dataclasses.dataclass
class _Work:
    """Batches of examples, as `bulk.batches.compute` goes through them; a row has `found`."""

    buckets: Buckets
    start: Callable[[Sequence[Example], int], Any]
    found: Callable[[Any, Sequence[Example]], Iterator[Any]]

    def finish(self, examples: Sequence[Example], bucket: int, started: Any) -> Done:
        arrays = jax.tree.map(np.asarray, started)
        return Done([{"found": each} for each in self.found(arrays, examples)], 0, 0, 0)


class Scorer:
    """Scores targets after inputs, and embeds inputs. One thread uses it; `warm_up` compiles all its programs.

    For batches of one shape a result depends neither on its place nor on its neighbours.

    Attributes:
      max_top: how many of the likeliest tokens can be told at each place; 0 for a model that shows no logits.
      embeds: whether the model shows what vectors are made of.
    """

    def __init__(
        self,
        session: Session,
        max_length: int,
        max_input_length: int = 0,
        batch_size: int = 4,
        max_top_log_probs: int = 20,
    ):
        """Args:
          session: the model on its mesh.
          max_length: the most tokens of inputs and targets or, behind an encoder, of targets.
          max_input_length: the most tokens of an encoder's inputs.
          batch_size: texts that are computed together; shorter batches are filled up.
          max_top_log_probs: see `max_top`.

        Raises:
          UserError: the batch does not divide over the mesh.
        """
        self._format, self._model, self._params = session.row_format, session.sharded.model, session.params
        self._batch_size, self._programs = batch_size, ProgramCache(session.sharded, batch_size)
        inputs = {"inputs": max_input_length} if self._format.has_encoder else {}
        self._buckets = doubling(inputs | {"targets": max_length}, SMALLEST)
        self._states = "encoder_output" if self._format.has_encoder else "decoder_output"
        with session.sharded.partitioner.activate():
            logits, states = (self._shape(name) for name in ("logits", self._states))
        self.embeds = states is not None
        self.max_top = 0 if logits is None else min(max_top_log_probs, logits.shape[-1])

    def warm_up(self) -> None:
        """Compiles and runs every program once."""
        for shape in self._buckets.shapes:
            encoded = [0] * shape.get("inputs", 0)
            whole = [0] * max(1, shape["targets"] + (0 if encoded else 1 - len(self._format.begun([]))))
            self.scored([encoded], [whole])
            if self.embeds:
                self.embedded([encoded or whole[1:] or whole])

    def refusal(self, inputs: Tokens, targets: Tokens = ANY) -> str | None:
        """Returns why these can never be scored (or, without targets, embedded): too many tokens, or none; else
        None."""
        if not targets or not (self._format.has_encoder or self._format.begun([*inputs, *targets][:-1])):
            return "there is no token to read"
        sizes = self._format.scored_size(inputs, targets)
        for name, size in sizes.items():
            if size > self._buckets.largest[name]:
                what = name if self._format.has_encoder else "inputs and targets"
                return f"{what} have {size:,} tokens, and there is room for {self._buckets.largest[name]:,}"
        return None

    def score(self, inputs: Tokens, targets: Tokens) -> list[float]:
        """Returns the log-probability of each target after these inputs."""
        return list(self.scored([inputs], [targets])[0].log_probs)

    def embed(self, inputs: Tokens) -> np.ndarray:
        """Returns a vector of length 1 for inputs, float32 [d_model]: the mean of what an encoder says of them, or what
        a decoder says at the last of them, which has seen all."""
        return self.embedded([inputs])[0]

    def scored(self, inputs: Sequence[Tokens], targets: Sequence[Tokens], top_log_probs: int = 0) -> list[Made]:
        """Returns targets with their log-probabilities after the inputs, and with as many of the likeliest tokens at
        each place as are asked for, at most `max_top`. A first token that nothing stands before gets 0 and none.

        Raises:
          ValueError: one of them can never be scored (`refusal`).
        """

        def found(arrays: tuple[np.ndarray, ...], examples: Sequence[Example]) -> Iterator[Made]:
            log_probs, ids, likeliest = arrays
            after = np.tile(np.arange(1, log_probs.shape[1] + 1), (len(examples), 1))
            known, new = [each.inputs for each in examples], [each.targets for each in examples]
            for row, places in enumerate(self._format.of_targets(after, known, new)):
                said, top = [0.0] * len(places), [list[tuple[int, float]]()] * len(places)
                for target, place in enumerate(places - 1):
                    if place >= 0:
                        said[target] = float(log_probs[row, place])
                        pairs = zip(ids[row, place].tolist(), likeliest[row, place].tolist(), strict=True)
                        top[target] = list(pairs)[:top_log_probs]
                yield Made(new[row], said, top)

        return self._compute("score", self._score, inputs, targets, found)

    def embedded(self, inputs: Sequence[Tokens]) -> list[np.ndarray]:
        """Returns what `embed` does for each of several inputs.

        Raises:
          ValueError: one of them can never be embedded (`refusal`), or `embeds` is False.
        """
        if not self.embeds:
            raise ValueError(f"{type(self._model).__name__} does not show its {self._states}")
        return self._compute("embed", self._embed, inputs, [ANY] * len(inputs), lambda vectors, _: iter(vectors))

    def _compute(
        self,
        name: str,
        function: Callable[[Params, Batch], Any],
        inputs: Sequence[Tokens],
        targets: Sequence[Tokens],
        found: Callable[[Any, Sequence[Example]], Iterator[Any]],
    ) -> list[Any]:
        if problems := [why for each in zip(inputs, targets, strict=True) if (why := self.refusal(*each))]:
            raise ValueError(problems[0])
        examples = [
            Example(index, {}, list(known), list(new), self._format.scored_size(known, new))
            for index, (known, new) in enumerate(zip(inputs, targets, strict=True))
        ]

        def start(examples: Sequence[Example], bucket: int) -> Any:
            filled = [*examples, *[examples[-1]] * (self._batch_size - len(examples))]
            known, new = [each.inputs for each in filled], [each.targets for each in filled]
            batch = self._format.scored(known, new, self._buckets.shapes[bucket])
            return self._programs.run(name, function, self._params, batch)

        rows: dict[int, Any] = {}
        for places, done in compute(_Work(self._buckets, start, found), examples, self._batch_size):
            rows |= dict(zip(places, (row["found"] for row in done.rows), strict=False))
        return [rows[index] for index in range(len(examples))]

    def _score(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the log-probability of each target, [batch, length], and the likeliest tokens, [batch, length, top],
        with theirs."""
        if not self.max_top:
            log_probs = self._model.score(params, batch)
            none = jnp.zeros((*log_probs.shape, 0))
            return log_probs, none.astype(jnp.int32), none
        log_probs = jax.nn.log_softmax(self._model.observe(params, batch, ("logits",))["logits"])
        said = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], axis=-1)[..., 0]
        values, ids = jax.lax.top_k(log_probs, self.max_top)
        return said, ids, values

    def _embed(self, params: Params, batch: Batch) -> jax.Array:
        states = self._model.observe(params, batch, (self._states,))[self._states].astype(jnp.float32)
        side = self._states.removesuffix("_output")
        real = batch[f"{side}_segment_ids"] != 0
        if self._format.has_encoder:
            vectors = jnp.sum(states * real[..., None], axis=1)
        else:
            last = jnp.sum(real, axis=1) - 1
            vectors = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    def _shape(self, name: str) -> jax.ShapeDtypeStruct | None:
        """Returns the shape of an intermediate value of the model, by the smallest bucket; None where it shows none."""
        batch: Mapping[str, Any] = self._format.scored(
            [[]] * self._batch_size, [ANY] * self._batch_size, self._buckets.shapes[0]
        )
        try:
            found = jax.eval_shape(
                lambda params, batch: self._model.observe(params, batch, (name,)), self._params, batch
            )
        except (ValueError, NotImplementedError):
            return None
        return found[name]
