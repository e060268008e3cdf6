import contextlib
import re

import pytest

from meshway.framework.errors import UserError
from meshway.framework.evaluation.records import Claims, StepQueue, Wanted, complete_steps


class Run:
    """A folder of checkpoints that changes as a clock goes on, and what has been evaluated."""

    def __init__(self, folder):
        self.folder, self.claims = folder / "checkpoints", Claims(folder / "claims")
        self.now, self.done, self.said, self.events = 0.0, set(), [], {}
        self.folder.mkdir()

    def save(self, *steps):
        for step in steps:
            (self.folder / str(step)).mkdir()

    def remove(self, *steps):
        for step in steps:
            (self.folder / str(step)).rmdir()

    def sleep(self, seconds):
        self.now += seconds
        for time in [time for time in self.events if time <= self.now]:
            self.events.pop(time)()

    def queue(self, wanted="all", **options):
        wanted = Wanted.parse(wanted) if options.get("watch") else Wanted.parse(wanted).fixed(self.folder)
        given = (self.folder, wanted, self.done.__contains__, self.claims, self.said.append)
        return StepQueue(*given, clock=lambda: self.now, sleep=self.sleep, **options)

    def work(self, queue, limit=20):
        """Evaluates steps until the queue ends; returns them."""
        found = []
        for _ in range(limit):
            with queue.next() as step:
                if step is None:
                    return found
                found.append(step)
                self.done.add(step)
        raise AssertionError(f"no end after {found}")


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_which_steps_are_asked_for(run):
    run.save(10, 20, 30, 100)
    (run.folder / "40.orbax-checkpoint-tmp-1").mkdir()
    assert complete_steps(run.folder) == [10, 20, 30, 100]
    assert run.work(run.queue("latest")) == [100]
    assert run.work(run.queue("30,10")) == [10, 30]
    assert run.work(run.queue(20)) == [20]
    run.done.clear()
    assert run.work(run.queue("all")) == [10, 20, 30, 100]
    assert complete_steps(run.folder / "none") == []


def test_what_was_evaluated_is_passed_over_and_counted(run):
    run.save(10, 20, 30)
    run.done.add(20)
    queue = run.queue()
    assert run.work(queue) == [10, 30] and queue.skipped == 1


@pytest.mark.parametrize("text", ["last", "10,", "10 20", "-1", ""])
def test_what_is_no_step(text):
    with pytest.raises(UserError, match=re.escape(f"--steps={text} is none of latest, all")):
        Wanted.parse(text)


def test_an_unknown_step_is_told_the_nearest(run):
    with pytest.raises(UserError, match="no complete checkpoint in .*--watch waits"):
        Wanted.parse("latest").fixed(run.folder)
    run.save(*range(10, 110, 10))
    with pytest.raises(
        UserError, match=re.escape("no checkpoint of step 52; the nearest are [30, 40, 50, 60, 70, 80], of 10")
    ):
        Wanted.parse("20,52").fixed(run.folder)


def test_a_removed_checkpoint_is_passed_over_and_told(run):
    run.save(10, 20, 30)
    queue = run.queue()
    run.remove(10, 20)
    assert run.work(queue) == [30] and queue.removed == [10, 20]


def test_a_watcher_waits_until_the_last_step(run):
    queue = run.queue(watch=True, total=30)
    run.events = {5.0: lambda: run.save(10), 9.0: lambda: run.save(20), 60.0: lambda: run.save(30)}
    assert run.work(queue) == [10, 20, 30] and run.now >= 60
    assert [line for line in run.said if "a checkpoint" in line] == [f"waiting for a checkpoint in {run.folder}"] * 3


def test_a_watcher_of_a_run_that_has_finished_ends(run):
    run.save(20, 30)
    assert run.work(run.queue(watch=True, total=30)) == [20, 30]
    assert run.work(run.queue(watch=True, total=30)) == [] and run.now == 0


def test_a_watcher_ends_when_nothing_comes(run):
    run.events = {5.0: lambda: run.save(10)}
    assert run.work(run.queue(watch=True, total=30, idle_timeout=20)) == [10]
    assert 20 < run.now < 40 and "no new checkpoint for 20 s" in run.said[-1]


def test_a_watcher_of_the_latest_leaves_out_what_is_older(run):
    run.save(10, 20)
    run.events = {5.0: lambda: run.save(30, 40)}
    assert run.work(run.queue("latest", watch=True, total=40)) == [20, 40]


def test_a_watcher_of_some_steps_ends_with_them(run):
    run.events = {5.0: lambda: run.save(10), 6.0: lambda: run.save(20)}
    assert run.work(run.queue("20", watch=True)) == [20]


def test_a_checkpoint_that_is_removed_and_made_anew_is_another(run):
    """As where a run is sent back to an earlier step."""
    run.save(10, 20)
    run.events = {5.0: lambda: run.remove(20), 9.0: lambda: (run.done.discard(20), run.save(20))}
    run.events[20.0] = lambda: run.save(30)
    assert run.work(run.queue(watch=True, total=30)) == [10, 20, 20, 30]


@pytest.mark.parametrize("watch", [False, True])
def test_a_step_of_another_is_awaited_and_taken_when_that_one_dies(run, watch):
    run.save(10, 20)
    other = contextlib.ExitStack()
    assert other.enter_context(run.claims.take("10"))
    run.events = {7.0: other.close}
    assert run.work(run.queue(watch=watch, total=20)) == [20, 10] and run.now >= 7
    assert run.said == [f"waiting for steps that another program evaluates in {run.folder}"]


def test_a_step_that_another_finishes_is_not_evaluated_again(run):
    run.save(10, 20)
    other = contextlib.ExitStack()
    assert other.enter_context(run.claims.take("10"))

    def finish():
        run.done.add(10)
        other.close()

    run.events = {7.0: finish}
    queue = run.queue()
    assert run.work(queue) == [20] and queue.skipped == 1


def test_of_a_step_finished_between_the_look_and_the_claim(run):
    """Another one evaluates the step after this one found it open, and before it has the claim."""
    run.save(10)
    answers = iter([False, True, True])
    queue = run.queue()
    queue.is_done = lambda step: next(answers)
    assert run.work(queue) == [] and queue.skipped == 1
