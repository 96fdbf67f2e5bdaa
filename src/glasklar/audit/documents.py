"""The dossier of a released model, made from the manifest of its run, so that it cannot contradict the record.

model/README.md                    model card, as Hugging Face shows it
dossier/manifest.json              all figures of the documents
dossier/{model-card,data-card,public-summary,annex-xi}.{en,de}.md
dossier/dossier.{en,de}.html       all of these on one page, with the plots
dossier/mof.yaml, dossier/bom.cdx.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glasklar.audit.blocks import Block, Chapter, Items, Plot, Table, to_html, to_markdown, worded
from glasklar.audit.documents_cards import data_card, data_card_head, model_card, model_card_head
from glasklar.audit.documents_formats import bom, mof, mof_class, mof_components
from glasklar.audit.documents_legal import annex_xi, public_summary
from glasklar.audit.documents_manifest import LANGUAGES, Say, manifest
from glasklar.audit.facts import RunFacts
from glasklar.audit.german import german as in_german
from glasklar.audit.german import german_plot
from glasklar.audit.plots import plots
from glasklar.audit.report import duration, flops
from glasklar.provenance.files import write_atomic, writing
from glasklar.provenance.rundir import RunDir, json_text

Maker = Callable[[dict[str, Any], Say], list[Block]]
MAKERS: dict[str, tuple[str, str, Maker]] = {
    "model-card": ("Model card", "Modellkarte", model_card),
    "data-card": ("Data card", "Datenkarte", data_card),
    "public-summary": (
        "Public summary of the training content",
        "Öffentliche Zusammenfassung der Trainingsinhalte",
        public_summary,
    ),
    "annex-xi": ("Technical documentation, Annex XI", "Technische Dokumentation, Anhang XI", annex_xi),
}


def write_documents(run: RunDir) -> None:
    """Writes all documents of a released run; one that is not released has none yet."""
    made = documents(RunFacts.read(run))
    if made:
        with writing(run.dossier):
            run.dossier.mkdir(exist_ok=True)
    for name, content in made.items():
        write_atomic(run.path / name, content)


def documents(facts: RunFacts) -> dict[str, bytes]:
    """Path within the run -> content of every document; the same record gives the same bytes."""
    if not facts.of("released"):
        return {}
    m = manifest(facts)
    made = {
        "dossier/manifest.json": json_text(m),
        "dossier/mof.yaml": mof(m).encode(),
        "dossier/bom.cdx.json": bom(m).encode(),
        "model/README.md": (model_card_head(m) + markdown("model-card", m, "en")).encode(),
    }
    for language in LANGUAGES:
        for name in MAKERS:
            head = data_card_head(m) if name == "data-card" else ""
            made[f"dossier/{name}.{language}.md"] = (head + markdown(name, m, language)).encode()
        made[f"dossier/dossier.{language}.html"] = page(facts, m, language).encode()
    return made


def markdown(name: str, m: dict[str, Any], language: str) -> str:
    """One document."""
    say = LANGUAGES[language]
    english, german, make = MAKERS[name]
    blocks = in_language(make(m, say), language)
    return to_markdown(f"{say(english, german)}: {m['name']}", m["description"], blocks, f"dossier.{language}.html")


def in_language(blocks: list[Block], language: str) -> list[Block]:
    """The blocks with numbers as the language writes them."""
    return [worded(block, in_german) for block in blocks] if language == "de" else blocks


def page(facts: RunFacts, m: dict[str, Any], language: str) -> str:
    """All documents, the class of openness and the plots on one page without outside resources."""
    say = LANGUAGES[language]
    blocks: list[Block] = []
    for english, german, make in MAKERS.values():
        blocks += [Chapter(say(english, german)), *make(m, say)]
    reached, missing = mof_class(mof_components(m))
    drawn = [german_plot(plot) if language == "de" else plot for plot in plots(facts)]
    blocks += [
        Chapter("Model Openness Framework"),
        Items(
            [
                say("Class reached: ", "Erreichte Klasse: ") + (reached or "–"),
                say("Missing for the next: ", "Für die nächste fehlt: ")
                + (", ".join(missing) or say("nothing", "nichts")),
            ]
        ),
        Chapter(say("Course and cost", "Verlauf und Kosten")),
        *course(m, say),
        Chapter(say("Plots", "Kurven")),
        *(Plot(plot.svg, plot.caption) for plot in drawn),
    ]
    title = f"{say('Dossier of', 'Dossier von')} {m['name']}"
    return to_html(title, m["description"], in_language(blocks, language), language)


def course(m: dict[str, Any], say: Say) -> list[Block]:
    """What each segment cost, and how often and why the run ended early."""
    segments, lost = m["training"]["segments"], m["lost"]
    rows = [
        [s["name"], flops(s["flop"]), duration(s["seconds"]), f"{s['kwh']:.6f}", f"{s['usd'] * 100:.3g}"]
        for s in segments
    ]
    header = [say("up to", "bis"), "FLOP", say("time", "Zeit"), "kWh", say("US cents", "US-Cent")]
    caption = say(
        "From one recorded state to the next; electricity alone, at the price that the ledger names",
        "Von einem festgehaltenen Zustand zum nächsten; nur der Strom, zum Preis, den das Protokoll nennt",
    )
    early = [
        say("Interrupted and resumed: ", "Unterbrochen und fortgesetzt: ") + f"{m['interrupted']}×",
        say("Steps lost with it, or done again: ", "Dabei verlorene oder wiederholte Schritte: ")
        + f"{lost['steps']:,} ({duration(lost['seconds'])})",
        *m["ended_early"],
    ]
    return [Table(header, rows, caption), Items(early)]
