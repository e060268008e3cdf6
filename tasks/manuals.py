"""The reference manuals in the package botocore: about 30 MB of English technical prose.

botocore (Apache-2.0) describes each service of Amazon Web Services in one JSON file, whose documentation is
HTML. A document is an operation: its description, then, member by member, the structures that it is the first of its
service to use. Nothing is downloaded and botocore is not imported. Another version of botocore yields another corpus.
"""

import dataclasses
import functools
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshway.tasks.registry import cached_file, package_directory

SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5
# This salt gives 5.1 % of the text, from 25 services, none above an eighth of the split; 1.7 % of the runs of
# 13 words of the split are in train too (botocore 1.44).
_SALT = "356/"
_LAYOUT = 1  # increase it whenever the same files would yield another corpus
_SHORT = 40  # characters; a shorter paragraph ("Required.") may recur, and does not make a document by itself
_PAGE = 10_000  # characters after which a document ends at the next structure
_INLINE = ("a", "b", "code", "em", "i", "strong", "text", "u")
_LISTS = ("dd", "dl", "dt", "li", "ol", "ul")
_BLOCKS = ("br", "caution", "fullname", "h[1-6]", "important", "note", "p", "para", "pre", "xhtml", "zonbook")
_NAMES = "|".join([*_INLINE, *_LISTS, *_BLOCKS])
_TAG = re.compile(rf"<(/?)({_NAMES})\b[^>]*>")  # other angle brackets are placeholders: <region>
_END = "\0"


@dataclasses.dataclass(frozen=True)
class Document:
    """An operation of a service, with the structures it uses."""

    service: str
    text: str


def documents(split: str) -> list[Document]:
    """Returns the documents of 'train' or 'validation', in a fixed order, no paragraph of text twice.

    Raises:
      ValueError: botocore is not installed.
    """
    return [document for document in _corpus() if split_of(document.service) == split]


def split_of(service: str) -> str:
    """Returns the split of a service, by a hash of its family's name, which `lexv2-models` and `lex-runtime` share."""
    family = re.sub(r"(v\d+)?(-.*)?$", "", service)
    bucket = int.from_bytes(hashlib.sha256((_SALT + family).encode()).digest()[:8], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


def paragraphs(documentation: str) -> list[str]:
    """Returns the paragraphs of HTML documentation as plain text, list items beginning with '- '."""

    def mark(tag: re.Match[str]) -> str:
        if tag[2] in _INLINE:
            return ""
        return f"{_END}- " if tag[2] == "li" and not tag[1] else _END

    # A paragraph that begins a list item is on the item's line.
    text = re.sub(rf"(?<={_END}- )[\s{_END}]+", "", _TAG.sub(mark, documentation))
    lines = (" ".join(html.unescape(part).split()) for part in text.split(_END))
    return [line for line in lines if line.strip("- ")]


@functools.cache
def _corpus() -> list[Document]:
    """Returns all documents; reading the package takes seconds, so they are cached by the files' hash."""
    digest = hashlib.sha256(f"{_LAYOUT}\n".encode())
    files = _service_files()
    contents = {}
    for service, path in files:
        contents[service] = path.read_bytes()
        digest.update(f"{service}\n{len(contents[service])}\n".encode() + contents[service])
    path = cached_file(f"manuals-{digest.hexdigest()[:16]}.json", lambda: _extract(contents))
    return [Document(*entry) for entry in json.loads(path.read_text("utf-8"))]


def _service_files() -> list[tuple[str, Path]]:
    """Returns (service, path of its newest description), sorted."""
    root = package_directory("botocore", "prose") / "data"
    newest = {path.parent.parent.name: path for path in sorted(root.glob("*/*/service-2.json.gz"))}
    if not newest:
        raise ValueError(f"the prose tasks read botocore's descriptions of services, but {root} has none")
    return sorted(newest.items())


def _extract(contents: dict[str, bytes]) -> bytes:
    """Returns the corpus as JSON; of duplicate paragraphs the first is kept."""
    seen: set[str] = set()
    found = []
    for service, content in contents.items():
        for sections in _operations(json.loads(gzip.decompress(content))):
            found += [(service, page) for page in _pages(sections, seen)]
    return json.dumps(found).encode()


def _operations(service: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yields, for the service and each of its operations, its sections: each with name, documentation and members.

    A structure is in the sections of the first operation that uses it, after the structures that refer to it.
    """
    shapes = service["shapes"]
    told: set[str] = set()

    def reach(name: str) -> Iterator[dict[str, Any]]:
        if name in told:
            return
        told.add(name)
        shape = shapes[name]
        yield {"name": name, **shape}
        parts = [
            *shape.get("members", {}).values(),
            *(shape[key] for key in ("member", "key", "value") if key in shape),
        ]
        for part in parts:
            yield from reach(part["shape"])

    yield [{"name": service["metadata"].get("serviceFullName", ""), "documentation": service.get("documentation")}]
    for name, operation in service["operations"].items():
        used = [operation[key] for key in ("input", "output") if key in operation] + operation.get("errors", [])
        sections = [section for part in used for section in reach(part["shape"])]
        yield [{"name": name, "documentation": operation.get("documentation")}, *sections]


def _pages(sections: list[dict[str, Any]], seen: set[str]) -> Iterator[str]:
    """Yields an operation's documents: one, or several where its structures are many."""
    page: list[str] = []
    size = 0
    for section in sections:
        lines = _fresh(section.get("documentation"), seen)
        for name, member in section.get("members", {}).items():
            first, *rest = _fresh(member.get("documentation"), seen) or [""]
            lines += [f"{name}: {first}", *rest] if first else []
        if lines:
            page.append("\n".join([section["name"], *lines]))
            size += len(page[-1])
        if size > _PAGE:
            yield "\n\n".join(page)
            page, size = [], 0
    if page:
        yield "\n\n".join(page)


def _fresh(documentation: str | None, seen: set[str]) -> list[str]:
    """Returns the paragraphs not yet seen, [] where only short ones are left; adds them to `seen`."""
    kept = [line for line in paragraphs(documentation or "") if line not in seen]
    kept = list(dict.fromkeys(kept))
    long = [line for line in kept if len(line) >= _SHORT]
    seen.update(long)
    return kept if long else []
