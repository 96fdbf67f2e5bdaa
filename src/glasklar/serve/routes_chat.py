"""Routes of conversations. They belong to whoever's key the request carries; without keys all belong to one owner.

GET    /conversations?q=                        newest first
POST   /conversations                           a first question; begins the answer
GET    /conversations/{id}                      the whole tree
PATCH  /conversations/{id}                      {"title"} and/or {"leaf"}: where the reader is
DELETE /conversations/{id}
GET    /conversations/{id}/export?form=md|json  for people, for programs
POST   /conversations/{id}/messages             a further question below "parent"; begins the answer
POST   /conversations/{id}/messages/{m}/again   another answer to question m
POST   /conversations/{id}/messages/{m}/stop
GET    /conversations/{id}/messages/{m}/events  the answer as it grows, from wherever it is (server-sent events)
GET    /conversations/{id}/messages/{m}/inside  a look inside the answer
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from glasklar.errors import RequestError
from glasklar.serve.access import visit
from glasklar.serve.backend import Backend
from glasklar.serve.conversations import Entry, NotFoundError, Store
from glasklar.serve.events import ALIVE, with_silences
from glasklar.serve.export import as_markdown
from glasklar.serve.guard import error_body
from glasklar.serve.jobs import AskSettings, Job, inside_answer, shown
from glasklar.serve.schema import Strict, Text

KEPT_LOOKS = 8
Name = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
NO_STORE = {"cache-control": "no-store"}


class File(Strict):
    """A text that comes with a question."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    text: Text


class Question(Strict):
    """A question below `parent`: the answer before it, or None at the beginning of a conversation."""

    content: Text = ""
    files: Annotated[list[File], Field(max_length=8, default_factory=list)]
    parent: Name | None = None
    settings: AskSettings = AskSettings()

    def entries(self) -> tuple[Entry, Entry]:
        """The question, and the answer to be made. Raises RequestError where nothing is asked."""
        if not self.content.strip() and not self.files:
            raise RequestError("content: is empty and no file is attached; ask something")
        files = [file.model_dump() for file in self.files]
        asked = Entry(role="user", content=self.content, files=files, parent=self.parent)
        return asked, Entry(role="assistant", parent=asked.id)


class Again(Strict):
    settings: AskSettings = AskSettings()


class Change(Strict):
    title: Annotated[str, Field(min_length=1, max_length=2000)] | None = None
    leaf: Name | None = None


def owner_of(_: Request) -> str:
    """Whose conversations these are: the id of the key that the request carries."""
    return visit().key


