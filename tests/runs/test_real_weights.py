"""Published model directories as people have them, from the command line: odd special tokens, odd files, odd fields.

Other members of these kinds are in `tests/launch/test_special_ids.py`, `test_convert.py`, `test_convert_files.py` and
`test_transformers_ids.py`; that training, evaluation and inference start alike is `tests/test_fine_tuning.py`'s.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from converted import HUGGING_FACE, sentence_pieces
from running import answer, lines
from table_llama import pieces, says, table_llama
from tokenizers import AddedToken

pytestmark = pytest.mark.proofs

ONE = '{"inputs": "x"}\n'
SPOKEN = ("tu", "rn", " the", " cur", "rent", " file", ".", "xy", "b")  # what the model of `spoken` says behind `x`


def converted(directory, *flags, exits=0, says=()):
    """Converts a directory from the command line into the run beside it."""
    run = directory.parent / f"{directory.name}_run"
    said = answer("convert", f"--from={directory}", f"--to={run}", *flags, cwd=directory.parent, exits=exits, says=says)
    assert run.exists() == (exits == 0)
    return said if exits else run


def predicted(run, *flags, given=ONE, **wanted):
    """Returns what `infer` writes of records; None where it must fail."""
    (run.parent / "in.jsonl").write_text(given)
    output = run.parent / "out.jsonl"
    answer("infer", f"--model_dir={run}", "--input=in.jsonl", f"--output={output}", "--overwrite", "--batch_size=2",
           "--max_input_length=16", *flags, cwd=run.parent, **wanted)  # fmt: skip
    return None if wanted else lines(output)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A run that says SPOKEN behind `x`, and ends; another tokenization of the text than a tokenizer would make."""
    tokenizer = pieces(*SPOKEN, "x", "t", "u", "r", ".x")
    return converted(table_llama(tmp_path_factory.mktemp("spoken") / "llama", says(SPOKEN, 12), tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("fields", "generation"),
    [
        ({"eos_token_id": [2, 3, 4]}, None),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 3]}),
        ({"eos_token_id": None}, {"eos_token_id": 3}),
        ({"eos_token_id": [3]}, {"eos_token_id": 2}),
    ],
    ids=str,
)
def test_every_id_of_both_files_ends_a_prediction(tmp_path, fields, generation):
    directory = table_llama(tmp_path / "llama", {5: 3, 3: 3}, tokenizer=pieces("a", "b", "x"), **fields)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    run = converted(directory)
    assert [row["tokens"] for row in predicted(run, "--max_new_tokens=6")] == [[3]]
    back = tmp_path / "back"
    answer("convert", f"--from={run}", f"--to={back}", cwd=tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (back / name).exists() == (directory / name).exists()
        if (back / name).exists():
            assert json.loads((back / name).read_text()) == json.loads((directory / name).read_text())


@pytest.mark.parametrize(
    ("template", "text", "read"),
    [((1,), "<s>ab", 3), ((1,), "ab", 3), ((1, 4), "<s>bab", 4), ((1,), "a<s>b", 4)],
    ids=str,
)
def test_a_text_that_begins_with_the_start_has_it_once(tmp_path, template, text, read):
    tokenizer = pieces("a", "b", "x", template=template)
    run = converted(table_llama(tmp_path / "llama", {}, tokenizer=tokenizer))
    record = json.dumps({"inputs": text}) + "\n"
    answer("infer", f"--model_dir={run}", "--input=-", "--output=out.jsonl", "--max_new_tokens=1", cwd=tmp_path,
           given=record, says=f" {read} tokens read")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "added", "words"),
    [
        ("added_tokens.json", {"<|im_end|>": 25}, "added_tokens.json adds '<|im_end|>' to a SentencePiece model"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"25": {"content": "<|eot|>"}}},
            "tokenizer_config.json adds '<|eot|>' to a SentencePiece model",
        ),
    ],
)
def test_tokens_added_to_a_sentence_piece_model_are_refused(tmp_path, name, added, words):
    directory = table_llama(tmp_path / "llama", {}, eos_token_id=25)
    (directory / "tokenizer.model").write_bytes(sentence_pieces())
    (directory / name).write_text(json.dumps(added))
    converted(directory, exits=2, says=words)


