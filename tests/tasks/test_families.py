"""Every family against the promises of `selfcheck`, and `selfcheck` against families that break them."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from glasklar.errors import RecipeError
from glasklar.tasks.base import Problem, Task, split_of
from glasklar.tasks.catalogue import TASKS, make_task
from glasklar.tasks.chain_sum import SumTask
from glasklar.tasks.countdown import CountdownTask
from glasklar.tasks.selfcheck import faults, last_number

OWN = [name for name in TASKS if name != "gym"]
RESULTS = {"countdown": lambda problem: problem.key.partition("=")[2]}


def draw_many(task: Task, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [task.sample(rng) for _ in range(count)]


@pytest.mark.parametrize("name", OWN)
def test_family_keeps_its_promises(name):
    # The two fixed sentences of `scope` are half of its answers each.
    commonest = 0.6 if name == "scope" else 0.25
    result = RESULTS.get(name, lambda problem: last_number(problem.answer))
    assert faults(make_task(name), draws=3000, commonest=commonest, result=result) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sum", {"terms": [8, 10], "largest": 50}),
        ("sum", {"terms": [2, 3], "negative": True}),
        ("letters", {"length": [10, 14]}),
        ("letters", {"listed": 0.0, "languages": ["de"]}),
        ("sort", {"count": [2, 12], "largest": 1000}),
        ("countdown", {"numbers": 4, "tries": [0, 0]}),
        ("equation", {"largest": 50, "factor": 12, "addend": 100}),
        ("story", {"events": [5, 6], "largest": 100, "step": 30}),
    ],
)
def test_other_ranges_keep_the_promises(name, options):
    result = RESULTS.get(name, lambda problem: last_number(problem.answer))
    assert faults(make_task(name, options), draws=1500, result=result) == []


@pytest.mark.parametrize("name", OWN)
def test_splits_share_neither_keys_nor_questions(name):
    task = make_task(name)
    parts = {split: [task.draw(split, 7, index) for index in range(200)] for split in ("train", "valid", "test")}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        for of in (lambda problem: problem.key, lambda problem: problem.question.lower()):
            assert {of(problem) for problem in parts[one]}.isdisjoint({of(problem) for problem in parts[other]})


@pytest.mark.parametrize("name", OWN)
def test_language_and_wording_do_not_change_the_split(name):
    """The other language asks the same problems under the same keys."""
    english, german = (
        {p.key for p in draw_many(make_task(name, {"languages": [language]}), 4000)} for language in ("en", "de")
    )
    if name not in ("letters", "sort"):  # two draws from a space too large for them to meet often
        assert len(english & german) > 20
    problem = draw_many(make_task(name), 1)[0]
    assert split_of(problem) == split_of(replace(problem, question="other words", language="de"))


@pytest.mark.parametrize("name", OWN)
def test_questions_are_varied_and_short(name):
    problems = draw_many(make_task(name), 2000)
    words = sorted(len(problem.question.split()) for problem in problems)
    assert words[len(words) // 2] <= 25
    assert words[-1] <= 60
    # Openings stand for wordings: at least 15 of them in each language.
    for language in ("en", "de"):
        openings = Counter(p.question.lower()[:12] for p in problems if p.language == language)
        assert len(openings) >= 15
    assert all(problem.question == problem.question.strip() for problem in problems)
    assert not any("{" in problem.question or "}" in problem.question for problem in problems)


def test_same_seed_same_problem_and_index_counts():
    task = make_task("sum")
    assert task.draw("train", 3, 5) == make_task("sum").draw("train", 3, 5)
    assert len({task.draw("train", 3, index).question for index in range(50)}) > 45


class OneAnswer(SumTask):
    def check(self, problem: Problem, answer: str) -> bool:
        return True


class Unsteady(SumTask):
    def sample(self, rng: random.Random) -> Problem:
        return super().sample(random.Random())


class WrongThought(SumTask):
    def sample(self, rng: random.Random) -> Problem:
        return replace(super().sample(rng), thought="1+1=2", answer="3")


class WordedKey(SumTask):
    def sample(self, rng: random.Random) -> Problem:
        problem = super().sample(rng)
        return replace(problem, question="Same?", key=f"{problem.key} {rng.random()}")


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        (OneAnswer, "a wrong answer like"),
        (Unsteady, "the same seed gives other problems"),
        (WrongThought, "the thought does not end with the result"),
        (WrongThought, "makes up 100%"),
        (WordedKey, "one question has two keys"),
        (CountdownTask, "the thought does not end with the result"),  # ends with the target, not the expression
    ],
)
def test_selfcheck_finds_what_is_broken(task, fault):
    assert any(fault in line for line in faults(task(), draws=100))


def test_unknown_task_names_the_nearest():
    with pytest.raises(RecipeError, match="unknown task 'leters'; did you mean 'letters'"):
        make_task("leters")
    with pytest.raises(RecipeError, match="known tasks: countdown, equation"):
        make_task("zzzzzz")


def test_unknown_option_names_the_nearest():
    with pytest.raises(RecipeError, match="task 'sum': unknown key 'term'; did you mean 'terms'"):
        make_task("sum", {"term": [2, 3]})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sum", {"terms": [5, 4]}, "must not exceed"),
        ("sum", {"terms": [1, 4]}, "at least 2 terms"),
        ("sum", {"languages": []}, "languages"),
        ("sum", {"languages": ["fr"]}, "languages"),
        ("letters", {"length": [1, 4]}, "2 to 40 letters"),
        ("letters", {"listed": 1.5}, "listed"),
        ("sort", {"count": [1, 3]}, "at least 2 numbers"),
        ("countdown", {"numbers": 5}, "numbers"),
        ("story", {"events": [0, 1]}, "at least 1 event"),
        ("scope", {"skills": []}, "skills"),
        ("gym", {}, "dataset"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(RecipeError, match=message):
        make_task(name, options)


def test_extension_class_is_loaded():
    assert isinstance(make_task("glasklar.tasks.chain_sum:SumTask", {"terms": [2, 2]}), SumTask)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_anywhere:Thing", "cannot be loaded"),
        ("glasklar.tasks.chain_sum:Nothing", "cannot be loaded"),
        (":Thing", "cannot be loaded"),
        ("glasklar.tasks.base:Problem", "not a class derived from"),
    ],
)
def test_broken_extension_is_refused(reference, message):
    with pytest.raises(RecipeError, match=message):
        make_task(reference)
