"""Soak of the engine: random traffic for a quarter of an hour, with the cache's books audited whenever nothing runs.

    python bench/soak.py                              # 15 minutes on a small random network
    python bench/soak.py --model spark --minutes 2    # on a released model: a run, a folder, a name
    python bench/soak.py --json

Waves of requests arrive at random: some many at once, some one by one, some cancelled at any moment. Prompts begin
alike, are asked again or go on from earlier answers; settings are of all kinds, priorities differ, the cache is too
small for all (so that requests give way), cold pages go to disk, drafts are on. Between the waves nothing runs: then
every page must be accounted for. A share of all answers is computed again by an engine that does nothing else, and must
come out the same bit for bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from glasklar import runtime

THREADS = runtime.prepare()

import os  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from glasklar.engine.engine import Engine  # noqa: E402
from glasklar.engine.guide import ThinkingBudget  # noqa: E402
from glasklar.engine.paged_runner import PagedRunner  # noqa: E402
from glasklar.engine.request import Completion, SamplingParams, TokenEvent  # noqa: E402
from glasklar.engine.spill import SpillConfig  # noqa: E402
from glasklar.loading import find_model, load  # noqa: E402
from glasklar.model.init import build, initialise  # noqa: E402
from glasklar.model.transformer import Transformer  # noqa: E402
from glasklar.provenance.rundir import home  # noqa: E402
from glasklar.recipe import load_recipe  # noqa: E402

CHECKED = 0.02  # share of answers that are computed again


@dataclass
class Report:
    """What happened; `differing` and `lost_pages` must be 0."""

    minutes: float
    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    pages_spilled: int = 0
    pages_restored: int = 0
    idle_checks: int = 0
    lost_pages: int = 0
    compared: int = 0
    differing: int = 0
    rss_mb_after_first_minute: float = 0.0
    rss_mb_at_end: float = 0.0
    tokens_per_second: float = 0.0
    drafts: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request of a wave with what came of it."""

    prompt: list[int]
    params: SamplingParams
    budget: int
    events: list[TokenEvent] = field(default_factory=list)
    cancelled: bool = False


