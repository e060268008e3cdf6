"""Random configurations against transformers itself: in, the same logits, out again. Needs the extra `oracle`."""

from pathlib import Path

import numpy as np
import pytest
from converted import logits_of

from meshway.launch.convert import convert

pytest.importorskip("torch", reason="the extra `oracle` is not installed")
pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
pytestmark = pytest.mark.proofs

SEEDS = range(3)
ROPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 1.7},
    {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 64, "beta_fast": 9.0},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
)


def decoder(random, ropes=ROPES):
    """Sizes that few models have; transformers wants Gemma 3's width to be a multiple of the heads."""
    kv_heads = int(random.integers(1, 4))
    heads = kv_heads * int(random.integers(1, 5))
    theta = float(random.choice([50.0, 10000.0, 1e6]))
    return {
        "vocab_size": int(random.integers(30, 120)),
        "hidden_size": heads * 2 * int(random.integers(2, 5)),
        "intermediate_size": int(random.integers(9, 50)),
        "num_hidden_layers": int(random.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * int(random.integers(2, 9)),
        "max_position_embeddings": 512,
        "rms_norm_eps": float(random.choice([1e-6, 1e-3])),
        "tie_word_embeddings": bool(random.integers(2)),
        "rope_parameters": ropes[random.integers(len(ropes))] | {"rope_theta": theta},
    }


def gemma(random):
    return decoder(random, ROPES[:1]) | {
        "query_pre_attn_scalar": int(random.integers(4, 40)),
        "sliding_window": int(random.integers(2, 9)),
        "tie_word_embeddings": True,
    }


def gemma2(random):
    caps = {"attn_logit_softcapping": float(random.uniform(1, 5)), "final_logit_softcapping": 4.0}
    return gemma(random) | (caps if random.integers(2) else {"attn_logit_softcapping": None})


def gemma3(random):
    layers = int(random.integers(1, 8))
    full = ROPES[random.integers(2)] | {"rope_theta": 900.0}
    local = {"rope_type": "default", "rope_theta": 30.0}
    return gemma(random) | {
        "num_hidden_layers": layers,
        "sliding_window_pattern": int(random.integers(2, 5)),
        "rope_parameters": {"sliding_attention": local, "full_attention": full},
    }


def qwen2(random):
    made = decoder(random)
    made["head_dim"] = made["hidden_size"] // made["num_attention_heads"]
    return {name: made[name] for name in made if name != "head_dim"}


def gpt2(random):
    heads = int(random.integers(1, 8))
    return {
        "vocab_size": 71,
        "n_embd": heads * int(random.integers(2, 8)),
        "n_head": heads,
        "n_layer": int(random.integers(1, 4)),
        "n_positions": int(random.integers(13, 40)),
        "n_inner": None,
        "activation_function": str(random.choice(["gelu_new", "relu", "gelu"])),
        "bos_token_id": 70,
        "eos_token_id": 70,
    }


def t5(random):
    return {
        "vocab_size": int(random.integers(30, 120)),
        "d_model": int(random.integers(8, 40)),
        "d_kv": int(random.integers(2, 12)),
        "d_ff": int(random.integers(8, 50)),
        "num_heads": int(random.integers(1, 8)),
        "num_layers": int(random.integers(1, 4)),
        "num_decoder_layers": int(random.integers(1, 4)),
        "relative_attention_num_buckets": 2 * int(random.integers(4, 17)),
        "relative_attention_max_distance": int(random.integers(20, 200)),
        "feed_forward_proj": str(random.choice(["relu", "gated-gelu", "gated-silu"])),
    }


KINDS = {  # transformers' name -> (options, whether it may be given an output layer of its own)
    "gemma2": (gemma2, False),
    "gemma3_text": (gemma3, False),
    "gpt2": (gpt2, False),
    "llama": (lambda random: decoder(random) | {"mlp_bias": False}, False),
    "mistral": (lambda random: decoder(random) | {"sliding_window": int(random.integers(2, 9))}, False),
    "mixtral": (
        lambda random: decoder(random, ROPES[:1]) | {"num_local_experts": int(random.integers(2, 7))},
        False,
    ),
    "mt5": (t5, True),
    "qwen2": (qwen2, False),
    "qwen3": (decoder, False),
    "t5": (lambda random: t5(random) | {"tie_word_embeddings": False}, True),
    "umt5": (lambda random: t5(random) | {"tie_word_embeddings": False}, True),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_goes_in_and_out(kind, seed, tmp_path):
    from goldens import make_hugging_face as oracle

    random = np.random.default_rng([seed, list(KINDS).index(kind)])
    options, may_be_untied = KINDS[kind]
    model = oracle.make(kind, options(random), seed, untied=may_be_untied and bool(random.integers(2)))
    batch = oracle.random_batch(model.config, seed)
    expected = oracle.logits_of(model, batch)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    found = logits_of(tmp_path / "theirs", tmp_path / "run", batch)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max(), model.config
    convert(str(tmp_path / "run"), str(tmp_path / "ours"))
    np.testing.assert_array_equal(oracle.logits_of(oracle.read(type(model), tmp_path / "ours"), batch), expected)


def test_the_goldens_go_out_to_transformers(tmp_path):
    """Each golden, taken in and written again, loads with no missing or unexpected key and gives its logits."""
    import transformers
    from goldens import make_hugging_face as oracle

    for folder in sorted(path for path in oracle.FOLDER.iterdir()):
        name = folder.name
        convert(str(folder), str(tmp_path / name / "run"))
        convert(str(tmp_path / name / "run"), str(tmp_path / name / "ours"), dtype="float32")
        config = transformers.AutoConfig.from_pretrained(tmp_path / name / "ours")
        kind = getattr(transformers, config.architectures[0])
        expected = dict(np.load(Path(folder) / "expected.npz"))
        logits = expected.pop("logits")
        found = oracle.logits_of(oracle.read(kind, tmp_path / name / "ours"), expected)
        assert np.abs(found - logits).max() <= 2e-6 * np.abs(logits).max(), name  # another torch than made them
