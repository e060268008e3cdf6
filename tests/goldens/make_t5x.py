"""Makes checkpoints with T5X itself, and reads ours with it: what `tests/goldens/t5x/` holds beside the older samples.

Needs T5X (its sources of 2026-04 on PYTHONPATH) and what it imports, in an environment of its own. No test imports it.

    python tests/goldens/make_t5x.py make momentum sized    # writes NAME_native.tar.gz and NAME_expected.npz
    python tests/goldens/make_t5x.py restore momentum DIR   # of `meshway convert --family=t5x --optimizer_state`

`make` trains some steps with T5X's Adafactor from step 1234 and saves through T5X's Checkpointer. `expected` has a
padded batch (`batch/*`), the logits and the loss (summed over weighted targets) that T5X computes from it, and
`next_losses`: the loss before each of three more steps. `restore` reads a checkpoint with T5X's Checkpointer, its
optimizer state too, and says whether logits and next losses are those of `expected`, bit for bit.
"""

import dataclasses
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from t5x import adafactor, checkpoints, partitioning, train_state
from t5x.examples.decoder_only import network as decoder_network
from t5x.examples.scalable_t5 import network as scalable_network
from t5x.examples.t5 import network as t5_network

FOLDER = Path(__file__).parent / "t5x"
ROWS, LENGTH, DECODER_LENGTH = 3, 11, 7
STEP, RATE = 1234, 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden: a network of T5X's examples and its Adafactor.

    Attributes:
      network: scalable, t5 or decoder.
      sizes: of its configuration.
      layers: of each stack.
      beta1: of Adafactor's momentum, None for none.
      seed: of parameters and batch.
      steps: done before it is saved.
    """

    network: str
    sizes: dict[str, int]
    layers: int
    beta1: float | None = None
    seed: int = 3
    steps: int = 5

    def module(self):
        """Returns the flax module."""
        config = {"dtype": "float32", "mlp_activations": ("gelu", "linear"), "dropout_rate": 0.0, **self.sizes}
        if self.network == "decoder":
            made = decoder_network.TransformerConfig(num_layers=self.layers, logits_via_embedding=False, **config)
            return decoder_network.DecoderWrapper(made)
        config |= {"num_encoder_layers": self.layers, "num_decoder_layers": self.layers}
        if self.network == "t5":
            return t5_network.Transformer(t5_network.T5Config(**config))
        return scalable_network.Transformer(scalable_network.T5Config(scan_layers=True, remat_policy="none", **config))

    def batch(self) -> dict[str, np.ndarray]:
        """Returns a padded batch as T5X's models take it."""
        random, size = np.random.default_rng(self.seed), self.sizes["vocab_size"]
        targets = random.integers(2, size, (ROWS, DECODER_LENGTH)).astype(np.int32)
        targets[1, 5:], targets[2, 3:] = 0, 0
        shifted = np.concatenate([np.zeros((ROWS, 1), np.int32), targets[:, :-1]], axis=1)
        batch = {
            "decoder_target_tokens": targets,
            "decoder_input_tokens": (shifted * (targets > 0)).astype(np.int32),
            "decoder_loss_weights": (targets > 0).astype(np.float32),
        }
        if self.network != "decoder":
            inputs = random.integers(2, size, (ROWS, LENGTH)).astype(np.int32)
            inputs[1, 8:] = 0
            batch["encoder_input_tokens"] = inputs
        return batch


CASES = {
    # Momentum, and arrays that are factored by the names of their axes.
    "momentum": Case(
        "scalable", {"vocab_size": 24, "emb_dim": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 12}, 2, beta1=0.9
    ),
    # Tables that are factored by their size: the smaller side is the row.
    "sized": Case("decoder", {"vocab_size": 130, "emb_dim": 128, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}, 1),
}


class Trainer:
    """T5X's network, optimizer and loss of one case."""

    def __init__(self, case: Case):
        self.module, self.batch = case.module(), case.batch()
        variables = self.module.init(jax.random.PRNGKey(case.seed), *self._inputs(), enable_dropout=False)
        rules = adafactor.standard_logical_factor_rules()
        optimizer = adafactor.Adafactor(decay_rate=0.8, step_offset=0, beta1=case.beta1, logical_factor_rules=rules)
        self.state = train_state.FlaxOptimTrainState.create(optimizer, flax.core.freeze(variables))
        self.partitioner = partitioning.PjitPartitioner(
            num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules()
        )
        self._gradient = jax.jit(jax.value_and_grad(self._loss))

    def checkpointer(self, folder: Path) -> checkpoints.Checkpointer:
        """Returns T5X's Checkpointer of a folder."""
        return checkpoints.Checkpointer(self.state, self.partitioner, str(folder))

    def _inputs(self) -> list[np.ndarray]:
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        return [self.batch[name] for name in names if name in self.batch]

    def logits(self, params) -> jax.Array:
        """Returns the logits of the batch."""
        return self.module.apply({"params": params}, *self._inputs(), enable_dropout=False)

    def _loss(self, params) -> jax.Array:
        scores = jax.nn.log_softmax(self.logits(params))
        chosen = jnp.take_along_axis(scores, self.batch["decoder_target_tokens"][..., None], -1)[..., 0]
        return -(chosen * self.batch["decoder_loss_weights"]).sum()

    def train(self, state, steps: int):
        """Returns (the loss before each step, the state after the last)."""
        losses = []
        for _ in range(steps):
            loss, gradient = self._gradient(state.params)
            losses.append(loss)
            state = state.apply_gradient(gradient, learning_rate=RATE)
        return np.asarray(losses, np.float32), state


def make(name: str) -> None:
    """Writes a golden."""
    case, trainer = CASES[name], Trainer(CASES[name])
    _, state = trainer.train(trainer.state.replace_step(jnp.asarray(STEP, jnp.int32)), case.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer.checkpointer(Path(folder)).save(state)
        (checkpoint,) = Path(folder).glob("checkpoint_*")
        if case.beta1 is not None:  # as T5X's training writes it beside
            (Path(folder) / "config.gin").write_text(f"adafactor.Adafactor:\n    beta1 = {case.beta1}\n")
        with tarfile.open(FOLDER / f"{name}_native.tar.gz", "w:gz") as archive:
            for path in (checkpoint, Path(folder) / "config.gin"):
                if path.exists():
                    archive.add(path, path.name)
    losses, _ = trainer.train(state, 3)
    batch = {f"batch/{key}": value for key, value in trainer.batch.items()}
    found = {"logits": np.asarray(trainer.logits(state.params)), "loss": losses[0], "next_losses": losses}
    np.savez(FOLDER / f"{name}_expected.npz", **batch, **found)
    print(f"{name}: {losses}")


def restore(name: str, folder: Path) -> bool:
    """Reads a checkpoint with T5X, and returns whether it goes on as T5X's own did."""
    trainer, expected = Trainer(CASES[name]), np.load(FOLDER / f"{name}_expected.npz")
    with tempfile.TemporaryDirectory() as copied:
        shutil.copytree(folder, Path(copied) / "run")
        state = trainer.checkpointer(Path(copied) / "run").restore()
    losses, _ = trainer.train(state, 3)
    same = (
        np.array_equal(trainer.logits(state.params), expected["logits"]),
        np.array_equal(losses, expected["next_losses"]),
    )
    print(f"{name}: restored step {int(state.step)}; logits equal: {same[0]}, next losses equal: {same[1]} {losses}")
    return all(same)


if __name__ == "__main__":
    verb, *words = sys.argv[1:]
    if verb == "restore":
        sys.exit(not restore(words[0], Path(words[1])))
    for each in words or CASES:
        make(each)
