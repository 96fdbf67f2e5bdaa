"""Problems to the engine, answers to the checkers: the one way in which evaluation and RL let a model answer.

Verdicts come from checkers alone: is the answer right, is the reply well-formed. No learned judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glasklar.data.chat import Message, parse, render
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.engine.request import Completion, SamplingParams
from glasklar.tasks.base import Problem, Task


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One judged answer to one problem.

    correct    the answer after the thinking solves the problem, and the reply is well-formed
    formed     thinking (or its absence) closed and the end-of-sentence token reached
    thought    the reply thinks before it answers
    """

    task: Task
    problem: Problem
    prompt: list[int]
    completion: Completion
    correct: bool
    formed: bool
    thought: bool

    @property
    def truncated(self) -> bool:
        return self.completion.finish == "length"


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[tuple[Task, Problem]],
    *,
    max_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    thinking: bool | None = None,
    instruction: str = "",
) -> list[Answer]:
    """`samples` judged answers to each problem, problem after problem; `thinking` as in `chat.render`; `instruction`
    stands in a line behind each question."""
    behind = f"\n{instruction}" if instruction else ""
    prompts = [render(tokenizer, [Message(role="user", content=p.question + behind)], thinking) for _, p in problems]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed + i, stop_ids=tokenizer.stop_ids)
        for i in range(len(repeated))
    ]
    completions = engine.generate(repeated, params)
    answers = []
    for i, completion in enumerate(completions):
        task, problem = problems[i // samples]
        reply = parse(tokenizer, completion.ids, thinking)
        answers.append(
            Answer(
                task=task,
                problem=problem,
                prompt=repeated[i],
                completion=completion,
                correct=reply.complete and task.check(problem, reply.content),
                formed=reply.complete,
                thought=bool(reply.reasoning.strip()),
            )
        )
    return answers
