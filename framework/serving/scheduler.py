"""The engine thread of a server: it alone drives pools and scores, while requests come and go on other threads.

A turn takes in what was submitted and cancelled, gives free slots to those who wait, reads a chunk of one prompt,
starts a step, and reads the step before, whose tokens are then delivered while the device works.
"""

import collections
import dataclasses
import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from meshway.framework.inference.rows import Text
from meshway.framework.serving.generation import Generation, Made, Pool
from meshway.framework.serving.writing import CANCELLED, ERROR, TIMEOUT, Writer, Written

Priority = Literal["online", "batch"]
_BATCH_EVERY = 4  # of so many slots that become free while requests of both priorities wait, one goes to a batch
_IDLE_SECONDS = 0.5
_T = TypeVar("_T")


class Busy(Exception):
    """The queue is full: the request may come again."""


class Unavailable(Exception):
    """Nothing is served any more: the server drains, or its engine has failed."""


@dataclasses.dataclass(eq=False)
class Request:
    """Predictions that are made for one caller.

    Attributes:
      generations: what to make.
      deliver: is told, on the engine thread, what a step added: index of a generation -> Written; once a step at most.
      stops: texts that end a prediction; `include_stop` is whether its text ends with them.
      priority: 'online' goes before 'batch', which keeps a share of the slots that become free.
      deadline: by `time.monotonic()`, when what is not finished ends by TIMEOUT; None for never.
    """

    generations: Sequence[Generation]
    deliver: Callable[[Mapping[int, Written]], object]
    stops: Sequence[str] = ()
    include_stop: bool = False
    priority: Priority = "online"
    deadline: float | None = None
    is_cancelled: bool = False


@dataclasses.dataclass(eq=False)
class Call:
    """Work of the engine thread that is no generation, as scores are: `call` is made between two steps.

    Attributes:
      call: what is computed.
      deliver: is told its result, or the exception that it raised.
    """

    call: Callable[[], Any]
    deliver: Callable[[Any], object]
    priority: Priority = "online"


@dataclasses.dataclass(eq=False)
class _Running:
    """One generation of a request, waiting or in a slot."""

    request: Request
    index: int
    writer: Writer

    @property
    def generation(self) -> Generation:
        return self.request.generations[self.index]


class _Waiting(Generic[_T]):
    """Those who wait, in their order by priority."""

    def __init__(self) -> None:
        self.of: dict[Priority, collections.deque[_T]] = {"online": collections.deque(), "batch": collections.deque()}
        self._turns = itertools.count(1)

    def __bool__(self) -> bool:
        return any(self.of.values())

    def next(self) -> _T:
        """Returns whose turn it is, and forgets them."""
        online, batch = self.of["online"], self.of["batch"]
        if online and batch:
            return batch.popleft() if next(self._turns) % _BATCH_EVERY == 0 else online.popleft()
        return (online or batch).popleft()


class _Lane:
    """A pool, who waits for its slots, and who has them."""

    def __init__(self, pool: Pool):
        self.pool, self.waiting = pool, _Waiting[_Running]()
        self.running: dict[int, _Running] = {}
        self._free = collections.deque(range(pool.num_slots))
        self._reading: collections.deque[int] = collections.deque()  # slots whose prompt is not read to its end
        self._flying: tuple[Any, dict[int, _Running]] | None = None

    def admit(self) -> list[_Running]:
        """Gives free slots to those who wait; returns whom."""
        given = []
        while self._free and self.waiting:
            running, slot = self.waiting.next(), self._free.popleft()
            self.running[slot] = running
            self.pool.start(slot, running.generation)
            self._reading.append(slot)
            given.append(running)
        return given

    def work(self) -> list[tuple[int, _Running, Made]]:
        """Reads a chunk of one prompt, starts a step and reads the one before; returns (slot, who, what was made)."""
        if self._reading:
            slot = self._reading.popleft()
            if not self.pool.prefill(slot):
                self._reading.append(slot)
        step = self.pool.step()
        before, self._flying = self._flying, None if step is None else (step, dict(self.running))
        if before is None:
            return []
        read, owners = self.pool.read(before[0]), before[1]
        return [(slot, owners[slot], made) for slot, made in read.items() if self.running.get(slot) is owners[slot]]

    def free(self, slot: int) -> None:
        """Takes a slot back, at any time."""
        self.pool.free(slot)
        del self.running[slot]
        if slot in self._reading:
            self._reading.remove(slot)
        self._free.append(slot)

    @property
    def is_idle(self) -> bool:
        return not (self.running or self._flying or self.waiting)


