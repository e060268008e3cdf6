"""Decoders: Llama, Qwen, Mistral, Mixtral and Gemma, with rotary positions and tensors that are named alike; and GPT-2:
learned positions, LayerNorm with biases, queries, keys and values in one tensor, kernels as [in, out]."""

import dataclasses
from typing import Any

from meshway.framework.conversion.family import Family
from meshway.framework.conversion.positions import Layers, Rope, Window
from meshway.framework.conversion.rules import Form, Rule
from meshway.framework.conversion.settings import (
    Fixed,
    HeadDim,
    InverseRoot,
    Same,
    Setting,
    Table,
    activation,
    same_in_words,
)

LAYER = "{base}layers.{layer}."
OURS = "decoder/{block}/"

SIZES: tuple[Setting, ...] = (
    Same("vocab_size", "VOCAB_SIZE"),
    Same("hidden_size", "D_MODEL"),
    Same("intermediate_size", "D_FF"),
    Same("num_hidden_layers", "NUM_LAYERS"),
    Same("num_attention_heads", "NUM_HEADS"),
    Same(
        "num_key_value_heads", "NUM_KV_HEADS", like=("num_attention_heads", "NUM_HEADS"), divides="num_attention_heads"
    ),
    HeadDim("head_dim"),
    Same("rms_norm_eps", "NORM_EPSILON"),
    same_in_words("tie_word_embeddings", "TIED_LOGITS", False, True),
)
BIASES = Table("attention_bias", "ATTENTION_BIASES", ((False, ()), (True, ("query", "key", "value", "out"))))
ATTENTION = (
    Rule(LAYER + "self_attn.q_proj.weight", OURS + "attention/query/kernel",
         Form("(heads head_dim) embed -> embed heads head_dim")),
    Rule(LAYER + "self_attn.k_proj.weight", OURS + "attention/key/kernel",
         Form("(kv_heads head_dim) embed -> embed kv_heads head_dim")),
    Rule(LAYER + "self_attn.v_proj.weight", OURS + "attention/value/kernel",
         Form("(kv_heads head_dim) embed -> embed kv_heads head_dim")),
    Rule(LAYER + "self_attn.o_proj.weight", OURS + "attention/out/kernel",
         Form("embed (heads head_dim) -> heads head_dim embed")),
    Rule(LAYER + "self_attn.q_proj.bias", OURS + "attention/query/bias", Form("(heads head_dim) -> heads head_dim")),
    Rule(LAYER + "self_attn.k_proj.bias", OURS + "attention/key/bias",
         Form("(kv_heads head_dim) -> kv_heads head_dim")),
    Rule(LAYER + "self_attn.v_proj.bias", OURS + "attention/value/bias",
         Form("(kv_heads head_dim) -> kv_heads head_dim")),
    Rule(LAYER + "self_attn.o_proj.bias", OURS + "attention/out/bias", Form("embed -> embed")),
    Rule(LAYER + "self_attn.q_norm.weight", OURS + "attention/query_norm/scale", Form("head_dim -> head_dim")),
    Rule(LAYER + "self_attn.k_norm.weight", OURS + "attention/key_norm/scale", Form("head_dim -> head_dim")),
)  # fmt: skip
MLP = tuple(
    Rule(f"{LAYER}mlp.{theirs}.{kind[0]}", f"{OURS}mlp/{ours}/{kind[1]}", form)
    for theirs, ours, form in (
        ("gate_proj", "wi_0", Form("mlp embed -> embed mlp")),
        ("up_proj", "wi_1", Form("mlp embed -> embed mlp")),
        ("down_proj", "wo", Form("embed mlp -> mlp embed")),
    )
    for kind, form in ((("weight", "kernel"), form), (("bias", "bias"), Form("out -> out")))
)
NORMS = (
    Rule(LAYER + "input_layernorm.weight", OURS + "attention_norm/scale", Form("embed -> embed")),
    Rule(LAYER + "post_attention_layernorm.weight", OURS + "mlp_norm/scale", Form("embed -> embed")),
)
ENDS = (
    Rule("{base}embed_tokens.weight", "token_embedding/embedding", Form("vocab embed -> vocab embed")),
    Rule("{base}norm.weight", "decoder_norm/scale", Form("embed -> embed")),
    Rule("lm_head.weight", "logits/kernel", Form("vocab embed -> embed vocab")),
)
EXPERTS = (
    Rule(LAYER + "block_sparse_moe.gate.weight", OURS + "mlp/router/kernel", Form("expert embed -> embed expert")),
    *(
        Rule(LAYER + "block_sparse_moe.experts.{expert}." + theirs + ".weight", OURS + "mlp/experts/" + ours, form)
        for theirs, ours, form in (
            ("w1", "wi_0", Form("mlp embed -> embed mlp")),
            ("w3", "wi_1", Form("mlp embed -> embed mlp")),
            ("w2", "wo", Form("embed mlp -> mlp embed")),
        )
    ),
)
# What transformers takes for fields that config.json leaves out, of those on which the families agree.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SETTINGS = (*SIZES, Rope(), activation("hidden_act", gated=True))

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    defaults=DEFAULTS
    | {"intermediate_size": 11008, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    settings=(*_SETTINGS, BIASES, same_in_words("mlp_bias", "MLP_BIAS", False, True)),
    rules=(*ENDS, *NORMS, *ATTENTION, *MLP),
    bases=("model.", ""),
    copies={"lm_head.weight": "{base}embed_tokens.weight"},
    ignored=(r".*rotary_emb\.inv_freq",),
)
QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2_5",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    defaults=DEFAULTS
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    settings=(*_SETTINGS, Layers(starts="max_window_layers"), Fixed("use_mrope", (False, None))),
    written={"use_sliding_window": False},
)
QWEN3 = dataclasses.replace(
    QWEN2,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    settings=(*_SETTINGS, BIASES, Layers(starts="max_window_layers")),
)
MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    defaults=DEFAULTS
    | {
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    settings=(*_SETTINGS, Window()),
)
MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    defaults={
        **MISTRAL.defaults,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_jitter_noise": 0.0,
    },
    settings=(
        *SIZES,
        Rope(theta=1e6),
        activation("hidden_act", gated=True),
        Window(),
        Same("num_local_experts", "NUM_EXPERTS"),
        Same("num_experts_per_tok", "routers.TopK.k"),
        Fixed("router_jitter_noise", (0.0, None)),
    ),
    rules=(*ENDS, *NORMS, *ATTENTION, *EXPERTS),
    silent=frozenset({"output_router_logits", "router_aux_loss_coef"}),
)


