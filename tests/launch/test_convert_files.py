"""`meshway convert` and odd directories: weights beside the weights, tensors under other names, odd tokenizers."""

import json

import numpy as np
import pytest
import safetensors.numpy
from converted import HUGGING_FACE, copy_of, sentence_pieces, sizes_of, tokenizer_json
from tiny import program

from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion import tokenizer_files
from meshway.framework.conversion.hugging_face import open_model
from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.data import vocabularies
from meshway.framework.errors import UserError
from meshway.launch.convert import convert


def whole(shards):
    """Returns the tensors of a directory of shards."""
    return {name: value for path in sorted(shards.glob("model-*.safetensors"))
            for name, value in safetensors.numpy.load_file(path).items()}  # fmt: skip


def beside_single(path, change=lambda tensors: None):
    tensors = whole(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def of_one_shard(path, change):
    """A shard of an older set, beside the index of the new one."""
    tensors = safetensors.numpy.load_file(path / "model-00001-of-00003.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model-00001-of-00002.safetensors")


def negate(tensors):
    name = sorted(tensors)[0]
    tensors[name] = -tensors[name]


def widen(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].astype(np.float16)


def drop(tensors):
    del tensors[sorted(tensors)[0]]


def index_alone(path):
    """All tensors in one file, and an index of shards that are gone."""
    beside_single(path)
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()


@pytest.mark.parametrize(
    "leave, said",
    [
        (beside_single, "model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, "
         "model-00003-of-00003.safetensors, model.safetensors.index.json"),
        (index_alone, "model.safetensors.index.json"),
        (lambda path: of_one_shard(path, lambda tensors: None), "model-00001-of-00002.safetensors"),
        (lambda path: (path / "consolidated.safetensors").touch(), "consolidated.safetensors"),
        (lambda path: (path / "pytorch_model.bin").touch(), "pytorch_model.bin"),
        (lambda path: (path / "model.safetensors.index.fp16.json").touch(), "model.safetensors.index.fp16.json"),
    ],
)  # fmt: skip
def test_weights_that_are_not_read(leave, said, tmp_path):
    directory = copy_of("llama3", tmp_path)
    leave(directory)
    assert ", ".join(open_model(directory).left_over) == said


def test_weights_that_are_not_read_are_said(tmp_path, capsys):
    directory = copy_of("llama3", tmp_path)
    beside_single(directory)
    convert(str(directory), str(tmp_path / "run"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not read")]
    assert len(lines) == 1 and "model.safetensors.index.json" in lines[0]
    made = program("llama", *sizes_of("llama3"), layout="fsdp")
    Initial(str(directory)).restore(made.init().params, made.axes)
    assert "model.safetensors.index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "leave, words",
    [
        (lambda path: beside_single(path, negate), ["model.safetensors and model-0000", "lm_head.weight' is another"]),
        (lambda path: beside_single(path, widen), ["lm_head.weight' is another"]),
        (lambda path: beside_single(path, drop), ["model.safetensors has not", "'lm_head.weight'"]),
        (lambda path: of_one_shard(path, negate), ["index.json and model-00001-of-00002.safetensors", "is another"]),
        (lambda path: of_one_shard(path, lambda tensors: tensors.update(x=np.zeros(2))), ["has tensor 'x'"]),
        (lambda path: (index_alone(path), drop_listed(path)), ["model.safetensors.index.json has not"]),
        (lambda path: (path / "adapter_config.json").write_text("{}"), ["adapter_config.json", "merge_and_unload"]),
        (lambda path: (beside_single(path), (path / "model.safetensors.index.json").write_text("{")),
         ["model.safetensors.index.json, beside model.safetensors, cannot be read"]),
    ],
)  # fmt: skip
def test_weights_that_say_something_else_are_refused(leave, words, tmp_path):
    directory = copy_of("llama3", tmp_path)
    leave(directory)
    with pytest.raises(UserError) as error:
        open_model(directory)
    assert all(word in str(error.value) for word in words), str(error.value)


def drop_listed(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_lone_file_with_an_index_of_its_own(tmp_path):
    """Some savers write an index that lists one file: there is nothing to say."""
    directory = copy_of("llama2", tmp_path)
    names = TensorFiles(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert open_model(directory).left_over == []


@pytest.mark.parametrize(
    "golden, fields, said",
    [
        (
            "llama3",
            {"num_attention_heads": 6, "num_key_value_heads": 5},
            "num_key_value_heads = 5 does not divide num_",
        ),
        ("llama2", {"head_dim": None, "hidden_size": 25}, "num_attention_heads = 6 does not divide hidden_size = 25"),
        ("gpt2", {"n_head": 7}, "n_head = 7 does not divide n_embd = "),
    ],
)
def test_heads_that_do_not_divide_are_told_by_the_fields(golden, fields, said, tmp_path):
    directory = copy_of(golden, tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=f"config.json: .*{said}"):
        convert(str(directory), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "golden, others",
    [
        ("t5_1_1", ["decoder.embed_tokens.weight"]),
        ("t5_1_1", ["encoder.embed_tokens.weight"]),
        ("t5_1_1", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
        ("t5_1_0", ["lm_head.weight"]),
        ("gpt2", ["lm_head.weight"]),
        ("gemma2", ["lm_head.weight"]),
    ],
)
def test_embeddings_under_another_of_their_names(golden, others, tmp_path):
    """What is one tensor in memory is written once, and under which of its names is the saver's choice."""
    directory = copy_of(golden, tmp_path)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    own = next(name for name in ("shared.weight", "transformer.wte.weight", "model.embed_tokens.weight")
               if name in tensors)  # fmt: skip
    table = tensors.pop(own)
    safetensors.numpy.save_file(tensors | dict.fromkeys(others, table), directory / "model.safetensors")
    opened = open_model(directory)
    assert opened.bindings == open_model(HUGGING_FACE / golden).bindings
    assert opened.tensors.read(own).tobytes() == table.tobytes()
    assert own in opened.tensors and others[0] not in opened.tensors


def test_embeddings_that_differ_where_they_are_one(tmp_path):
    directory = copy_of("t5_1_1", tmp_path)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    table = tensors.pop("shared.weight")
    given = {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": -table}
    safetensors.numpy.save_file(tensors | given, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"embed_tokens.weight differs"):
        open_model(directory)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensor is missing: shared.weight"):
        convert(str(directory), str(tmp_path / "run"))


def test_sentinels_in_a_sentence_piece_model(tmp_path):
    """mT5's lie in the model itself, and nothing is added above it: `extra_ids` is 0."""
    inside = vocabularies.SentencePiece(sentence_pieces(), 7)._processor.serialized_model_proto()
    (tmp_path / "spiece.model").write_bytes(inside)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    found = tokenizer_files.read_vocabulary(tmp_path, {"model_type": "mt5"})
    assert (found.size, found.extra_ids) == (32, 7)
    assert found.info.sentinel_ids == tuple(range(31, 24, -1))
    found.save(tmp_path, "targets")
    again = vocabularies.load(tmp_path, "targets")
    assert again == found and again.info == found.info and again.size == 32
    (tmp_path / "tokenizer_config.json").unlink()  # T5's own number, 100, is for models without
    assert tokenizer_files.read_vocabulary(tmp_path, {"model_type": "mt5"}) == found


def described(**parts):
    return json.dumps(json.loads(tokenizer_json(60)) | parts)


_TEMPLATE = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_UNKNOWN = {"type": "TemplateProcessing", "single": _TEMPLATE, "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("tokenizer.json", "[]", ["tokenizer.json cannot be read"]),
        ("tokenizer.json", described(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}), ["has no tokens"]),
        ("tokenizer.json", described(post_processor=_UNKNOWN), ["tokenizer.json cannot be read: it cuts no text"]),
        ("tokenizer.json", described(model={"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "x"}), ["UNK"]),
        ("spiece.model", "", ["spiece.model cannot be read", "no pieces"]),
        ("tokenizer_config.json", "[]", ["tokenizer_config.json holds [], not an object"]),
        ("tokenizer_config.json", '{"extra', ["tokenizer_config.json cannot be read"]),
        (
            "tokenizer_config.json",
            '{"extra_ids": "many"}',
            ["tokenizer_config.json: extra_ids = 'many' is not a whole"],
        ),
        ("tokenizer_config.json", '{"extra_ids": -3}', ["extra_ids = -3"]),
    ],
)
def test_an_odd_tokenizer_is_named(file, content, words, tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentence_pieces())
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        tokenizer_files.read_vocabulary(tmp_path, {"model_type": "t5"})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "names, settings",
    [
        (["<extra_id_1>", "<extra_id_0>"], {"extra_ids": 2}),
        (["<extra_id_1>", "<extra_id_0>", "<mine>"], {"sentinels": [4, 3]}),
        (["<extra_id_0>", "<extra_id_1>"], {"sentinels": [3, 4]}),
        (["<extra_id_2>", "<mine>", "<extra_id_0>", "<extra_id_x>"], {"sentinels": [5, 3]}),
        (["▁<extra_id_0>", "<extra_id_1>"], {"sentinels": [3, 4]}),
        (["<mine>"], {"extra_ids": 0}),
    ],
)
def test_sentinels_are_found_by_name(names, settings, tmp_path):
    """Wherever they lie, in `added_tokens` or in the model's own vocabulary."""
    described = json.loads(tokenizer_json(3))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    described["added_tokens"] = [{"id": 3 + place, "content": name} | flags for place, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    found = tokenizer_files.read_vocabulary(tmp_path, {"model_type": "t5", "eos_token_id": 1})
    expected = {"extra_ids": len(settings.get("sentinels", ()))} | settings
    assert found._settings() == {"eos_id": 1} | expected
    found.save(tmp_path, "targets")
    again = vocabularies.load(tmp_path, "targets")
    assert again == found and again.info == found.info
    numbers = sorted((int(name.strip("▁<>").rpartition("_")[2]), name) for name in names if name[-2:-1].isdigit())
    assert [found.pieces([token])[0] for token in found.info.sentinel_ids] == [name for _, name in numbers]
