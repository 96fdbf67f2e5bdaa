"""What the audit costs and what it finds: recording during training, verification, replay, trace, receipts.

    python bench/audit.py RUN                          # a finished run, read only; prints a table
    python bench/audit.py RUN --json                   # one JSON object
    python bench/audit.py RUN --only recording trace   # some of the parts: recording, checking, replay, trace, …

recording   steps of the run's first stage, in turns of a few seconds with and without the record (metrics, energy,
            state hash, ledger), a checkpoint at the end of each turn: many times as often as the run has them. Beside
            it the parts by themselves, each as often as the run did it, data hashing, documents and seal among them
checking    `verify` on untouched copies (false alarms) and on copies with one changed byte anywhere (misses)
replay      stretches drawn by a beacon, done again, compared bit for bit
trace       planted spans in 10 million tokens with boilerplate
receipts    answers that a server gives under 32-fold load, over its socket, verified by their receipts
same        the recipe, shortened, carried out again: in two processes, on one thread; data with 1 and 2 workers
kills       the whole recipe carried out again, killed with -9 ten times in all stages; states compared with the run's
            (not part of a call without `--only`: it takes twice as long as the run did)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
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
    from glasklar.learn.state import save_state
    from glasklar.provenance.energy import EnergyMeter
    from glasklar.provenance.files import write_tensors
    from glasklar.provenance.rundir import RunDir
    from glasklar.recipe import Recipe
    from glasklar.segment import Segment
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
    from glasklar.learn.state import load_state, state_hash
    from glasklar.provenance.ledger import Ledger
    from glasklar.provenance.metrics import Metrics
    from glasklar.provenance.rundir import RunDir
    from glasklar.provenance.signing import Signer
    from glasklar.recipe import Recipe

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
            flip(path, place, mask := draw.randrange(1, 256))
            found = verify(whole, home=home)
            flip(path, place, mask)
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
        "changed bytes": flips,
        "not found": missed,
        "found, file not named": unnamed,
    }


def flip(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ mask]))


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


def tracing_run(run: Path) -> dict[str, Any]:
    """Spans of the run's own documents, asked for as a server does: with licence, proof and steps of each hit."""
    from glasklar.audit.trace import Tracer
    from glasklar.provenance.hashing import proves
    from glasklar.provenance.rundir import RunDir

    rng, took, missed, unproven = np.random.default_rng(1), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        made, tracer = timed(lambda: Tracer(RunDir(run), Path(folder)))
        opened, _ = timed(lambda: Tracer(RunDir(run), Path(folder)))
    packed, root = tracer.packed, str(tracer.facts["root"])
    long = np.flatnonzero(np.diff(packed.starts) >= 40)
    for document in rng.choice(long, PLANTED):
        begin = int(packed.starts[document]) + int(rng.integers(1, 20))
        query = packed.ids[begin : begin + 18].tolist()
        seconds, found = timed(lambda query=query: tracer.find(query, most=64))
        took.append(seconds)
        wanted = tracer.text(query)
        missed += not any(overlap.text == wanted for overlap in found)
        unproven += not all(proves(bytes.fromhex(o.leaf), o.proof, root) for o in found)
    return {
        "documents": len(packed),
        "tokens": len(packed.ids),
        "index, bytes a token": tracer.tables.index.nbytes / len(packed.ids),
        "tables made, s": made,
        "tables opened again, s": opened,
        "spans of 18 tokens": PLANTED,
        "missed": missed,
        "with a proof that does not hold": unproven,
        "answer with up to 64 documents, median ms": median(took) * 1e3,
        "answer with up to 64 documents, worst ms": max(took) * 1e3,
    }


