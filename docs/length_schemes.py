"""Trains small decoders on rows of 64 bytes and scores rows of up to 512: writes docs/length_schemes.md.

    python docs/length_schemes.py [--runs=runs/length_schemes]

Needs meshway installed. It trains a model for each way to know positions, a few minutes each on two CPU cores,
then scores the same validation text under every scheme. Trained runs are not trained again.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
from meshway.launch.train import train

HERE = Path(__file__).parent
TRAINED, LENGTHS = 64, (64, 128, 256, 512)
RANGES = ((0, 64), (64, 128), (128, 256), (256, 512))
ROWS, BATCH = 128, 16  # of the longest length
Line = tuple[str, list[float]]  # a scheme's title, and its loss in each column
HEAD = """# Rows longer than those of training

Small decoders ([length_schemes.gin](length_schemes.gin): 2 layers, width 128), trained on rows of {trained} bytes of
`pydocs_bytes_lm`, score rows of up to 512 bytes of its validation text ({tokens:,} bytes). Losses are nats a byte.
`python docs/length_schemes.py` makes this page; the schemes are files of `gin/lengths/`, given at evaluation only.
Linear interpolation asks for a little more training, which it does not get; a window of the trained length is what any
scheme is to be held against: it needs none, and forgets what lies further back.

The second half of rows of each length, every scheme set for that length; the same text is cut into rows of each:"""
BETWEEN = """By place in rows of 512, every scheme set for 512; the first column shows what stretching costs near by:"""

MODELS = {  # what knows positions -> bindings
    "rope": (),
    "alibi": ("ROTARY=None", "attention.Attention.alibi=True"),
    "none": ("ROTARY=None",),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A line of the table: a trained model, and what is bound when it reads rows of `factor` times its length."""

    title: str
    model: str
    gin_file: str | None = None
    bindings: tuple[str, ...] = ()

    def bound(self, factor: int) -> tuple[str, ...]:
        """Returns the bindings for rows that many times as long."""
        return tuple(binding.format(factor=factor) for binding in self.bindings)


SCHEMES = (
    Scheme("RoPE as trained", "rope"),
    Scheme("linear (position interpolation)", "rope", "lengths/linear.gin", ("LENGTH_FACTOR={factor}",)),
    Scheme("NTK", "rope", "lengths/ntk.gin", ("LENGTH_FACTOR={factor}",)),
    Scheme("YaRN", "rope", "lengths/yarn.gin", ("LENGTH_FACTOR={factor}", f"ORIGINAL_LENGTH={TRAINED}")),
    Scheme("ReRoPE, window 32", "rope", "lengths/rerope.gin", ("REROPE_WINDOW=32",)),
    Scheme("Leaky ReRoPE, window 32", "rope", "lengths/rerope.gin", ("REROPE_WINDOW=32", "REROPE_SLOPE=0.0625")),
    Scheme("window of 64 bytes", "rope", None, (f"WINDOW={TRAINED}",)),
    Scheme("ALiBi, trained so", "alibi"),
    Scheme("no positions, trained so", "none"),
)


def train_model(name: str, runs: Path) -> None:
    """Trains one model, unless its run is there."""
    recipe = config.load(
        Invocation(
            verb="train",
            subject="train",
            gin_files=(str(HERE / "length_schemes.gin"),),
            bindings=(*MODELS[name], f"MODEL_DIR={str(runs / name)!r}"),
        )
    )
    train(**recipe.build("train.train", given=["resolved", "began"]), resolved=recipe.resolved)


def text(length: int, runs: Path) -> np.ndarray:
    """Returns rows of validation text [rows, length], each a window of the stream of documents."""
    recipe = config.load(
        Invocation(
            verb="train",
            subject="train",
            gin_files=(str(HERE / "length_schemes.gin"),),
            bindings=(f"TASK_FEATURE_LENGTHS={{'targets': {length}}}", f"MODEL_DIR={str(runs / 'text')!r}"),
        )
    )
    task = recipe.build("train.train", given=["resolved", "began"])["data"].eval_tasks()[0]
    batches = [batch for batch, _ in task.batches()]
    rows = np.concatenate([batch["decoder_target_tokens"] for batch in batches])
    full = np.concatenate([batch["decoder_loss_weights"] for batch in batches]).all(axis=1)
    return rows[full][:ROWS]


def losses(scheme: Scheme, runs: Path, rows: np.ndarray) -> np.ndarray:
    """Returns the loss of each token of rows [rows, length], float32, under a scheme."""
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(str(HERE / "length_schemes.gin"), *([scheme.gin_file] if scheme.gin_file else [])),
        bindings=(*MODELS[scheme.model], *scheme.bound(rows.shape[1] // TRAINED)),
    )
    program = config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]
    checkpoints = Checkpoints(runs / scheme.model / "checkpoints", read_only=True)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), program.param_shapes
    )
    params = checkpoints.restore_params(checkpoints.steps()[-1], wanted)
    score = jax.jit(program.model.score)
    parts = [rows[at : at + BATCH * rows.shape[1] // TRAINED] for at in range(0, len(rows), BATCH)]
    return np.concatenate([-np.asarray(score(params, batch_of(part))) for part in parts])


def batch_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns rows of target tokens [rows, length] as a batch of the decoder."""
    ones = np.ones_like(rows)
    return {
        "decoder_input_tokens": np.pad(rows, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": rows,
        "decoder_loss_weights": ones.astype(np.float32),
        "decoder_segment_ids": ones,
        "decoder_positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }


def main() -> None:
    """Trains, scores, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/length_schemes"))
    runs = parser.parse_args().runs
    for name in MODELS:
        train_model(name, runs)
    longest = text(LENGTHS[-1], runs)
    own: list[Line] = []
    whole: list[Line] = []
    for scheme in SCHEMES:
        found = [losses(scheme, runs, longest.reshape(-1, length)) for length in LENGTHS]
        own.append((scheme.title, [part[:, part.shape[1] // 2 :].mean() for part in found]))
        whole.append((scheme.title, [found[-1][:, first:last].mean() for first, last in RANGES]))
        print(own[-1], whole[-1], flush=True)
    (HERE / "length_schemes.md").write_text(page(own, whole, longest.size), encoding="utf-8")


def page(own: list[Line], whole: list[Line], tokens: int) -> str:
    """Returns the text of docs/length_schemes.md."""
    halves = [f"{length // 2 + 1}-{length} of {length}" for length in LENGTHS]
    ranges = [f"{first + 1}-{last}" for first, last in RANGES]
    return (
        "\n\n".join([HEAD.format(trained=TRAINED, tokens=tokens), table(halves, own), BETWEEN, table(ranges, whole)])
        + "\n"
    )


def table(columns: list[str], lines: list[Line]) -> str:
    """Returns a markdown table of losses."""
    head = ["| scheme | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join(
        head + ["| " + " | ".join([title, *(f"{loss:.2f}" for loss in found)]) + " |" for title, found in lines]
    )


if __name__ == "__main__":
    main()
