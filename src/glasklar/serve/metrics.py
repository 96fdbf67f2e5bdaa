"""Figures of the server for Prometheus: what was asked, how fast it was answered, what the cache had."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glasklar.serve.chat import Choice
from glasklar.serve.question import Question

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("glasklar_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("glasklar_prompt_tokens", "Tokens of prompts", registry=own)
        self.cached_tokens = Counter("glasklar_cached_tokens", "Prompt tokens that the cache had", registry=own)
        self.tokens = Counter("glasklar_tokens", "Tokens made", registry=own)
        self.answers = Counter("glasklar_answers", "Answers by how they ended", ["finish"], registry=own)
        self.running = Gauge("glasklar_answers_running", "Answers waiting or running", registry=own)
        self.queued = Gauge("glasklar_queued", "Answers that wait for a place in the engine", registry=own)
        self.restarts = Gauge("glasklar_engine_restarts", "How often the engine was started anew", registry=own)
        self.ready = Gauge("glasklar_engine_ready", "1 if the engine runs", registry=own)
        self.first = Histogram("glasklar_first_token_seconds", "Until the first token", registry=own, buckets=FIRST)
        self.between = Histogram("glasklar_token_seconds", "Between tokens", registry=own, buckets=BETWEEN)

    def look(self, status: Mapping[str, Any]) -> None:
        """Takes over what the service says about the engine."""
        self.queued.set(status["queued"])
        self.restarts.set(status["restarts"])
        self.ready.set(status["state"] == "ready")

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        return generate_latest(self._registry)

    async def watch(
        self, arrivals: AsyncGenerator[Choice, None], questions: Sequence[Question]
    ) -> AsyncGenerator[Choice, None]:
        """The same arrivals, counted."""
        begin = time.perf_counter()
        asked = sum(question.choices for question in questions)
        last: dict[int, float] = {}
        self.prompt_tokens.inc(sum(len(question.ids) for question in questions))
        self.running.inc(asked)
        ended = 0
        try:
            async for item in arrivals:
                index, answer, _, finished = item
                now = time.perf_counter()
                if index in last:
                    self.between.observe(now - last[index])
                else:
                    self.first.observe(now - begin)
                    self.cached_tokens.inc(answer.cached)
                last[index] = now
                self.tokens.inc()
                if finished:
                    ended += 1
                    self.answers.labels(answer.finish).inc()
                yield item
        finally:
            self.running.dec(asked)
            if ended < asked:
                self.answers.labels("gone").inc(asked - ended)
            await arrivals.aclose()


class Counted:
    """ASGI middleware: counts requests by route and status. Paths that are no route count together."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, sending)
