"""From a checked request to what the engine is asked: prompt ids, sampling settings, guide."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llguidance import LLMatcher

from glasklar.data.chat import Begins, Message, begins, prefix_ids, render
from glasklar.data.foreign import NO_TOKEN, ForeignTokenizer
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.request import SamplingParams
from glasklar.errors import RequestError
from glasklar.serve.grammar import GuideMaker, GuideSpec
from glasklar.serve.schema import ChatMessage, ChatRequest, NamedTool, Refused, Tool
from glasklar.serve.tools import (
    Format,
    calls_grammar,
    format_of,
    plain_messages,
    schema_text,
    template_messages,
    template_tools,
)

# Of the room for the answer; None: all of it.
SHARES = {"minimal": 1 / 8, "low": 1 / 8, "medium": 1 / 4, "high": 1 / 2, "xhigh": None, "max": None}


class Speaker(Protocol):
    """What is asked: a model's service."""

    tokenizer: Tokenizer
    guides: GuideMaker

    @property
    def context(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt and how it is to be answered, `choices` times; choices differ by their seed.

    begins         where the prompt ends
    stops          texts that end the content
    alternatives   None: no log-probabilities; otherwise how many alternatives a token's entry names
    form           how calls are written, if the answer may hold any
    """

    ids: list[int]
    params: SamplingParams
    begins: Begins = "content"
    guide: GuideSpec | None = None
    choices: int = 1
    stops: Sequence[str] = ()
    alternatives: int | None = None
    form: Format | None = None

    def sampling(self, choice: int) -> SamplingParams:
        return replace(self.params, seed=self.params.seed + choice)


def question_of(service: Speaker, body: ChatRequest) -> Question:
    """What to ask the engine. Takes time (tokens, a grammar): not for the thread that serves all.

    Raises RequestError where the prompt leaves no room for an answer, or a parameter cannot be honoured.
    """
    tokenizer = service.tokenizer
    form = format_of(tokenizer)
    thinking, tools = _thinking(tokenizer, body), _tools(body)
    ids = prompt_ids(tokenizer, body, tools, form, thinking)
    room = room_of(service, ids)
    last = body.messages[-1]
    prefix = message_of(last) if last.prefix else None
    place = begins(tokenizer, thinking, prefix)
    grammar = _grammar(body, tools, form)
    if grammar is not None:
        if prefix is not None and prefix.content:
            raise Refused("prefix", "an answer with a grammar (response_format, tools) cannot go on with a content")
        service.guides.matcher(grammar)
    guide = _guide(body, grammar, min(body.limit, room), place, tokenizer)
    check_bias(service, body.logit_bias)
    return Question(
        ids=ids,
        params=body.sampling(secrets.randbits(61), tokenizer.stop_ids),
        begins=place,
        guide=guide,
        choices=body.choices,
        stops=body.stops,
        alternatives=body.alternatives,
        form=form if tools else None,
    )


def prompt_ids(
    tokenizer: Tokenizer, body: ChatRequest, tools: Sequence[Tool], form: Format, thinking: bool | None
) -> list[int]:
    """The conversation as the model reads it."""
    if isinstance(tokenizer, ForeignTokenizer) and form.told:
        last = body.messages[-1]
        messages = body.messages[:-1] if last.prefix else body.messages
        known = template_tools(tools) if tools else None
        ids = tokenizer.prompt(template_messages(messages, form), thinking, known)
        return ids + (prefix_ids(tokenizer, message_of(last), begins(tokenizer, thinking)) if last.prefix else [])
    plain = plain_messages(body.messages, tools, form)
    return render(tokenizer, [message_of(message) for message in plain], thinking)


def message_of(message: ChatMessage) -> Message:
    """A message without calls as `data` has it."""
    role = "system" if message.role == "developer" else message.role
    if role == "tool":
        raise RequestError("messages: a tool's message came where only text can stand")
    return Message(role=role, content=message.text, reasoning_content=message.reasoning_content, prefix=message.prefix)


def room_of(service: Speaker, ids: Sequence[int]) -> int:
    """Tokens left for the answer. Raises RequestError where there are none, naming both numbers."""
    if len(ids) >= service.context:
        raise Refused(
            "messages", f"the prompt has {len(ids)} tokens, the model's context is {service.context}; shorten it"
        )
    return service.context - len(ids)


def check_bias(service: Speaker, bias: dict[int, float] | None) -> None:
    size = service.guides.vocab_size
    foreign = next((token for token in bias or () if not 0 <= token < size), None)
    if foreign is not None:
        raise Refused("logit_bias", f"token {foreign} is none of this model's, which are 0 to {size - 1}")


def _thinking(tokenizer: Tokenizer, body: ChatRequest) -> bool | None:
    """Whether to think; a model that cannot is not told that it must not."""
    if tokenizer.think_id != NO_TOKEN:
        return body.thinks
    if body.thinks:
        raise Refused("thinking", "this model does not think; leave it out")
    return None


def _tools(body: ChatRequest) -> list[Tool]:
    """The functions that the answer may call."""
    if body.tool_choice == "none":
        return []
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        return [tool for tool in body.tools or () if tool.function.name == wanted]
    return list(body.tools or ())


def _grammar(body: ChatRequest, tools: Sequence[Tool], form: Format) -> str | None:
    """What the content must look like, as the grammar library takes it."""
    content = content_schema(body)
    if tools:
        must = body.tool_choice not in (None, "auto")
        parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
        lark = calls_grammar(form, tools, "required" if must else "auto", parallel=parallel, content=content)
        return str(LLMatcher.grammar_from_lark(lark))
    return None if content is None else str(LLMatcher.grammar_from_json_schema(content))


def content_schema(body: ChatRequest) -> str | None:
    """JSON schema of the content by `response_format`."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return schema_text({"type": "object"}, strict=True)
    return schema_text(wanted.json_schema.schema_ or {}, bool(wanted.json_schema.strict))


def _guide(body: ChatRequest, grammar: str | None, room: int, place: Begins, tokenizer: Tokenizer) -> GuideSpec | None:
    """The guide, if one is needed. Where the content has a grammar, at least half the room is left to it."""
    budget: int | None = None
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        budget = body.thinking.budget_tokens
    elif body.reasoning_effort not in (None, "none"):
        share = SHARES[body.reasoning_effort or ""]
        budget = None if share is None else int(room * share)
    if grammar is not None:
        budget = room // 2 if budget is None else budget
    if tokenizer.think_id == NO_TOKEN or place == "content":
        budget = None
    if grammar is None and budget is None:
        return None
    return GuideSpec(grammar=grammar, budget=budget, begins=place)
