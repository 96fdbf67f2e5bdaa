"""A network on a machine, before anything runs: hours, energy and money to train it, memory and speed to serve it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field

from glasklar.config import Section
from glasklar.errors import RecipeError
from glasklar.model import cost
from glasklar.model.config import ModelConfig
from glasklar.model.cost import OptimizerKind

StageKind = Literal["pretrain", "sft", "distil", "rl"]

SECONDS_PER_HOUR = 3600
# Below this many active parameters, small operations and not products take the time; see docs/plan.md.
SMALL_NETWORK = 10_000_000

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Hardware(Section):
    """One device. Figures are those of the vendor, shares are assumptions; sources stand in recipes/hardware.toml.

    flops           peak FLOP/s of dense bf16 products
    mfu             share of it that training reaches, MTP counted as work
    memory_bytes    memory of the device
    bandwidth       peak bytes/s of that memory
    mbu             share of it that decoding reaches
    layer_seconds   least time of one layer in one decoding pass: calls and small operations
    watts           rated power of the device under load; host and cooling not included
    usd_per_hour    rent, or electricity where one owns it
    """

    name: str
    description: str
    flops: Positive
    mfu: Share
    memory_bytes: Annotated[int, Field(gt=0)]
    bandwidth: Positive
    mbu: Share
    layer_seconds: Annotated[float, Field(ge=0)]
    watts: Positive
    usd_per_hour: Annotated[float, Field(ge=0)]

    def compute_hours(self, flops: float) -> float:
        """Hours of one device for so many FLOPs at its `mfu`."""
        return flops / (self.flops * self.mfu) / SECONDS_PER_HOUR


def decode_speed(
    config: ModelConfig, hardware: Hardware, *, context: int, sequences: int = 1, bits_per_weight: float = 16.0
) -> float:
    """Tokens per second of all `sequences`: the slower of memory and arithmetic, and each layer's least time."""
    read = cost.decode_bytes(config, context=context, sequences=sequences, bits_per_weight=bits_per_weight)
    arithmetic = sequences * cost.decode_flops_per_token(config, context) / (hardware.flops * hardware.mfu)
    fixed = config.num_hidden_layers * hardware.layer_seconds
    return sequences / (max(read / (hardware.bandwidth * hardware.mbu), arithmetic) + fixed)


class StageBudget(NamedTuple):
    """Tokens of a stage: trained ones, or for "rl" sampled ones, which are then also trained on; in sequences of
    `context` tokens (None: those of the workload). For "distil" a teacher samples `taught` tokens before; without
    `teacher`, its shape, they are not counted."""

    name: str
    tokens: float
    kind: StageKind
    context: int | None = None
    taught: float = 0.0
    teacher: ModelConfig | None = None


class StagePlan(Section):
    name: str
    kind: StageKind
    tokens: float
    flops: float
    hours: float
    energy_kwh: float
    cost_usd: float


class Plan(Section):
    """What to expect. Hours are device hours: n devices take 1/n of them. None where no stage was planned.

    FLOPs per token and the cache speak of the network without MTP; `flops_per_token_mtp` comes on top in "pretrain",
    "sft" and "distil". `devices_*` is how many of the hardware's memories it takes.
    """

    params_total: int
    params_active: int
    params_mtp: int
    params_embedding: int
    flops_per_token_train: int
    flops_per_token_mtp: int
    flops_per_token_prefill: int
    flops_per_token_decode: int
    cache_bytes_per_token: int
    memory_training_bytes: int
    memory_serving_bytes: int
    devices_training: int
    devices_serving: int
    decode_tokens_per_second: float
    hours: float | None
    energy_kwh: float | None
    cost_usd: float | None
    hardware: str
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]


class Workload(Section):
    """How the network is trained and served. Lengths and counts are in tokens and sequences.

    context           tokens of a training sequence, of a prompt, and of what a decoded token sees
    batch_tokens      tokens whose activations are held at once in training
    sequences         served at once
    rollouts          decoded at once in RL
    bits_per_weight   of the served weights
    """

    context: Annotated[int, Field(ge=1)] = 4096
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    sequences: Annotated[int, Field(ge=1)] = 1
    rollouts: Annotated[int, Field(ge=1)] = 64
    bits_per_weight: Annotated[float, Field(gt=0, le=32)] = 16.0
    optimizer: OptimizerKind = "adamw"


def plan_model(
    config: ModelConfig, hardware: Hardware, *, tokens: float | None = None, workload: Workload | None = None
) -> Plan:
    """The plan of a shape; `tokens` of pretraining give it hours, energy and cost."""
    stages = [] if tokens is None else [StageBudget("pretrain", tokens, "pretrain")]
    return plan_stages(config, stages, hardware, workload=workload)


