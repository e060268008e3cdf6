"""seqio tasks over scikit-learn's images of handwritten digits; importing this module registers them.

1,797 images of 8 by 8 pixels (Alpaydin and Kaynak 1998, from the UCI repository, CC BY 4.0) are part of the
package scikit-learn: the extra `digits`. It is imported when a task is first read.

    digits        image float32 [8, 8, 1] in 0..1, label int32 [], id int32 []
    digits_text   inputs: the image as eight lines of eight characters; targets: the digit's name; both bytes
"""

import functools
import hashlib

import numpy as np
import seqio
import tensorflow as tf

from meshway.tasks import metrics, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_task, not_installed

SPLITS = ("train", "validation", "test")
CLASSES = 10
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT_PREFIX = "digit:\n"
_INK = "0123456789abcdefg"  # the 17 intensities of a pixel


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns intensities uint8 [images, 8, 8] in 0..16 and labels int32 [images].

    Raises:
      ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise not_installed("scikit-learn", "digits") from error
    found = datasets.load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int32)


@functools.cache
def rows(split: str) -> np.ndarray:
    """Returns the numbers of the images in a split, ascending int32: 8, 1 and 1 tenths, by a hash of the pixels."""
    images, _ = _digits()
    buckets = [int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") % 10 for image in images]
    splits = {8: "validation", 9: "test"}
    return np.array([i for i, bucket in enumerate(buckets) if splits.get(bucket, "train") == split], np.int32)


def image_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'image', 'label', 'id'} of each image of a split, in scikit-learn's order."""
    images, labels = _digits()
    chosen = rows(split)
    return tf.data.Dataset.from_tensor_slices(
        {
            "image": images[chosen, :, :, np.newaxis].astype(np.float32) / 16,
            "label": labels[chosen],
            "id": chosen,
        }
    )


def text_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'inputs', 'targets'} texts of each image of a split, in scikit-learn's order."""
    images, labels = _digits()
    chosen = rows(split)
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [TEXT_PREFIX + as_text(image) for image in images[chosen]],
            "targets": [NAMES[label] for label in labels[chosen]],
        }
    )


def as_text(image: np.ndarray) -> str:
    """Returns intensities [height, width] in 0..16 as lines of one character a pixel, '0' to 'g'."""
    return "\n".join("".join(_INK[pixel] for pixel in line) for line in image)


def _count(split: str) -> int:
    return len(rows(split))


def _add_all() -> None:
    add_task(
        "digits",
        CountedSource(image_dataset, SPLITS, _count),
        {
            "image": seqio.ContinuousFeature(dtype=tf.float32, rank=3),
            "label": seqio.Feature(seqio.PassThroughVocabulary(CLASSES), add_eos=False, dtype=tf.int32, rank=0),
        },
        [seqio.CacheDatasetPlaceholder()],
        [metrics.accuracy],
    )
    feature = seqio.Feature(vocabularies.byte(), add_eos=True)
    add_task(
        "digits_text",
        CountedSource(text_dataset, SPLITS, _count),
        {"inputs": feature, "targets": feature},
        preprocessors.text_to_text(),
        [metrics.exact_match],
    )


_add_all()
