"""What German documents need beside their words: numbers as Germans write them, and the labels of plots."""

from __future__ import annotations

import re
from dataclasses import replace

from glasklar.audit.plots import NamedPlot

# Of the manifest, which is in English, and which documents quote.
PHRASES = {
    "problems made up by programs": "von Programmen erdachte Aufgaben",
    "source of the Python standard library": "Quelltext der Python-Standardbibliothek",
    "CPU seconds of this process": "CPU-Sekunden dieses Prozesses",
    "CPU packages and DRAM": "CPU-Pakete und DRAM",
    "GPU boards": "GPU-Karten",
    "(estimate)": "(Schätzung)",
    "(estimate:": "(Schätzung:",
    "stopped by its owner": "vom Eigentümer angehalten",
    "Research paper": "Forschungsaufsatz",
}
# Names of lines stand at the right edge of a plot, in room made for the English ones: no longer than those
# ("Sch." is a Schicht, as the caption says).
LABELS = {
    "Right greedy answers over the steps of reinforcement": "Richtige Antworten im Lauf der Verstärkung",
    "right, greedy": "richtig, greedy",
    "mean": "Mittel",
    "steps of reinforcement": "Schritte der Verstärkung",
    "tokens an answer": "Token je Antwort",
    "answers that think": "denkende Antworten",
    "length": "Länge",
    "thinking": "denkend",
    "mean reward": "mittlere Belohnung",
    "reward": "Belohnung",
    "share": "Anteil",
    "groups all alike": "alle gleich",
    "cut off": "abgeschnitten",
    "nats a token": "Nats je Token",
    "entropy": "Entropie",
    "KL to the start": "KL zum Anfang",
    "pretraining": "Vortraining",
    "fine-tuning": "Feinschliff",
    "distillation": "Destillation",
    "reinforcement": "Verstärkung",
    "million tokens": "Millionen Token",
    "loss, nats a token": "Verlust, Nats je Token",
    "busiest / mean": "größte / mittlere",
    "even": "gleich",
    "most even layer": "gleichste Sch.",
    "median layer": "mittlere Sch.",
    "least even layer": "ungleichste Sch.",
    "energy": "Energie",
    "energy, Wh": "Energie, Wh",
    "minutes of training": "Minuten des Trainings",
}
CAPTIONS = {
    "Right greedy answers on validation problems that training never saw, while reinforcement runs.": (
        "Richtige Antworten (greedy) auf Prüfaufgaben, die das Training nie sah, während die Verstärkung läuft."
    ),
    "Length of the sampled answers, and the share of them that think first. Where thinking pays, both grow.": (
        "Länge der gezogenen Antworten und Anteil derer, die erst denken. Wo Denken sich lohnt, wächst beides."
    ),
    "Reward of the sampled answers; groups whose answers were all right or all wrong, which teach nothing; answers "
    "cut off at the limit of tokens.": (
        "Belohnung der gezogenen Antworten; Gruppen, deren Antworten alle richtig oder alle falsch waren und nichts "
        "lehren; am Token-Limit abgeschnittene Antworten."
    ),
    "Training loss over the tokens read so far, all stages counted; thin: every step, thick: smoothed.": (
        "Trainingsverlust über die bisher gelesenen Token, alle Stufen gezählt; dünn: jeder Schritt, dick: geglättet."
    ),
    "Load of the busiest expert over the mean, in each layer with experts; 1 is an even load; "
    "thin: every step, thick: smoothed.": (
        "Last des meistbeschäftigten Experten im Verhältnis zum Mittel, je Schicht mit Experten; 1 ist gleiche Last; "
        "dünn: jeder Schritt, dick: geglättet."
    ),
    "Energy of the training over its time, from one recorded state to the next; how it was found: see above.": (
        "Energie des Trainings über seine Zeit, von Zustand zu Zustand; wie ermittelt: siehe oben."
    ),
}
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\w,]|\.\d)")
# A decimal number by itself, or before a unit: versions and numbered headings are none.
_UNITS = r"%|[kMBT]\b|[MGTPEZ]?FLOP|[mkM]?Wh|-Fache|s\b"
_DECIMAL = re.compile(rf"(?<![\w.,])(\d+)\.(\d+(?:e[+-]\d+)?)(?=\s?(?:{_UNITS}))")
_ALONE = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def german(text: str) -> str:
    """Known phrases in German, 1,234,567 as 1.234.567, 0.5 kWh as 0,5 kWh."""
    for phrase, said in PHRASES.items():
        text = text.replace(phrase, said)
    if _ALONE.fullmatch(text):
        return text.replace(".", ",")
    text = _DECIMAL.sub(r"\1,\2", text)
    return _THOUSANDS.sub(lambda match: match[0].replace(",", "."), text)


def german_plot(plot: NamedPlot) -> NamedPlot:
    """A plot with German labels, numbers and caption. Names of tasks stay."""
    caption = CAPTIONS[plot.caption]
    svg = plot.svg.replace(f'aria-label="{plot.caption}"', f'aria-label="{caption}"')
    svg = re.sub(r'(aria-label=")([^"]*)"', lambda match: f'{match[1]}{LABELS.get(match[2], match[2])}"', svg)
    svg = re.sub(r"(<text[^>]*>)([^<]*)(</text>)", lambda match: match[1] + _label(match[2]) + match[3], svg)
    return replace(plot, svg=svg, caption=caption)


def _label(text: str) -> str:
    layer = re.fullmatch(r"layer (\d+)", text.strip())
    return f"Sch. {layer[1]}" if layer else LABELS.get(text.strip(), german(text.strip()))