def test_an_eos_that_no_token_is(tmp_path):
    directory = table_llama(tmp_path / "llama", {}, size=40, eos_token_id=30)
    (directory / "tokenizer.model").write_bytes(sentence_pieces())
    converted(directory, exits=2, says="eos_token_id 30 is not a token of the tokenizer there, whose ids end at 24")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("tur", "tur"),
        (".", "turn the current file."),
        (" ", "turn "),
        ("xyb", "turn the current file.xyb"),
        ("bxy", "turn the current file.xyb"),
        ("e.x", "turn the current file.x"),
    ],
)
def test_a_prediction_ends_where_the_text_appears(spoken, stop, text):
    assert predicted(spoken, "--max_new_tokens=14", f"--stop={stop}")[0]["prediction"] == text


@pytest.mark.parametrize("first", ["!", "b"])
def test_a_prediction_begins_with_any_token(tmp_path, first):
    """`!` is id 0."""
    tokenizer = json.loads(pieces("a", "b", "c", template=()).to_str())
    tokenizer["model"]["vocab"] = {"!": 0} | {k: v for k, v in tokenizer["model"]["vocab"].items() if v}
    tokenizer["model"]["unk_token"] = None
    tokenizer["added_tokens"] = tokenizer["added_tokens"][1:]
    directory = table_llama(tmp_path / "llama", {0: 4, 4: 5, 5: 2})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    record = json.dumps({"inputs": "a", "begin": first}) + "\n"
    (row,) = predicted(converted(directory), "--max_new_tokens=6", "--begin_field=begin", given=record)
    assert row["prediction"] == {"!": "!bc", "b": "bc"}[first]
    assert row["tokens"] == {"!": [0, 4, 5, 2], "b": [4, 5, 2]}[first]


YARN = {"type": "yarn", "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": YARN}, "rope_scaling of type 'yarn' has no factor"),
        ({"rope_scaling": LLAMA3}, ("llama3", "low_freq_factor", "high_freq_factor")),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' has no factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 1.0}}, ("llama3", "high_freq_factor")),
        ({"rope_scaling": "linear"}, "config.json: rope_scaling = 'linear' is not an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ("rope_scaling", "factor", "'2'")),
        ({"hidden_size": "32"}, "config.json: hidden_size = '32' is not a whole number of at least 1"),
        ({"hidden_size": 0}, "config.json: hidden_size = 0 is not a whole number of at least 1"),
        ({"num_hidden_layers": 2.0}, "config.json: num_hidden_layers = 2.0 is not a whole number"),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers = True is not a whole number"),
        ({"vocab_size": [32]}, "config.json: vocab_size = [32] is not a whole number"),
        ({"rope_theta": "10000"}, "config.json: rope_theta = '10000' is not a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"hidden_act": 3}, "hidden_act"),
    ],
    ids=str,
)
def test_a_field_that_is_none_of_its_kind_is_named(tmp_path, fields, words):
    converted(table_llama(tmp_path / "llama", {}, **fields), exits=2, says=words)


