"""T5 1.0 and 1.1, mT5, umT5, LongT5 with local attention, and all that have their shape: Flan-T5, ByT5, UL2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from meshway.framework.conversion.family import OWN_OUTPUT, Family
from meshway.framework.conversion.rules import Form, Rule
from meshway.framework.conversion.settings import (
    ACTIVATIONS,
    Bindings,
    Config,
    Fixed,
    Same,
    Setting,
    Table,
    not_supported,
    required,
)

_PLAIN = tuple((theirs, (ours,)) for theirs, ours in ACTIVATIONS.items())
_GATED = tuple((f"gated-{theirs}", (ours, "linear")) for theirs, ours in ACTIVATIONS.items() if theirs != "gelu")
# "gated-gelu" means the tanh form, as published checkpoints have it; transformers says so for old files' sake.
_PROJECTIONS = (("relu", ("relu",)), ("gated-gelu", ("gelu", "linear")), *_PLAIN, *_GATED)


@dataclasses.dataclass(frozen=True)
class FeedForward(Table):
    """The MLP's activation; `dense_act_fn` and `is_gated_act`, which transformers derives from it, must agree."""

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field, "dense_act_fn", "is_gated_act")

    def read(self, config: Config) -> Bindings:
        read = super().read(config)
        names = read[self.binding]
        if config.get("is_gated_act", len(names) == 2) != (len(names) == 2):
            raise not_supported("is_gated_act", config["is_gated_act"])
        if "dense_act_fn" in config and ACTIVATIONS.get(config["dense_act_fn"]) != names[0]:
            raise not_supported("dense_act_fn", config["dense_act_fn"])
        return read


@dataclasses.dataclass(frozen=True)
class Output:
    """Whether logits have a layer of their own, and are scaled by 1/sqrt(d_model).

    transformers 4 tells both by tie_word_embeddings. transformers 5 ties where the files hold no other output layer,
    whatever that field says, and scales by scale_decoder_outputs; mT5 (`scales` False) is never scaled.
    """

    scales: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        return ("tie_word_embeddings", "scale_decoder_outputs")

    def read(self, config: Config) -> Bindings:
        own = config[OWN_OUTPUT]
        scaled = self.scales and config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
        if own and scaled:
            raise not_supported("with an output layer of its own: scale_decoder_outputs (or tie_word_embeddings)", True)
        return {"TIED_LOGITS": not own} | ({} if own or scaled else {"t5.T5.scale_tied_logits": False})

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        tied = bindings["TIED_LOGITS"]
        scaled = tied and bindings.get("t5.T5.scale_tied_logits", True)
        if tied and scaled and not self.scales:
            raise not_supported("scale_tied_logits", True)
        return {"tie_word_embeddings": tied} | ({"scale_decoder_outputs": scaled} if self.scales else {})


@dataclasses.dataclass(frozen=True)
class LocalRadius:
    """How many tokens on each side the encoder's tokens see (LongT5); the window is that and the token itself."""

    field: str = "local_radius"
    binding: str = "WINDOW"

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, config: Config) -> Bindings:
        return {self.binding: config[self.field] + 1}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        return {self.field: required(bindings, self.binding, f"{self.field} + 1") - 1}


_SETTINGS: tuple[Setting, ...] = (
    Same("vocab_size", "VOCAB_SIZE"),
    Same("d_model", "D_MODEL"),
    Same("d_ff", "D_FF"),
    Same("num_heads", "NUM_HEADS"),
    Same("d_kv", "HEAD_DIM"),
    Same("num_layers", "NUM_ENCODER_LAYERS"),
    Same("num_decoder_layers", "NUM_DECODER_LAYERS", like=("num_layers", "NUM_ENCODER_LAYERS")),
    Same("relative_attention_num_buckets", "NUM_BUCKETS"),
    Same("relative_attention_max_distance", "MAX_DISTANCE"),
    Same("layer_norm_epsilon", "NORM_EPSILON"),
    FeedForward("feed_forward_proj", "ACTIVATIONS", _PROJECTIONS),
)


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    inputs = (("q", "query", "heads"), ("k", "key", "kv_heads"), ("v", "value", "kv_heads"))
    return (
        *(
            Rule(f"{theirs}.{name}.weight", f"{ours}/{whole}/kernel",
                 Form(f"({heads} head_dim) embed -> embed {heads} head_dim"))
            for name, whole, heads in inputs
        ),
        Rule(f"{theirs}.o.weight", f"{ours}/out/kernel", Form("embed (heads head_dim) -> heads head_dim embed")),
    )  # fmt: skip


