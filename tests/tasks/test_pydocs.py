import importlib

import numpy as np
import pytest

from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.seqio_loader import SeqioData, import_seqio

MODULE = "meshway.tasks.pydocs"
LENGTHS = {"inputs": 128, "targets": 64}
NAMES = {
    *(f"pydocs_{task}" for task in ("span_corruption", "lm", "prefix_lm", "summary")),
    *(f"pydocs_bytes_{task}" for task in ("span_corruption", "lm", "summary")),
}


def test_registering_reads_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    seqio = import_seqio()
    for _ in range(2):
        module = importlib.import_module(MODULE)
        importlib.reload(module)
        assert {name for name in seqio.TaskRegistry.names() if name.startswith("pydocs")} == NAMES
        assert "pydocs_mix" in seqio.MixtureRegistry.names()
    assert not list(tmp_path.iterdir())
    seqio.get_mixture_or_task("pydocs_mix")._check_compatible_features()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cache(corpus_cache, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(corpus_cache))


def test_summary_over_bytes_is_read_and_scored(cache):
    data = SeqioData("pydocs_bytes_summary", LENGTHS, 8, EncoderDecoder(), module=MODULE, eval_examples=20)
    (task,) = data.eval_tasks()
    assert task.num_examples == 20 and task.has_metrics
    assert task.inputs_text(0).startswith("summarize: def ")
    assert task.metrics([task.target(i) for i in range(20)]) == {"token_f1": 100.0, "exact_match": 100.0}
    assert task.metrics(["zzz"] * 20) == {"token_f1": 0.0, "exact_match": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "converter", "lengths"),
    [
        ("pydocs_mix", EncoderDecoder(), LENGTHS),
        ("pydocs_lm", LanguageModel(), {"targets": 128}),
        ("pydocs_prefix_lm", PrefixLanguageModel(), LENGTHS),
        ("pydocs_summary", PrefixLanguageModel(), LENGTHS),
        ("pydocs_bytes_span_corruption", EncoderDecoder(), LENGTHS),
        ("pydocs_bytes_lm", LanguageModel(), {"targets": 128}),
    ],
)
def test_each_task_trains_and_evaluates_from_the_real_vocabulary(cache, name, converter, lengths):
    data = SeqioData(name, lengths, 16, converter, module=MODULE, eval_examples=50)
    first = next(data.train(slice(None)))
    again = next(data.train(slice(None)))
    sizes = data.vocabularies()
    for feature, array in first.items():
        np.testing.assert_array_equal(array, again[feature])
        if feature.endswith("_tokens"):
            assert array.min() >= 0 and array.max() < max(sizes.values())
    assert (first["decoder_segment_ids"] > 0).mean() > 0.2
    for task in data.eval_tasks():
        assert sum(real for _, real in task.batches()) > 0
