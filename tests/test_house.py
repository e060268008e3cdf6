"""The house rules that a machine can check: who imports whom, how long things are, what must not exist."""

import ast
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("framework", "models", "tasks", "launch")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text", "t5", "clu"}
DOORS = {
    "framework/conversion/mesh_tensorflow.py",  # its checkpoints are TensorFlow's
    "framework/data/seqio_adapter.py",
    "framework/data/seqio_caches.py",
    "framework/data/seqio_converters.py",
    "framework/data/seqio_loader.py",
    "framework/data/seqio_sources.py",
    "framework/data/seqio_steps.py",
    "launch/bench/caching.py",  # runs seqio beside us, to time both
    "launch/bench/stages.py",
    "launch/export.py",  # writes a SavedModel
}  # may import seqio and TensorFlow, inside functions only
# Places from the bottom up: a file imports from its own place and from those before it, wherever the import stands. A
# file belongs to the longest name that begins its own; "." stands for the rest of a folder.
PLACES = {
    "framework": "errors axes terminal progress buckets files web_page interfaces trees distributed partitioning "
    "telemetry data optimizers planning training conversion checkpoints inference report evaluation serving",
    "models": "layers.masks layers.side_outputs module layers losses language vision objectives .",
    "tasks": ".",
    "launch": "flags verb_flags bench_flags cluster.job invocation verbs recipe dry_run cluster .",
}
ORDER = [f"{folder}.{name}".rstrip(".") for folder, names in PLACES.items() for name in names.split()]
LONG = {("framework/training/loop.py", 120), ("launch/train.py", 120)}  # the loop, and what sets it up


@functools.cache
def imports(path: Path):
    """Returns (module, whether at the top level of the file) for every import in a file."""
    return list(_imports(path))


def _imports(path: Path):
    tree = ast.parse(path.read_text())
    inner = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in inner


def allowed(path: Path, module: str, top: bool) -> bool:
    name, parts = path.relative_to(ROOT).as_posix(), module.split(".")
    folder = name.split("/")[0]
    if parts[0] in FOLDERS:
        return False  # by its bare name: a second copy of the module
    if parts[0] in HEAVY:
        return folder == "tasks" or (name in DOORS and not top)
    if parts[0] == "gin":
        return folder == "launch"
    if parts[0] != "meshway":
        return True
    if parts[1] == "framework":
        return folder in ("framework", "launch") or (folder == "models" and parts[2] == "axes")
    return parts[1] == folder


def test_imports_keep_to_the_table():
    wrong = [
        f"{path.relative_to(ROOT)} must not import {module}"
        for path in FILES
        for module, top in imports(path)
        if not allowed(path, module, top)
    ]
    assert not wrong, "\n".join([*wrong, "(see CONTRIBUTING.md)"])


def test_the_table_refuses_what_it_should():
    framework, models = ROOT / "framework/axes.py", ROOT / "models/language/t5.py"
    assert not allowed(framework, "meshway.models.language.t5", True)
    assert not allowed(framework, "gin", True)
    assert not allowed(framework, "seqio", False)
    assert not allowed(ROOT / "framework/data/seqio_loader.py", "seqio", True)
    assert not allowed(models, "meshway.framework.errors.UserError", True)
    assert allowed(models, "meshway.framework.axes.constrain", True)
    assert not allowed(ROOT / "tasks/pydocs.py", "meshway.framework.errors.UserError", True)
    assert not allowed(models, "models.t5", True)


def graph():
    """Returns module -> the modules of ours that it imports, at the top, in functions, or for types alone."""
    names = {f"meshway.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}": path for path in FILES}
    reach = {}
    for name, path in names.items():
        found = {module for module, _ in imports(path)}
        found |= {module.rpartition(".")[0] for module in found}
        reach[name] = names.keys() & found
    return reach


def place(module: str) -> str:
    name = module.removeprefix("meshway.")
    found = [each for each in ORDER if name == each or name.startswith(f"{each}.")]
    assert found, f"{module} has no place in the order of rooms: say in PLACES what it may import"
    return max(found, key=len)


def is_upward(importer: str, imported: str) -> bool:
    return ORDER.index(place(imported)) > ORDER.index(place(importer))


def test_imports_point_down():
    wrong = [
        f"{importer} imports {imported}"
        for importer, reached in graph().items()
        for imported in reached
        if is_upward(importer, imported)
    ]
    assert not wrong, "\n".join(
        ["imports of what stands above:", *sorted(wrong), "(see CONTRIBUTING.md, Who may import whom)"]
    )


def test_the_order_refuses_what_it_should():
    assert is_upward("meshway.framework.data.prefetch", "meshway.framework.training.loop")
    assert is_upward("meshway.framework.conversion.rules", "meshway.framework.checkpoints.sources")
    assert is_upward("meshway.models.layers.attention", "meshway.models.language.t5")
    assert is_upward("meshway.models.losses", "meshway.models.objectives")
    assert is_upward("meshway.launch.recipe.config", "meshway.launch.train")
    assert not is_upward("meshway.launch.train", "meshway.framework.training.loop")
    assert not is_upward("meshway.framework.training.loop", "meshway.framework.training.step")


def test_there_is_no_import_cycle_not_even_one_hidden_in_functions_or_of_one_file():
    reach = graph()
    names = list(reach)
    for middle in names:  # Warshall's transitive closure
        for ends in reach.values():
            if middle in ends:
                ends |= reach[middle]
    groups = {frozenset(other for other in names if other in reach[name] and name in reach[other]) for name in names}
    assert sorted(sorted(group) for group in groups if group) == []


def _docstring_lines(node):
    first = node.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first.end_lineno - first.lineno + 1 if documented else 0


def test_files_and_functions_fit_a_sitting_and_a_screen():
    wrong = []
    for path in FILES:
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        if (count := text.count("\n")) > 400:
            wrong.append(f"{name} has {count} lines: longer than one sitting")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
                if length > dict(LONG).get(name, 60):
                    wrong.append(f"{name}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_names_that_must_not_exist():
    assert not list((ROOT / "gin").rglob("__init__.py")), "gin/__init__.py would shadow gin-config"
    assert not [path for path in FILES if path.name == "utils.py"]
    assert not [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]


def test_framework_models_and_bench_train_without_tensorflow(tmp_path):
    """A GPU box without TensorFlow must train from a cache: block it, import everything, take a step."""
    program = """
        import importlib, pkgutil, sys
        for name in ("tensorflow", "seqio", "tensorflow_text", "tensorflow_datasets", "tensorboard"):
            sys.modules[name] = None
        import meshway.framework, meshway.models
        for package in (meshway.framework, meshway.models):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        import meshway.launch.bench.train
        from tiny import losses, program
        print("losses", losses(program("t5_1_1"), 2)[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "losses [" in done.stdout, done.stderr


def test_versions_agree():
    """CHANGELOG's newest version is the package's."""
    version = (ROOT / "setup.py").read_text().split('version="')[1].split('"')[0]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {version}" in changelog
