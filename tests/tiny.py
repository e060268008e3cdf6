"""Tiny programs from the shipped gin files, for tests: shapes small, everything else as shipped."""

from meshway.framework.training.program import TrainProgram
from meshway.launch import config
from meshway.launch.invocation import Invocation

LENGTHS = {"inputs": 24, "targets": 16}
FAMILIES = ("t5_1_1", "lm")
ONE_LAYER = {  # half the compile time; tests of stacks ask for more
    "t5_1_1": ("NUM_ENCODER_LAYERS=1", "NUM_DECODER_LAYERS=1"),
    "lm": ("NUM_LAYERS=1",),
}
LAYOUTS = ("single", "data", "fsdp", "model_1d", "model_2d", "fsdp_model")


def program(family: str = "t5_1_1", *bindings: str, layout: str = "single", optimizer: str = "adamw") -> TrainProgram:
    """Returns the tiny program of a family under a shipped layout and optimizer, with command-line bindings."""
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{family}/tiny.gin", f"optimizers/{optimizer}.gin"),
        bindings=(
            "VOCAB_SIZE=256",
            "BATCH_SIZE=16",
            f"TASK_FEATURE_LENGTHS={LENGTHS}",
            "LEARNING_RATE=0.01",
            "WARMUP_STEPS=10",
            *ONE_LAYER[family],
            f"LAYOUT='{layout}'",
            *bindings,
        ),
    )
    return config.load(invocation, import_unreferenced=False).build("bench.train")["program"]


def losses(program: TrainProgram, steps: int, state=None, first: int = 0) -> tuple[list[float], object]:
    """Runs steps on synthetic batches numbered from `first`; returns (mean loss of each, final state)."""
    step = program.compile_step()
    state = program.init() if state is None else state
    found = []
    for index in range(first, first + steps):
        state, metrics = step(state, program.put(program.synthetic_batch(seed=index)))
        total, weight = metrics["loss"]
        found.append(float(total) / float(weight))
    return found, state
