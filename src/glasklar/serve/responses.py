"""OpenAI's Responses: POST /v1/responses. The request is turned into a chat request, the answer into output items.

The server keeps no responses: the whole conversation comes with each request (`store: true` and `previous_response_id`
are refused).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glasklar.errors import GlasklarError
from glasklar.serve.answer import Answer, Piece
from glasklar.serve.chat import Choice, usage_of, whole
from glasklar.serve.question import Question
from glasklar.serve.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    Effort,
    Identifier,
    ModelName,
    Name,
    Schema,
    Share,
    Strict,
    Temperature,
    Text,
    Tokens,
)
from glasklar.serve.tools import CallDelta

Status = Literal["in_progress", "completed", "incomplete"] | None


class Part(Strict):
    """A piece of text. What a reply of this server carries beside it is taken back without effect."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    id: Identifier | None = None
    status: Status = None
    phase: Literal["commentary", "final_answer"] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Identifier
    name: Name
    arguments: Text
    id: Identifier | None = None
    status: Status = None


class CallOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Identifier
    output: Text | Annotated[list[Part], Field(min_length=1, max_length=64)]
    id: Identifier | None = None
    status: Status = None


class ThoughtPart(Strict):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    id: Identifier | None = None
    summary: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    content: Annotated[list[ThoughtPart], Field(max_length=64)] | None = None
    encrypted_content: None = None
    status: Status = None


Item = CallItem | CallOutputItem | ReasoningItem | MessageItem


class FunctionTool(Schema):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolName(Strict):
    type: Literal["function"]
    name: Name


class TextFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if (self.type == "json_schema") != (self.name is not None and self.schema_ is not None):
            raise ValueError("text.format: name and schema go with type 'json_schema', and only with it")
        return self


class TextSettings(Strict):
    format: TextFormat | None = None


class Reasoning(Strict):
    """`summary`: thoughts are given whole, never summed up, so only its absence can be honoured."""

    effort: Effort | None = None
    summary: None = None


class ResponsesRequest(Strict):
    """Body of POST /v1/responses. `metadata` comes back with the response."""

    model: ModelName
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> ResponsesRequest:
        if self.previous_response_id is not None:
            raise ValueError("previous_response_id: this server keeps no responses; send the whole conversation")
        if self.store:
            raise ValueError("store: this server keeps no responses; leave it out or say false")
        return self

    def chat(self) -> ChatRequest:
        """The same as a chat request. Raises pydantic's ValidationError where that is none."""
        settings = (self.text.format if self.text else None) or TextFormat(type="text")
        shape: dict[str, Any] = {"type": settings.type}
        if settings.type == "json_schema":
            shape["json_schema"] = {"name": settings.name, "schema": settings.schema_, "strict": settings.strict}
        choice = self.tool_choice
        wants = self.top_logprobs is not None or bool(self.include)
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": self._messages(),
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": wants or None,
                "top_logprobs": self.top_logprobs,
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
                "response_format": shape,
                "tools": [
                    {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()
                ],
                "tool_choice": {"type": "function", "function": {"name": choice.name}}
                if isinstance(choice, ToolName)
                else choice,
                "parallel_tool_calls": self.parallel_tool_calls,
            }
        )

    def _messages(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        if self.instructions is not None:
            made.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*made, {"role": "user", "content": self.input}]
        thought: str | None = None
        for item in self.input:
            match item:
                case ReasoningItem():
                    thought = "".join(part.text for part in item.content or ()) or None
                case MessageItem():
                    message: dict[str, Any] = {"role": item.role, "content": item.text}
                    if item.role == "assistant" and thought:
                        message["reasoning_content"], thought = thought, None
                    made.append(message)
                case CallItem():
                    call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                    if made and made[-1]["role"] == "assistant":
                        made[-1].setdefault("tool_calls", []).append(call)
                    else:
                        made.append({"role": "assistant", "tool_calls": [call], "reasoning_content": thought})
                        thought = None
                case CallOutputItem():
                    output = item.output if isinstance(item.output, str) else "".join(p.text for p in item.output)
                    made.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        return made


# --- replies ------------------------------------------------------------------------------------------------------


