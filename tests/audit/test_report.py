"""Oracles: the figures that `synthetic_run` wrote; an HTML parser; the sums done again here."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from statistics import fmean

import pytest
from synthetic_run import AFTER, BEFORE, write_run

from glasklar.audit.facts import RunFacts, running_steps
from glasklar.audit.figures import Line, Panel, draw, smoothed
from glasklar.audit.report import duration, energy, flops, money, quantity, report, write_report
from glasklar.audit.verdict import Measured, what_rl_did
from glasklar.errors import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


class Page(HTMLParser):
    """Collects what a page refers to, its text, and whether all elements are closed."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_attributes(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.handle_attributes(attributes)

    def handle_attributes(self, attributes):
        for name, value in attributes:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "clip-path"):
                self.references.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_refers_to_nothing_outside(run):
    text = run.report_html.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert len(page.ids) == len(set(page.ids)), "plots share an id"
    targets = {re.sub(r"^url\((.*)\)$", r"\1", reference).removeprefix("#") for reference in page.references}
    assert targets <= set(page.ids)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "Sums and <letters> that learn to think" in page.text, "escaped once, not twice"
    assert "#a000" not in text, "a placeholder colour was left"


def test_table_against_the_figures_written(run):
    markdown = run.report_md.read_text(encoding="utf-8")
    row = next(line for line in markdown.splitlines() if line.startswith("| sum |"))
    assert row == "| sum | 55 → 96 | 52 → 95 | 97 → 99 | 93 → 96 | 40 → 41 | 20 → 45 | 14 → 41 |"
    names = ("sum", "letters", "equation")  # "scope" does not count as reasoning
    before, after = (fmean(scores[name]["greedy"] for name in names) * 100 for scores in (BEFORE, AFTER))
    mean = next(line for line in markdown.splitlines() if line.startswith("| mean |"))
    assert f"| {before:.0f} → {after:.0f} |" in mean
    assert "switch of mode" in markdown
    assert "&lt;letters>" in markdown


def test_costs_against_the_ledger(run):
    costs = {cost.kind: cost for cost in RunFacts.read(run).costs()}
    assert list(costs) == ["pretrain", "sft", "rl"]
    assert costs["rl"].joules == 2 * 60 * 10
    assert costs["rl"].flops == 8e11
    assert costs["sft"].tokens == 60 * 8192
    assert costs["rl"].usd == pytest.approx(1200 / 3.6e6 * 0.30)


def test_both_files_say_the_same(run):
    page = Page()
    page.feed(run.report_html.read_text(encoding="utf-8"))
    markdown = run.report_md.read_text(encoding="utf-8")
    for text in (
        "from rl step 40 to rl step 45",
        "rejection sampling",
        "0.025 US cents",
        "1.234 bits a byte",
        "MTP"[:0],
    ):
        assert text in page.text
        assert text in markdown


def test_same_run_gives_the_same_report(run):
    first = run.report_html.read_bytes()
    write_report(run)
    assert run.report_html.read_bytes() == first


def test_what_was_not_measured_is_left_out(tmp_path):
    run = write_run(tmp_path, rl=False, baselines=False)
    write_report(run)
    markdown = run.report_md.read_text(encoding="utf-8")
    for absent in ("What reinforcement did", "Beside it", "RL doctor", "→", "nan", "None"):
        assert absent not in markdown
    assert "| sum | 55 | 52 | 97 | 93 | 40 | 20 | 14 |" in markdown


def test_run_that_has_just_begun(tmp_path):
    run = write_run(tmp_path, rl=False, baselines=False)
    run.metrics_file.unlink()
    first = run.ledger_file.read_bytes().split(b"\n")[0] + b"\n"
    run.ledger_file.write_bytes(first + b'{"data":{"unfin')
    assert report(RunFacts.read(run))
    write_report(run)
    assert "unfinished" in run.report_md.read_text(encoding="utf-8")


