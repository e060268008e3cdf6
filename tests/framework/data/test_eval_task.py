from types import SimpleNamespace

import numpy as np
import pytest
import tasks_in_memory

from meshway.framework.data.eval_task import TaskEvaluation
from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.errors import UserError


def make(examples, metric_fns=()):
    """An evaluation of a task whose vocabulary hands ids through, with EOS 1."""
    vocabulary = SimpleNamespace(eos_id=1, decode=list)
    feature = SimpleNamespace(vocabulary=vocabulary)
    task = SimpleNamespace(
        name="ids",
        output_features={"inputs": feature, "targets": feature},
        predict_metric_fns=list(metric_fns),
        postprocess_fn=lambda output, example, is_target: output,
    )
    converter, lengths = EncoderDecoder(), {"inputs": 4, "targets": 4}
    objective = converter.bind(tasks_in_memory.task("inputs", "targets"), lengths)
    return TaskEvaluation("ids", InMemory(examples), objective, converter, lengths, 2, {}, task)


EXAMPLES = [{"inputs": np.array([7, 8]), "targets": np.array([5, 0, 6, 1])}]


def test_predictions_and_targets_end_before_eos():
    task = make(EXAMPLES)
    assert task.target(0) == [5, 0, 6]
    assert task.postprocess(0, np.array([5, 0, 6, 1, 9, 9])) == [5, 0, 6]
    assert task.postprocess(0, np.array([5, 0, 6])) == [5, 0, 6]


def test_a_pretokenized_target_is_not_trimmed():
    (example,) = EXAMPLES
    assert make([example | {"targets_pretokenized": b"whole \xc3\xa9"}]).target(0) == "whole é"


def test_more_predictions_than_examples_are_refused():
    with pytest.raises(UserError, match="2 predictions for 1 examples"):
        make(EXAMPLES).metrics([[], []])
