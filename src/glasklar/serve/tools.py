"""Functions that a model may call: how they are told to it, how it writes a call, and how that is read again.

Models whose chat template knows functions are told by it. All others (spark too) get them described in the system
message and write calls in the form that most open models use. A grammar keeps the form: what is read always parses.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glasklar.data.foreign import ForeignTokenizer
from glasklar.data.tokenizer import Tokenizer
from glasklar.serve.schema import ChatMessage, Tool

MOST_CALLS = 16  # in one answer
# Stands before the text of a token of the vocabulary that marks calls, so that the same characters in a text do not.
MARK = "\ufdd0"
_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a model writes calls: begin (opening NAME middle ARGUMENTS closing, joined by between) end.

    trigger   what `begin` + `opening` starts with and no other text does
    told      whether the chat template tells the model about functions; otherwise the system message does
    text      whether arguments of earlier calls go to the template as text (else as an object)
    tokens    tokens of the vocabulary among these parts, and their texts
    """

    trigger: str
    opening: str
    middle: str
    closing: str
    begin: str = ""
    between: str = ""
    end: str = ""
    told: bool = False
    text: bool = False
    tokens: Mapping[int, str] = field(default_factory=dict)


GENERIC = Format(
    trigger="<tool_call>",
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    closing="}\n</tool_call>",
    between="\n",
)
# arXiv 2412.19437's successors: chat templates of DeepSeek-V3.1, and of V3 and R1.
DEEPSEEK = Format(
    trigger="<｜tool▁calls▁begin｜>",
    begin="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁call▁begin｜>",
    middle="<｜tool▁sep｜>",
    closing="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
    text=True,
)
DEEPSEEK_R1 = replace(
    DEEPSEEK,
    opening="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    middle="\n```json\n",
    closing="\n```<｜tool▁call▁end｜>",
    between="\n",
)


def format_of(tokenizer: Tokenizer) -> Format:
    """How a model writes calls, by its chat template; the generic form where that says nothing we know."""
    if not isinstance(tokenizer, ForeignTokenizer) or tokenizer.template is None:
        return GENERIC
    source = tokenizer.template.source
    form = GENERIC
    if all(tokenizer.added_id(text) is not None for text in (DEEPSEEK.begin, "<｜tool▁sep｜>")):
        form = DEEPSEEK_R1 if "```json" in source else DEEPSEEK
    elif "<tool_call>" not in source:
        return GENERIC
    tokens: dict[int, str] = {}
    for text in set(re.findall(r"<[^<>\s]+>", form.begin + form.opening + form.middle + form.closing + form.end)):
        found = tokenizer.added_id(text)
        if found is not None:
            tokens[found] = text

    def marked(part: str) -> str:
        for text in tokens.values():
            part = part.replace(text, MARK + text)
        return part

    return replace(
        form,
        told=re.search(r"\btools\b", source) is not None,
        tokens=tokens,
        trigger=marked(form.trigger),
        begin=marked(form.begin),
        opening=marked(form.opening),
        middle=marked(form.middle),
        closing=marked(form.closing),
        end=marked(form.end),
    )


# --- telling ------------------------------------------------------------------------------------------------------


def plain_messages(messages: Sequence[ChatMessage], tools: Sequence[Tool], form: Format) -> list[ChatMessage]:
    """The conversation without roles and fields that a model that was not told about functions lacks."""
    made: list[ChatMessage] = []
    for message in messages:
        if message.role == "tool":
            safe = message.text.replace("</tool_response", "<\\/tool_response")
            text = f"<tool_response>\n{safe}\n</tool_response>"
            if made and made[-1].role == "user" and made[-1].text.endswith("</tool_response>"):
                text = f"{made.pop().text}\n{text}"
            made.append(ChatMessage(role="user", content=text))
        elif message.tool_calls:
            content = message.text + written(message, form)
            made.append(message.model_copy(update={"content": content, "tool_calls": None}))
        else:
            made.append(message)
    if not tools:
        return made
    if made[0].role in ("system", "developer"):
        first, *made = made
        return [ChatMessage(role="system", content=f"{first.text}\n\n{_described(tools, form)}"), *made]
    return [ChatMessage(role="system", content=_described(tools, form)), *made]


