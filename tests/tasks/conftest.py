"""The real corpora, extracted once a session into caches of their own."""

from pathlib import Path
from types import ModuleType

import pytest


def extracted(module: ModuleType, directory: Path) -> Path:
    """Returns `directory`, used as the cache into which `module` extracts its corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(directory))
        module._corpus.cache_clear()
        module._corpus()
    return directory


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache directory that holds the corpus, not the vocabulary."""
    from meshway.tasks import corpus

    return extracted(corpus, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def manuals_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a cache directory that holds botocore's manuals, not the vocabulary."""
    from meshway.tasks import manuals

    return extracted(manuals, tmp_path_factory.mktemp("manuals"))
