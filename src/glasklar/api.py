"""What the verbs do, as functions on values: used by the command line and by whoever imports glasklar."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from glasklar.corpus import EVALUATION_SEED, check_sources, prepare
from glasklar.data.chat import Message, parse, render
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.display import QuietReporter
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import computed_by
from glasklar.engine.request import SamplingParams
from glasklar.errors import CheckpointError, DataError, RecipeError, RequestError
from glasklar.eval.tasks import evaluate_tasks, table
from glasklar.eval.text import bits_per_byte
from glasklar.loading import Model, find_model
from glasklar.model.checkpoint import read_config
from glasklar.model.plan import Plan, StageBudget, Workload, plan_model, plan_stages
from glasklar.model.shapes import load_hardware, load_shape, shape_names
from glasklar.pipeline import Pipeline, Reporter, Stop
from glasklar.provenance.receipt import engine_identity, make_receipt, model_root
from glasklar.provenance.rundir import RunDir
from glasklar.provenance.signing import Signer
from glasklar.recipe import (
    AnyStage,
    DistilStage,
    PretrainStage,
    Recipe,
    RLStage,
    builtin_recipes,
    load_recipe,
    recipe_path,
)
from glasklar.runtime import Runtime
from glasklar.tasks.base import Split


def train(
    recipe: str,
    *,
    runtime: Runtime,
    home: Path,
    run: Path | None = None,
    seed: int | None = None,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> Path:
    """Carries a recipe out in a run folder, or goes on where it stopped; returns the folder.

    recipe   a built-in name or a path
    seed     in place of the recipe's
    run      default: `home`/runs/NAME
    stop     ends it with a checkpoint, as KeyboardInterrupt
    """
    loaded = load_recipe(recipe)
    if seed is not None:
        loaded = loaded.replace(seed=seed)
    folder = run or home / "runs" / loaded.name
    text = recipe_path(recipe).read_text(encoding="utf-8")
    if not RunDir(folder).identity_file.exists():
        check_sources(loaded, home)  # a mistyped path claims no folder
    with RunDir.create_or_open(folder, loaded.canonical(), text) as opened:
        new = not opened.ledger.events
        signed = bool(opened.ledger.of("released")) and opened.attestation_file.exists()
        try:
            Pipeline(loaded, opened, runtime, reporter or QuietReporter(), home, stop).execute()
        except DataError:
            if new and not opened.ledger.of("data"):
                opened.withdraw()  # what has not even data is no run, and its name is free for the mended recipe
            raise
        if not signed:  # what is signed stays as it was signed, by whomever
            # Here alone, since plots need matplotlib, which takes a second to load and looks for a folder of its own.
            from glasklar.audit.documents import write_documents
            from glasklar.audit.report import write_report
            from glasklar.audit.seal import seal

            write_report(opened)
            write_documents(opened)
            seal(opened, Signer.open(home))
    return folder


def evaluate(
    model: Model, *, split: str | None = None, problems: int | None = None, samples: int | None = None
) -> dict[str, Any]:
    """Accuracy of a model on the tasks of its own recipe: {"tasks": {NAME: {"pass@1": …}}, "mean": {…}}; of one that
    learned from text alone {"bits_per_byte": …} on the documents that its run kept from training.

    split      "test" (None), "valid" or "train"
    problems   of each task, 128 if None
    samples    answers at temperature 1 to each of them, 16 if None

    Raises CheckpointError for a model that carries no recipe, or no tasks and has no run around it; RequestError for an
    unknown split, for settings that a model without tasks does not have, and where no document was kept from training.
    """
    if split not in (None, *get_args(Split)):
        raise RequestError(f"split = {split!r}: use one of {', '.join(get_args(Split))}")
    recipe = recipe_of(model.folder)
    if not recipe.tasks:
        given = {"split": split, "problems": problems, "samples": samples}
        for name, value in given.items():
            if value is not None:
                raise RequestError(f"{name} = {value}: {model.name} learned from text, without tasks; leave it out")
        return {"evaluation": f"{model.name}, held out", "bits_per_byte": _held_out_bits(model, recipe)}

    part = cast(Split, split or "test")
    count, tries = 128 if problems is None else problems, 16 if samples is None else samples
    for name, number in (("problems", count), ("samples", tries)):
        if number < 1:
            raise RequestError(f"{name} = {number}: at least one is needed")

    def scores(hard: bool, modes: bool, samples: int) -> dict[str, Any]:
        return evaluate_tasks(
            Engine(model.network),
            speaking(model),
            Mixture.of(recipe.tasks, hard=hard),
            split=part,
            seed=EVALUATION_SEED,
            problems=count,
            max_tokens=recipe.evaluation.max_tokens,
            modes=modes,
            samples=samples,
            sampled_problems=count,
        )

    result = {"evaluation": f"{model.name}, {part}", "split": part}
    result |= table(scores(False, True, tries), recipe.reasoning_tasks)
    return result | {"hard": {name: score.as_json() for name, score in scores(True, False, 0).items()}}


def recipe_of(folder: Path) -> Recipe:
    """What a model was made by. Raises CheckpointError for models of others, whose tasks nobody knows."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no recipe.json, so its tasks are unknown; evaluate a model made by glasklar. Standard "
            "benchmarks: python -m glasklar.eval.lm_eval (it needs the package lm-eval)"
        )
    return Recipe.read(json.loads(path.read_text(encoding="utf-8")), str(path))


