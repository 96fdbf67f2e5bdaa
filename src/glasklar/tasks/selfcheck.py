"""Proof that a family keeps its promises. For the tests of our tasks and for anyone who writes an extension."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from glasklar.tasks.base import Problem, Task

_NUMBERS = re.compile(r"[0-9]+")


def last_number(text: str) -> str:
    """The digits of the last number in a text; "" where there is none."""
    return (_NUMBERS.findall(text) or [""])[-1]


def faults(
    task: Task,
    *,
    draws: int = 300,
    seed: int = 0,
    commonest: float = 0.25,
    result: Callable[[Problem], str] = lambda problem: last_number(problem.answer),
) -> list[str]:
    """What is wrong with a task, one line a kind of fault; empty where nothing was found.

    Draws `draws` problems and asks: does the same seed give the same problems; is the own answer accepted, and an
    empty or spoilt one refused; is `result` the last number of a thought; do problems of one key and language accept
    each other's answers; is the most frequent answer rarer than `commonest`; has every question a single key, so that
    the splits share neither keys nor questions.
    """
    rng, again = random.Random(seed), random.Random(seed)
    problems = [task.sample(rng) for _ in range(draws)]
    found: Counter[str] = Counter()
    if problems != [task.sample(again) for _ in range(draws)]:
        found["the same seed gives other problems"] += 1
    for problem in problems:
        found.update(_faults_of_one(task, problem, result(problem)))
    top, count = Counter(problem.answer for problem in problems).most_common(1)[0]
    if count >= commonest * draws:
        found[f"answer {top!r} makes up {count / draws:.0%} of the problems"] += 1
    found.update(_key_faults(task, problems))
    return [f"{fault} ({times}x of {draws})" for fault, times in found.items()]


def _faults_of_one(task: Task, problem: Problem, result: str) -> list[str]:
    found = []
    if problem.task != task.name:
        found.append(f"a problem says that it belongs to task {problem.task!r}")
    if not task.check(problem, problem.answer):
        found.append("the problem's own answer is refused")
    if not task.check(problem, f" {problem.answer}\n"):
        found.append("blanks around the answer make it wrong")
    for wrong in ("", f"{problem.answer} 1", f"1{problem.answer}", f"{problem.answer}1"):
        if task.check(problem, wrong):
            found.append(f"a wrong answer like {wrong!r} is accepted")
    if problem.thought and last_number(problem.thought) != result:
        found.append("the thought does not end with the result")
    if not problem.question.strip():
        found.append("an empty question")
    return found


def _key_faults(task: Task, problems: list[Problem]) -> list[str]:
    first: dict[tuple[str, str], Problem] = {}
    keys_of = defaultdict(set)
    found = []
    for problem in problems:
        twin = first.setdefault((problem.key, problem.language), problem)
        if not task.check(problem, twin.answer):
            found.append("two problems of one key refuse each other's answers")
        keys_of[problem.question.lower().rstrip(".?! ")].add(problem.key)
    return found + ["one question has two keys" for keys in keys_of.values() if len(keys) > 1]
