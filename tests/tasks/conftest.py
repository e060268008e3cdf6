"""The real corpora, extracted once a session into caches of their own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache directory that holds the corpus, not the vocabulary."""
    from meshway.tasks import corpus

    directory = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(directory))
        corpus._corpus.cache_clear()
        corpus._corpus()
    return directory


@pytest.fixture(scope="session")
def manuals_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache directory that holds botocore's manuals, not the vocabulary."""
    from meshway.tasks import manuals

    directory = tmp_path_factory.mktemp("manuals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(directory))
        manuals._corpus.cache_clear()
        manuals._corpus()
    return directory