def add_chat_routes(app: FastAPI, backend: Backend) -> None:
    _tree(app, backend)
    _answers(app, backend)
    _inside(app, backend)

    @app.exception_handler(NotFoundError)
    async def gone(_: Request, error: NotFoundError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error", code="not_found"), 404)


def _tree(app: FastAPI, backend: Backend) -> None:
    def store(request: Request) -> Store:
        return backend.conversations.of(owner_of(request))

    @app.get("/conversations", tags=["page"])
    def listed(request: Request, q: Annotated[str, Field(max_length=200)] = "") -> dict[str, Any]:
        return {"conversations": store(request).all(q)}

    @app.get("/conversations/{name}", tags=["page"])
    def tree(request: Request, name: str) -> dict[str, Any]:
        mine = store(request)
        return {**mine.head(name), "messages": [shown(entry) for entry in mine.messages(name)]}

    @app.patch("/conversations/{name}", tags=["page"])
    def change(request: Request, name: str, body: Change) -> dict[str, Any]:
        mine = store(request)
        mine.change(name, title=body.title, leaf=body.leaf)
        return mine.head(name)

    @app.delete("/conversations/{name}", tags=["page"])
    async def delete(request: Request, name: str) -> dict[str, Any]:
        mine = store(request)
        backend.jobs.stop(owner_of(request), {entry.id for entry in await asyncio.to_thread(mine.messages, name)})
        await asyncio.to_thread(mine.delete, name)
        return {"id": name, "deleted": True}

    @app.get("/conversations/{name}/export", tags=["page"])
    def export(request: Request, name: str, form: Literal["md", "json"] = "md") -> Response:
        mine = store(request)
        head = mine.head(name)
        if form == "md":
            made, kind = as_markdown(head, mine.branch(name, head["leaf"])), "text/markdown; charset=utf-8"
        else:
            every = [vars(mine.message(name, entry.id)) for entry in mine.messages(name)]
            made, kind = json.dumps({**head, "messages": every}, ensure_ascii=False, indent=1), "application/json"
        saved = {"content-disposition": f'attachment; filename="conversation-{name}.{form}"', **NO_STORE}
        return Response(made, media_type=kind, headers=saved)


def _answers(app: FastAPI, backend: Backend) -> None:
    def begun(request: Request, conversation: str, new: tuple[Entry, ...], settings: AskSettings) -> dict[str, Any]:
        owner = owner_of(request)
        mine = backend.conversations.of(owner)
        backend.answers(new[-1].id)
        backend.jobs.start(owner, mine, conversation, new, backend.ready(), settings)
        return {**mine.head(conversation), "messages": [shown(entry) for entry in new]}

    @app.post("/conversations", tags=["page"])
    async def create(request: Request, body: Question) -> dict[str, Any]:
        backend.ready()
        if body.parent is not None:
            raise RequestError("parent: a new conversation has no earlier message; leave it out")
        new = body.entries()
        mine = backend.conversations.of(owner_of(request))
        name = mine.create(body.content if body.content.strip() else body.files[0].name)
        try:
            return begun(request, name, new, body.settings)
        except BaseException:
            mine.delete(name)
            raise

    @app.post("/conversations/{name}/messages", tags=["page"])
    async def ask(request: Request, name: str, body: Question) -> dict[str, Any]:
        return begun(request, name, body.entries(), body.settings)

    @app.post("/conversations/{name}/messages/{message}/again", tags=["page"])
    async def again(request: Request, name: str, message: str, body: Again) -> dict[str, Any]:
        return begun(request, name, (Entry(role="assistant", parent=message),), body.settings)

    @app.post("/conversations/{name}/messages/{message}/stop", tags=["page"])
    async def stop(request: Request, name: str, message: str) -> dict[str, Any]:
        owner = owner_of(request)
        job = backend.jobs.find(owner, message)
        if job is None:
            return shown(backend.conversations.of(owner).message(name, message))
        job.stop()
        await asyncio.wait({job.task})
        return shown(job.entry)

    @app.get("/conversations/{name}/messages/{message}/events", tags=["page"], response_model=None)
    async def events(request: Request, name: str, message: str) -> Response:
        owner = owner_of(request)
        entry = await asyncio.to_thread(backend.conversations.of(owner).message, name, message)
        return StreamingResponse(
            _sent(backend.jobs.find(owner, message), entry), media_type="text/event-stream", headers=NO_STORE
        )


async def _sent(job: Job | None, entry: Entry) -> AsyncGenerator[str, None]:
    """An answer as events, each the whole of it. Whoever leaves, leaves: the answer goes on."""
    if job is None:
        yield f"data: {json.dumps(await asyncio.to_thread(shown, entry))}\n\n"
        return
    views = with_silences(job.follow())
    try:
        async for view in views:
            yield ALIVE if view is None else f"data: {json.dumps(view)}\n\n"
    finally:
        await views.aclose()


def _inside(app: FastAPI, backend: Backend) -> None:
    looks: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    @app.get("/conversations/{name}/messages/{message}/inside", tags=["page"])
    async def inside(request: Request, name: str, message: str) -> dict[str, Any]:
        """The tokens of an answer with their alternatives and experts: see `inspect.py`."""
        owner = owner_of(request)
        entry = await asyncio.to_thread(backend.conversations.of(owner).message, name, message)
        if entry.state == "running" or not entry.trail.get("ids"):
            raise RequestError("this answer has no tokens to look into (yet)")
        if (owner, message) not in looks:
            looks[owner, message] = await inside_answer(backend.ready(), entry)
        looks.move_to_end((owner, message))
        while len(looks) > KEPT_LOOKS:
            looks.popitem(last=False)
        return looks[owner, message]
