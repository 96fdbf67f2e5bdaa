"""Answers in conversations, made whether or not somebody watches: a page attaches to one, leaves, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from glasklar.data.chat import Message, Splitter, begins
from glasklar.engine.request import SamplingParams
from glasklar.errors import BusyError, GlasklarError, RequestError
from glasklar.provenance.energy import WATTS_PER_CORE
from glasklar.serve.answer import Answer
from glasklar.serve.conversations import Entry, Store
from glasklar.serve.markup import render
from glasklar.serve.schema import MAX_TEXT, Strict
from glasklar.serve.service import ModelService

log = logging.getLogger(__name__)

MOST_AT_ONCE = 8  # answers of one owner
SAVE_EVERY = 1.0  # seconds between writes of an answer in the making
SHOW_EVERY = 0.06  # seconds between two views of it; more where rendering takes long
DEFAULT_TOKENS = 4096


class AskSettings(Strict):
    """How an answer is asked for. `seed` absent: by chance, and recorded with the answer. `max_tokens` absent: up to
    DEFAULT_TOKENS or the end of the context."""

    thinking: Literal["auto", "enabled", "disabled"] = "auto"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    system: Annotated[str, Field(max_length=MAX_TEXT)] = ""

    @property
    def thinks(self) -> bool | None:
        return None if self.thinking == "auto" else self.thinking == "enabled"


class Job:
    """One answer. `view` tells how far it is, `follow` tells it again whenever that changes."""

    def __init__(self, store: Store, entry: Entry, service: ModelService, prompt: list[int], ask: AskSettings) -> None:
        self.store, self.entry, self.service, self.prompt = store, entry, service, prompt
        self.answer = Answer(service.tokenizer, begins(service.tokenizer, ask.thinks))
        self.params = _sampling(ask, service)
        self.entry.settings["seed"] = self.params.seed
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.wanted = True
        self.began, self.saved = time.monotonic(), 0.0
        self.first: float | None = None
        self.thought: float | None = None
        self.beside = 0.0  # sum over the tokens of how many requests ran
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._make())

    def stop(self) -> None:
        """What was made so far stays."""
        self.wanted = False
        self.task.cancel()

    async def _make(self) -> None:
        entry = self.entry
        events = self.service.stream(self.prompt, self.params)
        try:
            async for event in events:
                self._take(event)
                self._tell()
                if time.monotonic() - self.saved > SAVE_EVERY:
                    self.saved = time.monotonic()
                    await asyncio.to_thread(self.store.save, entry)
            entry.state = "done"
        except asyncio.CancelledError:
            # Stopped by its reader, or together with the server: then it says so on return.
            entry.state = "interrupted" if self.wanted else "stopped"
        except GlasklarError as error:
            entry.state, entry.error = "failed", str(error)
        except Exception:
            log.exception("an answer failed")
            entry.state, entry.error = "failed", "a fault of the server; its log has the details"
        finally:
            with contextlib.suppress(GlasklarError):
                await events.aclose()
            self.finish()

    def _take(self, event: Any) -> None:
        entry, now = self.entry, time.monotonic() - self.began
        piece = self.answer.push(event)
        entry.content += piece.content
        entry.reasoning += piece.reasoning
        self.ids.append(event.token)
        self.logprobs.append(event.logprob)
        self.beside += max(1, self.service.waiting)
        self.first = now if self.first is None else self.first
        if self.thought is None and entry.content and entry.reasoning:
            self.thought = now - self.first
        entry.facts = self._facts(event, now)

    def _facts(self, event: Any, now: float) -> dict[str, Any]:
        """Counts; seconds; the answer's own share of the energy of all cores, by the documented estimate."""
        count, first = len(self.ids), self.first or 0.0
        alone = count / self.beside
        return {
            "tokens": count,
            "reasoning_tokens": self.answer.reasoning_tokens,
            "prompt_tokens": len(self.prompt),
            "cached": event.cached,
            "drafted": event.drafted,
            "accepted": event.accepted,
            "seconds": round(now, 3),
            "first": round(first, 3),
            "thinking_seconds": None if not self.entry.reasoning else round(self.thought or now - first, 3),
            "tokens_per_second": round((count - 1) / (now - first), 1) if now > first else None,
            "joules": round(now * _cores() * WATTS_PER_CORE * alone, 3),
            "finish": self.answer.finish,
        }

    def finish(self) -> None:
        """Keeps what became of the answer and tells whoever watches."""
        self.entry.trail = {"prompt": self.prompt, "ids": self.ids, "logprobs": self.logprobs}
        try:
            self.store.save(self.entry)
        except Exception:  # the disk may be full; whoever watches still gets the answer
            log.exception("an answer could not be saved")
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as `shown` has it, at once and after changes, at a pace that leaves time for the answer itself;
        the last one has another state than "running"."""
        while True:
            changed, state = self._changed, self.entry.state
            begin = time.monotonic()
            view = await asyncio.to_thread(shown, self.entry)
            if state != "running":
                yield view
                return
            if view["state"] == "running":  # else it has just ended, and is told as it then stands, once
                yield view
            await asyncio.sleep(max(SHOW_EVERY, 4 * (time.monotonic() - begin)))
            await changed.wait()


class Jobs:
    """The answers that are being made."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], Job] = {}

    def start(
        self, owner: str, store: Store, conversation: str, new: Sequence[Entry], service: ModelService, ask: AskSettings
    ) -> Job:
        """Adds messages to a conversation, the answer last, and begins to make it. Nothing is added where that cannot
        begin: RequestError for a prompt that is too long, BusyError for too many answers at once."""
        running = sum(who == owner for who, _ in self._running)
        if running >= MOST_AT_ONCE:
            raise BusyError(f"{running} of your answers are being made already; stop one or wait for it")
        *questions, entry = new
        earlier = store.branch(conversation, new[0].parent)
        prompt = service.prompt(messages([*earlier, *questions], ask, service.model.single_turn), ask.thinks)
        entry.state = "running"
        entry.settings = {"model": service.name, **ask.model_dump(exclude_none=True)}
        store.add(conversation, *new)
        job = Job(store, entry, service, prompt, ask)
        self._running[owner, entry.id] = job
        job.task.add_done_callback(lambda _: self._ended(owner, job))
        return job

    def _ended(self, owner: str, job: Job) -> None:
        self._running.pop((owner, job.entry.id), None)
        if job.entry.state == "running":  # stopped before it began
            job.entry.state = "stopped"
            job.finish()

    def find(self, owner: str, message: str) -> Job | None:
        return self._running.get((owner, message))

    def stop(self, owner: str, wanted: set[str]) -> None:
        """Stops those of the named answers that are being made."""
        for (who, message), job in list(self._running.items()):
            if who == owner and message in wanted:
                job.stop()


