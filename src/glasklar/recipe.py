"""A recipe: the one TOML file that determines a model. Here the sections of all rooms are put together and checked."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from glasklar.config import Section, read_toml
from glasklar.data.cleaning import Cleaning
from glasklar.data.documents import HubSource, JsonlSource, ParquetSource, StdlibSource, TextSource
from glasklar.data.procedural import Mixture, TaskEntry, TaskSource
from glasklar.engine.packed import Quantisation
from glasklar.errors import RecipeError
from glasklar.learn.objectives import LanguageConfig
from glasklar.learn.optim import OptimizerConfig
from glasklar.learn.schedule import ScheduleConfig
from glasklar.model.config import ModelConfig
from glasklar.rl.loop import RolloutConfig
from glasklar.runtime import Precision

Source = Annotated[
    TaskSource | TextSource | JsonlSource | ParquetSource | HubSource | StdlibSource, Field(discriminator="kind")
]
Steps = Annotated[int, Field(ge=1, le=10_000_000)]


class TokenizerConfig(Section):
    """Byte-level BPE trained on the recipe's own documents (on the first `sample` of them)."""

    vocab_size: int = Field(ge=272, le=1 << 18)
    sample: int = Field(default=20_000, ge=1)


class Stage(Section):
    """What all stages have.

    steps              optimisation steps: the budget is counted in steps, so that a run can be repeated bit for bit
    checkpoint_every   steps between checkpoints; the end of a stage always has one
    """

    steps: Steps
    checkpoint_every: int = Field(default=100, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    language: LanguageConfig = LanguageConfig()


class LanguageStage(Stage):
    """What stages of likelihood have: a step sees `rows` packed rows of `length` tokens, `micro` at a time."""

    rows: int = Field(ge=1)
    length: int = Field(ge=8)
    micro: int | None = Field(default=None, ge=1)


class PretrainStage(LanguageStage):
    """Next-token prediction on the sources."""

    kind: Literal["pretrain"] = "pretrain"


class SFTStage(LanguageStage):
    """Demonstrations in chat form, loss on the reply alone.

    demonstrations   how many exist: a finite set, as in R1's cold start
    thoughts         share of them that think before they answer
    """

    kind: Literal["sft"] = "sft"
    demonstrations: int = Field(ge=1)
    thoughts: float = Field(default=0.5, ge=0, le=1)


class DistilStage(LanguageStage):
    """A teacher's right answers as demonstrations, loss on the reply alone (R1's distillation): see `distil.py`.

    teacher        a run, a model folder or the hub id of a pulled model
    teacher_root   the one model of that name that will do, by `model_root` (absent: any; the ledger says which it was)
    licence        of its answers
    quantize       its weights as "int8" or "int4", to ask it faster
    problems       training problems put to it; samples: answers to each, of which every different right one is kept
    thinking       whether it must think, must not, or chooses (absent)
    instruction    told to the teacher behind each question, never to the student
    """

    kind: Literal["distil"] = "distil"
    teacher: str = Field(min_length=1)
    teacher_root: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    licence: str = "unknown"
    quantize: Quantisation | None = None
    problems: int = Field(ge=1, le=100_000_000)
    samples: int = Field(default=1, ge=1, le=1024)
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: int = Field(default=96, ge=1)
    thinking: bool | None = None
    instruction: str = ""

    @model_validator(mode="after")
    def _varied(self) -> DistilStage:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples = {self.samples} at temperature = 0 are all equal; take one, or a temperature")
        return self


class Readiness(Section):
    """RL sharpens what a model can already do: it begins only where thinking is right often enough, and clearly better.

    problems   validation problems a task
    accuracy   least mean accuracy when thinking is forced
    margin     by how much that must exceed the accuracy without thinking
    """

    problems: int = Field(default=64, ge=8)
    accuracy: float = Field(default=0.8, ge=0, le=1)
    margin: float = Field(default=0.1, ge=0, le=1)


class RLStage(Stage):
    """GRPO on unlimited problems with nothing but the checkers."""

    kind: Literal["rl"] = "rl"
    rollout: RolloutConfig = RolloutConfig()
    readiness: Readiness = Readiness()
    evaluate_every: int = Field(default=10, ge=1)


AnyStage = Annotated[PretrainStage | SFTStage | DistilStage | RLStage, Field(discriminator="kind")]


class EvaluationConfig(Section):
    """What is measured after each stage.

    problems           held-out problems a task, greedy
    samples            answers at temperature 1 to each of `sampled_problems`, for pass@1 and pass@16
    watched_problems   validation problems a task while RL runs
    held_out           share of source documents that are never trained on, for bits per byte
    held_out_bytes     measured of them after pretraining (absent: all)
    """

    problems: int = Field(default=128, ge=1)
    samples: int = Field(default=16, ge=1)
    sampled_problems: int = Field(default=32, ge=1)
    watched_problems: int = Field(default=32, ge=1)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    held_out_bytes: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=96, ge=1)


