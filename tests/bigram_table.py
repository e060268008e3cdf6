"""A language model whose next token hangs on the last one alone: what evaluation finds can be counted by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tasks_in_memory

from meshway.framework.data.eval_task import TaskEvaluation
from meshway.framework.data.features import PrefixLanguageModel
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.partitioning.sharded_model import ShardedModel

VOCAB, LENGTHS = 12, {"inputs": 3, "targets": 7}
DTYPES = {"input_tokens": np.int32, "target_tokens": np.int32, "loss_weights": np.float32, "segment_ids": np.int32}
DTYPES |= {"positions": np.int32, "prefix_mask": np.int32}


class BigramTable:
    """Meets `Model` by shape: logits = table[last token]."""

    def __init__(self, vocab_size=VOCAB):
        self.vocab_size = vocab_size

    def init(self, rng):
        return {"table": jax.random.normal(rng, (self.vocab_size, self.vocab_size))}

    def axes(self):
        return {"table": ("vocab", "embed")}

    def batch_spec(self, batch_size, lengths):
        shape = (batch_size, sum(lengths[name] for name in ("inputs", "targets") if name in lengths))
        return {
            f"decoder_{name}": ArraySpec(shape, np.dtype(dtype), ("batch", "length"))
            for name, dtype in DTYPES.items()
            if name != "prefix_mask" or "inputs" in lengths
        }

    def score(self, params, batch):
        log_probs = jax.nn.log_softmax(params["table"][batch["decoder_input_tokens"]])
        picked = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)[..., 0]
        return picked * batch["decoder_loss_weights"]

    def loss(self, params, batch, rng):
        return -jnp.sum(self.score(params, batch)), jnp.sum(batch["decoder_loss_weights"]), {}

    def prefill(self, params, batch, max_length):
        last = jnp.sum(batch["decoder_segment_ids"] != 0, axis=1) - 1
        tokens = jnp.take_along_axis(batch["decoder_input_tokens"], last[:, None], axis=1)
        return tokens, last, {"nothing": jnp.zeros((tokens.shape[0], 1))}

    def decode(self, params, tokens, positions, cache):
        return params["table"][tokens[:, 0]], cache

    def fork(self, cache, times):
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), cache)

    def reorder(self, cache, rows):
        return jax.tree.map(lambda leaf: leaf[rows], cache)


def sharded(data=1):
    """The model, batches cut over `data` devices."""
    mesh = MeshShape(ici={"data": data})
    activations = [("batch", "data"), ("length", None), ("vocab", None)]
    return ShardedModel(BigramTable(), Layout(mesh, [("vocab", None), ("embed", None)], activations))


def task(
    examples,
    converter=PrefixLanguageModel(),
    batch_size=4,
    lengths=LENGTHS,
    postprocess=None,
    name="ids",
    stop_ids=None,
    **fns,
):
    """A task of (inputs, targets) ids, read as lists, whose metric functions are given by seqio's kinds."""
    vocabulary = SimpleNamespace(eos_id=1, decode=list)
    kinds = ("predict_metric_fns", "score_metric_fns", "predict_with_aux_metric_fns")
    seqio_task = SimpleNamespace(
        name=name,
        output_features=dict.fromkeys(("inputs", "targets"), SimpleNamespace(vocabulary=vocabulary)),
        postprocess_fn=postprocess or (lambda output, example, is_target: output),
        **{kind: fns.get(kind, []) for kind in kinds},
        metric_fns=[],
        metric_objs=fns.get("metric_objs", []),
    )
    objective = converter.bind(tasks_in_memory.task(*converter.task_features), lengths)
    given = [{"inputs": np.array(inputs), "targets": np.array(targets)} for inputs, targets in examples]
    given = [{feature: example[feature] for feature in converter.task_features} for example in given]
    return TaskEvaluation(name, InMemory(given), objective, converter, lengths, batch_size, {}, seqio_task, stop_ids)


class Tables:
    """A data source of one task per name, for recipes; `fails` names the one whose metric function raises."""

    eval_split = "validation"

    def __init__(self, batch_size, lengths=LENGTHS, names=("ids",), fails=""):
        self.batch_size, self.lengths, self._names, self._fails = batch_size, lengths, names, fails

    def vocabularies(self):
        return {}

    def eval_tasks(self, split=None):
        if split not in (None, "train"):
            raise UserError(f"no split {split!r}; there is 'train'")
        examples = [([2], [3, 1]), ([4], [5, 1]), ([6], [7, 1])][: 2 if split else 3]

        def count(targets, predictions):
            return {"count": len(predictions)}

        def broken(targets, predictions):
            raise ZeroDivisionError("of none")

        functions = {name: [broken, count] if name == self._fails else [count] for name in self._names}
        return [
            task(examples, batch_size=self.batch_size, name=name, predict_metric_fns=functions[name])
            for name in self._names
        ]