def sharded(directory):
    """Writes the same weights in two shards and an index beside model.safetensors."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for shard, held in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, directory / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_weights_beside_the_weights_are_said_or_refused(tmp_path):
    same = table_llama(tmp_path / "same", {})
    sharded(same)
    run = tmp_path / "same_run"
    said = answer("convert", f"--from={same}", f"--to={run}", cwd=tmp_path)
    assert "not read" in said and "model.safetensors" in said
    other = table_llama(tmp_path / "other", {})
    sharded(other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    converted(other, exits=2, says=("two sets of weights", "'lm_head.weight' is another"))
    torch = table_llama(tmp_path / "torch", {})
    (torch / "pytorch_model.bin").write_bytes(b"older")
    said = answer("convert", f"--from={torch}", f"--to={tmp_path / 'torch_run'}", cwd=tmp_path)
    assert "pytorch_model.bin" in said
    adapter = table_llama(tmp_path / "adapter", {})
    (adapter / "adapter_config.json").write_text("{}")
    converted(adapter, exits=2, says=("adapter_config.json", "merge_and_unload"))


def test_missing_tensors_are_counted_and_named(tmp_path):
    one = table_llama(tmp_path / "one", {})
    tensors = safetensors.numpy.load_file(one / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    safetensors.numpy.save_file(tensors, one / "model.safetensors")
    converted(one, exits=2, says="1 tensor is missing: model.norm.weight")
    tensors.pop("lm_head.weight")
    safetensors.numpy.save_file(tensors, one / "model.safetensors")
    converted(one, exits=2, says="2 tensors are missing: ")
    more = table_llama(tmp_path / "more", {})
    tensors = safetensors.numpy.load_file(more / "model.safetensors") | {"model.norm.bias": norm}
    safetensors.numpy.save_file(tensors, more / "model.safetensors")
    converted(more, exits=2, says="1 tensor has no place")


def golden(name, folder, **fields):
    """Copies a golden directory, with other fields in its config.json."""
    shutil.copytree(HUGGING_FACE / name, folder, ignore=shutil.ignore_patterns("*.npz"))
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(read | fields))
    return folder


def test_an_encoder_decoder_whose_embeddings_stand_under_another_name(tmp_path):
    """`shared.weight` is absent; transformers takes `decoder.embed_tokens.weight`."""
    directory = golden("t5_1_1", tmp_path / "t5")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    shared = tensors.pop("shared.weight")
    for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
        del tensors[name]
    safetensors.numpy.save_file(tensors | {"decoder.embed_tokens.weight": shared}, directory / "model.safetensors")
    rows = [predicted(converted(each), "--max_new_tokens=3", given='{"inputs": [5, 6, 7]}\n')
            for each in (directory, golden("t5_1_1", tmp_path / "whole"))]  # fmt: skip
    assert rows[0] == rows[1]


def test_token_ids_need_no_vocabulary(tmp_path):
    run = converted(table_llama(tmp_path / "llama", {9: 6, 6: 6}))
    assert predicted(run, "--max_new_tokens=3", given='{"inputs": [8, 9]}\n')[0]["tokens"] == [6, 6, 6]
    answer("infer", f"--model_dir={run}", "--prompt=x", cwd=tmp_path, exits=2, says="vocabular")


def test_rows_longer_than_the_positions_that_were_learned(tmp_path):
    run = converted(golden("gpt2", tmp_path / "gpt2"))
    positions = json.loads((tmp_path / "gpt2" / "config.json").read_text())["n_positions"]
    predicted(run, "--max_new_tokens=4000", given='{"inputs": [5, 6]}\n', exits=2,
              says=f"longer than the {positions} positions")  # fmt: skip


def test_a_tokenizer_that_is_none_beside_good_weights(tmp_path):
    for content, words in [("{", "tokenizer.json cannot be read"), ("\ufeff{}", "tokenizer.json cannot be read"),
                           ("[]", "tokenizer.json cannot be read")]:  # fmt: skip
        shutil.rmtree(tmp_path / "llama", ignore_errors=True)
        directory = table_llama(tmp_path / "llama", {})
        (directory / "tokenizer.json").write_text(content)
        converted(directory, exits=2, says=words)


def test_sentinels_are_found_by_name_whatever_follows_them(tmp_path):
    """A token after `<extra_id_0>` once hid them: the library says how many there are."""
    from meshway.framework.data.vocabularies import load

    directory = golden("t5_1_1", tmp_path / "t5")
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer = pieces(*(f"p{number}" for number in range(3, 20)), template=())
    tokenizer.add_tokens([AddedToken(f"<extra_id_{number}>", special=True) for number in (2, 1, 0)])
    tokenizer.add_tokens(["<sep>"])
    assert tokenizer.get_vocab_size() <= size
    tokenizer.save(str(directory / "tokenizer.json"))
    vocabulary = load(converted(directory) / "vocabularies", "inputs")
    assert vocabulary.encode("<extra_id_0><extra_id_1><extra_id_2>") == [22, 21, 20]
    assert (vocabulary.extra_ids, np.ravel(vocabulary.sentinels).tolist()) == (3, [22, 21, 20])
