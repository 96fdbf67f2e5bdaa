"""A run in the terminal: one line a stage with loss, speed, accuracy and time left; news above it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from glasklar.model.plan import Plan

if TYPE_CHECKING:  # the pipeline brings torch along, which lists and tables do not need
    from glasklar.pipeline import Stop

NAMES = {"pretrain": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement", "distil": "Distillation"}
QUIET_SECONDS = 30.0


@contextmanager
def bytes_progress(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and seconds; call what it gives with bytes done and bytes in all."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def steps_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Long work in steps, with the time left: call what it gives with what is done now, steps done and steps in all. In
    a file there is a line for each thing."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, last = bar.add_task("", total=None), ""

        def tell(text: str, done: int, total: int) -> None:
            nonlocal last
            if text != last and not console.is_terminal:
                console.print(text, highlight=False, soft_wrap=True)
            last = text
            bar.update(task, description=text, completed=done, total=total)

        yield tell


class TerminalReporter:
    """Implements `pipeline.Reporter` on a rich console; use it as a context manager. In a file or a pipe, where no line
    can be written over, there is a new one every `QUIET_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said = -QUIET_SECONDS  # when the last line was written, where there is no terminal
        self.progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True, min_width=13)),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self.name, self.of, self.began = "", 0, (0.0, 0)
        self.task: TaskID | None = None
        self.accuracy: float | None = None
        self.warned: set[str] = set()

    def __enter__(self) -> TerminalReporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def stage(self, name: str, step: int, of: int) -> None:
        self.name, self.of = NAMES.get(name, name), of
        self.task = self.progress.add_task(self.name, total=of, completed=step, news="")

    def step(self, line: dict[str, Any]) -> None:
        assert self.task is not None
        # All of it fits into 80 columns.
        if line["stage"] == "rl":
            parts = [f"thinks {line['thinking_share']:.0%}", f"{line['length']:.0f} tok"]
            right = f"right {line['correct']:.0%}"
            parts.insert(0, right if self.accuracy is None else f"[green]unseen {self.accuracy:.0%}[/]")
        else:
            parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_second'] / 1000:.1f}k tok/s"]
        parts.append(f"{minutes(line['seconds_left'])} left")
        self._show(line["step"], " · ".join(parts))
        for warning in line.get("warnings", ()):
            if warning.split(":")[-1] not in self.warned:  # the figures change every step, the advice does not
                self.warned.add(warning.split(":")[-1])
                self._say(f"[yellow]· doctor, step {line['step']}: {warning}[/]")

    def _show(self, step: int, news: str) -> None:
        assert self.task is not None
        self.progress.update(self.task, completed=step, news=news)
        now = time.monotonic()
        if self.progress.disable and (now - self.said >= QUIET_SECONDS or step == self.of):
            self.said = now
            self.console.print(f"{self.name} {step}/{self.of} {news}", highlight=False)

    def evaluation(self, line: dict[str, Any]) -> None:
        if "mean" in line:
            self.accuracy = line["mean"]["greedy"]
        if line["evaluation"] != "rl step":
            self.progress.console.print(evaluation_table(line))

    def note(self, text: str) -> None:
        self._say(f"[dim]· {text}[/]")

    def _say(self, text: str) -> None:
        """A line of its own, which in a file stays one line."""
        self.progress.console.print(text, soft_wrap=self.progress.disable)

    def work(self, text: str, done: int, total: int) -> None:
        """Work before the first step, of which there is no line in the metrics."""
        if text != self.name or done < self.began[1]:
            self.began = time.monotonic(), done  # it may go on in the middle
            self.stage(text, done, total)
        since, first = self.began
        left = (time.monotonic() - since) / (done - first) * (total - done) if done > first else None
        self._show(done, "" if left is None else f"{minutes(left)} left")


@contextmanager
def stoppable(stop: Stop) -> Iterator[None]:
    """Ctrl-C and a service manager's signal ask a run to stop. (What is ignored stays so: `nohup`.)"""

    def ask(*_: object) -> None:
        stop.ask()
        # Nothing else may write from here: a signal comes at any moment, also in the middle of a line.
        os.write(sys.stderr.fileno(), b"\nstopping after this step; once more: at once\n")

    heeded = [sent for sent in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(sent) is not signal.SIG_IGN]
    before = {sent: signal.signal(sent, ask) for sent in heeded}
    try:
        yield
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)


class QuietReporter:
    """News of a run that nobody watches."""

    def stage(self, name: str, step: int, of: int) -> None:
        """Nothing to do."""

    def step(self, line: dict[str, Any]) -> None:
        """Nothing to do."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """Nothing to do."""

    def note(self, text: str) -> None:
        """Nothing to do."""

    def work(self, text: str, done: int, total: int) -> None:
        """Nothing to do."""


def evaluation_table(line: dict[str, Any]) -> Table:
    """Accuracy on unseen problems, a row a task, the mean last."""
    if "tasks" not in line:
        table = Table("measure", "value", title=line["evaluation"], title_justify="left")
        table.add_row("bits per byte, held-out documents", f"{line['bits_per_byte']:.3f}")
        return table
    sampled = dict.fromkeys(name for scores in line["tasks"].values() for name in scores if name.startswith("pass@"))
    columns = ["greedy", "thinking", "direct", *(sampled or ("pass@1", "pass@16"))]
    table = Table("unseen problems", *columns, "hard", "tokens", title=line["evaluation"], title_justify="left")
    hard = line.get("hard", {})
    for name, scores in line["tasks"].items():
        table.add_row(
            name, *_shares(scores, columns), *_shares(hard.get(name, {}), ["greedy"]), f"{scores['length']:.0f}"
        )
    mean = line["mean"]
    table.add_row("mean", *_shares(mean, columns), "", f"{mean['length']:.0f}", style="bold")
    return table


def _shares(scores: dict[str, Any], columns: list[str]) -> list[str]:
    return [f"{scores[column]:.0%}" if column in scores else "–" for column in columns]


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def plan_table(plan: Plan) -> Table:
    """A plan as two columns, its assumptions below."""
    table = Table("", "", title=f"plan on {plan.hardware}", title_justify="left", show_header=False)
    rows: dict[str, str] = {
        "parameters": f"{count(plan.params_total)} total, {count(plan.params_active)} active a token",
        "  of prediction modules": count(plan.params_mtp),
        "FLOPs a trained token": f"{plan.flops_per_token_train:.3g}",
        "FLOPs a decoded token": f"{plan.flops_per_token_decode:.3g}",
        "cache a token": f"{plan.cache_bytes_per_token:,} bytes",
        "memory for training": f"{size(plan.memory_training_bytes)} on {devices(plan.devices_training)}",
        "memory for serving": f"{size(plan.memory_serving_bytes)} on {devices(plan.devices_serving)}",
        "decoding": f"{plan.decode_tokens_per_second:,.0f} tokens/s",
    }
    for number, stage in enumerate(plan.stages, start=1):
        rows[f"stage {number}, {stage.name}"] = (
            f"{stage.tokens:.3g} tokens, {duration(stage.hours)}, {energy(stage.energy_kwh)}"
        )
    if plan.hours is not None and plan.energy_kwh is not None and plan.cost_usd is not None:
        rows["together"] = f"{duration(plan.hours)} of one device, {energy(plan.energy_kwh)}, {dollars(plan.cost_usd)}"
    for name, value in rows.items():
        table.add_row(name, value)
    table.caption = "\n".join(plan.assumptions)
    table.caption_justify = "left"
    return table


def keys_table(rows: list[dict[str, Any]], title: str) -> Table | str:
    """Rows of equal names, a column each; keys or their usage."""
    if not rows:
        return f"no {title}"
    names = [name.replace("_", " ") for name in rows[0]]
    columns = (Column(name, overflow="fold", min_width=max(map(len, name.split()))) for name in names)
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def models_table(models: list[dict[str, Any]]) -> Table | str:
    """What `loading.models` found, a row each."""
    if not models:
        return "no models yet; make one with: glasklar up"
    table = Table(*(Column(name, overflow="fold") for name in ("model", "from", "size", "state")))
    for row in models:
        table.add_row(row["name"], row["from"], size(row["bytes"]) if row["bytes"] else "", row["state"])
    return table


def devices(number: int) -> str:
    return "1 device" if number == 1 else f"{number:,} devices"


def count(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes: 12345678 -> "12.3 MB", from a gigabyte on with two decimals and thousands apart."""
    if number >= 1e9:
        return f"{number / 1e9:,.2f} GB"
    return f"{number / 1e6:.3g} MB" if number >= 1e6 else f"{number / 1e3:.3g} kB"


def energy(kwh: float) -> str:
    """0.0123 kWh -> "12.3 Wh"."""
    return f"{kwh:,.4g} kWh" if kwh >= 1 else f"{kwh * 1000:.3g} Wh"


def dollars(number: float) -> str:
    """Nothing that costs something is shown as 0."""
    return f"{number:,.2f} USD" if number >= 0.01 or not number else "less than 0.01 USD"


def duration(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:,.1f} hours"
