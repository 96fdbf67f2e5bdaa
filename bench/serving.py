"""The server under load, on this machine: answers, times, leaks, overload.

    python bench/serving.py RUN --json docs/lab/serving.json   # five minutes of 64 streams
    python bench/serving.py RUN --seconds 30 --streams 16

RUN is a run folder or a model. `glasklar serve` runs beside this script, which asks it over loopback sockets:

1. The time to the first token of an idle server beside that of the bare engine on the same prompts, in turns.
2. Streams that ask one question after the other; one in eight hangs up at a random moment; in the middle the engine's
   process is killed (SIGKILL). Every whole answer is compared, character by character, with the one that the bare
   engine gave alone at the same seed before the server was started. Then what the processes hold is compared with what
   they held after a warm-up.
3. Ten times as many requests at once as the queue holds; then the same questions again.

It uses loopback alone, ends by itself, and exits with 1 if an answer was lost or wrong or anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasklar import runtime

THREADS = runtime.prepare()

from glasklar.data.chat import Message, Splitter, render  # noqa: E402
from glasklar.engine.engine import Engine  # noqa: E402
from glasklar.engine.request import SamplingParams  # noqa: E402
from glasklar.loading import Model, find_model, load  # noqa: E402
from glasklar.provenance.rundir import home  # noqa: E402

CASES, MAX_TOKENS, TEMPERATURE = 64, 128, 1.0
RUNNING, QUEUED = 64, 64
LEAVES = 1 / 8  # of the requests are left in the middle
WARM_UP = 15.0  # seconds of load before what is held is noted
# What a process may hold more at the end than after the warm-up: its allocator keeps pages that lie scattered.
SLACK = 24 << 20


@dataclass(frozen=True)
class Case:
    question: str
    seed: int
    reasoning: str
    content: str


@dataclass
class Tally:
    """What became of the requests, and how long they took (seconds)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


# --- the bare engine ---------------------------------------------------------------------------------------------


def questions(chance: random.Random) -> list[str]:
    """Sums, as spark knows them, of different lengths."""
    found = []
    for _ in range(CASES):
        numbers = [str(chance.randrange(1, 10)) for _ in range(chance.randrange(2, 7))]
        text = numbers[0] + "".join(chance.choice("+-") + number for number in numbers[1:])
        found.append(f"What is {text}?")
    return found