class Recipe(Section):
    """The whole file. `seed` fixes weights, data order and sampling."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    compute: Precision = "bf16"
    model: ModelConfig
    tokenizer: TokenizerConfig
    tasks: tuple[TaskEntry, ...] = ()
    sources: tuple[Source, ...] = Field(min_length=1)
    cleaning: Cleaning | None = None
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        needs_tasks: list[str] = [s.kind for s in self.stages if s.kind != "pretrain"]
        needs_tasks += [s.kind for s in self.sources if s.kind == "tasks"]
        if needs_tasks and not self.tasks:
            raise ValueError(f"{needs_tasks[0]!r} needs at least one entry in [[tasks]]")
        if not self.reasoning_tasks and any(isinstance(stage, RLStage) for stage in self.stages):
            raise ValueError("'rl' trains the tasks that count as reasoning, and none does; set reason = true in one")
        if self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size = {self.model.vocab_size} and tokenizer.vocab_size = {self.tokenizer.vocab_size} "
                "must be equal"
            )
        longest = max(s.rollout.length if isinstance(s, RLStage) else s.length for s in self.stages)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"rows of {longest} tokens exceed model.max_position_embeddings = {self.model.max_position_embeddings}"
            )
        for stage in self.stages:
            if not isinstance(stage, RLStage) and stage.rows % (stage.micro or stage.rows):
                raise ValueError(f"rows = {stage.rows} is no multiple of micro = {stage.micro}")
        return self

    @model_serializer(mode="wrap")
    def _absent_stays_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that does not speak of cleaning has no word of it in its canonical text."""
        return {name: value for name, value in handler(self).items() if name != "cleaning" or value is not None}

    @property
    def reasoning_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that RL trains and that count in the mean."""
        return tuple(entry.name for entry in self.tasks if entry.reason)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical text: two recipes that mean the same have the same hash."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("glasklar") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if _is_recipe(item.name))


def _is_recipe(name: str) -> bool:
    return name.endswith(".toml") and name != "hardware.toml"


def recipe_path(name_or_path: str) -> Path:
    """The file behind a built-in name or a path. Raises RecipeError for a name that is not built in."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.name != name_or_path:
        return path
    if name_or_path not in builtin_recipes():
        known = ", ".join(builtin_recipes())
        raise RecipeError(
            f"no built-in recipe {name_or_path!r} (there are: {known}); a file is given by its path, ./NAME.toml"
        )
    return Path(str(resources.files("glasklar") / "recipes" / f"{name_or_path}.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or a file by path. Raises RecipeError naming what is wrong and where."""
    path = recipe_path(name_or_path)
    recipe = Recipe.read(read_toml(path), path.name)
    for hard in (False, True):
        Mixture.of(recipe.tasks, hard=hard)  # unknown tasks and options are errors of the recipe, not of a later stage
    return recipe
