"""Chat completions: from a checked request to OpenAI's reply, whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from glasklar.errors import GlasklarError
from glasklar.serve.answer import Answer, Piece
from glasklar.serve.schema import ChatRequest, usage
from glasklar.serve.service import ModelService

# Index, answer, what it brings, and whether it is the last: the answer itself may be ahead of its pieces by then.
Choice = tuple[int, Answer, Piece, bool]


async def choices(service: ModelService, body: ChatRequest, ids: list[int]) -> AsyncGenerator[Choice, None]:
    """What the `n` answers bring, token by token, in the order in which the engine makes them. All end with the
    iteration, however it ends."""
    seed = secrets.randbits(62)
    arrivals: asyncio.Queue[Choice | GlasklarError | None] = asyncio.Queue()

    async def one(index: int) -> None:
        answer = Answer(service.tokenizer, body.thinks, body.stops, _alternatives(body))
        events = service.stream(ids, body.sampling(index, seed, service.tokenizer.stop_ids))
        try:
            async for event in events:
                piece = answer.push(event)
                last = answer.finish is not None
                arrivals.put_nowait((index, answer, piece, last))
                if last:
                    break
            arrivals.put_nowait(None)
        except GlasklarError as error:
            arrivals.put_nowait(error)
        finally:
            await events.aclose()

    tasks = [asyncio.ensure_future(one(index)) for index in range(body.n)]
    running = len(tasks)
    try:
        while running:
            item = await arrivals.get()
            if isinstance(item, GlasklarError):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _alternatives(body: ChatRequest) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


async def collect(service: ModelService, body: ChatRequest, ids: list[int], head: dict[str, Any]) -> dict[str, Any]:
    """The whole reply (`chat.completion`)."""
    answers: dict[int, Answer] = {}
    wholes = {index: Piece() for index in range(body.n)}
    async for index, answer, piece, _ in choices(service, body, ids):
        answers[index] = answer
        whole = wholes[index]
        whole.reasoning += piece.reasoning
        whole.content += piece.content
        for channel, entries in piece.entries.items():
            whole.entries.setdefault(channel, []).extend(entries)
    done = [
        {
            "index": index,
            "message": {"role": "assistant", "content": whole.content, "reasoning_content": whole.reasoning or None},
            "logprobs": _logprobs(whole) if body.logprobs else None,
            "finish_reason": answers[index].finish,
        }
        for index, whole in wholes.items()
    ]
    return {**head, "object": "chat.completion", "choices": done, "usage": _usage(ids, list(answers.values()))}


async def stream(
    service: ModelService, body: ChatRequest, ids: list[int], head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The reply as chunks: the role first, one finish reason a choice, usage last and only if it was asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    tail = {"usage": None} if with_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], piece: Piece | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = _logprobs(piece) if body.logprobs and piece is not None and piece.entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **tail}

    for index in range(body.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    answers: dict[int, Answer] = {}
    async for index, answer, piece, last in choices(service, body, ids):
        answers[index] = answer
        if not piece.empty:
            yield chunk(index, _delta(piece), piece)
        if last:
            yield chunk(index, {}, finish=answer.finish)
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(ids, list(answers.values()))}


def _delta(piece: Piece) -> dict[str, str]:
    texts = {"reasoning_content": piece.reasoning, "content": piece.content}
    return {name: text for name, text in texts.items() if text}


def _logprobs(piece: Piece) -> dict[str, Any]:
    """OpenAI's list for the content; that of the thinking under DeepSeek's name beside it."""
    reasoning = piece.entries.get("reasoning")
    return {"content": piece.entries.get("content", []), **({"reasoning_content": reasoning} if reasoning else {})}


def _usage(ids: list[int], answers: list[Answer]) -> dict[str, Any]:
    return usage(len(ids), sum(a.tokens for a in answers), sum(a.reasoning_tokens for a in answers))
