"""Makes `tests/goldens/hugging_face/`: small random models of Hugging Face transformers, and the logits they compute.

Needs the extra `oracle` (torch and transformers 5); run `python tests/goldens/make_hugging_face.py [NAME ...]` from the
repository's root. No test imports it but `test_hugging_face_live.py`, which is skipped where torch is missing.

Each folder holds what a published checkpoint holds, `config.json` and `model.safetensors`, and `expected.npz`:
`input_ids` and `attention_mask` int32 [rows, length] (padding on the right), for encoder-decoders `decoder_input_ids`
and `decoder_attention_mask` too, and `logits` float32 [rows, length, vocab], computed in float32 with eager attention.
"""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "hugging_face"
ROWS, LENGTH, DECODER_LENGTH = 3, 13, 7
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden.

    Attributes:
      model_type: as transformers calls it.
      options: of its configuration.
      published: keys of `config.json` put in place of those that transformers 5 writes, None to take one out: older
        checkpoints spell some of them otherwise.
      max_shard: above this size (such as "20KB") the weights are cut into several files with an index.
      dtype: what the file holds; the values are rounded to it, and logits are computed in float32 all the same.
      untied: give the model an output layer of its own, where transformers 5 ties it by itself (T5 1.1, mT5, umT5).
    """

    model_type: str
    options: Mapping[str, Any]
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_shard: str = "1GB"
    dtype: torch.dtype = torch.float32
    untied: bool = False


T5 = {"vocab_size": 67, "d_model": 20, "d_kv": 6, "d_ff": 22, "num_heads": 3, "num_layers": 2}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
DECODER = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GPT2 = {
    "vocab_size": 67,
    "n_embd": 30,
    "n_head": 5,
    "n_layer": 2,
    "n_positions": 16,
    "n_inner": 50,
    "layer_norm_epsilon": 1e-2,
    "bos_token_id": 66,
    "eos_token_id": 66,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {"query_pre_attn_scalar": 20, "sliding_window": 5, "head_dim": 6, "intermediate_size": 22}

CASES = {
    "t5_1_0": Case("t5", T5 | {"feed_forward_proj": "relu"}),
    "t5_1_1": Case(
        "t5",
        T5 | GATED | {"num_decoder_layers": 3},
        published={"tie_word_embeddings": False, "scale_decoder_outputs": None},
        untied=True,
    ),
    "t5_1_1_tied": Case("t5", T5 | GATED | {"num_layers": 1}),
    "mt5": Case(
        "mt5",
        T5 | {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 9, "layer_norm_epsilon": 1e-3},
        published={"tie_word_embeddings": False},
        untied=True,
    ),
    "gpt2": Case("gpt2", GPT2),
    "llama2": Case("llama", DECODER | {"num_key_value_heads": 6, "tie_word_embeddings": True, "num_hidden_layers": 1}),
    "llama3": Case(
        "llama",
        DECODER | {"rope_parameters": LLAMA_3 | {"rope_theta": 500.0}, "max_position_embeddings": 512},
        published={"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": LLAMA_3},
        max_shard="20KB",
    ),
    "llama_linear": Case(
        "llama",
        DECODER
        | {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
            "tie_word_embeddings": True,
            "num_hidden_layers": 1,
        },
        published={
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "head_dim": 8,
        },
    ),
    "llama_yarn": Case(
        "llama",
        DECODER
        | {
            "rope_parameters": YARN,
            "max_position_embeddings": 512,
            "num_hidden_layers": 1,
            "head_dim": 12,
        },
    ),
    "gemma2": Case(
        "gemma2",
        DECODER | GEMMA | {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Case(
        "gemma3_text",
        DECODER
        | GEMMA
        | {
            "num_hidden_layers": 5,
            "sliding_window_pattern": 3,
            "intermediate_size": 14,
            "rope_theta": 3000.0,
            "rope_local_base_freq": 10.0,
        },
        published={
            "_sliding_window_pattern": None,
            "layer_types": None,
            "rope_parameters": None,
            "sliding_window_pattern": 3,
            "rope_theta": 3000.0,
            "rope_local_base_freq": 10.0,
        },
    ),
    "gemma3_linear": Case(
        "gemma3_text",
        DECODER
        | GEMMA
        | {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            },
        },
    ),
    "qwen2_5": Case("qwen2", {name: DECODER[name] for name in DECODER if name != "head_dim"}),
    "qwen3": Case(
        "qwen3", DECODER | {"head_dim": 10, "tie_word_embeddings": True, "rms_norm_eps": 1e-2, "rope_theta": 70.0}
    ),
    "mistral": Case("mistral", DECODER | {"sliding_window": 4}, dtype=torch.bfloat16),
    "mixtral": Case("mixtral", DECODER | {"intermediate_size": 14, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "umt5": Case(
        "umt5",
        T5
        | GATED
        | {"num_decoder_layers": 3, "relative_attention_num_buckets": 12}
        | {"relative_attention_max_distance": 9},
        published={"tie_word_embeddings": False, "scale_decoder_outputs": None, "scalable_attention": True},
        untied=True,
    ),
}


def make(model_type: str, options: Mapping[str, Any], seed: int, untied: bool = False) -> transformers.PreTrainedModel:
    """Returns a random model of any configuration, float32, with eager attention.

    Weights are much larger than a fresh model's, norms and biases far from one and zero, so that each matters.
    """
    config = transformers.AutoConfig.for_model(model_type, attn_implementation="eager", **options)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    config._experts_implementation = "eager"
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # a norm's scale or a bias: around what it starts with
                parameter.add_(0.3 * noise)
            elif id(parameter) in tables:
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[0 if model_type == "gpt2" else -1]
                parameter.copy_(1.2 * fan_in**-0.5 * noise)
    return model


def read(kind: type[transformers.PreTrainedModel], folder: Path) -> transformers.PreTrainedModel:
    """Returns the model in a folder, float32; raises AssertionError for a missing, unexpected or misshapen tensor."""
    model, report = kind.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), f"{folder}: {report}"
    model.config._experts_implementation = "eager"  # grouped products want rows of whole 16 bytes
    return model.eval()


def random_batch(config: transformers.PreTrainedConfig, seed: int) -> Batch:
    """Returns rows of random tokens, each but the first padded on the right."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> tuple[np.ndarray, np.ndarray]:
        mask = (np.arange(length) < np.array([length, length - 3, 2])[:, None]).astype(np.int32)
        return (random.integers(2, config.vocab_size, (ROWS, length)) * mask).astype(np.int32), mask

    batch = dict(zip(("input_ids", "attention_mask"), tokens(LENGTH), strict=True))
    if config.is_encoder_decoder:
        batch |= dict(zip(("decoder_input_ids", "decoder_attention_mask"), tokens(DECODER_LENGTH), strict=True))
        batch["decoder_input_ids"][:, 0] = 0
    return batch


