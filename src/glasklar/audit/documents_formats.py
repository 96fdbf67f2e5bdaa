"""The manifest in formats of others: the Model Openness Framework's YAML and a CycloneDX 1.7 ML-BOM.

Fields: MOF 1.0 (schema/mof_schema.json of the Model Openness Tool), CycloneDX 1.7 (bom-1.7.schema.json).
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from glasklar.audit.documents_manifest import CODE_LICENCE, DOCUMENT_LICENCE

Needed = Literal["III", "II", "I", ""]  # lowest class that asks for a component; "": optional


@dataclass(frozen=True)
class Component:
    """One of the seventeen of the MOF. Without a location it is not published."""

    name: str
    needed: Needed
    location: str
    licence: str
    description: str


def mof_components(m: dict[str, Any]) -> list[Component]:
    """All seventeen, in the order of the framework. Paths are relative to the run's folder or to the source code."""
    data = m["data"]
    licences = ", ".join(data["licences"])
    corpus = f"{data['documents']:,} documents, {data['tokens']:,} tokens, Merkle root {data['root']}"
    code, text = CODE_LICENCE, DOCUMENT_LICENCE
    return [
        Component("Model architecture", "III", "src/glasklar/model", code, "one definition for training and serving"),
        Component("Data preprocessing code", "I", "src/glasklar/data", code, "documents, tokenizer, packing"),
        Component("Training code", "II", "src/glasklar/learn", code, "step loops, reinforcement in src/glasklar/rl"),
        Component("Inference code", "II", "src/glasklar/engine", code, "the engine, and the server in serve"),
        Component("Evaluation code", "II", "src/glasklar/eval", code, "checkers decide, no learned judge"),
        Component("Supporting libraries and tools", "", "src/glasklar", code, "audit, provenance, planning"),
        Component(
            "Model parameters (Final)", "III", "model/model.safetensors", m["licence"],
            f"{m['model']['parameters']:,} parameters, SHA-256 {m['files']['model.safetensors']}",
        ),
        Component("Model parameters (Intermediate)", "I", "checkpoints", m["licence"], "ends of all stages"),
        Component("Datasets", "I", "data", licences, corpus),
        Component("Evaluation data", "II", "src/glasklar/tasks", code, "problems follow from their number and seed"),
        Component("Model metadata", "", "ledger.jsonl", text, f"hash-chained; head {m['ledger']['head']}"),
        Component("Model card", "III", "model/README.md", text, "made from the ledger"),
        Component("Data card", "III", "dossier/data-card.en.md", text, "made from the ledger"),
        Component("Technical report", "III", "report.md", text, "made from the ledger"),
        Component("Research paper", "I", "", "", "none"),
        Component("Evaluation results", "III", "report.md", text, "on problems that training never saw"),
        Component("Sample model outputs", "", "", "", "none"),
    ]  # fmt: skip


def mof_class(components: list[Component]) -> tuple[str, list[str]]:
    """The class reached ("" for none) and what is missing for the next one."""
    reached = ""
    for name in ("III", "II", "I"):
        missing = [component.name for component in components if component.needed == name and not component.location]
        if missing:
            return reached, missing
        reached = name
    return reached, []


def mof(m: dict[str, Any]) -> str:
    """The YAML of the Model Openness Tool."""
    components = mof_components(m)
    reached, missing = mof_class(components)
    kinds = [stage["kind"] for stage in m["training"]["stages"]]
    release = {
        "name": m["name"],
        "version": m["recipe"]["hash"][:12],
        "date": m["released"][:10],
        "type": "language",
        "architecture": "transformer decoder",
        "treatment": "chat fine-tuned" if {"sft", "distil", "rl"} & set(kinds) else "pre-trained",
        "origin": "",
        "producer": "",
        "contact": "",
        "license": {},
        "components": [
            {
                "name": component.name,
                "description": component.description,
                "location": component.location,
                "license_name": component.licence,
                "license_path": "",
            }
            for component in components
        ],
    }
    framework = {"name": "Model Openness Framework", "version": "1.0", "date": "2024-12-15"}
    comment = (
        f"# Class {reached or 'none'}, by what is published; missing for the next: {', '.join(missing) or 'nothing'}.\n"
        "# producer and contact are to be filled in by a person. Relative locations: this folder, or the source code.\n"
    )
    return comment + _yaml({"framework": framework, "release": release})


def _yaml(value: dict[str, Any], indent: str = "") -> str:
    """YAML with text as JSON strings, which YAML contains; tables and lists of tables are all that occurs."""
    out = ""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            out += f"{indent}{key}:\n{_yaml(inner, indent + '  ')}"
        elif isinstance(inner, list):
            items = "".join(f"{indent}  - {_yaml(item, indent + '    ').lstrip()}" for item in inner)
            out += f"{indent}{key}:\n{items}"
        else:
            out += f"{indent}{key}: {json.dumps(inner, ensure_ascii=False)}\n"
    return out


def bom(m: dict[str, Any]) -> str:
    """An ML-BOM: model, data, installed packages, how they belong together."""
    packages = [
        {"type": "library", "bom-ref": f"pkg:pypi/{name}@{version}", "name": name, "version": version,
         "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in m["packages"].items()
    ]  # fmt: skip
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": f"{m['name']} training data",
        "description": f"{m['data']['documents']} documents, {m['data']['tokens']} tokens",
        "hashes": [{"alg": "SHA-256", "content": m["data"]["root"]}],
        "licenses": [{"expression": " AND ".join(m["data"]["licences"])}],
    }
    body = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, m['ledger']['head'])}",
        "version": 1,
        "metadata": {
            "timestamp": m["released"],
            "component": _bom_model(m),
            "properties": [{"name": "glasklar:ledger:head", "value": m["ledger"]["head"]}],
        },
        "components": [data, *packages],
        "dependencies": [{"ref": "model", "dependsOn": ["data", *(package["bom-ref"] for package in packages)]}],
    }
    return json.dumps(body, ensure_ascii=False, indent=2) + "\n"


def _bom_model(m: dict[str, Any]) -> dict[str, Any]:
    model, training = m["model"], m["training"]
    figures = {
        "parameters": model["parameters"],
        "active-parameters": model["active_parameters"],
        "training-flop": f"{training['flop']:.6g}",
        "recipe": m["recipe"]["hash"],
        "code": m["code"]["files"],
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": m["name"],
        "version": m["recipe"]["hash"][:12],
        "description": m["description"],
        "hashes": [{"alg": "SHA-256", "content": m["files"]["model.safetensors"]}],
        "licenses": [{"license": {"name": m["licence"]}}],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": model["design"],
                "datasets": [{"ref": "data"}],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": "accuracy, greedy", "value": str(scores["greedy"]), "slice": task}
                    for task, scores in m["evaluation"].get("tasks", {}).items()
                ]
            },
            "considerations": {
                "technicalLimitations": ["Knows its training data and tasks, nothing else; not examined for bias."],
                "environmentalConsiderations": {"energyConsumptions": [_energy(m)]},
            },
            "properties": [{"name": f"glasklar:{name}", "value": str(value)} for name, value in figures.items()],
        },
    }


def _energy(m: dict[str, Any]) -> dict[str, Any]:
    """Who provided the energy is for a person to say; CycloneDX wants a provider all the same."""
    used = {"value": m["training"]["kwh"], "unit": "kWh"}
    provider = {
        "description": f"unknown to the record; figure by {m['training']['energy_source']}",
        "organization": {"name": "to be filled in by a person"},
        "energySource": "unknown",
        "energyProvided": used,
    }
    return {"activity": "training", "energyProviders": [provider], "activityEnergyCost": used}
