import json
import math
from types import SimpleNamespace

import bigram_table
import jax
import pytest

from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.evaluation.schedule import EvalDataset, EvaluationLog, Schedule, begin_hooks
from meshway.framework.training.hooks import EarlyStopping, EvaluationHook
from meshway.framework.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def sharded():
    return bigram_table.sharded()


OWN = bigram_table.Tables(4, names=("ids", "more"))
OTHER = bigram_table.Tables(2, lengths={"inputs": 4, "targets": 8}, names=("other",))


def opened(sharded, **arguments):
    return Schedule(**{"period": 10} | arguments).open(sharded, OWN)


def test_by_default_the_run_s_own_data_is_one_pass(sharded):
    (only,) = opened(sharded)
    assert only.names == ["ids", "more"] and (only.period, only.split) == (10, None)
    assert opened(sharded, period=None) == [] == opened(sharded, train_eval=None, infer_eval=())


def test_each_list_has_data_splits_periods_and_settings_of_its_own(sharded, tmp_path):
    log, said = (), []
    infer = [EvalDataset(OTHER, period=4), EvalDataset(split="train", evaluation=Evaluation(max_predictions=1))]
    passes = opened(sharded, infer_eval=infer)
    assert [(each.names, each.period, each.split) for each in passes] == [
        (["ids", "more"], 10, None),
        (["other"], 4, None),
        (["ids.train", "more.train"], 10, "train"),
    ]
    log = EvaluationLog(passes, 21, RunDirectory(tmp_path), 0, True, said.append)
    assert [step for step in range(22) if log.due(step)] == [0, 4, 8, 10, 12, 16, 20, 21]
    state = SimpleNamespace(params=bigram_table.BigramTable().init(jax.random.key(3)))
    scalars = log(state, 4)
    assert scalars == {"validation/other/count": 3.0} and list(log.reports) == ["other"]
    scalars = log(state, 10)
    names = ["ids/loss", "more/loss", "loss"]
    assert set(scalars) == {*[f"validation/{name}" for name in names], "train/ids/count", "train/more/count"}
    assert scalars["train/ids/count"] == 1.0
    log(state, 20)
    (_, mixed, own) = (list(each.evaluator.results(state.params)) for each in passes)
    assert [result.loss for result in (*mixed, *own)] == [None] * 3  # nothing is run teacher-forced
    assert log.samples(1).count("prediction") == 3  # the latest of each task, though only one was evaluated last
    assert log(state, 4) and log.samples(1).count("prediction") == 3

    def records(name):
        return [json.loads(line) for line in (tmp_path / "eval" / f"{name}.jsonl").read_text().splitlines()]

    assert [record["step"] for record in records("other")] == [4, 20]
    assert "loss" in records("ids")[0]["metrics"] and "count" not in records("ids")[0]["metrics"]
    assert records("ids.train")[0]["split"] == "train" and "count" in records("ids.train")[0]["metrics"]


def test_two_passes_of_one_task_are_one_record(sharded, tmp_path):
    passes = opened(sharded, infer_eval=[EvalDataset(period=4)])
    log = EvaluationLog(passes, 20, RunDirectory(tmp_path), 0, True, [].append)
    log(SimpleNamespace(params=bigram_table.BigramTable().init(jax.random.key(3))), 0)
    counts = log.reports["ids"]["counts"]
    assert counts == {"rows": 1, "tokens": 6.0, "truncated": 0, "predictions": 3} and len(passes) == 2
    assert set(log.reports["ids"]["metrics"]) == {"loss", "count"}


@pytest.mark.parametrize(
    ("train_eval", "said"),
    [
        ([EvalDataset(), EvalDataset(period=10)], "train_eval has the same data, split and period twice"),
        ([EvalDataset(), EvalDataset(period=3)], "train_eval evaluates 'ids' twice: give one of them another split"),
        ([EvalDataset(split="trian")], "no split 'trian'"),
        ([OWN], r"train_eval must be None or a list as \[@train_eval/schedule.EvalDataset\(\)\]"),
    ],
)
def test_what_would_be_written_twice_or_cannot_be_read_is_refused(sharded, train_eval, said):
    with pytest.raises(UserError, match=said):
        opened(sharded, train_eval=train_eval)


def test_a_period_of_no_steps_is_refused():
    with pytest.raises(UserError, match="EvalDataset.period is 0"):
        EvalDataset(period=0)


