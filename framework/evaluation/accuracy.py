"""What weights in fewer bits cost a model: how far its distributions move, and the tasks' metrics before and after."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.data.source import EvalTask
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.inference.weights import quantize, quantized
from meshway.framework.interfaces import Batch, Params
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
    """A model with the weights of a checkpoint beside the same in fewer bits."""

    def __init__(self, sharded: ShardedModel, params: Params, weights: str, settings: Evaluation):
        """Args:
          sharded, params: as the checkpoint has them.
          weights: one of `weights.WEIGHTS`.
          settings: of the evaluation.

        Raises:
          UserError: the model names no parameter that may be quantised.
        """
        self._sharded, self._params, self._weights, self._settings = sharded, params, weights, settings
        self._other = quantized(sharded, weights)
        self._fewer = quantize(sharded, self._other, params, weights)

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

    def _divergence(self, task: EvalTask) -> tuple[float, float]:
        sharded = self._sharded
        model, partitioner = sharded.model, sharded.partitioner
        whole = sharded.batch(task.batch_size, task.lengths)

        def sums(params: Params, fewer: Params, batch: Batch) -> jax.Array:
            logits, others = (model.observe(each, batch, ("logits",))["logits"] for each in (params, fewer))
            counted = model.score(params, batch) != 0  # where targets have weight
            known, found = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
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
