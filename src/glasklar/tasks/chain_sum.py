"""Chains of additions and subtractions of small numbers, worked as running totals."""

from __future__ import annotations

import random
from typing import ClassVar, Final

from pydantic import Field, model_validator

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.wording import Span, TaskOptions, between, casual, number_in, pick

WORDINGS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "What is {e}?", "What's {e}?", "Calculate {e}.", "Compute {e}.", "How much is {e}?", "Work out {e}.", "{e}",
        "{e} = ?", "{e} =", "{e}=?", "{e}?", "Solve {e}.", "Evaluate {e}.", "What does {e} equal?",
        "What do I get for {e}?", "Find the result of {e}.", "Please calculate {e}.", "Can you calculate {e}?",
        "Could you work out {e}?", "What is the result of {e}?", "Give me the value of {e}.",
        "I need the result of {e}.", "Add this up: {e}", "Do the maths: {e}", "What comes out of {e}?",
        "Tell me what {e} is.", "How much do you get for {e}?", "Please solve: {e}", "The result of {e} is?",
        "Do you know what {e} is?", "Sum: {e}", "Let's compute {e}.", "Can you do {e}?", "{e}, what is that?",
        "{e} makes how much?",
    ),
    "de": (
        "Was ist {e}?", "Wie viel ist {e}?", "Berechne {e}.", "Rechne {e} aus.", "Was ergibt {e}?", "Wieviel ist {e}?",
        "{e}", "{e} = ?", "{e} =", "{e}=?", "{e}?", "Löse {e}.", "Wie viel ergibt {e}?", "Was kommt bei {e} heraus?",
        "Bitte berechne {e}.", "Kannst du {e} ausrechnen?", "Könntest du {e} berechnen?", "Was macht {e}?",
        "Wie lautet das Ergebnis von {e}?", "Nenne das Ergebnis von {e}.", "Ich brauche das Ergebnis von {e}.",
        "Rechne bitte: {e}", "Rechne: {e}", "Wie viel macht {e}?", "Sag mir, was {e} ist.", "Finde den Wert von {e}.",
        "Bestimme {e}.", "Das Ergebnis von {e} ist?", "Weißt du, was {e} ist?", "Summe: {e}",
        "Was bekomme ich für {e}?", "Kannst du {e} rechnen?", "{e}, was ist das?", "{e} macht wie viel?",
        "Wie groß ist {e}?",
    ),
}  # fmt: skip

# (start, plus, minus, end) of a chain told in words: "Start with 3, add 4, subtract 2. What is the result?"
TOLD: Final[dict[Language, tuple[tuple[str, str, str, str], ...]]] = {
    "en": (
        ("Start with {}", ", add {}", ", subtract {}", ". What is the result?"),
        ("Take {}", ", add {}", ", take away {}", ". What do you get?"),
        ("Begin at {}", ", then add {}", ", then subtract {}", ". Where do you end?"),
        ("I have {}", ", get {}", ", lose {}", ". How many do I have?"),
        ("Count from {}", ", go up {}", ", go down {}", ". Which number is it?"),
    ),
    "de": (
        ("Beginne mit {}", ", addiere {}", ", subtrahiere {}", ". Was ist das Ergebnis?"),
        ("Nimm {}", ", zähle {} dazu", ", ziehe {} ab", ". Was kommt heraus?"),
        ("Starte bei {}", ", dann plus {}", ", dann minus {}", ". Wo landest du?"),
        ("Ich habe {}", ", bekomme {}", ", verliere {}", ". Wie viele habe ich?"),
        ("Zähle von {}", ", gehe {} hoch", ", gehe {} runter", ". Welche Zahl ist es?"),
    ),
}


class SumOptions(TaskOptions):
    """terms     how many numbers a chain has
    largest   of the numbers
    negative  whether running totals may fall below 0"""

    terms: Span = (4, 7)
    largest: int = Field(default=9, ge=1, le=10**6)
    negative: bool = False

    @model_validator(mode="after")
    def _enough_terms(self) -> SumOptions:
        if self.terms[0] < 2:
            raise ValueError(f"terms = {list(self.terms)}: a chain has at least 2 terms")
        return self


class SumTask(Task):
    """ "3+4-2+8" -> 13. The thought adds one term a line: "3+4=7", "7-2=5", "5+8=13"."""

    name: ClassVar[str] = "sum"
    Options: ClassVar[type[SumOptions]] = SumOptions
    options: SumOptions

    def sample(self, rng: random.Random) -> Problem:
        options = self.options
        total = between(rng, 1, options.largest)
        chain = [total]  # the first number, then signed terms
        lines = []
        for _ in range(between(rng, *options.terms) - 1):
            term = between(rng, 1, options.largest)
            if rng.random() < 0.5 and (options.negative or term <= total):
                term = -term
            lines.append(f"{total}{term:+d}={total + term}")
            total += term
            chain.append(term)
        language = pick(rng, options.languages)
        key = str(chain[0]) + "".join([f"{term:+d}" for term in chain[1:]])
        return Problem(
            task=self.name,
            key=key,
            question=casual(rng, _ask(rng, key, chain, language), language),
            thought="\n".join(lines),
            answer=str(total),
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        return number_in(answer) == problem.answer


def _ask(rng: random.Random, key: str, chain: list[int], language: Language) -> str:
    dice = rng.random()
    if dice < 0.08:
        start, plus, minus, end = pick(rng, TOLD[language])
        told = [(plus if term > 0 else minus).format(abs(term)) for term in chain[1:]]
        return start.format(chain[0]) + "".join(told) + end
    if dice < 0.5:
        expression = key
    elif dice < 0.85:
        expression = key.replace("+", " + ").replace("-", " - ")
    elif dice < 0.97:
        expression = key.replace("+", " plus ").replace("-", " minus ")  # the same words in both languages
    else:
        expression = key.replace("+", " + ").replace("-", " − ")
    return pick(rng, WORDINGS[language]).format(e=expression)