class Scheduler:
    """Drives a server's pools on a thread of its own.

    Attributes:
      failure: what ended the engine; "" while it is well.
    """

    def __init__(self, text: Text, sampling: Pool, beams: Pool | None = None, max_queue: int = 256):
        """Prepares; `start` begins.

        Args:
          text: what predictions are written in.
          sampling: the slots of requests with one beam.
          beams: of those with several; None where none are served.
          max_queue: the most generations and calls that wait, of each priority.
        """
        self._text, self.max_queue = text, max_queue
        self._lanes = {False: _Lane(sampling), **({True: _Lane(beams)} if beams is not None else {})}
        self._inbox: queue.SimpleQueue[Request | Call | None] = queue.SimpleQueue()
        self._calls = _Waiting[Call]()
        self._lock = threading.Lock()
        self._queued: collections.Counter[Priority] = collections.Counter()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = self._ending = False
        self._turned = time.monotonic()
        self.failure = ""

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def refusal(self, generation: Generation) -> str | None:
        """Returns why a request can never be served, else None."""
        lane = self._lanes.get(generation.num_beams > 1)
        return "beam search is not served here (--beams)" if lane is None else lane.pool.refusal(generation)

    def submit(self, work: Request | Call) -> None:
        """Puts work into the queue, from any thread; what becomes of it is delivered.

        Raises:
          Busy: too much waits.
          Unavailable: nothing is taken any more.
        """
        with self._lock:
            self._check_open()
            count = len(work.generations) if isinstance(work, Request) else 1
            if self._queued[work.priority] + count > self.max_queue:
                raise Busy(f"{self._queued[work.priority]} predictions wait already, and {self.max_queue} may")
            self._queued[work.priority] += count
            self._inbox.put(work)  # under the lock: an engine that fails takes in all that was accepted

    def _check_open(self) -> None:
        if self.failure:
            raise Unavailable(f"the engine has failed: {self.failure}")
        if self._draining:
            raise Unavailable("the server is shutting down")

    def cancel(self, request: Request) -> None:
        """Ends a request from any thread: its slots are free within a step, and nothing more of it is delivered but
        CANCELLED."""
        request.is_cancelled = True
        self._inbox.put(None)

    @property
    def queued(self) -> Mapping[Priority, int]:
        """How many generations and calls wait, by priority."""
        return {"online": self._queued["online"], "batch": self._queued["batch"]}

    @property
    def slots_used(self) -> int:
        """How many slots have a request."""
        return sum(len(lane.running) for lane in self._lanes.values())

    @property
    def num_slots(self) -> int:
        """How many slots there are."""
        return sum(lane.pool.num_slots for lane in self._lanes.values())

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the last turn ended, while work waits; else 0."""
        return 0.0 if self._is_idle() else time.monotonic() - self._turned

    @property
    def is_drained(self) -> bool:
        """Whether nothing waits or runs."""
        return bool(self.failure) or self._is_idle()

    def _is_idle(self) -> bool:
        return not self._queued.total() and all(lane.is_idle for lane in self._lanes.values())

    def drain(self) -> None:
        """Takes no more work; what was taken goes on (`is_drained`)."""
        with self._lock:
            self._draining = True

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the thread after its turn; whatever is left is cancelled."""
        self.drain()
        self._ending = True
        self._inbox.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            while not self._ending:
                self._take_in(wait=self._has_nothing())
                if not self._ending and not self._has_nothing():
                    self._turn()
                self._turned = time.monotonic()
            self._take_in(wait=False)
            self._end_all(Written(reason=CANCELLED))
        except Exception as error:
            traceback.print_exc()
            with self._lock:
                self.failure = f"{type(error).__name__}: {error}"[:300]
            self._take_in(wait=False)
            self._end_all(Written(reason=ERROR, message=self.failure))

    def _has_nothing(self) -> bool:
        """Whether the thread, which alone asks, has nothing to do but to wait."""
        return not self._calls and all(lane.is_idle for lane in self._lanes.values())

    def _take_in(self, wait: bool) -> None:
        """Takes all that was put into the inbox; waits a moment for the first where there is nothing else to do."""
        try:
            work = self._inbox.get(timeout=_IDLE_SECONDS) if wait else self._inbox.get_nowait()
            while True:
                if isinstance(work, Call):
                    self._calls.of[work.priority].append(work)
                elif work is not None:
                    for index, generation in enumerate(work.generations):
                        writer = Writer(self._text, generation, work.stops, work.include_stop)
                        lane = self._lanes[generation.num_beams > 1]
                        lane.waiting.of[work.priority].append(_Running(work, index, writer))
                work = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _turn(self) -> None:
        told: dict[Request, dict[int, Written]] = collections.defaultdict(dict)
        self._call_one()
        for lane in self._lanes.values():
            self._end_overdue(lane, told)
            self._leave_queue(running.request.priority for running in lane.admit())
            for slot, running, made in lane.work():
                written = running.writer.add(made)
                if written.reason:
                    lane.free(slot)
                if written.tokens or written.reason:
                    told[running.request][running.index] = written
        for request, news in told.items():
            request.deliver(news)

    def _leave_queue(self, priorities: Iterable[Priority]) -> None:
        with self._lock:
            self._queued.subtract(priorities)

    def _call_one(self) -> None:
        """Makes a call, if one waits. What it raises is its caller's: it leaves no slot half done."""
        if self._calls:
            work = self._calls.next()
            try:
                found = work.call()
            except Exception as error:
                found = error
            work.deliver(found)
            self._leave_queue([work.priority])

    def _end_overdue(self, lane: _Lane, told: dict[Request, dict[int, Written]]) -> None:
        """Ends what was cancelled or is past its deadline, waiting or running."""
        now = time.monotonic()
        for waiting in lane.waiting.of.values():
            for running in [each for each in waiting if _ending_of(each.request, now)]:
                waiting.remove(running)
                told[running.request][running.index] = _ending_of(running.request, now) or Written()
                self._leave_queue([running.request.priority])
        for slot, running in list(lane.running.items()):
            if ending := _ending_of(running.request, now):
                lane.free(slot)
                told[running.request][running.index] = dataclasses.replace(ending, text=running.writer.rest())

    def _end_all(self, ending: Written) -> None:
        """Tells everyone who waits or runs that nothing more comes."""
        told: dict[Request, dict[int, Written]] = collections.defaultdict(dict)
        for lane in self._lanes.values():
            left = list(lane.running.values())
            lane.running.clear()
            while lane.waiting:
                left.append(lane.waiting.next())
            for running in left:
                told[running.request][running.index] = ending
        self._queued.clear()
        for request, news in told.items():
            request.deliver(news)
        while self._calls:
            self._calls.next().deliver(Unavailable(ending.message or "the server is shutting down"))


def _ending_of(request: Request, now: float) -> Written | None:
    if request.is_cancelled:
        return Written(reason=CANCELLED)
    if request.deadline is not None and now > request.deadline:
        return Written(reason=TIMEOUT, message="the time that a request may take is over")
    return None