def template_messages(messages: Sequence[ChatMessage], form: Format) -> list[dict[str, Any]]:
    """The conversation as chat templates take it."""
    made = []
    for message in messages:
        one: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        if message.reasoning_content:
            one["reasoning_content"] = message.reasoning_content
        if message.name:
            one["name"] = message.name
        if message.tool_call_id:
            one["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            one["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments if form.text else _object(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
        made.append(one)
    return made


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The functions as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def written(message: ChatMessage, form: Format) -> str:
    """The calls of a message as the model writes them."""
    calls = [
        f"{form.opening}{call.function.name}{form.middle}{call.function.arguments}{form.closing}"
        for call in message.tool_calls or ()
    ]
    return (form.begin + form.between.join(calls) + form.end).replace(MARK, "") if calls else ""


def _described(tools: Sequence[Tool], form: Format) -> str:
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in template_tools(tools)]
    example = f"{form.begin}{form.opening}NAME{form.middle}{{ARGUMENTS}}{form.closing}{form.end}".replace(MARK, "")
    return (
        "Functions that you may call, each with the JSON schema of its arguments:\n<tools>\n"
        + "\n".join(lines)
        + f"\n</tools>\nTo call one, write:\n{example}\nThe result follows in <tool_response>."
    )


def _object(text: str) -> Any:
    """Arguments as an object; text that is none stays as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# --- keeping the form ---------------------------------------------------------------------------------------------


def schema_text(schema: Mapping[str, Any], strict: bool) -> str:
    """A JSON schema with how its JSON is written. Unless `strict`, keywords that the grammar lacks are left out."""
    return json.dumps({**schema, "x-guidance": {**_STYLE, "lenient": not strict}})


def calls_grammar(
    form: Format,
    tools: Sequence[Tool],
    choice: Literal["auto", "required"],
    *,
    parallel: bool,
    content: str | None = None,
) -> str:
    """Grammar of an answer that may ("auto") or must call functions.

    content   JSON schema of what stands in place of calls; None: any text, also before the first call
    """
    first = _pieces(form, (form.begin + form.opening)[len(form.trigger) :])
    again = _pieces(form, form.between + form.opening)
    end = _pieces(form, form.end)
    rest = f"again{{0,{MOST_CALLS - 1}}}" if parallel and MOST_CALLS > 1 else ""
    calls = f"{first} call {rest} {end}"
    trigger = _pieces(form, form.trigger)
    if choice == "required":
        start = f"start: {trigger} {calls}"
    elif content is not None:
        start = f"start: plain | {trigger} {calls}\nplain: %json {content}"
    elif form.trigger.startswith(MARK):
        start = f"start: TEXT | TEXT {trigger} {calls}\nTEXT: /(.|\\n)*/"
    else:
        start = f"start: TEXT | head {calls}\nhead[lazy]: TEXT {trigger}\nTEXT: /(.|\\n)*/"
    lines = ["%llguidance {}", start, "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    if rest:
        lines.append(f"again: {again} call")
    for i, tool in enumerate(tools):
        function = tool.function
        arguments = function.parameters or {"type": "object", "properties": {}}
        middle, closing = _pieces(form, function.name + form.middle), _pieces(form, form.closing)
        lines.append(f"call_{i}: {middle} %json {schema_text(arguments, bool(function.strict))} {closing}")
    return "\n".join(lines) + "\n"


def _pieces(form: Format, text: str) -> str:
    """A text for the grammar: tokens of the vocabulary by their number, the rest as strings."""
    found = []
    for token, written_ in form.tokens.items():
        text = text.replace(MARK + written_, f"\0{token}\0")
    for place, piece in enumerate(text.split("\0")):
        if place % 2:
            found.append(f"<[{piece}]>")
        elif piece:
            found.append(json.dumps(piece, ensure_ascii=False))
    return " ".join(found)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CallDelta:
    """A piece of a call: id and name with the first one."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class CallFinder:
    """Content as it comes to text and calls; holds back what may be the beginning of a call."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._held = ""
        self._place: Literal["text", "name", "arguments", "after"] = "text"
        self.calls = 0

    @property
    def within(self) -> bool:
        """Whether calls have begun."""
        return self._place != "text"

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """The text and the pieces of calls that `text` completes."""
        form, out, deltas = self._form, "", list[CallDelta]()
        self._held += text
        while True:
            match self._place:
                case "text":
                    before, found = self._until(form.begin + form.opening)
                    out += before
                    if not found:
                        return out, deltas
                    self._place = "name"
                case "name":
                    name, sign, rest = self._held.partition(form.middle)
                    if not sign:
                        return out, deltas
                    self._held, self._place = rest, "arguments"
                    deltas.append(CallDelta(index=self.calls, id=f"call_{secrets.token_hex(12)}", name=name))
                case "arguments":
                    before, found = self._until(form.closing)
                    if before:
                        deltas.append(CallDelta(index=self.calls, arguments=before))
                    if not found:
                        return out, deltas
                    self.calls, self._place = self.calls + 1, "after"
                case "after":
                    _, found = self._until(form.opening)
                    if not found:
                        return out, deltas
                    self._place = "name"

    def flush(self) -> str:
        """Text that was held back; a call that was cut off stays incomplete."""
        rest, self._held = self._held, ""
        return rest if self._place == "text" else ""

    def _until(self, sign: str) -> tuple[str, bool]:
        """What stands before `sign`, and whether it is there; then it is behind us."""
        before, found, rest = self._held.partition(sign)
        if found:
            self._held = rest
            return before, True
        keep = overlap(self._held, sign)
        before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return before, False


def overlap(text: str, sign: str) -> int:
    """Length of the longest end of `text` that `sign` begins with."""
    return next((n for n in range(min(len(text), len(sign) - 1), 0, -1) if sign.startswith(text[-n:])), 0)
