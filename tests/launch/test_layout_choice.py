"""`--layout=auto` of `meshway infer` and `Predictor`: what it chooses, that it runs, what a plan says of it, what is
refused."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import pytest
from saved_runs import LENGTHS, save_run

from meshway.framework.errors import UserError
from meshway.framework.inference.engine import Workload
from meshway.framework.inference.predictor import Predictor
from meshway.framework.partitioning.partitioner import Partitioner
from meshway.framework.planning import hardware
from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.topology import topology
from meshway.launch import cli, layout_choice
from meshway.launch.cluster import launch
from meshway.launch.invocation import Invocation
from meshway.launch.layout_choice import INFER_FLAGS, Request, choose

PALM_540B = Transformer(118, 18432, 73728, 48, 1, 256, 256_128, parallel=True)
TEXTS = ["one", "a text of some more words", "three", "four 4", "5", "six", "7 sevens", "eight"]
EIGHT = ("NUM_HEADS = 8", "NUM_KV_HEADS = 1")


def chosen(batch: int, prompt: int, new_tokens: int, where: str = "v4:4x4x4", **options):
    request = Request(Workload(batch, prompt, new_tokens), **options)
    return choose(PALM_540B, topology(where), request, lambda _: "", INFER_FLAGS)


@pytest.mark.parametrize("overlap", [False, True])
def test_picks_of_the_paper(overlap):
    """Pope et al. 2022, tables 2 and 3, and section 3.3."""
    for batch in (64, 128, 256, 512):
        best = chosen(batch, 1984, 64, overlap=overlap).best
        assert best.decode.feed_forward == "2D" and best.decode.attention != "heads"
    offline = chosen(512, 2048, 64, overlap=overlap).best
    assert offline.prefill.feed_forward.startswith("WG") and offline.decode.feed_forward == "2D"
    alone = chosen(1, 2048, 64, overlap=overlap).best
    assert (alone.prefill.feed_forward, alone.prefill.attention) == ("2D", "heads")
    for batch in (4, 16, 64):
        assert chosen(batch, 64, 1984, overlap=overlap).best.decode.attention.startswith("batch")


def test_a_layout_that_the_model_does_not_run_under_is_passed_over():
    request = Request(Workload(64, 1984, 64))
    first = chosen(64, 1984, 64)
    refusal = lambda each: "no" if each.layout == first.best.layout else ""  # noqa: E731
    found = choose(PALM_540B, first.where, request, refusal, INFER_FLAGS)
    assert found.best.layout != first.best.layout and set(found.refused.values()) == {"no"}
    text = "\n".join(layout_choice.lines(found))
    assert f"passed over {first.best.layout} on x=" in text and f"next {found.other.layout}" in text
    with pytest.raises(UserError, match="no layout of inference runs this model on v4:4x4x4: no .48 were tried."):
        choose(PALM_540B, first.where, request, lambda _: "no", INFER_FLAGS)


def test_what_would_fit_is_said():
    with pytest.raises(UserError, match="the run does not fit: v4:2x2x2 .* it fits with v4:4x4x4$"):
        chosen(64, 1984, 64, "v4:2x2x2")
    with pytest.raises(UserError, match="it fits with --weights=int8 or --batch_size=16 or v4:4x4x4$"):
        chosen(256, 1984, 64, "v4:4x4x2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "lm", "lm", *EIGHT)


def infer(run, tmp_path, *words):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"inputs": text}) + "\n" for text in TEXTS))
    files = (f"--model_dir={run}", f"--input={source}", f"--output={output}", "--overwrite")
    code = cli.main(["infer", *files, "--batch_size=8", *words])
    return code, [json.loads(line)["tokens"] for line in output.read_text().splitlines()] if code == 0 else []


FLAGS = re.compile(r"--gin\.LAYOUT=\S+ --gin\.mesh\.MeshShape\.ici=\"[^\"]*\"")


@pytest.mark.slow
def test_infer_runs_what_a_plan_chooses_and_answers_alike(run, tmp_path, capsys, monkeypatch):
    alone = infer(run, tmp_path, "--layout=single")
    meshes, made = [], Partitioner.__init__

    def init(self, *given):
        made(self, *given)
        meshes.append((dict(self.mesh.shape), self.mesh.devices.flat[0]))

    monkeypatch.setattr(Partitioner, "__init__", init)
    capsys.readouterr()
    assert infer(run, tmp_path, "--layout=auto", "--topology=v4:2x2x2") == alone
    said = capsys.readouterr().err
    (flags,) = FLAGS.findall(said)
    assert "inference/" in flags and "next inference/" in said
    ran, device = meshes[-1]
    assert device in jax.devices() and str(ran) in flags
    plan = ["plan", f"--gin_file={run / 'recipe.gin'}", "--topology=v4:2x2x2", "--weights=float32", "--cache=float32"]
    plan += ["--batch=8", f"--new_tokens={LENGTHS['targets']}"]
    context = LENGTHS["inputs"]
    for asked in ((f"--context={context}",), ("--phase=decode", f"--context={context + LENGTHS['targets']}")):
        assert cli.main([*plan, *asked]) == 0
        assert FLAGS.findall(capsys.readouterr().out) == [flags]


@pytest.mark.slow
def test_the_predictor_takes_it_and_devices_are_counted_as_what_they_are(run):
    answers = [each.tokens for each in Predictor(run, layout="single").predict(TEXTS)]
    predictor = Predictor(run, layout="auto")
    assert [each.tokens for each in predictor.predict(TEXTS)] == answers
    assert set(predictor._session.sharded.partitioner.mesh.shape) == {"x", "y", "z"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology=v4:2x2x2",), "--topology has no effect without --layout=auto"),
        (("--layout=auto", "--topology=v4:4x4x4"), "--topology=v4:4x4x4 has 64 devices, of one slice; here are 8"),
        (("--layout=auto", "--topology=v5q:8"), "--topology: topology 'v5q:8': no accelerator is called 'v5q'"),
        (("--layout=auto", "--gin.mesh.MeshShape.ici={'x': 8}"), "--layout=auto chooses the mesh too; leave it out"),
        (("--layout=auto", "--mode=score"), "--layout=auto chooses for predictions"),
        (("--layout=autos",), "did you mean 'auto'"),
    ],
)
def test_what_does_not_go_with_it(run, tmp_path, capsys, words, message):
    assert infer(run, tmp_path, *words)[0] == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_mixture_of_experts_is_refused_and_what_to_name_is_said(tmp_path, capsys):
    run = save_run(tmp_path / "moe", "mixtral")
    assert infer(run, tmp_path, "--layout=auto")[0] == 2
    said = capsys.readouterr().err
    assert "costs of mixtures of experts are not estimated" in said and "choose a layout by name" in said


def test_memory_that_is_too_small_is_said(run, tmp_path, capsys, monkeypatch):
    where = topology("v4:2x2x2")
    small = dataclasses.replace(where, chip=dataclasses.replace(where.chip, memory_bytes=20_000))
    monkeypatch.setattr(layout_choice, "topology_of", lambda devices: small)
    assert infer(run, tmp_path, "--layout=auto")[0] == 2
    assert "the run does not fit: v4:2x2x2 has 19.5 KiB a chip" in capsys.readouterr().err


def test_other_verbs_and_recipes_name_a_layout(run, capsys):
    assert cli.main(["eval", f"--model_dir={run}", "--gin.LAYOUT=auto"]) == 2
    assert "LAYOUT='auto' is for `meshway infer`, `serve` and Predictor alone" in capsys.readouterr().err


def test_a_launched_command_s_recipe_is_checked_with_no_layout_yet(run, monkeypatch):
    monkeypatch.setattr(launch, "check_model_dir", lambda *_: None)  # a test's own is on no shared file system
    words = ["infer", f"--model_dir={run}", "--input=in.jsonl", "--output=out.jsonl"]
    command = cli.parse([*words, "--layout=auto"])
    assert launch._checked(Invocation("launch", command=command, place=SimpleNamespace())) is not None
    command = cli.parse([*words, "--layout=autos"])
    with pytest.raises(UserError, match="found no gin file 'autos'"):
        launch._checked(Invocation("launch", command=command, place=SimpleNamespace()))


def test_devices_at_hand_as_topologies(monkeypatch):
    found = hardware.topology_of(jax.devices())
    assert (found.name, found.num_devices, [ring.size for ring in found.rings]) == ("cpu:8", 8, [2, 2, 2])
    device = dataclasses.make_dataclass("Device", ["device_kind", "platform", "coords", "slice_index"])
    torus = [device("TPU v4", "tpu", (x, y, z), 0) for x in range(2) for y in range(2) for z in range(4)]
    assert hardware.topology_of(torus).name == "v4:2x2x4"
    gpus = [device("NVIDIA H200", "gpu", (), 0)] * 8
    assert dataclasses.replace(hardware.topology_of(gpus), name="") == dataclasses.replace(topology("h200:8"), name="")
    with pytest.raises(UserError, match="do not fill the 16 of v4:2x2x4"):
        hardware.topology_of(torus[1:])
    with pytest.raises(UserError, match="nothing is known of the links of a 'NVIDIA L4'"):
        hardware.topology_of([device("NVIDIA L4", "gpu", (), 0)])