_GPT2_LAYER, _GPT2_OURS = "{base}h.{layer}.", "decoder/{block}/"
_GPT2_SILENT = """resid_pdrop embd_pdrop attn_pdrop n_ctx reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"""
_GPT2_QKV = ("query", "key", "value")

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    settings=(
        Same("vocab_size", "VOCAB_SIZE"),
        Same("n_embd", "D_MODEL"),
        HeadDim(None, "n_embd", "n_head"),
        Same("n_inner", "D_FF", like=("n_embd", "D_MODEL"), times=4),
        Same("n_layer", "NUM_LAYERS"),
        Same("n_head", "NUM_HEADS"),
        Same("n_positions", "NUM_POSITIONS"),
        Same("layer_norm_epsilon", "NORM_EPSILON"),
        activation("activation_function", gated=False),
        same_in_words("tie_word_embeddings", "TIED_LOGITS", True, False),
        Same("scale_attn_weights", "attention.Attention.scale_logits", default=True),
        Fixed("scale_attn_by_inverse_layer_idx", (False, None)),
    ),
    rules=(
        Rule("{base}wte.weight", "token_embedding/embedding", Form("vocab embed -> vocab embed")),
        Rule("{base}wpe.weight", "position_embedding/embedding", Form("positions embed -> positions embed")),
        *(
            Rule(f"{_GPT2_LAYER}{theirs}.{kind[0]}", f"{_GPT2_OURS}{ours}/{kind[1]}", Form("embed -> embed"))
            for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm"))
            for kind in (("weight", "scale"), ("bias", "bias"))
        ),
        Rule(
            _GPT2_LAYER + "attn.c_attn.weight",
            tuple(f"{_GPT2_OURS}attention/{name}/kernel" for name in _GPT2_QKV),
            Form("embed (part heads head_dim) -> part embed heads head_dim"),
        ),
        Rule(
            _GPT2_LAYER + "attn.c_attn.bias",
            tuple(f"{_GPT2_OURS}attention/{name}/bias" for name in _GPT2_QKV),
            Form("(part heads head_dim) -> part heads head_dim"),
        ),
        Rule(
            _GPT2_LAYER + "attn.c_proj.weight",
            _GPT2_OURS + "attention/out/kernel",
            Form("(heads head_dim) embed -> heads head_dim embed"),
        ),
        Rule(_GPT2_LAYER + "attn.c_proj.bias", _GPT2_OURS + "attention/out/bias", Form("embed -> embed")),
        Rule(_GPT2_LAYER + "mlp.c_fc.weight", _GPT2_OURS + "mlp/wi_0/kernel", Form("embed mlp -> embed mlp")),
        Rule(_GPT2_LAYER + "mlp.c_fc.bias", _GPT2_OURS + "mlp/wi_0/bias", Form("mlp -> mlp")),
        Rule(_GPT2_LAYER + "mlp.c_proj.weight", _GPT2_OURS + "mlp/wo/kernel", Form("mlp embed -> mlp embed")),
        Rule(_GPT2_LAYER + "mlp.c_proj.bias", _GPT2_OURS + "mlp/wo/bias", Form("embed -> embed")),
        Rule("{base}ln_f.weight", "decoder_norm/scale", Form("embed -> embed")),
        Rule("{base}ln_f.bias", "decoder_norm/bias", Form("embed -> embed")),
        Rule("lm_head.weight", "logits/kernel", Form("vocab embed -> embed vocab")),
    ),
    bases=("transformer.", ""),
    copies={"lm_head.weight": "{base}wte.weight"},
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    silent=frozenset(_GPT2_SILENT.split()),
)


