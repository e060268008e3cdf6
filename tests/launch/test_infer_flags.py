"""Every flag of infer does something, or is refused with the reason: nothing is computed here."""

import dataclasses
import re

import pytest

from meshway.framework.errors import UserError
from meshway.framework.inference.sampling import Sampling
from meshway.launch import cli
from meshway.launch.infer import Inputs, Output
from meshway.launch.infer_flags import by_flag, refuse_idle, refuse_idle_in_export

BEAMS, GREEDY = "with --beams", "at temperature 0"
WITH_AUX = {"mode": "predict_with_aux"}
IDLE = [
    (["--beams=4", "--num_decodes=2"], {}, "--num_decodes", BEAMS),
    (["--beams=4", "--temperature=0.7"], {}, "--temperature", BEAMS),
    (["--beams=4", "--top_p=0.5"], {}, "--top_p", BEAMS),
    (["--beams=4", "--gin.infer.infer.seed=3"], {}, "--seed", BEAMS),
    (["--beams=4", "--gin.sampling.Sampling.top_k = 3"], {}, "--top_k", BEAMS),
    (["--top_k=4"], {}, "--top_k", GREEDY),
    (["--temperature=0", "--seed=1"], {}, "--seed", GREEDY),
    (["--num_decodes=2"], {}, "--num_decodes", GREEDY),
    (["--mode=score", "--stop=."], {"mode": "score"}, "--stop", "with --mode=score"),
    (["--mode=score", "--beams=2"], {"mode": "score"}, "--beams", "with --mode=score"),
    (["--mode=score", "--temperature=2"], {"mode": "score"}, "--temperature", "with --mode=score"),
    (["--mode=score", "--begin_field=a"], {"mode": "score"}, "--begin_field", "with --mode=score"),
    (["--targets_field=id"], {}, "--targets_field", "without --mode=score"),
    (["--task=t"], {}, "--task", "without --split"),
    (["--fields=id"], {}, "--fields", "without --split"),
    (["--task=t", "--preprocess=u"], {"preprocess": "u"}, "--task", "without --split"),
    (["--module=json"], {}, "--module", "without --split or --preprocess"),
    (["--split=train", "--columns=a"], {"split": "train"}, "--columns", "without --input"),
    (["--split=train", "--format=text"], {"split": "train"}, "--format", "without --input"),
    (["--beams=2"], {"output": "out.txt"}, "--beams", "with a .txt output"),
    (["--num_decodes=2", "--temperature=1"], {"output": "out.txt"}, "--num_decodes", "with a .txt output"),
    (["--mode=predict_with_aux", "--aux=logits"], {"output": "o.txt", **WITH_AUX}, "--aux", "with a .txt output"),
    (["--mode=score"], {"output": "out.txt", "mode": "score"}, "--mode", "with a .txt output"),
    (["--writer=a.B", "--output_format=jsonl"], {"writer": "a.B"}, "--output_format", "with --writer"),
]
IDLE += [
    (["--prompt=a", "--mode=score"], {"prompts": ["a"], "mode": "score"}, "--mode", "with --prompt"),
    (["--prompt=a", "--begin_field=b"], {"prompts": ["a"]}, "--begin_field", "with --prompt"),
    (["--prompt=a", "--columns=b"], {"prompts": ["a"]}, "--columns", "without --input"),
    (["--prompt=a", "--num_shards=2"], {"prompts": ["a"], "output": None}, "--num_shards", "without --output"),
    (["--prompt=a", "--overwrite"], {"prompts": ["a"], "output": None}, "--overwrite", "without --output"),
    (["--prompt=a", "--aux=logits"], {"prompts": ["a"], "output": None, **WITH_AUX}, "--aux", "without --output"),
]
USED = [
    (["--prompt=a", "--prompt=b", "--stop=."], {"prompts": ["a", "b"], "output": None}),
    (["--prompt=a", "--overwrite", "--chunk_size=2"], {"prompts": ["a"]}),
    (["--beams=4", "--stop=."], {}),
    (["--temperature=1", "--top_k=3", "--top_p=0.5", "--num_decodes=2", "--seed=3", "--stop=."], {}),
    (["--mode=score", "--targets_field=a", "--max_new_tokens=3"], {"mode": "score"}),
    (["--split=train", "--task=t", "--module=m", "--inputs_field=a", "--truncate", "--fields=id"], {"split": "train"}),
    (["--preprocess=t", "--module=m", "--columns=a,b", "--format=tsv"], {"preprocess": "t"}),
    (["--stop=.", "--stop=b"], {"output": "out.txt"}),
    (["--beams=2"], {"output": "out.txt", "writer": "a.B"}),
]


