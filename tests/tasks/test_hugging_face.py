import copy
import json
import pickle
import sys

import numpy as np
import pytest

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()
import tensorflow as tf  # noqa: E402
import tokenizers  # noqa: E402

from meshway.framework.data.vocabularies import load, of_seqio  # noqa: E402
from meshway.tasks.hugging_face import HuggingFaceVocabulary, TrainedBytePairVocabulary  # noqa: E402

SAMPLE = "def f(x):\n    if x:\n        return '\\n'  # é ☃\n\n\nEnd  of\ttext. <extra_id_0>\0"


def texts():
    return [f"The quick brown fox number {i} jumps over\n    the lazy dog {i * i}." for i in range(200)]


def small(pieces=400, extra_ids=5):
    return TrainedBytePairVocabulary("small", texts, pieces, extra_ids)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpt2(tmp_path):
    """A file like GPT-2's: id 0 is a letter, the only special token is the last one; it asks to cut and to pad."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 300)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=300, pad_token="<|endoftext|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def words(path, *, unknown="[UNK]", extra=()):
    """Writes a word-level file, with words of its own and `extra` as special tokens after them."""
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(extra))
    tokenizer.save(str(path))
    return path


def test_ids_are_the_file_s_and_id_0_is_a_token(gpt2):
    vocabulary = HuggingFaceVocabulary(gpt2, "<|endoftext|>")
    plain = tokenizers.Tokenizer.from_file(str(gpt2))
    plain.no_truncation()
    plain.no_padding()
    letter = plain.id_to_token(0)
    text = f"{letter}{letter} The quick {letter}"
    ids = vocabulary.encode(text)
    assert ids == plain.encode(text, add_special_tokens=False).ids and ids[0] == 0 and len(ids) > 4
    assert vocabulary.decode(ids) == text
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.unk_id) == (301, 300, None)
    assert (vocabulary.pad_id, vocabulary.bos_id) == (0, None)
    assert HuggingFaceVocabulary(gpt2.parent, "<|endoftext|>").encode(text) == ids
    assert vocabulary.decode([*ids, 300, 5, 5]) == text
    assert HuggingFaceVocabulary(gpt2).decode([*ids, 300, 0]) == f"{text}<|endoftext|>{letter}"


def test_tensorflow_gives_the_same_ids_and_text(cache, gpt2):
    for vocabulary in (small(), HuggingFaceVocabulary(gpt2, "<|endoftext|>", 3)):
        ids = list(vocabulary.encode(SAMPLE))
        assert vocabulary.decode(ids) == SAMPLE
        encoded = vocabulary.encode_tf(tf.constant(SAMPLE))
        assert encoded.dtype == tf.int32 and encoded.numpy().tolist() == ids
        assert vocabulary.decode_tf(encoded).numpy().decode() == SAMPLE
        rows = np.zeros((2, len(ids) + 3), np.int32)
        rows[0, : len(ids) + 1] = [*ids, vocabulary.eos_id]
        rows[1, :2] = [ids[0], vocabulary.eos_id]
        decoded = vocabulary.decode_tf(tf.constant(rows)).numpy()
        assert [text.decode() for text in decoded] == [SAMPLE, vocabulary.decode(ids[:1])]
        several = vocabulary.encode_tf(tf.constant([SAMPLE, "", "fox"]))
        assert several.to_list() == [ids, [], list(vocabulary.encode("fox"))]


def test_a_task_reads_it_through_tf_data(cache):
    vocabulary = small()
    seqio.TaskRegistry.add(
        "tokenized_by_bpe",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({"targets": texts()[:7]}),
            splits=["train"],
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    try:
        dataset = seqio.get_mixture_or_task("tokenized_by_bpe").get_dataset(None, "train", shuffle=False)
        assert dataset.element_spec["targets"] == tf.TensorSpec([None], tf.int32)
        found = [example["targets"].tolist() for example in dataset.as_numpy_iterator()]
    finally:
        seqio.TaskRegistry.remove("tokenized_by_bpe")
    assert found == [[*vocabulary.encode(text), 1] for text in texts()[:7]]


def test_extra_ids_go_above_the_file_s_tokens(gpt2):
    plain, vocabulary = HuggingFaceVocabulary(gpt2), HuggingFaceVocabulary(gpt2, "<|endoftext|>", 3)
    assert (vocabulary.vocab_size, vocabulary.extra_ids, vocabulary.eos_id) == (304, 3, 300)
    assert vocabulary.encode("<extra_id_0><extra_id_2> fox") == [303, 301, *plain.encode(" fox")]
    assert vocabulary.decode([303, 302, 301]) == "<extra_id_0><extra_id_1><extra_id_2>"


def test_extra_ids_that_a_file_has_are_taken_as_they_are(tmp_path):
    theirs = words(tmp_path / "t5.json", extra=["</s>", "<extra_id_1>", "<extra_id_0>"])
    vocabulary = HuggingFaceVocabulary(theirs, "</s>", extra_ids=2)
    assert vocabulary.vocab_size == 6 and vocabulary.encode("a <extra_id_0> <extra_id_1>") == [0, 5, 4]
    with pytest.raises(ValueError, match=r"t5.json has 2 of the 3 tokens <extra_id_N>, and not as its highest ids"):
        _ = HuggingFaceVocabulary(theirs, "</s>", extra_ids=3).vocab_size
    elsewhere = words(tmp_path / "other.json", extra=["<extra_id_0>", "<extra_id_1>"])
    with pytest.raises(ValueError, match="other.json has 2 of the 2 tokens"):
        _ = HuggingFaceVocabulary(elsewhere, extra_ids=2).vocab_size


def test_unknown_ids_and_words_are_the_file_s_unknown_token(tmp_path):
    vocabulary = HuggingFaceVocabulary(words(tmp_path / "words.json"))
    assert vocabulary.unk_id == 2 and vocabulary.encode("a c b") == [0, 2, 1]
    assert vocabulary.decode([0, 77, 1]) == "a [UNK] b" == of_seqio(vocabulary).decode([0, 77, 1])
    pieces = [("a", -1.0), ("b", -1.0), ("<unk>", 0.0)]
    tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2)).save(str(tmp_path / "unigram.json"))
    unigram = HuggingFaceVocabulary(tmp_path / "unigram.json")
    assert unigram.unk_id == 2 == of_seqio(unigram).unk_id and unigram.encode("abc") == [0, 1, 2]


def test_what_does_not_fit_is_said_plainly(tmp_path, gpt2, monkeypatch):
    with pytest.raises(ValueError, match="cannot read the tokenizer .*none.json: No such file"):
        _ = HuggingFaceVocabulary(tmp_path / "none.json").vocab_size
    with pytest.raises(ValueError, match=r"has no token '</s>'; its added tokens: \['<\|endoftext\|>'\]"):
        _ = HuggingFaceVocabulary(gpt2, "</s>").eos_id
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json is not a tokenizer.json that tokenizers can read"):
        _ = HuggingFaceVocabulary(tmp_path / "broken.json").vocab_size
    described = json.loads(words(tmp_path / "words.json", extra=["</s>"]).read_text())
    described["added_tokens"][0]["id"] = 9
    (tmp_path / "hole.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="hole.json: added token '</s>' has id 9, but tokenizers reads it as 3"):
        _ = HuggingFaceVocabulary(tmp_path / "hole.json").vocab_size
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'meshway\[hf\]'"):
        _ = HuggingFaceVocabulary(gpt2).vocab_size


def test_it_is_read_late_and_compared_by_what_was_asked(gpt2):
    absent = HuggingFaceVocabulary("/nowhere/tokenizer.json", "</s>", 2)
    assert str(absent) == "HuggingFaceVocabulary('/nowhere/tokenizer.json', eos_token='</s>', extra_ids=2)"
    vocabulary = HuggingFaceVocabulary(gpt2, "<|endoftext|>")
    assert vocabulary.vocab_size and vocabulary.unk_id is None and vocabulary.eos_id
    for other in (HuggingFaceVocabulary(gpt2, "<|endoftext|>"), copy.deepcopy(vocabulary)):
        assert vocabulary == other and hash(vocabulary) == hash(other)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again == vocabulary and again.encode("fox") == vocabulary.encode("fox")
    for other in (HuggingFaceVocabulary(gpt2), HuggingFaceVocabulary(gpt2, "<|endoftext|>", 1), absent, "other"):
        assert vocabulary != other


def test_training_happens_once_and_gives_the_same_bytes_each_time(cache, monkeypatch, capfd):
    vocabulary = small()
    assert vocabulary == small() and copy.deepcopy(vocabulary) == vocabulary != small(401) and str(vocabulary)
    assert not cache.exists()
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.tokenizer.id_to_token(0)) == (405, 1, "<pad>")
    assert f"training 400 byte-level BPE tokens on 12,744 characters, once; kept in {cache}" in capfd.readouterr().err
    assert small().encode(SAMPLE) == vocabulary.encode(SAMPLE) and capfd.readouterr().err == ""
    assert [path.name for path in cache.iterdir()] == [vocabulary.path.name]
    assert small(401).path != vocabulary.path
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(cache / "other"))
    again = small().path
    assert again.parent == cache / "other" and again.read_bytes() == vocabulary.path.read_bytes()


def test_too_little_text_to_train_on_is_said_plainly(cache):
    with pytest.raises(ValueError, match="'small': 12744 characters give .* byte-level BPE tokens, not 90000"):
        _ = small(90_000).vocab_size


@pytest.mark.parametrize("spelt", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>"])
def test_a_special_token_that_a_text_spells_out_may_be_taken_literally(gpt2, spelt, tmp_path):
    """Text of users must not end an example, nor speak for another side."""
    control, literal = (HuggingFaceVocabulary(gpt2, "<|endoftext|>", literal=each) for each in (False, True))
    assert 300 in control.encode(spelt) and 300 not in literal.encode(spelt)
    assert literal.decode(literal.encode(spelt)) == spelt
    assert literal.encode("a quick text") == control.encode("a quick text")
    assert control != literal and copy.copy(literal) == literal
    own = of_seqio(literal)
    assert own.encode(spelt) == literal.encode(spelt) and own.fingerprint != of_seqio(control).fingerprint
    assert own.start == of_seqio(control).start == (300,), "what the tokenizer itself puts there stays"
    own.save(tmp_path, "inputs")
    assert load(tmp_path, "inputs").encode(spelt) == own.encode(spelt)
    assert pickle.loads(pickle.dumps(own)).encode(spelt) == own.encode(spelt)
