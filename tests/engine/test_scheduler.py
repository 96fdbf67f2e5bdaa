"""The scheduler alone: order, room, rows. A random walk checks what must hold at every moment."""

from __future__ import annotations

import random

from glasklar.engine.paged import AHEAD, PageRoom
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


def paged(*, slots: int = 8, tokens: int = 1 << 20, chunk: int | None = None) -> Scheduler:
    return Scheduler(PageRoom(max_slots=slots, max_tokens=tokens), prefill_tokens=1 << 20, chunk=chunk)


def yields(queue: Scheduler, lengths: list[int] | None = None) -> list[int]:
    """As the engine does it: they are released, and wait again."""
    weaker = queue.outranked(lengths)
    for r in weaker:
        if r is not queue.filling:
            queue.release([queue.running.index(r)])
        queue.requeue(r)
    return ids(weaker)


def test_pages_are_set_aside_for_what_comes_soon_not_for_all_that_may_come() -> None:
    queue = paged(tokens=1024 + 2 * AHEAD)
    for number in range(4):
        queue.add(request(number, prompt=480, limit=1 << 14))
    assert ids(queue.admit()) == [0, 1]
    assert queue.admit([1000, 900]) == []
    assert queue.admit([480, 480]) == []
    queue.release([0])
    assert ids(queue.admit([480])) == [2]


def test_the_head_takes_the_place_of_the_latest_of_the_weakest() -> None:
    queue = paged(slots=4)
    for number, priority in enumerate((1, 0, 0, 2)):
        queue.add(request(number, priority=priority))
    queue.admit()
    queue.add(request(4, priority=1))
    assert yields(queue) == [2]
    assert ids(queue.admit()) == [4]
    assert ids(queue.waiting) == [2]
    queue.add(request(5, priority=0))
    assert yields(queue) == []  # equals wait
    assert queue.admit() == []
    queue.add(request(6, priority=3))
    assert yields(queue) == [1]
    assert ids(queue.admit()) == [6]
    assert ids(queue.waiting) == [1, 2, 5]  # in the order in which they came
    assert {r.state for r in queue.waiting} == {"waiting"}


def test_only_as_many_yield_as_the_head_needs_and_none_if_that_is_not_enough() -> None:
    queue = paged(tokens=4 * 336)
    for number, priority in enumerate((5, 0, 0, 0)):
        queue.add(request(number, prompt=60, limit=300, priority=priority))
    queue.admit()
    assert len(queue.running) == 4
    queue.add(request(4, prompt=380, limit=300, priority=4))
    assert yields(queue) == [3, 2]
    assert ids(queue.admit()) == [4]
    queue.add(request(5, prompt=1100, limit=300, priority=4))
    assert yields(queue) == []
    assert ids(queue.running) == [0, 1, 4]


def test_a_prompt_that_is_being_read_yields_to_its_better() -> None:
    queue = paged(chunk=10)
    queue.add(request(0, prompt=100))
    queue.admit()
    queue.add(request(1, prompt=100))
    assert yields(queue) == []
    queue.add(request(2, prompt=100, priority=1))
    assert yields(queue) == [0]
    assert queue.filling is None
    queue.admit()
    assert queue.filling is not None
    assert queue.filling.id == 2
    assert ids(queue.waiting) == [0, 1]


def test_the_first_never_gives_way_to_a_full_cache() -> None:
    queue = paged(chunk=10)
    for number, (prompt, priority) in enumerate(((4, 0), (4, 1), (40, 0), (4, 0))):
        queue.add(request(number, prompt=prompt, priority=priority))
    queue.admit()
    order = []
    while (weakest := queue.weakest()) is not None:
        order.append(weakest.id)
        if weakest is not queue.filling:
            queue.release([queue.running.index(weakest)])
        queue.requeue(weakest)
    assert order == [3, 2, 0]
    assert ids(queue.present) == [1]
    assert ids(queue.waiting) == [0, 2, 3]


def test_who_gave_way_goes_on_with_what_it_has_made() -> None:
    queue = paged(chunk=10)
    queue.add(request(0, prompt=4))
    [running] = queue.admit()
    running.answer = [7] * 9
    queue.release([0])
    queue.requeue(running)
    assert queue.admit() == []  # 13 tokens are to be read: a long one now
    assert queue.filling is running
    assert running.text == [1] * 4 + [7] * 9
    assert running.reserve == 11
