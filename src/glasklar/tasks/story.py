"""Short stories in which a number of things grows and shrinks, worked as running totals."""

from __future__ import annotations

import random
from typing import ClassVar, Final, NamedTuple

from pydantic import Field, model_validator

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.wording import Span, TaskOptions, between, casual, number_in, pick


class Phrases(NamedTuple):
    """Sentences of a language. {N} hero, {F} friend, {p} {P} he/she, {q} him/her, {o} things, {k} a number."""

    she: tuple[str, str, str]
    he: tuple[str, str, str]
    things: tuple[str, ...]
    openings: tuple[str, ...]
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    double: tuple[str, ...]
    halve: tuple[str, ...]
    questions: tuple[str, ...]


WOMEN: Final = (
    "Mia", "Emma", "Anna", "Lena", "Sarah", "Lisa", "Julia", "Nora", "Clara", "Eva", "Laura", "Paula", "Ida", "Maria",
    "Sophie", "Hannah", "Alice", "Ella", "Lea", "Marta", "Aylin", "Fatima", "Olga", "Rosa", "Zoe", "Amina", "Greta",
    "Kim", "Nina", "Helen", "Ruth", "Vera",
)  # fmt: skip
MEN: Final = (
    "Ben", "Tom", "Max", "Paul", "Leon", "Tim", "Jan", "Noah", "Felix", "Jonas", "David", "Oskar", "Emil", "Peter",
    "Anton", "Ali", "Omar", "Finn", "Karl", "Hugo", "Sam", "Adam", "Leo", "Mark", "Erik", "Yusuf", "Ivan", "Otto",
    "Simon", "Lukas", "Jack", "Oliver",
)  # fmt: skip
HEROES: Final = tuple((name, True) for name in WOMEN) + tuple((name, False) for name in MEN)

ENGLISH: Final = Phrases(
    she=("she", "She", "her"),
    he=("he", "He", "him"),
    things=(
        "apples", "pears", "books", "marbles", "coins", "pencils", "stickers", "balls", "cards", "cookies", "eggs",
        "stamps", "shells", "stones", "flowers", "buttons", "nuts", "sweets", "oranges", "lemons", "toys", "cars",
        "dolls", "balloons", "cakes", "plums", "tickets", "cups", "keys", "candles", "ribbons", "carrots", "tomatoes",
        "pens", "magnets", "dice", "feathers", "chocolates", "bottles", "photos", "cherries", "bananas", "beads",
        "badges",
    ),
    openings=(
        "{N} has {k} {o}.", "{N} starts with {k} {o}.", "{N} owns {k} {o}.", "At first {N} has {k} {o}.",
        "{N} finds {k} {o}.", "In the morning {N} has {k} {o}.", "{N} has a box with {k} {o}.", "{N} buys {k} {o}.",
        "There are {k} {o} in {N}'s bag.", "{N} gets {k} {o} from {F}.", "On Monday {N} has {k} {o}.",
        "{N} brings {k} {o}.", "{N} had {k} {o}.", "{N} keeps {k} {o} at home.", "Today {N} has {k} {o}.",
        "{N} collects {k} {o}.", "{N} got {k} {o}.", "{N} bought {k} {o}.",
    ),
    plus=(
        "{P} buys {k} more.", "{P} finds {k} more.", "{F} gives {q} {k}.", "{P} gets {k} from {F}.", "{P} wins {k}.",
        "Then {p} buys {k}.", "Then {p} gets {k} more.", "Later {p} finds {k}.", "{F} brings {q} {k} more.",
        "{P} receives {k}.", "{P} gets another {k}.", "{P} adds {k}.", "{F} gave {q} {k} more.", "{P} bought {k} more.",
        "{P} picks up {k}.", "Then {p} adds {k} more.", "{P} found {k}.", "After that {p} wins {k}.",
    ),
    minus=(
        "{P} gives {k} to {F}.", "{P} loses {k}.", "{P} sells {k}.", "{F} takes {k}.", "Then {p} gives away {k}.",
        "{P} gives {F} {k}.", "Then {p} loses {k}.", "Later {p} sells {k}.", "{P} gives away {k} of them.",
        "{P} lends {F} {k}.", "{F} gets {k} of them.", "{P} lost {k}.", "{P} gave {k} to {F}.", "{P} sold {k} of them.",
        "{P} throws {k} away.", "Then {p} throws away {k}.", "{F} took {k} of them.", "After that {p} gives {F} {k}.",
    ),
    double=(
        "Then the number doubles.", "{P} gets as many again.", "{P} doubles them.", "{F} doubles them.",
        "Then {p} has twice as many.", "Now {p} doubles the number.",
    ),
    halve=(
        "{P} gives half of them to {F}.", "{P} loses half of them.", "{P} sells half.", "Then {p} gives half away.",
        "{F} takes half of them.", "Half of them are lost.",
    ),
    questions=(
        "How many {o} does {N} have now?", "How many {o} are left?", "How many does {p} have now?",
        "How many are there now?", "How many {o} does {p} have in the end?", "How many {o} does {N} have at the end?",
        "How many are left in the end?", "What is the number of {o} now?", "How many {o} remain?",
        "So how many {o} does {p} have?", "How many now?", "How many {o} has {N} got?",
        "How many {o} does {N} have left?", "How many {o} are there in the end?", "Find the number of {o} {N} has.",
        "Tell me how many {o} {N} has now.",
    ),
)  # fmt: skip

