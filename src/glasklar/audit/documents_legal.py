"""What Union law asks of providers of general-purpose models, filled in as far as the record knows it: the public
summary of training content (Article 53(1)(d)) and the technical documentation of Annex XI (Article 53(1)(a)).

They say what share of each threshold of the AI Act (Regulation (EU) 2024/1689) was reached and mark what a person has
to fill in. They never say that anything is compliant: that is for people to judge.
"""

from __future__ import annotations

from typing import Any

from glasklar.audit.blocks import Block, Heading, Items, Paragraph
from glasklar.audit.documents_manifest import Say, moment, size_class


def to_fill(say: Say, en: str, de: str) -> str:
    """The mark of what the record cannot know."""
    return say(f"[to be filled in by a person: {en}]", f"[von Hand auszufüllen: {de}]")


def thresholds(m: dict[str, Any], say: Say) -> str:
    training = m["training"]
    return say(
        f"Training took {training['flop']:.3g} FLOP: {training['share_of_general_purpose']:.2g} of the 10^23 FLOP from "
        "which a model counts as general-purpose (Commission guidelines), "
        f"{training['share_of_systemic_risk']:.2g} of the 10^25 FLOP from which systemic risk is presumed. A figure, "
        "not a legal assessment.",
        f"Das Training brauchte {training['flop']:.3g} FLOP: das {training['share_of_general_purpose']:.2g}-Fache der "
        "10^23 FLOP, ab denen ein Modell als eines mit allgemeinem Verwendungszweck gilt (Leitlinien der Kommission), "
        f"das {training['share_of_systemic_risk']:.2g}-Fache der 10^25 FLOP, ab denen ein systemisches Risiko vermutet "
        "wird. Eine Zahl, keine rechtliche Bewertung.",
    )


def public_summary(m: dict[str, Any], say: Say) -> list[Block]:
    """The sections of the Commission's template for the summary of training content."""
    data = m["data"]
    synthetic = [source for source in data["sources"] if source["synthetic"]]
    public = [source for source in data["sources"] if source["kind"] == "stdlib"]
    own = [source for source in data["sources"] if source not in synthetic + public]
    none = say("none", "keine")
    teachers = [source for source in synthetic if source["kind"] == "distil"]
    # Whether somebody's texts are public, licensed or of users, a recipe does not say.
    unsaid = to_fill(say, "whether of the sources under 2.6", "ob von den Quellen unter 2.6") if own else none
    acquired = to_fill(say, "date", "Datum") if public + own else m["released"][:10]
    version = m["recipe"]["hash"][:12] + say(", of ", ", vom ") + moment(m["released"])
    return [
        Paragraph(say("Version: ", "Fassung: ") + version),
        Heading(say("1 General information", "1 Allgemeine Angaben")),
        Items(
            [
                "1.1 " + to_fill(say, "provider, representative, contact", "Anbieter, Bevollmächtigter, Kontakt"),
                f"1.2 {m['name']} {m['recipe']['hash'][:12]}; "
                + (
                    say("learned from another model's answers (2.5); ", "lernte aus Antworten anderer Modelle (2.5); ")
                    if teachers
                    else say("made from no other model; ", "aus keinem anderen Modell entstanden; ")
                )
                + to_fill(say, "date of placing on the Union market", "Datum des Inverkehrbringens in der Union"),
                say("1.3 Text: ", "1.3 Text: ")
                + f"{size_class(data['tokens'], say)} ({data['tokens']:,} "
                + say("tokens", "Token") + f", {data['documents']:,} "
                + say("documents); no images, audio or video", "Dokumente); keine Bilder, Töne oder Videos"),
                say("Latest acquisition of data: ", "Letzte Beschaffung von Daten: ") + acquired,
            ]
        ),
        Heading(say("2 Data sources", "2 Datenquellen")),
        Items(
            [
                say("2.1 Public data sets: ", "2.1 Öffentliche Datensätze: ") + (_named(public) or none),
                say("2.2.1 Licensed by right holders: ", "2.2.1 Von Rechteinhabern lizenziert: ") + unsaid,
                say("2.2.2 Obtained from other third parties: ", "2.2.2 Von sonstigen Dritten: ") + unsaid,
                say("2.3 Crawled: ", "2.3 Aus dem Netz gesammelt: ")
                + say("nothing by glasklar, which has no crawler", "nichts von glasklar, das keinen Sammler hat")
                + (f"; {unsaid}" if own else ""),
                say("2.4 Data of users: ", "2.4 Daten von Nutzern: ") + unsaid,
                say("2.5 Synthetic: ", "2.5 Synthetisch: ")
                + (", ".join(source["name"] for source in synthetic) or none)
                + (
                    say("; the rest made by programs", "; das Übrige erzeugt von Programmen")
                    if teachers
                    else say("; made by programs, by no AI model", "; erzeugt von Programmen, von keinem KI-Modell")
                ),
                say("2.6 Other: ", "2.6 Sonstige: ") + (_named(own) or none),
            ]
        ),
        Heading(say("3 Data processing", "3 Datenverarbeitung")),
        Items(
            [
                say("3.1 Reservations of rights: ", "3.1 Nutzungsvorbehalte: ")
                + to_fill(say, "measures for sources of text", "Maßnahmen bei Textquellen"),
                say("3.2 Illegal content: ", "3.2 Rechtswidrige Inhalte: ")
                + to_fill(say, "measures for sources of text", "Maßnahmen bei Textquellen"),
                say("3.3 Merkle root over all documents: ", "3.3 Merkle-Wurzel über alle Dokumente: ") + data["root"],
                say("Head of the ledger: ", "Kopf des Protokolls: ") + m["ledger"]["head"],
            ]
        ),
        Paragraph(thresholds(m, say)),
    ]  # fmt: skip


