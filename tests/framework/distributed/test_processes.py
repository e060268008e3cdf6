"""Which errors a process reports at once, and which may be another's end in disguise."""

import jax

from meshway.framework.distributed.processes import _is_own, barrier, is_primary, watch
from meshway.framework.errors import EnvironmentFailure, UserError, report


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_what_a_peers_end_may_cause_is_not_taken_for_a_mistake():
    assert _is_own(raised(UserError("a typing error")))
    assert _is_own(raised(EnvironmentFailure("no room")))
    assert _is_own(KeyboardInterrupt())
    gloo = jax.errors.JaxRuntimeError("Gloo AllGather failed")
    for cause in (gloo, ValueError("UNKNOWN: Gloo AllGather failed")):
        assert not _is_own(cause)
        assert not _is_own(raised(UserError("saving checkpoint 20 failed"), cause))


def test_a_run_of_one_waits_for_nobody():
    assert is_primary() and watch() is None
    assert barrier("anything", 0.0, "mine") == {0: "mine"}


def test_reports_and_their_codes(capsys, monkeypatch):
    monkeypatch.delenv("MESHWAY_TRACEBACK", raising=False)
    for error, code, said in (
        (UserError("no such file"), 2, "meshway: error: no such file\n"),
        (EnvironmentFailure("no disk"), 1, "meshway: error: no disk\n"),
        (KeyboardInterrupt(), 130, "meshway: interrupted\n"),
    ):
        assert report(error) == code
        assert capsys.readouterr().err == said
    assert report(raised(ZeroDivisionError("ours"))) == 1
    assert "Traceback" in capsys.readouterr().err
