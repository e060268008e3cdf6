"""Makes `flaxformer/`: parameters of Flaxformer's networks by its names, random, and the logits that it computes.

    python tests/goldens/make_flaxformer.py FLAXFORMER_SOURCES

FLAXFORMER_SOURCES is a checkout of Flaxformer, whose networks run on flax alone: what else it imports (aqt, t5x, chex)
is for quantised and other models, and replaced by nothing here. Each file has `params/*`, a padded batch and `logits`
float32 [rows, length, vocab] without dropout; experts have room for all tokens.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

FOLDER = Path(__file__).parent / "flaxformer"
EMBED, MLP, HEADS, HEAD_DIM, VOCAB, EXPERTS = 12, 16, 2, 4, 32, 4
KINDS = {
    "t5_1_1": {},
    "fused": {"fused": True},
    "fused_scanned": {"fused": True, "scanned": True},
    "switch": {"experts": 1, "gated": False, "tied": True},
    "top_2": {"experts": 2, "layers": 4, "period": 4},
}


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not needed, empty."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("aqt", "t5x", "chex"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        class Stub(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), {}) if name[0].isupper() else mock.MagicMock(name=name)

        return Stub(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def network(gated=True, tied=False, fused=False, scanned=False, experts=0, layers=2, period=2):
    """Returns an encoder-decoder as Flaxformer's gin files t5_1_1_flaxformer and moe put it together."""
    from flaxformer.architectures.moe import moe_architecture, moe_layers, routing
    from flaxformer.architectures.t5 import t5_architecture as t5
    from flaxformer.components import dense, embedding, layer_norm, relative_position_biases
    from flaxformer.components.attention import dense_attention

    real = {"dtype": jnp.float32}
    norm, dropout = partial(layer_norm.T5LayerNorm, **real), partial(nn.Dropout, rate=0.0)
    common = {"layer_norm_factory": norm}

    def attention(fuse):
        return dense_attention.MultiHeadDotProductAttention(
            num_heads=HEADS, head_dim=HEAD_DIM, use_bias=False, broadcast_dropout=True, dropout_rate=0.0, **real,
            **({"kernels_to_fuse": fuse, "split_head_kernel": True, "rescale_logits": True} if fused else {}),
        )  # fmt: skip

    def mlp():
        return dense.MlpBlock(
            use_bias=False, intermediate_dim=MLP, activations=("gelu", "linear") if gated else ("relu",), **real,
            intermediate_dropout_rate=0.0, final_dropout_rate=0.0, fuse_kernels=fused,
        )  # fmt: skip

    def mixture():
        router = routing.TokensChooseMaskedRouter(
            router_weights=routing.RouterWeights(use_bias=False, **real), jitter_noise=0.0, ignore_padding_tokens=False,
            num_selected_experts=experts, batch_prioritized_routing=False, **real,
        )  # fmt: skip
        return moe_layers.MoeLayer(
            num_experts=EXPERTS, max_group_size=4096, train_capacity_factor=EXPERTS, eval_capacity_factor=EXPERTS,
            expert=mlp(), router=router, num_expert_partitions=1, num_model_partitions=1, **real,
        )  # fmt: skip

    bias = partial(
        relative_position_biases.RelativePositionBiases,
        num_heads=HEADS, num_buckets=32, max_distance=128, embedding_init=nn.initializers.normal(1.0), **real,
    )  # fmt: skip
    own = {"relative_position_bias_factory": bias, "scanned": True} if scanned else {}

    def encoder_layer(kind, inner, **kw):
        return kind(attention=attention("qkv"), mlp=inner(), dropout_factory=dropout, **common, **(own | kw))

    def decoder_layer(kind, inner, **kw):
        attentions = {"self_attention": attention("qkv"), "encoder_decoder_attention": attention("kv")}
        return kind(mlp=inner(), dropout_factory=dropout, **attentions, **common, **(own | kw))

    def sparse(layer, kind):
        if not experts:
            return {}
        return {"num_sparse_layers": layers // period, "sparse_layer_factory": partial(layer, kind, mixture)}

    common_stack = {"num_layers": layers, "scan_layers": scanned, **common, **real}
    common_stack |= {} if scanned else {"shared_relative_position_bias_factory": bias}
    logits = partial(dense.DenseGeneral, features=VOCAB, use_bias=False, kernel_axis_names=["embed", "vocab"], **real)
    return t5.EncoderDecoder(
        encoder_factory=partial(
            moe_architecture.SparseEncoder if experts else t5.Encoder,
            layer_factory=partial(encoder_layer, t5.EncoderLayer, mlp),
            input_dropout_factory=dropout, output_dropout_factory=dropout, position_embedder_factory=None,
            **common_stack, **sparse(encoder_layer, moe_architecture.SparseEncoderLayer),
        ),
        decoder_factory=partial(
            moe_architecture.SparseDecoder if experts else t5.Decoder,
            layer_factory=partial(decoder_layer, t5.DecoderLayer, mlp),
            dropout_factory=dropout, position_embedder_factory=None, output_logits_factory=None if tied else logits,
            **common_stack, **sparse(decoder_layer, moe_architecture.SparseDecoderLayer),
        ),
        shared_token_embedder_factory=partial(
            embedding.Embed, num_embeddings=VOCAB, features=EMBED, cast_input_dtype=jnp.int32,
            attend_dtype=jnp.float32, one_hot=True, name="token_embedder", **real,
        ),
        **real,
    )  # fmt: skip


def main(sources):
    sys.meta_path.insert(0, Stubs())
    sys.path.insert(0, sources)
    random = np.random.default_rng(0)
    inputs, targets = (random.integers(2, VOCAB, (3, size)).astype(np.int32) for size in (10, 8))
    inputs[1, 7:], targets[2, 5:] = 0, 0
    previous = np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * (targets > 0)
    FOLDER.mkdir(exist_ok=True)
    for kind, options in KINDS.items():
        model = network(**options)
        shapes = jax.eval_shape(
            lambda model=model: model.init(jax.random.key(0), inputs, previous, targets, enable_dropout=False)
        )
        flat = traverse_util.flatten_dict(dict(shapes["params"]), sep="/")
        params = {
            name: random.standard_normal(leaf.shape, np.float32) * np.float32(0.4 if "kernel" in name else 1.0)
            for name, leaf in sorted(flat.items())
        }
        tree = {"params": traverse_util.unflatten_dict(params, sep="/")}
        logits = model.apply(tree, inputs, previous, targets, enable_dropout=False, mutable=["intermediates"])[0]
        np.savez_compressed(
            FOLDER / f"{kind}.npz",
            **{f"params/{name}": value for name, value in params.items()},
            **{"batch/encoder_input_tokens": inputs, "batch/decoder_input_tokens": previous},
            **{"batch/decoder_target_tokens": targets, "logits": np.asarray(logits, np.float32)},
        )


if __name__ == "__main__":
    main(sys.argv[1])
