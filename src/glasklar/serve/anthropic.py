"""Anthropic's Messages: POST /anthropic/v1/messages and count_tokens, as DeepSeek's API has them too. The request is
turned into a chat request, the answer into content blocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glasklar.serve.answer import Answer, Piece
from glasklar.serve.chat import Choice as Arrival
from glasklar.serve.chat import calls_of, usage_of, whole
from glasklar.serve.question import Question
from glasklar.serve.schema import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    ChatRequest,
    Identifier,
    ModelName,
    Name,
    Schema,
    Share,
    Strict,
    Text,
    Tokens,
)


class CacheControl(Strict):
    """A hint; this server keeps every prefix that it has room for, marked or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Identifier
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: Text | Annotated[list[TextBlock], Field(max_length=64)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(Strict):
    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Block], Field(min_length=1, max_length=256)]


class AnthropicTool(Schema):
    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None


class Choice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Choice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("tool_choice: name goes with type 'tool', and only with it")
        return self


class AnthropicThinking(Strict):
    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None


class Metadata(Strict):
    user_id: Annotated[str, Field(max_length=512)] | None = None


class CountRequest(Strict):
    """Body of POST /anthropic/v1/messages/count_tokens. A last message of the assistant is gone on with."""

    model: ModelName
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | Annotated[list[TextBlock], Field(max_length=64)] | None = None
    thinking: AnthropicThinking | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None

    def chat(self) -> ChatRequest:
        """The same as a chat request. Raises pydantic's ValidationError where that is none."""
        return ChatRequest.model_validate({**self._common(), "max_tokens": 1})

    def _common(self) -> dict[str, Any]:
        choice = self.tool_choice
        wanted: Any = None
        if choice is not None:
            named = {"type": "function", "function": {"name": choice.name}}
            wanted = named if choice.type == "tool" else "required" if choice.type == "any" else choice.type
        return {
            "model": self.model,
            "messages": self._messages(),
            "thinking": None if self.thinking is None else self.thinking.model_dump(),
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                        "strict": tool.strict,
                    },
                }
                for tool in self.tools or ()
            ],
            "tool_choice": wanted,
            "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
        }

    def _messages(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        if self.system is not None:
            made.append({"role": "system", "content": _joined(self.system)})
        for turn in self.messages:
            made += [{"role": turn.role, "content": turn.content}] if isinstance(turn.content, str) else _turn(turn)
        if made[-1]["role"] == "assistant":
            made[-1]["prefix"] = True
        return made


def _joined(text: str | list[TextBlock] | None) -> str:
    return text or "" if text is None or isinstance(text, str) else "".join(block.text for block in text)


def _turn(turn: Turn) -> list[dict[str, Any]]:
    """A turn's blocks as messages: results of tools are messages of their own."""
    made: list[dict[str, Any]] = []
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            text = _joined(block.content)
            text = f"error: {text}" if block.is_error else text
            made.append({"role": "tool", "content": text, "tool_call_id": block.tool_use_id})
            continue
        if not made or made[-1]["role"] != turn.role:
            made.append({"role": turn.role, "content": ""})
        message = made[-1]
        match block:
            case TextBlock():
                message["content"] += block.text
            case ThinkingBlock():
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                call = {"id": block.id, "function": {"name": block.name, "arguments": json.dumps(block.input)}}
                message.setdefault("tool_calls", []).append(call)
    return made


class MessagesRequest(CountRequest):
    """Body of POST /anthropic/v1/messages."""

    max_tokens: Tokens
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None

    def chat(self) -> ChatRequest:
        own = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
        }
        return ChatRequest.model_validate({**self._common(), **own})


# --- replies ------------------------------------------------------------------------------------------------------


def head_of(name: str) -> dict[str, Any]:
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": name}


async def collect(arrivals: AsyncIterator[Arrival], question: Question, head: dict[str, Any]) -> dict[str, Any]:
    """The whole message."""
    [(answer, piece)] = await whole(arrivals)
    blocks: list[dict[str, Any]] = []
    if piece.reasoning:
        blocks.append({"type": "thinking", "thinking": piece.reasoning, "signature": ""})
    if piece.content:
        blocks.append({"type": "text", "text": piece.content, "citations": None})
    for call in calls_of(piece.calls):
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return {**head, "content": blocks, **_end(answer), "usage": _usage(question, answer)}


async def stream(
    arrivals: AsyncIterator[Arrival], question: Question, head: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a message, from message_start to message_stop."""
    blocks, answer = Blocks(), None
    async for _, answer, piece, last in arrivals:
        if not blocks.started:
            blocks.started = True
            usage = {**_usage(question, answer), "output_tokens": 0}
            begun = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
            yield {"type": "message_start", "message": begun}
        for event in blocks.push(piece):
            yield event
        if last:
            for event in blocks.close():
                yield event
            yield {"type": "message_delta", "delta": _end(answer), "usage": _usage(question, answer)}
    yield {"type": "message_stop"}


class Blocks:
    """Content blocks while they grow."""

    def __init__(self) -> None:
        self.started = False
        self._index, self._kind = -1, ""

    def push(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.reasoning:
            yield from self._into("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.content:
            yield from self._into("text", {"type": "text", "text": "", "citations": None})
            yield self._delta({"type": "text_delta", "text": piece.content})
        for call in piece.calls:
            if call.id is not None:
                block: dict[str, Any] = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                yield from self._into(call.id, block)
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def close(self) -> Iterator[dict[str, Any]]:
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}

    def _into(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if kind != self._kind:
            yield from self.close()
            self._index, self._kind = self._index + 1, kind
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _input(arguments: str) -> Any:
    """A call's arguments; one that was cut off by `max_tokens` has none that could be read."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _end(answer: Answer) -> dict[str, Any]:
    if answer.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stopped_by}
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[answer.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(question: Question, answer: Answer) -> dict[str, Any]:
    """Anthropic counts what the cache had apart from the rest of the prompt."""
    counts = usage_of([question], [answer])
    return {
        "input_tokens": counts["prompt_cache_miss_tokens"],
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts["prompt_cache_hit_tokens"],
        "output_tokens": counts["completion_tokens"],
    }
