"""Every family against transformers: its logits from its own directory, and the same directory back.

`tests/goldens/make_hugging_face.py` made the directories and what transformers computes from them.
"""

from pathlib import Path

import numpy as np
import pytest
from converted import assert_same_directory, logits_of

from meshway.launch.convert import convert

FOLDER = Path(__file__).parents[2] / "goldens" / "hugging_face"
NAMES = sorted(path.name for path in FOLDER.iterdir())
QUICK = ("gemma3", "mixtral", "t5_1_1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_logits_are_those_of_transformers_and_the_directory_comes_back(name, tmp_path):
    expected = dict(np.load(FOLDER / name / "expected.npz"))
    logits = expected.pop("logits")
    found = logits_of(FOLDER / name, tmp_path / "run", expected)
    assert np.abs(found - logits).max() <= 2e-5 * np.abs(logits).max()
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert_same_directory(tmp_path / "back", FOLDER / name)