def alone(model: Model, asked: list[str]) -> list[Case]:
    """The answers that the server must give: each computed by an engine with nobody beside it."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    engine = Engine(model.network, max_slots=1)
    cases = []
    for seed, question in enumerate(asked):
        prompt = render(tokenizer, [Message(role="user", content=question)], None)
        [completion] = engine.generate([prompt], params(model, seed))
        splitter = Splitter(tokenizer, None)
        pieces = [piece for token in completion.ids for piece in splitter.push(token)] + splitter.flush()
        reasoning, content = ("".join(t for c, t in pieces if c == channel) for channel in ("reasoning", "content"))
        cases.append(Case(question, seed, reasoning, content))
    return cases


def params(model: Model, seed: int) -> SamplingParams:
    assert model.tokenizer is not None
    stop = model.tokenizer.stop_ids
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=seed, stop_ids=stop)


def first_token(engine: Engine, model: Model, case: Case) -> float:
    """Milliseconds of the bare engine, from the text to the first token."""
    begin = time.perf_counter()
    prompt = render(model.tokenizer, [Message(role="user", content=case.question)], None)  # type: ignore[arg-type]
    number = engine.add(prompt, params(model, case.seed))
    while not engine.step():
        pass
    took = time.perf_counter() - begin
    engine.cancel(number)
    return took * 1000


# --- the server --------------------------------------------------------------------------------------------------


class Server:
    """`glasklar serve` in a home of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        words = ["serve", str(model), "--port", "0", "--running", str(RUNNING), "--queued", str(QUEUED)]
        environ = {**os.environ, "GLASKLAR_HOME": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glasklar.cli", *words], stdout=subprocess.PIPE, env=environ, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at http://" not in line:
            raise SystemExit("the server did not start")
        self.name, _, rest = line.partition(" at http://")
        self.port = int(rest.split()[0].rpartition(":")[2])

    @property
    def engine(self) -> int:
        """Process id of the engine: the server's child."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks).split()
        if not children:
            raise LookupError(f"{found} is empty")
        return int(children[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


async def post(port: int, body: dict[str, Any]) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a question; returns the status with what reads the rest."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    return status, reader, writer


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any] | None]:
    """Chunks of a stream; None is its proper end. Lengths of HTTP's own pieces stand between and are passed over."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            content = line[6:].strip()
            if content == b"[DONE]":
                yield None
                return
            yield json.loads(content)


def body(name: str, case: Case) -> dict[str, Any]:
    return {
        "model": name,
        "messages": [{"role": "user", "content": case.question}],
        "max_tokens": MAX_TOKENS,
        "temperature": TEMPERATURE,
        "seed": case.seed,
        "stream": True,
    }


async def ask(server: Server, case: Case, tally: Tally, leave_after: int | None) -> str:
    """One question; returns what became of it."""
    begin = last = time.perf_counter()
    try:
        status, reader, writer = await post(server.port, body(server.name, case))
    except OSError as error:
        return f"no connection ({error})"
    try:
        if status != 200:
            return f"status {status}"
        texts, count = {"reasoning_content": "", "content": ""}, 0
        if leave_after == 0:
            return "left"
        async for event in events(reader):
            if event is None:
                right = (texts["reasoning_content"], texts["content"]) == (case.reasoning, case.content)
                if not right:
                    tally.wrong.append(f"{case}: {texts}")
                return "right" if right else "WRONG"
            if "error" in event:
                return "told of an error"
            delta = event["choices"][0]["delta"]
            for name in texts:
                texts[name] += delta.get(name) or ""
            if "role" in delta:
                continue
            now = time.perf_counter()
            (tally.between if count else tally.first).append(now - (last if count else begin))
            last, count = now, count + 1
            if count == leave_after:
                return "left"
        return "LOST"
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        return f"LOST ({error})"
    finally:
        tally.tokens += count if status == 200 else 0
        writer.close()


async def load_it(server: Server, cases: list[Case], seconds: float, streams: int, kill: bool) -> Tally:
    """Streams that ask one question after the other."""
    tally, until, chance = Tally(), time.monotonic() + seconds, random.Random(1)

    async def stream() -> None:
        while time.monotonic() < until:
            leave = chance.randrange(30) if chance.random() < LEAVES else None
            outcome = await ask(server, chance.choice(cases), tally, leave)
            tally.outcomes[outcome] += 1
            if outcome.startswith(("status 5", "status 4", "no connection")):
                await asyncio.sleep(0.5)

    async def killer() -> None:
        await asyncio.sleep(seconds / 2)
        os.kill(server.engine, signal.SIGSTOP)  # so that requests are in it, however fast it is
        await asyncio.sleep(1)
        os.kill(server.engine, signal.SIGKILL)

    await asyncio.gather(*(stream() for _ in range(streams)), *([killer()] if kill else []))
    return tally


async def idle_first(server: Server, case: Case) -> float:
    """Milliseconds from the question, on a connection of its own, to the first token."""
    begin = time.perf_counter()
    _, reader, writer = await post(server.port, body(server.name, case))
    took = 0.0
    async for event in events(reader):
        if event is not None and "role" not in event["choices"][0]["delta"] and not took:
            took = time.perf_counter() - begin
    writer.close()
    return took * 1000


def held(server: Server) -> dict[str, int]:
    """Bytes of both processes."""
    found = {"server": runtime.resident_bytes(server.process.pid), "engine": runtime.resident_bytes(server.engine)}
    return {name: value or 0 for name, value in found.items()}


async def inside(server: Server) -> dict[str, Any]:
    """What the engine holds, by its own account."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /engine HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    content = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return dict(json.loads(content)["counters"])


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49] * 1000, 2), "p99": round(cuts[98] * 1000, 2), "max": round(max(values) * 1000, 1)}


# --- the whole ---------------------------------------------------------------------------------------------------


async def measure(server: Server, model: Model, cases: list[Case], seconds: float, streams: int) -> dict[str, Any]:
    engine = Engine(model.network)
    first_token(engine, model, cases[0])
    pairs = [(await idle_first(server, case), first_token(engine, model, case)) for case in cases[1:41]]
    idle = {
        "server_ms": statistics.median(a for a, _ in pairs),
        "engine_ms": statistics.median(b for _, b in pairs),
        "difference_ms": statistics.median(a - b for a, b in pairs),
        "worst_difference_ms": max(a - b for a, b in pairs),
    }
    del engine
    await load_it(server, cases, min(WARM_UP, seconds), streams, kill=False)
    await asyncio.sleep(1)
    before, held_before = await inside(server), held(server)
    begin = time.monotonic()
    tally = await load_it(server, cases, seconds, streams, kill=True)
    took = time.monotonic() - begin
    await asyncio.sleep(2)
    after, held_after = await inside(server), held(server)
    over = await overload(server, cases)
    return {
        "idle": {name: round(value, 2) for name, value in idle.items()},
        "load": {
            "streams": streams,
            "seconds": round(took, 1),
            "outcomes": dict(tally.outcomes),
            "wrong": tally.wrong[:3],
            "tokens_per_second": round(tally.tokens / took),
            "first_token_ms": quantiles(tally.first),
            "between_tokens_ms": quantiles(tally.between),
        },
        "held": {"before": held_before, "after": held_after, "engine_before": before, "engine_after": after},
        "overload": over,
    }


async def overload(server: Server, cases: list[Case]) -> dict[str, Any]:
    """Ten times the queue at once, then a few alone."""
    count = 10 * (RUNNING + QUEUED)
    tally = Tally()
    asked = [ask(server, cases[k % CASES], tally, None) for k in range(count)]
    outcomes = Counter(await asyncio.gather(*asked))
    later = Counter([await ask(server, case, tally, None) for case in cases[:20]])
    return {"requests": count, "outcomes": dict(outcomes), "later": dict(later), "wrong": tally.wrong[:3]}


def faults(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    load, over, holds = result["load"], result["overload"], result["held"]
    found = [f"load: {n} {what}" for what, n in load["outcomes"].items() if what not in EXPECTED]
    found += [f"overload: {n} {what}" for what, n in over["outcomes"].items() if what not in ("right", "status 429")]
    found += [f"after the overload: {n} {what}" for what, n in over["later"].items() if what != "right"]
    if not load["outcomes"].get("told of an error"):
        found.append("nobody was told that the engine was killed: it did nothing then")
    if load["outcomes"].get("told of an error", 0) > load["streams"]:
        found.append("more were told of an error than ran when the engine was killed")
    if result["idle"]["difference_ms"] > 20:
        found.append("the idle server's first token comes more than 20 ms after the bare engine's")
    for name in ("server", "engine"):
        more = holds["after"][name] - holds["before"][name]
        if more > SLACK:
            found.append(f"the {name}'s process holds {more / 1e6:.1f} MB more than before")
    if holds["engine_after"]["running"] or holds["engine_after"]["pages_of_requests"]:
        found.append("the engine still holds requests or pages of them")
    return found


EXPECTED = ("right", "left", "told of an error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = find_model(options.model, home(os.environ))
    model = load(folder, runtime.start(THREADS))
    cases = alone(model, questions(random.Random(0)))
    with tempfile.TemporaryDirectory(prefix="glasklar-serving-") as place:
        server = Server(folder, Path(place))
        try:
            result = asyncio.run(measure(server, model, cases, options.seconds, options.streams))
        finally:
            code = server.stop()
    found = faults(result) + ([f"the server ended with code {code}"] if code else [])
    result = {"machine": runtime.start(THREADS).describe(), "model": folder.parent.name, **result, "faults": found}
    print(json.dumps(result, indent=2, ensure_ascii=False))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
