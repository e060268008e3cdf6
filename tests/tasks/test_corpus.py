import ast
import inspect

import pytest

from meshway.tasks import corpus

SOURCE = '''
"""The module."""

class Thing:
    """A thing. It does nothing."""

    @property
    def name(self):
        """Returns the name, e.g. of a thing.  Another sentence.

        More of it.
        """
        # Kept comment.
        return "é" + """not a docstring"""

    def bare(self):
        """Nothing else here."""

    def inner(self):
        def helper(): "Doubles."; return 2
        return helper
'''


def nodes():
    return [n for n in corpus._documented(ast.parse(SOURCE)) if ast.get_docstring(n)]


def test_docstrings_are_found_in_source_order():
    assert [getattr(node, "name", "module") for node in nodes()] == [
        "module",
        "Thing",
        "name",
        "bare",
        "helper",
    ]


def test_source_loses_its_docstring_and_nothing_else():
    lines = [line.encode() for line in SOURCE.split("\n")]
    name, _, helper = nodes()[2:]
    expected = """
        def name(self):
            # Kept comment.
            return "é" + \"\"\"not a docstring\"\"\"
    """
    assert corpus._without_docstring(name, lines) == inspect.cleandoc(expected)
    assert corpus._without_docstring(helper, lines) == "def helper(): return 2"


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Returns x.  More.", "Returns x."),
        ("Returns x, e.g. of\n   y. Then\n stops", "Returns x, e.g. of y."),
        ("No full stop\n\nNext paragraph.", "No full stop"),
        ("Is it? Yes.", "Is it?"),
    ],
)
def test_first_sentence(docstring, sentence):
    assert corpus.first_sentence(docstring) == sentence


@pytest.fixture(scope="module")
def read(corpus_cache):
    """The documents and functions, from the session's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(corpus_cache))
        yield corpus._corpus()


@pytest.mark.slow
def test_the_cached_corpus_is_the_extracted_one(read, corpus_cache, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(corpus_cache))
    monkeypatch.setattr(corpus, "_extract", None)
    before = sorted(corpus_cache.iterdir())  # other tests may keep vocabularies there
    corpus._corpus.cache_clear()
    assert corpus._corpus() == read
    assert sorted(corpus_cache.iterdir()) == before


def test_splits_share_no_module_no_text_and_no_function(read):
    for get, key in ((corpus.documents, "text"), (corpus.functions, "source")):
        train, validation = get("train"), get("validation")
        assert not {x.module for x in train} & {x.module for x in validation}
        assert not {getattr(x, key) for x in train} & {getattr(x, key) for x in validation}


def test_validation_is_about_a_twentieth(read):
    texts = {split: sum(len(x.text) for x in corpus.documents(split)) for split in corpus.SPLITS}
    functions = {split: len(corpus.functions(split)) for split in corpus.SPLITS}
    for sizes in (texts, functions):
        assert 0.03 < sizes["validation"] / sum(sizes.values()) < 0.08
    assert texts["train"] > 1_500_000 and functions["train"] > 4_000


def test_functions_parse_and_have_lost_their_docstring(read):
    checked = read[1][:: len(read[1]) // 300]
    for function in checked:
        tree = ast.parse(function.source).body[0]
        assert function.summary and "\n" not in function.summary
        assert ast.get_docstring(tree) is None or function.summary not in ast.get_docstring(tree)


def test_splits_are_fixed():
    """Golden: a module that changed sides would leak into validation."""
    assert [corpus.split_of(name) for name in ("pathlib", "io", "_pyio", "argparse", "topics.lists")] == [
        "validation",
        "validation",
        "validation",
        "train",
        "validation",
    ]


def test_tests_and_installed_packages_are_left_out():
    names = [name for name, _ in corpus._source_files()]
    assert "asyncio/events.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