class Soak:
    """The traffic on one engine."""

    def __init__(self, model: Transformer, folder: Path, seed: int) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.vocabulary, self.context = model.config.vocab_size, model.config.max_position_embeddings
        self.engine = Engine(
            model, max_slots=24, max_tokens=max(2048, 2 * self.context), chunk_tokens=128,
            spill=SpillConfig(folder=folder, model="soak", max_bytes=64 << 20),
        )  # fmt: skip
        self.texts: list[list[int]] = []  # prompts and answers that later prompts begin with

    def prompt(self) -> list[int]:
        rng = self.rng
        start = (
            rng.choice(self.texts)[: rng.randrange(1, self.context // 2)] if self.texts and rng.random() < 0.7 else []
        )
        return start + [rng.randrange(self.vocabulary) for _ in range(rng.randint(1, self.context // 4))]

    def settings(self) -> SamplingParams:
        rng = self.rng
        return SamplingParams(
            max_tokens=rng.choice((1, 16, 64, 1000)),
            temperature=rng.choice((0.0, 0.6, 1.0)), seed=rng.randrange(1 << 40),
            top_k=rng.choice((0, 0, 0, 20)), top_p=rng.choice((1.0, 1.0, 0.9)), logprobs=rng.choice((0, 0, 0, 3)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.3)), stop_ids=(1,),
        )  # fmt: skip

    def wave(self, report: Report) -> dict[int, Asked]:
        """Some requests, to their end."""
        rng, engine = self.rng, self.engine
        left, gap = rng.choice((1, 4, 12, 24)), rng.choice((0, 0, 3))
        asked: dict[int, Asked] = {}
        steps = 0
        while left or engine.has_work:
            if left and steps >= gap * len(asked):
                one = Asked(self.prompt(), self.settings(), rng.choice((0, 0, 0, 12)))
                for _ in range(min(left, rng.choice((1, 1, 1, 3)))):
                    again = Asked(one.prompt, one.params, one.budget)
                    guide = self.guide(again.budget)
                    asked[engine.add(again.prompt, again.params, rng.choice((0, 0, 1)), guide)] = again
                    left -= 1
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                asked[event.request].events.append(event)
            if asked and rng.random() < 0.01:
                number = rng.choice(list(asked))
                asked[number].cancelled |= not ended(asked[number])
                engine.cancel(number)
            steps += 1
        report.requests += len(asked)
        return asked

    def guide(self, budget: int) -> ThinkingBudget | None:
        return (
            ThinkingBudget(budget, open_id=2, close_id=3, vocabulary=self.vocabulary, within=True) if budget else None
        )

    def audit(self, report: Report) -> None:
        """Nothing runs: rows hold no page, all pages are accounted for."""
        assert isinstance(self.engine.runner, PagedRunner)
        pages = self.engine.runner.cache
        report.idle_checks += 1
        try:
            pages.check()
            assert not pages._held.any(), "rows hold pages while nothing runs"
        except AssertionError as error:
            report.lost_pages += 1
            print(error, file=sys.stderr)

    def compare(self, asked: Asked, report: Report) -> None:
        """The same request alone."""
        engine = Engine(self.model, max_slots=1, max_tokens=2 * self.context, draft_tokens=0)
        engine.add(asked.prompt, asked.params, guide=self.guide(asked.budget))
        events: list[TokenEvent] = []
        while engine.has_work:
            events += engine.step()
        report.compared += 1
        report.differing += completion(events) != completion(asked.events)


def ended(asked: Asked) -> bool:
    return bool(asked.events) and asked.events[-1].finish is not None


def completion(events: list[TokenEvent]) -> Completion:
    return Completion(
        ids=[e.token for e in events], logprobs=[e.logprob for e in events], finish=events[-1].finish or "error",
        alternatives=[e.alternatives for e in events],
    )  # fmt: skip


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def soak(model: Transformer, minutes: float, seed: int) -> Report:
    """Runs the traffic and reports."""
    report, begin = Report(minutes), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glasklar-soak-") as folder:
        traffic = Soak(model, Path(folder), seed)
        while (spent := time.monotonic() - begin) < minutes * 60:
            asked = traffic.wave(report)
            traffic.audit(report)
            whole = [one for one in asked.values() if ended(one)]
            report.finished += len(whole)
            report.cancelled += sum(one.cancelled for one in asked.values())
            report.cached_tokens += sum(one.events[0].cached for one in whole)
            for one in whole:
                if traffic.rng.random() < CHECKED:
                    traffic.compare(one, report)
            kept = [one.prompt + [event.token for event in one.events] for one in whole]
            traffic.texts = (traffic.texts + kept)[-40:]
            if spent < 60:
                report.rss_mb_after_first_minute = rss_mb()
        report.rss_mb_at_end = rss_mb()
        finish(report, traffic.engine, time.monotonic() - begin)
    return report


def finish(report: Report, engine: Engine, seconds: float) -> None:
    stats = engine.stats
    report.tokens, report.prompt_tokens, report.preempted = stats.tokens, stats.prompt_tokens, stats.preempted
    report.drafted, report.accepted = stats.drafted, stats.accepted
    report.tokens_per_second = stats.tokens / seconds
    report.minutes = seconds / 60
    assert isinstance(engine.runner, PagedRunner)
    assert engine.drafter is not None
    spill = engine.runner.cache.spill
    assert spill is not None
    assert spill.failure is None, spill.failure
    report.pages_spilled, report.pages_restored = spill.written, spill.found
    for way, tally in engine.drafter.gain.tallies.items():
        speed = "" if tally.speed is None else f", {tally.speed:.0f} tokens/s a row"
        report.drafts[f"{way.source} {way.depth}"] = f"{tally.accepted} of {tally.drafted}{speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--model", help="a run, a folder or a name; else spark's shape with random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    machine = runtime.start(THREADS, device="cpu")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    if arguments.model:
        model = load(find_model(arguments.model, home(os.environ)), machine, "bfloat16").network
    else:
        model = initialise(build(load_recipe("spark").model.replace(initializer_range=0.3), dtype=torch.bfloat16), 1)
    report = soak(model.requires_grad_(False), arguments.minutes, arguments.seed)
    if arguments.json:
        print(json.dumps(asdict(report)))
    else:
        table = Table("soak", "")
        for name, value in asdict(report).items():
            table.add_row(name.replace("_", " "), f"{value:.1f}" if isinstance(value, float) else str(value))
        Console(width=110).print(table)
    sys.exit(1 if report.differing or report.lost_pages else 0)


if __name__ == "__main__":
    main()
