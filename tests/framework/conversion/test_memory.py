"""Weights pass through memory tensor by tensor, in and out."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from meshway.framework.conversion.hugging_face import FAMILIES
from meshway.framework.conversion.rules import pieces_of
from meshway.framework.conversion.tensor_files import Spec, write_tensors

WIDTH, HIDDEN, LAYERS = 512, 2048, 32
CONFIG = {
    "model_type": "llama", "vocab_size": 500, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8,
}  # fmt: skip
PROGRAM = """
    import resource, sys
    from meshway.launch.convert import convert

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small, large, folder = sys.argv[1:]
    convert(small, folder + "/warm")
    convert(folder + "/warm", folder + "/warm_back")
    before = peak()
    convert(large, folder + "/run")
    between = peak()
    convert(folder + "/run", folder + "/back", max_shard_size="100MB")
    print("peaks", between - before, peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Of 540 MB of weights, of which one of our parameters has 134 MB and a tensor 4 MB, 100 MB are never there."""
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(CONFIG))
    block = "decoder/block_0/"
    square = {f"{block}attention/{name}/kernel": (LAYERS, WIDTH, 8, 64) for name in ("query", "key", "value")}
    shapes = square | {
        "token_embedding/embedding": (500, WIDTH),
        f"{block}attention_norm/scale": (LAYERS, WIDTH),
        f"{block}attention/out/kernel": (LAYERS, 8, 64, WIDTH),
        f"{block}mlp_norm/scale": (LAYERS, WIDTH),
        f"{block}mlp/wi_0/kernel": (LAYERS, WIDTH, HIDDEN),
        f"{block}mlp/wi_1/kernel": (LAYERS, WIDTH, HIDDEN),
        f"{block}mlp/wo/kernel": (LAYERS, HIDDEN, WIDTH),
        "decoder_norm/scale": (WIDTH,),
        "logits/kernel": (WIDTH, 500),
    }
    pieces = pieces_of(FAMILIES["llama"].rules, "model.", shapes)
    specs = {piece.theirs: Spec(piece.their_shape, np.dtype(np.float32)) for piece in pieces}
    random = np.random.default_rng(0)
    write_tensors(large, specs, lambda name: random.standard_normal(specs[name].shape, np.float32), 10**8)
    total = sum(spec.num_bytes for spec in specs.values())
    assert total > 530e6
    small = os.path.join(os.path.dirname(__file__), "..", "..", "goldens", "hugging_face", "llama3")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), small, str(large), str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("peaks")]
    assert lines, done.stderr
    assert max(int(word) for word in lines[0].split()[1:]) < 100e6, lines
