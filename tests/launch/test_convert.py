"""`meshway convert`: what it writes, what it refuses, and that runs go on from it."""

import errno
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from converted import (
    HUGGING_FACE,
    assert_same_directory,
    copy_of,
    model_of,
    params_of,
    sentence_pieces,
    sizes_of,
    tokenizer_json,
)
from tiny import program

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion.hugging_face import FAMILIES
from meshway.framework.conversion.settings import Reference
from meshway.framework.conversion.tensor_files import TensorFiles
from meshway.framework.data import vocabularies
from meshway.framework.data.vocabularies import SentencePiece
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.training.run_directory import RunDirectory
from meshway.framework.trees import flatten
from meshway.launch import cli, convert_out
from meshway.launch.convert import convert, fresh_directory
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config


def leave_out(directory, field):
    path = directory / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))


def edit(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A Hugging Face directory of bfloat16 weights with a tokenizer, and the run directory made of it."""
    folder = tmp_path_factory.mktemp("mistral")
    directory = copy_of("mistral", folder)
    (directory / "tokenizer.json").write_text(tokenizer_json(60, sentinels=2))
    (directory / "tokenizer_config.json").write_text("{}")
    assert cli.main(["convert", f"--from={directory}", f"--to={folder / 'run'}"]) == 0
    return directory, folder / "run"


def test_a_run_directory_is_whole(mistral):
    directory, run = mistral
    assert Checkpoints(run / "checkpoints", read_only=True).steps() == [0]
    recipe = Checkpoints(run / "checkpoints", read_only=True).recipe(0)
    assert recipe["schema"]["params/token_embedding/embedding"] == [[67, 24], "bfloat16"]
    assert recipe["gin"] == (run / "config.gin").read_text()
    vocabulary = vocabularies.load(run / "vocabularies", "targets")
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.extra_ids) == (60, 2, 2)
    assert vocabulary.encode("w5 w7") == [5, 7]
    assert sorted(path.name for path in (run / "hugging_face").iterdir()) == [
        "config.json", "conversion.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_run_starts_from_it(mistral):
    """`meshway train` with the recipe takes the weights; the vocabulary is the one the recipe names."""
    _, run = mistral
    given = ("BATCH_SIZE=8", "TASK_FEATURE_LENGTHS={'targets': 8}", "MODEL_DIR='x'", "TRAIN_STEPS=1",
             "MIXTURE_OR_TASK_NAME='x'", "LAYOUT='fsdp'")  # fmt: skip
    files = (str(run / "recipe.gin"), "optimizers/sgd.gin")
    arguments = config.load(Invocation("train", gin_files=files, bindings=given)).build(
        "train.train", given=["resolved"]
    )
    state = arguments["program"].init()
    params = flatten(arguments["initial"].restore(state.params, arguments["program"].axes))
    stored = TensorFiles(mistral[0])
    found = params["decoder/block_0/mlp/wo/kernel"]
    assert found.sharding == flatten(state.params)["decoder/block_0/mlp/wo/kernel"].sharding
    expected = [stored.read(f"model.layers.{layer}.mlp.down_proj.weight").T.astype(np.float32) for layer in range(2)]
    np.testing.assert_array_equal(found, np.stack(expected))
    assert arguments["data"]._named["targets"] == vocabularies.load(run / "vocabularies", "targets")


def test_the_way_back_through_another_dtype(mistral, tmp_path):
    """Float32 holds bfloat16: the bits come back; files, names and tokenizer too."""
    directory, run = mistral
    convert(str(directory), str(tmp_path / "run"), dtype="float32")
    convert(str(tmp_path / "run"), str(tmp_path / "back"), dtype="bfloat16", max_shard_size="9KB")
    assert_same_directory(tmp_path / "back", directory)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    convert(str(run / "checkpoints" / "0"), str(tmp_path / "wide"), dtype="float32")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert TensorFiles(tmp_path / "wide").dtype("lm_head.weight") == np.float32


def test_copies_and_bare_names_come_back(tmp_path):
    """A tied output layer that is written twice, names without a prefix, buffers: as GPT-2's own directory has them."""
    directory = copy_of("gpt2", tmp_path)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["lm_head.weight"] = bare["wte.weight"]
    buffers = {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32)}
    safetensors.numpy.save_file(bare | buffers, directory / "model.safetensors")
    convert(str(directory), str(tmp_path / "run"))
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    found = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(found) == sorted(bare)
    assert all(found[name].tobytes() == bare[name].tobytes() for name in bare)