def messages(entries: Sequence[Entry], ask: AskSettings, single_turn: bool) -> list[Message]:
    """What the model is told: the branch, or its last question alone for a model that knows single turns only.

    Raises RequestError where the last of them is no question.
    """
    if not entries or entries[-1].role != "user":
        raise RequestError("an answer needs a question before it; name a message of the user as its parent")
    if single_turn:
        entries = entries[-1:]
    said = [Message(role=entry.role, content=question(entry)) for entry in entries if entry.content or entry.files]
    system = [Message(role="system", content=ask.system)] if ask.system.strip() else []
    return [*system, *said]


def question(entry: Entry) -> str:
    """A message as the model reads it: attached texts first, each under its name."""
    parts = [f"{file['name']}:\n```\n{file['text']}\n```" for file in entry.files]
    return "\n\n".join([*parts, entry.content] if entry.content else parts)


def shown(entry: Entry) -> dict[str, Any]:
    """A message as the page gets it: answers also as HTML that is safe to show; of files the names and sizes."""
    answer = entry.role == "assistant"
    fields = asdict(entry)
    del fields["trail"]
    return {
        **fields,
        "files": [{"name": file["name"], "size": len(file["text"])} for file in entry.files],
        "html": render(entry.content) if answer else "",
        "reasoning_html": render(entry.reasoning) if answer else "",
    }


async def inside_answer(service: ModelService, entry: Entry) -> dict[str, Any]:
    """What `inspect.look` finds for an answer that is kept, with texts for ids.

    Each token has its "channel" ("reasoning", "content", or "special" for one that is not text) and "said": its
    log-probability as the engine had it. Raises RequestError for the answer of another model.
    """
    made_by = entry.settings.get("model")
    if made_by != service.name:
        raise RequestError(f"this answer came from the model {made_by!r}, not {service.name!r}; serve that one to look")
    prompt, ids = entry.trail["prompt"], entry.trail["ids"]
    found = await service.inspect([*prompt, *ids], len(prompt))
    tokenizer = service.tokenizer
    splitter = Splitter(tokenizer, {"enabled": True, "disabled": False}.get(entry.settings.get("thinking", "auto")))

    def text(token: int) -> str:
        raw = tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # a part of a character
            return "".join(f"‹{byte:02X}›" for byte in raw)

    tokens = []
    for token, said in zip(found["tokens"], entry.trail["logprobs"], strict=True):
        splitter.push(token["id"])
        tokens.append(
            {
                **token,
                "text": text(token["id"]),
                "channel": "special" if token["id"] in tokenizer.special_ids else splitter.channel,
                "said": said,
                "alternatives": [[text(other), value] for other, value in token["alternatives"]],
            }
        )
    return {**found, "tokens": tokens}


def _sampling(ask: AskSettings, service: ModelService) -> SamplingParams:
    return SamplingParams(
        max_tokens=ask.max_tokens or DEFAULT_TOKENS,
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        min_p=ask.min_p,
        seed=ask.seed if ask.seed is not None else int.from_bytes(os.urandom(4), "big"),
        stop_ids=service.tokenizer.stop_ids,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
