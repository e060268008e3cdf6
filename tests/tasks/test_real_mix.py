import importlib

import pytest

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()

from meshway.tasks import real_mix  # noqa: E402


@pytest.fixture
def mixture():
    importlib.reload(real_mix)  # another test may have registered its sources anew
    return seqio.get_mixture_or_task("real_mix")


def test_five_sources_share_one_vocabulary_and_their_features(mixture):
    mixture._check_compatible_features()
    tasks = {task.name for task in seqio.get_subtasks(mixture)}
    assert len(tasks) == 12 and tasks > {"prose_bytes_text", "pydocs_bytes_text", "digits_text", "django_po_de"}
    assert mixture.output_features["targets"].vocabulary.vocab_size == 359
    assert all(task.supports_caching for task in seqio.get_subtasks(mixture))


def test_shares_are_as_its_table_says(mixture, tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    shares = {task.name: mixture.get_rate(task) for task in seqio.get_subtasks(mixture)}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(share for name, share in shares.items() if name.startswith("django_po")) == pytest.approx(0.2)
    assert {name: shares[name] for name in real_mix.RATES if name in shares} == pytest.approx(
        {name: rate for name, rate in real_mix.RATES.items() if name in shares}
    )
