"""Sorting a handful of numbers, worked by picking one number after another."""

from __future__ import annotations

import random
import re
from typing import ClassVar, Final

from pydantic import Field, model_validator

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.wording import Span, TaskOptions, between, casual, pick, tidy

# Wordings for smallest first, then for largest first.
WORDINGS: Final[dict[Language, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "en": (
        (
            "Sort {n}.", "Sort {n} in ascending order.", "Put {n} in order.", "Order {n} from smallest to largest.",
            "Arrange {n} from small to large.", "Sort the numbers {n}.", "Sort ascending: {n}", "{n}: smallest first.",
            "Please sort {n}.", "Can you sort {n}?", "Sort these numbers: {n}", "List {n} in increasing order.",
            "Bring {n} into ascending order.", "Sort {n}, starting with the smallest.", "{n} sorted?",
            "What is {n} in ascending order?", "Give me {n} from low to high.", "Rank {n} from least to greatest.",
            "Write {n} in increasing order.", "Start with the smallest: {n}",
        ),
        (
            "Sort {n} in descending order.", "Order {n} from largest to smallest.", "Arrange {n} from large to small.",
            "Sort descending: {n}", "{n}: largest first.", "Please sort {n} in descending order.", "Reverse sort {n}.",
            "Can you sort {n} from high to low?", "List {n} in decreasing order.", "Bring {n} into descending order.",
            "Sort {n}, starting with the largest.", "What is {n} in descending order?", "Give me {n} from high to low.",
            "Rank {n} from greatest to least.", "Write {n} in decreasing order.", "Start with the largest: {n}",
            "Sort the numbers {n}, biggest first.",
        ),
    ),
    "de": (
        (
            "Sortiere {n}.", "Sortiere {n} aufsteigend.", "Ordne {n}.", "Ordne {n} der Größe nach.",
            "Ordne {n} von klein nach groß.", "Sortiere die Zahlen {n}.", "Aufsteigend sortieren: {n}",
            "{n}: die kleinste zuerst.", "Bitte sortiere {n}.", "Kannst du {n} sortieren?",
            "Sortiere diese Zahlen: {n}",
            "Bringe {n} in aufsteigende Reihenfolge.", "Sortiere {n}, beginne mit der kleinsten.", "{n} sortiert?",
            "Wie lautet {n} aufsteigend?", "Gib mir {n} von klein nach groß.", "Schreibe {n} aufsteigend auf.",
            "Reihe {n} auf, die kleinste zuerst.", "Nenne {n} in aufsteigender Folge.", "Von klein nach groß: {n}",
        ),
        (
            "Sortiere {n} absteigend.", "Ordne {n} von groß nach klein.", "Absteigend sortieren: {n}",
            "{n}: die größte zuerst.", "Bitte sortiere {n} absteigend.", "Kannst du {n} absteigend sortieren?",
            "Bringe {n} in absteigende Reihenfolge.", "Sortiere {n}, beginne mit der größten.", "Ordne {n} absteigend.",
            "Wie lautet {n} absteigend?", "Gib mir {n} von groß nach klein.", "Schreibe {n} absteigend auf.",
            "Reihe {n} auf, die größte zuerst.", "Nenne {n} in absteigender Folge.", "Von groß nach klein: {n}",
            "Sortiere die Zahlen {n}, die größte zuerst.", "Sortiere {n} rückwärts.",
        ),
    ),
}  # fmt: skip
AND: Final[dict[Language, str]] = {"en": " and ", "de": " und "}


class SortOptions(TaskOptions):
    """count       how many numbers
    largest     of the numbers; they start at 1
    descending  share of the problems that ask for the largest first"""

    count: Span = (4, 7)
    largest: int = Field(default=99, ge=2, le=10**6)
    descending: float = Field(default=0.4, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _enough_numbers(self) -> SortOptions:
        if self.count[0] < 2:
            raise ValueError(f"count = {list(self.count)}: sorting takes at least 2 numbers")
        return self


class SortTask(Task):
    """ "Sort 9, 2, 5." -> "2, 5, 9". Each line of the thought picks a number and keeps the rest: "2: 9 5", "5: 9", "9".

    Split by the sorted numbers, so that no other order of a held-out set is trained."""

    name: ClassVar[str] = "sort"
    Options: ClassVar[type[SortOptions]] = SortOptions
    options: SortOptions

    def sample(self, rng: random.Random) -> Problem:
        options = self.options
        language = pick(rng, options.languages)
        numbers = [between(rng, 1, options.largest) for _ in range(between(rng, *options.count))]
        descending = rng.random() < options.descending
        ordered = sorted(numbers, reverse=descending)
        lines, rest = [], list(numbers)
        for number in ordered:
            rest.remove(number)
            lines.append(f"{number}: {' '.join(map(str, rest))}" if rest else str(number))
        question = pick(rng, WORDINGS[language][descending]).format(n=listed(rng, numbers, language))
        return Problem(
            task=self.name,
            key=f"{'descending' if descending else 'ascending'} {ordered}",
            question=casual(rng, question, language),
            thought="\n".join(lines),
            answer=", ".join(map(str, ordered)),
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        given = tidy(answer)
        return _LIST.fullmatch(given) is not None and _DIGITS.findall(given) == _DIGITS.findall(problem.answer)


_DIGITS = re.compile(r"[0-9]+")
_LIST = re.compile(r"[0-9]+(?:(?: ?[,;] ?| )[0-9]+)*")


def listed(rng: random.Random, numbers: list[int], language: Language) -> str:
    """Numbers as people list them: "3, 5, 7", "3 5 7", "3,5,7" or "3, 5 and 7"."""
    words = [str(number) for number in numbers]
    dice = rng.random()
    if dice < 0.55:
        return ", ".join(words)
    if dice < 0.7:
        return " ".join(words)
    if dice < 0.8:
        return ",".join(words)
    return ", ".join(words[:-1]) + AND[language] + words[-1]
