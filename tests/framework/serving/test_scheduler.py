"""The scheduler over slots of plain Python: who gets a slot when, how requests end, and that nothing hangs."""

import random
import threading
import time
from collections.abc import Mapping

import pytest
from fake_pool import EOS, TEXT, FakePool, alone

from meshway.framework.serving.generation import Generation, Made
from meshway.framework.serving.scheduler import Busy, Call, Request, Scheduler, Unavailable
from meshway.framework.serving.writing import Writer, Written


class Caller:
    """Collects what is delivered of one request."""

    def __init__(self, *generations: Generation, **options):
        self.over = threading.Event()
        self.news: list[Mapping[int, Written]] = []
        self.request = Request(generations, self._take, **options)

    def _take(self, news: Mapping[int, Written]) -> None:
        self.news.append(news)
        if len(self.reasons()) == len(self.request.generations):
            self.over.set()

    def of(self, index: int = 0) -> Written:
        found = Written()
        for news in self.news:
            found = found.then(news[index]) if index in news else found
        return found

    def reasons(self) -> list[str]:
        return [written.reason for news in self.news for written in news.values() if written.reason]

    def wait(self) -> "Caller":
        assert self.over.wait(20), "nothing came"
        return self


def prompt(*words: int) -> Generation:
    return Generation(words, 5, temperature=0)


@pytest.fixture
def served():
    made = []

    def start(pool: FakePool, **options) -> Scheduler:
        made.append(Scheduler(TEXT, pool, **options))
        made[-1].start()
        return made[-1]

    yield start
    for scheduler in made:
        scheduler.stop()


