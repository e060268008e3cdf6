import importlib

import pytest

from meshway.framework.data.seqio_adapter import import_seqio
from meshway.tasks import manuals

MODULE = "meshway.tasks.prose"


def task(name):
    importlib.import_module(MODULE)
    return import_seqio().get_mixture_or_task(name)


def test_registering_reads_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(manuals, "_service_files", None)  # as if botocore were missing
    seqio = import_seqio()
    for _ in range(2):
        importlib.reload(importlib.import_module(MODULE))
        names = {name for name in seqio.TaskRegistry.names() if name.startswith("prose")}
        assert names == {"prose_text", "prose_lm", "prose_bytes_text", "prose_bytes_lm"}
    assert all(task(name).supports_caching for name in names)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cache(manuals_cache, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(manuals_cache))


def test_texts_are_the_documents_without_eos(cache):
    prose = task("prose_bytes_text")
    documents = manuals.documents("validation")
    assert prose.num_input_examples("validation") == len(documents)
    read = prose.get_dataset(None, "validation", shuffle=False).take(100)
    for document, example in zip(documents, read.as_numpy_iterator()):
        assert list(example) == ["targets"]
        assert bytes((example["targets"] - 3).tolist()).decode() == document.text


def test_windows_join_to_the_documents_with_their_ends(cache):
    lm = task("prose_bytes_lm").get_dataset({"targets": 512}, "validation", shuffle=False)
    windows = [example["targets"].tolist() for example in lm.take(200).as_numpy_iterator()]
    assert {len(window) for window in windows} == {512}
    stream = sum(windows, [])
    joined = b"\xfe".join(document.text.encode() for document in manuals.documents("validation"))
    assert bytes(0xFE if token == 1 else token - 3 for token in stream) == joined[: len(stream)]


@pytest.mark.slow
def test_the_vocabulary_spells_what_it_was_not_trained_on(manuals_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(manuals_cache))
    vocabulary = task("prose_text").output_features["targets"].vocabulary
    assert vocabulary.vocab_size == 8100
    documents = manuals.documents("validation")
    encoded = [vocabulary.encode(document.text) for document in documents]
    assert [vocabulary.decode(tokens) for tokens in encoded] == [document.text for document in documents]
    assert sum(len(document.text) for document in documents) / sum(map(len, encoded)) > 3.5  # characters a token