GERMAN: Final = Phrases(
    she=("sie", "Sie", "ihr"),
    he=("er", "Er", "ihm"),
    things=(
        "Äpfel", "Birnen", "Bücher", "Murmeln", "Münzen", "Stifte", "Sticker", "Bälle", "Karten", "Kekse", "Eier",
        "Steine", "Briefmarken", "Muscheln", "Blumen", "Knöpfe", "Nüsse", "Bonbons", "Orangen", "Zitronen", "Autos",
        "Puppen", "Tassen", "Luftballons", "Kuchen", "Pflaumen", "Schlüssel", "Kerzen", "Bänder", "Karotten",
        "Tomaten", "Magnete", "Würfel", "Federn", "Pralinen", "Flaschen", "Fotos", "Kirschen", "Bananen", "Perlen",
        "Hefte", "Ketten", "Lampen", "Taler",
    ),
    openings=(
        "{N} hat {k} {o}.", "Anfangs hat {N} {k} {o}.", "{N} besitzt {k} {o}.", "Zuerst hat {N} {k} {o}.",
        "{N} findet {k} {o}.", "Am Morgen hat {N} {k} {o}.", "{N} hat zu Hause {k} {o}.", "{N} kauft {k} {o}.",
        "Am Anfang hat {N} {k} {o}.", "{N} bekommt von {F} {k} {o}.", "Am Montag hat {N} {k} {o}.",
        "{N} sammelt {k} {o}.", "{N} hatte {k} {o}.", "Heute hat {N} {k} {o}.", "{N} bringt {k} {o} mit.",
        "In der Tasche von {N} sind {k} {o}.", "{N} kaufte {k} {o}.", "{N} bekam {k} {o}.",
    ),
    plus=(
        "{P} kauft {k} dazu.", "{P} findet noch {k}.", "{F} gibt {q} {k} dazu.", "{P} bekommt {k} von {F}.",
        "{P} gewinnt {k}.", "Dann kauft {p} {k}.", "Dann bekommt {p} noch {k}.", "Später findet {p} {k}.",
        "{F} bringt {q} noch {k}.", "{P} erhält {k}.", "{P} bekommt {k} dazu.", "{F} schenkt {q} {k}.",
        "{F} gab {q} noch {k}.", "{P} kaufte noch {k}.", "{P} sammelt noch {k}.", "Dann holt {p} noch {k}.",
        "{P} fand {k}.", "Danach gewinnt {p} {k}.",
    ),
    minus=(
        "{P} gibt {F} {k}.", "{P} verliert {k}.", "{P} verkauft {k}.", "{F} nimmt {k} weg.",
        "Dann verschenkt {p} {k}.", "{P} schenkt {F} {k}.", "Dann verliert {p} {k}.", "Später verkauft {p} {k}.",
        "{P} gibt {k} davon ab.", "{P} leiht {F} {k}.", "{F} bekommt {k} davon.", "{P} verlor {k}.",
        "{P} gab {F} {k}.", "{P} verkaufte {k} davon.", "{P} wirft {k} weg.", "Dann wirft {p} {k} weg.",
        "{F} nahm {k} davon.", "Danach gibt {p} {F} {k}.",
    ),
    double=(
        "Dann verdoppelt sich die Zahl.", "{P} bekommt noch einmal so viele.", "{P} verdoppelt sie.",
        "{F} verdoppelt sie.", "Dann hat {p} doppelt so viele.", "Nun verdoppelt {p} die Zahl.",
    ),
    halve=(
        "{P} gibt {F} die Hälfte.", "{P} verliert die Hälfte.", "{P} verkauft die Hälfte.", "{F} nimmt die Hälfte.",
        "Dann verschenkt {p} die Hälfte.", "Die Hälfte geht verloren.",
    ),
    questions=(
        "Wie viele {o} hat {N} jetzt?", "Wie viele {o} sind übrig?", "Wie viele hat {p} jetzt?",
        "Wie viele sind es nun?", "Wie viele {o} hat {p} am Ende?", "Wie viele {o} hat {N} am Ende?",
        "Wie viele bleiben am Ende?", "Wie groß ist die Zahl nun?", "Wie viele {o} bleiben?",
        "Wie viele {o} hat {p} also?", "Wie viele jetzt?", "Wieviele {o} hat {N}?", "Wie viele {o} hat {N} noch?",
        "Wie viele {o} sind es am Ende?", "Bestimme, wie viele {o} {N} hat.", "Sag mir, wie viele {o} {N} nun hat.",
    ),
)  # fmt: skip

