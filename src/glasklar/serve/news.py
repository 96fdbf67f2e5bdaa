"""A run's metrics for the page, read on as they grow; and how far it is, what it took and what is still to come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasklar.provenance.energy import JOULES_PER_KWH, USD_PER_KWH, WATTS_PER_CORE
from glasklar.provenance.rundir import RunDir


class RunNews:
    """Lines of metrics.jsonl by number. A run that is resumed cuts its file back; then reading starts anew."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self._run = RunDir(folder)
        self._path = self._run.metrics_file
        self._lines: list[dict[str, Any]] = []
        self._read = 0
        self._lock = threading.Lock()

    def after(self, since: int) -> dict[str, Any]:
        """{"lines": those from number `since` on, "next": the number to ask for next time}. A `since` beyond the end
        (the file was cut back) gets everything, and `next` tells by how much."""
        with self._lock:
            self._go_on()
            lines = self._lines if since > len(self._lines) else self._lines[since:]
            return {"lines": lines, "next": len(self._lines)}

    def _go_on(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._read:
            self._lines, self._read = [], 0
        if size == self._read:
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read(size - self._read)
        complete = content[: content.rfind(b"\n") + 1]
        self._lines += [json.loads(line) for line in complete.splitlines()]
        self._read += len(complete)

    def progress(self) -> dict[str, Any]:
        """{"stages": [{"kind", "steps", "done"}], "seconds", "seconds_left", "tokens", "joules", "usd", "counted"}.

        Energy is what the checkpoints recorded, and for the work since the last one an estimate at the same power;
        counted: whether counters of the machine measured it. `seconds_left` is a forecast for all stages, None where
        there is nothing yet to make it from, 0 for a finished run.
        """
        with self._lock:
            self._go_on()
            lines = list(self._lines)
        if not self._run.identity_file.is_file():
            return {"stages": [], "seconds": 0.0, "seconds_left": None, "tokens": 0, "joules": 0.0, "usd": 0.0,
                    "counted": False}  # fmt: skip
        stages = [{"kind": s["kind"], "steps": s["steps"], "done": 0} for s in self._run.recipe()["stages"]]
        steps = [line for line in lines if "stage" in line]
        _count(stages, steps)
        seconds = float(lines[-1]["seconds"]) if lines else 0.0
        events = list(_events(self._run.ledger_file))
        finished = any(event["event"] == "released" for event in events)
        joules, counted = _energy(events, seconds)
        left = 0.0 if finished else _seconds_left(self._run.recipe()["stages"], stages, steps)
        return {
            "stages": stages,
            "seconds": seconds,
            "seconds_left": left,
            "tokens": int(lines[-1]["tokens"]) if lines else 0,
            "joules": joules,
            "usd": joules / JOULES_PER_KWH * USD_PER_KWH,
            "counted": counted,
        }


def _events(ledger: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a ledger; the run writes it meanwhile."""
    if ledger.is_file():
        content = ledger.read_bytes()
        yield from (json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines())


def _count(stages: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    """Fills in how many steps of each stage are done. A stage that follows another of its kind begins again at 1."""
    at, before = -1, None
    for line in steps:
        here = (line["stage"], line["step"])
        if before is None or here[0] != before[0] or here[1] <= before[1]:
            at = next((i for i in range(at + 1, len(stages)) if stages[i]["kind"] == here[0]), at)
        stages[at]["done"] = here[1]
        before = here


def _energy(events: list[dict[str, Any]], seconds: float) -> tuple[float, bool]:
    """Joules so far, and whether all of them were counted."""
    parts = [event["data"] for event in events if event["event"] == "checkpoint"]
    parts += [event["data"]["lost"] for event in events if event["event"] in ("stopped", "failed")]
    parts = [part for part in parts if part]
    joules = sum(part["energy"]["joules"] for part in parts)
    known = sum(part["seconds"] for part in parts)
    counted = bool(parts) and all(part["energy"]["source"] != "estimate" for part in parts)
    threads = next((event["data"]["machine"]["threads"] for event in events if event["event"] == "run"), 1)
    watts = joules / known if known > 1 else threads * WATTS_PER_CORE
    return joules + max(0.0, seconds - known) * watts, counted


def _seconds_left(
    recipe: list[dict[str, Any]], stages: list[dict[str, Any]], steps: list[dict[str, Any]]
) -> float | None:
    """Forecast: each stage's tokens at the speed of now, reinforcement at the speed that it has, or half of it before
    it began (it samples, then trains on what it sampled)."""
    if not steps:
        return None
    last = steps[-1]
    speed = max(1.0, float(last["tokens_per_second"]))
    left = 0.0
    running = max((i for i, stage in enumerate(stages) if stage["done"]), default=0)
    for i, (stage, given) in enumerate(zip(stages, recipe, strict=True)):
        if i < running or stage["done"] >= stage["steps"]:
            continue
        if i == running:
            left += float(last["seconds_left"])
        elif stage["kind"] == "rl":
            rollout = given["rollout"]
            left += stage["steps"] * rollout["prompts"] * rollout["samples"] * rollout["max_tokens"] / speed
        else:
            left += stage["steps"] * given["rows"] * given["length"] / speed
    return round(left, 1)
