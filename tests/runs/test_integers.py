"""The quickstart in integers: what it learns by products of int8, and what weights and a cache of int8 cost it."""

import re

import pytest
from running import lines, start

PRODUCTS = ("--gin.PRODUCTS=@integer_products.IntegerProduct()",)
STEPS = ("--gin.TRAIN_STEPS=300", "--gin.EVAL_PERIOD=300", "--gin.CHECKPOINT_PERIOD=300")


@pytest.mark.proofs
def test_the_quickstart_in_integers(tmp_path):
    """A loss within 0.05 nats of float32's at the end; with int8 weights and cache, distributions within 1e-3 nats a
    token and metrics within a point, in little more than half of bfloat16's bytes."""

    def said(*words):
        process = start(*words, cwd=tmp_path)
        text, _ = process.communicate(timeout=3600)
        assert process.returncode == 0, text
        return text

    found = {}
    for name, more in (("float32", ()), ("int8", PRODUCTS)):
        said("train", "--gin_file=quickstart", f"--gin.MODEL_DIR={tmp_path / name}", *STEPS, *more)
        reports = [each["loss"] for each in lines(tmp_path / name / "metrics.jsonl") if "loss" in each]
        found[name] = sum(reports[-5:]) / 5, reports[0]
    assert found["float32"][0] < 0.2 * found["float32"][1], "it learned"
    assert abs(found["int8"][0] - found["float32"][0]) <= 0.05

    text = said("eval", f"--model_dir={tmp_path / 'float32'}", "--weights=int8", "--cache=int8")
    (share,) = re.findall(r"([\d.]+) of what they do in bfloat16", text)
    assert 0.5 <= float(share) < 0.55
    divergences = [float(each) for each in re.findall(r"KL divergence (\S+) nats", text)]
    assert len(divergences) == 2 and max(divergences) < 1e-3
    ((before, after),) = re.findall(r"exact_match +([\d.]+) +([\d.]+)", text)
    assert abs(float(after) - float(before)) <= 1.0
