"""The manifest: all that the documents about a model say in figures, taken from the record of its run alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glasklar.audit.facts import RunFacts, unique
from glasklar.model.config import ModelConfig
from glasklar.model.cost import cache_bytes_per_token, count_parameters
from glasklar.provenance.energy import JOULES_PER_KWH, USD_PER_KWH

# (English, German) -> the one that is wanted.
Say = Callable[[str, str], str]
LANGUAGES: dict[str, Say] = {"en": lambda en, de: en, "de": lambda en, de: de}

# Cumulated training compute, FLOP: from where a model counts as general-purpose (Commission guidelines of July 2025),
# and from where it is presumed to carry systemic risk (Regulation (EU) 2024/1689, Article 51(2)).
GENERAL_PURPOSE_FLOP, SYSTEMIC_RISK_FLOP = 1e23, 1e25
DOCUMENT_LICENCE, CODE_LICENCE = "CC0-1.0", "MIT"
# A model of the built-in sources alone is under the project's licence; of other data, its maker has to say.
BUILT_IN, BUILT_IN_LICENCE = {"tasks", "stdlib"}, "MIT"


def manifest(facts: RunFacts) -> dict[str, Any]:
    """JSON values only. The record must reach to the release."""
    run, data, released = facts.of("run")[0], facts.of("data")[0], facts.of("released")[-1]
    recipe = facts.recipe
    return {
        "name": recipe["name"],
        "description": recipe.get("description", ""),
        "released": next(event.time for event in reversed(facts.events) if event.event == "released"),
        "licence": BUILT_IN_LICENCE if _built_in(recipe) and "traces" not in data else "other",
        "languages": ["en", "de"] if _built_in(recipe) else [],
        "recipe": {"hash": run["recipe"], "seed": run["seed"]},
        "model": _model(recipe),
        "data": {**data, "sources": [*map(_source, recipe["sources"]), *map(_taught, data.get("traces", {}).values())]},
        "tasks": [{"name": task["name"], "reasoning": task.get("reason", True)} for task in recipe["tasks"]],
        "training": _training(facts),
        "evaluation": facts.after_rl or facts.before_rl or {},
        "before_reinforcement": (facts.before_rl or {}) if facts.after_rl else {},
        "bits_per_byte": facts.bits_per_byte,
        "demonstrations": sum(stage["demonstrations"] for stage in recipe["stages"] if stage["kind"] == "sft"),
        "skipped": released["skipped"],
        "code": run["code"],
        "machine": run["machine"],
        "packages": run["packages"],
        "files": released["files"],
        "ledger": {"head": facts.events[-1].hash, "events": len(facts.events)},
        "interrupted": len(facts.of("resumed")),
        "ended_early": facts.ends(),
        "lost": dict(zip(("steps", "seconds"), facts.lost, strict=True)),
    }


def _built_in(recipe: dict[str, Any]) -> bool:
    return {source["kind"] for source in recipe["sources"]} <= BUILT_IN


def _model(recipe: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig.read(recipe["model"], "recipe")
    size = count_parameters(config)
    return {
        "design": "DeepSeek-V3" if config.is_mla and config.is_moe else "transformer decoder",
        "parameters": size.total,
        "active_parameters": size.active,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "experts": config.n_routed_experts or 0,
        "attention": "multi-head latent attention" if config.is_mla else "grouped-query attention",
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "precision": recipe["compute"],
    }


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """synthetic: made by programs of this project or by a model; of the latter, its root is named."""
    kind = source["kind"]
    names = {"tasks": "problems made up by programs", "stdlib": "source of the Python standard library"}
    licences = {"tasks": "CC0-1.0", "stdlib": "PSF-2.0"}
    return {
        "kind": kind,
        "name": names.get(kind) or str(source.get("id") or source.get("path") or kind),
        "licence": licences.get(kind) or source.get("licence", "unknown"),
        "date": source.get("date", ""),
        "synthetic": kind == "tasks",
    }


def _taught(traces: dict[str, Any]) -> dict[str, Any]:
    """A teacher's answers as a source."""
    return {
        "kind": "distil",
        "name": f"{traces['kept']:,} right answers of the model {traces['teacher']} ({traces['teacher_root'][:16]}…)",
        "licence": traces["licence"],
        "date": "",
        "synthetic": True,
    }


def _training(facts: RunFacts) -> dict[str, Any]:
    costs = facts.costs()
    flops, joules = sum(cost.flops for cost in costs), sum(cost.joules for cost in costs)
    energies = [segment["energy"] for segment in facts.of("checkpoint")]
    return {
        "stages": [
            {
                "kind": cost.kind,
                "steps": cost.steps,
                "tokens": cost.tokens,
                "flop": cost.flops,
                "seconds": cost.seconds,
                "kwh": cost.joules / JOULES_PER_KWH,
            }
            for cost in costs
        ],
        "segments": [_segment(segment) for segment in facts.of("checkpoint")],
        "flop": flops,
        "seconds": facts.seconds,
        "kwh": joules / JOULES_PER_KWH,
        "usd": sum(cost.usd for cost in costs),
        "energy_source": facts.energy_source,
        "energy_sources": unique(energy["source"] for energy in energies),
        "energy_coverage": min((energy["coverage"] for energy in energies), default=0.0),
        "share_of_general_purpose": flops / GENERAL_PURPOSE_FLOP,
        "share_of_systemic_risk": flops / SYSTEMIC_RISK_FLOP,
    }


def _segment(data: dict[str, Any]) -> dict[str, Any]:
    """Work, time, energy and cost from one recorded state to the next; in records without costs they follow."""
    kwh = data["energy"]["joules"] / JOULES_PER_KWH
    return {
        "name": data.get("name", f"{data['stage']} {data['step']}"),
        "flop": data["flops"],
        "seconds": data["seconds"],
        "kwh": kwh,
        "usd": data["cost"]["usd"] if "cost" in data else kwh * USD_PER_KWH,
        "energy_source": data["energy"]["source"],
        "energy_coverage": data["energy"]["coverage"],
    }


def moment(time: str) -> str:
    """A time of the ledger for people: "2026-01-20 08:00 UTC"."""
    return f"{time[:10]} {time[11:16]} UTC"


def size_class(tokens: int, say: Say) -> str:
    """Of the template for the public summary: under a billion tokens, up to ten trillion, above."""
    if tokens < 10**9:
        return say("less than 1 billion tokens", "unter 1 Milliarde Token")
    if tokens <= 10**13:
        return say("1 billion to 10 trillion tokens", "1 Milliarde bis 10 Billionen Token")
    return say("more than 10 trillion tokens", "über 10 Billionen Token")
