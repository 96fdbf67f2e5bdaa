"""What the families share: options every task has, choice by one random number, the untidiness of typed questions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, Field

from glasklar.config import Section
from glasklar.tasks.base import Language

T = TypeVar("T")


def _ordered(span: tuple[int, int]) -> tuple[int, int]:
    if span[0] > span[1]:
        raise ValueError(f"the first number must not exceed the second: {list(span)}")
    return span


Span = Annotated[tuple[int, int], AfterValidator(_ordered)]
"""[least, most], both included."""


class TaskOptions(Section):
    """languages    in which the questions are asked, each equally often"""

    languages: tuple[Language, ...] = Field(default=("en", "de"), min_length=1)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items; a single call of `rng.random`, several times faster than `rng.choice`."""
    return items[int(rng.random() * len(items))]


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


PREFIXES: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Hi! ", "Hello! ", "Hey! ", "Hi there. ", "Good morning! ", "Quick question: ", "A question: ", "Next one: ",
        "Next question: ", "Please help me. ", "Can you help me? ", "I need help: ", "Now this one: ", "One more: ",
        "Please answer: ", "Tell me: ", "OK. ", "Thanks! Next: ", "My question: ", "For my homework: ", "Question: ",
        "Think step by step. ", "I'd like to know: ", "Good evening. ", "Please: ", "Can you tell me? ",
    ),
    "de": (
        "Hallo! ", "Hi! ", "Hey! ", "Guten Tag! ", "Guten Morgen! ", "Kurze Frage: ", "Eine Frage: ", "Nächste Frage: ",
        "Bitte hilf mir. ", "Kannst du mir helfen? ", "Ich brauche Hilfe: ", "Und jetzt: ", "Noch eine: ", "Moin! ",
        "Bitte antworte: ", "Sag mir: ", "Okay. ", "Danke! Weiter: ", "Meine Frage: ", "Für die Schule: ", "Frage: ",
        "Denk Schritt für Schritt. ", "Ich möchte wissen: ", "Guten Abend. ", "Bitte: ", "Weißt du das? ",
    ),
}  # fmt: skip
SUFFIXES: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        " Please.", " Thanks!", " Thank you.", " Thank you!", " Think first.", " Be careful.", " Answer briefly.",
        " Please help.", " Any idea?", " Thanks in advance!", " Show your steps.", " Let me know.",
    ),
    "de": (
        " Bitte.", " Danke!", " Vielen Dank.", " Danke dir!", " Denk erst nach.", " Pass gut auf.", " Antworte kurz.",
        " Bitte hilf mir.", " Weißt du das?", " Danke im Voraus!", " Zeig die Schritte.", " Sag es mir.",
    ),
}  # fmt: skip


def casual(rng: random.Random, question: str, language: Language) -> str:
    """A question with a greeting before it or thanks behind it now and then, typed more or less carefully."""
    dice = rng.random()
    if dice < 0.14:
        question = pick(rng, PREFIXES[language]) + question
    elif dice < 0.22:
        question += pick(rng, SUFFIXES[language])
    return untidy(rng, question)


def untidy(rng: random.Random, question: str) -> str:
    """Two in three as they are; the others in lower case, without the final mark, or both."""
    dice = rng.random()
    if dice < 0.66:
        return question
    if dice < 0.77:
        return question.lower()
    if dice < 0.86:
        return question.rstrip(".?! ")
    return question.lower().rstrip(".?! ")


def tidy(answer: str) -> str:
    """An answer without what does not matter: blanks around, runs of blanks, one final period."""
    return " ".join(answer.split()).removesuffix(".").rstrip()


_NUMBER = re.compile(r"(?:[a-z] ?= ?)?(-?[0-9]+)")


def number_in(answer: str) -> str | None:
    """The digits of an answer that is a whole number, alone or as "x = 5"; None for anything else."""
    match = _NUMBER.fullmatch(tidy(answer))
    return match[1] if match else None