def _held_out_bits(model: Model, recipe: Recipe) -> float:
    """Bits per byte on the documents that the model's run kept from training."""
    data = RunDir(model.folder.absolute().parent).data
    if not (data / "facts.json").is_file():
        raise CheckpointError(
            f"{model.folder}: learned from text, without tasks, and the documents kept from its training are known in "
            "its run's folder only; evaluate the run"
        )
    corpus = prepare(recipe, data)
    if not corpus.held_out:
        raise RequestError(
            f"{model.name}: evaluation.held_out = {recipe.evaluation.held_out} kept none of its documents from "
            "training, so there is nothing to measure it on; train with a larger share, or with more documents"
        )
    length = max(stage.length for stage in recipe.stages if isinstance(stage, PretrainStage))
    return bits_per_byte(
        model.transformer,
        corpus.tokenizer,
        corpus.held_out,
        length=length,
        max_bytes=recipe.evaluation.held_out_bytes,
    )


def generate(
    model: Model,
    prompt: str | None,
    prompt_ids: str | None,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    signer: Signer | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """One answer: {"ids", "text", "reasoning", "logprobs", "finish"}. Exactly one of `prompt` (a user's message) and
    `prompt_ids` ("3,17,9") must be given; text and reasoning are None for a model without a tokenizer.

    signer, runtime   both given: a signed "receipt" comes with the answer
    """
    if (prompt is None) == (prompt_ids is None):
        raise RequestError("give either --prompt TEXT or --prompt-ids 3,17,9")
    if prompt_ids is not None:
        try:
            ids = [int(part) for part in prompt_ids.split(",")]
        except ValueError:
            raise RequestError(f"--prompt-ids {prompt_ids!r}: whole numbers separated by commas, please") from None
    else:
        ids = render(speaking(model), [Message(role="user", content=cast(str, prompt))], None)
    stop = () if model.tokenizer is None else model.tokenizer.stop_ids
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_ids=stop)
    [completion] = Engine(model.network, max_slots=1).generate([ids], params)
    reply = None if model.tokenizer is None else parse(model.tokenizer, completion.ids, None)
    answer: dict[str, Any] = {
        "ids": completion.ids,
        "text": None if reply is None else reply.content,
        "reasoning": None if reply is None else reply.reasoning,
        "logprobs": completion.logprobs,
        "finish": completion.finish,
    }
    if signer is not None and runtime is not None:
        answer["receipt"] = make_receipt(
            signer,
            model=model_root(model.folder),
            engine=engine_identity({**runtime.describe(), **computed_by(model.network)}),
            prompt=ids,
            sampling=asdict(params),
            guide=None,
            ids=completion.ids,
            logprobs=completion.logprobs,
            finish=completion.finish,
            exact=True,
        )
    return answer


def speaking(model: Model) -> Tokenizer:
    """The model's tokenizer. Raises CheckpointError where it has none."""
    if model.tokenizer is None:
        raise CheckpointError(f"{model.folder}: has no tokenizer.json; it can be asked with --prompt-ids only")
    return model.tokenizer


def plan(target: str, *, hardware: str, home: Path, tokens: float | None = None) -> Plan:
    """What a recipe, a published shape or a model asks of a machine. `tokens`: training tokens, for shapes and models.

    Raises RecipeError for unknown names, and for `tokens` beside a recipe, whose stages say it themselves.
    """
    device = load_hardware(hardware)
    if target.endswith(".toml") or target in builtin_recipes():
        if tokens is not None:
            raise RecipeError(f"--tokens {tokens:g}: a recipe has its own budget; leave it out")
        recipe = load_recipe(target)
        return plan_stages(
            recipe.model, [budget(stage, home) for stage in recipe.stages], device, workload=workload(recipe)
        )
    if target in shape_names():
        return plan_model(load_shape(target).config, device, tokens=tokens)
    try:
        config = read_config(find_model(target, home))
    except CheckpointError as error:
        known = ", ".join([*builtin_recipes(), *shape_names()])
        raise RecipeError(f"{target!r} is no recipe, shape or model; built in: {known}. {error}") from None
    return plan_model(config, device, tokens=tokens)


def workload(recipe: Recipe) -> Workload:
    """How a recipe trains and is served: its longest rows, its largest batch, its optimisers."""
    lengths = [stage.rollout.length if isinstance(stage, RLStage) else stage.length for stage in recipe.stages]
    batches = [
        stage.rollout.prompts * stage.rollout.samples * stage.rollout.max_tokens // stage.rollout.updates
        if isinstance(stage, RLStage)
        else (stage.micro or stage.rows) * stage.length
        for stage in recipe.stages
    ]
    kinds = [stage.optimizer.kind for stage in recipe.stages]
    largest = "adamw" if "adamw" in kinds else kinds[0]
    return Workload(context=max(lengths), batch_tokens=max(batches), optimizer=largest)


def budget(stage: AnyStage, home: Path) -> StageBudget:
    """Tokens of a stage and length of its rows: trained ones; for RL, and beside them for a teacher that is found, the
    most and longest that answers may get."""
    if isinstance(stage, RLStage):
        rollout = stage.rollout
        made = stage.steps * rollout.rounds * rollout.prompts * rollout.samples * rollout.max_tokens
        return StageBudget(stage.kind, made, "rl", rollout.length)
    trained = StageBudget(stage.kind, stage.steps * stage.rows * stage.length, stage.kind, stage.length)
    if isinstance(stage, DistilStage):
        try:
            teacher = read_config(find_model(stage.teacher, home))
        except CheckpointError:  # the plan says that it counts a teacher only where it is at hand
            return trained
        return trained._replace(taught=float(stage.problems * stage.samples * stage.max_tokens), teacher=teacher)
    return trained
