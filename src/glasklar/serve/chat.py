"""Answers as they come from the engine, and OpenAI's chat reply made of them, whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from glasklar.errors import GlasklarError
from glasklar.serve.answer import Answer, Piece
from glasklar.serve.question import Question
from glasklar.serve.schema import ChatRequest, usage
from glasklar.serve.service import ModelService
from glasklar.serve.tools import CallDelta

# Index, answer, what it brings, and whether it is the last: the answer itself may be ahead of its pieces by then.
Choice = tuple[int, Answer, Piece, bool]


async def choices(service: ModelService, questions: Sequence[Question]) -> AsyncGenerator[Choice, None]:
    """What the answers bring, token by token, in the order in which the engine makes them. All end with the iteration,
    however it ends. They are numbered through: the choices of the first question, then those of the next."""
    arrivals: asyncio.Queue[Choice | GlasklarError | None] = asyncio.Queue()

    async def one(index: int, question: Question, choice: int) -> None:
        answer = Answer(service.tokenizer, question.begins, question.stops, question.alternatives, question.form)
        events = service.stream(question.ids, question.sampling(choice), guide=question.guide)
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

    wanted = [(question, choice) for question in questions for choice in range(question.choices)]
    tasks = [asyncio.ensure_future(one(index, *each)) for index, each in enumerate(wanted)]
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


async def whole(arrivals: AsyncIterator[Choice]) -> list[tuple[Answer, Piece]]:
    """All answers when they are done."""
    answers: dict[int, Answer] = {}
    pieces: dict[int, Piece] = {}
    async for index, answer, piece, _ in arrivals:
        answers[index] = answer
        pieces.setdefault(index, Piece()).add(piece)
    return [(answers[index], pieces[index]) for index in sorted(answers)]


async def collect(
    arrivals: AsyncIterator[Choice], body: ChatRequest, question: Question, head: dict[str, Any]
) -> dict[str, Any]:
    """The whole reply (`chat.completion`)."""
    found = await whole(arrivals)
    done = [
        {
            "index": index,
            "message": _message(piece),
            "logprobs": _logprobs(piece) if body.logprobs else None,
            "finish_reason": answer.finish,
        }
        for index, (answer, piece) in enumerate(found)
    ]
    answers = [answer for answer, _ in found]
    return {**head, "object": "chat.completion", "choices": done, "usage": usage_of([question], answers)}


async def stream(
    arrivals: AsyncIterator[Choice], body: ChatRequest, question: Question, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The reply as chunks: the role first, one finish reason a choice, usage last and only if it was asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    tail = {"usage": None} if body.usage_wanted else {}

    def chunk(
        index: int, delta: dict[str, Any], piece: Piece | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = _logprobs(piece) if body.logprobs and piece is not None and piece.entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice], **tail}

    for index in range(question.choices):
        yield chunk(index, {"role": "assistant", "content": ""})
    answers: dict[int, Answer] = {}
    async for index, answer, piece, last in arrivals:
        answers[index] = answer
        if not piece.empty:
            yield chunk(index, _delta(piece), piece)
        if last:
            yield chunk(index, {}, finish=answer.finish)
    if body.usage_wanted:
        yield {**head, "choices": [], "usage": usage_of([question], list(answers.values()))}


def calls_of(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """Whole calls from their pieces."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        known = calls.get(delta.index)
        calls[delta.index] = CallDelta(
            index=delta.index,
            id=delta.id if known is None else known.id,
            name=delta.name if known is None else known.name,
            arguments=delta.arguments if known is None else known.arguments + delta.arguments,
        )
    return list(calls.values())


def _message(piece: Piece) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls_of(piece.calls)
    ]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": piece.content or (None if calls else ""),
        "reasoning_content": piece.reasoning or None,
        "refusal": None,
    }
    return {**message, "tool_calls": calls} if calls else message


def _delta(piece: Piece) -> dict[str, Any]:
    texts = {"reasoning_content": piece.reasoning, "content": piece.content}
    delta: dict[str, Any] = {name: text for name, text in texts.items() if text}
    if piece.calls:
        delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    """Index always, id, type and name with the first piece: clients put the pieces together by the index."""
    function = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _logprobs(piece: Piece) -> dict[str, Any]:
    """OpenAI's list for the content; that of the thinking under DeepSeek's name beside it."""
    reasoning = piece.entries.get("reasoning")
    found = {"content": piece.entries.get("content", []), "refusal": None}
    return {**found, **({"reasoning_content": reasoning} if reasoning else {})}


def usage_of(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Any]:
    """Each prompt counts once, however many choices it has."""
    cached, place = 0, 0
    for question in questions:
        cached += answers[place].cached if place < len(answers) else 0
        place += question.choices
    return usage(
        sum(len(question.ids) for question in questions),
        sum(answer.tokens for answer in answers),
        sum(answer.reasoning_tokens for answer in answers),
        cached,
    )
