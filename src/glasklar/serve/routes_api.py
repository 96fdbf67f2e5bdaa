"""Routes of the API: OpenAI's models, chat, completions, responses, Anthropic's messages, tokens, health, metrics."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from glasklar.errors import GlasklarError
from glasklar.serve import anthropic, chat, completions, responses
from glasklar.serve.anthropic import CountRequest, MessagesRequest
from glasklar.serve.backend import Backend
from glasklar.serve.chat import Choice, choices
from glasklar.serve.completions import CompletionRequest, questions_of
from glasklar.serve.events import Begun, Event, EventStream, by_type, plain, unless_gone, with_heartbeats
from glasklar.serve.metrics import CONTENT_TYPE
from glasklar.serve.question import Question, question_of
from glasklar.serve.refusals import described
from glasklar.serve.responses import ResponsesRequest
from glasklar.serve.schema import MAX_MESSAGES, ChatMessage, ChatRequest, ModelName, Strict, Text
from glasklar.serve.service import ModelService

DONE = "data: [DONE]\n\n"
Collect = Callable[[AsyncIterator[Choice]], Awaitable[dict[str, Any]]]
Stream = Callable[[AsyncIterator[Choice]], AsyncGenerator[Event, None]]


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a text, without any control token, or a conversation as it is put to the model."""

    model: ModelName
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: ModelName
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 18)]


def add_api_routes(app: FastAPI, backend: Backend) -> None:
    """Adds everything that other programs ask for."""
    _about(app, backend)
    _openai(app, backend)
    _anthropic(app, backend)
    _tokens(app, backend)


def _about(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        if backend.service is not None:
            backend.metrics.look(backend.service.status)
        return Response(backend.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        service = backend.service
        return {"object": "list", "data": [] if service is None else [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(_named(backend, name))


def _openai(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service = _named(backend, body.model)
        question = await run_in_threadpool(question_of, service, body)
        head = _head("chatcmpl", service)
        return await _answered(
            request, backend, service, head, [question], bool(body.stream),
            lambda arrivals: chat.collect(arrivals, body, question, head),
            lambda arrivals: chat.stream(arrivals, body, question, head),
        )  # fmt: skip

    @app.post("/v1/completions", response_model=None)
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        service = _named(backend, body.model)
        asked = await run_in_threadpool(questions_of, service, body)
        head = _head("cmpl", service)
        return await _answered(
            request, backend, service, head, asked[0], bool(body.stream),
            lambda arrivals: completions.collect(arrivals, body, asked, head),
            lambda arrivals: completions.stream(arrivals, body, asked, head),
        )  # fmt: skip

    @app.post("/v1/responses", response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        service = _named(backend, body.model)
        question = await run_in_threadpool(question_of, service, _chat(body))
        head = responses.head_of(body, service.name)
        return await _answered(
            request, backend, service, head, [question], bool(body.stream),
            lambda arrivals: responses.collect(arrivals, body, question, head),
            lambda arrivals: responses.stream(arrivals, body, question, head),
            write=by_type, last="",
        )  # fmt: skip


def _anthropic(app: FastAPI, backend: Backend) -> None:
    @app.post("/anthropic/v1/messages", response_model=None)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        service = _named(backend, body.model)
        question = await run_in_threadpool(question_of, service, _chat(body))
        head = anthropic.head_of(service.name)
        return await _answered(
            request, backend, service, head, [question], bool(body.stream),
            lambda arrivals: anthropic.collect(arrivals, question, head),
            lambda arrivals: anthropic.stream(arrivals, question, head),
            write=by_type, last="",
        )  # fmt: skip

    @app.post("/anthropic/v1/messages/count_tokens")
    async def count(body: CountRequest) -> dict[str, int]:
        service = _named(backend, body.model)
        return {"input_tokens": len((await run_in_threadpool(question_of, service, _chat(body))).ids)}


def _tokens(app: FastAPI, backend: Backend) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service = _named(backend, body.model)
        if body.messages is not None:
            chat_body = ChatRequest(model=body.model, messages=body.messages, max_tokens=1)
            ids = (await run_in_threadpool(question_of, service, chat_body)).ids
        else:
            ids = await run_in_threadpool(service.tokenizer.encode, body.prompt or "")
        return {"tokens": ids, "count": len(ids), "max_model_len": service.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Bytes that are no UTF-8 become U+FFFD; control tokens are written out."""
        service = _named(backend, body.model)
        size = service.tokenizer.vocab_size
        foreign = next((token for token in body.tokens if token >= size), None)
        if foreign is not None:
            raise HTTPException(400, f"tokens: {foreign} is none of this model's, which are 0 to {size - 1}")
        return {"prompt": service.tokenizer.decode(body.tokens, skip_special=False)}


# --- common -------------------------------------------------------------------------------------------------------


async def _answered(
    request: Request,
    backend: Backend,
    service: ModelService,
    head: dict[str, Any],
    questions: Sequence[Question],
    streamed: bool,
    collect: Collect,
    stream: Stream,
    write: Callable[[Event], str] = plain,
    last: str = DONE,
) -> Response:
    """The reply, whole or as a stream. What is refused at once has a status of its own in both cases. Receipts
    are found by the id in `head`."""
    backend.answers(head["id"])
    arrivals = Begun(backend.metrics.watch(choices(service, questions), questions))
    try:
        await arrivals.look()
        if streamed:
            failed = plain_failure if write is plain else typed_failure
            return EventStream(with_heartbeats(stream(arrivals), write, failed, last), arrivals)
        reply = await unless_gone(request, _awaited(collect(arrivals)))
    except BaseException:
        await arrivals.close()
        raise
    await arrivals.close()
    return JSONResponse(reply) if reply is not None else Response(status_code=499)


async def _awaited(work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    return await work


def plain_failure(error: GlasklarError) -> Event:
    """An error in the middle of OpenAI's streams."""
    return described(error)[1]


def typed_failure(error: GlasklarError) -> Event:
    return {"type": "error", **described(error)[1]}


def _chat(body: ResponsesRequest | MessagesRequest | CountRequest) -> ChatRequest:
    """The same as a chat request; what is wrong with that is wrong with the body."""
    try:
        return body.chat()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _named(backend: Backend, name: str) -> ModelService:
    """The service of a model. Raises HTTPException 404 for another name, so that nobody talks to the wrong model."""
    service = backend.ready()
    if name != service.name:
        raise HTTPException(404, f"no model {name[:256]!r} here; this server has {service.name!r}")
    return service


def _model(service: ModelService) -> dict[str, Any]:
    created = int((service.model.folder / "config.json").stat().st_mtime)
    return {
        "id": service.name,
        "object": "model",
        "created": created,
        "owned_by": "glasklar",
        "context_length": service.context,
    }


def _head(kind: str, service: ModelService) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
