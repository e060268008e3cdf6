"""Converted models start and stop as their files say: what `convert` writes, what runs keep, what goes back."""

import json
import shutil
from pathlib import Path

import pytest
from converted import sentence_pieces
from saved_runs import VOCABULARY, save_run
from tiers import tiers

from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion.tokenizer_files import read_vocabulary
from meshway.framework.data.vocabularies import Opaque, read_framing
from meshway.framework.data.vocabulary import Framing
from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.inputs import Reader, Record
from meshway.framework.inference.predictor import Predictor
from meshway.framework.inference.rows import RowFormat, load_text
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import cli, train
from meshway.launch.convert import convert
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

GOLDENS = Path(__file__).parents[1] / "goldens" / "hugging_face"


def tokenizer_json(size):
    """A word-level tokenizer."""
    model = {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(size)}, "unk_token": "w0"}
    parts = dict.fromkeys(("normalizer", "post_processor", "decoder", "truncation", "padding"))
    return {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}} | parts


def copy_of(name, tmp_path, **fields):
    """A golden Hugging Face directory with a tokenizer and other fields in its config.json."""
    directory = shutil.copytree(GOLDENS / name, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(60)))
    return directory


def llama(tmp_path, template=(1,), generation=None, **fields):
    """A tiny Llama whose tokenizer puts the ids `template` before a text."""
    directory, content = copy_of("llama2", tmp_path, **fields), tokenizer_json(60)
    parts = [{"SpecialToken": {"id": f"w{token}", "type_id": 0}} for token in template]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*parts, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {f"w{n}": {"id": f"w{n}", "ids": [n], "tokens": [f"w{n}"]} for n in template},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def data_of(run, *features, recipe=None):
    lengths = dict.fromkeys((*features, "targets"), 8)
    given = ("BATCH_SIZE=8", f"TASK_FEATURE_LENGTHS={lengths}", "MODEL_DIR='x'", "TRAIN_STEPS=1")
    files = (str(recipe or run / "recipe.gin"), "optimizers/sgd.gin")
    invocation = Invocation("train", gin_files=files, bindings=(*given, "MIXTURE_OR_TASK_NAME='x'"))
    return config.load(invocation).build("train.train", given=["resolved"])["data"]


@pytest.mark.parametrize(
    ("fields", "generation", "stop"),
    [
        ({"eos_token_id": [2, 3, 4]}, None, (2, 3, 4)),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 3]}, (2, 3)),
        ({"eos_token_id": [2]}, {"eos_token_id": 5}, (2, 5)),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, (7, 8)),
        ({"eos_token_id": None}, {}, ()),
    ],
    ids=str,
)
def test_every_stop_id_of_both_files_is_kept_and_goes_back(tmp_path, fields, generation, stop):
    directory = llama(tmp_path, generation=generation, **fields)
    convert(str(directory), str(tmp_path / "run"))
    assert read_framing(tmp_path / "run") == Framing((1,), False, stop)
    data = data_of(tmp_path / "run")
    assert (data._start, data._stop_ids) == ([1], list(stop))
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    for name in ("config.json", *(["generation_config.json"] if generation is not None else [])):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((directory / name).read_text()), name


def test_a_run_that_stops_otherwise_says_so_in_both_files(tmp_path):
    convert(str(llama(tmp_path, generation={"eos_token_id": 2, "top_p": 0.9})), str(tmp_path / "run"))
    vocabulary = data_of(tmp_path / "run")._named["targets"]
    RunDirectory(tmp_path / "run").save_vocabularies({"targets": vocabulary}, Framing((9,), False, (5, 2)))
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "back" / name).read_text())
        assert (found["eos_token_id"], found["bos_token_id"]) == ([5, 2], 9)
    assert found["top_p"] == 0.9


@pytest.mark.parametrize("wrong", ["</s>", True, -1, [2, "3"], 2.0], ids=str)
def test_stop_ids_that_are_none_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*must be a token id"):
        convert(str(llama(tmp_path, generation={"eos_token_id": wrong})), str(tmp_path / "run"))


def test_an_encoders_decoder_starts_as_config_says(tmp_path):
    directory = copy_of("t5_1_1", tmp_path, decoder_start_token_id=5)
    convert(str(directory), str(tmp_path / "run"))
    assert read_framing(tmp_path / "run") == Framing((5,), True, (1,))
    assert data_of(tmp_path / "run", "inputs")._start == [5]
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["decoder_start_token_id"] == 5


