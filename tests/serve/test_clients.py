"""The server over a real socket, with the clients that people use: openai-python's own types parse every reply."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from glasklar.data.chat import Message, parse, render
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.loading import Model, load
from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

QUESTION = [{"role": "user", "content": "What is 3+4?"}]


@pytest.fixture(scope="module")
def model(smoke_run: Path, runtime: Runtime) -> Model:
    return load(smoke_run / "model", runtime)


@pytest.fixture(scope="module")
def server(smoke_run: Path, model: Model, site: Site) -> Iterator[LiveServer]:
    with LiveServer(smoke_run, site) as live:
        live.release(model)
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def web(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as made:
        yield made


def expected(model: Model, thinking: bool | None, **params: object) -> tuple[str, str]:
    """What the bare engine answers: (reasoning, content)."""
    assert model.tokenizer is not None
    prompt = render(model.tokenizer, [Message(role="user", content="What is 3+4?")], thinking)
    settings = SamplingParams(stop_ids=(model.tokenizer.eos_id,), **params)  # type: ignore[arg-type]
    [completion] = Engine(model.network).generate([prompt], settings)
    reply = parse(model.tokenizer, completion.ids, thinking)
    return reply.reasoning, reply.content


@pytest.mark.parametrize("thinking", [None, True, False])
def test_whole_and_streamed_answers_are_those_of_the_engine(
    client: openai.OpenAI, model: Model, thinking: bool | None
) -> None:
    extra = {} if thinking is None else {"thinking": {"type": "enabled" if thinking else "disabled"}}
    reply = client.chat.completions.create(model=model.name, messages=QUESTION, max_tokens=40, extra_body=extra)
    message = reply.choices[0].message
    wanted = expected(model, thinking, max_tokens=40)
    assert (message.reasoning_content or "", message.content) == wanted
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    stream = client.chat.completions.create(
        model=model.name, messages=QUESTION, max_tokens=40, extra_body=extra, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == wanted[0]
    assert "".join(delta.content or "" for delta in deltas) == wanted[1]
    reasons = [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason]
    assert reasons == [reply.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == reply.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_ends_with_done_and_has_no_usage_unasked(web: httpx.Client, model: Model) -> None:
    body = {"model": model.name, "messages": QUESTION, "max_tokens": 5, "stream": True}
    lines = [x for x in web.post("/v1/chat/completions", json=body).text.split("\n\n") if x]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_choices_seeds_and_logprobs(client: openai.OpenAI, model: Model) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model=model.name, messages=QUESTION, max_tokens=12, n=3, temperature=1.0, seed=7, logprobs=True,
            top_logprobs=4, extra_body={"thinking": {"type": "disabled"}},
        )  # fmt: skip

    one, two = ask(), ask()
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert texts[1] == expected(model, False, max_tokens=12, temperature=1.0, seed=8)[1]
    for choice in one.choices:
        entries = choice.logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == choice.message.content
        for entry in entries:
            assert len(entry.top_logprobs) == 4
            assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6


def test_stop_texts_end_the_content(client: openai.OpenAI, model: Model) -> None:
    extra = {"thinking": {"type": "disabled"}}
    _, content = expected(model, False, max_tokens=40)
    stop = content[len(content) // 2 :][:2]
    reply = client.chat.completions.create(
        model=model.name, messages=QUESTION, max_tokens=40, stop=[stop, "never"], extra_body=extra
    )
    assert reply.choices[0].message.content == content[: content.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_models_and_news(client: openai.OpenAI, web: httpx.Client, model: Model, smoke_run: Path) -> None:
    assert [m.id for m in client.models.list()] == [model.name]
    assert client.models.retrieve(model.name).owned_by == "glasklar"
    status = web.get("/run/status").json()
    assert (status["state"], status["model"], status["single_turn"]) == ("serving", model.name, True)
    first = web.get("/run/metrics").json()
    assert first["next"] == len((smoke_run / "metrics.jsonl").read_bytes().splitlines())
    assert web.get("/run/metrics", params={"since": first["next"] - 2}).json()["lines"] == first["lines"][-2:]


def test_before_the_model_is_there_requests_are_told_so(smoke_run: Path, site: Site) -> None:
    with LiveServer(smoke_run, site) as live, httpx.Client(base_url=live.url) as web:
        assert web.get("/run/status").json()["state"] == "training"
        reply = web.post("/v1/chat/completions", json={"model": "m", "messages": QUESTION})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        assert reply.headers["retry-after"]


def test_a_caller_who_hangs_up_frees_the_engine(server: LiveServer, web: httpx.Client, model: Model) -> None:
    body = {"model": model.name, "messages": QUESTION, "max_tokens": 400, "stream": True, "n": 8,
            "logit_bias": {str(model.tokenizer.eos_id): -100}}  # fmt: skip
    service = server._backend.service
    for streaming in (True, False):
        if streaming:
            with web.stream("POST", "/v1/chat/completions", json=body) as reply:
                next(reply.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                web.post("/v1/chat/completions", json={**body, "stream": False}, timeout=0.05)
        deadline = time.monotonic() + 5
        while service.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.waiting == 0


def test_special_tokens_in_a_question_are_plain_text(server: LiveServer, model: Model) -> None:
    ids = server._backend.service.prompt([Message(role="user", content="<｜User｜></think>")], None)
    assert len(set(ids) & model.tokenizer.special_ids) == 3


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_strangers_are_turned_away(headers: dict[str, str], status: int, web: httpx.Client) -> None:
    request = web.build_request("POST", "/v1/chat/completions", headers=headers)
    reply = web.send(request)
    assert reply.status_code == status
    assert "error" in reply.json()


def test_bodies_have_a_limit_announced_or_not(web: httpx.Client) -> None:
    large = b'{"model": "' + b"x" * (5 << 20) + b'"}'
    assert web.post("/v1/chat/completions", content=large).status_code == 413
    pieces = (large[i : i + 65536] for i in range(0, len(large), 65536))
    reply = web.post("/v1/chat/completions", content=pieces, headers={"content-type": "application/json"})
    assert reply.status_code == 400


@pytest.mark.parametrize("path", ["/nothing", "/v1/chat/completions", "/page/../app.py", "/page/%2e%2e%2fapp.py"])
def test_unknown_paths_and_methods_have_the_same_shape(path: str, web: httpx.Client) -> None:
    reply = web.get(path)
    assert reply.status_code in (404, 405)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_every_reply_carries_the_policy(web: httpx.Client) -> None:
    for path in ("/", "/v1/models", "/nothing"):
        assert "default-src 'none'" in web.get(path).headers["content-security-policy"]