def test_shards_are_filled_from_slices():
    """A Hugging Face directory as Initial.path: each device reads its own part, and the result is the converted one."""
    made = program("llama", *sizes_of("llama3"), layout="fsdp")
    state = made.init()
    params = flatten(Initial(str(HUGGING_FACE / "llama3")).restore(state.params, made.axes))
    tensors = TensorFiles(HUGGING_FACE / "llama3")
    query = params["decoder/block_0/attention/query/kernel"]
    assert query.sharding == flatten(state.params)["decoder/block_0/attention/query/kernel"].sharding
    assert not query.sharding.is_fully_replicated
    wanted = tensors.read("model.layers.1.self_attn.q_proj.weight").reshape(6, 8, 24).transpose(2, 0, 1)
    np.testing.assert_array_equal(query[1], wanted)
    with pytest.raises(UserError, match="leave out Initial.renames"):
        Initial(str(HUGGING_FACE / "llama3"), renames=[("a", "b")]).restore(state.params, made.axes)


def test_a_model_trained_here_goes_out(tmp_path):
    """Without an origin config.json is made of the recipe, and what it cannot say is refused."""
    made = program("llama", "VOCAB_SIZE=40", "NUM_KV_HEADS=2", "ROPE_BASE=77.0", layout="fsdp")
    state = made.init()
    for name, gin in (("run", ""), ("other", "attention.Attention.sinks = True\n")):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", recipe=resolved("llama") + gin)
        checkpoints.save(state, 3, {}, {})
        checkpoints.close()
    with pytest.raises(UserError, match="give the family to write by --family"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"))
    convert(str(tmp_path / "run"), str(tmp_path / "out"), family="llama")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["vocab_size"], found["num_key_value_heads"], found["rope_theta"]) == (40, 2, 77.0)
    ids = [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")]  # the run has no text; Llama's own are 1, 2
    assert (found["max_position_embeddings"], *ids) == (8, 0, None, None)
    convert(str(tmp_path / "out"), str(tmp_path / "again"))
    again = flatten(params_of(tmp_path / "again", model_of(tmp_path / "again")))
    for name, leaf in flatten(state.params).items():
        np.testing.assert_array_equal(again[name], jax.device_get(leaf))
    with pytest.raises(UserError, match=r"no llama model .*attention.Attention.sinks is True"):
        convert(str(tmp_path / "other"), str(tmp_path / "refused"), family="llama")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "index, expected",
    [
        ({}, (0, 1)),
        ({"start": [], "append_eos": False}, (None, 1)),
        ({"start": [3]}, (3, 1)),
        ({"start": [3], "stop": [1, 7]}, (3, [1, 7])),
    ],
)
def test_the_ids_of_texts_are_written(tmp_path, index, expected):
    """Those of the run's vocabulary, as its framing has them: what is left out would be the class's own."""
    directory = RunDirectory(tmp_path)
    directory.save_vocabularies({"targets": SentencePiece(sentence_pieces())})
    path = tmp_path / "vocabularies.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    run = convert_out.Run(tmp_path, tmp_path / "checkpoints", 0)
    found = convert_out._ids_of_texts(run, has_encoder=False)
    assert found == {"bos_token_id": expected[0], "eos_token_id": expected[1], "pad_token_id": None}
    found = convert_out._ids_of_texts(run, has_encoder=True)
    assert found == {"decoder_start_token_id": expected[0], "eos_token_id": expected[1], "pad_token_id": 0}


