import gzip
import importlib.util
import json

import pytest

from meshway.tasks import manuals

SERVICE = {
    "metadata": {"serviceFullName": "A Service"},
    "documentation": "<p>It keeps things in a place where they are found again.</p>",
    "operations": {
        "GetThing": {
            "documentation": "<p>Returns a thing that was kept before, if <code>Name</code> is known.</p>",
            "input": {"shape": "GetThingRequest"},
            "output": {"shape": "Thing"},
        },
        "PutThing": {"input": {"shape": "Thing"}, "errors": [{"shape": "Full"}]},
    },
    "shapes": {
        "GetThingRequest": {"members": {"Name": {"shape": "Text", "documentation": "<p>The name that was given.</p>"}}},
        "Thing": {
            "documentation": "<p>A thing, with all the parts it was kept with before.</p>",
            "members": {
                "Parts": {"shape": "Things", "documentation": "<p>The parts of the thing, each again a thing.</p>"},
                "Same": {
                    "shape": "Text",
                    "documentation": "<p>A thing, with all the parts it was kept with before.</p>",
                },
            },
        },
        "Things": {"member": {"shape": "Thing"}},
        "Text": {},
        "Full": {"documentation": "<p>There is no more room for a thing of that size here.</p>"},
        "Unused": {"documentation": "<p>Nothing leads to this structure of the service.</p>"},
    },
}


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One  <code>a&lt;b</code>\n two.</p><p>Next.</p>", ["One a<b two.", "Next."]),
        ("<ul> <li> <p>First <b>bold</b></p> </li><li>Second</li> </ul>", ["- First bold", "- Second"]),
        ("<li><p>Item.</p><p>More of it.</p></li>", ["- Item.", "More of it."]),
        ("arn:aws:<region>:x<br/>and <a href='y'>a link</a>", ["arn:aws:<region>:x", "and a link"]),
        ("<note> <p/> </note><li></li>", []),
        ("a < b, <policy> and <pre>code</pre>", ["a < b, <policy> and", "code"]),
    ],
)
def test_html_becomes_paragraphs(html, text):
    assert manuals.paragraphs(html) == text


def test_an_operation_is_told_with_the_structures_it_is_first_to_use_and_nothing_twice():
    content = gzip.compress(json.dumps(SERVICE).encode())
    found = json.loads(manuals._extract({"twin": content, "service": content}))
    assert found == [
        ["twin", "A Service\nIt keeps things in a place where they are found again."],
        [
            "twin",
            "GetThing\nReturns a thing that was kept before, if Name is known.\n\n"
            "Thing\nA thing, with all the parts it was kept with before.\n"
            "Parts: The parts of the thing, each again a thing.",
        ],
        ["twin", "Full\nThere is no more room for a thing of that size here."],
    ]


def test_long_operations_end_a_page_between_structures():
    sections = [{"name": f"S{i}", "documentation": f"<p>{f'word{i} ' * 800}</p>"} for i in range(5)]
    pages = list(manuals._pages(sections, set()))
    assert [page.count("\n\n") + 1 for page in pages] == [3, 2]
    assert "\n\n".join(pages).split("\n\n") == [f"S{i}\n{' '.join([f'word{i}'] * 800)}" for i in range(5)]


@pytest.fixture(scope="module")
def read(manuals_cache):
    """All documents, from the session's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(manuals_cache))
        yield manuals._corpus()


@pytest.mark.slow
def test_the_cached_corpus_is_the_extracted_one(read, manuals_cache, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(manuals_cache))
    monkeypatch.setattr(manuals, "_extract", None)
    before = sorted(manuals_cache.iterdir())  # other tests may keep vocabularies there
    manuals._corpus.cache_clear()
    assert manuals._corpus() == read
    assert sorted(manuals_cache.iterdir()) == before


@pytest.mark.slow
def test_it_is_tens_of_megabytes_of_plain_text(read):
    assert sum(len(document.text) for document in read) > 20_000_000
    assert len(read) > 10_000 and max(len(document.text) for document in read) < 100_000
    assert not [d for d in read if "<p>" in d.text or "</" in d.text.replace("</a", "").replace("</p", "")][100:]
    assert all(document.text == document.text.strip() and "\0" not in document.text for document in read)


@pytest.mark.slow
def test_splits_share_no_service_and_no_long_paragraph(read):
    splits = {split: manuals.documents(split) for split in manuals.SPLITS}
    assert sum(map(len, splits.values())) == len(read)
    services, lines = (
        [{value for document in splits[split] for value in get(document)} for split in manuals.SPLITS]
        for get in (
            lambda document: [document.service],
            lambda document: [x for x in document.text.split("\n") if len(x) >= 80 and not x[:60].count(":")],
        )
    )
    assert not services[0] & services[1]
    assert not lines[0] & lines[1]
    sizes = [sum(len(document.text) for document in documents) for documents in splits.values()]
    assert 0.03 < sizes[1] / sum(sizes) < 0.08


def test_families_stay_together_and_splits_are_fixed():
    """Golden: a service that changed sides would leak into validation."""
    for names in (("lex-models", "lexv2-runtime"), ("ses", "sesv2"), ("waf", "wafv2", "waf-regional")):
        assert len({manuals.split_of(name) for name in names}) == 1
    names = ("ec2", "s3", "rds", "ses", "waf", "transcribe")
    assert [manuals.split_of(name) for name in names] == ["train"] * 3 + ["validation"] * 3


def test_the_extra_is_named_where_botocore_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package 'botocore'.*pip install 'meshway\[prose\]'"):
        manuals._service_files()
