"""Hugging Face directories of Llamas that follow a table: the token after each is chosen, so is every prediction."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, processors

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def table_llama(
    folder: Path,
    follow: Mapping[int, int],
    size: int = 32,
    tokenizer: Tokenizer | None = None,
    **fields,
) -> Path:
    """Makes a directory of config.json, safetensors and, where given, tokenizer.json.

    Args:
      folder: to make.
      follow: the token after each; token 0 follows the others.
      size: of the vocabulary, and of the one-hot embeddings; even.
      tokenizer: of the texts.
      **fields: of config.json; None leaves one out.

    Returns:
      `folder`.
    """
    folder.mkdir(parents=True)
    config = CONFIG | {"hidden_size": size, "vocab_size": size} | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    output = np.zeros((size, size), np.float32)
    for token in range(size):
        output[follow.get(token, 0), token] = 5.0
    layer = {f"self_attn.{name}_proj.weight": (size, size) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj.weight": (8, size) for name in ("gate", "up")} | {"mlp.down_proj.weight": (size, 8)}
    tensors = {f"model.layers.0.{name}": np.zeros(shape, np.float32) for name, shape in layer.items()}
    for name in ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = np.ones(size, np.float32)
    tensors |= {"model.embed_tokens.weight": np.eye(size, dtype=np.float32), "lm_head.weight": output}
    save_file(tensors, str(folder / "model.safetensors"))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def says(text: Sequence[str], first: int) -> dict[int, int]:
    """Returns the table that says pieces in their order, each numbered as `pieces` numbers them, and ends with EOS (2).

    Args:
      text: pieces of `pieces`, each once.
      first: the token that they follow.
    """
    ids = [first, *(3 + number for number in range(len(text))), 2]
    return dict(zip(ids, ids[1:]))


def pieces(*texts: str, template: Sequence[int] = (1,)) -> Tokenizer:
    """Returns a tokenizer of `<unk>`, `<s>`, `</s>` (ids 0, 1, 2) and of texts, which reads a text letter by letter.

    Args:
      *texts: the tokens from id 3 on.
      template: ids before each text.
    """
    names = ["<unk>", "<s>", "</s>", *texts]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(names[:3])
    tokenizer.decoder = decoders.Fuse()
    before = " ".join(names[token] for token in template)
    special = [(names[token], token) for token in template]
    tokenizer.post_processor = processors.TemplateProcessing(f"{before} $A".strip(), special_tokens=special)
    return tokenizer