def test_the_longest_rows_are_written():
    trained = {"TASK_FEATURE_LENGTHS": {"inputs": 9, "targets": 48}}
    scaled = {"ROPE_SCALING": Reference("rotary.YaRN"), "rotary.YaRN.factor": 4.0, "rotary.YaRN.original_length": 32}
    for family, bindings, expected in (
        ("llama", trained, {"max_position_embeddings": 48}),
        ("mistral", trained | scaled, {"max_position_embeddings": 128}),
        ("qwen3", {}, {"max_position_embeddings": 32768}),
        ("gpt2", trained, {}),
        ("t5", trained, {}),
    ):
        assert convert_out._length(FAMILIES[family], bindings) == expected, family


def resolved(family):
    given = ("VOCAB_SIZE=40", "NUM_KV_HEADS=2", "ROPE_BASE=77.0", "NUM_LAYERS=1",
             "TASK_FEATURE_LENGTHS={'targets': 8}", "LAYOUT='single'", "DROPOUT_RATE=0.1")  # fmt: skip
    files = (f"models/{family}/tiny.gin", "optimizers/sgd.gin")
    return config.load(Invocation("bench", "train", files, given), import_unreferenced=False).resolved


def drop_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def truncate(directory):
    path = directory / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def quantise(directory):
    path = directory / "model-00001-of-00003.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(ml_dtypes.float8_e5m2)}, path)


def other_output(directory):
    edit(directory, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "damage, flags, words",
    [
        (drop_shard, [], ["lacks 1 of 3 shards", "model-00002-of-00003.safetensors"]),
        (truncate, [], ["model-00003-of-00003.safetensors is truncated"]),
        (quantise, [], ["dtype F8_E5M2", "does not convert"]),
        (other_output, [], ["config.json ties the output layer", "lm_head.weight differs"]),
        (lambda path: edit(path, head_dim=4), [], ["another shape", "q_proj.weight is [48, 24], not [24, 24]"]),
        (lambda path: edit(path, num_hidden_layers=3), [], ["9 tensors are missing: model.layers.2."]),
        (lambda path: leave_out(path, "num_hidden_layers"), [], ["no num_hidden_layers, for which 32 is"]),
        (lambda path: leave_out(path, "hidden_size"), [], ["config.json has no hidden_size, for which 4096 is taken"]),
        (lambda path: edit(path, num_hidden_layers=1), [], ["9 tensors have no place", "model.layers.1."]),
        (lambda path: edit(path, mystery=1), [], ["'mystery'", "--ignore_fields=mystery"]),
        (lambda path: (path / "tokenizer.json").write_text(tokenizer_json(68)), [], ["68 ids", "only 67"]),
        (lambda path: (path / "tokenizer.json").write_text("{"), [], ["tokenizer.json cannot be read"]),
        (lambda path: (path / "config.json").unlink(), [], ["no config.json"]),
        (lambda path: None, ["--family=t5"], ["--family=t5", "of family llama"]),
        (lambda path: None, ["--dtype=int4"], ["argument --dtype: 'int4'", "bfloat16"]),
        (lambda path: None, ["--step=3"], ["--step names a checkpoint of a run"]),
        (lambda path: None, ["--gin.DTYPE=bfloat16"], ["takes no recipe", "--gin.DTYPE"]),
    ],
)  # fmt: skip
def test_one_clear_error_each(damage, flags, words, tmp_path, capsys):
    directory = copy_of("llama3", tmp_path)
    damage(directory)
    assert cli.main(["convert", f"--from={directory}", f"--to={tmp_path / 'run'}", *flags]) == 2
    before, mark, message = capsys.readouterr().err.strip().partition("meshway: error: ")
    assert (
        mark and "Traceback" not in before and len(message.splitlines()) == 1 and all(word in message for word in words)
    ), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "nothing is left behind"


