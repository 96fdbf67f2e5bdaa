"""What the model cannot do: questions outside its tasks, answered by one plain sentence that says so.

The words of the questions stand in `offtopic.py`. A key names a topic and its subjects, whatever the wording, so that
held-out problems ask about subjects never seen in training.
"""

from __future__ import annotations

import random
from typing import ClassVar, Final, Literal

from pydantic import Field

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.offtopic import SMALL_TALK, TOPICS
from glasklar.tasks.wording import TaskOptions, between, casual, pick, tidy

Skill = Literal["sum", "letters", "sort", "countdown", "equation", "story"]

SKILLS: Final[dict[Language, dict[Skill, str]]] = {
    "en": {
        "sum": "do sums",
        "letters": "count letters",
        "sort": "sort numbers",
        "countdown": "reach target numbers",
        "equation": "solve equations",
        "story": "solve word problems",
    },
    "de": {
        "sum": "Summen rechnen",
        "letters": "Buchstaben zählen",
        "sort": "Zahlen sortieren",
        "countdown": "Zielzahlen erreichen",
        "equation": "Gleichungen lösen",
        "story": "Textaufgaben lösen",
    },
}


class ScopeOptions(TaskOptions):
    """skills    what the model says that it can do; name the tasks that the recipe trains"""

    skills: tuple[Skill, ...] = Field(default=("sum", "letters", "equation", "story"), min_length=1)


class ScopeTask(Task):
    """ "What is the capital of France?" -> "I am a small model. I can do sums, ... I cannot do anything else." """

    name: ClassVar[str] = "scope"
    Options: ClassVar[type[ScopeOptions]] = ScopeOptions
    options: ScopeOptions

    def sample(self, rng: random.Random) -> Problem:
        language = pick(rng, self.options.languages)
        key, question = _ask(rng, language)
        return Problem(
            task=self.name,
            key=key,
            question=casual(rng, question, language),
            thought="",
            answer=sentence(language, self.options.skills),
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        return tidy(answer) == tidy(problem.answer)


def sentence(language: Language, skills: tuple[Skill, ...]) -> str:
    """What the model says of itself, in a language, where it has these skills."""
    names = [SKILLS[language][skill] for skill in skills]
    *most, last = names
    if language == "en":
        listed = f"{', '.join(most)} and {last}" if most else last
        return f"I am a small model. I can {listed}. I cannot do anything else."
    listed = f"{', '.join(most)} und {last}" if most else last
    return f"Ich bin ein kleines Modell. Ich kann {listed}. Mehr kann ich nicht."


def _ask(rng: random.Random, language: Language) -> tuple[str, str]:
    """Key and question."""
    side = 0 if language == "en" else 1
    if rng.random() < 0.15:
        pair = pick(rng, SMALL_TALK)
        return f"talk/{pair[0]}", pair[side]
    topic = pick(rng, TOPICS)
    wording = pick(rng, topic.english if language == "en" else topic.german)
    if isinstance(topic.subjects, range):
        numbers = [between(rng, topic.subjects[0], topic.subjects[-1]) for _ in range(2)]
        return f"{topic.name}/{numbers[0]}/{numbers[1]}", wording.format(*numbers)
    subject = pick(rng, topic.subjects)
    second = pick(rng, topic.seconds) if topic.seconds else ("", "")
    return f"{topic.name}/{subject[0]}/{second[0]}", wording.format(subject[side], second[side])