_GEMMA_NORMS = tuple(
    Rule(f"{LAYER}{theirs}.weight", f"{OURS}{ours}/scale", Form("embed -> embed"))
    for theirs, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
)
_GEMMA_DEFAULTS = DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": False,
}
_GEMMA_SETTINGS = (
    *SIZES,
    activation("hidden_activation", gated=True),
    InverseRoot("query_pre_attn_scalar", "QUERY_SCALE"),
    BIASES,
    Fixed("use_bidirectional_attention", (False, None)),
)

GEMMA2 = dataclasses.replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    defaults=_GEMMA_DEFAULTS
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    settings=(
        *_GEMMA_SETTINGS,
        Rope(),
        Layers(period=2),
        Same("attn_logit_softcapping", "SCORES_SOFT_CAP"),
        Same("final_logit_softcapping", "LOGITS_SOFT_CAP"),
    ),
    rules=(*ENDS, *_GEMMA_NORMS, *ATTENTION, *MLP),
    silent=frozenset({"hidden_act", "sliding_window_size"}),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    defaults=_GEMMA_DEFAULTS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
    },
    settings=(
        *_GEMMA_SETTINGS,
        Rope(theta=1e6, local_theta=1e4),
        Layers(period=6, periods=("sliding_window_pattern", "_sliding_window_pattern")),
        Same("final_logit_softcapping", "lm.LanguageModel.logits_soft_cap", default=None),
    ),
    # transformers has a soft cap of scores in this family's configuration, and does not use it.
    silent=frozenset({"hidden_act", "attn_logit_softcapping"}),
)
