"""The shipped mixtures of experts: their sizes, the layouts that cut them, and DeepSeek's balance without a loss."""

import jax
import numpy as np
import pytest
from tiers import tiers
from tiny import LENGTHS, MIXTURES, ONE_LAYER, program

from meshway.framework.trees import flatten
from meshway.launch import cli
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config


def test_the_active_parameters_of_mixtral_are_the_published_ones():
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=("models/mixtral/8x7b.gin", "optimizers/adafactor.gin"),
        bindings=("TASK_FEATURE_LENGTHS={'targets': 8}", "LAYOUT='single'"),
    )
    made = config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(made.param_shapes).items()}
    active = sum(size // 4 if "/experts/" in path else size for path, size in sizes.items())
    assert active == 12_879_925_248  # 12.9 billion (Jiang et al. 2024, section 2): two of eight experts


LAYOUTS = {"deepseek": "fsdp_expert", "mixtral": "expert", "st_moe": "expert_model", "switch": "expert"}


@pytest.mark.parametrize("family", tiers(MIXTURES, quick=["mixtral"], slow=set(MIXTURES) - {"mixtral"}))
def test_an_inspected_layout_cuts_experts(family, capsys):
    words = ["TRAIN_STEPS=1", "BATCH_SIZE=16", f"TASK_FEATURE_LENGTHS={LENGTHS}", "VOCAB_SIZE=256"]
    words += ["MIXTURE_OR_TASK_NAME=task", f"LAYOUT={LAYOUTS[family]}", *ONE_LAYER[family]]
    files = [f"--gin_file=models/{family}/tiny.gin", "--gin_file=optimizers/adamw.gin"]
    assert cli.main(["inspect", *files, *[f"--gin.{word}" for word in words]]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("params/") and "/experts/wo" in line]
    assert rows and all("expert->expert" in row for row in rows)
    assert any("router/kernel" in line for line in lines)


@pytest.mark.slow
def test_a_bias_follows_its_load_and_nothing_else_does():
    """One step of DeepSeek's mixture: every bias moves by the speed or not at all, whatever the optimizer."""
    made = program("deepseek", "BIAS_SPEED=0.25", "D_MODEL=16", "NUM_HEADS=2", "HEAD_DIM=8")
    state, step = made.init(), made.compile_step()
    state, metrics = step(state, made.shard_batch(made.synthetic_batch()))
    bias = np.asarray(state.params["decoder"]["block_0"]["mlp"]["router"]["bias"])
    assert set(np.unique(bias)) <= {-0.25, 0.0, 0.25} and bias.min() < 0 < bias.max()
    assert not any("bias" in path for path in flatten(state.opt_state.inner[0][0].mu)), "no moments of biases"


@pytest.mark.slow
def test_the_bias_balances_what_a_router_prefers():
    """Of a router that prefers two experts, the largest expert's load falls from 1.8 shares to 1.2, without a loss."""

    def largest_load(speed):
        made = program("deepseek", f"BIAS_SPEED={speed}", "LEARNING_RATE=0.0001", "BATCH_SIZE=64")
        state, step, loads = made.init(), made.compile_step(), []
        router = state.params["decoder"]["block_0"]["mlp"]["router"]
        router["kernel"] = jax.device_put(0.1 * router["kernel"].at[:, :, :2].add(4.0), router["kernel"].sharding)
        for index in range(60):
            state, metrics = step(state, made.shard_batch(made.synthetic_batch(seed=index)))
            loads.append(float(np.divide(*metrics["decoder/router/load_max/layer_00"])))
        return np.mean(loads[-10:])

    assert largest_load(0.0) > 1.6
    assert largest_load(0.005) < 1.4