def receipts(run: Path, runtime: Runtime, count: int) -> dict[str, Any]:
    """Answers that a server gives under 32-fold load, whole and streamed, over its socket; each verified by its receipt
    as a stranger would, on an engine that is alone, without drafts and with an empty cache."""
    from glasklar.audit.findings import Findings
    from glasklar.audit.receipt import check_answer
    from glasklar.loading import load, open_folder
    from glasklar.provenance.receipt import open_receipt
    from glasklar.serve.live import LiveServer
    from glasklar.serve.server import Site

    with tempfile.TemporaryDirectory() as folder:
        model, site = open_folder(run / "model", runtime), Site(home=Path(folder), port=0)
        with LiveServer(run, site) as server, httpx.Client(base_url=server.url, timeout=300) as web:
            server.release(model)
            bodies = questions(run, model.name, count)
            began = time.perf_counter()
            with ThreadPoolExecutor(CONCURRENT) as pool:
                replies = list(pool.map(lambda body: asked(web, body), bodies))
            took = time.perf_counter() - began
            alone = [asked(web, body) for body in bodies[: count // 4]]  # one by one: these are drafted for
            counters = web.get("/engine").raise_for_status().json()["counters"]
            seconds, envelopes = [], []
            for reply, _ in [*replies, *alone]:
                one, found = timed(lambda reply=reply: web.get(f"/v1/receipts/{reply}").raise_for_status().json())
                seconds.append(one)
                envelopes.append(found["receipt"])
    whole, verified, tokens, failures = load(run / "model", runtime), 0, 0, []
    for envelope in envelopes:
        found, opened = Findings("answer", "receipt"), open_receipt(envelope, "answer")
        check_answer(opened, whole, found)
        good = all(entry.verdict == "holds" for entry in found.entries)
        verified, tokens = verified + good, tokens + len(opened.ids)
        failures += [] if good else [str(found)]
    return {
        "answers under load, at a time": CONCURRENT,
        "answers under load": count,
        "answers one by one": len(alone),
        "tokens": tokens,
        "load, s": took,
        "prompt tokens that the prefix cache had": sum(cached for _, cached in [*replies, *alone]),
        "tokens drafted": counters.get("drafted"),
        "of these right": counters.get("accepted"),
        "receipts verified to the bit": verified,
        "receipts that failed": failures[:3],
        "receipt, median ms": median(seconds) * 1e3,
    }


def questions(run: Path, model: str, count: int) -> list[dict[str, Any]]:
    """Test problems of the run's tasks; about a third are asked again, so that prefixes are found in the cache."""
    from glasklar.data.procedural import Mixture
    from glasklar.provenance.rundir import RunDir
    from glasklar.recipe import Recipe

    mixture, draw = Mixture.of(Recipe.read(RunDir(run).recipe(), "recipe.json").tasks), random.Random(5)
    bodies = []
    for i in range(count):
        question = mixture.draw("test", 99, i if draw.random() < 0.7 else i // 8)[1].question
        body = {
            "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 80, "seed": i,
            "temperature": draw.choice([0.0, 0.7, 1.0, 1.3]), "stream": i % 3 == 0,
        }  # fmt: skip
        special = [{}, {}, {"top_p": 0.9}, {"presence_penalty": 0.5}, {"response_format": {"type": "json_object"}}]
        bodies.append({**body, **draw.choice(special)})
    return bodies


def asked(web: httpx.Client, body: dict[str, Any]) -> tuple[str, int]:
    """Id of the reply, and how many tokens of the prompt the cache had."""
    options = {"stream_options": {"include_usage": True}} if body["stream"] else {}
    reply = web.post("/v1/chat/completions", json={**body, **options}).raise_for_status()
    if body["stream"]:
        chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        return chunks[0]["id"], chunks[-1]["usage"]["prompt_cache_hit_tokens"]
    return reply.json()["id"], reply.json()["usage"]["prompt_cache_hit_tokens"]


def same(run: Path, shorten: int) -> dict[str, Any]:
    """The run's recipe, shortened, carried out anew in processes of their own: twice from nothing, once on one thread.
    All states of all stages compared; the data also with one and two workers."""
    from glasklar.corpus import prepare as prepare_corpus
    from glasklar.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        path = home / "short.toml"
        path.write_text(shortened((run / "recipe.toml").read_text(encoding="utf-8"), shorten), encoding="utf-8")

        def carried_out(name: str, *more: str) -> dict[str, str]:
            command = [sys.executable, "-m", "glasklar.cli", "train", str(path), "--run", str(home / name), *more]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "GLASKLAR_HOME": folder})
            return states(home / name)

        took, first = timed(lambda: carried_out("first"))
        second = carried_out("second")
        one = carried_out("one", "--threads", "1")
        recipe = load_recipe(str(path))
        facts = [prepare_corpus(recipe, home / f"data{n}", n).facts for n in (1, 2)]
    return {
        "recipe": f"{recipe.name}, steps divided by {shorten}",
        "training, s": took,
        "states recorded, all stages": len(first),
        "equal in a second process": sum(second.get(name) == state for name, state in first.items()),
        "data equal with 1 and 2 workers": facts[0] == facts[1],
        "states equal on one thread": sum(one.get(name) == state for name, state in first.items()),
    }


def killed(run: Path, kills: int) -> dict[str, Any]:
    """The run's recipe from nothing in processes that are killed with -9: once in every stage, the other times at
    moments drawn evenly from the run's wall clock, so that data and evaluations are hit as well."""
    recorded, draw = steps_of(run), random.Random(time.time_ns())
    stages = sorted({stage for stage, _ in recorded})
    moments = [draw.choice([i for i, (stage, _) in enumerate(recorded) if stage == name]) for name in stages]
    ends = [0.0, *(seconds for _, seconds in recorded)]
    for moment in (draw.uniform(0, ends[-1]) for _ in range(kills - len(stages))):
        moments.append(sum(end <= moment for end in ends) - 1)
    fell: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        command = [sys.executable, "-m", "glasklar.cli", "train", str(run / "recipe.toml"), "--run", str(copy)]
        work = {"stdout": -3, "stderr": -3, "env": {**os.environ, "GLASKLAR_HOME": folder}}
        began = time.perf_counter()
        for moment in sorted(moments):
            with subprocess.Popen(command, **work) as process:
                while len(steps_of(copy)) < moment and process.poll() is None:
                    time.sleep(0.1)  # reading the record takes time from the training
                time.sleep(draw.uniform(0, ends[moment + 1] - ends[moment]))
                assert process.poll() is None, f"the process ended by itself after {len(steps_of(copy))} steps"
                process.kill()
            done = steps_of(copy)
            fell.append(f"{done[-1][0]} {len(done)}" if done else "data")
            print(f"killed: {fell[-1]}", file=sys.stderr)
        subprocess.run(command, check=True, **work)
        took = time.perf_counter() - began
        wanted, found = states(run), states(copy)
    return {
        "killed with -9 at (stage, steps done)": fell,
        "training with the kills, s": took,
        "states recorded, all stages": len(wanted),
        "equal after the kills": sum(found.get(name) == state for name, state in wanted.items()),
    }


def states(run: Path) -> dict[str, str]:
    """The state hash of every checkpoint that the ledger has."""
    from glasklar.audit.verify_replays import checkpoint_events
    from glasklar.provenance.ledger import read_ledger

    events, _ = read_ledger(run / "ledger.jsonl")
    return {key: data["state_hash"] for key, data in checkpoint_events(events).items()}


def steps_of(run: Path) -> list[tuple[str, float]]:
    """Stage and seconds since the run's beginning of every step on record, a torn last line left out."""
    path = run / "metrics.jsonl"
    lines = map(json.loads, path.read_bytes().split(b"\n")[:-1]) if path.exists() else []
    return [(line["stage"], line["seconds"]) for line in lines if "stage" in line]


def shortened(recipe: str, by: int) -> str:
    """A recipe with fewer steps, documents and problems; shapes, stages and settings stay. RL always begins."""

    def divided(match: re.Match[str]) -> str:
        least = 2 if match[1].endswith("_every") else 8
        return f"{match[1]} = {max(least, int(match[2]) // by)}"

    names = "steps|checkpoint_every|evaluate_every|documents|demonstrations|problems|sampled_problems|watched_problems"
    text = re.sub(rf"\b({names}) = (\d+)", divided, recipe)
    return text.replace("accuracy = 0.8, margin = 0.1", "accuracy = 0.0, margin = 0.0")


PARTS = ("recording", "checking", "replay", "trace", "receipts", "same", "kills")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--steps", type=int, default=40, help="training steps of a turn with or without the record")
    parser.add_argument("--copies", type=int, default=50)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--stretches", type=int, default=3)
    parser.add_argument("--receipts", type=int, default=200)
    parser.add_argument("--shorten", type=int, default=25, help="divides the steps of what is trained for `same`")
    parser.add_argument("--kills", type=int, default=10)
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
        result["trace of the run"] = tracing_run(run)
    if "receipts" in only:
        result["receipts"] = receipts(run, runtime, arguments.receipts)
    if "same" in only:
        result["same bits"] = same(run, arguments.shorten)
    if "kills" in only:
        result["kills"] = killed(run, arguments.kills)
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
