"""GPT-2: learned positions, LayerNorm with biases, queries, keys and values in one tensor, kernels as [in, out]."""

from meshway.framework.conversion.family import Family
from meshway.framework.conversion.rules import Form, Rule
from meshway.framework.conversion.settings import Fixed, HeadDim, Same, activation, same_in_words

_LAYER, _OURS = "{base}h.{layer}.", "decoder/{block}/"
_SILENT = """resid_pdrop embd_pdrop attn_pdrop n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj"""
_QKV = ("query", "key", "value")

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
            Rule(f"{_LAYER}{theirs}.{kind[0]}", f"{_OURS}{ours}/{kind[1]}", Form("embed -> embed"))
            for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm"))
            for kind in (("weight", "scale"), ("bias", "bias"))
        ),
        Rule(
            _LAYER + "attn.c_attn.weight",
            tuple(f"{_OURS}attention/{name}/kernel" for name in _QKV),
            Form("embed (part heads head_dim) -> part embed heads head_dim"),
        ),
        Rule(
            _LAYER + "attn.c_attn.bias",
            tuple(f"{_OURS}attention/{name}/bias" for name in _QKV),
            Form("(part heads head_dim) -> part heads head_dim"),
        ),
        Rule(
            _LAYER + "attn.c_proj.weight",
            _OURS + "attention/out/kernel",
            Form("(heads head_dim) embed -> heads head_dim embed"),
        ),
        Rule(_LAYER + "attn.c_proj.bias", _OURS + "attention/out/bias", Form("embed -> embed")),
        Rule(_LAYER + "mlp.c_fc.weight", _OURS + "mlp/wi_0/kernel", Form("embed mlp -> embed mlp")),
        Rule(_LAYER + "mlp.c_fc.bias", _OURS + "mlp/wi_0/bias", Form("mlp -> mlp")),
        Rule(_LAYER + "mlp.c_proj.weight", _OURS + "mlp/wo/kernel", Form("mlp embed -> mlp embed")),
        Rule(_LAYER + "mlp.c_proj.bias", _OURS + "mlp/wo/bias", Form("embed -> embed")),
        Rule("{base}ln_f.weight", "decoder_norm/scale", Form("embed -> embed")),
        Rule("{base}ln_f.bias", "decoder_norm/bias", Form("embed -> embed")),
        Rule("lm_head.weight", "logits/kernel", Form("vocab embed -> embed vocab")),
    ),
    bases=("transformer.", ""),
    copies={"lm_head.weight": "{base}wte.weight"},
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    silent=frozenset(_SILENT.split()),
)