def head_of(body: ResponsesRequest, name: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    choice = body.tool_choice
    return {
        "id": f"resp_{secrets.token_hex(16)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": name,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": choice.model_dump() if isinstance(choice, ToolName) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _format(body: ResponsesRequest) -> dict[str, Any]:
    settings = body.text.format if body.text else None
    return {"type": "text"} if settings is None else settings.model_dump(by_alias=True, exclude_none=True)


async def collect(
    arrivals: AsyncIterator[Choice], body: ResponsesRequest, question: Question, head: dict[str, Any]
) -> dict[str, Any]:
    """The whole response."""
    [(answer, piece)] = await whole(arrivals)
    growing = Growing(body)
    for _ in growing.push(piece):
        pass
    for _ in growing.close(answer):
        pass
    return growing.response(head, question, answer)


async def stream(
    arrivals: AsyncIterator[Choice], body: ResponsesRequest, question: Question, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a response, numbered. The last one is response.completed, .incomplete or .failed."""
    growing, number = Growing(body), 0
    answer: Answer | None = None

    def numbered(event: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {**event, "sequence_number": number - 1}

    begun = {**head, "status": "in_progress", "output": []}
    yield numbered({"type": "response.created", "response": begun})
    yield numbered({"type": "response.in_progress", "response": begun})
    try:
        async for _, arrived, piece, _ in arrivals:
            answer = arrived
            for event in growing.push(piece):
                yield numbered(event)
    except GlasklarError as error:
        told = {"code": "server_error", "message": str(error)}
        failed = {**head, "status": "failed", "output": growing.items, "error": told}
        yield numbered({"type": "response.failed", "response": failed})
        return
    assert answer is not None
    for event in growing.close(answer):
        yield numbered(event)
    done = growing.response(head, question, answer)
    yield numbered({"type": f"response.{done['status']}", "response": done})


class Growing:
    """Output items while they grow: the thinking, the message, the calls, in the order in which they come."""

    def __init__(self, body: ResponsesRequest) -> None:
        self._logprobs = body.top_logprobs is not None or bool(body.include)
        self.items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def push(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of what a token brought."""
        if piece.reasoning:
            yield from self._text("reasoning", piece.reasoning, [])
        entries = piece.entries.get("content", []) if self._logprobs else []
        if piece.content or (entries and not piece.calls):
            yield from self._text("message", piece.content, entries)
        for call in piece.calls:
            yield from self._call(call)

    def close(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """The events of the end."""
        status = "incomplete" if answer.finish == "length" else "completed"
        yield from self._done(status)
        if not self.items:  # an answer has at least a message
            yield from self._text("message", "", [])
            yield from self._done(status)

    def response(self, head: dict[str, Any], question: Question, answer: Answer) -> dict[str, Any]:
        """The whole response, once closed."""
        cut = answer.finish == "length"
        counts = usage_of([question], [answer])
        return {
            **head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.items,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": counts["prompt_cache_hit_tokens"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
            },
        }

    def _text(self, kind: Literal["reasoning", "message"], text: str, entries: list[Any]) -> Iterator[dict[str, Any]]:
        if self._open is None or self._open["type"] != kind:
            yield from self._done("completed")
            yield from self._begin(kind)
        item = self.items[-1]
        part = item["content"][0]
        part["text"] += text
        at = self._at()
        if kind == "reasoning":
            yield {"type": "response.reasoning_text.delta", **at, "delta": text}
        else:
            part["logprobs"] += entries
            yield {"type": "response.output_text.delta", **at, "delta": text, "logprobs": entries}

    def _begin(self, kind: Literal["reasoning", "message"]) -> Iterator[dict[str, Any]]:
        item: dict[str, Any] = {"id": f"{kind[:3]}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item |= {"role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open = item
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}
        item["content"].append(part)
        yield {"type": "response.content_part.added", **self._at(), "part": _copy(part)}

    def _call(self, call: CallDelta) -> Iterator[dict[str, Any]]:
        if call.id is not None:
            yield from self._done("completed")
            item: dict[str, Any] = {
                "id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "in_progress",
                "call_id": call.id, "name": call.name, "arguments": "",
            }  # fmt: skip
            self._open = item
            self.items.append(item)
            yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": _copy(item)}
        if call.arguments:
            item = self.items[-1]
            item["arguments"] += call.arguments
            yield {
                "type": "response.function_call_arguments.delta",
                "item_id": item["id"], "output_index": len(self.items) - 1, "delta": call.arguments,
            }  # fmt: skip

    def _done(self, status: str) -> Iterator[dict[str, Any]]:
        """Closes the item that is open."""
        item, place = self._open, len(self.items) - 1
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done", "item_id": item["id"], "output_index": place,
                "name": item["name"], "arguments": item["arguments"],
            }  # fmt: skip
        else:
            part, at = item["content"][0], self._at()
            if item["type"] == "reasoning":
                yield {"type": "response.reasoning_text.done", **at, "text": part["text"]}
            else:
                yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.content_part.done", **at, "part": _copy(part)}
        self._open = None
        yield {"type": "response.output_item.done", "output_index": place, "item": _copy(item)}

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now; it may grow before the event is written."""
    return {**item, "content": list(item["content"])} if "content" in item else dict(item)