def _norm(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}/scale", Form("embed -> embed"))


def _stack(stack: str, parts: tuple[tuple[str, str], ...], by_layer: bool) -> tuple[Rule, ...]:
    """Returns the rules of one stack, of (their name, our name) for its attentions, then of its MLP; `by_layer` where
    each of its layers has a position bias, else the first holds that of all."""
    ours, rules = f"{stack}/{{block}}", list[Rule]()
    for place, (theirs, name) in enumerate(parts):
        layer = f"{stack}.block.{{layer}}.layer.{place}"
        rules += [
            _norm(f"{layer}.layer_norm", f"{ours}/{name}_norm"),
            *_attention(f"{layer}.{theirs}", f"{ours}/{name}"),
        ]
    layer = f"{stack}.block.{{layer}}.layer.{len(parts)}"
    dense, kernel = f"{layer}.DenseReluDense", Form("mlp embed -> embed mlp")
    rules += [
        _norm(f"{layer}.layer_norm", f"{ours}/mlp_norm"),
        Rule(f"{dense}.wi.weight", f"{ours}/mlp/wi_0/kernel", kernel, beside="!mlp/wi_1/kernel"),
        Rule(f"{dense}.wi_0.weight", f"{ours}/mlp/wi_0/kernel", kernel, beside="mlp/wi_1/kernel"),
        Rule(f"{dense}.wi_1.weight", f"{ours}/mlp/wi_1/kernel", kernel),
        Rule(f"{dense}.wo.weight", f"{ours}/mlp/wo/kernel", Form("embed mlp -> mlp embed")),
        _norm(f"{stack}.final_layer_norm", f"{stack}_norm"),
        Rule(
            f"{stack}.block.{'{layer}' if by_layer else '0'}.layer.0.{parts[0][0]}.relative_attention_bias.weight",
            f"{ours}/position_bias/embedding" if by_layer else f"{stack}_position_bias/embedding",
            Form("buckets heads -> heads buckets"),
        ),
    ]
    return tuple(rules)


def _rules(by_layer: bool = False, encoder: str = "SelfAttention") -> tuple[Rule, ...]:
    """Returns the rules of both stacks and of what is around them, `encoder` their name of its attention; see
    `_stack`."""
    return (
        Rule("shared.weight", "token_embedding/embedding", Form("vocab embed -> vocab embed")),
        *_stack("encoder", ((encoder, "attention"),), by_layer),
        *_stack("decoder", (("SelfAttention", "attention"), ("EncDecAttention", "cross_attention")), by_layer),
        Rule("lm_head.weight", "logits/kernel", Form("vocab embed -> embed vocab")),
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}


def _folder(config: Config) -> str:
    """Returns T5 1.1's folder for gated MLPs, T5 1.0's for plain ones."""
    return "t5_1_1" if str(config["feed_forward_proj"]).startswith("gated") else "t5"


T5 = Family(
    name="t5",
    model_types=("t5",),
    architecture="T5ForConditionalGeneration",
    defaults=_DEFAULTS,
    settings=(*_SETTINGS, Output()),
    rules=_rules(),
    copies={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    silent=frozenset({"dropout_rate", "initializer_factor", "is_encoder_decoder", "n_positions"}),
    written={"is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    tied_by_tensors=True,
    folder=_folder,
)
MT5 = dataclasses.replace(
    T5,
    name="mt5",
    model_types=("mt5",),
    architecture="MT5ForConditionalGeneration",
    defaults=_DEFAULTS
    | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
    | {"tie_word_embeddings": False},
    settings=(*_SETTINGS, Output(scales=False)),
    folder=None,
)
UMT5 = dataclasses.replace(
    T5,
    name="umt5",
    model_types=("umt5",),
    architecture="UMT5ForConditionalGeneration",
    defaults={**MT5.defaults, "tie_word_embeddings": True},
    rules=_rules(by_layer=True),
    ignored=(),
    silent=T5.silent | {"scalable_attention"},  # published files say so of T5X's network, and transformers reads it not
    folder=None,
)
LONGT5 = dataclasses.replace(
    T5,
    name="longt5",
    model_types=("longt5",),
    architecture="LongT5ForConditionalGeneration",
    defaults=_DEFAULTS | {"local_radius": 127, "encoder_attention_type": "local"},
    settings=(*_SETTINGS, Output(), LocalRadius(), Fixed("encoder_attention_type", ("local",))),
    rules=_rules(encoder="LocalSelfAttention"),
    silent=T5.silent | {"global_block_size"},  # of its other attention, transient-global
    written={**T5.written, "encoder_attention_type": "local"},
    folder=None,
)
