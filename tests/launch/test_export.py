"""Exported programs say what `infer` says, in a process that has jax alone: by the lines of docs/inference.md."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from saved_runs import VOCABULARY, save_run
from tiers import tiers

from meshway.framework.data.seqio_vocabularies import Opaque, Own
from meshway.framework.data.vocabulary import Framing
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.predictor import Predictor
from meshway.framework.inference.sampling import Sampling
from meshway.launch import cli
from meshway.launch.export import PLATFORMS, _chosen, _say_without_text

PAGE = Path(__file__).parents[2] / "docs/inference.md"
TEXTS = ["one", "another text"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "t5")


def export(*words):
    return cli.main(["export", "--batch_size=2", *map(str, words)])


def documented() -> str:
    """The lines of Python of the page that load a program and call it."""
    lines = PAGE.read_text().split("need nothing but jax:\n")[1].splitlines()
    block = lines[: next(n for n, line in enumerate(lines) if line and not line.startswith("    "))]
    return textwrap.dedent("\n".join(block))


@pytest.mark.slow
def test_the_documented_lines_predict_without_meshway_what_infer_does(run, tmp_path):
    """Lowered for machines that are not there, too."""
    folder = tmp_path / "programs"
    words = ("--platforms=cpu,tpu,cuda", "--modes=predict", "--max_input_length=16", "--max_new_tokens=6")
    assert export(f"--model_dir={run}", f"--output={folder}", *words) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [each["file"] for each in manifest["programs"]] == ["predict_16.jax_export"]
    assert manifest["platforms"] == ["cpu", "tpu", "cuda"] and (folder / "vocabularies" / "targets.json").is_file()
    (wanted,) = Predictor(run, layout="single", batch_size=2, max_input_length=16, max_new_tokens=6).predict(["one"])
    program = f"import sys\nsys.modules['meshway'] = None\nids = {VOCABULARY.encode('one')}\n{documented()}\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(each) for each in wanted.tokens]


def test_a_vocabulary_of_users_code_is_said_to_stay_behind(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    Own(object(), Opaque("lab.Letters", 384, 1)).save(run / "vocabularies", "targets")
    _say_without_text(run / "vocabularies", ["inputs", "targets"])
    said = capsys.readouterr().err
    assert (
        "vocabulary of 'targets': lab.Letters is code of yours, and is not written" in said and "'inputs'" not in said
    )


def loaded(folder, mode):
    """Returns (parameters, manifest, the program of the largest bucket)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = np.load(folder / "parameters.npz")
    arrays = manifest["parameters"]["arrays"]
    params = {name: files[name].view(jax.numpy.dtype(each["dtype"])) for name, each in arrays.items()}
    entry = [each for each in manifest["programs"] if each["mode"] == mode][-1]
    return params, manifest, jax.export.deserialize((folder / entry["file"]).read_bytes())


@pytest.mark.proofs
def test_a_saved_model_has_the_programs_as_signatures(run, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    words = ("--saved_model", "--max_input_length=16", "--max_new_tokens=4")
    assert export(f"--model_dir={run}", f"--output={tmp_path / 'out'}", *words) == 0
    params, manifest, predict = loaded(tmp_path / "out", "predict")
    module = tensorflow.saved_model.load(str(tmp_path / "out" / manifest["saved_model"]))
    assert sorted(module.signatures) == ["predict_16", "score_16_4"]
    batch = Predictor(run, layout="single")._session.row_format.prompts([[40, 50, 1], [60, 1]], 16)
    ids = np.arange(2, dtype=np.int32)
    wanted = predict.call(params, batch, ids, np.int32(0))
    found = module.signatures["predict_16"](ids=ids, seed=np.int32(0), **batch)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)


CASES = [("t5_1_1", "sampled"), ("lm", "beams"), ("t5_1_1", "beams"), ("lm", "sampled")]


@pytest.mark.parametrize("family, how", tiers(CASES, slow=CASES[:2]))
def test_programs_are_equal_to_the_predictor(family, how, tmp_path):
    """In bfloat16 parameters, with several decodes; scores too."""
    framing = None if family == "t5_1_1" else Framing((300,), False)
    run = save_run(tmp_path / "run", family, "DTYPE = 'bfloat16'", framing=framing)
    words = ("--num_decodes=2", "--temperature=1", "--top_k=9") if how == "sampled" else ("--beams=3",)
    decoder = Sampling(temperature=1.0, top_k=9, num_decodes=2) if how == "sampled" else BeamSearch(3)
    limits = {"max_input_length": 20, "max_new_tokens": 6}
    flags = [f"--{name}={value}" for name, value in limits.items()]
    assert export(f"--model_dir={run}", f"--output={tmp_path / 'out'}", *words, *flags) == 0
    predictor = Predictor(run, layout="single", decoder=decoder, batch_size=2, **limits)
    rows, text = predictor._session.row_format, predictor._session.text
    params, manifest, predict = loaded(tmp_path / "out", "predict")
    entry = [each for each in manifest["programs"] if each["mode"] == "predict"][-1]
    length = entry["lengths"]["inputs"]
    # Of one length, so that the predictor takes the largest bucket too.
    texts = ["a text of 18 bytes", "b text of 18 bytes"]
    batch = rows.prompts([text.read_inputs(each) for each in texts], length)
    found = predict.call(params, batch, np.arange(2, dtype=np.int32), np.int32(0))
    results = {name: {"shape": list(each.shape), "dtype": str(each.dtype)} for name, each in found.items()}
    assert entry["results"] == results
    for row, each in enumerate(predictor.predict(texts)):
        best = int(np.argmax(found["scores"][row]))
        assert found["tokens"][row, best, : found["lengths"][row, best]].tolist() == each.tokens
        np.testing.assert_allclose(found["scores"][row, best], each.score, rtol=1e-4)
    params, manifest, score = loaded(tmp_path / "out", "score")
    lengths = [each for each in manifest["programs"] if each["mode"] == "score"][-1]["lengths"]
    pairs = [text.read_inputs(each) for each in texts], [text.read_targets(each) for each in ("abc", "de")]
    result = score.call(params, rows.scored(*pairs, lengths))["log_probs"]
    for row, each in zip(rows.of_targets(np.asarray(result), *pairs), predictor.score(texts, ["abc", "de"])):
        np.testing.assert_allclose(row, each.token_scores, rtol=1e-4, atol=1e-5)


def test_a_platform_is_one_by_either_name():
    assert _chosen("--platforms", "gpu,cpu,cuda", PLATFORMS) == ["cuda", "cpu"]


MISTAKES = {
    "no folder to make": ([], "meshway export needs --output=DIR"),
    "a platform that is none": (["--output=a", "--platforms=cpu,tpus"], "--platforms: 'tpus' is not one of cpu, tpu"),
    "a mode that is none": (["--output=a", "--modes=train"], "--modes: 'train' is not one of predict, score"),
    "a folder that is there": (["--output=full"], "--output=full exists already: move it away"),
    "a folder in none": (["--output=b/c"], "--output=b/c: there is no folder '"),
    "more beams than tokens": (["--output=a", "--beams=999"], "beams: 999 are more than the 384 tokens"),
    "an unknown step": (["--output=a", "--step=8"], "has no checkpoint of step 8; there are [7]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words, message = MISTAKES[name]
    assert export(f"--model_dir={run}", *words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "a").exists()
