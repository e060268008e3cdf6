"""Feature converters as users of T5X write them."""

import seqio
import tensorflow as tf

Spec = seqio.FeatureConverter.FeatureSpec
TOKENS = Spec(dtype=tf.int32)


class EveryOther(seqio.FeatureConverter):
    """An encoder-decoder whose loss is on every other target."""

    TASK_FEATURES = {"inputs": TOKENS, "targets": TOKENS}
    MODEL_FEATURES = {
        "encoder_input_tokens": TOKENS,
        "decoder_target_tokens": TOKENS,
        "decoder_input_tokens": TOKENS,
        "decoder_loss_weights": Spec(dtype=tf.float32),
    }
    PACKING_FEATURE_DTYPES = {
        "encoder_segment_ids": tf.int32,
        "decoder_segment_ids": tf.int32,
        "encoder_positions": tf.int32,
        "decoder_positions": tf.int32,
    }

    def _convert_features(self, ds, task_feature_lengths):
        def convert(features):
            targets = features["targets"]
            # Of a packed row, by its place in its segment.
            places = features["targets_positions"] if self.pack else tf.range(tf.size(targets))
            made = {
                "encoder_input_tokens": features["inputs"],
                "decoder_target_tokens": targets,
                "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(
                    targets, sequence_id=features.get("targets_segment_ids"), bos_id=self.bos_id
                ),
                "decoder_loss_weights": tf.cast((places % 2 == 0) & (targets > 0), tf.float32) / 2.0,
            }
            if self.pack:
                for side, name in (("encoder", "inputs"), ("decoder", "targets")):
                    made[f"{side}_segment_ids"] = features[f"{name}_segment_ids"]
                    made[f"{side}_positions"] = features[f"{name}_positions"]
            return made

        return self._pack_or_pad(ds, task_feature_lengths).map(convert)

    def get_model_feature_lengths(self, task_feature_lengths):
        lengths = {
            name: task_feature_lengths["inputs" if name.startswith("encoder") else "targets"]
            for name in (*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ()))
        }
        return lengths


class Longer(EveryOther):
    """Promises one token more than it makes."""

    def get_model_feature_lengths(self, task_feature_lengths):
        lengths = super().get_model_feature_lengths(task_feature_lengths)
        return lengths | {"decoder_target_tokens": lengths["decoder_target_tokens"] + 1}


class Halved(EveryOther):
    """Packs into rows of half their length."""

    def _pack_or_pad(self, ds, packed_lengths):
        ds = super()._pack_or_pad(ds, {name: length // 2 for name, length in packed_lengths.items()})
        return seqio.utils.trim_and_pad_dataset(
            ds, {name: packed_lengths[name.split("_")[0]] for name in ds.element_spec}
        )


class Dropping(EveryOther):
    """Leaves examples out."""

    def _convert_features(self, ds, task_feature_lengths):
        few = ds.filter(lambda example: tf.size(example["targets"]) > 4)
        return super()._convert_features(few, task_feature_lengths)


class Noisy(EveryOther):
    """Draws random numbers."""

    def _convert_features(self, ds, task_feature_lengths):
        noise = lambda x: x | {"inputs": x["inputs"] + tf.random.uniform([1], 0, 2, tf.int32)}  # noqa: E731
        return super()._convert_features(ds.map(noise), task_feature_lengths)


class Frames(seqio.FeatureConverter):
    """Continuous inputs, as of audio."""

    TASK_FEATURES = {"inputs": Spec(dtype=tf.float32, rank=2), "targets": TOKENS}
    MODEL_FEATURES = {**EveryOther.MODEL_FEATURES, "encoder_input_tokens": Spec(dtype=tf.float32, rank=2)}
    PACKING_FEATURE_DTYPES = None

    def _convert_features(self, ds, task_feature_lengths):
        def convert(features):
            targets = features["targets"]
            return {
                "encoder_input_tokens": features["inputs"],
                "decoder_target_tokens": targets,
                "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(targets),
                "decoder_loss_weights": tf.cast(targets > 0, tf.float32),
            }

        return self._pack_or_pad(ds, task_feature_lengths).map(convert)

    get_model_feature_lengths = EveryOther.get_model_feature_lengths
