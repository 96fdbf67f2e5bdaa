"""Receipts of a server's answers, over its socket: whatever ran beside them, they come out again to the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from glasklar.audit.verify import verify
from glasklar.loading import ModelFolder, open_folder
from glasklar.provenance.receipt import open_receipt
from glasklar.provenance.signing import Signer
from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

ANSWERS, CONCURRENT = 48, 32


@pytest.fixture(scope="module")
def model(smoke_run: Path, runtime: Runtime) -> ModelFolder:
    return open_folder(smoke_run / "model", runtime)


@pytest.fixture(scope="module")
def home(smoke_run: Path) -> Path:
    return smoke_run.parents[1]


@pytest.fixture(scope="module")
def web(smoke_run: Path, home: Path, model: ModelFolder) -> Iterator[httpx.Client]:
    with LiveServer(smoke_run, Site(home=home, port=0)) as server:
        server.release(model)
        with httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits(max_connections=64)) as client:
            yield client


def body(model: ModelFolder, question: str, **more: Any) -> dict[str, Any]:
    return {"model": model.name, "messages": [{"role": "user", "content": question}], "max_tokens": 24, **more}


def verdicts(web: httpx.Client, reply: str, folder: Path, home: Path, choice: int = 0) -> list[tuple[str, str]]:
    found = web.get(f"/v1/receipts/{reply}", params={"choice": choice})
    assert found.status_code == 200, found.text
    path = folder / f"{reply}-{choice}.json"
    path.write_bytes(found.content)
    result = verify(path, home=home, key=Signer.open(home).fingerprint)
    return [(entry.subject, entry.verdict) for entry in result.entries]


SAID = ("signature", "signer", "model", "question", "settings", "answer")
WHOLE = [(name, "holds") for name in (*SAID, "end", "log-probabilities")]
CUT = [*((name, "holds") for name in SAID), ("end", "unchecked"), ("log-probabilities", "holds")]


def asked(model: ModelFolder, number: int) -> dict[str, Any]:
    """A request of its own: some begin alike, some are guided, some draw, some are penalised."""
    draw = random.Random(number)
    question = draw.choice(["What is 3+4?", "How many e in three? " * 4, f"What is {number}+{number}?"])
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 1.0, "seed": number}, {"temperature": 0.8, "top_p": 0.9, "seed": number},
        {"presence_penalty": 0.5, "temperature": 1.2, "top_k": 30}, {"logit_bias": {"40": 3.0}, "logprobs": True},
        {"thinking": {"type": "disabled"}},
    ]  # fmt: skip
    return body(model, question, **kinds[number % len(kinds)])


def test_answers_under_load_have_receipts_that_verify(
    web: httpx.Client, model: ModelFolder, home: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(CONCURRENT) as pool:
        replies = list(pool.map(lambda n: web.post("/v1/chat/completions", json=asked(model, n)), range(ANSWERS)))
    assert all(reply.status_code == 200 for reply in replies), [reply.text for reply in replies]
    for reply in replies:
        assert verdicts(web, reply.json()["id"], tmp_path, home) == WHOLE


def test_streamed_answers_choices_and_stop_texts(
    web: httpx.Client, model: ModelFolder, home: Path, tmp_path: Path
) -> None:
    streamed = web.post("/v1/chat/completions", json=body(model, "What is 3+4?", stream=True)).text
    name = json.loads(streamed.split("\n\n")[0].removeprefix("data: "))["id"]
    assert verdicts(web, name, tmp_path, home) == WHOLE
    several = web.post("/v1/chat/completions", json=body(model, "Hi", n=3, temperature=1.0, seed=5)).json()
    for choice in range(3):
        assert verdicts(web, several["id"], tmp_path, home, choice) == WHOLE
    seeds = [
        open_receipt(web.get(f"/v1/receipts/{several['id']}?choice={c}").json()["receipt"], "r").sampling["seed"]
        for c in range(3)
    ]
    assert seeds == [5, 6, 7]
    free = {"thinking": {"type": "disabled"}, "max_tokens": 40}
    text = web.post("/v1/chat/completions", json=body(model, "Hi", **free)).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    cut = web.post("/v1/chat/completions", json=body(model, "Hi", stop=[stop], **free)).json()
    assert verdicts(web, cut["id"], tmp_path, home) in (CUT, WHOLE)


def test_unknown_replies_and_choices_are_named(web: httpx.Client, model: ModelFolder) -> None:
    missing = web.get("/v1/receipts/chatcmpl-nothing")
    assert missing.status_code == 404
    assert "chatcmpl-nothing" in missing.json()["error"]["message"]
    name = web.post("/v1/chat/completions", json=body(model, "Hi", max_tokens=2)).json()["id"]
    assert web.get(f"/v1/receipts/{name}?choice=1").status_code == 404
    assert web.get(f"/v1/receipts/{name}?choice=-1").status_code == 404


def test_another_answer_under_the_receipt_is_found(
    web: httpx.Client, model: ModelFolder, home: Path, tmp_path: Path
) -> None:
    """The server's own key signs another token: its model does not give it."""
    from glasklar.provenance.receipt import make_receipt

    name = web.post("/v1/chat/completions", json=body(model, "What is 3+4?")).json()["id"]
    true = open_receipt(web.get(f"/v1/receipts/{name}").json()["receipt"], "true")
    ids = [*true.ids[:3], (true.ids[3] + 1) % model.config.vocab_size, *true.ids[4:]]
    forged = make_receipt(
        Signer.open(home), model=true.model, engine=true.engine, prompt=true.prompt, sampling=true.sampling,
        guide=true.guide, ids=ids, logprobs=[0.0] * len(ids), finish=true.finish, exact=True,
    )  # fmt: skip
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    found = verify(tmp_path / "forged.json", home=home)
    assert "answers otherwise from token 4 on" in str(found.failures)


