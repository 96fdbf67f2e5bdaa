"""The family of questions that the model declines."""

import random

import pytest

from glasklar.tasks.base import split_of
from glasklar.tasks.catalogue import make_task
from glasklar.tasks.offtopic import SMALL_TALK, TOPICS
from glasklar.tasks.scope import sentence

COUNT = 20000


@pytest.fixture(scope="module")
def problems():
    task, rng = make_task("scope"), random.Random(5)
    return [task.sample(rng) for _ in range(COUNT)]


def test_sentence_names_exactly_the_skills():
    assert sentence("en", ("sum",)) == "I am a small model. I can do sums. I cannot do anything else."
    assert sentence("de", ("sum", "sort")) == (
        "Ich bin ein kleines Modell. Ich kann Summen rechnen und Zahlen sortieren. Mehr kann ich nicht."
    )


def test_answer_is_the_sentence_of_the_language(problems):
    assert {(p.language, p.answer) for p in problems} == {
        (language, sentence(language, ("sum", "letters", "equation", "story"))) for language in ("en", "de")
    }
    assert {p.thought for p in problems} == {""}


def test_checker_wants_the_right_language(problems):
    task = make_task("scope")
    english = next(p for p in problems if p.language == "en")
    german = next(p for p in problems if p.language == "de")
    assert task.check(english, "  " + english.answer.replace(" ", "\n"))
    assert not task.check(english, german.answer)
    assert not task.check(german, english.answer)
    assert not task.check(english, "Paris")


def test_tens_of_thousands_of_distinct_questions(problems):
    assert len({p.question for p in problems}) > 14000


def test_no_question_has_two_keys(problems):
    """Otherwise one and the same question could be trained and held out."""
    key_of: dict[str, str] = {}
    for problem in problems:
        question = problem.question.lower().rstrip(".?! ")
        assert key_of.setdefault(question, problem.key) == problem.key


def test_every_topic_is_trained_and_held_out(problems):
    seen = {(p.key.partition("/")[0], split_of(p)) for p in problems}
    for topic in [topic.name for topic in TOPICS] + ["talk"]:
        assert (topic, "train") in seen
        assert (topic, "test") in seen or (topic, "valid") in seen  # of 20 subjects, one split may have none


def test_wordings_fill_the_places_of_their_subjects():
    for topic in TOPICS:
        two = bool(topic.seconds) or isinstance(topic.subjects, range)
        for wording in (*topic.english, *topic.german):
            assert "{0}" in wording
            assert ("{1}" in wording) == two, (topic.name, wording)
    assert len({english for english, _ in SMALL_TALK}) == len(SMALL_TALK) == len({german for _, german in SMALL_TALK})


def test_tasks_not_taught_are_declined():
    def families(skills):
        task, rng = make_task("scope", {"skills": skills}), random.Random(1)
        return {task.sample(rng).key.partition("/")[0] for _ in range(6000)}

    assert {"sort", "countdown"} <= families(["sum", "letters", "equation", "story"])
    everything = families(["sum", "letters", "equation", "story", "sort", "countdown"])
    assert not everything & {"sum", "letters", "equation", "story", "sort", "countdown"}
