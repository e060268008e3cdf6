"""The commands of README and of the pages that it leads to, and a folder in which each has what it speaks of."""

import contextlib
import json
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import sentence_pieces
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parent.parent
# The front page, and the pages under docs/ that go on from it, in the order in which someone reads on.
_DOCS = "recipes runs data models inference parallelism planning processes speed"
PAGES = ["README", *(f"docs/{name}" for name in _DOCS.split())]
README = "\n".join((ROOT / f"{page}.md").read_text() for page in PAGES)
GOLDENS = ROOT / "tests" / "goldens"

# What mine.gin becomes where it is trained: README's own recipe, smaller.
SMALLER = """
include 'readme.gin'
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 16}
TRAIN_STEPS = 2
BATCH_SIZE = 8
VOCAB_SIZE = 384
D_MODEL = 32
D_FF = 64
NUM_HEADS = 4
HEAD_DIM = 8
NUM_ENCODER_LAYERS = 2
NUM_DECODER_LAYERS = 2
"""

TASKS = """
import seqio
import tensorflow as tf

SPLITS = {"train": range(48), "validation": range(48, 56), "test": range(56, 64)}


def numbers(split, shuffle_files, seed=None):
    chosen = [str(number) for number in SPLITS[split]]
    return tf.data.Dataset.from_tensor_slices({"inputs": [f"write {n}" for n in chosen], "targets": chosen})


def same(targets, predictions):
    return {"same": sum(t == p for t, p in zip(targets, predictions)) / len(targets)}


for name in ("mylab_translate", "NAME"):
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(numbers, splits=list(SPLITS)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary(), add_eos=True)),
        metric_fns=[same],
    )
"""


def blocks(text: str = README) -> list[list[str]]:
    """Returns the lines of each indented block of a page; comments are left out, lines that go on are joined."""
    found: list[list[str]] = [[]]
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        if line.startswith("    "):
            found[-1].append(re.split(r"(?:^|\s)# ?", line.strip())[0].strip())
        elif line and found[-1]:
            found.append([])
    return [block for block in found if block]


def commands(text: str = README) -> list[str]:
    """Returns the lines of blocks that call meshway or make, each once, in the page's order."""
    lines = [line for block in blocks(text) for line in block if re.search(r"(^|&& )(meshway|make) ", line)]
    return list(dict.fromkeys(lines))


def words_of(command: str) -> list[str]:
    """Returns the words after `meshway` of a command, whatever comes before it."""
    words = shlex.split(command)
    return words[words.index("meshway") + 1 :]


def recipe() -> str:
    """Returns README's first recipe of one's own, mine.gin."""
    (found,) = [block for block in blocks() if any("mylab.tasks" in line for line in block) and "include" in block[0]]
    return "\n".join(found) + "\n"


def furnish(folder: Path) -> None:
    """Makes in a folder what README's commands name: a recipe with its package, weights, questions."""
    (folder / "mylab").mkdir()
    (folder / "mylab" / "__init__.py").touch()
    (folder / "mylab" / "tasks.py").write_text(TASKS)
    (folder / "mine.gin").write_text(recipe())
    llama = folder / "models" / "Llama-3.2-1B"
    shutil.copytree(GOLDENS / "hugging_face" / "llama3", llama)
    _tokenizer(json.loads((llama / "config.json").read_text())["vocab_size"]).save(str(llama / "tokenizer.json"))
    with tarfile.open(GOLDENS / "t5x" / "t5_native.tar.gz") as archive:
        archive.extractall(folder / "t5x_runs" / "small", filter="data")
    shutil.copytree(GOLDENS / "mesh_tensorflow" / "t5_1_1", folder / "t5.1.1.base")
    (folder / "spiece.model").write_bytes(sentence_pieces())
    for number in (1, 2):
        (folder / f"questions-{number}.jsonl").write_text('{"inputs": "write 7"}\n')
    (folder / "prompts.txt").write_text("w1 w2\nw3\n")


@contextlib.contextmanager
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes a folder, which has a package `mylab`, the current one of this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def _tokenizer(size: int) -> Tokenizer:
    """Returns a tokenizer of the words w0, w1, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