@pytest.mark.parametrize("family", tiers(["lm", "t5_1_1"], quick=["lm"], slow=["t5_1_1"]))
def test_a_prediction_ends_at_every_stop_id_and_hangs_on_the_start(tmp_path, family):
    free = Predictor(save_run(tmp_path / "free", family, framing=Framing((0,), None, ()))).predict(["abc"])[0]
    assert len(free.tokens) == 16
    second = next(token for token in free.tokens if token != free.tokens[0])
    run = save_run(tmp_path / "stops", family, framing=Framing((0,), None, (1, second, 358)))
    found = Predictor(run).predict(["abc"])[0]
    place = free.tokens.index(second)
    assert found.tokens == free.tokens[: place + 1]
    assert found.text == VOCABULARY.decode(free.tokens[:place])
    other = Predictor(save_run(tmp_path / "other", family, framing=Framing((7,), None, ()))).predict(["abc"])[0]
    assert other.token_scores != free.token_scores


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("added", "refused"),
    [({"<|im_end|>": 25}, True), ({"<|im_end|>": 26, "</s>": 1}, True), ({"</s>": 1}, False), (None, False)],
    ids=str,
)
def test_tokens_added_beside_a_sentence_piece_model_are_not_lost(tmp_path, name, added, refused):
    directory = copy_of("llama2", tmp_path)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(sentence_pieces())
    if added is not None:
        decoder = {"added_tokens_decoder": {str(id): {"content": token} for token, id in added.items()}}
        (directory / name).write_text(json.dumps(added if name == "added_tokens.json" else decoder))
    if not refused:
        assert read_vocabulary(directory, {"eos_token_id": 1}).size == 25
        return
    with pytest.raises(UserError, match=rf"{name} adds '<\|im_end\|>'.*tokenizer.json"):
        convert(str(directory), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config.json": {"eos_token": "</t>"}}, "tokenizer_config.json: eos_token '</t>' is not a token of"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<e>"}}}, "tokenizer_config.json: eos_token '<e>' is not"),
        ({"special_tokens_map.json": {"eos_token": "<e>"}}, "special_tokens_map.json: eos_token '<e>' is not a token"),
        ({"tokenizer_config.json": {"eos_token": 2}}, "tokenizer_config.json: eos_token is 2, but must be the text"),
        ({"generation_config.json": {"eos_token_id": 60}}, "eos_token_id 60 is not a token of the tokenizer"),
    ],
    ids=str,
)
def test_an_eos_that_the_tokenizer_lacks_ends_in_one_message(tmp_path, capsys, files, said):
    directory = copy_of("llama2", tmp_path)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    assert cli.main(["convert", f"--from={directory}", f"--to={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"tokenizer_config.json": {"eos_token": "w9"}}, 9),
        (
            {"tokenizer_config.json": {"eos_token": {"content": "w9"}}, "special_tokens_map.json": {"eos_token": "w8"}},
            9,
        ),
        ({"special_tokens_map.json": {"eos_token": "w8"}}, 8),
        ({"tokenizer_config.json": {"eos_token": None}}, 2),
    ],
    ids=str,
)
def test_texts_end_with_the_eos_of_the_tokenizers_files_and_predictions_there_too(tmp_path, files, eos):
    directory = llama(tmp_path, generation={"eos_token_id": [2, 3]})
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    convert(str(directory), str(tmp_path / "run"))
    text = load_text(tmp_path / "run", has_encoder=False)
    assert text.read_targets("w5") == [5, eos] and text.stop == tuple(dict.fromkeys((2, 3, eos)))


def test_inputs_that_are_to_end_in_an_eos_that_is_none_are_refused(tmp_path):
    RunDirectory(tmp_path).save_vocabularies({"targets": Opaque("endless", 400)})
    with pytest.raises(UserError, match="append_eos: inputs cannot end with EOS, as the run's .*endless has none"):
        load_text(tmp_path, has_encoder=False, append_eos=True)


@pytest.mark.parametrize(
    ("family", "fields", "generation", "said"),
    [
        (
            "llama2",
            {"eos_token_id": [2, 60]},
            None,
            "eos_token_id 60 is not a token of the tokenizer there, .* end at 59",
        ),
        ("llama2", {}, {"eos_token_id": 66}, "eos_token_id 66 is not a token"),
        ("t5_1_1", {"decoder_start_token_id": 61}, None, "decoder_start_token_id 61 is not a token"),
    ],
    ids=str,
)
def test_ids_that_the_tokenizer_has_not_are_refused(tmp_path, family, fields, generation, said):
    directory = copy_of(family, tmp_path, **fields)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(UserError, match=said):
        convert(str(directory), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("family", "fields", "framing"),
    [
        ("llama2", {"eos_token_id": [2, 3]}, Framing((), False, (2, 3))),
        ("llama2", {"eos_token_id": None}, Framing((), False, ())),
        ("t5_1_1", {"decoder_start_token_id": 5, "eos_token_id": 4}, Framing((5,), False, (4,))),
    ],
    ids=str,
)
def test_ids_of_a_model_without_a_tokenizer_start_and_stop_as_its_files_say(tmp_path, family, fields, framing):
    """Predictions of token ids end there too; a task that it is trained on starts and stops alike."""
    directory = copy_of(family, tmp_path, **fields)
    (directory / "tokenizer.json").unlink()
    convert(str(directory), str(tmp_path / "run"))
    has_encoder = family == "t5_1_1"
    text = load_text(tmp_path / "run", has_encoder, size=67)
    assert (text.start, text.stop, text.read_inputs([7, 8])) == (framing.start, framing.stop, [7, 8])
    data = data_of(tmp_path / "run", *(["inputs"] if has_encoder else []))
    assert (data._start, data._stop_ids) == (list(framing.start) or None, list(framing.stop) or None)
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    config = json.loads((directory / "config.json").read_text())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 67}))
    with pytest.raises(UserError, match="id 67 is not among the model's 67"):
        convert(str(directory), str(tmp_path / "other"))