def check(words, mode="predict", split=None, preprocess=None, output="out.jsonl", prompts=(), writer=None):
    invocation = cli.parse(["infer", "--model_dir=run", *words])
    values = dict(binding.split("=", 1) for binding in invocation.bindings)
    number = {name.strip(): value for name, value in values.items()}
    decoder = Sampling(temperature=float(number.get("sampling.Sampling.temperature", 0)))
    decoder = dataclasses.replace(decoder, num_decodes=int(number.get("sampling.Sampling.num_decodes", 1)))
    arguments = {
        "mode": mode,
        "inputs": Inputs(None if split or prompts else "in.jsonl", split, prompts, preprocess=preprocess),
        "output": Output(output, writer=writer),
        "decoder": decoder,
        "beams": int(number["infer.infer.beams"]) if "infer.infer.beams" in number else None,
    }
    refuse_idle(invocation.bindings, arguments)


@pytest.mark.parametrize(("words", "settings", "flag", "why"), IDLE, ids=lambda value: str(value))
def test_a_flag_without_effect_is_refused(words, settings, flag, why):
    with pytest.raises(UserError, match=f"{flag} has no effect {why}"):
        check(words, **settings)


@pytest.mark.parametrize(("words", "settings"), USED, ids=str)
def test_what_has_an_effect_is_taken(words, settings):
    check(words, **settings)


def test_settings_are_told_by_their_flags():
    settings = {
        "/meshway.framework.inference.sampling.Sampling.temperature": "0.7",
        "/meshway.launch.infer.infer.beams": "4",
        "/TASK_FEATURE_LENGTHS": "{}",
        "other/meshway.framework.inference.sampling.Sampling.top_k": "3",
    }
    assert by_flag(settings) == {
        "--temperature": "0.7",
        "--beams": "4",
        "--gin.TASK_FEATURE_LENGTHS": "{}",
        "--gin.other/meshway.framework.inference.sampling.Sampling.top_k": "3",
    }


@pytest.mark.parametrize(
    "words",
    ["infer --batch_size=0", "infer --beams=0", "infer --beams=-2", "infer --max_new_tokens=0", "infer --num_decodes=0",
     "infer --chunk_size=0", "infer --max_input_length=-1", "infer --top_k=-1", "infer --step=-1", "infer --seed=-1",
     "eval --max_predictions=-1", "bench data --seconds=0", "inspect data --batches=0", "bench decode --new_tokens=0"],
)  # fmt: skip
def test_numbers_that_count_are_counts(words, capsys):
    assert cli.main([*words.split(), "--gin_file=quickstart"]) == 2
    flag = words.split()[-1].partition("=")[0]
    assert f"argument {flag}: " in (said := capsys.readouterr().err) and "is not a whole number of at least" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("infer --input=a --output=b --temperature=-1", "argument --temperature: '-1' is not a number of at least 0"),
        ("infer --input=a --output=b --on_bad=ignore", "argument --on_bad: 'ignore' is not one of fail, skip"),
        ("infer --input=a --output=b --gin.infer.Inputs.on_bad=x", "(bound: on_bad at --gin.infer.Inputs.on_bad)"),
        ("eval --gin.evaluate.evaluate.watch=often", ".evaluate.watch: evaluate.evaluate.watch = 'often': True or"),
        ("cache --task=a --directory=s3://b/c", "error: --directory=s3://b/c: it is not a local path"),
    ],
)  # fmt: skip
def test_a_value_is_named_by_the_flag_that_was_written(words, said, capsys):
    verb, *flags = words.split()
    more = ["--model_dir=x"] if verb != "cache" else ["--module=math"]
    assert cli.main([verb, "--gin_file=quickstart", *more, *flags]) == 2
    assert said in (found := capsys.readouterr().err), found


@pytest.mark.parametrize(
    "words, message",
    [
        (("--beams=4", "--num_decodes=3"), "--num_decodes has no effect with --beams"),
        (("--modes=score", "--beams=4"), "--beams has no effect with --modes=score"),
        (("--top_k=9",), "--top_k has no effect at temperature 0"),
    ],
)
def test_export_refuses_them_too(words, message):
    given = cli.parse(["export", "--model_dir=run", "--output=out", *words])
    decoder, beams = Sampling(temperature=0.0), 4 if "--beams=4" in words else None
    modes = "score" if "--modes=score" in words else "predict,score"
    with pytest.raises(UserError, match=re.escape(message)):
        refuse_idle_in_export(given.bindings, decoder, modes, beams)
