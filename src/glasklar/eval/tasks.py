"""Accuracy on a model's own tasks, on problems that training cannot have seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean
from typing import Any

from glasklar.data.chat import parse
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.eval.answers import Answer, ask
from glasklar.tasks.base import Split

EXAMPLES = 2  # of each task


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one task; shares of `n` problems.

    greedy      right at temperature 0, the model choosing whether to think
    thought     share of those greedy answers that think; length: their mean number of tokens
    thinking    right at temperature 0 when it must think; direct: when it must not
    pass1       right at temperature 1, mean over samples; pass_k: chance that one of k samples is right (unbiased)
    examples    for people: the first greedy answers as {"question", "thought", "answer", "correct"}
    """

    n: int
    greedy: float
    thought: float
    length: float
    thinking: float | None = None
    direct: float | None = None
    pass1: float | None = None
    pass_k: float | None = None
    k: int = 16
    examples: tuple[dict[str, Any], ...] = ()

    def as_json(self) -> dict[str, float | int]:
        """Stable keys for reports; absent figures are left out."""
        named = {
            "n": self.n, "greedy": self.greedy, "thought": self.thought, "length": self.length,
            "thinking": self.thinking, "direct": self.direct, "pass@1": self.pass1, f"pass@{self.k}": self.pass_k,
        }  # fmt: skip
        return {key: value for key, value in named.items() if value is not None}


def evaluate_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    mixture: Mixture,
    *,
    split: Split,
    seed: int,
    problems: int,
    max_tokens: int,
    modes: bool = False,
    samples: int = 0,
    sampled_problems: int = 0,
) -> dict[str, Scores]:
    """Scores of every task of the mixture on `problems` problems of a split, drawn under `seed`.

    modes     also force thinking on and off
    samples   answers at temperature 1 to each of the first `sampled_problems` problems; 0: none
    """
    results = {}
    for task in mixture.tasks:
        drawn = [(task, task.draw(split, seed, index)) for index in range(problems)]
        free = ask(engine, tokenizer, drawn, max_tokens=max_tokens)
        forced = {
            mode: fmean(a.correct for a in ask(engine, tokenizer, drawn, max_tokens=max_tokens, thinking=mode))
            for mode in ((True, False) if modes else ())
        }
        sampled = drawn[:sampled_problems] if samples else []
        tries = ask(engine, tokenizer, sampled, max_tokens=max_tokens, samples=samples or 1, temperature=1.0)
        right = [sum(a.correct for a in tries[i : i + samples]) for i in range(0, len(tries), samples or 1)]
        k = min(16, samples) or 16
        results[task.name] = Scores(
            n=problems,
            greedy=fmean(answer.correct for answer in free),
            thought=fmean(answer.thought for answer in free),
            length=fmean(len(answer.completion.ids) for answer in free),
            thinking=forced.get(True),
            direct=forced.get(False),
            pass1=fmean(count / samples for count in right) if right else None,
            pass_k=fmean(pass_at_k(samples, count, k) for count in right) if right else None,
            k=k,
            examples=tuple(_example(answer, tokenizer) for answer in free[:EXAMPLES]),
        )
    return results


def _example(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    reply = parse(tokenizer, answer.completion.ids)
    return {
        "question": answer.problem.question,
        "thought": reply.reasoning,
        "answer": reply.content,
        "correct": answer.correct,
    }


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased chance that k of the samples hold a right one (arXiv 2107.03374 eq. 1)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def table(scores: dict[str, Scores], reasoning: Sequence[str]) -> dict[str, Any]:
    """Scores of all tasks as JSON, and the means over those that count as reasoning: {"tasks": …, "mean": …}. The mean
    is one over all tasks where none counts, and has the figures that all of them have."""
    tasks = {name: score.as_json() for name, score in scores.items()}
    counted = [tasks[name] for name in reasoning or tasks]
    figures = [figure for figure in counted[0] if figure not in ("n", "thought")]
    means = {f: fmean(task[f] for task in counted) for f in figures if all(f in task for task in counted)}
    return {"tasks": tasks, "mean": means}


def mean(scores: dict[str, Scores], figure: str, names: Sequence[str]) -> float:
    """Mean of a figure over the named tasks."""
    return fmean(getattr(scores[name], figure) for name in names)
