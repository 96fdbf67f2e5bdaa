"""What clients send: OpenAI's chat completions with DeepSeek's extensions; honoured or refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glasklar.data.chat import Message
from glasklar.engine.request import SamplingParams

MAX_CHOICES, MAX_STOPS, MAX_MESSAGES, MAX_TEXT, MAX_BIAS = 8, 16, 256, 1 << 20, 512
# This is a reasoner, not a poet: without a wish it answers with what it holds to be most probable.
DEFAULT_TEMPERATURE = 0.0
DEFAULT_TOKENS = 512

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """`developer` counts as `system`; `reasoning_content` of earlier turns is accepted, the model does not see it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    reasoning_content: Text | None = None
    name: Annotated[str, Field(max_length=64)] | None = None

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(Strict):
    include_usage: bool = False


class Thinking(Strict):
    type: Literal["enabled", "disabled"]


class ResponseFormat(Strict):
    """Only plain text for now: anything else is refused rather than promised."""

    type: Literal["text"]


class ChatRequest(Strict):
    """Body of POST /v1/chat/completions. `thinking` absent: the model decides for itself.

    `user` is accepted for compatibility: it names the caller's own end user and changes no answer.
    """

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = DEFAULT_TEMPERATURE
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIAS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    thinking: Thinking | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if any(not stop or len(stop) > 256 for stop in self.stops):
            raise ValueError("stop: each text needs 1 to 256 characters")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def thinks(self) -> bool | None:
        return None if self.thinking is None else self.thinking.type == "enabled"

    def sampling(self, choice: int, seed: int, stop_ids: tuple[int, ...]) -> SamplingParams:
        """Settings of choice number `choice`; `seed` where the caller gave none. Choices differ by their seed."""
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=(self.seed if self.seed is not None else seed) + choice,
            stop_ids=stop_ids,
            logprobs=self.top_logprobs or 0,
            logit_bias=self.logit_bias or {},
        )


def usage(prompt: int, completion: int, reasoning: int) -> dict[str, Any]:
    """Token counts in OpenAI's and DeepSeek's names. There is no prefix cache yet, so every prompt token is a miss."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": prompt,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
