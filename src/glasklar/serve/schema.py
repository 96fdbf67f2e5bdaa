"""What clients send: OpenAI's chat completions with DeepSeek's extensions; honoured or refused, never ignored.

The other forms (Responses, Anthropic's Messages) are turned into this one.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glasklar.engine.request import SamplingParams
from glasklar.errors import RequestError

MAX_CHOICES, MAX_STOPS, MAX_MESSAGES, MAX_TEXT, MAX_BIAS, MAX_TOOLS = 8, 16, 1024, 1 << 20, 512, 128
MAX_SCHEMA, MAX_DEPTH = 1 << 16, 48
# This is a reasoner, not a poet: without a wish it answers with what it holds to be most probable.
DEFAULT_TEMPERATURE = 0.0
DEFAULT_TOKENS = 4096  # DeepSeek's; an answer ends with the context in any case

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Identifier = Annotated[str, Field(min_length=1, max_length=128)]
ModelName = Annotated[str, Field(max_length=256)]
Tokens = Annotated[int, Field(ge=1, le=1 << 20)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Stops = str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None
TopK = Annotated[int, Field(ge=0, le=1 << 20)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(ge=0.01, le=10)]
LogitBias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIAS)]
Seed = Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
# DeepSeek's and OpenAI's names of how much a model should think.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Refused(RequestError):
    """A parameter that cannot be honoured; `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _schema(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema within the limits, so that nothing that follows can take long."""
    if _depth(value, MAX_DEPTH + 1) > MAX_DEPTH:
        raise ValueError(f"the schema is nested more than {MAX_DEPTH} deep")
    size = len(json.dumps(value))
    if size > MAX_SCHEMA:
        raise ValueError(f"the schema has {size} characters; at most {MAX_SCHEMA} are taken")
    return value


def _depth(value: Any, most: int) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 0 if most == 0 else 1 + max((_depth(v, most - 1) for v in inner), default=0)


class Schema(Strict):
    """Holds a checked JSON schema under the name that the client uses for it."""

    @model_validator(mode="after")
    def _bounded(self) -> Any:
        for name in ("parameters", "schema_", "input_schema"):
            found = getattr(self, name, None)
            if found is not None:
                _schema(found)
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call that the model made earlier. `index` is what some clients keep from the stream; it changes nothing."""

    id: Identifier
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    """`developer` counts as `system`. `prefix`: the reply goes on with this last message of the assistant.

    `reasoning_content` of earlier turns goes to the model where its chat template has a place for it; ours has none.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)] | None = None
    reasoning_content: Text | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Identifier | None = None
    prefix: bool = False
    refusal: None = None

    @model_validator(mode="after")
    def _of_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: a text is needed, or a list of text parts")
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content", "prefix"):
                if getattr(self, name):
                    raise ValueError(f"{name}: only messages of the assistant have it, not of role {self.role!r}")
        if self.prefix and self.tool_calls:
            raise ValueError("prefix: a message with tool_calls is whole; give their results next")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: messages of role 'tool' need it, others have none")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool = False


class Thinking(Strict):
    """`budget_tokens`: most tokens of thinking (Anthropic's name)."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None


class JsonSchema(Schema):
    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`json_schema` always holds, `strict` or not; without `strict`, keywords that the grammar lacks are left out."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with type 'json_schema', and only with it")
        return self


class Function(Schema):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class TemplateSettings(Strict):
    """What may be handed to a chat template: whether to think, under both names that are in use."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class Sampled(Strict):
    """What requests for chat and for completions have in common: how tokens are drawn, and how many answers there are.

    `user` is accepted for compatibility: it names the caller's own end user and changes no answer.
    """

    model: ModelName
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _streams_and_stops(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream: true")
        if any(not text or len(text) > 256 for text in self.stops):
            raise ValueError("stop: each text needs 1 to 256 characters")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def drawn(self, limit: int, seed: int, stop_ids: tuple[int, ...], logprobs: int) -> SamplingParams:
        """Settings of the first choice; `seed` where the caller gave none."""
        return SamplingParams(
            max_tokens=limit,
            temperature=DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=self.seed if self.seed is not None else seed,
            stop_ids=stop_ids,
            logprobs=logprobs,
            logit_bias=self.logit_bias or {},
        )


class ChatRequest(Sampled):
    """Body of POST /v1/chat/completions. `thinking` absent: the model decides for itself.

    `reasoning_effort` limits the thinking to a share of the room for the answer: an eighth ("minimal", "low"), a
    quarter ("medium"), half ("high"), all ("xhigh", "max"); "none" is no thinking. `prompt_cache_key` is accepted for
    compatibility, as `user` is.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateSettings | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        self._check_tools()
        self._check_thinking()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no tool is named {self.tool_choice.function.name!r}")
        known: set[str] = set()
        for message in self.messages:
            known |= {call.id for call in message.tool_calls or ()}
            if message.tool_call_id is not None and message.tool_call_id not in known:
                raise ValueError(f"messages: no earlier call has the id {message.tool_call_id!r} of a tool's message")

    def _check_thinking(self) -> None:
        if len({wish for wish in self._wishes if wish is not None}) > 1:
            raise ValueError("thinking: contradicts reasoning_effort or chat_template_kwargs; give one of them")
        if self.thinking is not None and self.thinking.budget_tokens is not None and self.reasoning_effort:
            raise ValueError("reasoning_effort: contradicts thinking.budget_tokens; give one of them")

    @property
    def _wishes(self) -> list[bool | None]:
        settings = self.chat_template_kwargs or TemplateSettings()
        return [
            None if self.thinking is None else self.thinking.type == "enabled",
            False if self.reasoning_effort == "none" else None,
            settings.thinking,
            settings.enable_thinking,
        ]

    @property
    def thinks(self) -> bool | None:
        """Whether the reply must think (True), must not (False), or the model decides."""
        return next((wish for wish in self._wishes if wish is not None), None)

    @property
    def limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS

    @property
    def alternatives(self) -> int | None:
        """How many alternatives each token's entry names; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def sampling(self, seed: int, stop_ids: tuple[int, ...]) -> SamplingParams:
        return self.drawn(self.limit, seed, stop_ids, self.top_logprobs or 0)


def usage(prompt: int, completion: int, reasoning: int, cached: int) -> dict[str, Any]:
    """Token counts in OpenAI's and DeepSeek's names; `cached` of the prompt's tokens were known already."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
