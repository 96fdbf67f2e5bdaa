"""One GRPO step beside TRL's: 16 prompts x 16 answers of up to 48 tokens, sampled, rewarded, learned from.

Both start from the same random weights of `spark`'s network; the reward is a coin that the answer itself decides, and
truncated answers count, as they do in TRL's default. Lengths are not forced: compared are sampled tokens per second of
the median step. TRL is at the best of three precisions, and samples with transformers' `generate`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glasklar.corpus import prepare as prepare_corpus
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.eval.answers import ask
from glasklar.learn.loop import train_step
from glasklar.learn.optim import make_optimizer
from glasklar.model.checkpoint import save_model
from glasklar.model.init import build, initialise
from glasklar.ops.select import select
from glasklar.recipe import Recipe, RLStage, load_recipe
from glasklar.rl.objective import group_advantages, policy_loss
from glasklar.rl.rollout import pack
from glasklar.runtime import Runtime

PROMPTS, SAMPLES, TOKENS = 16, 16, 48
STEPS, WARM = 6, 2
# TRL's variants: type of the weights, and whether products are cast to bf16.
PEERS = {"autocast": (torch.float32, True), "bf16 weights": (torch.bfloat16, True), "fp32": (torch.float32, False)}


def coin(ids: list[int]) -> float:
    """A reward that differs within groups and costs nothing."""
    return float(sum(ids) % 2)


def ours(recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime) -> Callable[[int], int]:
    """`step(k)` does one GRPO step and returns the number of tokens that were sampled."""
    stage = next(stage for stage in recipe.stages if isinstance(stage, RLStage))
    model = initialise(build(recipe.model, select(runtime), dtype=runtime.dtype), seed=0)
    optimizer, engine = make_optimizer(model, stage.optimizer), Engine(model)
    mixture = Mixture.of(recipe.tasks)

    def step(k: int) -> int:
        engine.refresh()
        problems = [mixture.draw("train", 0, k * PROMPTS + i) for i in range(PROMPTS)]
        answers = ask(
            engine, tokenizer, problems, max_tokens=TOKENS, samples=SAMPLES, temperature=1.0, seed=k << 20
        )  # fmt: skip
        rewards = torch.tensor([coin(answer.completion.ids) for answer in answers])
        advantages = group_advantages(rewards, SAMPLES)
        part = pack(answers, advantages, tokenizer, length=stage.rollout.length, rows_multiple=8)
        # Almost every answer of random weights is truncated; left out of the loss, there would be little to learn from.
        sampled_BT = (part.sampled_BT != 0).to(part.batch.weight_BT.dtype)
        part = replace(part, batch=replace(part.batch, weight_BT=sampled_BT))
        train_step(
            model, optimizer, [part], lambda m, b: policy_loss(m, b, stage.rollout.policy, stage.language),
            rate=1.0, balance_speed=stage.language.balance_speed,
        )  # fmt: skip
        return sum(len(answer.completion.ids) for answer in answers)

    return step


def trl(recipe: Recipe, folder: Path, dtype: torch.dtype, autocast: bool) -> tuple[list[float], list[int]]:
    """Seconds of each of TRL's steps on transformers' DeepseekV3 with the same weights, and tokens sampled in each."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    transformers.utils.logging.set_verbosity_error()
    mixture = Mixture.of(recipe.tasks)
    questions = [mixture.draw("train", 0, i)[1].question for i in range(PROMPTS * (STEPS + WARM))]
    times: list[float] = []
    tokens: list[int] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [coin(ids) for ids in completion_ids]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]

    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS + WARM, per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES, max_completion_length=TOKENS, temperature=1.0, beta=0.0, learning_rate=3e-4,
        bf16=autocast, use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": questions}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[Clock()],
    )
    trainer.train()
    return times[WARM:], tokens[WARM:]


def measure(runtime: Runtime) -> dict[str, Any]:
    """Ours before, between and after TRL's variants, so that a machine that slows down slows both."""
    recipe = load_recipe("spark")
    recipe = recipe.replace(model=recipe.model.replace(num_nextn_predict_layers=0))  # transformers leaves MTP out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = recipe.sources[0].replace(documents=2000)
        corpus = prepare_corpus(recipe.replace(sources=(small,)), folder / "data")
        model = initialise(build(recipe.model, dtype=torch.float32), seed=0)
        save_model(model, folder / "model", extra=corpus.tokenizer.files())
        step = ours(recipe, corpus.tokenizer, runtime)
        mine: list[float] = []
        sampled: list[int] = []

        def turn() -> None:
            for _ in range(STEPS + (0 if mine else WARM)):
                began = time.perf_counter()
                sampled.append(step(len(sampled)))
                mine.append(time.perf_counter() - began)
            if len(mine) == STEPS + WARM:
                del mine[:WARM]

        turn()
        theirs = {}
        for label, (dtype, autocast) in PEERS.items():
            theirs[label] = trl(recipe, folder / "model", dtype, autocast)
            turn()
    found = {label: _row(label, *figures) for label, figures in theirs.items()}
    rows = {
        "ours": _row(select(runtime).name, mine, sampled[WARM:]),
        "TRL": max(found.values(), key=lambda row: row["tokens_per_second"]),
    }
    ratio = rows["ours"]["tokens_per_second"] / rows["TRL"]["tokens_per_second"]
    return {
        "shape": f"GRPO step, {PROMPTS} x {SAMPLES} answers of up to {TOKENS} tokens",
        "threads": runtime.threads,
        "rows": rows,
        "ratios": [{"speed": "ours", "over": "TRL", "ratio": round(ratio, 3), "required": 2.0, "goal": 5.0}],
    }


def _row(variant: str, seconds: list[float], sampled: list[int]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    tokens = statistics.mean(sampled)
    return {
        "variant": variant,
        "ms": round(middle * 1e3, 1),
        "tokens_per_second": round(tokens / middle),
        "tokens_per_step": round(tokens),
    }
