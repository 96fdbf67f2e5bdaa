"""Answers and thoughts against independent arithmetic and hand-made examples."""

import random
import re

import pytest

from glasklar.tasks.base import Problem
from glasklar.tasks.catalogue import make_task
from glasklar.tasks.countdown import evaluate
from glasklar.tasks.letters import WORDINGS as LETTER_WORDINGS
from glasklar.tasks.wording import number_in, tidy
from glasklar.tasks.words import WORDS

COUNT = 1500


def draw_many(name: str, options: dict | None = None, count: int = COUNT) -> list[Problem]:
    task, rng = make_task(name, options), random.Random(11)
    return [task.sample(rng) for _ in range(count)]


def value(expression: str) -> int:
    """Left to right, whole numbers, as in a running total."""
    numbers = re.split(r"[-+*/]", expression)
    total = int(numbers[0])
    for sign, number in zip(re.findall(r"[-+*/]", expression), map(int, numbers[1:]), strict=True):
        match sign:
            case "+":
                total += number
            case "-":
                total -= number
            case "*":
                total *= number
            case "/":
                total, rest = divmod(total, number)
                assert rest == 0
    return total


@pytest.mark.parametrize("name", ["sum", "story"])
def test_chains_against_left_to_right_arithmetic(name):
    for problem in draw_many(name):
        assert str(value(problem.key)) == problem.answer
        total = re.match("[0-9]+", problem.key)[0]
        for line in problem.thought.split("\n"):
            left, _, right = line.partition("=")
            assert re.match("[0-9]+", left)[0] == total  # each line starts from the last result
            assert str(value(left)) == right
            total = right


def test_sum_totals_stay_positive_unless_asked():
    assert not any("=-" in problem.thought for problem in draw_many("sum"))
    assert any("=-" in problem.thought for problem in draw_many("sum", {"negative": True}))


@pytest.mark.parametrize("name", ["sum", "story", "equation"])
def test_question_names_every_number_of_the_problem(name):
    for problem in draw_many(name):
        numbers = re.findall("[0-9]+", problem.key)
        if name == "story":  # doubling and halving are told in words
            numbers = re.findall("[0-9]+", re.sub(r"[*/]2", "", problem.key))
        asked = re.findall("[0-9]+", problem.question)
        assert sorted(asked) == sorted(numbers)


def test_story_totals_stay_small():
    for problem in draw_many("story"):
        assert all(0 <= int(number) <= 20 for number in re.findall("[0-9]+", problem.thought))


@pytest.mark.parametrize("options", [None, {"length": [10, 14]}])
def test_letter_counts_against_str_count(options):
    for problem in draw_many("letters", options):
        letter, _, word = problem.key.partition(" in ")
        assert problem.answer == str(word.count(letter))
        steps = problem.thought.split(" ")
        assert "".join(step[0] for step in steps) == word
        assert [int(step[1:]) for step in steps] == [word[: place + 1].count(letter) for place in range(len(word))]
        assert word in problem.question.lower()


def test_letter_counts_are_spread():
    answers = [problem.answer for problem in draw_many("letters", count=4000)]
    shares = {answer: answers.count(answer) / 4000 for answer in set(answers)}
    assert all(shares[count] > 0.1 for count in "01234")
    assert 0.6 < sum(shares[count] for count in "123") < 0.8


def test_word_lists_are_words_and_include_the_famous_ones():
    assert "strawberry" in WORDS["en"]
    assert "Erdbeere" in WORDS["de"]
    for words in WORDS.values():
        assert len(words) == len(set(words)) > 500
        assert all(word.isalpha() for word in words)
    assert all(len(wordings) >= 15 for wordings in LETTER_WORDINGS.values())


def test_sharp_s_is_never_shown_as_two_letters():
    sharp = [p for p in draw_many("letters", {"languages": ["de"]}, 40000) if p.key.startswith("ß")]
    assert sharp
    assert not any("SS" in problem.question for problem in sharp)


def test_equations_solved_by_substitution():
    forms = set()
    for problem in draw_many("equation"):
        left, _, right = problem.key.partition("=")
        x = int(number_in(problem.answer))
        assert side(left, x) == side(right, x)
        forms.add(re.sub("[0-9]+", "1", problem.key))
        for line in problem.thought.split("\n"):
            terms = [re.sub("[a-z]", "x", term) for term in line.split("=")]
            assert len({side(term, x) for term in terms}) == 1
    assert forms == {"1x+1=1", "1x-1=1", "1(x+1)=1", "1(x-1)=1", "1x=1", "x+1=1", "1x+1=1x+1", "1x+1=x+1"}


