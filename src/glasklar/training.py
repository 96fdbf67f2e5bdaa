"""A recipe being carried out: model, optimiser and position, and how its stages advance them. Knows no ledger, no
terminal and no clock, so that a run and a replay of it go the same way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from glasklar.corpus import Corpus, demonstration_tokens
from glasklar.data.batches import PackedDocuments, Packer
from glasklar.data.procedural import Mixture
from glasklar.distil import trace_tokens
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import computed_by
from glasklar.learn.optim import Optimizer, make_optimizer
from glasklar.learn.state import checkpoint_name, load_state
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer
from glasklar.ops.select import select
from glasklar.recipe import DistilStage, Recipe, RLStage, SFTStage
from glasklar.runtime import Runtime
from glasklar.stages import LanguageRunner, PolicyRunner, Runner


@dataclass(kw_only=True)
class Position:
    """Where a run stands; all of it goes into a checkpoint's meta.

    stage, step   the next step to do
    tokens        trained or sampled so far, over all stages
    """

    stage: int = 0
    step: int = 0
    tokens: int = 0
    skipped: list[str] = field(default_factory=list)


class Training:
    """Weights as the seed makes them, until `restore` puts a checkpoint in their place."""

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        runtime = replace(runtime, compute=recipe.compute)
        self.recipe, self.runtime = recipe, runtime
        self.position = Position()
        self.model = build(recipe.model, select(runtime), device=runtime.device, dtype=runtime.dtype)
        self.optimizer: Optimizer | None = None
        initialise(self.model, recipe.seed)

    def describe_machine(self) -> dict[str, Any]:
        """What a stranger needs to know of the machine to repeat the run: the table of ops among it."""
        return {**self.runtime.describe(), **computed_by(self.model)}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Goes back to a saved state."""
        self.position = Position(**{**meta["position"], "skipped": list(meta["position"]["skipped"])})
        self.optimizer = make_optimizer(self.model, self.recipe.stages[meta["made_by"]].optimizer)
        put_back(self.model, self.optimizer, tensors)

    def state(self, made_by: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and meta of a checkpoint, made by stage number `made_by`: all that the next step depends on."""
        assert self.optimizer is not None
        tensors = self.optimizer.state_tensors()
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        return tensors, {"recipe": self.recipe.hash, "made_by": made_by, "position": asdict(self.position)}

    def enter(self, index: int) -> None:
        """A stage begins with fresh moments; the fp32 masters go on from the stage before."""
        before = self.optimizer
        self.optimizer = make_optimizer(self.model, self.recipe.stages[index].optimizer)
        if before is not None:
            masters = {weight.name: weight.master for weight in before.weights}
            for weight in self.optimizer.weights:
                weight.master.copy_(masters[weight.name])

    def skip(self, index: int) -> None:
        """Leaves a stage out and says so in every later state."""
        self.position.skipped.append(self.recipe.stages[index].kind)
        self.position.stage = index + 1

    def runner(self, index: int, corpus: Corpus, checkpoints: Path) -> Runner:
        """What makes the steps of a stage that was entered or is gone on with.

        checkpoints   where the end of the stage before lies, which RL's KL penalty needs when it goes on
        """
        assert self.optimizer is not None
        stage, seed = self.recipe.stages[index], self.recipe.seed * 1000 + index
        if isinstance(stage, RLStage):
            reference = self._model_before(index, checkpoints) if stage.rollout.policy.kl_weight else None
            engine, mixture = Engine(self.model), Mixture.of(self.recipe.tasks)
            return PolicyRunner(stage, self.model, self.optimizer, engine, corpus.tokenizer, mixture, seed, reference)
        documents = corpus.train
        if isinstance(stage, SFTStage):
            documents = PackedDocuments.of(list(demonstration_tokens(self.recipe, stage, corpus.tokenizer)))
        if isinstance(stage, DistilStage):
            documents = PackedDocuments.of(list(trace_tokens(corpus.traces[index], corpus.tokenizer)))
        packer = Packer(documents, rows=stage.rows, length=stage.length, seed=seed)
        return LanguageRunner(stage, self.model, self.optimizer, packer, self.runtime.device)

    def advance(self, runner: Runner, index: int) -> dict[str, Any]:
        """One step; returns its figures. After a stage's last step the position is the next stage's first."""
        position = self.position
        figures = runner.step(position.step)
        position.step, position.tokens = position.step + 1, position.tokens + figures["tokens"]
        if position.step == self.recipe.stages[index].steps:
            position.stage, position.step = index + 1, 0
        return figures

    def _model_before(self, index: int, checkpoints: Path) -> Transformer:
        """The model as a stage found it: the reference of its KL penalty."""
        if self.position.step:
            before = self.recipe.stages[index - 1]
            name = checkpoint_name(index - 1, before.kind, before.steps)
            model = state_at(self.recipe, checkpoints / name, self.runtime)
        else:
            model = build(self.recipe.model, self.model.ops, device=self.runtime.device, dtype=self.runtime.dtype)
            model.load_state_dict(self.model.state_dict())
        return model.requires_grad_(False)


def state_at(recipe: Recipe, checkpoint: Path, runtime: Runtime) -> Transformer:
    """The model of a checkpoint. Raises CheckpointError if it is not there or damaged."""
    tensors, meta = load_state(checkpoint)
    runtime = replace(runtime, compute=recipe.compute)
    model = build(recipe.model, select(runtime), device=runtime.device, dtype=runtime.dtype)
    put_back(model, make_optimizer(model, recipe.stages[meta["made_by"]].optimizer), tensors)
    return model


def put_back(model: Transformer, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """A checkpoint's tensors back into a model and its optimiser."""
    optimizer.load_state_tensors({n: t for n, t in tensors.items() if not n.startswith("buffer.")})
    for name, buffer in model.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