@pytest.mark.parametrize(("template", "text"), [((1,), "w1 w5"), ((1, 3), "w1 w3 w5"), ((), "w1 w5")], ids=str)
def test_a_text_that_spells_out_the_start_has_it_once(tmp_path, template, text):
    convert(str(llama(tmp_path, template)), str(tmp_path / "run"))
    read = load_text(tmp_path / "run", has_encoder=False)
    rows, spelled = RowFormat(False, False, read.start, read.bos), [int(word[1:]) for word in text.split()]
    for inputs in (text, spelled, "w5", [5]):
        known = read.read_inputs(inputs)
        whole = spelled if template or inputs in (text, spelled) else [5]
        assert rows.prompts([known], 4)["decoder_input_tokens"][0, : rows.prompt_size(known)].tolist() == whole
        scored = rows.scored([known], [[9]], {"targets": 4})
        assert scored["decoder_input_tokens"][0, : len(whole)].tolist() == whole
        alone = rows.scored([[]], [known], {"targets": 4})  # where there are only targets
        read_first, then = alone["decoder_input_tokens"][0, 0], alone["decoder_target_tokens"][0, : len(whole) - 1]
        assert len(whole) == 1 or [read_first, *then] == whole
    reader = Reader(read, rows, {"inputs": 3}, truncate=True, begin_field="begin")
    given = [{"inputs": [*template, 4, 6, 7, 8]}, {"inputs": [*template, 4], "begin": [5]}]
    if template:
        given.append({"inputs": [*template], "begin": [*template, 5]})
    examples, problems = reader.read([Record(n, each, str(n), b"") for n, each in enumerate(given)])
    assert not problems and [each.begun for each in examples[1:]] == [[5]] * (len(given) - 1)
    kept = rows.begun([4, 6, 7, 8])[-3 + len(template) :]  # cut at the beginning, behind the start
    assert examples[0].inputs == kept and rows.prompt_size(examples[0].inputs) == 3


@pytest.mark.parametrize(("family", "start"), [("llama2", (1,)), ("llama2", (1, 3)), ("t5_1_1", (5,))], ids=str)
def test_a_run_that_starts_otherwise_than_its_initial_parameters_says_so(tmp_path, family, start):
    """Its recipe need not be the converted one: only the directory knows how the model was trained."""
    own = {"decoder_start_token_id": start[0]}
    directory = llama(tmp_path, start) if family == "llama2" else copy_of(family, tmp_path, **own)
    convert(str(directory), str(tmp_path / "run"))
    for path in (directory, tmp_path / "run", tmp_path / "run" / "checkpoints" / "0"):
        said = []
        train._say_start(Initial(str(path)), Framing(start), said.append)
        assert not said
        train._say_start(Initial(str(path)), Framing((0,)), said.append)
        assert (
            f"starts from {list(start)}, and this run's from [0]: bind the data's `start` to {list(start)}" in said[0]
        )
    (tmp_path / "run" / "vocabularies.json").unlink()
    (directory / "tokenizer.json").unlink()
    assert Initial(str(tmp_path / "run")).start() is Initial(str(directory)).start() is None


@pytest.mark.parametrize("template", [(1,), ()], ids=str)
def test_streamed_data_start_and_stop_as_cached_data_do(tmp_path, template):
    convert(str(llama(tmp_path, template, {"eos_token_id": [2, 3]})), str(tmp_path / "run"))
    (tmp_path / "streamed.gin").write_text(f"include '{tmp_path}/run/recipe.gin'\ninclude 'data/streamed.gin'\n")
    data = data_of(tmp_path / "run", recipe=tmp_path / "streamed.gin")
    assert type(data).__name__ == "SeqioData" and list(data._named) == ["targets"]
    assert (data._start, data._stop_ids) == (list(template), [2, 3])
