"""Tiny programs from the shipped gin files, for tests: shapes small, everything else as shipped."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.sampling import Sampling
from meshway.framework.training.program import TrainProgram
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

LENGTHS = {"inputs": 24, "targets": 16}
FAMILIES = ("t5_1_1", "lm")  # the two that others are made of
DECODERS = ("chinchilla", "gemma2", "gemma3", "gpt2", "llama", "mistral", "palm", "qwen2_5", "qwen3", "t5x_decoder")
ENCODER_DECODERS = ("byt5", "longt5", "mt5", "t5", "ul2", "umt5")
ENCODERS = ("bert",)
WITH_ENCODERS = ("t5_1_1", "st_moe", "switch", *ENCODER_DECODERS)
MIXTURES = ("deepseek", "mixtral", "st_moe", "switch")  # of experts, over tokens
VISION = ("v_moe", "vit")
ONE_LAYER = {  # half the compile time; tests of stacks ask for more
    "t5_1_1": ("NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=1"),
    "st_moe": (),  # as few as its pattern has
    "switch": (),
    "gemma2": (),
    "gemma3": (),
    **dict.fromkeys(ENCODER_DECODERS, ("NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=1")),
}
ONE_LAYER |= {name: ("NUM_LAYERS=1",) for name in ("lm", *MIXTURES, *DECODERS, *ENCODERS) if name not in ONE_LAYER}
FOUR_LAYERS = {  # as pipelines of two stages, passed twice, need
    "t5_1_1": ("NUM_ENCODER_LAYERS=4", "NUM_DECODER_LAYERS=4"),
    "lm": ("NUM_LAYERS=4",),
}
LAYOUTS = tuple(sorted(path.stem for path in (Path(__file__).parent.parent / "gin/layouts").glob("*.gin")))
DENSE_LAYOUTS = tuple(layout for layout in LAYOUTS if "expert" not in layout)  # the others need experts to cut


def program(family: str = "t5_1_1", *bindings: str, layout: str = "single", optimizer: str = "adamw") -> TrainProgram:
    """Returns the tiny program of a family under a shipped layout and optimizer, with command-line bindings."""
    pipelined = layout.startswith("stage")
    both = family in WITH_ENCODERS or any("prefix=True" in binding for binding in bindings)
    lengths = LENGTHS if both else {"targets": LENGTHS["targets"]}
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{family}/tiny.gin", f"optimizers/{optimizer}.gin"),
        bindings=(
            "VOCAB_SIZE=256",
            "BATCH_SIZE=16",
            f"TASK_FEATURE_LENGTHS={lengths}",
            "LEARNING_RATE=0.01",
            "WARMUP_STEPS=10",
            *(FOUR_LAYERS if pipelined else ONE_LAYER)[family],
            *(["pipeline.Pipeline.num_microbatches=4"] if pipelined else []),
            f"LAYOUT='{layout}'",
            *bindings,
        ),
    )
    return config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]


def losses(program: TrainProgram, steps: int, state=None, first: int = 0) -> tuple[list[float], object]:
    """Runs steps on synthetic batches numbered from `first`; returns (mean loss of each, final state)."""
    step = program.compile_step()
    state = program.init() if state is None else state
    found = []
    for index in range(first, first + steps):
        state, metrics = step(state, program.shard_batch(program.synthetic_batch(seed=index)))
        total, weight = metrics["loss"]
        found.append(float(total) / float(weight))
    return found, state


def gradients_and_losses(program: TrainProgram, fresh, steps: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """Trains from a state on the host; returns (the first step's gradients by path, mean loss of each step)."""

    def exposing(gradient_at, params):
        gradients, metrics = gradient_at(params)
        leaves = jax.tree_util.tree_leaves_with_path(gradients)
        named = {f"gradient{jax.tree_util.keystr(path)}": (leaf, leaf) for path, leaf in leaves}
        return gradients, metrics | named

    program._step = dataclasses.replace(program._step, gradient_rule=exposing)
    step, state = program.compile_step(), jax.device_put(fresh, program.state_shardings)
    gradients, found = {}, []
    for index in range(steps):
        state, metrics = step(state, program.shard_batch(program.synthetic_batch(seed=index)))
        gradients = gradients or {name: np.asarray(m[0]) for name, m in metrics.items() if name.startswith("gradient[")}
        found.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    return gradients, found


def greedy(model, params, batch, length, eos_id):
    """Returns the likeliest tokens, int32 [batch, length]."""
    rows = next(iter(batch.values())).shape[0]
    search = Sampling(temperature=0.0)
    return search(model, params, batch, length, Stop((eos_id,)), np.arange(rows), jax.random.key(0)).tokens[:, 0]


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """loss(w) = sum over rows of (row . w)^2 / 2: gradients are known in closed form."""

    def loss(self, params, batch, rng):
        loss = 0.5 * jnp.sum((batch["rows"] @ params["w"]) ** 2)
        weight = jnp.asarray(batch["rows"].shape[0], jnp.float32)
        return loss, weight, {}


class Descent:
    """w <- w - g, with the interface of a bound optimizer."""

    def update(self, gradients, state, params):
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        return jax.tree.map(lambda p, g: p - g, params, gradients), state, {"grad_norm": norm}


def loaded(name: str):
    """Returns a module of the lab, a user's package, by its path there, without touching `sys.path`."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).parent / "lab" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
