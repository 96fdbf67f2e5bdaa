"""Networks that learn the same text in the same loop for the same time: for stdlib.py and moe_dense.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glasklar.corpus import Corpus
from glasklar.data.batches import Batch, Packer
from glasklar.eval.text import bits_per_byte, bits_per_byte_of
from glasklar.learn.loop import train_step
from glasklar.learn.objectives import language_loss, targets, weighted_mean
from glasklar.learn.optim import make_optimizer
from glasklar.model.attention import document_mask
from glasklar.model.config import ModelConfig
from glasklar.model.cost import count_parameters, training_flops_per_token
from glasklar.model.init import build, initialise
from glasklar.ops.select import select
from glasklar.recipe import PretrainStage
from glasklar.runtime import Runtime

# Fields that make a network of ours dense; its width is set by `equal_active`.
DENSE = {"n_routed_experts": None, "num_experts_per_tok": None, "n_shared_experts": 0, "moe_intermediate_size": None,
         "first_k_dense_replace": 0}  # fmt: skip
POINTS = 10  # measurements on held-out text over a race
WARM = 5  # steps that tell how fast a network is


@dataclass
class Runner:
    """One network. `step(batch, rate)` trains, `measure(max_bytes)` gives bits per byte of held-out text."""

    name: str
    step: Callable[[Batch, float], None]
    measure: Callable[[int | None], float]
    active: int
    total: int
    flops_per_token: float
    curve: list[dict[str, float]] = field(default_factory=list)


def ours(name: str, config: ModelConfig, stage: PretrainStage, corpus: Corpus, runtime: Runtime) -> Runner:
    model = initialise(build(config, select(runtime), device=runtime.device, dtype=runtime.dtype), seed=0)
    optimizer = make_optimizer(model, stage.optimizer)
    objective = partial(language_loss, config=stage.language)

    def step(batch: Batch, rate: float) -> None:
        train_step(model, optimizer, [batch], objective, rate=rate, balance_speed=stage.language.balance_speed)

    def measure(max_bytes: int | None) -> float:
        return bits_per_byte(model, corpus.tokenizer, corpus.held_out, length=stage.length, max_bytes=max_bytes)

    parameters = count_parameters(config)
    flops = training_flops_per_token(config, stage.length)
    return Runner(name, step, measure, parameters.active, parameters.total, flops)


def equal_active(config: ModelConfig) -> ModelConfig:
    """The dense network of the same blocks whose parameters are as many as the active ones of `config`."""
    wanted, low, high = count_parameters(config).active, 16, 1 << 16
    while high - low > 16:
        middle = (low + high) // 32 * 16
        fits = count_parameters(config.replace(**DENSE, intermediate_size=middle)).active <= wanted
        low, high = (middle, high) if fits else (low, middle)
    return config.replace(**DENSE, intermediate_size=low)


def llama(config: ModelConfig, stage: PretrainStage, corpus: Corpus, runtime: Runtime) -> Runner:
    """transformers' Llama with as many parameters as `config` has active ones, the same heads, and our optimiser."""
    import transformers

    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    wanted = count_parameters(config).active - config.vocab_size * width
    hidden = max(16, round((wanted / layers - 4 * width * width) / (3 * width) / 16) * 16)
    torch.manual_seed(0)
    net: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, intermediate_size=hidden, max_position_embeddings=stage.length,
            attn_implementation="sdpa", use_cache=False, initializer_range=config.initializer_range,
        )
    ).to(runtime.dtype)  # fmt: skip
    optimizer = make_optimizer(net, stage.optimizer)

    def logprobs(batch: Batch) -> Tensor:
        mask = document_mask(batch.segments_BT, runtime.dtype)[:, None]
        logits = net(input_ids=batch.ids_BT, attention_mask=mask, position_ids=batch.position_BT).logits
        wanted, _ = targets(batch, 1)
        return -F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view(wanted.shape)

    def step(batch: Batch, rate: float) -> None:
        loss = -weighted_mean(logprobs(batch), targets(batch, 1)[1])
        loss.backward()
        optimizer.step(rate)

    @torch.inference_mode()
    def score(ids_BT: Tensor) -> Tensor:
        logits = net(input_ids=ids_BT).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, ids_BT[:, 1:, None])[..., 0]

    def measure(max_bytes: int | None) -> float:
        return bits_per_byte_of(score, corpus.tokenizer, corpus.held_out, length=stage.length, max_bytes=max_bytes)

    size = sum(p.numel() for p in net.parameters())
    matrices = sum(p.numel() for n, p in net.named_parameters() if p.ndim == 2 and "embed" not in n)
    flops = 6 * matrices + 6 * layers * 2 * width * (stage.length + 1) / 2
    return Runner("transformers' Llama", step, measure, size - config.vocab_size * width, size, flops)


def race(
    runner: Runner, stage: PretrainStage, corpus: Corpus, seconds: float, watched_bytes: int, flops: float | None = None
) -> dict[str, Any]:
    """Trains for so many seconds (measurements not counted), or for so many FLOPs however long they take. The schedule
    follows the budget, so that every network finishes its decay. Returns the curve over seconds and FLOPs, and bits per
    byte of all held-out files at the end."""
    packer = Packer(corpus.train, rows=stage.rows, length=stage.length, seed=0)
    of_step = stage.rows * stage.length * runner.flops_per_token
    all_steps = None if flops is None else max(1, round(flops / of_step))
    spent, share, k = 0.0, 0.0, 0
    marks = iter_marks()
    mark = next(marks)
    while share < 1:
        began = time.perf_counter()
        batch = packer.batch(k)
        guess = 1000 * stage.schedule.warmup if k < WARM else max(k + 1, round(k / share))
        runner.step(batch, stage.schedule.factor(k, all_steps or guess))
        spent += time.perf_counter() - began
        k += 1
        share = spent / seconds if all_steps is None else k / all_steps
        if share >= mark or share >= 1:
            point = {"seconds": spent, "flops": k * of_step}
            runner.curve.append({**point, "bits_per_byte": runner.measure(watched_bytes)})
            mark = next(marks, float("inf"))
    return {
        "name": runner.name,
        "parameters": runner.total,
        "active": runner.active,
        "steps": k,
        "tokens": k * stage.rows * stage.length,
        "seconds": spent,
        "flops": k * of_step,
        "curve": runner.curve,
        "bits_per_byte": runner.measure(None),
    }


def iter_marks() -> Iterator[float]:
    """After which shares of the budget to measure: often at first, where curves fall steeply."""
    for k in range(1, POINTS):
        yield (k / POINTS) ** 1.5
