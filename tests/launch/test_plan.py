"""`meshway plan` from the command line: what it reads of a recipe, what it prints, what it refuses."""

import dataclasses
import json
import re
from typing import Any

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli, plan
from meshway.launch.recipe import config

PALM = ("plan", "--gin_file=models/palm/540b.gin", "--topology=v4:4x4x4")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_palm_on_64_chips(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *PALM, "--phase=decode", "--batch=64", "--context=2048", "--weights=int8")
    assert found["model"]["num_params"] == 540_356_474_880 and found["model"]["parallel"] and found["model"]["tied"]
    assert found["topology"] == {"name": "v4:4x4x4", "kind": "TPU v4", "chips": 64}
    best = found["phases"]["decode"]["layouts"][0]
    assert (best["mesh"], best["feed_forward"], best["attention"]) == ([4, 4, 4], "2D", "batch-xyz")
    assert best["bound"] == "memory" and best["fits"]
    times = [layout["seconds"] for layout in found["phases"]["decode"]["layouts"]]
    assert len(times) > 20 and times == sorted(times)
    # Collectives beside products: both ways hide most of what they take alone, and less than one would wish.
    assert max(best["compute"], best["memory"]) < best["bidirectional"] < min(best["one_way"], best["seconds"])


def test_both_phases_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PALM, "--batch=512", "--new_tokens=64"]) == 0
    text, log = capsys.readouterr()
    assert log.count("reading the recipe models/palm/540b.gin ...\n") == 1, "variants of it are not announced"
    assert "64 x TPU v4, 32.0 GiB each" in text and "118 layers, d_model 18432, d_ff 73728 (gated, parallel)" in text
    assert "prefill of 512 sequences, 2,048 tokens each" in text
    assert "a step of decoding of 512 sequences, 2,112 tokens each" in text
    assert len(re.findall(r"the first with Layout.products = 'one_way' \S+ \S+ or 'bidirectional' ", text)) == 2
    assert "one copy of the weights, for a prompt and 64 steps of decoding" in text and "decoding by 2D" in text
    assert "--gin.LAYOUT=inference/2d_batch_xyz_after_weight_gathered_xy " in text and "next inference/" in text


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (
            "t5_1_1/xxl",
            {"layers": 24, "encoder_layers": 24, "d_ff": 10240, "num_kv_heads": 64, "gated": True, "tied": False},
        ),
        ("llama/3_70b", {"layers": 80, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "parallel": False}),
        ("gpt2/small", {"layers": 12, "d_ff": 3072, "gated": False, "tied": True, "vocab_size": 50257}),
    ],
)
def test_sizes_are_read_from_the_recipe(recipe: str, wanted: dict[str, object]) -> None:
    found = plan.plan(**arguments("plan", f"--gin_file=models/{recipe}.gin", "--topology=h100:8")).model
    assert {name: getattr(found, name) for name in wanted} == wanted


def test_gpus_beyond_one_switch_are_said(palm: dict[str, Any]) -> None:
    found = [plan.format_plan(plan.plan(**palm | {"topology": name})) for name in ("b200:8", "b200:16")]
    assert ["GPUs are counted as joined by one switch" in text for text in found] == [False, True]


@pytest.fixture(scope="module")
def palm() -> dict[str, Any]:
    """The arguments that the recipe of PaLM 540B gives to `plan`."""
    return arguments(*PALM)


def arguments(*words: str) -> dict[str, Any]:
    invocation = cli.parse(list(words))
    assert invocation is not None
    invocation = dataclasses.replace(invocation, subject="plan")
    return config.load(invocation, import_unreferenced=False).build("plan.plan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5q:4"}, "--topology: topology 'v5q:4': no accelerator is called 'v5q'; did you mean 'v5p'"),
        ({"topology": "v4:8x8"}, "a torus of 3 dimensions, and it has 2: write it as v4:4x4x4"),
        (
            {"topology": "v4:2x2x2"},
            "prefill does not fit: v4:2x2x2 has 32.0 GiB a chip, and the layout that needs least keeps 125.8 GiB of",
        ),
        ({"topology": "v4:2x2x2"}, "; it fits with --topology=v4:4x4x2"),
        ({"topology": "v4:4x4x2", "weights": "float32"}, "; it fits with --weights=int8 or --topology=v4:4x4x4"),
    ],
)
def test_what_does_not_fit(palm: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan.plan(**palm | {"batch": 8} | options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (PALM[:2], "meshway plan needs --topology=CHIP:SIDES"),
        ((*PALM, "--weights=int4"), "'int4' is not one of float32, bfloat16, int8"),
        ((*PALM, "--phase=score"), "--phase=score is planned by compiling it: add --compile"),
        ((*PALM, "--phase=decoding"), "did you mean 'decode'"),
        ((*PALM, "--fit"), "--fit: for plans of training alone"),
        ((*PALM, "--batch=0"), "'0' is not a whole number of at least 1"),
        (("plan", "--gin_file=models/mixtral/8x7b.gin", PALM[2]), "costs of mixtures of experts are not estimated"),
        (("plan", "--gin_file=models/bert/base.gin", PALM[2]), "layouts are chosen for transformers that decode"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_programs_of_inference_are_compiled_beside_their_closed_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """By the layout that was chosen: weights by layer in bfloat16 are the closed forms', norms aside; keys and values
    are, where rows and heads divide."""
    tiny = ("plan", "--gin_file=models/llama/tiny.gin", "--topology=cpu:8", "--batch=8", "--context=32", "--compile")
    found = planned(capsys, *tiny, "--new_tokens=8")
    prefill, step = found["compiled"]
    assert (prefill["phase"], step["phase"]) == ("prefill", "decode")
    for each in found["compiled"]:
        memory, forms = dict(each["memory"]), each["closed_forms"]
        assert each["layout"] == found["choice"]["layout"] and list(each["mesh"].values()) == found["choice"]["mesh"]
        total, capacity = memory.pop("total"), memory.pop("capacity")
        assert total == sum(memory.values()) < capacity and min(memory.values()) >= 0
        assert memory["weights"] == pytest.approx(forms["weights"], rel=0.01)
        assert sum(one["sent"] for one in each["sent"]) > forms["sent"] > 0 and not each["unread"]
    assert step["memory"]["keys and values"] == step["closed_forms"]["cache"]
    (score,) = planned(capsys, *tiny, "--phase=score", "--gin.LAYOUT=inference/1d")["compiled"]
    assert (score["phase"], score["layout"], score["closed_forms"]) == ("score", "inference/1d", None)
    assert score["memory"]["keys and values"] == 0 and score["sent"]
