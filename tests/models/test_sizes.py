"""Every shipped size has the published number of parameters, and the names, shapes and axes it is known by."""

import functools
import json
import math
import os
from pathlib import Path

import jax
import pytest
from tiers import tiers

from meshway.framework.partitioning.partitioner import path_name
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

GOLDENS = Path(__file__).parent.parent / "goldens" / "parameters"
GIN = Path(__file__).parent.parent.parent / "gin" / "models"
NO_SIZES = ("common", "prefix", "layer_bias")
MODELS = sorted(f"{path.parent.name}/{path.stem}" for path in GIN.glob("*/*.gin") if path.stem not in NO_SIZES)
PUBLISHED = {  # each at its own vocabulary; T5's is padded to 32,128
    "t5_1_1/small": 76_961_152,
    "t5_1_1/base": 247_577_856,
    "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184,
    "t5_1_1/xxl": 11_135_332_352,
    "t5/small": 60_506_624,
    "t5/base": 222_903_552,
    "t5/large": 737_668_096,
    "t5/3b": 2_851_598_336,
    "t5/11b": 11_307_321_344,
    "mt5/small": 300_176_768,
    "mt5/base": 582_401_280,
    "mt5/large": 1_229_581_312,
    "mt5/xl": 3_742_619_648,
    "mt5/xxl": 12_921_057_280,
    "umt5/small": 306_601_984,
    "umt5/base": 592_043_520,
    "umt5/large": 1_242_449_920,
    "umt5/xl": 3_768_356_864,
    "umt5/xxl": 12_972_531_712,
    "longt5/base": 247_577_856,
    "longt5/large": 783_150_080,
    "byt5/small": 299_637_760,
    "byt5/base": 581_653_248,
    "byt5/large": 1_228_183_552,
    "byt5/xl": 3_737_801_728,
    "byt5/xxl": 12_906_899_328,
    "t5x_decoder/base": 109_628_544,
    "t5x_decoder/large": 341_231_104,
    "t5x_decoder/xl": 1_223_527_424,
    "t5x_decoder/xxl": 4_762_310_656,
    "ul2/20b": 19_591_209_984,
    "switch/base_8": 619_339_008,
    "bert/base": 109_514_298,
    "bert/large": 335_174_458,
    "gpt2/small": 124_439_808,
    "gpt2/medium": 354_823_168,
    "gpt2/large": 774_030_080,
    "gpt2/xl": 1_557_611_200,
    "llama/2_7b": 6_738_415_616,
    "llama/2_13b": 13_015_864_320,
    "llama/2_70b": 68_976_648_192,
    "llama/3_8b": 8_030_261_248,
    "llama/3_70b": 70_553_706_496,
    "llama/3_1_8b": 8_030_261_248,
    "llama/3_1_70b": 70_553_706_496,
    "llama/3_1_405b": 405_853_388_800,
    "llama/3_2_1b": 1_235_814_400,
    "llama/3_2_3b": 3_212_749_824,
    "gemma2/2b": 2_614_341_888,
    "gemma2/9b": 9_241_705_984,
    "gemma2/27b": 27_227_128_320,
    "gemma3/1b": 999_885_952,
    "gemma3/4b": 3_880_263_168,
    "gemma3/12b": 11_766_034_176,
    "gemma3/27b": 27_009_346_304,
    "qwen2_5/0_5b": 494_032_768,
    "qwen2_5/1_5b": 1_543_714_304,
    "qwen2_5/3b": 3_085_938_688,
    "qwen2_5/7b": 7_615_616_512,
    "qwen2_5/14b": 14_770_033_664,
    "qwen2_5/32b": 32_763_876_352,
    "qwen2_5/72b": 72_706_203_648,
    "qwen3/0_6b": 596_049_920,
    "qwen3/1_7b": 1_720_574_976,
    "qwen3/4b": 4_022_468_096,
    "qwen3/8b": 8_190_735_360,
    "qwen3/14b": 14_768_307_200,
    "qwen3/32b": 32_762_123_264,
    "mistral/7b_v0_1": 7_241_732_096,
    "mistral/7b_v0_3": 7_248_023_552,
    "mixtral/8x7b": 46_702_792_704,
    "mixtral/8x22b": 140_620_634_112,
}
ROUNDED = {  # as published, and to how much of it
    "palm/8b": (8.63e9, 0.01e9),
    "palm/62b": (62.50e9, 0.01e9),
    "palm/540b": (540.35e9, 0.01e9),
    "chinchilla/70b": (70e9, 0.1e9),
}


@functools.cache
def parameters(model):
    """Returns path -> {shape, axes} of a shipped model, from shapes alone."""
    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{model}.gin", "optimizers/sgd.gin"),
        bindings=("bench.train.measure.program=%MODEL",),  # nothing but the model
    )
    made = config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]
    found = {}
    jax.tree_util.tree_map_with_path(
        lambda path, leaf, names: found.update({path_name(path): {"shape": list(leaf.shape), "axes": list(names)}}),
        jax.eval_shape(made.init, jax.random.key(0)),
        made.axes(),
    )
    return found


TINY = [model for model in MODELS if model.endswith("/tiny")][::2]
FEW = ["t5_1_1/small", "gpt2/small", "llama/3_1_405b", "gemma3/1b", "mixtral/8x7b", "bert/base", "palm/540b"]


@pytest.mark.parametrize("model", tiers(MODELS, quick=TINY, slow=[model for model in MODELS if model not in TINY]))
def test_parameters_are_the_golden_ones(model):
    """Names, shapes and axes. They may change only on purpose: MESHWAY_RENEW_GOLDENS=1 rewrites the files, and the
    changelog then says how old checkpoints are read."""
    found, path = parameters(model), GOLDENS / f"{model.replace('/', '_')}.json"
    if os.environ.get("MESHWAY_RENEW_GOLDENS") == "1":
        path.parent.mkdir(exist_ok=True)
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
        path.write_text("{\n" + lines + "\n}\n")
    assert json.loads(path.read_text()) == found


SIZED = [*PUBLISHED, *ROUNDED]


@pytest.mark.parametrize("model", tiers(SIZED, quick=FEW, slow=[model for model in SIZED if model not in FEW]))
def test_parameter_counts_are_the_published_ones(model):
    count = sum(math.prod(leaf["shape"]) for leaf in parameters(model).values())
    if model in PUBLISHED:
        assert count == PUBLISHED[model]
    else:
        published, within = ROUNDED[model]
        assert abs(count - published) < within
    assert f"{count:,}" in (GIN / f"{model}.gin").read_text(), "what the file says of itself"
