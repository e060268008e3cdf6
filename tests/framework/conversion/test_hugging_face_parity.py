"""Every family against transformers: its logits from its own directory, and the same directory back.

`tests/goldens/make_hugging_face.py` made the directories and what transformers computes from them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from converted import assert_same_directory, copy_of, logits_of
from safetensors.numpy import load_file, save_file

from meshway.framework.errors import UserError
from meshway.launch.convert import convert

FOLDER = Path(__file__).parents[2] / "goldens" / "hugging_face"
NAMES = sorted(path.name for path in FOLDER.iterdir())
QUICK = ("gemma3", "t5_1_1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_logits_are_those_of_transformers_and_the_directory_comes_back(name, tmp_path):
    expected = dict(np.load(FOLDER / name / "expected.npz"))
    logits = expected.pop("logits")
    found = logits_of(FOLDER / name, tmp_path / "run", expected)
    assert np.abs(found - logits).max() <= 2e-5 * np.abs(logits).max()
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_directory(tmp_path / "back", FOLDER / name)


def longt5_of(tmp_path, **config):
    """Returns a directory of LongT5 with the golden T5's weights, whose encoder has them under its own names."""
    directory = copy_of("t5_1_1", tmp_path)
    written = json.loads((directory / "config.json").read_text())
    written |= {"model_type": "longt5", "architectures": ["LongT5ForConditionalGeneration"], "global_block_size": 16}
    (directory / "config.json").write_text(json.dumps(written | {"encoder_attention_type": "local"} | config))
    tensors = load_file(directory / "model.safetensors")
    renamed = {
        name.replace("SelfAttention", "LocalSelfAttention") if name.startswith("encoder.") else name: value
        for name, value in tensors.items()
    }
    save_file(renamed, directory / "model.safetensors")
    return directory


def oracle(directory, batch):
    """The logits of T5 1.1, its encoder's attention as in Guo et al. 2022, section 3.1.

    A token's keys are those at most `local_radius` tokens away. Float64, one token after the other.
    """
    config = json.loads((directory / "config.json").read_text())
    weights = {name: value.astype(np.float64) for name, value in load_file(directory / "model.safetensors").items()}
    heads, size, radius = config["num_heads"], config["d_kv"], config["local_radius"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * weights[f"{name}.weight"]

    def bucket(distance, both_ways):
        """That of a key so many tokens after the query (Raffel et al. 2020, section 2.1)."""
        count = config["relative_attention_num_buckets"] // (2 if both_ways else 1)
        first = count if both_ways and distance > 0 else 0
        distance = abs(distance) if both_ways else max(-distance, 0)
        if distance < count // 2:
            return first + distance
        far = np.log(distance / (count // 2)) / np.log(config["relative_attention_max_distance"] / (count // 2))
        return first + min(count // 2 + int(far * (count - count // 2)), count - 1)

    def attend(x, source, name, sees, table=None, both_ways=False):
        query, key, value = (
            (given @ weights[f"{name}.{part}.weight"].T).reshape(-1, heads, size)
            for given, part in ((x, "q"), (source, "k"), (source, "v"))
        )
        out = np.zeros_like(query)
        for at in range(len(x)):
            seen = [other for other in range(len(source)) if sees(at, other)]
            scores = np.einsum("hd,khd->kh", query[at], key[seen])
            if table is not None:
                scores += weights[table][[bucket(other - at, both_ways) for other in seen]]
            shares = np.exp(scores - scores.max(0))
            out[at] = np.einsum("kh,khd->hd", shares / shares.sum(0), value[seen])
        return out.reshape(len(x), -1) @ weights[f"{name}.o.weight"].T

    def feed_forward(x, name):
        gate, line = (x @ weights[f"{name}.DenseReluDense.wi_{part}.weight"].T for part in (0, 1))
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * line) @ weights[f"{name}.DenseReluDense.wo.weight"].T

    def row(inputs, targets):
        x, y = weights["shared.weight"][inputs], weights["shared.weight"][targets]
        table = "{}.block.0.layer.0.{}.relative_attention_bias.weight"
        for number in range(config["num_layers"]):
            at = f"encoder.block.{number}.layer"
            x = x + attend(
                *[norm(x, f"{at}.0.layer_norm")] * 2, f"{at}.0.LocalSelfAttention",
                lambda one, other: abs(one - other) <= radius, table.format("encoder", "LocalSelfAttention"), True,
            )  # fmt: skip
            x = x + feed_forward(norm(x, f"{at}.1.layer_norm"), f"{at}.1")
        x = norm(x, "encoder.final_layer_norm")
        for number in range(config["num_decoder_layers"]):
            at = f"decoder.block.{number}.layer"
            y = y + attend(
                *[norm(y, f"{at}.0.layer_norm")] * 2, f"{at}.0.SelfAttention",
                lambda one, other: other <= one, table.format("decoder", "SelfAttention"),
            )  # fmt: skip
            y = y + attend(norm(y, f"{at}.1.layer_norm"), x, f"{at}.1.EncDecAttention", lambda one, other: True)
            y = y + feed_forward(norm(y, f"{at}.2.layer_norm"), f"{at}.2")
        return norm(y, "decoder.final_layer_norm") @ weights["lm_head.weight"].T

    found = np.zeros((*batch["decoder_input_ids"].shape, config["vocab_size"]))
    for number, (mask, own) in enumerate(zip(batch["attention_mask"], batch["decoder_attention_mask"], strict=True)):
        inputs, targets = batch["input_ids"][number][mask > 0], batch["decoder_input_ids"][number][own > 0]
        found[number][own > 0] = row(inputs, targets)
    return found


def test_longt5_attends_within_its_radius(tmp_path):
    """As wide as rows it is T5, whose logits are transformers'; narrower it is what the paper says."""
    batch = dict(np.load(FOLDER / "t5_1_1" / "expected.npz"))
    whole = batch.pop("logits")
    wide = longt5_of(tmp_path / "wide", local_radius=batch["input_ids"].shape[1])
    np.testing.assert_allclose(oracle(wide, batch), whole, atol=2e-5 * np.abs(whole).max())
    narrow = longt5_of(tmp_path / "narrow", local_radius=2)
    expected = oracle(narrow, batch)
    assert np.abs(expected - whole).max() > 0.1 * np.abs(whole).max()
    found = logits_of(narrow, tmp_path / "run", batch)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert "models/longt5/common.gin" in (tmp_path / "run" / "recipe.gin").read_text()
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["local_radius"] == 2
    back, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", narrow))
    assert {name: value.tobytes() for name, value in back.items()} == {
        name: value.tobytes() for name, value in before.items()
    }


def test_longt5s_other_attention_is_refused_by_name(tmp_path):
    directory = longt5_of(tmp_path, encoder_attention_type="transient-global")
    with pytest.raises(UserError, match="encoder_attention_type = 'transient-global' is not supported .*'local'"):
        convert(str(directory), str(tmp_path / "run"))