def logits_of(model: transformers.PreTrainedModel, batch: Batch) -> np.ndarray:
    """Returns float32 [rows, length, vocab], zero where the query is padding."""
    with torch.no_grad():
        inputs = {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}
        logits = model(**inputs, use_cache=False).logits.numpy()
    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
    return logits.astype(np.float32) * mask[..., None]


def check_that_all_matters(model: transformers.PreTrainedModel, batch: Batch) -> None:
    """Raises AssertionError where changing a parameter (an expert of it, where it holds several) leaves all logits."""
    before = logits_of(model, batch)
    for name, parameter in model.named_parameters():
        parts: Sequence[Any] = range(parameter.shape[0]) if parameter.ndim == 3 else [slice(None)]
        for part in parts:
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter[part] += 0.2 * torch.randn(parameter[part].shape, generator=torch.Generator().manual_seed(1))
            change = np.abs(logits_of(model, batch) - before).max()
            with torch.no_grad():
                parameter.copy_(kept)
            assert change > 1e-3 * np.abs(before).max(), f"{name}[{part}] changes the logits by {change} only"


def store(folder: Path, model: transformers.PreTrainedModel, batch: Batch, case: Case) -> None:
    """Writes one golden folder, afresh."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = copy.deepcopy(model).to(case.dtype)  # a copy: rotary frequencies would be rounded too
    stored.config.dtype = case.dtype
    stored.save_pretrained(folder, max_shard_size=case.max_shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in case.published.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(folder / "expected.npz", **batch, logits=logits_of(model, batch))


def main(names: Sequence[str]) -> None:
    """Makes the named goldens, or all."""
    for name in names or CASES:
        case, seed = CASES[name], list(CASES).index(name)
        model = make(case.model_type, case.options, seed, case.untied)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(case.dtype))
        batch = random_batch(model.config, seed)
        check_that_all_matters(model, batch)
        store(FOLDER / name, model, batch, case)
        again = read(type(model), FOLDER / name)
        difference = np.abs(logits_of(again, batch) - np.load(FOLDER / name / "expected.npz")["logits"]).max()
        assert difference == 0, f"{name}: read again, the logits differ by {difference}"
        size = sum(path.stat().st_size for path in (FOLDER / name).iterdir())
        print(f"{name}: {model.num_parameters()} parameters, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
