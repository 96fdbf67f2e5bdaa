"""Documents: valid in the formats of others, and changed wherever the record changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import DatasetCard, ModelCard
from synthetic_run import write_run

from glasklar.audit.documents import write_documents
from glasklar.audit.documents_formats import Component, mof_class
from glasklar.audit.documents_manifest import size_class
from glasklar.audit.facts import RunFacts
from glasklar.audit.german import german, german_plot
from glasklar.audit.plots import plots
from glasklar.provenance.ledger import Event
from glasklar.provenance.rundir import RunDir

NAMES = ("model-card", "data-card", "public-summary", "annex-xi")


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


def texts(run: Path) -> dict[str, str]:
    """All documents of a run."""
    paths = [*(run / "dossier").iterdir(), run / "model" / "README.md"]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_all_documents_are_there(smoke_run: Path) -> None:
    wanted = {f"{name}.{language}.md" for name in NAMES for language in ("en", "de")}
    wanted |= {"dossier.en.html", "dossier.de.html", "manifest.json", "mof.yaml", "bom.cdx.json", "README.md"}
    assert set(texts(smoke_run)) == wanted


def test_cards_load_with_hugging_face(smoke_run: Path) -> None:
    model = ModelCard.load(smoke_run / "model" / "README.md")
    assert model.data.license == "mit"
    assert model.data.language == ["en", "de"]
    evaluated = {result.dataset_type: result.metric_value for result in model.data.eval_results}
    facts = RunFacts.read(RunDir(smoke_run))
    assert facts.after_rl is not None
    assert evaluated == {name: scores["greedy"] for name, scores in facts.after_rl["tasks"].items()}
    data = DatasetCard.load(smoke_run / "dossier" / "data-card.en.md")
    assert data.data.license == "cc0-1.0"
    assert data.data.size_categories == ["n<1K"]


def test_bill_of_materials_is_valid(smoke_run: Path) -> None:
    text = (smoke_run / "dossier" / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    bom = json.loads(text)
    weights = RunFacts.read(RunDir(smoke_run)).of("released")[0]["files"]["model.safetensors"]
    assert bom["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": weights}]
    assert {"torch", "numpy"} <= {component["name"] for component in bom["components"]}


MOF_SCHEMA = {  # what schema/mof_schema.json of the Model Openness Tool asks for
    "type": "object",
    "required": ["framework", "release"],
    "properties": {
        "framework": {"required": ["name", "version", "date"]},
        "release": {
            "required": ["name", "version", "date", "architecture", "origin", "producer", "contact", "components"],
            "properties": {
                "date": {"type": "string"},
                "type": {"enum": ["language"]},
                "architecture": {"enum": ["transformer decoder"]},
                "treatment": {"enum": ["pre-trained", "instruct fine-tuned", "chat fine-tuned"]},
                "components": {
                    "minItems": 17,
                    "maxItems": 17,
                    "items": {
                        "required": ["name", "description", "location", "license_name", "license_path"],
                        "additionalProperties": {"type": "string"},
                    },
                },
            },
        },
    },
}


def test_openness_framework_is_valid(smoke_run: Path) -> None:
    text = (smoke_run / "dossier" / "mof.yaml").read_text()
    jsonschema.validate(yaml.safe_load(text), MOF_SCHEMA)
    assert text.startswith("# Class II, by what is published; missing for the next: Research paper.")


@pytest.mark.parametrize(("missing", "reached"), [("III", ""), ("II", "III"), ("I", "II"), ("", "I")])
def test_class_of_openness(missing: str, reached: str) -> None:
    components = [Component(f"part {n}", n, "" if n == missing else "here", "MIT", "") for n in ("III", "II", "I", "")]
    assert mof_class(components) == (reached, [f"part {missing}"] if missing else [])


def changed_ledger(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    previous, out = "0" * 64, []
    for index, text in enumerate((run / "ledger.jsonl").read_bytes().splitlines()):
        line = json.loads(text)
        change(line)
        event = Event.make(index, line["time"], line["event"], line["data"], previous)
        previous = event.hash
        out.append(event.line())
    (run / "ledger.jsonl").write_bytes(b"".join(out))


def test_every_document_follows_the_ledger(run: Path) -> None:
    before = texts(run)

    def change(line: dict[str, Any]) -> None:
        if line["event"] == "data":
            line["data"] |= {"documents": 123_457, "tokens": 7_654_321, "root": "ab" * 32}
        if line["event"] == "checkpoint":
            line["data"]["flops"] = 2e21
            line["data"]["energy"]["joules"] = 3.6e9
        if line["event"] == "released":
            line["data"]["files"]["model.safetensors"] = "cd" * 32

    changed_ledger(run, change)
    write_documents(RunDir(run))
    after = texts(run)
    assert all(after[name] != before[name] for name in before)
    for name, text in after.items():
        assert "ab" * 32 in text, name
        assert re.search(r"123[,.]?457", text), name
        assert RunFacts.read(RunDir(run)).events[-1].hash in text, name
    for name in ("README.md", "annex-xi.en.md", "annex-xi.de.md", "bom.cdx.json", "public-summary.de.md"):
        # 10 segments of 2e21 FLOP: a fifth of 1e23
        assert "2e+22" in after[name] or "20.0 ZFLOP" in after[name] or "20 ZFLOP" in after[name], name
    assert '"value": 10000.0' in after["bom.cdx.json"]
    assert "cd" * 32 in after["annex-xi.en.md"]
    assert "0.2 of the 10^23" in after["annex-xi.en.md"]


def test_same_ledger_gives_the_same_documents(run: Path) -> None:
    before = texts(run)
    write_documents(RunDir(run))
    assert texts(run) == before


def test_nothing_claims_to_be_compliant(smoke_run: Path) -> None:
    for name, text in texts(smoke_run).items():
        assert not re.search(r"\b(compliant|conforms|konform|rechtskonform)\b", text, re.IGNORECASE), name
    assert "to be filled in by a person" in texts(smoke_run)["public-summary.en.md"]
    assert "von Hand auszufüllen" in texts(smoke_run)["annex-xi.de.md"]


class Resources(HTMLParser):
    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href")
        self.found += [value or "" for name, value in attrs if name in names and not (value or "").startswith("#")]


def test_page_is_self_contained_and_in_its_language(smoke_run: Path) -> None:
    for language in ("en", "de"):
        text = texts(smoke_run)[f"dossier.{language}.html"]
        parser = Resources()
        parser.found = []
        parser.feed(text)
        assert parser.found == []
        assert f'<html lang="{language}">' in text
        assert text.count("<svg") >= 3
        assert "<script" not in text


def test_hostile_names_stay_text(run: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_bytes())
    recipe["description"] = "<script>alert(1)</script> | x"
    (run / "recipe.json").write_text(json.dumps(recipe))
    write_documents(RunDir(run))
    for name, text in texts(run).items():
        assert "<script>" not in text or name.endswith((".json", ".yaml")), name


def test_size_classes() -> None:
    names = [size_class(tokens, lambda en, de: en) for tokens in (10**9 - 1, 10**9, 10**13, 10**13 + 1)]
    assert [name.split()[0] for name in names] == ["less", "1", "1", "more"]


def test_unfinished_run_has_no_documents(run: Path) -> None:
    shutil.rmtree(run / "dossier")
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(line for line in lines if b'"event":"released"' not in line))
    write_documents(RunDir(run))
    assert not (run / "dossier").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("123,457 documents, 0.5 kWh, 96.1%", "123.457 documents, 0,5 kWh, 96,1%"),
        ("1,077,760", "1.077.760"),
        ("0.0117", "0,0117"),
        ("3.91e+13 FLOP: das 3.9e-10-Fache", "3,91e+13 FLOP: das 3,9e-10-Fache"),
        ("1.3 Text, glasklar 0.1.0, torch 2.13.0, CC0-1.0", "1.3 Text, glasklar 0.1.0, torch 2.13.0, CC0-1.0"),
        ("3,17,9 und a,b und 2026-11-24", "3,17,9 und a,b und 2026-11-24"),
        ("sum, letters, 4 Schichten", "sum, letters, 4 Schichten"),
    ],
)
def test_numbers_as_germans_write_them(text: str, wanted: str) -> None:
    assert german(text) == wanted


def test_plots_of_the_german_page_are_in_german(tmp_path: Path) -> None:
    facts = RunFacts.read(write_run(tmp_path / "run"))
    names = {task["name"] for task in facts.recipe["tasks"]}
    for plot in plots(facts):
        drawn = german_plot(plot)
        assert drawn.caption != plot.caption
        assert plot.caption not in drawn.svg
        for english, translated in zip(labels(plot.svg), labels(drawn.svg), strict=True):
            known = english in names or translated != english or re.fullmatch(r"\d+%?|MTP \d", english)
            assert known, f"{english!r} has no German label"
            assert not re.search(r"\d\.\d", translated)


def labels(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_course_and_costs_stand_on_the_page(broken_pages: dict[str, str]) -> None:
    assert "failed: the disk is full" in broken_pages["en"]
    assert "Interrupted and resumed: 1×" in broken_pages["en"]
    assert "Unterbrochen und fortgesetzt: 1×" in broken_pages["de"]
    assert "Steps lost with it, or done again: 3 (2 s)" in broken_pages["en"]


@pytest.fixture
def broken_pages(run: Path) -> dict[str, str]:
    """The dossier's pages of a run that failed once."""

    def change(line: dict[str, Any]) -> None:
        if line["event"] == "readiness":
            line |= {"event": "failed", "data": {"error": "the disk is full", "lost": None}}
        if line["event"] == "tokenizer":
            line["event"], line["data"] = "resumed", {**line["data"], "lost": {"steps": 3, "seconds": 2.0}}

    events = (run / "ledger.jsonl").read_bytes().splitlines()
    assert any(b'"readiness"' in event for event in events)
    changed_ledger(run, change)
    write_documents(RunDir(run))
    return {language: texts(run)[f"dossier.{language}.html"] for language in ("en", "de")}
