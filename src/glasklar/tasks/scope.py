"""What the model cannot do: questions outside its tasks, answered by one plain sentence that says so.

The words of the questions stand in `offtopic.py`. A key names a topic and its subjects, whatever the wording, so that
held-out problems ask about subjects never seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.chain_sum import SumTask
from glasklar.tasks.countdown import CountdownTask
from glasklar.tasks.equation import EquationTask
from glasklar.tasks.letters import LettersTask
from glasklar.tasks.offtopic import SMALL_TALK, TOPICS
from glasklar.tasks.sorting import SortTask
from glasklar.tasks.story import StoryTask
from glasklar.tasks.wording import TaskOptions, between, casual, pick, tidy, untidy

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
TASK_OF: Final[dict[Skill, type[Task]]] = {
    "sum": SumTask,
    "letters": LettersTask,
    "sort": SortTask,
    "countdown": CountdownTask,
    "equation": EquationTask,
    "story": StoryTask,
}


class ScopeOptions(TaskOptions):
    """skills    what the model says that it can do: name exactly the tasks that the recipe trains.
    Questions of the tasks not named here are asked as well, and declined like the others."""

    skills: tuple[Skill, ...] = Field(default=("sum", "letters", "equation", "story"), min_length=1)


class ScopeTask(Task):
    """ "What is the capital of France?" -> "I am a small model. I can do sums, ... I cannot do anything else." """

    name: ClassVar[str] = "scope"
    Options: ClassVar[type[ScopeOptions]] = ScopeOptions
    options: ScopeOptions

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        untaught = [task for skill, task in TASK_OF.items() if skill not in self.options.skills]
        self._untaught = {
            language: [task({"languages": [language]}) for task in untaught] for language in self.options.languages
        }

    def sample(self, rng: random.Random) -> Problem:
        language = pick(rng, self.options.languages)
        untaught = self._untaught[language]
        if untaught and rng.random() < 0.06:
            problem = pick(rng, untaught).sample(rng)
            key, question = f"{problem.task}/{problem.key}", problem.question
        elif rng.random() < 0.15:
            pair = pick(rng, SMALL_TALK)
            key, question = f"talk/{pair[0]}", untidy(rng, pair[_side(language)])  # a greeting needs no other
        else:
            key, question = _ask(rng, language)
            question = casual(rng, question, language)
        return Problem(
            task=self.name,
            key=key,
            question=question,
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


def _side(language: Language) -> int:
    return 0 if language == "en" else 1


def _ask(rng: random.Random, language: Language) -> tuple[str, str]:
    """Key and question of a topic."""
    side = _side(language)
    topic = pick(rng, TOPICS)
    wording = pick(rng, topic.german if side else topic.english)
    if isinstance(topic.subjects, range):
        numbers = [between(rng, topic.subjects[0], topic.subjects[-1]) for _ in range(2)]
        return f"{topic.name}/{numbers[0]}/{numbers[1]}", wording.format(*numbers)
    subject = pick(rng, topic.subjects)
    second = pick(rng, topic.seconds) if topic.seconds else ("", "")
    while second == subject:
        second = pick(rng, topic.seconds)
    return f"{topic.name}/{subject[0]}/{second[0]}", wording.format(subject[side], second[side])
