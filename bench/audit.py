"""What the audit costs: recording during training, verifying, replaying, tracing, receipts.

    python bench/audit.py RUN                 # a finished run, read only; prints a table
    python bench/audit.py RUN --json          # one JSON object
    python bench/audit.py RUN --replay 9      # also replays a segment and compares its time with the recorded one

The cost of recording: what hashing states, the fsyncs of ledger and metrics, and sealing take, as a share of the run's
own wall clock. (Checkpoints would be written without an audit too; their hashes would not.)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from glasklar.runtime import Runtime, prepare, start

TRACE_TOKENS, DOCUMENT, QUERIES = 10_000_000, 500, 200


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def recording(run: Path) -> dict[str, float]:
    """Seconds that the record took in this run, each part done again as often as the run did it."""
    from glasklar.audit.facts import RunFacts
    from glasklar.audit.seal import file_hashes
    from glasklar.provenance.files import write_atomic
    from glasklar.provenance.ledger import Ledger
    from glasklar.provenance.metrics import Metrics
    from glasklar.provenance.rundir import RunDir
    from glasklar.train.state import load_state, state_hash

    facts = RunFacts.read(RunDir(run))
    states = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    hashing = sum(timed(lambda path=path: state_hash(*load_state(path)))[0] for path in states) / len(states)
    with tempfile.TemporaryDirectory() as folder:
        ledger, metrics = Ledger(Path(folder) / "ledger"), Metrics(Path(folder) / "metrics")
        line = timed(lambda: [ledger.append("checkpoint", facts.of("checkpoint")[0]) for _ in range(20)])[0] / 20
        step = timed(lambda: [metrics.append(facts.steps[0]) for _ in range(200)])[0] / 200
        write_atomic(Path(folder) / "x", b"")
    return {
        "state hashes": hashing * len(facts.of("checkpoint")),
        "ledger": line * len(facts.events),
        "metrics": step * (len(facts.steps) + len(facts.evaluations)),
        "sealing": timed(lambda: file_hashes(run))[0] * 2,
        "run": facts.seconds,
    }


def tracing() -> dict[str, float]:
    """The index over 10 million tokens drawn by Zipf's law with boilerplate in every tenth document."""
    from glasklar.data.batches import PackedDocuments
    from glasklar.data.trace import TraceIndex

    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.2, TRACE_TOKENS) % 50_000).astype(np.int32)
    boilerplate = rng.integers(0, 50_000, 60).astype(np.int32)
    for begin in range(0, TRACE_TOKENS, DOCUMENT * 10):
        ids[begin : begin + 60] = boilerplate
    starts = np.append(np.arange(0, TRACE_TOKENS, DOCUMENT), TRACE_TOKENS)
    documents = PackedDocuments(ids, starts, np.ones(TRACE_TOKENS, np.float32))
    build, index = timed(lambda: TraceIndex.build(documents))
    took, missed = [], 0
    for _ in range(QUERIES):
        document, place = int(rng.integers(len(documents))), int(rng.integers(60, DOCUMENT - 40))
        begin = document * DOCUMENT + place
        query = [*boilerplate.tolist(), *rng.integers(0, 50_000, 60).tolist(), *ids[begin : begin + 20].tolist()]
        seconds, spans = timed(lambda query=query: index.find(query))
        took.append(seconds)
        missed += not any(span.document == document and span.stop - span.start >= 20 for span in spans)
    return {
        "bytes a token": index.nbytes / TRACE_TOKENS,
        "build, s": build,
        "query, median ms": float(np.median(took)) * 1e3,
        "query, worst ms": max(took) * 1e3,
        "missed": missed,
    }


def checking(run: Path, segment: str | None, runtime: Runtime) -> dict[str, float]:
    from glasklar.audit.replay import replay
    from glasklar.audit.verify import verify
    from glasklar.provenance.rundir import RunDir

    with tempfile.TemporaryDirectory() as home:
        seconds, found = timed(lambda: verify(run, home=Path(home)))
    result: dict[str, Any] = {"verify, s": seconds, "holds": found.exit_code == 0}
    if segment is not None:
        seconds, found = timed(lambda: replay(RunDir(run), lambda r: [r.leading_to(segment)], runtime=runtime))
        result |= {f"replay to segment {segment}, s": seconds, "equal": found.exit_code == 0}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--replay", metavar="SEGMENT")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runtime = start(prepare())
    costs = recording(arguments.run)
    total = sum(seconds for name, seconds in costs.items() if name != "run")
    costs |= {"share of the run": total / costs["run"]}
    result = {
        "recording": costs,
        "checking": checking(arguments.run, arguments.replay, runtime),
        "trace, 10 M tokens": tracing(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    table = Table("", "", "figure", title=f"audit of {arguments.run.name}")
    for part, figures in result.items():
        for name, value in figures.items():
            table.add_row(part, name, f"{value:.3%}" if "share" in name else f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    main()
