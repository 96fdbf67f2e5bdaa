"""Countdown: reach a target from three or four numbers, each used exactly once, with + - * and /."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Final, Literal, NamedTuple

from pydantic import Field

from glasklar.errors import RecipeError
from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.sorting import listed
from glasklar.tasks.wording import Span, TaskOptions, between, casual, pick, tidy

WORDINGS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Make {t} from {n}.", "Use {n} to make {t}.", "Reach {t} with {n}.", "How can I make {t} from {n}?",
        "Combine {n} to get {t}.", "Get {t} using {n}.", "Countdown: {n}, target {t}.", "Numbers {n}, target {t}.",
        "Find an expression for {t} with {n}.", "With {n}, make {t}.", "Can you make {t} from {n}?", "{n} -> {t}",
        "Use each of {n} once to reach {t}.", "Target {t}, numbers {n}.", "Write {t} using {n}, each once.",
        "How do I get {t} from {n}?", "Please reach {t} with the numbers {n}.", "Form {t} out of {n}.",
        "I have {n}. Make {t}.", "Which sum with {n} gives {t}?", "Build {t} from the numbers {n}.",
    ),
    "de": (
        "Bilde {t} aus {n}.", "Nutze {n}, um {t} zu erhalten.", "Erreiche {t} mit {n}.",
        "Wie komme ich mit {n} auf {t}?",
        "Verknüpfe {n} so, dass {t} entsteht.", "Komm auf {t} mit {n}.", "Countdown: {n}, Ziel {t}.",
        "Zahlen {n}, Ziel {t}.",
        "Finde eine Rechnung für {t} mit {n}.", "Mit {n} auf {t} kommen.", "Kannst du {t} aus {n} bilden?",
        "{n} -> {t}",
        "Nutze jede der Zahlen {n} einmal für {t}.", "Ziel {t}, Zahlen {n}.", "Schreibe {t} mit {n}, jede einmal.",
        "Wie erhalte ich {t} aus {n}?", "Bitte erreiche {t} mit den Zahlen {n}.", "Forme {t} aus {n}.",
        "Ich habe {n}. Mach daraus {t}.", "Welche Rechnung mit {n} ergibt {t}?", "Baue {t} aus den Zahlen {n}.",
    ),
}  # fmt: skip
VERDICTS: Final[dict[Language, tuple[str, str]]] = {"en": ("no", "yes"), "de": ("nein", "ja")}


class CountdownOptions(TaskOptions):
    """numbers   how many are given
    largest   of the given numbers; they start at 1
    target    range of targets
    tries     how many failing attempts a thought shows before the solution"""

    numbers: Literal[3, 4] = 3
    largest: int = Field(default=15, ge=4, le=1000)
    target: Span = (1, 100)
    tries: Span = (0, 2)


class CountdownTask(Task):
    """ "Make 26 from 3, 5 and 7." -> "3*7+5". A line of the thought is an attempt: "7+3=10 10-5=5 no"."""

    name: ClassVar[str] = "countdown"
    Options: ClassVar[type[CountdownOptions]] = CountdownOptions
    options: CountdownOptions

    def sample(self, rng: random.Random) -> Problem:
        options = self.options
        language = pick(rng, options.languages)
        numbers, solution = self._solvable(rng)
        target = solution.value
        no, yes = VERDICTS[language]
        lines = [f"{' '.join(solution.steps)} {yes}"]
        for _ in range(between(rng, *options.tries)):
            attempt = _attempt(rng, numbers)
            if attempt.value != target:
                lines.insert(0, f"{' '.join(attempt.steps)} {no}")
        question = pick(rng, WORDINGS[language]).format(n=listed(rng, numbers, language), t=target)
        return Problem(
            task=self.name,
            key=f"{','.join(map(str, sorted(numbers)))}={target}",
            question=casual(rng, question, language),
            thought="\n".join(lines),
            answer=solution.expression,
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        given, _, target = problem.key.partition("=")
        found = evaluate(answer)
        if found is None:
            return False
        value, used = found
        return value == int(target) and sorted(used) == [int(number) for number in given.split(",")]

    def _solvable(self, rng: random.Random) -> tuple[list[int], _Attempt]:
        options = self.options
        for _ in range(1000):
            numbers = [between(rng, 1, options.largest) for _ in range(options.numbers)]
            solution = _attempt(rng, numbers)
            if options.target[0] <= solution.value <= options.target[1]:
                return numbers, solution
        raise RecipeError(f"task {self.name!r}: no target in {list(options.target)} in 1000 draws; widen 'target'")


class _Attempt(NamedTuple):
    value: int
    expression: str
    steps: list[str]


def _attempt(rng: random.Random, numbers: Sequence[int]) -> _Attempt:
    """Joins two numbers at a time by a random operation that stays within the positive whole numbers."""
    parts = [(number, str(number), 3) for number in numbers]  # value, expression, how firmly it binds
    steps = []
    while len(parts) > 1:
        left, left_text, left_binds = parts.pop(int(rng.random() * len(parts)))
        right, right_text, right_binds = parts.pop(int(rng.random() * len(parts)))
        sign = pick(rng, _possible(left, right))
        binds = 1 if sign in "+-" else 2
        value = _apply(sign, left, right)
        steps.append(f"{left}{sign}{right}={value}")
        if left_binds < binds:
            left_text = f"({left_text})"
        if right_binds < binds or (right_binds == binds and sign in "-/"):
            right_text = f"({right_text})"
        parts.append((value, f"{left_text}{sign}{right_text}", binds))
    return _Attempt(parts[0][0], parts[0][1], steps)


def _possible(left: int, right: int) -> str:
    signs = "+"
    if left > right:
        signs += "-"
    if left > 1 and right > 1:
        signs += "*" if left % right else "*/"
    return signs


def _apply(sign: str, left: int, right: int) -> int:
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return left // right


# Other signs that people and models write for the four operations.
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", ":": "/", "−": "-", "–": "-"})
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_LONGEST = 200
"""Characters of an answer that are read at all."""


def evaluate(answer: str) -> tuple[Fraction, list[int]] | None:
    """Exact value and numbers used of an arithmetic expression; a final "= 26" may follow and must be true.

    None where the answer is not such an expression, where it divides by zero or is longer than 200 characters.
    """
    text = tidy(answer).translate(_SIGNS)
    if len(text) > _LONGEST:
        return None
    expression, equals, claimed = text.partition("=")
    try:
        value, used = _Parser(expression).read()
    except (_Malformed, ZeroDivisionError):
        return None
    if equals and claimed.strip() != str(value):
        return None
    return value, used


class _Malformed(Exception):
    """Not an arithmetic expression."""


class _Parser:
    """Recursive descent: sum = product ([+-] product)*; product = atom ([*/] atom)*; atom = number | ( sum )."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text)
        if "".join(self._tokens) != text.replace(" ", ""):
            raise _Malformed
        self._place = 0
        self._used: list[int] = []

    def read(self) -> tuple[Fraction, list[int]]:
        value = self._sum()
        if self._next() is not None:
            raise _Malformed
        return value, self._used

    def _next(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self) -> str:
        token = self._next()
        if token is None:
            raise _Malformed
        self._place += 1
        return token

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self._next() in ("*", "/"):
            value = value * self._atom() if self._take() == "*" else value / self._atom()
        return value

    def _atom(self) -> Fraction:
        token = self._take()
        if token == "(":
            value = self._sum()
            if self._take() != ")":
                raise _Malformed
            return value
        if not token.isdigit():
            raise _Malformed
        self._used.append(int(token))
        return Fraction(int(token))
