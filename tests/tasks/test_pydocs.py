import importlib

import numpy as np
import pytest

from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.seqio_adapter import import_seqio
from meshway.framework.data.seqio_loader import SeqioData
from meshway.tasks import corpus

MODULE = "meshway.tasks.pydocs"
LENGTHS = {"inputs": 128, "targets": 64}
NAMES = {
    *(f"pydocs_{task}" for task in ("text", "span_corruption", "lm", "prefix_lm", "summary")),
    *(f"pydocs_bytes_{task}" for task in ("text", "span_corruption", "lm", "summary")),
}


def test_registering_reads_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    seqio = import_seqio()
    for _ in range(2):
        module = importlib.import_module(MODULE)
        importlib.reload(module)
        assert {name for name in seqio.TaskRegistry.names() if name.startswith("pydocs")} == NAMES
        assert {"pydocs_mix", "pydocs_denoise_mix"} <= set(seqio.MixtureRegistry.names())
    assert not list(tmp_path.iterdir())
    for mixture in ("pydocs_mix", "pydocs_denoise_mix"):
        seqio.get_mixture_or_task(mixture)._check_compatible_features()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cache(corpus_cache, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(corpus_cache))


@pytest.mark.slow
def test_text_tasks_are_the_documents_and_are_counted(cache):
    seqio = import_seqio()
    importlib.import_module(MODULE)
    task = seqio.get_mixture_or_task("pydocs_bytes_text")
    texts = [document.text for document in corpus.documents("validation")]
    read = [e["targets"] for e in task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()]
    assert [task.output_features["targets"].vocabulary.decode(tokens.tolist()) for tokens in read] == texts
    assert task.num_input_examples("validation") == len(texts)
    mixture = seqio.get_mixture_or_task("pydocs_denoise_mix")
    assert [mixture.get_rate(task) for task in seqio.get_subtasks(mixture)] == [1.0, 1.0]


def test_what_is_cached_is_tokens_and_every_task_can_be(cache):
    seqio = import_seqio()
    importlib.import_module(MODULE)
    for name in NAMES:
        assert seqio.get_mixture_or_task(name).supports_caching, name
    task = seqio.get_mixture_or_task("pydocs_bytes_summary")
    cached = next(task.preprocess_precache(task.source.get_dataset("validation", shuffle=False)).as_numpy_iterator())
    function = corpus.functions("validation")[0]
    assert (
        bytes((cached["targets"] - 3).tolist()).decode() == function.summary == cached["targets_pretokenized"].decode()
    )
    assert bytes((cached["inputs"] - 3).tolist()).decode() == "summarize: " + function.source


def test_summary_over_bytes_is_read_and_scored(cache):
    data = SeqioData("pydocs_bytes_summary", LENGTHS, 8, EncoderDecoder(), module=MODULE, eval_examples=20)
    (task,) = data.eval_tasks()
    assert task.num_examples == 20 and task.has_metrics
    assert task.inputs_text(0).startswith("summarize: def ")
    assert task.metrics([task.target(i) for i in range(20)]).values == {"token_f1": 100.0, "exact_match": 100.0}
    assert task.metrics(["zzz"] * 20).values == {"token_f1": 0.0, "exact_match": 0.0}


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
    sizes = [vocabulary.size for vocabulary in data.vocabularies().values()]
    for feature, array in first.items():
        np.testing.assert_array_equal(array, again[feature])
        if feature.endswith("_tokens"):
            assert array.min() >= 0 and array.max() < max(sizes)
    assert (first["decoder_segment_ids"] > 0).mean() > 0.2
    for task in data.eval_tasks():
        assert sum(real for _, real in task.batches()) > 0
