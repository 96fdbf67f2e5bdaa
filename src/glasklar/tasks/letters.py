"""How often a letter occurs in a word, worked as a running count letter by letter."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from pydantic import model_validator

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.wording import Span, TaskOptions, between, casual, number_in, pick
from glasklar.tasks.words import WORDS

WORDINGS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "How many {l}'s are in {w}?", "How many {l}s are in {w}?", "How often does {l} occur in {w}?",
        "Count the {l}'s in {w}.", "How many times does the letter {l} occur in {w}?",
        "How many {l} are there in {w}?", "Number of {l} in {w}?", "How many times does {l} appear in {w}?",
        "Count the letter {l} in {w}.", "{w}: how many {l}?", "In {w}, how many {l}?",
        "How often is the letter {l} in the word {w}?", "How many letters {l} does {w} have?", "How many {l} in {w}?",
        "Count how many {l} are in {w}.", "The word {w} has how many {l}'s?", "Can you count the {l}'s in {w}?",
        "Tell me how many {l} the word {w} contains.", "How many {l}'s does {w} contain?",
        "Find the number of {l} in {w}.", "Please count the letter {l} in the word {w}.",
        "What is the count of {l} in {w}?", "letter {l} in {w}, how often?", "How frequently does {l} occur in {w}?",
        "In the word {w}, how often does {l} appear?", "How many {l}'s in {w}?",
        "Look at the word {w}. How many {l}'s?", "How often do you see {l} in {w}?",
        "Do you know how many {l}'s {w} has?",
    ),
    "de": (
        "Wie viele {l} hat {w}?", "Wie viele {l} sind in {w}?", "Wie oft kommt {l} in {w} vor?",
        "Zähle die {l} in {w}.", "Wie oft kommt der Buchstabe {l} in {w} vor?", "Wie viele {l} gibt es in {w}?",
        "Anzahl der {l} in {w}?", "Wie oft steht {l} in {w}?", "Zähle den Buchstaben {l} in {w}.",
        "{w}: wie viele {l}?", "In {w}, wie viele {l}?", "Wie oft ist der Buchstabe {l} im Wort {w}?",
        "Wie viele Buchstaben {l} hat {w}?", "Wie viele {l} in {w}?", "Zähle, wie viele {l} in {w} sind.",
        "Das Wort {w} hat wie viele {l}?", "Kannst du die {l} in {w} zählen?",
        "Sag mir, wie viele {l} das Wort {w} enthält.", "Wie viele {l} enthält {w}?",
        "Bestimme die Zahl der {l} in {w}.", "Bitte zähle den Buchstaben {l} im Wort {w}.",
        "Wie häufig ist {l} in {w}?", "Buchstabe {l} in {w}, wie oft?", "Wie häufig kommt {l} in {w} vor?",
        "Wie oft findet man {l} im Wort {w}?", "Wieviele {l} sind im Wort {w}?",
        "Schau dir das Wort {w} an. Wie viele {l}?", "Wie oft siehst du {l} in {w}?",
        "Weißt du, wie viele {l} {w} hat?",
    ),
}  # fmt: skip
QUOTES: Final[dict[Language, tuple[tuple[str, str], ...]]] = {
    "en": (("", ""),) * 6 + (('"', '"'), ("'", "'"), ("“", "”")),
    "de": (("", ""),) * 6 + (('"', '"'), ("'", "'"), ("„", "“")),
}

CONSONANTS: Final = "bdfghklmnprstvwzbdgklmnprstcjqxy"  # those of the first half come up twice as often
VOWELS: Final[dict[Language, str]] = {"en": "aeiouaeiou", "de": "aeiouaeiouäöü"}
ASKED: Final[dict[Language, str]] = {"en": "aeiounrstlmpbdgkfhczwvy", "de": "aeiounrstlmpbdgkfhczwväöü"}

# Words of a language give few cases beyond three, so that made-up words supply most of those.
COUNTS: Final = (0,) * 16 + (1,) * 22 + (2,) * 22 + (3,) * 21 + (4,) * 14 + (5,) * 5


class LettersOptions(TaskOptions):
    """length    letters in a word
    listed    share of real words among those with a fitting count; the others are made up"""

    length: Span = (5, 9)
    listed: float = 0.6

    @model_validator(mode="after")
    def _possible(self) -> LettersOptions:
        if self.length[0] < 2 or self.length[1] > 40:
            raise ValueError(f"length = {list(self.length)}: words have 2 to 40 letters")
        if not 0.0 <= self.listed <= 1.0:
            raise ValueError(f"listed = {self.listed}: a share lies between 0 and 1")
        return self


class LettersTask(Task):
    """ "How many r's are in strawberry?" -> 3. The thought counts: "s0 t0 r1 a1 w1 b1 e1 r2 r3 y3"."""

    name: ClassVar[str] = "letters"
    Options: ClassVar[type[LettersOptions]] = LettersOptions
    options: LettersOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self._cases = {language: _cases(language, self.options.length) for language in self.options.languages}

    def sample(self, rng: random.Random) -> Problem:
        language = pick(rng, self.options.languages)
        word, letter = self._word(rng, language)
        count = 0
        trail = []
        lowered = word.lower()
        for character in lowered:
            count += character == letter
            trail.append(f"{character}{count}")
        opening, closing = pick(rng, QUOTES[language])
        dice = rng.random()
        shown = letter
        if dice > 0.85:
            shown = f'"{letter}"'
        elif dice > 0.7 and letter != "ß":  # its capital would be two letters
            shown = letter.upper()
        question = pick(rng, WORDINGS[language]).format(l=shown, w=f"{opening}{word}{closing}")
        return Problem(
            task=self.name,
            key=f"{letter} in {lowered}",
            question=casual(rng, question, language),
            thought=" ".join(trail),
            answer=str(count),
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        return number_in(answer) == problem.answer

    def _word(self, rng: random.Random, language: Language) -> tuple[str, str]:
        """A word and the lower-case letter to count in it."""
        count = min(pick(rng, COUNTS), self.options.length[1] - 1)
        cases = self._cases[language].get(count)
        # The rarer the cases, the less often they are used: no word of the list is to become a by-word for its count.
        if cases and rng.random() < self.options.listed * min(1.0, len(cases) / 300):
            return pick(rng, cases)
        return _made_up(rng, language, count, self.options.length)


def _cases(language: Language, length: tuple[int, int]) -> dict[int, list[tuple[str, str]]]:
    """Count -> (word, letter) with that count, for the listed words of fitting length."""
    cases: dict[int, list[tuple[str, str]]] = {}
    for word in WORDS[language]:
        if length[0] <= len(word) <= length[1]:
            counts = Counter(word.lower())
            for letter in {*counts, *ASKED[language]}:
                cases.setdefault(counts[letter], []).append((word, letter))
    return {count: sorted(pairs) for count, pairs in cases.items()}


def _made_up(rng: random.Random, language: Language, count: int, length: tuple[int, int]) -> tuple[str, str]:
    """A word that could be one: consonants and vowels in turn, the letter put in at `count` places."""
    letter = pick(rng, ASKED[language])
    size = between(rng, max(length[0], count + 1), length[1])
    pools = (CONSONANTS.replace(letter, ""), VOWELS[language].replace(letter, ""))
    turn = rng.random() < 0.7
    characters = [pick(rng, pools[(place + turn) % 2]) for place in range(size)]
    for place in rng.sample(range(size), count):
        characters[place] = letter
    word = "".join(characters)
    return (word.capitalize() if rng.random() < (0.5 if language == "de" else 0.1) else word), letter
