"""Gemma 2 and Gemma 3's text model."""

import dataclasses

from meshway.framework.conversion.families.decoders import (
    ATTENTION,
    BIASES,
    DEFAULTS,
    ENDS,
    LAYER,
    LLAMA,
    MLP,
    OURS,
    SIZES,
)
from meshway.framework.conversion.positions import Layers, Rope
from meshway.framework.conversion.rules import Form, Rule
from meshway.framework.conversion.settings import Fixed, InverseRoot, Same, activation

_NORMS = tuple(
    Rule(f"{LAYER}{theirs}.weight", f"{OURS}{ours}/scale", Form("embed -> embed"))
    for theirs, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_post_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_post_norm"),
    )
)
_DEFAULTS = DEFAULTS | {
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
_SETTINGS = (
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
    defaults=_DEFAULTS
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    settings=(
        *_SETTINGS,
        Rope(),
        Layers(period=2),
        Same("attn_logit_softcapping", "SCORES_SOFT_CAP"),
        Same("final_logit_softcapping", "LOGITS_SOFT_CAP"),
    ),
    rules=(*ENDS, *_NORMS, *ATTENTION, *MLP),
    silent=frozenset({"hidden_act", "sliding_window_size"}),
)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    defaults=_DEFAULTS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
    },
    settings=(
        *_SETTINGS,
        Rope(theta=1e6, local_theta=1e4),
        Layers(period=6, periods=("sliding_window_pattern", "_sliding_window_pattern")),
        Same("final_logit_softcapping", "lm.LanguageModel.logits_soft_cap", default=None),
    ),
    # transformers has a soft cap of scores in this family's configuration, and does not use it.
    silent=frozenset({"hidden_act", "attn_logit_softcapping"}),
)