def test_answers_of_the_page_have_receipts(web: httpx.Client, home: Path, tmp_path: Path) -> None:
    begun = web.post("/conversations", json={"content": "What is 3+4?"})
    assert begun.status_code == 200, begun.text
    answer = begun.json()["messages"][-1]["id"]
    conversation = begun.json()["id"]
    web.get(f"/conversations/{conversation}/messages/{answer}/events")  # ends with the answer
    assert verdicts(web, answer, tmp_path, home) in (WHOLE, CUT)


@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/completions", {"prompt": "What is", "max_tokens": 6, "n": 2, "temperature": 1.0}),
        ("/v1/responses", {"input": "What is 3+4?", "max_output_tokens": 20}),
        ("/anthropic/v1/messages", {"messages": [{"role": "user", "content": "What is 3+4?"}], "max_tokens": 20}),
    ],
)
def test_every_api_has_receipts(
    web: httpx.Client, model: ModelFolder, home: Path, tmp_path: Path, path: str, ask: dict[str, Any]
) -> None:
    reply = web.post(path, json={"model": model.name, **ask})
    assert reply.status_code == 200, reply.text
    assert verdicts(web, reply.json()["id"], tmp_path, home) == WHOLE


def test_guided_answers_are_guided_again(web: httpx.Client, model: ModelFolder, home: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    asked = body(model, "How many?", response_format=form, thinking={"type": "enabled", "budget_tokens": 4})
    reply = web.post("/v1/chat/completions", json={**asked, "max_tokens": 40})
    assert reply.status_code == 200, reply.text
    name = reply.json()["id"]
    signed = open_receipt(web.get(f"/v1/receipts/{name}").json()["receipt"], "r")
    assert signed.guide is not None
    assert signed.guide["grammar"]
    assert verdicts(web, name, tmp_path, home) == WHOLE


def test_files_changed_under_a_running_server_sign_nothing(
    smoke_run: Path, home: Path, tmp_path: Path, runtime: Runtime
) -> None:
    folder = shutil.copytree(smoke_run, tmp_path / "smoke") / "model"
    copy = open_folder(folder, runtime)
    with LiveServer(folder.parent, Site(home=home, port=0)) as server:
        server.release(copy)
        with httpx.Client(base_url=server.url, timeout=120) as client:
            reply = client.post("/v1/chat/completions", json=body(copy, "What is 3+4?")).json()["id"]
            assert client.get(f"/v1/receipts/{reply}").status_code == 200
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
            refused = client.get(f"/v1/receipts/{reply}")
    assert refused.status_code == 400
    assert "changed after they were loaded" in refused.text