def test_records_of_earlier_evaluations_are_read_for_hooks_that_see_them_alone(sharded):
    class Stopping(EarlyStopping):
        def begin(self, names, earlier):
            self.begun = names, earlier

    def read(name):
        asked.append(name)
        return {5: {"metrics": {"loss": 1.0}}, 15: {"metrics": {"loss": 2.0}}}

    asked, records, hook = [], SimpleNamespace(read=read), Stopping(("ids", "loss"), "min")
    begin_hooks([SimpleNamespace(after_save=lambda step: None)], opened(sharded), records, 10)
    assert not asked
    begin_hooks([hook], opened(sharded), records, 10)
    names = ["ids", "more"]
    assert asked == names and hook.begun == (names, {5: dict.fromkeys(names, {"metrics": {"loss": 1.0}})})


def found(value, metric="loss", **more):
    return {"ids": {"metrics": {metric: value}} | more}


@pytest.mark.parametrize(
    ("values", "stops", "settings"),
    [
        ([5, 4, 3, 3, 3], 5, {}),  # three values, none better than the one before
        ([5, 4, 3, 2, 2, 1, 1, 1], 8, {}),
        ([5, 6], 2, {"patience": 2}),
        ([5, 5, 5, 5], 4, {"patience": 4}),
        ([5, 4.5, 4.2, 4.1], 3, {"atol": 0.5}),  # by just as much is no better
        ([8, 7.0, 6.2, 5.5], 4, {"rtol": 0.12, "atol": 0.01}),  # 7.03 is enough, 6.15 and 5.446 would be
        ([1, 2, 2, 2], 4, {"mode": "max"}),
        ([1, 2.1, 3, 3.9, 4.8], 4, {"mode": "max", "atol": 1.0}),
        ([-1, -2, -3], 3, {"mode": "max"}),
        ([5, math.nan, math.nan], 3, {}),
        ([5, None, None], 3, {}),  # NaN as a record has it
        ([5, 4, 3, 2, 1], None, {}),
    ],
)
def test_a_run_stops_as_t5x_s_action_has_it(values, stops, settings):
    hook = EarlyStopping(("ids", "loss"), **{"mode": "min"} | settings)
    assert isinstance(hook, EvaluationHook)
    hook.begin(["ids"], {})
    said = [hook.after_evaluation(step, found(value)) for step, value in enumerate(values, 1)]
    first = next((step for step, why in enumerate(said, 1) if why), None)
    assert first == stops
    resumed = EarlyStopping(("ids", "loss"), **{"mode": "min"} | settings)
    resumed.begin(["ids"], {step: found(value) for step, value in enumerate(values[:-1], 1)})
    assert resumed.after_evaluation(len(values), found(values[-1])) == said[-1]


def test_a_task_called_as_the_reports_are_is_refused():
    with pytest.raises(UserError, match="'train' stands for the reports of training, and a task of that name"):
        EarlyStopping(("train", "loss"), "min").begin(["train", "ids"], {})
    EarlyStopping(("ids", "loss"), "min").begin(["train", "ids"], {})


def test_a_report_that_did_not_measure_a_metric_counts_for_nothing():
    hook = EarlyStopping(("train", "accuracy"), "max", patience=2)
    asked = [hook.after_report(step, {"accuracy": value}) for step, value in enumerate([0.5, None, None, 0.6, 0.6])]
    assert asked[:4] == [None] * 4 and "has not improved in the last 2 reports: 0.6, 0.6" in asked[4]
    with pytest.raises(UserError, match="'train' has no metric 'acuracy'; .*did you mean 'accuracy'"):
        EarlyStopping(("train", "acuracy"), "max").after_report(1, {"accuracy": 0.5})


def test_a_metric_that_is_not_found_is_told_and_one_that_failed_is_waited_for():
    hook = EarlyStopping(("ids", "f1"), "max")
    assert hook.after_evaluation(1, {"other": {"metrics": {}}}) is None
    assert hook.after_evaluation(1, found(1.0, failed={"f1": "ZeroDivisionError"})) is None
    with pytest.raises(UserError, match="'ids' has no metric 'f1'; it is one of f2; did you mean 'f2'"):
        hook.after_evaluation(1, found(1.0, metric="f2"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metric": "loss"}, "metric is 'loss': a task and its metric"),
        ({"mode": "least"}, "mode is 'least': 'min' where less"),
        ({"patience": 1}, "patience is 1; two"),
        ({"atol": -1.0}, "atol is -1.0; it must be at least 0"),
        ({"rtol": math.nan}, "rtol is nan; it must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, said):
    with pytest.raises(UserError, match=f"EarlyStopping.{said}"):
        EarlyStopping(**{"metric": ("ids", "loss"), "mode": "min"} | arguments)