def _named(sources: list[dict[str, Any]]) -> str:
    return "; ".join(f"{s['name']} ({s['licence']}{', ' + s['date'] if s['date'] else ''})" for s in sources)


def annex_xi(m: dict[str, Any], say: Say) -> list[Block]:
    """Section 1 of Annex XI, point by point."""
    model, training, data = m["model"], m["training"], m["data"]
    tasks = ", ".join(task["name"] for task in m["tasks"]) or say("text", "Text")
    licence = to_fill(say, "licence", "Lizenz") if m["licence"] == "other" else m["licence"]
    stages = "; ".join(f"{s['kind']}: {s['steps']:,} " + say("steps", "Schritte") for s in training["stages"])
    return [
        Heading(say("1 General description", "1 Allgemeine Beschreibung")),
        Items(
            [
                say("(a) Tasks: ", "a) Aufgaben: ") + tasks + "; "
                + to_fill(say, "systems it may be integrated in", "Systeme, in die es integriert werden kann"),
                say("(b) Acceptable use: ", "b) Nutzungsbedingungen: ") + to_fill(say, "policy", "Regeln"),
                say("(c) Released: ", "c) Freigabe: ") + moment(m["released"]) + "; "
                + to_fill(say, "distribution", "Vertrieb"),
                say("(d) Architecture: ", "d) Architektur: ")
                + f"{model['design']}, {model['layers']} " + say("layers", "Schichten")
                + f", {model['attention']}, {model['parameters']:,} " + say("parameters, ", "Parameter, ")
                + f"{model['active_parameters']:,} " + say("active", "aktiv"),
                say("(e) Input and output: text, ", "e) Ein- und Ausgabe: Text, ")
                + say("at most ", "höchstens ") + f"{model['context']} " + say("tokens", "Token"),
                say("(f) Licence: ", "f) Lizenz: ") + licence,
            ]
        ),
        Heading(say("2 Development", "2 Entwicklung")),
        Items(
            [
                say("(a) Technical means: ", "a) Technische Mittel: ")
                + say("Hugging Face folder; the engine of glasklar, or transformers",
                      "Hugging-Face-Ordner; die Laufzeit von glasklar oder transformers"),
                say("(b) Design and training: ", "b) Entwurf und Training: ") + stages
                + say("; objectives: likelihood, and for RL a checker of answers; recipe ",
                      "; Ziele: Likelihood, beim RL ein Prüfer der Antworten; Rezept ") + m["recipe"]["hash"],
                say("(c) Data: ", "c) Daten: ")
                + f"{data['documents']:,} " + say("documents, ", "Dokumente, ") + f"{data['tokens']:,} "
                + say("tokens; ", "Token; ")
                + ", ".join(data["licences"]) + say("; Merkle root ", "; Merkle-Wurzel ") + data["root"] + "; "
                + to_fill(say, "unsuitable sources, bias", "ungeeignete Quellen, Verzerrung"),
                say("(d) Compute: ", "d) Rechenaufwand: ")
                + f"{training['flop']:.3g} FLOP, {training['seconds']:.0f} s, "
                + f"{m['machine'].get('cpu')}, {m['machine'].get('threads')} " + say("threads", "Threads"),
                say("(e) Energy: ", "e) Energie: ")
                + f"{training['kwh'] / 1000:.2g} MWh ({training['energy_source']}; "
                + say("counted, not estimated: ", "gezählt, nicht geschätzt: ") + f"{training['energy_coverage']:.0%})",
            ]
        ),
        Paragraph(thresholds(m, say)),
        Heading(say("Authenticity", "Echtheit")),
        Items(
            [
                "model.safetensors: SHA-256 " + m["files"]["model.safetensors"],
                say("Head of the ledger: ", "Kopf des Protokolls: ") + m["ledger"]["head"],
            ]
        ),
    ]  # fmt: skip
