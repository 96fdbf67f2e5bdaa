"""Conversations over HTTP with a real engine: answers that nobody waits for, branches, looks inside, owners apart."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glasklar.loading import open_folder
from glasklar.runtime import Runtime
from glasklar.serve import jobs
from glasklar.serve.access import FILE, Access
from glasklar.serve.conversations import Entry
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

LONG = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat-home")


@pytest.fixture(scope="module")
def secrets_of_two(home: Path) -> list[str]:
    access = Access(home / FILE)
    secrets = [access.add(name)[1] for name in ("anna", "ben")]
    access.close()
    return secrets


@pytest.fixture(scope="module")
def live(smoke_run: Path, runtime: Runtime, home: Path, secrets_of_two: list[str]) -> Iterator[LiveServer]:
    with LiveServer(smoke_run, Site(home=home, port=0)) as made:
        made.release(open_folder(smoke_run / "model", runtime))
        yield made


@pytest.fixture
def web(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as made:
        yield made


def finished(web: httpx.Client, conversation: str, message: str) -> dict[str, Any]:
    """The last event of an answer's stream."""
    with web.stream("GET", f"/conversations/{conversation}/messages/{message}/events") as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert [event["state"] for event in events[:-1]] == ["running"] * (len(events) - 1)
    return events[-1]


def asked(web: httpx.Client, text: str = "What is 3+4?", **settings: Any) -> tuple[str, str, str]:
    begun = web.post("/conversations", json={"content": text, "settings": settings}).json()
    question, answer = begun["messages"]
    return begun["id"], question["id"], answer["id"]


