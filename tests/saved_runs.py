"""Run directories of tiny models with random weights and a byte vocabulary: what eval and infer open."""

from pathlib import Path

import jax

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.data.vocabularies import Bytes
from meshway.framework.data.vocabulary import Framing
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch.recipe.bindings import build_network

LENGTHS = {"inputs": 64, "targets": 16}
VOCABULARY = Bytes(100)


def save_run(
    folder: Path,
    family: str = "t5_1_1",
    *bindings: str,
    step: int = 7,
    framing: Framing | None = None,
    scale: float = 2.0,
) -> Path:
    """Makes a run of one checkpoint; parameters are `scale` times their fresh values, so that logits differ well."""
    folder.mkdir(parents=True)
    layers = "NUM_ENCODER_LAYERS = 1\nNUM_DECODER_LAYERS = 1" if family == "t5_1_1" else "NUM_LAYERS = 1"
    lines = [
        "from __gin__ import dynamic_registration",
        f"include 'models/{family}/tiny.gin'",
        "VOCAB_SIZE = 384",
        f"TASK_FEATURE_LENGTHS = {LENGTHS}",
        layers,
        *bindings,
    ]
    (folder / "recipe.gin").write_text("\n".join(lines) + "\n")
    model, recipe = build_network(folder / "recipe.gin")
    params = jax.tree.map(lambda leaf: leaf * scale, model.init(jax.random.key(0)))
    checkpoints = Checkpoints(folder / "checkpoints", recipe=recipe.resolved)
    checkpoints.save_params(params, step)
    checkpoints.close()
    RunDirectory(folder).save_vocabularies(dict.fromkeys(LENGTHS, VOCABULARY), framing)
    return folder
