import copy
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshway.framework.data.cache.fingerprint import vocabulary_fingerprint
from meshway.framework.data.eval_task import TaskEvaluation
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.seqio_adapter import import_seqio
from meshway.framework.data.vocabularies import (
    Bytes,
    HuggingFace,
    Opaque,
    Own,
    SentencePiece,
    check_named,
    load,
    numbers_only,
    of_seqio,
    with_their_code,
)
from meshway.framework.errors import UserError
from meshway.framework.training.run_directory import RunDirectory

seqio = import_seqio()
import tokenizers  # noqa: E402
from sentencepiece import sentencepiece_model_pb2  # noqa: E402

from meshway.tasks import hugging_face, vocabularies  # noqa: E402

SAMPLE = "def f(x):\n    if x:\n        return '\\n'  # é ☃\n\n\nEnd  of\ttext. <extra_id_0> and <extra_id_3>"
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts():
    return [f"The quick brown fox number {i} jumps over\n    the lazy dog {i * i}." for i in range(200)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWAY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def lazy(cache):
    return vocabularies.TrainedSentencePieceVocabulary("small", texts, pieces=400, extra_ids=5)


def cutting(bpe, path):
    """Returns the same tokens in a file that asks to begin with EOS, to cut and to pad."""
    tokenizer = tokenizers.Tokenizer.from_str(bpe.tokenizer_json)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return hugging_face.HuggingFaceVocabulary(path, "</s>", 5)


@pytest.fixture(scope="module")
def kinds(lazy, cache, tmp_path_factory):
    """Returns every seqio vocabulary that keeps its text."""
    lower = sentencepiece_model_pb2.NormalizerSpec(remove_extra_whitespaces=True, add_dummy_prefix=False)
    return {
        "lazy": lazy,
        "plain": seqio.SentencePieceVocabulary(str(lazy.path)),
        "reversed": seqio.SentencePieceVocabulary(str(lazy.path), 7),
        "ascending": seqio.SentencePieceVocabulary(str(lazy.path), 7, reverse_extra_ids=False),
        "normalized": seqio.SentencePieceVocabulary(str(lazy.path), 5, normalizer_spec_overrides=lower),
        "bytes": seqio.ByteVocabulary(100),
        "bare bytes": seqio.ByteVocabulary(),
        "bpe": (bpe := hugging_face.TrainedBytePairVocabulary("small", texts, pieces=400, extra_ids=5)),
        "cutting bpe": cutting(bpe, tmp_path_factory.mktemp("cutting") / "tokenizer.json"),
    }


@pytest.fixture(scope="module")
def converted(kinds):
    return {name: of_seqio(vocabulary) for name, vocabulary in kinds.items()}


NAMES = ("lazy", "plain", "reversed", "ascending", "normalized", "bytes", "bare bytes", "bpe", "cutting bpe")


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    ids=st.lists(st.one_of(st.integers(0, 450), st.integers(0, 5), st.just(10**6))),
)
def test_ids_and_text_are_seqio_s(kinds, converted, name, text, ids):
    theirs, ours = kinds[name], converted[name]
    assert ours.encode(text) == list(theirs.encode(text))
    assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours.pieces(ids)) == len(ids) and all(isinstance(piece, str) for piece in ours.pieces(ids))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_samples_are_seqio_s(kinds, name):
    theirs, ours = kinds[name], of_seqio(kinds[name])
    assert (ours.size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    assert (ours.pad_id, ours.extra_ids) == (theirs.pad_id, theirs.extra_ids)
    assert vars(ours.info) == {"size": ours.size, "eos_id": 1, "extra_ids": ours.extra_ids, "sentinels": ()}
    assert ours.encode(SAMPLE) == list(theirs.encode(SAMPLE))
    everything = [token for token in range(ours.size + 3) if token != 1]
    assert ours.decode(everything) == theirs.decode(everything)
    for token in range(ours.size + 3):
        assert ours.decode([token]) == theirs.decode([token])
    assert of_seqio(ours) is ours


def test_sentinels_have_the_ids_that_spans_use(kinds):
    for name in ("lazy", "reversed", "bpe"):
        vocabulary = of_seqio(kinds[name])
        assert vocabulary.encode("<extra_id_1>")[-1] == vocabulary.size - 2
        assert vocabulary.pieces([vocabulary.size - 1])[0].strip() == "<extra_id_0>"
    ascending = of_seqio(kinds["ascending"])
    assert ascending.pieces([ascending.size - 7, ascending.size - 1]) == [" <extra_id_0>", " <extra_id_6>"]
    assert of_seqio(kinds["bytes"]).pieces([358, 259]) == ["<extra_id_0>", "<extra_id_99>"]


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(text=st.text(st.sampled_from("abc fox\n\t(=).!~09"), max_size=40))
def test_pieces_of_ascii_spell_the_text(converted, name, text):
    ours = converted[name]
    if name != "normalized":
        begins = " " if isinstance(ours, SentencePiece) and text else ""  # SentencePiece puts one before a text
        assert "".join(ours.pieces(ours.encode(text))) == begins + text


def test_pieces_are_for_people(kinds):
    bpe, pieces, in_bytes = (of_seqio(kinds[name]) for name in ("bpe", "lazy", "bytes"))
    assert bpe.pieces(bpe.encode(" fox\n☃")) == [" fox", "\n", "<0xE2>", "<0x98>", "<0x83>"]
    assert pieces.pieces(pieces.encode("a\n☃")) == [" ", "a", "\n", "<0xE2>", "<0x98>", "<0x83>"]
    assert in_bytes.pieces([0, 1, 2, 100, 3, 200, 999, -1]) == [
        "<pad>", "</s>", "<unk>", "a", "<0x00>", "<0xC5>", "<unk>", "<unk>",
    ]  # fmt: skip
    assert pieces.pieces([0, 1, 2, 999, -1]) == ["<pad>", "</s>", "<unk>", "<unk>", "<unk>"]
    assert bpe.pieces([0, 1, 999, -1]) == ["<pad>", "</s>", "<999>", "<-1>"]


class Shouting(seqio.ByteVocabulary):
    """A subclass with an encoding of its own is no byte vocabulary."""

    def _encode(self, s):
        return super()._encode(s.upper())


def test_what_is_not_known_keeps_its_numbers_only():
    unknown = of_seqio(seqio.PassThroughVocabulary(17, eos_id=3))
    assert isinstance(unknown, Opaque) and (unknown.size, unknown.eos_id, unknown.unk_id) == (17, 3, None)
    assert unknown.pieces([5, 40]) == ["<5>", "<40>"] and unknown.decode([5, 40]) == "<5> <40>"
    with pytest.raises(ValueError, match="text, and there is none in opaque vocab.*PassThrough.*: give token ids, as"):
        unknown.encode("a")
    assert type(pickle.loads(pickle.dumps(of_seqio(Shouting(4))))) is Opaque
    with pytest.raises(UserError, match="builtins.object is no vocabulary: it has no vocab_size"):
        of_seqio(object())
    assert of_seqio(Shouting(4)).info.extra_ids == 4
    letters = [of_seqio(seqio.PartialCodepointVocabulary(list(map(ord, word)))) for word in ("The", "fox", "fox")]
    assert letters[0].size == letters[1].size
    assert letters[0].fingerprint != letters[1].fingerprint == letters[2].fingerprint


PIECES = [
    "[PAD]",
    "the",
    "##ing",
    "##s",
    *".,'",
    "n",
    "do",
    "not",
    "don",
    "fox",
    "é",
    "jump",
    "[UNK]",
    *"a!",
    "[CLS]",
    "[SEP]",
]


class Letters:
    """A vocabulary as users write one, with no base class."""

    vocab_size, eos_id = 28, 1

    def encode(self, text):
        return [" abcdefghijklmnopqrstuvwxyz".index(letter) + 1 for letter in text]

    def decode(self, ids):
        return "".join(" abcdefghijklmnopqrstuvwxyz"[token - 1] for token in ids if token > 1)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Returns seqio's vocabularies that are neither SentencePiece nor bytes, and one of a user's."""
    words = tmp_path_factory.mktemp("pieces") / "vocab.txt"
    words.write_text("\n".join(PIECES) + "\n")
    special = {"start_of_sequence_id": 17, "end_of_sequence_id": 18}
    return {
        "words": seqio.UnigramVocabulary(["the", "fox", "é", "the"][:3], split_on_space=True),
        "one word": seqio.UnigramVocabulary(["the fox", "fox"]),
        "characters": seqio.FullCodepointVocabulary(),
        "some characters": seqio.PartialCodepointVocabulary([*map(ord, "the fox.é☃")], extra_ids=3),
        "word pieces": seqio.BertWordPieceVocabulary(str(words), **special),
        "lower word pieces": seqio.BertWordPieceVocabulary(str(words), lower_case=True, **special),
        "a user's": Shouting(4),
    }


OTHERS = ("words", "one word", "characters", "some characters", "word pieces", "lower word pieces", "a user's")
SAID = [
    "the fox",
    "the",
    "don't do a jump!",
    "the  fox.\n",
    "THE Fox \u2603",
    "é zzz the\x00",
    "fox jumping foxs , the",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_seqio_keep_their_text_too(others, name, tmp_path):
    theirs = others[name]
    ours = of_seqio(theirs)
    assert (ours.size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    assert (ours.pad_id, ours.extra_ids, ours.start) == (theirs.pad_id, theirs.extra_ids, (0,))
    ours.save(tmp_path, "targets")
    again = load(tmp_path, "targets")
    assert again == ours and again.fingerprint == ours.fingerprint
    both = [ours] if name == "a user's" else [ours, again, pickle.loads(pickle.dumps(ours))]
    for each in both:
        for text in SAID:
            ids = np.asarray(theirs.encode(text))  # a scalar or, of word pieces, a matrix that is filled up with 0
            assert each.encode(text) == [int(token) for token in ids.reshape(-1) if ids.ndim < 2 or token]
        most = min(ours.size + 3, 300)
        for ids in ([5, 2, 3], [2, ours.size - 1, 3], range(2, most), *([token] for token in range(most))):
            assert each.decode(list(ids)) == theirs.decode(list(ids))
            written = each.detokenizer()
            kept = [each.known(token) for token in ids if token != each.eos_id]
            assert "".join(map(written.feed, kept)) + written.finish() == each.decode(kept)
            assert len(each.pieces(ids)) == len(ids)
        assert each.decode([]) == ""


def test_an_evaluation_writes_an_empty_prediction_of_any_kind(others):
    for theirs in others.values():
        task = SimpleNamespace(output_features={"targets": SimpleNamespace(vocabulary=theirs)})
        evaluated = TaskEvaluation("t", InMemory([]), None, None, {}, 1, {"targets": of_seqio(theirs)}, task)
        assert evaluated._decode("targets", [] if theirs.eos_id is None else [theirs.eos_id, 2]) == ""


def test_a_word_piece_may_have_the_id_that_fills_a_matrix_up(tmp_path):
    """And a line may be none of UTF-8, as TensorFlow reads it."""
    (tmp_path / "vocab.txt").write_bytes(b"hello\n[UNK]\nworld\n##s\n[PAD]\n\xff\n[CLS]\n[SEP]\n")
    special = {"pad_id": 4, "start_of_sequence_id": 6, "end_of_sequence_id": 7}
    ours = of_seqio(seqio.BertWordPieceVocabulary(str(tmp_path / "vocab.txt"), **special))
    assert ours.encode("hello world") == [0, 2] and ours.encode("hello worlds") == [0, 2, 3]
    assert ours.encode("") == [] == ours.encode("  ") and ours.pieces([5]) == ["\ufffd"]


def test_the_code_of_token_ids_is_not_looked_for():
    ids = of_seqio(seqio.PassThroughVocabulary(17))
    assert with_their_code({"targets": ids}, mock.Mock(side_effect=AssertionError)) == {"targets": ids}


def test_characters_that_are_none_can_be_written(others):
    ours = of_seqio(others["characters"])
    assert ours.decode([97, 0xD800, 0x110000, 98]) == "a\ufffd\ufffdb"


def test_a_vocabulary_of_other_numbers_than_its_class_has_goes_by_its_own_code():
    class Ended(seqio.UnigramVocabulary):
        eos_id = 1

    ours = of_seqio(Ended(["</s>", "a"], split_on_space=True))
    assert type(ours) is Own and ours.encode("a b") == [2, 3] and ours.decode([2, 1, 2]) == "a </s>"


def test_an_object_with_an_encoding_and_a_decoding_is_a_vocabulary(tmp_path):
    ours = of_seqio(Letters())
    assert ours.encode("a fox") == [2, 1, 7, 16, 25] and ours.decode([7, 16, 25]) == "fox"
    with pytest.raises(ValueError, match="Letters cannot encode 'naïve': ValueError: substring not found"):
        ours.encode("naïve")
    with pytest.raises(UserError, match=r"Letters cannot decode \[99\]: IndexError: string index out of range"):
        ours.decode([99])
    ours.save(tmp_path, "targets")
    saved = {"targets": load(tmp_path, "targets")}
    assert type(saved["targets"]) is Opaque and saved["targets"].decode([7, 16]) == "<7> <16>"
    assert with_their_code(saved, lambda: {"targets": ours})["targets"] is ours
    other = of_seqio(Shouting(4))
    for registered, why in (
        (lambda: {}, "which the run's task does not have"),
        (lambda: {"targets": other}, "the run's task now has another, opaque vocabulary of 263 ids"),
        (mock.Mock(side_effect=UserError("no task")), "which is looked up in the run's task: no task"),
    ):
        left = with_their_code(saved, registered)["targets"]
        with pytest.raises(ValueError, match=re.escape(why) + ".*give token ids"):
            left.encode("a")
    assert with_their_code({"targets": Bytes()}, None) == {"targets": Bytes()}


def test_runs_and_caches_of_kinds_that_were_numbers_only_go_on(others, tmp_path):
    """Earlier versions saved these as opaque: a run is resumed, and its cache is not stale."""
    for name in OTHERS[:-1]:
        theirs = others[name]
        before = numbers_only(theirs)
        run = RunDirectory(tmp_path / name)
        run.root.mkdir()
        run.save_vocabularies({"targets": before})
        run.check_vocabularies({"targets": of_seqio(theirs)})
        assert vocabulary_fingerprint(theirs).startswith(f"{before}, {before.fingerprint}, ")
        found = with_their_code({"targets": before}, lambda theirs=theirs: {"targets": of_seqio(theirs)})
        assert found["targets"].encode("the fox") and type(found["targets"]) is not Opaque


def test_fingerprints_tell_apart_whatever_changes_an_id(kinds):
    found = {name: of_seqio(theirs).fingerprint for name, theirs in kinds.items()}
    assert len(set(found.values())) == len(found)
    other = vocabularies.TrainedSentencePieceVocabulary("small", texts, pieces=401, extra_ids=4)
    assert of_seqio(other).size == 405 and of_seqio(other).fingerprint not in found.values()
    file = seqio.SentencePieceVocabulary(str(kinds["lazy"].path), 5)
    assert of_seqio(file) == of_seqio(kinds["lazy"]) and hash(of_seqio(file)) == hash(of_seqio(kinds["lazy"]))


def test_the_layout_of_a_tokenizer_json_does_not_matter(kinds):
    ours = of_seqio(kinds["bpe"])
    indented = json.dumps(json.loads(kinds["bpe"].tokenizer_json), indent=4).encode()
    assert HuggingFace(indented, 1, 5) == ours
    assert HuggingFace(indented, None, 5) != ours


@pytest.mark.parametrize("name", [*NAMES, "opaque"])
def test_what_is_saved_is_what_is_loaded(kinds, name, tmp_path):
    ours = of_seqio(kinds.get(name) or seqio.PassThroughVocabulary(17))
    ours.save(tmp_path, "targets")
    for again in (load(tmp_path, "targets"), pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert again == ours and type(again) is type(ours) and str(again) == str(ours)
        assert again.info == ours.info and again.decode(range(2, 300)) == ours.decode(range(2, 300))
        if name != "opaque":
            assert again.encode(SAMPLE) == ours.encode(SAMPLE)
    suffix = {"sentencepiece": {".model"}, "huggingface": {".tokenizer.json"}}.get(ours.kind, set())
    assert {path.name for path in tmp_path.iterdir()} == {"targets" + each for each in suffix | {".json"}}


def test_seqio_and_tokenizers_read_the_saved_files(kinds, tmp_path):
    for name in ("lazy", "bpe"):
        of_seqio(kinds[name]).save(tmp_path, name)
    pieces = seqio.SentencePieceVocabulary(str(tmp_path / "lazy.model"), 5)
    assert of_seqio(pieces) == of_seqio(kinds["lazy"])
    bpe = hugging_face.HuggingFaceVocabulary(tmp_path / "bpe.tokenizer.json", "</s>", 5)
    assert of_seqio(bpe) == of_seqio(kinds["bpe"])


def test_a_damaged_file_is_named(kinds, tmp_path):
    of_seqio(kinds["lazy"]).save(tmp_path, "targets")
    model = tmp_path / "targets.model"
    content = model.read_bytes()
    with pytest.raises(UserError, match="there is no .*inputs.json: no vocabulary 'inputs' is saved there"):
        load(tmp_path, "inputs")
    of_seqio(vocabularies.TrainedSentencePieceVocabulary("small", texts, 401)).save(tmp_path, "other")
    model.write_bytes((tmp_path / "other.model").read_bytes())
    with pytest.raises(UserError, match="targets.model is damaged: its SHA-256 is not the one that targets.json tells"):
        load(tmp_path, "targets")
    model.write_bytes(content[:-100])
    with pytest.raises(UserError, match="targets.model cannot be read: not a SentencePiece model"):
        load(tmp_path, "targets")
    model.unlink()
    with pytest.raises(UserError, match="there is no .*targets.model"):
        load(tmp_path, "targets")
    (tmp_path / "targets.json").write_text("{")
    with pytest.raises(UserError, match="targets.json cannot be read"):
        load(tmp_path, "targets")
    with pytest.raises(ValueError, match="not a tokenizer.json: "):
        HuggingFace(b"{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/targets.json"):
        Bytes().save(tmp_path / "file", "targets")


def test_what_the_recipe_names_must_be_the_task_s_own(kinds):
    task = {"inputs": kinds["bytes"], "targets": kinds["lazy"]}
    check_named("mine", task, {})
    check_named("mine", task, {"targets": seqio.SentencePieceVocabulary(str(kinds["lazy"].path), 5)})
    check_named("mine", task, {"targets": of_seqio(kinds["lazy"]), "inputs": Bytes(100)})
    with pytest.raises(
        UserError, match="task 'mine', feature 'inputs': the task is registered with a bytes vocab"
    ) as e:
        check_named("mine", task, {"inputs": Bytes(99)})
    assert str(of_seqio(kinds["bytes"])) in str(e.value) and str(Bytes(99)) in str(e.value)
    with pytest.raises(UserError, match="feature 'targets': the task is registered with"):
        check_named("mine", task, {"targets": Opaque("other", 405, eos_id=1, extra_ids=5)})
    with pytest.raises(UserError, match=r"'target', which task 'mine' does not have; .*; did you mean 'targets'\?"):
        check_named("mine", task, {"target": kinds["lazy"]})
    with pytest.raises(UserError, match="names for feature 'inputs' of task 'mine' cannot be used: ValueError: cannot"):
        check_named("mine", task, {"inputs": hugging_face.HuggingFaceVocabulary("/nowhere/tokenizer.json")})


@pytest.mark.parametrize(("ours", "theirs"), [({"eos_id": 1}, {"eos_id": 0}), ({"literal": True}, {})], ids=str)
def test_a_vocabulary_that_differs_by_a_setting_is_told_by_it(kinds, ours, theirs):
    content = kinds["bpe"].tokenizer_json.encode()
    ((name, value),) = ours.items()
    said = rf"the same tokens, but {name} is {value} in the task's and {theirs.get(name)} in the recipe's\); "
    with pytest.raises(UserError, match=f"{said}.* CachedData.vocabularies = {{}}$"):
        check_named("mine", {"targets": HuggingFace(content, **ours)}, {"targets": HuggingFace(content, **theirs)})


def test_descriptions_tell_kind_size_and_fingerprint():
    assert str(Bytes(100)).startswith("bytes vocabulary of 359 ids, 100 of them extra (sha256 ")
    assert Bytes(100).fingerprint[:12] in str(Bytes(100))


def test_no_tensorflow_is_needed(kinds, tmp_path):
    for name in ("lazy", "bpe", "bytes"):
        of_seqio(kinds[name]).save(tmp_path, name)
    code = """if True:
        import sys
        for name in ("tensorflow", "seqio", "tensorflow_text"):
            sys.modules[name] = None
        from meshway.framework.data.vocabularies import load
        for name in ("lazy", "bpe", "bytes"):
            vocabulary = load(sys.argv[1], name)
            assert vocabulary.decode(vocabulary.encode("a fox")) == "a fox"
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_a_missing_tokenizers_names_the_extra(kinds, monkeypatch):
    content = kinds["bpe"].tokenizer_json.encode()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'meshway\[hf\]'"):
        HuggingFace(content)


def test_a_model_that_is_none_is_said_plainly():
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePiece(b"nothing of the sort")
