"""Linear equations in one unknown with whole solutions, worked one operation a line."""

from __future__ import annotations

import random
import re
from typing import ClassVar, Final

from pydantic import Field

from glasklar.tasks.base import Language, Problem, Task
from glasklar.tasks.wording import TaskOptions, between, casual, number_in, pick

WORDINGS: Final[dict[Language, tuple[str, ...]]] = {
    "en": (
        "Solve {e}.", "Solve {e} for {v}.", "What is {v} if {e}?", "Find {v}: {e}", "{e}", "{e}, {v} = ?",
        "{e}. What is {v}?", "Solve for {v}: {e}", "If {e}, what is {v}?", "Which {v} solves {e}?",
        "Solve the equation {e}.", "{e}, find {v}.", "What value of {v} makes {e} true?", "Can you solve {e}?",
        "Please solve {e}.", "Determine {v} from {e}.", "For which {v} is {e}?", "Give me {v} when {e}.",
        "{v} = ? if {e}", "How large is {v} in {e}?", "Work out {v}: {e}", "Equation: {e}. Find {v}.",
        "What must {v} be so that {e}?", "I have {e}. What is {v}?", "Let {e}. Find {v}.",
        "What is the solution of {e}?", "Do you know {v} in {e}?", "Calculate {v} from {e}.", "Help me solve {e}.",
    ),
    "de": (
        "Löse {e}.", "Löse {e} nach {v} auf.", "Was ist {v}, wenn {e}?", "Finde {v}: {e}", "{e}", "{e}, {v} = ?",
        "{e}. Was ist {v}?", "Löse nach {v} auf: {e}", "Wenn {e}, was ist dann {v}?", "Welches {v} löst {e}?",
        "Löse die Gleichung {e}.", "{e}, bestimme {v}.", "Für welches {v} gilt {e}?", "Kannst du {e} lösen?",
        "Bitte löse {e}.", "Bestimme {v} aus {e}.", "Wie groß ist {v} in {e}?", "Nenne {v}, wenn {e}.",
        "{v} = ? bei {e}", "Berechne {v}: {e}", "Gleichung: {e}. Finde {v}.", "Was muss {v} sein, damit {e}?",
        "Ich habe {e}. Was ist {v}?", "Es gilt {e}. Wie groß ist {v}?", "Was ist die Lösung von {e}?",
        "Weißt du, was {v} in {e} ist?", "Rechne {v} aus: {e}", "Hilf mir, {e} zu lösen.",
        "Welchen Wert hat {v} in {e}?",
    ),
}  # fmt: skip

# Riddles: the same equations told in words. {a} factor, {b} addend, {c} result.
RIDDLES: Final[dict[Language, dict[str, tuple[str, ...]]]] = {
    "en": {
        "+": (
            "I think of a number, multiply it by {a} and add {b}. I get {c}. What is the number?",
            "{a} times a number plus {b} is {c}. What is the number?",
            "If I multiply a number by {a} and add {b}, I get {c}. Which number is it?",
            "My number times {a}, plus {b}, makes {c}. What is my number?",
        ),
        "-": (
            "I think of a number, multiply it by {a} and subtract {b}. I get {c}. What is the number?",
            "{a} times a number minus {b} is {c}. What is the number?",
            "If I multiply a number by {a} and take away {b}, I get {c}. Which number is it?",
            "My number times {a}, minus {b}, makes {c}. What is my number?",
        ),
        "(+)": (
            "I think of a number, add {b} and multiply by {a}. I get {c}. What is the number?",
            "If I add {b} to a number and multiply by {a}, I get {c}. Which number is it?",
            "I add {b} to my number, then take it times {a}: {c}. What is my number?",
        ),
    },
    "de": {
        "+": (
            "Ich denke mir eine Zahl, nehme sie mal {a} und addiere {b}. Es ergibt {c}. Welche Zahl ist es?",
            "{a} mal eine Zahl plus {b} ist {c}. Wie heißt die Zahl?",
            "Wenn ich eine Zahl mit {a} multipliziere und {b} addiere, erhalte ich {c}. Welche Zahl ist es?",
            "Meine Zahl mal {a}, plus {b}, macht {c}. Was ist meine Zahl?",
        ),
        "-": (
            "Ich denke mir eine Zahl, nehme sie mal {a} und ziehe {b} ab. Es ergibt {c}. Welche Zahl ist es?",
            "{a} mal eine Zahl minus {b} ist {c}. Wie heißt die Zahl?",
            "Wenn ich eine Zahl mit {a} multipliziere und {b} abziehe, erhalte ich {c}. Welche Zahl ist es?",
            "Meine Zahl mal {a}, minus {b}, macht {c}. Was ist meine Zahl?",
        ),
        "(+)": (
            "Ich denke mir eine Zahl, addiere {b} und nehme alles mal {a}. Es ergibt {c}. Welche Zahl ist es?",
            "Wenn ich zu einer Zahl {b} addiere und mit {a} multipliziere, erhalte ich {c}. Welche Zahl ist es?",
            "Ich zähle {b} zu meiner Zahl, dann mal {a}: {c}. Was ist meine Zahl?",
        ),
    },
}

