"""What a model is measured on while its recipe is carried out. A figure follows from the weights, the recipe and the
data alone, so that whoever replays a training can measure again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasklar.corpus import EVALUATION_SEED, Corpus
from glasklar.data.procedural import Mixture
from glasklar.engine.engine import Engine
from glasklar.eval.answers import ask
from glasklar.eval.network import expert_load, second_token_acceptance
from glasklar.eval.tasks import Scores, evaluate_tasks, mean, table
from glasklar.eval.text import bits_per_byte
from glasklar.model.transformer import Transformer
from glasklar.recipe import PretrainStage, Recipe, RLStage
from glasklar.tasks.base import Split


@dataclass(frozen=True)
class Measuring:
    """Evaluations as lines of the metrics, without their time."""

    recipe: Recipe
    corpus: Corpus

    def readiness(self, model: Transformer, stage: RLStage) -> dict[str, Any]:
        """Whether thinking is right often enough, and clearly better than answering at once, for RL to amplify it."""
        wanted = stage.readiness
        scores = self._scores(model, "valid", wanted.problems, modes=True)
        names = self.recipe.reasoning_tasks
        thinking, direct = mean(scores, "thinking", names), mean(scores, "direct", names)
        ready = thinking >= wanted.accuracy and thinking - direct >= wanted.margin
        return {"thinking": thinking, "direct": direct, "ready": ready, "wanted": wanted.model_dump()}

    def watch(self, model: Transformer, step: int) -> dict[str, Any]:
        """Greedy accuracy on validation problems while RL runs."""
        problems = self.recipe.evaluation.watched_problems
        scores = self._scores(model, "valid", problems, names=self.recipe.reasoning_tasks)
        line = {"evaluation": "rl step", "split": "valid", "step": step, **table(scores, self.recipe.reasoning_tasks)}
        return line | _examples(scores)

    def measured(self, index: int) -> bool:
        """Whether there is something to measure after a stage: bits per byte need held-out documents."""
        return bool(self.corpus.held_out) or not isinstance(self.recipe.stages[index], PretrainStage)

    def after(self, model: Transformer, index: int) -> dict[str, Any]:
        """After stage `index`: bits per byte on held-out documents; after all others the tasks, easy and hard."""
        stage, settings = self.recipe.stages[index], self.recipe.evaluation
        line: dict[str, Any] = {"evaluation": f"after {stage.kind}", "split": "test", "step": stage.steps}
        if not isinstance(stage, PretrainStage):
            sampling: dict[str, Any] = {"samples": settings.samples, "sampled_problems": settings.sampled_problems}
            scores = self._scores(model, "test", settings.problems, modes=True, **sampling)
            line |= table(scores, self.recipe.reasoning_tasks) | _examples(scores)
            hard = self._scores(model, "test", settings.problems, hard=True)
            line["hard"] = {name: score.as_json() for name, score in hard.items()}
            return line | self._network(model)
        line["bits_per_byte"] = bits_per_byte(
            model, self.corpus.tokenizer, self.corpus.held_out, length=stage.length, max_bytes=settings.held_out_bytes
        )
        return line

    def _scores(
        self,
        model: Transformer,
        split: Split,
        problems: int,
        *,
        names: Sequence[str] = (),
        hard: bool = False,
        **more: Any,
    ) -> dict[str, Scores]:
        entries = [e for e in self.recipe.tasks if e.name in (names or [t.name for t in self.recipe.tasks])]
        return evaluate_tasks(
            Engine(model),
            self.corpus.tokenizer,
            Mixture.of(entries, hard=hard),
            split=split,
            seed=EVALUATION_SEED,
            problems=problems,
            max_tokens=self.recipe.evaluation.max_tokens,
            **more,
        )

    def _network(self, model: Transformer) -> dict[str, Any]:
        """Acceptance of drafted second tokens and load of the experts, on greedy answers to test problems."""
        tokenizer, settings = self.corpus.tokenizer, self.recipe.evaluation
        mixture = Mixture.of(self.recipe.tasks)
        problems = [mixture.draw("test", EVALUATION_SEED, i) for i in range(settings.problems)]
        answers = ask(Engine(model), tokenizer, problems, max_tokens=settings.max_tokens)
        length = max(len(a.prompt) + len(a.completion.ids) for a in answers)
        found: dict[str, Any] = {}
        if len(model.mtp):
            found["second_token_acceptance"] = second_token_acceptance(model, tokenizer, answers, length=length)
        if self.recipe.model.is_moe:
            found["load_max_mean"] = expert_load(model, tokenizer, answers, length=length)
        return found


def _examples(scores: dict[str, Scores]) -> dict[str, Any]:
    """Some of the answers behind the figures, for people."""
    return {"examples": {name: list(score.examples) for name, score in scores.items()}}
