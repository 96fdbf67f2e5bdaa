"""Who is next, and who may come in: plain logic, against what fairness asks for."""

from __future__ import annotations

import random

import pytest

from glasklar.serve.fair import FairQueue, Ticket, may_take


def taken(queue: FairQueue, count: int) -> list[int]:
    return [ticket.number for _ in range(count) if (ticket := queue.take()) is not None]


def test_one_key_is_served_in_order_and_by_priority() -> None:
    queue = FairQueue(10)
    for number, priority in enumerate([0, 0, 5, 0]):
        queue.add(Ticket(number=number, key="", priority=priority))
    assert taken(queue, 9) == [2, 0, 1, 3]
    assert (queue.waiting, queue.running) == (0, 4)


def test_a_newcomer_gets_the_next_place_before_a_long_line() -> None:
    queue = FairQueue(4)
    for number in range(20):
        queue.add(Ticket(number=number, key="a"))
    first = [queue.take() for _ in range(4)]
    queue.add(Ticket(number=20, key="b"))
    assert queue.take() is None
    queue.give_back(first[0])
    assert taken(queue, 9) == [20]
    queue.give_back(first[1])
    assert taken(queue, 9) == [4]


def test_places_are_shared_evenly_between_keys_that_all_wait() -> None:
    queue = FairQueue(9)
    for number in range(60):
        queue.add(Ticket(number=number, key="abc"[number % 3] if number < 30 else "a"))
    keys = ["abc"[number % 3] for number in taken(queue, 9)]
    assert sorted(keys) == list("aaabbbccc")


def test_a_key_leaves_places_to_others_however_much_it_asks() -> None:
    queue = FairQueue(64, alone=lambda: False)
    for number in range(300):
        queue.add(Ticket(number=number, key="greedy"))
    assert len(taken(queue, 300)) == 43  # two thirds: it may hold twice what it leaves free
    queue.add(Ticket(number=300, key="late"))
    assert taken(queue, 2) == [300]


def test_one_who_is_removed_is_not_served() -> None:
    queue = FairQueue(2)
    tickets = [Ticket(number=number, key="k") for number in range(3)]
    for ticket in tickets:
        queue.add(ticket)
    queue.remove(tickets[0])
    assert taken(queue, 9) == [1, 2]


@pytest.mark.parametrize("places", [1, 2, 7, 64])
def test_places_are_never_exceeded_and_nobody_is_forgotten(places: int) -> None:
    chance, queue = random.Random(places), FairQueue(places, alone=lambda: False)
    running: list[Ticket] = []
    served, added = set(), 0
    for _ in range(3000):
        if chance.random() < 0.5 and added < 1000:
            queue.add(Ticket(number=added, key=chance.choice("abcd"), priority=chance.randrange(3)))
            added += 1
        elif running and chance.random() < 0.6:
            queue.give_back(running.pop(chance.randrange(len(running))))
        while (ticket := queue.take()) is not None:
            running.append(ticket)
            served.add(ticket.number)
        assert len(running) == queue.running <= places
    while queue.waiting:
        queue.give_back(running.pop())
        while (ticket := queue.take()) is not None:
            running.append(ticket)
            served.add(ticket.number)
    assert served == set(range(added))


def test_a_share_of_the_house() -> None:
    assert may_take(0, 1, alone=False)
    assert not may_take(2, 1, alone=False)
    assert may_take(300, 1, alone=True)
    assert not may_take(0, 0, alone=True)
