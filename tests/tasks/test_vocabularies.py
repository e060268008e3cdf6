import copy
import pickle
import subprocess
import sys

import pytest

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()
import tensorflow as tf  # noqa: E402

from meshway.tasks import vocabularies  # noqa: E402

SAMPLE = "def f(x):\n    if x:\n        return '\\n'  # é ☃\n\n\nEnd  of\ttext. "


def small_texts():
    return [f"The quick brown fox number {i} jumps over\n    the lazy dog {i * i}." for i in range(200)]


def small(pieces=400):
    return vocabularies.TrainedSentencePieceVocabulary("small", small_texts, pieces=pieces, extra_ids=5)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_it_trains_when_first_used_and_only_once(cache, capfd):
    vocabulary = small()
    assert vocabulary == small() and copy.deepcopy(vocabulary) == vocabulary and str(vocabulary)
    assert not list(cache.iterdir())
    assert vocabulary.vocab_size == 405
    assert [vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id] == [0, 1, 2]
    assert f"training 400 pieces on 12,544 characters, once; kept in {cache}" in capfd.readouterr().err
    assert small().vocab_size == 405
    assert vocabulary == small() and pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert capfd.readouterr().err == ""
    assert len(list(cache.iterdir())) == 1
    assert small(401).path != vocabulary.path


def test_text_survives_encoding_in_python_and_in_tensorflow(cache, capfd):
    vocabulary = small()
    ids = vocabulary.encode(SAMPLE)
    capfd.readouterr()
    assert vocabulary.decode(ids) == SAMPLE
    assert vocabulary.encode_tf(tf.constant(SAMPLE)).numpy().tolist() == ids
    assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == SAMPLE
    assert max(ids) < 400 and vocabulary.tokenizer.id_to_piece(404) == "▁<extra_id_0>"
    assert capfd.readouterr().err == "", "SentencePiece speaks each time a dataset is built"


def test_training_gives_the_same_bytes_each_time(cache, monkeypatch):
    first = small().path.read_bytes()
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(cache / "other"))
    path = small().path
    assert path.parent == cache / "other" and path.read_bytes() == first


@pytest.mark.slow
def test_racing_processes_end_with_one_whole_file(cache):
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from meshway.framework.data.seqio_adapter import import_seqio
        import_seqio()
        import test_vocabularies
        v = test_vocabularies.small()
        print(v.path, v.encode(test_vocabularies.SAMPLE))
    """
    here = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", code, here]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [racer.communicate(timeout=300) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] == f"{small().path} {small().encode(SAMPLE)}\n"
    assert len(list(cache.iterdir())) == 1


def test_too_little_text_is_said_plainly(cache):
    with pytest.raises(ValueError, match="'small': SentencePiece cannot train 90000 pieces on 12544 characters"):
        _ = small(90_000).vocab_size


def test_bytes_are_byt5_s():
    assert vocabularies.byte().vocab_size == 359
    assert vocabularies.byte().encode("a") == [100]
    assert vocabularies.byte() is vocabularies.byte()