def plan_stages(
    config: ModelConfig,
    stages: Sequence[StageBudget | tuple[str, float, StageKind]],
    hardware: Hardware,
    *,
    workload: Workload | None = None,
) -> Plan:
    """The plan of a recipe. Raises RecipeError for an unknown kind of stage or a budget that is no positive number."""
    s = workload or Workload()
    staged = tuple(_plan_stage(config, StageBudget(*stage), hardware, s) for stage in stages)
    counts = cost.count_parameters(config)
    training = cost.training_memory(config, batch_tokens=s.batch_tokens, context=s.context, optimizer=s.optimizer).peak
    serving = cost.serving_memory(config, context=s.context, sequences=s.sequences, bits_per_weight=s.bits_per_weight)
    return Plan(
        params_total=counts.total,
        params_active=counts.active,
        params_mtp=counts.mtp,
        params_embedding=counts.embedding,
        flops_per_token_train=cost.training_flops_per_token(config, s.context),
        flops_per_token_mtp=cost.mtp_flops_per_token(config, s.context),
        flops_per_token_prefill=cost.prefill_flops_per_token(config, s.context),
        flops_per_token_decode=cost.decode_flops_per_token(config, s.context),
        cache_bytes_per_token=cost.cache_bytes_per_token(config),
        memory_training_bytes=training,
        memory_serving_bytes=serving,
        devices_training=math.ceil(training / hardware.memory_bytes),
        devices_serving=math.ceil(serving / hardware.memory_bytes),
        decode_tokens_per_second=decode_speed(
            config, hardware, context=s.context, sequences=s.sequences, bits_per_weight=s.bits_per_weight
        ),
        hours=sum(stage.hours for stage in staged) if staged else None,
        energy_kwh=sum(stage.energy_kwh for stage in staged) if staged else None,
        cost_usd=sum(stage.cost_usd for stage in staged) if staged else None,
        hardware=hardware.name,
        stages=staged,
        assumptions=tuple(_assumptions(config, staged, hardware, s)),
    )


def _plan_stage(config: ModelConfig, stage: StageBudget, hardware: Hardware, workload: Workload) -> StagePlan:
    name, tokens, kind = stage[:3]
    context = stage.context or workload.context
    if kind not in get_args(StageKind):
        raise RecipeError(f"stage {name!r}: kind = {kind!r}; known kinds are {', '.join(get_args(StageKind))}")
    if not (math.isfinite(tokens) and tokens > 0):
        raise RecipeError(f"stage {name!r}: tokens = {tokens}; give a positive number")
    flops = tokens * cost.training_flops_per_token(config, context)
    if kind == "rl":
        hours = hardware.compute_hours(flops)
        speed = decode_speed(config, hardware, context=context, sequences=workload.rollouts)
        hours += tokens / speed / SECONDS_PER_HOUR
        flops += tokens * cost.decode_flops_per_token(config, context)
    else:
        flops += tokens * cost.mtp_flops_per_token(config, context)
        hours = hardware.compute_hours(flops)
    if stage.teacher is not None:
        speed = decode_speed(stage.teacher, hardware, context=context, sequences=workload.rollouts)
        hours += stage.taught / speed / SECONDS_PER_HOUR
        flops += stage.taught * cost.decode_flops_per_token(stage.teacher, context)
    return StagePlan(
        name=name,
        kind=kind,
        tokens=float(tokens),
        flops=float(flops),
        hours=hours,
        energy_kwh=hours * hardware.watts / 1000,
        cost_usd=hours * hardware.usd_per_hour,
    )


def _assumptions(config: ModelConfig, stages: Sequence[StagePlan], hardware: Hardware, s: Workload) -> Iterator[str]:
    """What the figures rest on, in plain words."""
    yield (
        "Parameters: the total leaves the multi-token prediction modules out; active are those that one token is "
        "multiplied with (chosen experts, the head, not the embedding table)."
    )
    yield (
        f"FLOPs: products only, in sequences of {s.context:,} tokens (stages of a recipe: of their own length) with "
        "causal attention; the backward pass costs twice the forward pass; decoding runs over the cached latents."
    )
    yield (
        f"Memory: training holds bf16 weights and gradients, fp32 masters and {s.optimizer} moments, and activations "
        f"of {s.batch_tokens:,} tokens (an estimate, nothing recomputed); serving holds weights of "
        f"{s.bits_per_weight:g} bits and a bf16 cache for {s.sequences:,} x {s.context:,} tokens."
    )
    yield (
        f"Decoding: {hardware.mbu:.0%} of the memory bandwidth of {hardware.bandwidth / 1e9:,.0f} GB/s, and at least "
        f"{hardware.layer_seconds * 1e6:,.0f} microseconds a layer."
    )
    if stages:
        yield from _stage_assumptions(config, stages, hardware, s)


def _stage_assumptions(
    config: ModelConfig, stages: Sequence[StagePlan], hardware: Hardware, s: Workload
) -> Iterator[str]:
    yield (
        f"Hours: those of one {hardware.name} that reaches {hardware.mfu:.1%} of {hardware.flops / 1e12:,.3g} TFLOP/s; "
        "with n devices divide by n. Data, evaluations, checkpoints and failed runs are not included."
    )
    if config.num_nextn_predict_layers:
        yield "Multi-token prediction is trained in all stages but RL (its FLOPs come on top)."
    if any(stage.kind == "rl" for stage in stages):
        yield (
            f"RL: every token is decoded once, {s.rollouts:,} sequences at a time, and trained on once; prompts and "
            "repeated sampling come on top."
        )
    if any(stage.kind == "distil" for stage in stages):
        yield (
            f"Distillation: the teacher's answers, of full length and {s.rollouts:,} at a time, are counted where the "
            "teacher is at hand; its prompts come on top."
        )
    if cost.count_parameters(config).active < SMALL_NETWORK:
        yield "The network is so small that small operations take much of the time: expect up to three times the hours."
    yield f"Energy: {hardware.watts:g} W for every hour, the device alone, without host and cooling."
    yield f"Cost: {hardware.usd_per_hour:g} USD an hour."