class Gate(FakePool):
    """Reads no prompt before it is opened, so that those who come meanwhile wait."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.opened = threading.Event()
        self.held = threading.Event()

    def prefill(self, slot):
        self.held.set()
        assert self.opened.wait(20)
        return super().prefill(slot)


def test_each_of_many_requests_gets_what_it_gets_alone(served):
    draw = random.Random(0)
    scheduler = served(FakePool(num_slots=4), max_queue=1000)
    callers = []
    for number in range(300):
        count = draw.choice([1, 1, 1, 3])
        generations = [
            Generation(tuple(draw.choices(range(9), k=draw.randint(1, 12))), draw.randint(1, 20), seed=number, decode=n)
            for n in range(count)
        ]
        callers.append(Caller(*generations, priority=draw.choice(["online", "batch"])))
        scheduler.submit(callers[-1].request)
        if draw.random() < 0.1:
            time.sleep(0.001)
    for caller in callers:
        caller.wait()
        for index, generation in enumerate(caller.request.generations):
            whole, tokens = caller.of(index), alone(generation)
            assert list(whole.tokens) == tokens
            assert whole.reason == ("stop" if tokens[-1] == EOS else "length")
            assert whole.text == TEXT.write(tokens)
            assert len(whole.log_probs) == len(whole.top) == len(whole.offsets) == len(tokens)
    time.sleep(0.05)
    assert scheduler.is_drained and scheduler.slots_used == 0 and not sum(scheduler.queued.values())


def test_one_priority_goes_first_and_the_other_never_starves(served):
    pool = Gate(num_slots=1)
    scheduler = served(pool)
    first = Caller(prompt(0))
    scheduler.submit(first.request)
    assert pool.held.wait(20)
    callers = [Caller(prompt(1, n), priority="batch") for n in range(4)]
    callers += [Caller(prompt(2, n)) for n in range(12)]
    for caller in callers:
        scheduler.submit(caller.request)
    pool.opened.set()
    for caller in callers:
        caller.wait()
    kinds = [each[0] for each in pool.order[1:]]
    assert kinds == [2, 2, 2, 1] * 4
    assert [each[1] for each in pool.order[1:] if each[0] == 1] == list(range(4))
    assert [each[1] for each in pool.order[1:] if each[0] == 2] == list(range(12))


def test_a_full_queue_is_busy_by_priority(served):
    pool = Gate(num_slots=1)
    scheduler = served(pool, max_queue=2)
    callers = [Caller(prompt(0))]
    scheduler.submit(callers[0].request)
    assert pool.held.wait(20)
    time.sleep(0.01)
    callers += [Caller(prompt(1), prompt(2)), Caller(prompt(3), priority="batch")]
    for caller in callers[1:]:
        scheduler.submit(caller.request)
    with pytest.raises(Busy, match="2 predictions wait already, and 2 may"):
        scheduler.submit(Caller(prompt(4)).request)
    with pytest.raises(Busy):
        scheduler.submit(Caller(prompt(4), prompt(5), priority="batch").request)
    pool.opened.set()
    for caller in callers:
        caller.wait()
    scheduler.submit(Caller(prompt(4)).request)


def test_cancelled_requests_give_back_their_slots_within_a_step(served):
    pool = Gate(num_slots=2)
    scheduler = served(pool)
    running, waiting = Caller(Generation((1,), 10**9, temperature=0)), Caller(prompt(2), prompt(3), prompt(4))
    scheduler.submit(running.request)
    assert pool.held.wait(20)
    scheduler.submit(waiting.request)
    scheduler.cancel(waiting.request)
    pool.opened.set()
    assert waiting.wait().reasons() == ["cancelled"] * 3
    assert (2,) not in pool.order
    while not running.news:
        time.sleep(0.001)
    scheduler.cancel(running.request)
    at = pool.steps
    assert running.wait().reasons() == ["cancelled"]
    assert running.news[-1][0].reason == "cancelled" and pool.steps <= at + 3
    while not scheduler.is_drained:
        time.sleep(0.001)
    assert scheduler.slots_used == 0


def test_deadlines_end_what_waits_and_what_runs(served):
    pool = FakePool(num_slots=1)
    scheduler = served(pool)
    soon = time.monotonic() + 0.1
    running = Caller(Generation((1,), 10**9, temperature=0), deadline=soon)
    waiting = Caller(prompt(2), deadline=soon)
    scheduler.submit(running.request)
    scheduler.submit(waiting.request)
    assert waiting.wait().reasons() == ["timeout"] and running.wait().reasons() == ["timeout"]
    assert running.of().text and not waiting.of().tokens and "time" in waiting.of().message
    assert Caller(prompt(1)).reasons() == []


def test_an_engine_that_fails_tells_everyone_and_takes_nothing_more(served, capfd):
    pool = FakePool(num_slots=1)
    pool.fails_at = 4
    scheduler = served(pool)
    callers = [Caller(prompt(n)) for n in range(3)]
    for caller in callers:
        scheduler.submit(caller.request)
    for caller in callers:
        assert caller.wait().reasons() == ["error"]
        assert caller.of().message == "RuntimeError: the device is gone"
    with pytest.raises(Unavailable, match="the engine has failed: RuntimeError: the device is gone"):
        scheduler.submit(Caller(prompt(9)).request)
    assert scheduler.is_drained and "the device is gone" in capfd.readouterr().err


def test_a_stopped_engine_is_noticed(served):
    pool = Gate(num_slots=1)
    scheduler = served(pool)
    assert scheduler.stalled_seconds == 0
    caller = Caller(prompt(1))
    scheduler.submit(caller.request)
    assert pool.held.wait(20)
    time.sleep(0.3)
    assert scheduler.stalled_seconds > 0.2
    pool.opened.set()
    caller.wait()


def test_draining_finishes_what_was_taken_and_stopping_cancels_it(served):
    scheduler = served(FakePool(num_slots=1))
    short, endless = Caller(prompt(1)), Caller(Generation((1,), 10**9, temperature=0))
    scheduler.submit(short.request)
    scheduler.submit(endless.request)
    scheduler.drain()
    with pytest.raises(Unavailable, match="shutting down"):
        scheduler.submit(Caller(prompt(9)).request)
    assert short.wait().reasons() == ["length"] and not scheduler.is_drained
    scheduler.stop()
    assert endless.wait().reasons() == ["cancelled"]


def test_searches_have_slots_of_their_own(served):
    scheduler = served(FakePool(num_slots=1), beams=FakePool(num_slots=1, searches=True))
    plain, searched = Caller(prompt(1)), Caller(Generation((1,), 5, temperature=0, num_beams=2))
    scheduler.submit(plain.request)
    scheduler.submit(searched.request)
    assert plain.wait().reasons() == ["length"]
    assert len(searched.wait().of().hypotheses) == 2
    none = served(FakePool())
    assert "--beams" in none.refusal(Generation((1,), 5, num_beams=2)) and none.refusal(prompt(1)) is None


def test_calls_are_made_between_steps_and_their_errors_are_their_callers(served):
    scheduler, found, over = served(FakePool()), [], threading.Event()

    def fail():
        raise ValueError("no")

    scheduler.submit(Call(lambda: threading.current_thread().name, found.append))
    scheduler.submit(Call(fail, found.append, "batch"))
    scheduler.submit(Call(lambda: 1, lambda result: over.set()))
    assert over.wait(20)
    time.sleep(0.05)
    assert found[0] == "engine" and str(found[1]) == "no"
    assert Caller(prompt(1)).request and scheduler.is_drained
    scheduler.submit(Caller(prompt(1)).request)


def write(tokens: str, stops=(), include=False, max_tokens=1000) -> tuple[list[str], Written]:
    writer = Writer(TEXT, Generation((), max_tokens), stops, include)
    steps = [writer.add(Made([3 + byte], [-1.0], [[]])) for byte in tokens.encode()]
    whole = Written()
    for each in steps:
        whole = whole.then(each)
        if each.reason:
            break
    return [each.text for each in steps], whole


def test_a_text_that_stops_is_left_out_and_what_may_become_one_is_held_back():
    pieces, whole = write("one two. three", ["two. ", "xx", "o."])
    assert whole.text == "one tw" and whole.reason == "stop" and len(whole.tokens) == 8
    assert pieces[:3] == ["", "on", "e"]
    assert write("one two. three", ["two. ", "xx", "o."], include=True)[1].text == "one two."
    assert write("aab aac", ["aac"])[1].text == "aab "
    assert write("aaab", ["aab"])[1].text == "a"
    whole = write("one tw", ["two"], max_tokens=6)[1]
    assert whole.text == "one tw" and whole.reason == "length"
    assert list(whole.offsets) == [0, 1, 2, 3, 4, 4]


def test_a_text_that_a_grammar_lets_nothing_follow_ends():
    for most in (1, 9):
        writer = Writer(TEXT, Generation((), most), ["ax"])
        assert writer.add(Made([3 + ord("a")], [-1.0], [[]], over=True)).reason == "stop"
    assert Writer(TEXT, Generation((), 9), ["ax"]).add(Made([3 + ord("a")], [-1.0], over=True)).text == "a"


def test_letters_of_several_tokens_come_whole():
    pieces, whole = write("aé日\N{GRINNING FACE}", max_tokens=10)
    assert whole.text == "aé日\N{GRINNING FACE}" and whole.reason == "length"
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "\N{GRINNING FACE}"]
    assert write("日", max_tokens=2)[1].text == TEXT.write([3 + byte for byte in "日".encode()[:2]])
