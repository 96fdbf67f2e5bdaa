"""What the audit costs and what it finds: recording during training, verification, replay, trace, receipts.

    python bench/audit.py RUN                          # a finished run, read only; prints a table
    python bench/audit.py RUN --json                   # one JSON object
    python bench/audit.py RUN --only recording trace   # some of the parts: recording, checking, replay, trace, receipts

recording   steps of the run's first stage, in turns of a few seconds with and without the record (metrics, energy,
            state hash, ledger), a checkpoint at the end of each turn: many times as often as the run has them. Beside
            it the parts by themselves, each as often as the run did it, data hashing, documents and seal among them
checking    `verify` on untouched copies (false alarms) and on copies with one flipped bit anywhere (misses)
replay      stretches drawn by a beacon, done again, compared bit for bit
trace       planted spans in 10 million tokens with boilerplate
receipts    answers given under 32-fold load, signed, verified
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from glasklar.runtime import Runtime, prepare, start

TURNS, WARM_UP = 12, 10
TRACE_TOKENS, DOCUMENT, PLANTED = 10_000_000, 500, 500
BEACON = "bench"
CONCURRENT = 32


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def recording(run: Path, runtime: Runtime, steps: int) -> dict[str, float]:
    """Turns of training with and without the record, in one process, one after the other."""
    from glasklar.corpus import prepare as prepare_corpus
    from glasklar.provenance.energy import EnergyMeter
    from glasklar.provenance.files import write_tensors
    from glasklar.provenance.rundir import RunDir
    from glasklar.recipe import Recipe
    from glasklar.segment import Segment
    from glasklar.train.state import save_state
    from glasklar.training import Training

    recipe = Recipe.read(RunDir(run).recipe(), "recipe.json")
    stage, training = recipe.stages[0], Training(recipe, runtime)
    training.enter(0)
    runner = training.runner(0, prepare_corpus(recipe, run / "data"), run / "checkpoints")
    took: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        RunDir.create_or_open(Path(folder) / "run", recipe.canonical(), "") as record,
    ):

        def with_record(turn: int) -> None:
            segment = Segment(stage, recipe, EnergyMeter(runtime.device).start())
            for step in range(steps):
                figures = training.advance(runner, 0)
                record.metrics.append(segment.line(step + 1, training.position.tokens, figures, 0.0))
            digest = save_state(record.checkpoints / f"00-pretrain-{turn:08d}", *training.state(0))
            record.ledger.append("checkpoint", segment.close(steps, digest, record.metrics.mark()))

        def without() -> None:
            for _ in range(steps):
                training.advance(runner, 0)
            write_tensors(Path(folder) / "plain.safetensors", training.state(0)[0])

        for _ in range(WARM_UP):
            training.advance(runner, 0)
        for turn in range(TURNS):
            on = turn % 4 in (0, 3)  # on, off, off, on: a machine that gets slower or faster favours neither
            began, cpu = time.perf_counter(), time.process_time()
            with_record(turn) if on else without()
            took[on].append((time.perf_counter() - began, time.process_time() - cpu))
    on, off = ([median(values) for values in zip(*took[kind], strict=True)] for kind in (True, False))
    return {
        "steps a turn": steps,
        "turn with the record, s": on[0],
        "turn without, s": off[0],
        "share of wall clock": on[0] / off[0] - 1,
        "share of CPU time": on[1] / off[1] - 1,
    }


def parts(run: Path) -> dict[str, float]:
    """Seconds that each part of the record took in this run: done again as often as the run did it."""
    from glasklar.audit.documents import write_documents
    from glasklar.audit.facts import RunFacts
    from glasklar.audit.report import write_report
    from glasklar.audit.seal import seal
    from glasklar.corpus import select
    from glasklar.data.documents import document_trees
    from glasklar.provenance.ledger import Ledger
    from glasklar.provenance.metrics import Metrics
    from glasklar.provenance.rundir import RunDir
    from glasklar.provenance.signing import Signer
    from glasklar.recipe import Recipe
    from glasklar.train.state import load_state, state_hash

    facts = RunFacts.read(RunDir(run))
    loaded = [load_state(path) for path in (run / "checkpoints").iterdir() if path.is_dir()]
    hashing = median(timed(lambda state=state: state_hash(*state))[0] for state in loaded)
    train = select(Recipe.read(RunDir(run).recipe(), "recipe.json")).train
    with tempfile.TemporaryDirectory() as folder:
        copy = RunDir(shutil.copytree(run, Path(folder) / "run"))
        ledger, metrics = Ledger(Path(folder) / "ledger"), Metrics(Path(folder) / "metrics")
        line = timed(lambda: [ledger.append("checkpoint", facts.of("checkpoint")[0]) for _ in range(20)])[0] / 20
        step = timed(lambda: [metrics.append(facts.steps[0]) for _ in range(200)])[0] / 200
        costs = {
            "hashes of documents, s": timed(lambda: document_trees(train).root)[0],
            "hashes of states, s": 2 * hashing * len(facts.of("checkpoint")),  # tensors, and the file that holds them
            "ledger, s": line * len(facts.events),
            "metrics, s": step * (len(facts.steps) + len(facts.evaluations)),
            "seal, s": timed(lambda: seal(copy, Signer.open(Path(folder))))[0],
        }
        documents = timed(lambda: (write_report(copy), write_documents(copy)))[0]
    record = sum(costs.values())
    return {
        **costs,
        "run, s": facts.seconds,
        "record, share of the run": record / facts.seconds,
        "report and dossier, s": documents,
        "record, report and dossier, share of the run": (record + documents) / facts.seconds,
    }


def checking(run: Path, copies: int, flips: int) -> dict[str, Any]:
    """Alarms on untouched copies; flipped bits that are not found or not named."""
    from glasklar.audit.documents import write_documents
    from glasklar.audit.seal import seal
    from glasklar.audit.verify import verify
    from glasklar.provenance.rundir import RunDir
    from glasklar.provenance.signing import Signer

    alarms = missed = unnamed = 0
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        whole = shutil.copytree(run, home / "whole")
        if not (whole / "attestation.json").exists():  # of a run from before there were statements
            write_documents(RunDir(whole))
            seal(RunDir(whole), Signer.open(home))
        for _ in range(copies):
            copy = shutil.copytree(whole, home / "copy")
            took, found = timed(lambda copy=copy: verify(copy, home=home))
            seconds.append(took)
            alarms += found.verdict != "holds"
            shutil.rmtree(copy)
        files = sorted(path for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
        draw = random.Random(6)
        for number in range(flips):
            # Each file in turn, so that small ones are met as often as large ones.
            path, place = files[number % len(files)], draw.randrange(files[number % len(files)].stat().st_size)
            flip(path, place, bit := draw.randrange(8))
            found = verify(whole, home=home)
            flip(path, place, bit)
            named = any(path.relative_to(whole).as_posix() in e.subject + e.text for e in found.failures)
            missed += found.verdict == "holds"
            unnamed += found.verdict != "holds" and not named
        assert verify(whole, home=home).verdict == "holds", "the flips were taken back"
        size = sum(path.stat().st_size for path in files)
    return {
        "files": len(files),
        "bytes": size,
        "verify, s": median(seconds) if seconds else None,
        "untouched copies": copies,
        "false alarms": alarms,
        "flipped bits": flips,
        "not found": missed,
        "found, file not named": unnamed,
    }


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ (1 << bit)]))


def replaying(run: Path, count: int) -> dict[str, Any]:
    """Drawn stretches, with the threads of the record; the end of RL always among them."""
    from glasklar.audit.replay import Record, draw, replay
    from glasklar.provenance.rundir import RunDir

    record = Record(RunDir(run))
    runtime = start(record.machine["threads"], "cpu", record.recipe.compute)
    drawn = draw(record, BEACON, count)
    chosen = [s for s in record.stretches() if s in drawn or s == record.stretches()[-1]]
    result: dict[str, Any] = {"stretches of the run": len(record.stretches()), "segments": len(record.states)}
    for stretch in chosen:
        seconds, found = timed(lambda stretch=stretch: replay(RunDir(run), lambda _: [stretch], runtime=runtime))
        name = f"{stretch.start or 'seed'} to {stretch.names[-1]}"
        result |= {f"{name}, s": seconds, f"{name}, equal": found.verdict == "holds"}
        if found.verdict != "holds":
            result[f"{name}, why"] = "; ".join(entry.text for entry in found.failures)
    return result


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
    for _ in range(PLANTED):
        document, place = int(rng.integers(len(documents))), int(rng.integers(60, DOCUMENT - 15))
        begin = document * DOCUMENT + place
        planted = ids[begin : begin + 15].tolist()  # the shortest that is promised
        query = [*rng.integers(0, 50_000, 60).tolist(), *planted, *rng.integers(0, 50_000, 60).tolist()]
        seconds, spans = timed(lambda query=query: index.find(query))
        took.append(seconds)
        missed += not any(s.document == document and s.place <= place and s.place + s.stop - s.start >= place + 15
                          for s in spans)  # fmt: skip
    common = [timed(lambda: index.find([*boilerplate.tolist(), *range(60)]))[0] for _ in range(50)]
    return {
        "tokens": TRACE_TOKENS,
        "index, bytes a token": index.nbytes / TRACE_TOKENS,
        "build, s": build,
        "planted spans of 15 tokens": PLANTED,
        "missed": missed,
        "query, median ms": median(took) * 1e3,
        "query, worst ms": max(took) * 1e3,
        "boilerplate in documents": len(documents) // 10,
        "boilerplate query, median ms": median(common) * 1e3,
        "boilerplate query, worst ms": max(common) * 1e3,
    }


def receipts(run: Path, runtime: Runtime, count: int) -> dict[str, Any]:
    """Answers given under load, signed by a server's attestor, verified by a stranger's check."""
    from glasklar.audit.findings import Findings
    from glasklar.audit.receipt import Attestor, check_answer
    from glasklar.data.chat import Message, render
    from glasklar.data.procedural import Mixture
    from glasklar.engine.engine import Engine
    from glasklar.engine.request import SamplingParams
    from glasklar.errors import RecordError
    from glasklar.loading import load
    from glasklar.provenance.receipt import open_receipt
    from glasklar.provenance.rundir import RunDir
    from glasklar.provenance.signing import Signer
    from glasklar.recipe import Recipe

    model = load(run / "model", runtime)
    assert model.tokenizer is not None
    mixture, draw = Mixture.of(Recipe.read(RunDir(run).recipe(), "recipe.json").tasks), random.Random(5)
    asked = []
    for i in range(count):
        question = mixture.draw("test", 99, i if draw.random() < 0.7 else i // 8)[1].question
        prompt = render(model.tokenizer, [Message(role="user", content=question)], None)
        temperature = draw.choice([0.0, 0.7, 1.0, 1.3])
        stop = model.tokenizer.stop_ids
        asked.append((prompt, SamplingParams(max_tokens=80, temperature=temperature, seed=i, stop_ids=stop)))
    engine = Engine(model.network, max_slots=CONCURRENT)
    waiting, open_, ids, logprobs, ends = list(range(count)), {}, {}, {}, {}
    while len(ends) < count:
        while waiting and len(open_) < CONCURRENT:
            number = waiting.pop(0)
            open_[engine.add(*asked[number])] = number
        for event in engine.step():
            number = open_[event.request]
            ids.setdefault(number, []).append(event.token)
            logprobs.setdefault(number, []).append(event.logprob)
            if event.finish is not None:
                ends[open_.pop(event.request)] = event.finish
    verified = refused = same = 0
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        attestor = Attestor(model, runtime, Signer.open(Path(folder)))
        for number, (prompt, params) in enumerate(asked):
            try:
                took, envelope = timed(lambda n=number, a=(prompt, params): attestor.receipt(*a, ids[n], ends[n]))
            except RecordError:
                refused += 1
                continue
            seconds.append(took)
            found, opened = Findings("answer", "receipt"), open_receipt(envelope, "answer")
            check_answer(opened, model, found)
            verified += all(entry.verdict == "holds" for entry in found.entries)
            again = Engine(model.network, max_slots=1).generate([prompt], params)[0]
            same += again.logprobs == logprobs[number]
    return {
        "answers under load": count,
        "tokens": sum(map(len, ids.values())),
        "receipts refused": refused,
        "verified to the bit": verified,
        "log-probabilities that the batch had to the bit": same,
        "receipt, median ms": median(seconds) * 1e3,
    }


PARTS = ("recording", "checking", "replay", "trace", "receipts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=40, help="training steps of a turn with or without the record")
    parser.add_argument("--copies", type=int, default=50)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--stretches", type=int, default=3)
    parser.add_argument("--receipts", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    run, only = arguments.run, arguments.only
    runtime = start(prepare())
    result: dict[str, dict[str, Any]] = {}
    if "recording" in only:
        result["recording, on and off"] = recording(run, runtime, arguments.steps)
        result["recording, by parts"] = parts(run)
    if "checking" in only:
        result["checking"] = checking(run, arguments.copies, arguments.flips)
    if "replay" in only:
        result["replay"] = replaying(run, arguments.stretches)
    if "trace" in only:
        result["trace"] = tracing()
    if "receipts" in only:
        result["receipts"] = receipts(run, runtime, arguments.receipts)
    if arguments.json:
        print(json.dumps(result))
        return
    table = Table("", "", "figure", title=f"audit of {run.name}")
    for part, figures in result.items():
        for name, value in figures.items():
            table.add_row(part, name, shown(name, value))
    Console().print(table)


def shown(name: str, value: Any) -> str:
    if "share" in name:
        return f"{value:.3%}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    main()
