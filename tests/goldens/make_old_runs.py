"""Makes `tests/goldens/old_runs/`: two runs of two steps as they were at commit bb9a954, before recipes' modules moved.

    git worktree add ../old bb9a954     # and install it in an environment of its own
    OLD/bin/python tests/goldens/make_old_runs.py

`runs.tar.xz` holds an encoder-decoder (Adafactor) and a decoder-only model (AdamW), each as `config.gin` and one
checkpoint; `digests.json` has the SHA-256 of the bytes of every array of the two states, as tensorstore reads them.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import tensorstore

HERE = Path(__file__).parent
FOLDER = HERE / "old_runs"
RECIPES = {
    "t5": (
        "t5_1_1",
        "adafactor",
        "lab_halves",
        {"inputs": 32, "targets": 32},
        "NUM_ENCODER_LAYERS=1 NUM_DECODER_LAYERS=1",
    ),
    "lm": ("llama", "adamw", "lab_lines", {"targets": 32}, "NUM_LAYERS=1 NUM_KV_HEADS=1"),
}
BINDINGS = """VOCAB_SIZE=259 D_MODEL=4 D_FF=4 NUM_HEADS=2 HEAD_DIM=2 LAYOUT=single TRAIN_STEPS=2 BATCH_SIZE=4
    EVAL_PERIOD=None CHECKPOINT_PERIOD=2 REPORT_PERIOD=1 MIXTURE_OR_TASK_MODULE=tasks.topics"""
STEP = "2"


def digests(state: Path) -> dict[str, str]:
    """Returns array name -> SHA-256 of its bytes, read by tensorstore alone from a checkpoint's `state`."""
    base = f"file://{state.absolute()}/"
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    names = sorted(key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json"))
    return {name: digest(_read(base, name)) for name in names}


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of shape, dtype and bytes."""
    array = np.asarray(array)
    return hashlib.sha256(f"{array.shape} {array.dtype}".encode() + array.tobytes()).hexdigest()


def _read(base: str, name: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


def _train(name: str, folder: Path) -> None:
    family, optimizer, task, lengths, sizes = RECIPES[name]
    words = [*BINDINGS.split(), *sizes.split(), f"MODEL_DIR={name}", f"MIXTURE_OR_TASK_NAME={task}"]
    words.append(f"TASK_FEATURE_LENGTHS={lengths}")
    files = [f"--gin_file=models/{family}/tiny.gin", f"--gin_file=optimizers/{optimizer}.gin"]
    command = [sys.executable, "-m", "meshway.launch.cli", "train", *files, *(f"--gin.{word}" for word in words)]
    subprocess.run(command, cwd=folder, check=True)
    for path in (folder / name).rglob("commit_success.txt"):
        path.write_text("")  # it names the folder


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(FOLDER / "runs.tar.xz", "w:xz") as archive:
        folder = Path(temporary)
        (folder / "tasks").symlink_to(HERE.parent / "lab" / "tasks")
        for name in RECIPES:
            _train(name, folder)
            found[name] = digests(folder / name / "checkpoints" / STEP / "state")
            for part in ("config.gin", "checkpoints"):
                archive.add(folder / name / part, f"{name}/{part}", filter=_anonymous)
    (FOLDER / "digests.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