PHRASES: Final[dict[Language, Phrases]] = {"en": ENGLISH, "de": GERMAN}


class StoryOptions(TaskOptions):
    """events    how often the number changes
    largest   running total
    step      largest number gained or lost at once"""

    events: Span = (2, 4)
    largest: int = Field(default=20, ge=4, le=10**6)
    step: int = Field(default=9, ge=1, le=10**6)

    @model_validator(mode="after")
    def _some_event(self) -> StoryOptions:
        if self.events[0] < 1:
            raise ValueError(f"events = {list(self.events)}: a story has at least 1 event")
        return self


class StoryTask(Task):
    """ "Mia has 5 apples. She buys 7 more. She gives Ben 3. How many ..." -> 9 by "5+7=12", "12-3=9"."""

    name: ClassVar[str] = "story"
    Options: ClassVar[type[StoryOptions]] = StoryOptions
    options: StoryOptions

    def sample(self, rng: random.Random) -> Problem:
        options = self.options
        language = pick(rng, options.languages)
        phrases = PHRASES[language]
        total = start = between(rng, 2, options.largest)
        sentences = [pick(rng, phrases.openings).replace("{k}", str(start))]
        lines, key = [], str(start)
        for _ in range(between(rng, *options.events)):
            sign, number, after = _event(rng, total, options)
            match sign:
                case "+":
                    sentence = pick(rng, phrases.plus)
                case "-":
                    sentence = pick(rng, phrases.minus)
                case "*":
                    sentence = pick(rng, phrases.double)
                case _:
                    sentence = pick(rng, phrases.halve)
            sentences.append(sentence.replace("{k}", str(number)))
            lines.append(f"{total}{sign}{number}={after}")
            key += f"{sign}{number}"
            total = after
        sentences.append(pick(rng, phrases.questions))
        return Problem(
            task=self.name,
            key=key,
            question=casual(rng, _people(rng, " ".join(sentences), phrases), language),
            thought="\n".join(lines),
            answer=str(total),
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        return number_in(answer) == problem.answer


def _event(rng: random.Random, total: int, options: StoryOptions) -> tuple[str, int, int]:
    """Sign, number and new total of an event that keeps the total between 0 and the largest."""
    dice = rng.random()
    if dice < 0.1 and 2 <= total * 2 <= options.largest:
        return "*", 2, total * 2
    if dice > 0.9 and total and total % 2 == 0:
        return "/", 2, total // 2
    gain, loss = min(options.step, options.largest - total), min(options.step, total)
    if gain and (dice < 0.5 or not loss):
        number = between(rng, 1, gain)
        return "+", number, total + number
    number = between(rng, 1, loss)
    return "-", number, total - number


def _people(rng: random.Random, text: str, phrases: Phrases) -> str:
    name, female = pick(rng, HEROES)
    friend = pick(rng, HEROES)[0]
    while friend == name:
        friend = pick(rng, HEROES)[0]
    low, high, him = phrases.she if female else phrases.he
    return text.format(N=name, F=friend, p=low, P=high, q=him, o=pick(rng, phrases.things))