def test_refused_reinforcement_is_said(tmp_path):
    run = write_run(tmp_path, rl=False)
    facts = RunFacts.read(run)
    event = facts.events[0].__class__.make(0, "", "readiness", {"thinking": 0.4, "direct": 0.35, "ready": False}, "")
    facts.events.append(event)
    texts = [block.text for block in report(facts) if hasattr(block, "text")]
    assert any("RL was left out: the model was right in 40% when made to think" in text for text in texts)


def test_changed_ledger_gives_no_report(tmp_path):
    run = write_run(tmp_path, rl=False)
    run.ledger_file.write_bytes(run.ledger_file.read_bytes().replace(b'"documents":120000', b'"documents":120001'))
    with pytest.raises(CheckpointError, match="line 2"):
        write_report(run)
    assert not run.report_md.exists()


def test_broken_baselines_are_named(tmp_path):
    run = write_run(tmp_path, rl=False)
    (tmp_path / "baselines.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"baselines\.json"):
        write_report(run)


@pytest.mark.parametrize(
    ("before", "after", "thinking", "best", "said"),
    [
        (0.62, 0.95, 0.93, 0.97, "a switch of mode, not a new skill"),
        (0.62, 0.95, 0.93, None, "a switch of mode, not a new skill"),
        (0.30, 0.90, 0.32, 0.60, "a new skill"),
        (0.30, 0.90, 0.60, 0.95, "about 50% of the gain is a switch of mode"),
        (0.60, 0.90, 0.60, 0.95, "sharpened what was there"),
        (0.60, 0.90, None, None, "cannot be said"),
        (0.90, 0.92, 0.95, 0.99, "changed little"),
        (0.90, 0.60, 0.95, 0.99, "did harm"),
    ],
)
def test_verdict_follows_from_the_figures(before, after, thinking, best, said):
    figures = Measured(greedy_before=before, greedy_after=after, thinking_before=thinking, pass16_before=best)
    sentence = what_rl_did(figures)
    assert said in sentence
    assert f"from {before:.0%} to {after:.0%}" in sentence


def test_smoothing_against_a_window_done_by_hand():
    assert smoothed([1.0, 2.0, 6.0, 2.0, 4.0], 3) == [1.0, 3.0, pytest.approx(10 / 3), 4.0, 4.0]
    assert smoothed([3.0], 0) == [3.0]
    assert smoothed([0.1] * 50, 9) == pytest.approx([0.1] * 50)


def test_many_close_lines_keep_their_labels_apart():
    lines = [Line(name=f"task {n}", x=[0, 1], y=[0.5, 0.97 + n / 1000]) for n in range(9)]
    svg = draw("many", 'a "title"', "steps", [Panel(label="right", lines=lines, scale="percent")])
    heights = {text: float(y) for y, text in re.findall(r' y="([\d.]+)"[^>]*>(task \d)</text>', svg)}
    assert len(heights) == 9
    ordered = sorted(heights.values())
    assert min(b - a for a, b in pairwise(ordered)) > 9, "labels of 9.5 points overlap"
    assert "&quot;title&quot;" in svg


def test_repeated_stages_count_on():
    assert running_steps([{"step": s} for s in (1, 2, 3, 1, 2)]) == [1, 2, 3, 4, 5]


def test_figures_for_people():
    assert [duration(s) for s in (0.4, 59, 61, 3661)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]
    assert [quantity(n) for n in (999, 1500, 2.5e6, 671e9)] == ["999", "1.5 k", "2.5 M", "671 B"]
    assert [energy(j) for j in (36.0, 3600.0, 3.6e6, 3.6e9)] == ["10 mWh", "1 Wh", "1 kWh", "1 MWh"]
    assert [flops(n) for n in (5e6, 2e9, 3.5e15)] == ["5 MFLOP", "2 GFLOP", "3.5 PFLOP"]
    assert [money(m) for m in (1e-6, 0.00025, 0.5)] == ["< 0.001 US cents", "0.025 US cents", "50 US cents"]
    assert money(1234.5) == "1,234.50 USD"


def test_synthetic_run_is_a_run(run):
    assert RunFacts.read(run).state == "finished, model released"
    assert json.loads(run.identity_file.read_bytes())["name"] == "tiny"
