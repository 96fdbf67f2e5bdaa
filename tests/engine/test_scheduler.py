"""The scheduler alone: order, room, rows. A random walk checks what must hold at every moment."""

from __future__ import annotations

import random

from glasklar.engine.request import Request, SamplingParams
from glasklar.engine.scheduler import Scheduler, SlotRoom


def request(number: int, prompt: int = 4, limit: int = 8, priority: int = 0) -> Request:
    return Request(id=number, prompt=[1] * prompt, params=SamplingParams(), limit=limit, priority=priority)


def scheduler(*, slots: int = 8, tokens: int = 1 << 20, prefill: int = 1 << 20) -> Scheduler:
    return Scheduler(SlotRoom(max_slots=slots, max_tokens=tokens), prefill_tokens=prefill)


def test_short_requests_flow_while_one_long_prompt_at_a_time_is_read() -> None:
    queue = Scheduler(SlotRoom(max_slots=4, max_tokens=1 << 20), prefill_tokens=1 << 20, chunk=10)
    for number, prompt in enumerate((40, 4, 50, 4, 4)):
        queue.add(request(number, prompt=prompt))
    assert ids(queue.admit()) == [1, 3, 4]
    assert queue.filling is not None
    assert queue.filling.id == 0
    assert ids(queue.waiting) == [2]
    queue.add(request(5))
    queue.release([0])
    assert ids(queue.admit()) == [5]  # the fourth slot is the long one's
    assert queue.start().id == 0
    assert ids(queue.running) == [4, 3, 5, 0]
    queue.release([1])
    queue.add(request(6))
    assert queue.admit() == []  # now the long one is first, and takes the slot
    assert queue.filling is not None
    assert queue.filling.id == 2
    assert queue.cancel(2) is None
    assert queue.filling is None
    assert ids(queue.admit()) == [6]


def ids(requests: list[Request]) -> list[int]:
    return [r.id for r in requests]


def test_higher_priority_first_then_order_of_arrival() -> None:
    queue = scheduler(slots=3)
    for number, priority in enumerate([0, 5, 0, 5, -1]):
        queue.add(request(number, priority=priority))
    assert ids(queue.admit()) == [1, 3, 0]
    assert ids(queue.waiting) == [2, 4]


def test_admission_stops_at_slots() -> None:
    queue = scheduler(slots=2)
    for number in range(3):
        queue.add(request(number))
    assert ids(queue.admit()) == [0, 1]
    assert queue.admit() == []
    queue.release([0])
    assert ids(queue.admit()) == [2]


def test_admission_counts_every_slot_as_long_as_the_longest() -> None:
    queue = scheduler(slots=8, tokens=4 * 32)
    queue.add(request(0, prompt=4, limit=8))
    queue.add(request(1, prompt=50, limit=14))
    queue.add(request(2, prompt=4, limit=8))
    assert ids(queue.admit()) == [0, 1]  # two slots of 64 tokens; the third would make it four of 64
    queue.release([0, 1])
    assert ids(queue.admit()) == [2]


def test_nobody_overtakes_a_long_request() -> None:
    queue = scheduler(slots=8, tokens=128)
    queue.add(request(0, prompt=4, limit=8))
    assert ids(queue.admit()) == [0]
    queue.add(request(1, prompt=100, limit=20))
    queue.add(request(2, prompt=4, limit=8))
    assert queue.admit() == []
    queue.release([0])
    assert ids(queue.admit()) == [1]


def test_prompt_budget_of_a_step_lets_one_prompt_through() -> None:
    queue = scheduler(prefill=10)
    for number, prompt in enumerate([30, 6, 4, 1]):
        queue.add(request(number, prompt=prompt))
    assert [ids(queue.admit()) for _ in range(3)] == [[0], [2, 1], [3]]


def test_cancel_while_waiting_and_while_running() -> None:
    queue = scheduler(slots=1)
    first, second = request(0), request(1)
    queue.add(first)
    queue.add(second)
    queue.admit()
    assert queue.cancel(1) is None
    assert second.state == "finished"
    assert queue.cancel(7) is None
    assert queue.cancel(0) == 0
    assert first.state == "running"


def test_release_moves_the_last_rows_into_the_gaps() -> None:
    queue = scheduler()
    for number in range(6):
        queue.add(request(number))
    queue.admit()
    assert queue.release([0, 2, 5]) == [(3, 0), (4, 2)]
    assert ids(queue.running) == [3, 1, 4]


def test_random_walk_against_a_plain_set() -> None:
    rng = random.Random(1)
    queue = scheduler(slots=13, tokens=13 * 64)
    alive: set[int] = set()
    slots: list[int] = []  # what the cache would hold, moved only as told
    for number in range(3000):
        match rng.randrange(3):
            case 0:
                queue.add(
                    request(number, prompt=rng.randint(1, 60), limit=rng.randint(1, 60), priority=rng.randrange(3))
                )
                alive.add(number)
            case 1:
                slots += ids(queue.admit())
            case 2 if queue.running:
                gone = rng.sample(range(len(queue.running)), rng.randint(1, len(queue.running)))
                alive -= {queue.running[row].id for row in gone}
                for source, target in queue.release(gone):
                    slots[target] = slots[source]
                del slots[len(queue.running) :]
        assert slots == ids(queue.running)
        assert sorted(ids(queue.running) + ids(queue.waiting)) == sorted(alive)
        assert {r.state for r in queue.running} <= {"running"}
        assert {r.state for r in queue.waiting} <= {"waiting"}
        reserves = [r.reserve for r in queue.running]
        assert not reserves or queue.room.fits(len(reserves), max(reserves), sum(reserves))
