"""English text and Python code that come with every Python installation: no download.

Text: the language reference's topics (`pydoc_data.topics`) and the docstrings of the standard library.
Code: the library's documented functions. Both are read from the sources of the running interpreter, so the
corpus of one Python version differs a little from another's.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from meshway.tasks.registry import cached_file

SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5
# Modules differ in size a hundredfold, so 5 % of names is rarely 5 % of text. This salt gives about 5 % of
# both text and functions on Python 3.11 and 3.12, from 16 modules, none above a fifth of the split.
_SALT = "56/"
_LAYOUT = 1  # increase it whenever the same sources would yield another corpus
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Document:
    """One topic or docstring."""

    module: str  # top-level module, or 'topics.NAME'
    text: str


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function or method: its source without the docstring, and the docstring's first sentence."""

    module: str
    source: str
    summary: str


def documents(split: str) -> list[Document]:
    """Returns the texts of 'train' or 'validation', in a fixed order, no text twice."""
    return [document for document in _corpus()[0] if split_of(document.module) == split]


def functions(split: str) -> list[Function]:
    """Returns the functions of 'train' or 'validation', in a fixed order, no (source, summary) twice."""
    return [function for function in _corpus()[1] if split_of(function.module) == split]


def split_of(module: str) -> str:
    """Returns the split of a top-level module or topic, by a hash of its name.

    A private variant is in the split of its public module (`_pydecimal` with `decimal`): they share most docstrings.
    """
    name = re.sub(r"^(_py|_)", "", module)
    bucket = int.from_bytes(hashlib.sha256((_SALT + name).encode()).digest()[:8], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


@functools.cache
def _corpus() -> tuple[list[Document], list[Function]]:
    """Returns all documents and functions; parsing takes seconds, so they are cached by the sources' hash."""
    files = _source_files()
    digest = hashlib.sha256(f"{_LAYOUT}\n".encode())
    contents = {}
    for name, path in files:
        contents[name] = path.read_bytes()
        digest.update(f"{name}\n{len(contents[name])}\n".encode() + contents[name])
    topics = _topics()
    digest.update(json.dumps(topics, sort_keys=True).encode())
    path = cached_file(f"pydocs-{digest.hexdigest()[:16]}.json", lambda: _extract(topics, contents))
    found = json.loads(path.read_text("utf-8"))
    return [Document(*entry) for entry in found["documents"]], [Function(*entry) for entry in found["functions"]]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python has no pydoc_data.topics, which the pydocs tasks read; some distributions keep it "
            "in a package of its own (such as libpython3-stdlib)"
        ) from error
    return topics


def _source_files() -> list[tuple[str, Path]]:
    """Returns (path below the library as posix, path) of the standard library's sources, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    kept = [(name, path) for name, path in files if not _LEFT_OUT & set(name.split("/")[:-1])]
    if not kept:
        raise ValueError(f"the pydocs tasks read the standard library's sources, but {root} has no .py files")
    return kept


def _extract(topics: dict[str, str], contents: dict[str, bytes]) -> bytes:
    """Returns the corpus as JSON; of duplicates the first is kept."""
    texts = {text.strip(): f"topics.{name}" for name, text in sorted(topics.items(), reverse=True)}
    texts = dict(reversed(texts.items()))
    pairs: dict[tuple[str, str], str] = {}
    for name, content in contents.items():
        module = name.split("/")[0].removesuffix(".py")
        source = content.decode("utf-8", "replace").replace("\r\n", "\n")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes in other people's string literals
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # some packages, such as lib2to3, have files with errors on purpose
        lines = [line.encode() for line in source.split("\n")]
        for node in _documented(tree):
            docstring = ast.get_docstring(node)
            if not docstring or not docstring.strip():
                continue
            texts.setdefault(docstring.strip(), module)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                pairs.setdefault((_without_docstring(node, lines), first_sentence(docstring)), module)
    found = {
        "documents": [(module, text) for text, module in texts.items()],
        "functions": [(module, source, summary) for (source, summary), module in pairs.items()],
    }
    return json.dumps(found).encode()


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """Yields a module's nodes that may carry a docstring, in source order."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # expressions hold no docstrings
            yield from _documented(child)


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    """Returns a function's source, dedented, without docstring and decorators; `lines`: the file's, UTF-8."""
    docstring = node.body[0]
    assert docstring.end_lineno is not None and docstring.end_col_offset is not None
    before = [
        *lines[node.lineno - 1 : docstring.lineno - 1],
        lines[docstring.lineno - 1][: docstring.col_offset],
    ]
    after = [
        lines[docstring.end_lineno - 1][docstring.end_col_offset :],
        *lines[docstring.end_lineno : node.end_lineno],
    ]
    if docstring.lineno == node.lineno:  # def f(): "docstring"; body
        kept = [before[0] + b"".join(after[:1]).lstrip(b"; \t"), *after[1:]]
    else:
        kept = before[:-1] + (after[1:] if not after[0].strip() else after)
    margin = node.col_offset
    text = "\n".join(
        (line[margin:] if not line[:margin].strip() else line).decode("utf-8", "replace").rstrip() for line in kept
    )
    return text.strip()


def first_sentence(docstring: str) -> str:
    """Returns the first sentence of a docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'`(\[])", text, maxsplit=1)[0]
