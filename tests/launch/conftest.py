"""A laboratory: a small package of layers and verbs, and a folder of gin files, both made for one test."""

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest

from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

LAYERS = """
    WIDTH = 64

    class Mlp:
        def __init__(self, hidden, activation="relu"):
            if hidden <= 0:
                raise ValueError(f"hidden must be positive, got {hidden}")
            self.hidden, self.activation = hidden, activation

    class Moe:
        def __init__(self, experts=2, **options):
            self.experts, self.options = experts, options

    class Block:
        def __init__(self, mlp, heads=2):
            self.mlp, self.heads = mlp(), heads
"""

MODEL = """
    from lab.layers import Block

    class Model:
        def __init__(self, blocks=(), depth=1, rate=0.0):
            self.blocks = [block() for block in blocks for _ in range(depth)]
            self.rate = rate
"""

TRAIN = """
    def train(model, steps, mesh=None, model_dir=None, layout=None):
        return locals()
"""

RUNS_TRAIN = """
    from __gin__ import dynamic_registration
    from lab.verbs import train

    MODEL = %gin.REQUIRED
    MODEL_DIR = %gin.REQUIRED
    TRAIN_STEPS = 10
    SEED = 0
    LAYOUT = 'single'

    train.train.model = %MODEL
    train.train.steps = %TRAIN_STEPS
    train.train.model_dir = %MODEL_DIR
    train.train.layout = %LAYOUT
"""

RUNS_INSPECT = """
    from __gin__ import dynamic_registration
    from lab.verbs import inspection

    MODEL = %gin.REQUIRED
    inspection.inspect.model = %MODEL
"""

LAYOUT = """
    from __gin__ import dynamic_registration
    from lab.verbs import train
    from lab import mesh

    train.train.mesh = @mesh.MeshShape()
    mesh.MeshShape.ici = {ici}
"""

RECIPE = """
    from __gin__ import dynamic_registration
    from lab import layers
    from lab import model

    DROPOUT_RATE = 0.0
    MODEL = @model.Model()
    model.Model.blocks = [@layers.Block]
    model.Model.rate = %DROPOUT_RATE
    layers.Block.mlp = @layers.Mlp
    layers.Mlp.hidden = 8
"""

FILES = {
    "lab/layers.py": LAYERS,
    "lab/model.py": MODEL,
    "lab/mesh.py": "class MeshShape:\n    def __init__(self, ici):\n        self.ici = ici\n",
    "lab/heavy.py": "LOADED = True\n",
    "lab/verbs/train.py": TRAIN,
    "lab/verbs/inspection.py": "def inspect(model):\n    return model\n",
    "gin/runs/train.gin": RUNS_TRAIN,
    "gin/runs/inspect.gin": RUNS_INSPECT,
    "gin/layouts/single.gin": LAYOUT.format(ici="{'data': 1}"),
    "gin/layouts/fsdp.gin": LAYOUT.format(ici="{'data': 1, 'fsdp': -1}"),
    "gin/recipes/base.gin": RECIPE,
    "gin/models/lm/small.gin": "",
    "gin/models/t5/small.gin": "",
}


@dataclasses.dataclass
class Laboratory:
    folder: Path

    def write(self, name: str, text: str) -> str:
        """Writes a file; returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    def load(self, *bindings: str, recipe: str = "", verb: str = "train", **options) -> config.Recipe:
        """Loads `recipe` (text; by default the shipped base) for a verb with MODEL_DIR given."""
        files = (self.write("recipe.gin", recipe),) if recipe else ("base",)
        files = options.pop("gin_files", files)
        keywords = {name: options.pop(name) for name in ("import_unreferenced",) if name in options}
        given = bindings if verb != "train" or options.get("dry_run") else ("MODEL_DIR=/tmp/run", *bindings)
        invocation = Invocation(verb, gin_files=tuple(files), bindings=given, **options)
        return config.load(invocation, package="lab.verbs", shipped=self.folder / "gin", **keywords)


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Laboratory:
    laboratory = Laboratory(tmp_path)
    for name, text in FILES.items():
        laboratory.write(name, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield laboratory
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]