def test_an_answer_is_made_whether_or_not_somebody_listens(web: httpx.Client) -> None:
    name, _, answer = asked(web, **LONG)
    with web.stream("GET", f"/conversations/{name}/messages/{answer}/events") as reply:
        next(reply.iter_lines())  # and away
    deadline = time.monotonic() + 60
    while (message := web.get(f"/conversations/{name}").json()["messages"][1])["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert message["state"] == "done"
    assert finished(web, name, answer) == message
    facts = message["facts"]
    assert facts["tokens"] > 0
    assert facts["joules"] > 0
    assert facts["seconds"] >= facts["first"] > 0


def test_the_same_seed_gives_the_same_answer_again(web: httpx.Client) -> None:
    name, question, answer = asked(web, **LONG)
    one = finished(web, name, answer)
    begun = web.post(f"/conversations/{name}/messages/{question}/again", json={"settings": LONG}).json()
    two = finished(web, name, begun["messages"][0]["id"])
    assert (one["content"], one["reasoning"]) == (two["content"], two["reasoning"])
    assert one["id"] != two["id"]
    assert one["parent"] == two["parent"] == question
    assert one["settings"]["seed"] == 3


def test_stopped_answers_keep_what_they_had(web: httpx.Client, live: LiveServer) -> None:
    name, _, answer = asked(web, **LONG)
    message = web.post(f"/conversations/{name}/messages/{answer}/stop").json()
    assert message["state"] in ("stopped", "done")
    assert web.post(f"/conversations/{name}/messages/{answer}/stop").json() == message
    assert live._backend.jobs._running == {}


def test_a_look_inside_is_what_the_network_says(web: httpx.Client, smoke_run: Path, runtime: Runtime) -> None:
    from glasklar.loading import load

    name, _, answer = asked(web, max_tokens=20)
    finished(web, name, answer)
    found = web.get(f"/conversations/{name}/messages/{answer}/inside").json()
    exported = web.get(f"/conversations/{name}/export", params={"form": "json"}).json()
    trail = exported["messages"][1]["trail"]
    model = load(smoke_run / "model", runtime)
    assert model.tokenizer is not None
    logprobs = model.logits([*trail["prompt"], *trail["ids"]]).log_softmax(-1)[len(trail["prompt"]) - 1 :]
    for k, (token, wanted) in enumerate(zip(found["tokens"], trail["ids"], strict=True)):
        assert token["id"] == wanted
        assert token["logprob"] == pytest.approx(logprobs[k, wanted].item(), abs=1e-3)
        assert token["said"] == pytest.approx(token["logprob"], abs=0.1)
        best = [value for _, value in token["alternatives"]]
        assert best == pytest.approx(logprobs[k].topk(len(best)).values.tolist(), abs=1e-3)
        assert [len(layer) for layer in token["experts"]] == [model.config.num_experts_per_tok] * len(found["layers"])
        assert sum(share for _, share in token["experts"][0]) == pytest.approx(1, abs=1e-3)
    assert found["layers"] == [1]
    assert found["experts"] == model.config.n_routed_experts


def test_owners_see_their_own_alone(web: httpx.Client, secrets_of_two: list[str]) -> None:
    anna, ben = ({"authorization": f"Bearer {secret}"} for secret in secrets_of_two)
    begun = web.post("/conversations", json={"content": "mine alone"}, headers=anna).json()
    place = f"/conversations/{begun['id']}"
    message = f"{place}/messages/{begun['messages'][1]['id']}"
    assert [one["id"] for one in web.get("/conversations", headers=anna).json()["conversations"]] == [begun["id"]]
    for other in (ben, {}):
        assert begun["id"] not in web.get("/conversations", headers=other).text
        for method, path, body in (
            ("GET", place, None), ("PATCH", place, {"title": "x"}), ("DELETE", place, None),
            ("GET", f"{place}/export", None), ("POST", f"{place}/messages", {"content": "x"}),
            ("POST", f"{message}/stop", None), ("GET", f"{message}/events", None), ("GET", f"{message}/inside", None),
        ):  # fmt: skip
            reply = web.request(method, path, json=body, headers=other)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found"), (method, path)
    assert web.delete(place, headers=anna).status_code == 200


BAD = {
    "nothing asked": {"content": "  "},
    "unknown setting": {"content": "x", "settings": {"temprature": 1}},
    "no number": {"content": "x", "settings": {"temperature": "hot"}},
    "half a character": b'{"content": "\\ud800"}',
    "too long": {"content": "7" * 5000},
    "too many files": {"content": "x", "files": [{"name": "a", "text": "b"}] * 9},
    "no parent yet": {"content": "x", "parent": "0" * 16},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_refused_and_leave_nothing(name: str, web: httpx.Client) -> None:
    before = web.get("/conversations").json()
    body = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = web.post("/conversations", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert web.get("/conversations").json() == before


def test_progress_of_a_finished_run(web: httpx.Client, smoke_run: Path) -> None:
    found = web.get("/run/progress").json()
    assert found["stages"] == [
        {"kind": "pretrain", "steps": 8, "done": 8},
        {"kind": "sft", "steps": 4, "done": 4},
        {"kind": "rl", "steps": 4, "done": 4},
    ]  # fmt: skip
    assert found["seconds_left"] == 0
    events = [json.loads(line) for line in (smoke_run / "ledger.jsonl").read_bytes().splitlines()]
    counted = sum(e["data"]["energy"]["joules"] for e in events if e["event"] == "checkpoint")
    assert found["joules"] >= counted > 0
    assert found["usd"] == pytest.approx(found["joules"] / 3.6e6 * 0.30)


def test_progress_in_the_middle(smoke_run: Path, tmp_path: Path) -> None:
    """As the run was after six steps, and before its first."""
    from glasklar.serve.news import RunNews

    for name in ("recipe.json", "metrics.jsonl", "ledger.jsonl"):
        lines = (smoke_run / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[:6] if name != "ledger.jsonl" else lines[:5]) + b'{"half')
    (tmp_path / "recipe.json").write_bytes((smoke_run / "recipe.json").read_bytes())
    found = RunNews(tmp_path).progress()
    assert [stage["done"] for stage in found["stages"]] == [6, 0, 0]
    assert found["seconds_left"] > 0
    (tmp_path / "metrics.jsonl").unlink()
    assert RunNews(tmp_path).progress()["seconds_left"] is None
    assert RunNews(tmp_path / "nowhere").progress()["stages"] == []


def test_too_many_answers_at_once_are_asked_to_come_again(
    web: httpx.Client, live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasklar.serve import jobs

    monkeypatch.setattr(jobs, "MOST_AT_ONCE", 0)
    before = web.get("/conversations").json()
    reply = web.post("/conversations", json={"content": "x"})
    assert reply.status_code == 429
    assert reply.headers["retry-after"]
    assert web.get("/conversations").json() == before


def test_an_answer_that_ends_while_it_is_shown_is_told_as_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    job = object.__new__(jobs.Job)
    job.entry = Entry(role="assistant", state="running")
    shown = jobs.shown

    def ending(entry: Entry) -> dict[str, Any]:
        entry.state = "done"
        loop.call_soon_threadsafe(job._tell)
        return shown(entry)

    async def told() -> list[str]:
        nonlocal loop
        loop, job._changed = asyncio.get_running_loop(), asyncio.Event()
        return [view["state"] async for view in job.follow()]

    loop: asyncio.AbstractEventLoop
    monkeypatch.setattr(jobs, "shown", ending)
    assert asyncio.run(told()) == ["done"]