@pytest.mark.parametrize("damage", ["half a file", "a missing file", "no state", "no recipe"])
def test_a_damaged_checkpoint_is_no_mistake_of_the_user(mistral, tmp_path, capsys, damage):
    run, target = tmp_path / "run", tmp_path / "out"
    shutil.copytree(mistral[1], run)
    step = run / "checkpoints" / "0"
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "half a file":
        largest.write_bytes(largest.read_bytes()[:1000])
    elif damage == "a missing file":
        largest.unlink()
    else:
        shutil.rmtree(step / damage.removeprefix("no "))
    assert cli.main(["convert", f"--from={run}", f"--to={target}"]) == 1
    message = capsys.readouterr().err.partition("meshway: error: ")[2]
    assert len(message.splitlines()) == 1 and f"{step}" in message and "cannot be read" in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing is left behind"


def test_a_tokenizer_much_smaller_than_the_model(tmp_path):
    directory = copy_of("llama3", tmp_path)
    (directory / "tokenizer.json").write_text(tokenizer_json(60))
    edit(directory, vocab_size=1000)
    with pytest.raises(UserError, match="60 ids and the model's vocabulary 1000, more than padding explains"):
        convert(str(directory), str(tmp_path / "run"))


def test_a_sentence_piece_model_with_t5s_sentinels(tmp_path, capsys):
    """spiece.model has no extra ids of its own; transformers and seqio add 100 above it."""
    directory, model = copy_of("t5_1_0", tmp_path), sentence_pieces()
    (directory / "spiece.model").write_bytes(model)
    command = ["convert", f"--from={directory}", f"--to={tmp_path / 'run'}"]
    assert cli.main(command) == 2
    assert "125 ids and the model's vocabulary only 67" in capsys.readouterr().err
    (directory / "tokenizer_config.json").write_text('{"extra_ids": 20}')
    assert cli.main(command) == 0
    for feature in ("inputs", "targets"):
        vocabulary = vocabularies.load(tmp_path / "run" / "vocabularies", feature)
        assert (vocabulary.size, vocabulary.eos_id, vocabulary.extra_ids) == (45, 1, 20)
        assert vocabulary.decode(vocabulary.encode("same words")) == "same words"
    assert (tmp_path / "run" / "hugging_face" / "spiece.model").read_bytes() == model


def test_a_run_with_another_tokenizer_than_its_origins(mistral, tmp_path):
    """What goes out is what the run was trained with, not what was kept of the model it started from."""
    _, run = mistral
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "hugging_face" / "tokenizer.json").write_text(tokenizer_json(61))
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").read_text() == tokenizer_json(60, sentinels=2)


def test_wrong_places(mistral, tmp_path, capsys):
    directory, run = mistral
    for flags, words in (
        ([f"--from={tmp_path / 'none'}", f"--to={tmp_path / 'x'}"], "there is no such directory"),
        ([f"--from={tmp_path}", f"--to={tmp_path / 'x'}"], "neither a Hugging Face directory"),
        ([f"--from={directory}", f"--to={run}"], "is there already"),
        ([f"--from={run}", f"--to={tmp_path / 'x'}", "--step=7"], "no checkpoint of step 7"),
        ([f"--from={run}", f"--to={tmp_path / 'x'}", "--family=llama"], "holds a model of family mistral"),
        ([f"--from={run}", f"--to={tmp_path / 'x'}", "--max_shard_size=big"], "is not a size"),
        ([f"--from={run}", f"--to={tmp_path / 'x'}", "--ignore_fields=a"], "--from is not one"),
        ([f"--from={directory}", f"--to={tmp_path / 'x'}", "--max_shard_size=1GB"], "files to write out"),
        ([f"--to={tmp_path / 'x'}"], "needs --from=DIR"),
        ([f"--from={run}"], "needs --to=DIR"),
    ):
        assert cli.main(["convert", *flags]) == 2
        assert words in capsys.readouterr().err, flags


@pytest.mark.parametrize("number, kind", [(errno.EACCES, UserError), (errno.ENOSPC, EnvironmentFailure)])
def test_a_file_that_cannot_be_opened_is_named_and_nothing_is_left(tmp_path, number, kind):
    with pytest.raises(kind, match=os.strerror(number)), fresh_directory(tmp_path / "out"):
        raise OSError(number, os.strerror(number), "somewhere/model.safetensors")
    assert not list(tmp_path.iterdir())