def side(text: str, x: int) -> int:
    """One side of an equation at x; division must come out even."""
    text = re.sub(r"(?<=[0-9])(?=[x(])", "*", text).replace("x", str(x))
    result, _ = evaluate(text)
    assert result.denominator == 1
    return int(result)


def test_sort_against_sorted():
    for problem in draw_many("sort"):
        numbers = [int(number) for number in problem.answer.split(", ")]
        descending = problem.key.startswith("descending")
        assert numbers == sorted(numbers, reverse=descending)
        assert sorted(map(int, re.findall("[0-9]+", problem.question))) == sorted(numbers)
        lines = [re.findall("[0-9]+", line) for line in problem.thought.split("\n")]
        for line, number in zip(lines, numbers, strict=True):
            assert line[0] == str(number)
        assert sorted(lines[0], key=int) == sorted(map(str, numbers), key=int)


@pytest.mark.parametrize("numbers", [3, 4])
def test_countdown_solutions_and_steps(numbers):
    for problem in draw_many("countdown", {"numbers": numbers}, 500):
        target = int(problem.key.partition("=")[2])
        result, used = evaluate(problem.answer)
        assert result == target
        assert len(used) == numbers
        *failed, last = problem.thought.split("\n")
        for attempt in (*failed, last):
            *steps, verdict = attempt.split(" ")
            assert len(steps) == numbers - 1
            for step in steps:
                left, _, right = step.partition("=")
                assert str(value(left)) == right
            assert (verdict in ("yes", "ja")) == (int(steps[-1].partition("=")[2]) == target) == (attempt is last)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3*7+5", True), ("5+3*7", True), ("(3 * 7) + 5.", True), ("3*7+5=26", True), ("5 + 7 × 3", True),
        ("3*7+5=27", False), ("26", False), ("3*7", False), ("3*7+5+0", False), ("3*(7+5)", False), ("", False),
        ("3*7+5 5", False), ("3**7+5", False), ("__import__('os')", False), ("-3*7+5", False), ("3*7+5)", False),
        ("((3*7)+5", False), ("37+5", False), ("3/(7-7)+5", False), ("(" * 90 + "3*7+5" + ")" * 90, True),
        ("(" * 5000, False), ("3*7+5 is it", False), ("3+", False), ("²*7+5", False), ("26=3*7+5", False),
    ],
)  # fmt: skip
def test_countdown_checker(answer, right):
    task = make_task("countdown")
    problem = Problem(task="countdown", key="3,5,7=26", question="", thought="", answer="", language="en")
    assert task.check(problem, answer) is right


def test_countdown_is_exact_with_fractions():
    problem = Problem(task="countdown", key="1,3,8=24", question="", thought="", answer="", language="en")
    assert make_task("countdown").check(problem, "8/(1/3)")
    assert evaluate("1/3+1/3+1/3") == (1, [1, 3, 1, 3, 1, 3])


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("13", "13"), (" 13\n", "13"), ("13.", "13"), ("x = 13", "13"), ("x=13", "13"), ("n = 13.", "13"), ("-4", "-4"),
        ("13 apples", None), ("It is 13", None), ("", None), ("1 3", None), ("13.0", None), ("x = ", None),
        ("= 13", None), ("١٣", None), ("xy = 3", None), ("x == 3", None),
    ],
)  # fmt: skip
def test_number_in(answer, number):
    assert number_in(answer) == number


def test_sort_checker_wants_the_numbers_in_order():
    task = make_task("sort")
    problem = Problem(task="sort", key="", question="", thought="", answer="2, 5, 9", language="en")
    assert all(task.check(problem, text) for text in ("2, 5, 9", "2,5,9", "2 5 9", "2; 5; 9.", " 2, 5, 9 "))
    assert not any(
        task.check(problem, text) for text in ("2, 9, 5", "2, 5", "259", "2, 5, 9, 9", "so 2, 5, 9", "2-5-9")
    )


def test_tidy():
    assert tidy("  a \n b.  ") == "a b"
