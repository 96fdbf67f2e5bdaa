"""Which plots a report shows, made from the metrics of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

from glasklar.audit.facts import RunFacts, running_steps, unique
from glasklar.audit.figures import Line, Panel, draw

STAGES = {"pretrain": "pretraining", "sft": "fine-tuning", "distil": "distillation", "rl": "reinforcement"}
_EACH_LAYER = 6  # up to so many layers have a line each


@dataclass(frozen=True, kw_only=True)
class NamedPlot:
    """`about`: the part of the report that it belongs to."""

    about: Literal["rl", "training"]
    svg: str
    caption: str


@lru_cache(maxsize=2)  # report and pages in two languages show the same ones
def plots(facts: RunFacts) -> tuple[NamedPlot, ...]:
    """All plots that the run has figures for."""
    makers: list[Callable[[RunFacts], NamedPlot | None]] = [_accuracy, _length, _reward, _loss, _load, _energy]
    return tuple(plot for make in makers if (plot := make(facts)))


def _accuracy(facts: RunFacts) -> NamedPlot | None:
    lines = _with_start(facts)
    if len(lines) < 2:
        return None
    x = running_steps(lines)
    names = [name for name in lines[-1]["tasks"] if all(name in line["tasks"] for line in lines)]
    drawn = [Line(name=name, x=x, y=[line["tasks"][name]["greedy"] for line in lines], markers=True) for name in names]
    mean = [facts.mean(line, "greedy") for line in lines]
    drawn.append(Line(name="mean", x=x, y=[m for m in mean if m is not None], strong=True, markers=True))
    svg = draw(
        "accuracy",
        "Right greedy answers over the steps of reinforcement",
        "steps of reinforcement",
        [Panel(label="right, greedy", lines=drawn, scale="percent")],
        x_whole=True,
    )
    caption = "Right greedy answers on validation problems that training never saw, while reinforcement runs."
    return NamedPlot(about="rl", svg=svg, caption=caption)


def _with_start(facts: RunFacts) -> list[dict[str, Any]]:
    """Evaluations during RL, preceded by the one before it (test problems) as step 0."""
    watched, before = facts.watched, facts.before_rl
    return [{**before, "step": 0}, *watched] if before and watched else watched


def _length(facts: RunFacts) -> NamedPlot | None:
    return _rl_plot(
        facts,
        "length",
        [
            ("tokens an answer", "linear", [("length", "length")]),
            ("answers that think", "percent", [("thinking_share", "thinking")]),
        ],
        "Length of the sampled answers, and the share of them that think first. Where thinking pays, both grow.",
    )


def _reward(facts: RunFacts) -> NamedPlot | None:
    return _rl_plot(
        facts,
        "reward",
        [
            ("mean reward", "linear", [("reward", "reward")]),
            ("share", "percent", [("zero_variance", "groups all alike"), ("truncated", "cut off")]),
            ("nats a token", "linear", [("entropy", "entropy"), ("kl", "KL to the start")]),
        ],
        "Reward of the sampled answers; groups whose answers were all right or all wrong, which teach nothing; answers "
        "cut off at the limit of tokens.",
    )


def _rl_plot(
    facts: RunFacts, name: str, wanted: Sequence[tuple[str, Any, Sequence[tuple[str, str]]]], caption: str
) -> NamedPlot | None:
    """Panels of (label, scale, [(figure, name of its line)]); figures that were not measured are left out."""
    steps = facts.stage("rl")
    panels = []
    for label, scale, figures in wanted:
        lines = [_figure_line(steps, figure, line_name) for figure, line_name in figures]
        kept = [line for line in lines if len(line.x) > 1]
        if kept:
            panels.append(Panel(label=label, lines=kept, scale=scale))
    if not panels:
        return None
    return NamedPlot(
        about="rl", svg=draw(name, caption, "steps of reinforcement", panels, x_whole=True), caption=caption
    )


def _figure_line(steps: Sequence[dict[str, Any]], figure: str, name: str) -> Line:
    found = [(step, line[figure]) for step, line in zip(running_steps(steps), steps, strict=True) if figure in line]
    return Line(name=name, x=[step for step, _ in found], y=[value for _, value in found], smooth=True)


def _loss(facts: RunFacts) -> NamedPlot | None:
    """Likelihood stages only: a policy loss says nothing about progress."""
    lines = []
    for place, kind in enumerate(unique(line["stage"] for line in facts.steps)):
        steps = [line for line in facts.stage(kind) if "loss" in line]
        if kind != "rl" and len(steps) > 1:
            x, y = [line["tokens"] / 1e6 for line in steps], [line["loss"] for line in steps]
            lines.append(Line(name=STAGES.get(kind, kind), x=x, y=y, smooth=True, color=place))
    if not lines:
        return None
    caption = "Training loss over the tokens read so far, all stages counted; thin: every step, thick: smoothed."
    svg = draw("loss", caption, "million tokens", [Panel(label="loss, nats a token", lines=lines, scale="log")])
    return NamedPlot(about="training", svg=svg, caption=caption)


def _load(facts: RunFacts) -> NamedPlot | None:
    steps = [line for line in facts.steps if line.get("load_max_mean")]
    if len(steps) < 2:
        return None
    x = [line["tokens"] / 1e6 for line in steps]
    count = min(len(line["load_max_mean"]) for line in steps)
    values = {_layer_name(facts, place): [line["load_max_mean"][place] for line in steps] for place in range(count)}
    if len(values) > _EACH_LAYER:
        ordered = [sorted(line["load_max_mean"]) for line in steps]
        places = {"most even layer": 0, "median layer": len(values) // 2, "least even layer": -1}
        values = {name: [line[place] for line in ordered] for name, place in places.items()}
    caption = (
        "Load of the busiest expert over the mean, in each layer with experts; 1 is an even load; "
        "thin: every step, thick: smoothed."
    )
    panel = Panel(
        label="busiest / mean",
        lines=[Line(name=name, x=x, y=y, smooth=True) for name, y in values.items()],
        marks=[("even", 1.0)],
        least=0.95,
        most=_tail_high(values.values()),
    )
    return NamedPlot(about="training", svg=draw("load", caption, "million tokens", [panel]), caption=caption)


def _energy(facts: RunFacts) -> NamedPlot | None:
    """What the recorded segments add up to; those done twice after an interruption were paid for twice."""
    segments = facts.of("checkpoint")
    if len(segments) < 2:
        return None
    seconds = list(accumulate(segment["seconds"] for segment in segments))
    joules = list(accumulate(segment["energy"]["joules"] for segment in segments))
    line = Line(name="energy", x=[0.0, *(s / 60 for s in seconds)], y=[0.0, *(j / 3600 for j in joules)], markers=True)
    caption = "Energy of the training over its time, from one recorded state to the next; how it was found: see above."
    svg = draw("energy", caption, "minutes of training", [Panel(label="energy, Wh", lines=[line])])
    return NamedPlot(about="training", svg=svg, caption=caption)


def _layer_name(facts: RunFacts, place: int) -> str:
    """Of a layer with experts; those of the prediction modules come last."""
    model = facts.recipe["model"]
    layer = model["first_k_dense_replace"] + place
    beyond = layer - model["num_hidden_layers"]
    return f"layer {layer + 1}" if beyond < 0 else f"MTP {beyond + 1}"


def _tail_high(series: Any) -> float:
    """Upper end of the axis: the first steps, far from balance, may leave it."""
    return max(2.0, 1.15 * max(max(values[len(values) // 10 :]) for values in series))
