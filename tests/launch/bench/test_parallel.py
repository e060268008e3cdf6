"""`meshway bench parallel`, in this process: tables, misfits, and the choice of layouts."""

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench import parallel


def invocation(*words: str):
    files = ("--gin_file=models/lm/tiny.gin", "--gin_file=optimizers/adamw.gin")
    sizes = ("VOCAB_SIZE=256", "BATCH_SIZE=16", "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16}", "NUM_LAYERS=1")
    rest = ("LEARNING_RATE=0.01", "WARMUP_STEPS=10")
    bindings = [f"--gin.{binding}" for binding in (*sizes, *rest)]
    return cli.parse(["bench", "parallel", *files, *bindings, *words])


def test_layouts_are_measured_one_by_one_and_those_that_do_not_fit_say_why(capsys):
    data, misfit = parallel.compare_layouts(invocation("--layouts=data, nolayout", "--steps=2"))
    out = capsys.readouterr().out
    assert (data.layout, data.mesh, data.measured / data.minimum) == ("data", {"data": 8}, pytest.approx(1, rel=1e-3))
    assert data.seconds > 0 and not data.misfit
    assert "found no gin file 'nolayout'" in misfit.misfit
    header, columns, gradients, *_ = out.splitlines()
    assert header.startswith("data (data=8): 505.4 KiB a device and step, ratio 1.00, ")
    assert columns.split() == ["axes", "what", "sent", "minimum", "ratio", "collectives"]
    assert gradients.split()[:2] == ["data", "gradients"] and "all-reduce" in gradients
    assert "does not fit" in out.splitlines()[-1]


def test_when_no_named_layout_fits_the_command_fails():
    with pytest.raises(UserError, match="none of these layouts fits: nolayout"):
        parallel.compare_layouts(invocation("--gin.LAYOUT=nolayout"))


def test_by_default_all_shipped_layouts_are_measured():
    names, shipped = parallel._names(invocation(), "")
    assert shipped and {"data", "fsdp", "model_2d"} <= set(names)


def test_one_device_sends_nothing():
    (single,) = parallel.compare_layouts(invocation("--layouts=single"))
    assert not single.lines
    assert parallel.format_result(single) == "single (data=1): nothing is sent"
