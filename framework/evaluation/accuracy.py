"""What weights, keys and values in fewer bits cost a model: how far its distributions move, and the tasks' metrics
before and after."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.data.source import EvalTask
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.inference.decoding import decoding_model, teacher_forced
from meshway.framework.inference.weights import quantize, quantized
from meshway.framework.interfaces import Batch, Model, Params
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.terminal import format_bytes, format_columns


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What was found on one task.

    Attributes:
      name: of the task.
      divergence: Kullback-Leibler divergence of the next token's distribution from that of the checkpoint's weights, in
        nats, as the mean over target tokens.
      agreement: share of target tokens at whose place both find the same token likeliest.
      before, after: metrics by name, of the checkpoint's weights and of those in fewer bits.
    """

    name: str
    divergence: float
    agreement: float
    before: dict[str, float]
    after: dict[str, float]


class Comparison:
    """A model with the weights of a checkpoint beside one that keeps weights, or keys and values, in fewer bits."""

    def __init__(
        self,
        sharded: ShardedModel,
        params: Params,
        weights: str | None,
        settings: Evaluation,
        cached: ShardedModel | None = None,
    ):
        """Args:
          sharded, params: as the checkpoint has them.
          weights: one of `weights.WEIGHTS`; None as they are.
          settings: of the evaluation.
          cached: the model with keys and values in fewer bits, through whose cache targets are then read, of the first
            example of each row; None for whole rows at once.

        Raises:
          UserError: the model names no parameter that may be quantised, or it does not decode.
        """
        self._sharded, self._params, self._settings, self._cached = sharded, params, settings, cached is not None
        self._other = cached or sharded
        if cached is not None:
            decoding_model(cached.model)
        self._fewer = params
        if weights is not None:
            given = self._other
            self._other = quantized(given, weights)
            self._fewer = quantize(given, self._other, params, weights)

    def of(self, tasks: Sequence[EvalTask]) -> Iterator[Accuracy]:
        """Yields what is found on each task; every process must consume all of them."""
        for task in tasks:
            before, after = (
                next(Evaluator(sharded, [task], self._settings).results(params)).report["metrics"]
                for sharded, params in ((self._sharded, self._params), (self._other, self._fewer))
            )
            yield Accuracy(task.name, *self._divergence(task), before, after)

    def size(self) -> str:
        """Returns how many bytes the weights take, beside those of the checkpoint's in bfloat16."""
        entries = sum(leaf.size for leaf in jax.tree.leaves(self._params))
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._fewer))
        return f"weights take {format_bytes(held)}, {held / (2 * entries):.3f} of what they do in bfloat16"

    def _log_probs(self, params: Params, batch: Batch) -> jax.Array:
        """Returns those of the other model, float32 [rows, length, vocab]."""
        model = self._other.model
        if not self._cached:
            return jax.nn.log_softmax(model.observe(params, batch, ("logits",))["logits"])
        return teacher_forced(decoding_model(model), params, *_fed(model, batch))

    def _divergence(self, task: EvalTask) -> tuple[float, float]:
        sharded = self._sharded
        model, partitioner = sharded.model, sharded.partitioner
        whole = sharded.batch(task.batch_size, task.lengths)

        def sums(params: Params, fewer: Params, batch: Batch) -> jax.Array:
            known = jax.nn.log_softmax(model.observe(params, batch, ("logits",))["logits"])
            found = self._log_probs(fewer, batch)
            counted = model.score(params, batch) != 0  # where targets have weight
            if self._cached:
                counted &= batch["decoder_segment_ids"] == 1
            divergence = jnp.sum(jnp.exp(known) * (known - found), axis=-1)
            same = jnp.argmax(known, axis=-1) == jnp.argmax(found, axis=-1)
            return jnp.stack([jnp.sum(jnp.where(counted, each, 0)) for each in (divergence, same, 1.0)])

        program = partitioner.compile(
            sums,
            sharded.param_shapes,
            self._other.param_shapes,
            whole.abstract,
            in_shardings=(sharded.param_shardings, self._other.param_shardings, whole.shardings),
            out_shardings=partitioner.replicated,
        )
        total, rows = np.zeros(3), partitioner.process_rows(task.batch_size)
        for batch, _ in itertools.islice(task.batches(), self._settings.max_batches):
            own = whole.shard({name: x[rows] for name, x in batch.items()})
            total += np.asarray(program(self._params, self._fewer, own), np.float64)
        return float(total[0] / max(total[2], 1)), float(total[1] / max(total[2], 1))


def _fed(model: Model, batch: Batch) -> tuple[Batch, Any]:
    """Returns what is read first, of the first example of each row, and what is then fed, one token after the other:
    all targets. Where there is no encoder, the row's first token is read."""
    targets = batch["decoder_target_tokens"]
    if "encoder_input_tokens" in batch:
        segments = batch["encoder_segment_ids"]
        return {**batch, "encoder_segment_ids": jnp.where(segments == 1, segments, 0)}, targets
    if "decoder_prefix_mask" in batch:
        raise UserError(
            f"{type(model).__name__}: a prefix that sees itself both ways is not read token by token: --cache compares "
            "causal decoders and encoder-decoders"
        )
    first = (jnp.arange(targets.shape[1]) == 0).astype(jnp.int32)
    return {**batch, **{name: batch[name] * first for name in ("decoder_segment_ids", "decoder_input_tokens")}}, targets


def format_accuracy(found: Accuracy, weights: str) -> str:
    """Returns what was found on a task as text."""
    names = [name for name in found.before if name in found.after]
    rows = [("", "checkpoint", weights)]
    rows += [(name, f"{found.before[name]:.4g}", f"{found.after[name]:.4g}") for name in names]
    title = (
        f"{found.name}: KL divergence {found.divergence:.2e} nats a token, the same likeliest token for "
        f"{100 * found.agreement:.2f} %"
    )
    return "\n".join([title, *format_columns(rows, {1, 2})])
