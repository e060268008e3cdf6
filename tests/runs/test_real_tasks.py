"""Tasks as real data make them (`tests/lab/tasks/odd.py`), from the command line: what is refused, said, or kept.

That each pass visits each example once, at any size, is `tests/framework/data/rows`'s and `test_seqio_loader.py`'s; ids
of special tokens in batches are `tests/launch/test_transformers_ids.py`'s.
"""

import json

import pytest
from running import answer, copy_lab, lines
from table_llama import pieces

pytestmark = pytest.mark.proofs

LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}"
ODD = ("--gin_file=t5.gin", "--gin.MIXTURE_OR_TASK_MODULE=tasks.odd", LENGTHS, "--gin.D_MODEL=32", "--gin.D_FF=32",
       "--gin.LAYOUT=single")  # fmt: skip
TWO_STEPS = ("--gin.TRAIN_STEPS=2", "--gin.REPORT_PERIOD=1", "--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=2")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The lab, with a tokenizer beside the tasks whose id 0 is text, whose id 1 is a letter, and whose EOS is id 2."""
    lab = copy_lab(tmp_path_factory.mktemp("tasks"))
    names = ["!", "b", "</s>", "a", "c", *"0123456789"]
    tokenizer = json.loads(pieces(template=()).to_str())
    tokenizer["model"] |= {"vocab": {name: number for number, name in enumerate(names)}, "unk_token": None}
    tokenizer["added_tokens"] = [each | {"id": 2} for each in tokenizer["added_tokens"] if each["content"] == "</s>"]
    (lab / "letters").mkdir()
    (lab / "letters" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return lab


def train(lab, task, *words, **wanted):
    own = (f"--gin.MIXTURE_OR_TASK_NAME={task}", f"--gin.MODEL_DIR=runs/{task}")
    return answer("train", *ODD, *TWO_STEPS, *own, *words, cwd=lab, **wanted)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("odd_empty", "task 'odd_empty': 'targets', which EncoderDecoder reads, is empty in every example"),
        (
            "odd_minus",
            ("'odd_minus', split 'train', example 0 of shard 7 of 8", "the token id -1", "269 ids, 0 to 268"),
        ),
        (
            "odd_high",
            ("'odd_high', split 'train', example 0 of shard 7 of 8", "the token id 300", "269 ids, 0 to 268"),
        ),
        ("odd_bad", ("task 'odd_bad', split 'train', example", "[a bad record]", "max_bad_examples")),
        ("odd_rates", ("'odd_rates'", "'odd_many'", "-1.0")),
        ("odd_fwe", "did you mean 'odd_few'"),
    ],
)
def test_what_no_model_can_train_on_is_named(lab, task, says):
    train(lab, task, exits=2, says=says)
    assert not [*(lab / "runs" / task).glob("checkpoints/*")]


@pytest.mark.parametrize("task", ["odd_empty", "odd_high"])
def test_it_is_named_in_streamed_data_too(lab, task):
    said = train(lab, task, "--gin_file=data/streamed.gin", exits=2)
    assert task in said.partition("meshway: error: ")[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ("example", "[a bad record]", "`meshway cache --max_bad_examples=N`")),
        (("--max_bad_examples=0",), "`meshway cache --max_bad_examples=N`"),
        (("--workers=0",), "argument --workers: '0' is not a whole number of at least 1"),
        (("--workers=-2",), "argument --workers: '-2' is not a whole number of at least 1"),
        (("--num_shards=0",), "argument --num_shards: '0'"),
        (("--splits=trian",), "did you mean 'train'"),
        (("--part=3/2",), "--part"),
    ],
    ids=str,
)
def test_a_cache_of_bad_records(lab, words, says):
    given = ("--task=odd_bad", "--module=tasks.odd", "--directory=bad_cache", *words)
    said = answer("cache", *given, cwd=lab, exits=2, says=says)
    assert "num_workers" not in said


def test_bad_records_are_left_out_as_far_as_is_allowed(lab):
    given = ("--task=odd_bad", "--module=tasks.odd", "--directory=some_cache", "--num_shards=1")
    said = answer("cache", *given, "--max_bad_examples=1", cwd=lab)
    assert said.count("bad examples left out: 1, the first: task 'odd_bad'") == 2, said  # in each split


def test_rates_of_nothing_before_the_first_step(lab):
    (lab / "zeros.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom meshway.framework.data import grain_loader\n"
        "from meshway.framework.data.rows import mixing\ngrain_loader.CachedData.rates = [@mixing.Rates()]\n"
        "mixing.Rates.from_step = 1\nmixing.Rates.rates = {'odd_few': 1.0}\n"
    )
    seqio_zero = "import seqio\nfrom tasks import odd\nseqio.MixtureRegistry.add('odd_zero', [('odd_few', 0.0)])\n"
    (lab / "zero_rates.py").write_text(seqio_zero)
    train(lab, "odd_zero", "--gin_file=zeros.gin", "--gin.MIXTURE_OR_TASK_MODULE=zero_rates", exits=2,
          says="are all 0 before step 1: add Rates with from_step 0")  # fmt: skip


def test_rates_that_ask_for_counts_get_the_cache_s(lab):
    """`seqio.mixing_rate_num_examples` of 20 and of 480 examples."""
    train(lab, "odd_counted", "--gin.EVAL_PERIOD=None", says="done: step 2;")
    said = answer("inspect", "data", *ODD, "--gin.MIXTURE_OR_TASK_NAME=odd_counted", "--html=counted.html", cwd=lab)
    assert "odd_few" in said and "4.00%" in said and "96.00%" in said, said


def test_tasks_that_a_recipe_imports_are_known_where_they_are_cached(lab):
    """Without a macro that names their module."""
    (lab / "imported.gin").write_text(
        "from __gin__ import dynamic_registration\nimport tasks.odd\ninclude 't5.gin'\nMIXTURE_OR_TASK_MODULE = None\n"
        "MIXTURE_OR_TASK_NAME = 'odd_many'\nTASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 16}\n"
    )
    cached = "--gin.CACHE_DIR=own_cache"
    words = ("--gin_file=imported.gin", "--gin.MODEL_DIR=runs/imported", "--gin.LAYOUT=single", cached)
    answer("train", *words, "--dry_run", cwd=lab, says="odd_many")
    assert not (lab / "own_cache").exists()
    answer("cache", "--gin_file=imported.gin", cached, "--workers=2", cwd=lab, says="480")
    answer("train", *words, *TWO_STEPS, "--gin.EVAL_PERIOD=None", cwd=lab, says="done: step 2;")


def test_line_ends_of_other_scripts_end_no_record(lab):
    train(lab, "odd_lines")
    run = lab / "runs/odd_lines"
    rows = [json.loads(line) for line in (run / "eval/odd_lines.jsonl").read_bytes().split(b"\n") if line]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert "a\u2028b" in json.dumps(rows, ensure_ascii=False)
    page = (run / "report.html").read_text()
    assert "a\u2028b" in page or "a\\u2028b" in page
    answer("eval", "--model_dir=runs/odd_lines", "--again", cwd=lab)


def test_metric_classes_are_run_beside_metric_functions(lab):
    """They were left out, which read as if the task were not evaluated."""
    said = train(lab, "odd_metric")
    assert "evaluated without" not in said and "not evaluated" not in said
    for row in lines(lab / "runs/odd_metric/eval/odd_metric.jsonl"):
        assert {"same", "asked"} <= set(row["metrics"])


@pytest.mark.parametrize("literal", [False, True])
def test_special_tokens_spelt_out_in_texts_are_counted(lab, literal):
    task = "odd_spelt"
    if literal:
        task = "odd_spelt_literal"
        (lab / "literal.py").write_text(
            "import seqio\nfrom tasks import odd\nfeature = seqio.Feature(odd.HuggingFaceVocabulary('letters', "
            "eos_token='</s>', literal=True), add_eos=True)\n"
            f"odd.add('{task}', odd.NUMBERS, [f'{{n}}</s>' for n in odd.NUMBERS], feature=feature)\n"
        )
    module = "literal" if literal else "tasks.odd"
    own = (f"--gin.MIXTURE_OR_TASK_NAME={task}", f"--gin.MIXTURE_OR_TASK_MODULE={module}")
    said = answer("inspect", "data", *ODD, *own, "--html=spelt.html", cwd=lab)
    assert ("24 of 24 examples hold special tokens written in their text (`</s>` 24 times" in said) != literal, said


def test_a_vocabulary_of_its_own_begins_and_ends_texts_everywhere(lab):
    """Id 1 is `b`, EOS is 2, and 0 is `!`: in the run's evaluation, in `eval` and in `infer`."""
    learn = ("TRAIN_STEPS=60", "EVAL_PERIOD=60", "CHECKPOINT_PERIOD=60", "DROPOUT_RATE=0.0", "LEARNING_RATE=1.0",
             "WARMUP_STEPS=20", "VOCAB_SIZE=16")  # fmt: skip
    train(lab, "odd_letters", *(f"--gin.{each}" for each in learn))
    record = lab / "runs/odd_letters/eval/odd_letters.jsonl"
    (within,) = [row for row in lines(record) if row["step"] == 60]
    answer("eval", "--model_dir=runs/odd_letters", "--again", cwd=lab)
    (after,) = [row for row in lines(record) if row["step"] == 60]
    names = ("same", "letters", "mean_score")
    metrics = [{name: row["metrics"][name] for name in names} for row in (within, after)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert metrics[0]["letters"] == 48, "each `b` of the targets is text"
    for mode in ("predict", "score"):
        words = ("--split=validation", f"--mode={mode}", f"--output={mode}.jsonl")
        answer("infer", "--model_dir=runs/odd_letters", *words, cwd=lab)
    predictions, scores = lines(lab / "predict.jsonl"), lines(lab / "score.jsonl")
    assert sum(row["prediction"] == row["targets"] for row in predictions) == metrics[0]["same"]
    assert sum(row["score"] for row in scores) / 24 == pytest.approx(metrics[0]["mean_score"], rel=1e-3)