FORMS: Final = ("+",) * 6 + ("-",) * 4 + ("(+)",) * 4 + ("(-)",) * 1 + ("both",) * 4 + ("one",) * 1 + ("times",) * 1
_EXPLICIT = re.compile(r"([0-9])(?=[x(])")  # where "3x" and "3(x+1)" leave the sign of multiplication out
VARIABLES: Final = ("x",) * 12 + ("y", "z", "n")


class EquationOptions(TaskOptions):
    """largest   solution; solutions start at 1
    factor    largest number before the unknown
    addend    largest number added or subtracted"""

    largest: int = Field(default=9, ge=4, le=10**6)
    factor: int = Field(default=9, ge=3, le=10**6)
    addend: int = Field(default=9, ge=1, le=10**6)


class EquationTask(Task):
    """ "3x + 4 = 19" -> "x = 5". The thought is "3x=19-4=15", "x=15/3=5"."""

    name: ClassVar[str] = "equation"
    Options: ClassVar[type[EquationOptions]] = EquationOptions
    options: EquationOptions

    def sample(self, rng: random.Random) -> Problem:
        options = self.options
        language = pick(rng, options.languages)
        form = pick(rng, FORMS)
        x, a, b = between(rng, 1, options.largest), between(rng, 2, options.factor), between(rng, 1, options.addend)
        if form == "-" and a * x <= b:
            form = "+"
        if form == "(-)" and x <= b:
            form = "(+)"
        fewer = between(rng, 1, a - 1) if form == "both" else 0
        left, right, steps = _build(form, x, a, b, fewer)
        riddles = RIDDLES[language].get(form)
        if riddles and rng.random() < 0.15:
            question = pick(rng, riddles).format(a=a, b=b, c=right)
            answer = str(x)
        else:
            variable = pick(rng, VARIABLES)
            question = pick(rng, WORDINGS[language]).format(e=_typeset(rng, left, right, variable), v=variable)
            steps = steps.replace("x", variable)
            answer = f"{variable} = {x}"
        return Problem(
            task=self.name,
            key=f"{left}={right}",
            question=casual(rng, question, language),
            thought=steps,
            answer=answer,
            language=language,
        )

    def check(self, problem: Problem, answer: str) -> bool:
        return number_in(answer) == number_in(problem.answer)


def _build(form: str, x: int, a: int, b: int, fewer: int) -> tuple[str, str, str]:
    """Left side, right side and worked steps of an equation in "x"; `fewer` is the factor on the right side."""
    match form:
        case "+":
            c = a * x + b
            return f"{a}x+{b}", f"{c}", f"{a}x={c}-{b}={a * x}\nx={a * x}/{a}={x}"
        case "-":
            c = a * x - b
            return f"{a}x-{b}", f"{c}", f"{a}x={c}+{b}={a * x}\nx={a * x}/{a}={x}"
        case "(+)":
            c = a * (x + b)
            return f"{a}(x+{b})", f"{c}", f"x+{b}={c}/{a}={x + b}\nx={x + b}-{b}={x}"
        case "(-)":
            c = a * (x - b)
            return f"{a}(x-{b})", f"{c}", f"x-{b}={c}/{a}={x - b}\nx={x - b}+{b}={x}"
        case "one":
            return f"x+{b}", f"{x + b}", f"x={x + b}-{b}={x}"
        case "times":
            return f"{a}x", f"{a * x}", f"x={a * x}/{a}={x}"
    rest = a - fewer
    d = rest * x + b
    own, other = (f"{n}x" if n > 1 else "x" for n in (rest, fewer))
    steps = f"{a}x-{other}={own}\n{own}={d}-{b}={rest * x}"
    if rest > 1:
        steps += f"\nx={rest * x}/{rest}={x}"
    return f"{a}x+{b}", f"{other}+{d}", steps


def _typeset(rng: random.Random, left: str, right: str, variable: str) -> str:
    """An equation as people write it: sides swapped now and then, blanks or none, "3x" or "3*x"."""
    dice = rng.random()
    equation = f"{right}={left}" if dice < 0.08 else f"{left}={right}"
    dice = rng.random()
    if dice < 0.15:
        equation = _EXPLICIT.sub(r"\1*" if dice < 0.12 else r"\1·", equation)
    if variable != "x":
        equation = equation.replace("x", variable)
    if rng.random() < 0.55:
        for sign in "+-*=":
            equation = equation.replace(sign, f" {sign} ")
    return equation
