"""schemathesis over a real socket: requests made from the OpenAPI document, right and wrong ones, and no 5xx."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
import tiny
from schemathesis.generation import GenerationMode

from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, site: Site) -> Iterator[httpx.Client]:
    model = tiny.make(tmp_path_factory.mktemp("models") / "tiny", runtime)
    with LiveServer(tmp_path_factory.mktemp("run"), site) as live, httpx.Client(base_url=live.url, timeout=60) as made:
        live.release(model)
        yield made


def operations(web: httpx.Client) -> list[Any]:
    """Those that other programs use first; all but streams that follow something as long as it lasts."""
    found = schemathesis.openapi.from_dict(web.get("/openapi.json").json())
    ready = [result.ok() for result in found.get_all_operations()]
    ready.sort(key=lambda one: (one.method != "post", not one.path.startswith(("/v1/", "/anthropic/"))))
    return [one for one in ready if not one.path.endswith(("/events", "/follow"))]


def send(web: httpx.Client, case: Any, seen: collections.Counter[int]) -> None:
    body = case.body
    if isinstance(body, dict) and "model" in body:
        # Half of them get past the model's name; none may keep the machine busy for long.
        body = {**body, "model": "tiny"} if sum(seen.values()) % 2 else body
        body |= {name: min(body[name], 4) for name in LIMITS if isinstance(body.get(name), int)}
    case.body = body
    request = case.as_transport_kwargs(base_url=str(web.base_url))
    reply = web.request(
        request["method"], request["url"], params=request.get("params"), headers=dict(request["headers"]),
        content=request.get("data"), json=request.get("json"), cookies=request.get("cookies"),
    )  # fmt: skip
    seen[reply.status_code] += 1
    assert reply.status_code < 500, f"{request}: {reply.text[:500]}"
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, f"{request}: {reply.text[:500]}"
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.startswith(("data: ", "event: "))


def attack(web: httpx.Client, wanted: int, examples: int) -> collections.Counter[int]:
    """At least `wanted` requests; how many of them got which status."""
    seen: collections.Counter[int] = collections.Counter()
    every = operations(web)
    for turn in range(wanted):
        for operation in every:
            for mode in GenerationMode:
                if seen.total() >= wanted:
                    return seen

                @hypothesis.seed(turn)
                @hypothesis.settings(
                    max_examples=examples, deadline=None, database=None,
                    phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
                )  # fmt: skip
                @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
                def one(case: Any) -> None:
                    send(web, case, seen)

                try:
                    one()
                except hypothesis.errors.Unsatisfiable:
                    continue  # nothing wrong can be said where nothing can be said
    return seen


def test_generated_requests(web: httpx.Client) -> None:
    seen = attack(web, 60, 3)
    assert seen.total() >= 60
    assert {200, 400} <= set(seen)


@pytest.mark.slow
def test_two_thousand_generated_requests(web: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    seen = attack(web, int(os.environ.get("GLASKLAR_REQUESTS", "2000")), 25)
    with capsys.disabled():
        print(f"schemathesis: {seen.total()} requests, by status {dict(sorted(seen.items()))}")
    assert seen.total() >= 2000
