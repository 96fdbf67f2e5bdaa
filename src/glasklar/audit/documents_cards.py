"""Model card and data card in Hugging Face's form: YAML head, then Markdown; from the manifest alone."""

from __future__ import annotations

import json
from typing import Any

from glasklar.audit.blocks import Block, Heading, Items, Paragraph, Table
from glasklar.audit.documents_manifest import Say, moment
from glasklar.audit.report import duration, flops, quantity

SIZES = [
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
]


def yaml_head(values: dict[str, Any]) -> str:
    """A YAML document between lines of dashes. JSON is YAML: every value stands in one line of it."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def model_card_head(m: dict[str, Any]) -> str:
    metrics = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{task}, problems never trained on", "type": task},
            "metrics": [{"type": "accuracy", "value": scores["greedy"], "name": "right, greedy"}],
        }
        for task, scores in m["evaluation"].get("tasks", {}).items()
        if "greedy" in scores
    ]
    return yaml_head(
        {
            "license": m["licence"].lower(),
            "language": m["languages"],
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "tags": ["glasklar", "reproducible"],
            "model-index": [{"name": m["name"], "results": metrics}],
        }
    )


def model_card(m: dict[str, Any], say: Say) -> list[Block]:
    model, training, data = m["model"], m["training"], m["data"]
    return [
        Heading(say("What it is", "Was es ist")),
        Items(
            [
                say("A language model of ", "Ein Sprachmodell mit ")
                + f"{model['parameters']:,} "
                + say("parameters, of which ", "Parametern, von denen an einem Token ")
                + f"{model['active_parameters']:,} "
                + say("work on a token", "arbeiten"),
                say("Design: ", "Bauart: ")
                + f"{model['design']}, {model['layers']} "
                + say("layers", "Schichten")
                + f", {model['attention']}, {model['experts']} "
                + say("routed experts a layer", "Experten je Schicht"),
                say("Context: ", "Kontext: ") + f"{model['context']}" + say(" tokens", " Token"),
                say("Released: ", "Veröffentlicht: ") + moment(m["released"]),
            ]
        ),
        Heading(say("How it was made", "Wie es entstand")),
        Paragraph(
            say("Trained from nothing on ", "Von Grund auf trainiert mit ")
            + f"{data['documents']:,} "
            + say("documents (", "Dokumenten (")
            + f"{data['tokens']:,} "
            + say("tokens). ", "Token). ")
            + f"{flops(training['flop'])}, {duration(training['seconds'])}, {training['kwh']:.6f} kWh "
            + f"({', '.join(training['energy_sources'])})."
        ),
        _stages(m, say),
        *_results(m, say),
        Heading(say("What it is not for", "Wofür es nicht gedacht ist")),
        Paragraph(
            say(
                "It knows what its training data and tasks hold, and nothing else. It has not been examined for safety "
                "or bias; do not let it decide about people.",
                "Es kennt, was seine Trainingsdaten und Aufgaben enthalten, und nichts anderes. Auf Sicherheit und "
                "Verzerrungen wurde es nicht untersucht; es darf nicht über Menschen entscheiden.",
            )
        ),
        Heading(say("Check it", "Nachprüfen")),
        Items(
            [
                say("All hashes and signatures: ", "Alle Prüfsummen und Unterschriften: ") + "glasklar verify RUN",
                say("The training itself, bit for bit: ", "Das Training selbst, Bit für Bit: ")
                + "glasklar replay RUN --all",
                say("Recipe: ", "Rezept: ") + m["recipe"]["hash"],
                say("Merkle root of the data: ", "Merkle-Wurzel der Daten: ") + data["root"],
                say("Head of the ledger: ", "Kopf des Protokolls: ") + m["ledger"]["head"],
            ]
        ),
    ]


def _stages(m: dict[str, Any], say: Say) -> Table:
    rows = [
        [
            stage["kind"],
            f"{stage['steps']:,}",
            quantity(stage["tokens"]),
            flops(stage["flop"]),
            duration(stage["seconds"]),
            f"{stage['kwh']:.6f}",
        ]
        for stage in m["training"]["stages"]
    ]
    header = [
        say("stage", "Stufe"),
        say("steps", "Schritte"),
        say("tokens", "Token"),
        "FLOP",
        say("time", "Zeit"),
        "kWh",
    ]
    return Table(header, rows, say("Stages of the training", "Stufen des Trainings"))


def _results(m: dict[str, Any], say: Say) -> list[Block]:
    tasks, before = m["evaluation"].get("tasks", {}), m["before_reinforcement"].get("tasks", {})
    hard, bits = m["evaluation"].get("hard", {}), m["bits_per_byte"]
    found: list[Block] = []
    if tasks:
        columns = {
            say("problems", "Probleme"): [str(scores["n"]) for scores in tasks.values()],
            say("right, greedy", "richtig, greedy"): [_share(scores, "greedy") for scores in tasks.values()],
            say("before reinforcement", "vor der Verstärkung"): [_share(before.get(n, {}), "greedy") for n in tasks],
            "pass@1": [_share(scores, "pass@1") for scores in tasks.values()],
            say("harder than trained", "schwerer als trainiert"): [
                _share(hard.get(name, {}), "greedy") for name in tasks
            ],
        }
        shown = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
        rows = [[task, *cells] for task, *cells in zip(tasks, *shown.values(), strict=True)]
        caption = say("Right answers to problems never trained on", "Richtige Antworten auf nie trainierte Probleme")
        found.append(Table([say("task", "Aufgabe"), *shown], rows, caption))
    if bits is not None:
        text = say("Bits per byte of documents kept from training: ", "Bits je Byte vorenthaltener Dokumente: ")
        found.append(Paragraph(f"{text}{bits:.3f}"))
    return [Heading(say("What it can do", "Was es kann")), *found] if found else []


def _share(scores: dict[str, Any], figure: str) -> str:
    return f"{scores[figure]:.1%}" if figure in scores else "–"


def data_card_head(m: dict[str, Any]) -> str:
    licences = m["data"]["licences"]
    count = m["data"]["documents"]
    return yaml_head(
        {
            "license": licences[0].lower() if len(licences) == 1 else "other",
            "language": m["languages"],
            "task_categories": ["text-generation"],
            "pretty_name": f"{m['name']}: training data",
            "size_categories": [next((name for limit, name in SIZES if count < limit), "n>100M")],
        }
    )


def data_card(m: dict[str, Any], say: Say) -> list[Block]:
    data = m["data"]
    rows = [
        [
            source["name"],
            source["kind"],
            source["licence"],
            source["date"] or "–",
            say("yes", "ja") if source["synthetic"] else say("no", "nein"),
        ]
        for source in data["sources"]
    ]
    header = [say("source", "Quelle"), say("kind", "Art"), say("licence", "Lizenz"), say("date", "Datum"),
              say("synthetic", "synthetisch")]  # fmt: skip
    return [
        Heading(say("What it holds", "Was sie enthalten")),
        Items(
            [
                f"{data['documents']:,} " + say("documents", "Dokumente"),
                f"{data['bytes']:,} " + say("bytes", "Bytes"),
                f"{data['tokens']:,} " + say("tokens", "Token"),
                say("Kept from training, for evaluation: ", "Dem Training vorenthalten, zur Auswertung: ")
                + f"{data['held_out_documents']:,} "
                + say("documents", "Dokumente"),
                say("Licences: ", "Lizenzen: ") + ", ".join(data["licences"]),
                *_removed(m, say),
                *_shown_later(m, say),
            ]
        ),
        Table(header, rows, say("Sources", "Quellen")),
        Heading(say("Under one root", "Unter einer Wurzel")),
        Paragraph(
            say(
                "Every document (text, source, licence, date, origin) is a leaf of its source's Merkle tree, sorted by "
                "content; over the sources' roots stands one root. Made again, the data must give the same.",
                "Jedes Dokument (Text, Quelle, Lizenz, Datum, Herkunft) ist ein Blatt im Merkle-Baum seiner Quelle, "
                "geordnet nach Inhalt; über den Wurzeln der Quellen steht eine. Neu erzeugt, müssen die Daten "
                "dieselbe ergeben.",
            )
        ),
        Items(
            [
                say("Root: ", "Wurzel: ") + data["root"],
                say("Root of what was held out: ", "Wurzel des Vorenthaltenen: ") + data["held_out_root"],
                say("Head of the ledger: ", "Kopf des Protokolls: ") + m["ledger"]["head"],
            ]
        ),
        Table(
            [say("source", "Quelle"), say("documents", "Dokumente"), say("licence", "Lizenz"), say("root", "Wurzel")],
            [
                [name, f"{source['documents']:,}", source["licence"], source["root"][:16] + "…"]
                for name, source in data["source_roots"].items()
            ],
            say("Roots of the sources", "Wurzeln der Quellen"),
        ),
    ]


def _shown_later(m: dict[str, Any], say: Say) -> list[str]:
    """What training showed beside the documents."""
    if not m["demonstrations"]:
        return []
    words = say(
        "demonstrations of the tasks by programs, shown in fine-tuning; not under the root, the recipe makes them",
        "von Programmen gelöste Aufgaben, im Feinschliff gezeigt; nicht unter der Wurzel, das Rezept erzeugt sie",
    )
    return [f"{m['demonstrations']:,} {words}"]


def _removed(m: dict[str, Any], say: Say) -> list[str]:
    """How many documents were left out, by reason; nothing where the data are the recipe's own problems."""
    words = {
        "duplicate": ("repeated text", "wiederholter Text"),
        "near-duplicate": ("nearly the same as another", "fast wie ein anderes"),
        "evaluation overlap": ("overlaps with an evaluation", "überschneidet sich mit einer Auswertung"),
    }
    if "removed" not in m["data"]:
        return []
    counts = [f"{say(*words[reason])}: {count:,}" for reason, count in sorted(m["data"]["removed"].items())]
    said = "; ".join(counts) or say("none", "keine")
    return [say("Left out, each listed with its reason: ", "Weggelassen, jedes mit Grund verzeichnet: ") + said]
