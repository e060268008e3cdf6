"""Writes `mesh_tensorflow/`: small checkpoints as Mesh-TensorFlow leaves them, and what T5X's importer makes of them.

    python tests/goldens/make_mesh_tensorflow.py T5X_SOURCES

T5X_SOURCES is a checkout of T5X, of which t5x/checkpoint_importer.py alone is run (it needs flax, TensorFlow and
tensorstore). Values are random; names, shapes and the files are those of the public T5 checkpoints: T5 1.1's in two
data files, T5 1.0's in one, and a decoder alone; each with Adafactor's slots and a global_step of 1,000,000.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

FOLDER = Path(__file__).parent / "mesh_tensorflow"
STEP, LAYERS, VOCAB, EMBED, HEADS, HEAD_DIM, MLP, BUCKETS = 1_000_000, 2, 16, 6, 2, 4, 10, 8
KINDS = {  # name: (stacks, whether gated, whether it has an output layer, the norm's name, files of values)
    "t5_1_1": (("encoder", "decoder"), True, True, "rms_norm", 2),
    "t5_1_0": (("encoder", "decoder"), False, False, "layer_norm", 1),
    "lm": (("transformer",), False, True, "layer_norm", 1),
}
SUBLAYERS = {
    "encoder": ("SelfAttention", "DenseReluDense"),
    "decoder": ("SelfAttention", "EncDecAttention", "DenseReluDense"),
    "transformer": ("SelfAttention", "DenseReluDense"),
}


def shapes(stacks, gated, has_logits, norm):
    """Returns the shape of each variable but slots."""
    alone = len(stacks) == 1
    found = {f"{stacks[0]}/embedding" if alone else "shared/embedding": (VOCAB, EMBED)}
    for stack in stacks:
        found[f"{stack}/{'rms_norm' if norm == 'rms_norm' else 'final_layer_norm'}/scale"] = (EMBED,)
        for layer in range(LAYERS):
            for place, kind in enumerate(SUBLAYERS[stack]):
                at = f"{stack}/block_{layer:03d}/layer_{place:03d}"
                found[f"{at}/{norm}/scale"] = (EMBED,)
                if kind == "DenseReluDense":
                    for name in ("wi_0", "wi_1") if gated else ("wi",):
                        found[f"{at}/{kind}/{name}/kernel"] = (EMBED, MLP)
                    found[f"{at}/{kind}/wo/kernel"] = (MLP, EMBED)
                    continue
                found |= {f"{at}/{kind}/{name}": (EMBED, HEADS * HEAD_DIM) for name in "qkv"}
                found[f"{at}/{kind}/o"] = (HEADS * HEAD_DIM, EMBED)
                if layer == place == 0:
                    found[f"{at}/{kind}/relative_attention_bias"] = (HEADS, BUCKETS)
    if has_logits:
        found[f"{stacks[-1]}/logits/kernel"] = (EMBED, VOCAB)
    return found


def save(prefix, arrays, files):
    """Writes a checkpoint of TensorFlow's with its values in several files."""
    names, parts = sorted(arrays), []
    for part in range(files):
        own = names[part::files]
        parts.append(f"{prefix}-part-{part}")
        tf.raw_ops.SaveV2(
            prefix=parts[-1],
            tensor_names=own,
            shape_and_slices=[""] * len(own),
            tensors=[tf.constant(arrays[name]) for name in own],
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=False)


def main(sources):
    spec = importlib.util.spec_from_file_location("importer", Path(sources) / "t5x" / "checkpoint_importer.py")
    importer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(importer)
    random = np.random.default_rng(0)
    for kind, (stacks, gated, has_logits, norm, files) in KINDS.items():
        arrays = {}
        for name, shape in shapes(stacks, gated, has_logits, norm).items():
            arrays[name] = random.standard_normal(shape).astype(np.float32)
            slots = {"vr": shape[1:], "vc": shape[:1]} if "embedding" in name else {"v": shape}
            if "kernel" in name or "scale" in name or "embedding" in name:
                arrays |= {f"{name}_slot_{slot}": np.zeros(size, np.float32) for slot, size in slots.items()}
        arrays["global_step"] = np.int64(STEP)
        prefix = FOLDER / kind / f"model.ckpt-{STEP}"
        prefix.parent.mkdir(parents=True, exist_ok=True)
        save(prefix, arrays, files)
        loaded = importer._maybe_correct_relpos_bias(importer.t5_importer.apply(importer.load_tf_ckpt(str(prefix))))
        target = {
            name.removeprefix("target/"): np.asarray(each.get())
            for name, each in loaded.items()
            if name.startswith("target/")
        }
        np.savez_compressed(FOLDER / f"{kind}_expected.npz", step=loaded["state/step"], **target)


if __name__ == "__main__":
    main(sys.argv[1])
