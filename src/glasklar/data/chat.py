"""Messages to ids and ids to replies, in the form of DeepSeek-V3.1; other models' own forms come in by their templates.

    <BOS>system<User>question<Assistant><think>thought</think>answer<EOS>      a reply that thinks
    <BOS>system<User>question<Assistant></think>answer<EOS>                    one that answers at once

A prompt ends after <Assistant> (the model chooses by its first token), or with <think> or </think> (the caller chose).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from glasklar.data.foreign import NO_TOKEN, ForeignTokenizer
from glasklar.data.tokenizer import Decoder, Tokenizer
from glasklar.errors import RequestError

Role = Literal["system", "user", "assistant"]
Channel = Literal["reasoning", "content"]
# Where a prompt ends: within the thinking, in the content, or where the model's first token chooses between them.
Begins = Literal["thinking", "content", "choice"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """`prefix`: a last message of the assistant that the reply goes on with; its thoughts count then."""

    role: Role
    content: str
    reasoning_content: str | None = None
    prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A generated answer taken apart. `complete`: thinking closed or not begun, and the end token reached."""

    reasoning: str
    content: str
    complete: bool


def render(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
    """Prompt ids. Thoughts of earlier turns are left out, as DeepSeek does.

    thinking   True: the reply must think; False: it must not; None: the model decides

    Raises RequestError for an unknown role, no message, or a last message that is neither the user's nor a prefix.
    """
    if not messages:
        raise RequestError("messages = []: at least one message is needed")
    if any(message.prefix for message in messages[:-1]):
        raise RequestError("prefix: only the last message can be one")
    if messages[-1].prefix and messages[-1].role == "assistant":
        before = render(tokenizer, messages[:-1], thinking)
        return before + prefix_ids(tokenizer, messages[-1], begins(tokenizer, thinking))
    if messages[-1].role != "user":
        raise RequestError(
            f"messages: the last message is of role {messages[-1].role!r}; it must be the user's, "
            "or the assistant's with prefix: true"
        )
    for message in messages:
        if message.role not in get_args(Role):
            raise RequestError(f"role = {message.role!r}: use one of {', '.join(get_args(Role))}")
    if isinstance(tokenizer, ForeignTokenizer):
        return tokenizer.prompt([{"role": m.role, "content": m.content} for m in messages], thinking)
    ids = [tokenizer.bos_id]
    for message in messages:
        if message.role == "system":
            ids += tokenizer.encode(message.content)
    for message in messages:
        if message.role == "user":
            ids += [tokenizer.user_id, *tokenizer.encode(message.content), tokenizer.assistant_id]
        elif message.role == "assistant":
            ids += [tokenizer.end_think_id, *tokenizer.encode(message.content), tokenizer.eos_id]
    if thinking is not None:
        ids.append(tokenizer.think_id if thinking else tokenizer.end_think_id)
    return ids


def begins(tokenizer: Tokenizer, thinking: bool | None, prefix: Message | None = None) -> Begins:
    """Where a prompt rendered with `thinking`, and with `prefix` behind it, ends."""
    if prefix is not None and (prefix.content or prefix.reasoning_content):
        return "content" if prefix.content else "thinking"
    if isinstance(tokenizer, ForeignTokenizer):
        if tokenizer.opens_thinking(thinking):
            return "thinking"
        return "content" if tokenizer.think_id == NO_TOKEN else "choice"
    return "choice" if thinking is None else "thinking" if thinking else "content"


def prefix_ids(tokenizer: Tokenizer, prefix: Message, place: Begins) -> list[int]:
    """What the beginning of a reply adds to a prompt that ends at `place`."""
    thought, content = prefix.reasoning_content or "", prefix.content
    if not thought and not content:
        return []
    if thought and tokenizer.think_id == NO_TOKEN:
        raise RequestError("reasoning_content: this model does not think; leave it out of the prefix")
    ours = not isinstance(tokenizer, ForeignTokenizer)
    if thought and ours and place == "content":
        raise RequestError("reasoning_content: the reply must not think, but its prefix has thoughts; drop one of them")
    ids: list[int] = []
    if thought:
        ids += [] if place == "thinking" else [tokenizer.think_id]
        ids += tokenizer.encode(thought)
    if content:
        ids += [tokenizer.end_think_id] if thought or place == "thinking" or (ours and place == "choice") else []
        ids += tokenizer.encode(content)
    return ids


def demonstration(
    tokenizer: Tokenizer, question: str, thought: str | None, answer: str
) -> tuple[list[int], list[float]]:
    """Ids of one exchange and the loss weight of each: 1 on the reply, 0 on what the user said."""
    prompt = render(tokenizer, [Message(role="user", content=question)])
    reply = [tokenizer.end_think_id, *tokenizer.encode(answer), tokenizer.eos_id]
    if thought is not None:
        reply = [tokenizer.think_id, *tokenizer.encode(thought), *reply]
    return prompt + reply, [0.0] * len(prompt) + [1.0] * len(reply)


def parse(tokenizer: Tokenizer, ids: Sequence[int], thinking: bool | None = None) -> Reply:
    """Takes a generated reply apart; `thinking` as it was rendered."""
    ids = list(ids)
    ended = bool(ids) and ids[-1] in tokenizer.stop_ids
    body = ids[:-1] if ended else ids
    if isinstance(tokenizer, ForeignTokenizer):
        # Other models need not say that they do not think.
        opened, chosen = tokenizer.opens_thinking(thinking), True
        if not opened and body and body[0] == tokenizer.think_id:
            opened, body = True, body[1:]
    elif thinking is None:
        first = body[0] if body else None
        opened = first == tokenizer.think_id
        chosen = opened or first == tokenizer.end_think_id
        body = body[1:] if chosen else body
    else:
        opened, chosen = thinking, True
    if not opened:
        return Reply(reasoning="", content=tokenizer.decode(body), complete=ended and chosen)
    if tokenizer.end_think_id not in body:
        return Reply(reasoning=tokenizer.decode(body), content="", complete=False)
    end = body.index(tokenizer.end_think_id)
    return Reply(reasoning=tokenizer.decode(body[:end]), content=tokenizer.decode(body[end + 1 :]), complete=ended)


class Splitter:
    """Ids as they are generated to pieces of reasoning and content; concatenated they give what `parse` gives.

    place   where the prompt ends, if not where `thinking` alone puts it
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None = None, place: Begins | None = None) -> None:
        self._tokenizer, self._decoder = tokenizer, Decoder(tokenizer)
        place = place or begins(tokenizer, thinking)
        self.channel: Channel = "reasoning" if place == "thinking" else "content"
        self._may_open = place == "choice"
        self._may_decline = place == "choice" and not isinstance(tokenizer, ForeignTokenizer)

    def push(self, token: int) -> list[tuple[Channel, str]]:
        """The pieces that `token` completes, empty ones left out."""
        tokenizer = self._tokenizer
        opening, self._may_open = self._may_open, False
        declining, self._may_decline = self._may_decline, False
        if opening and token == tokenizer.think_id:
            self.channel = "reasoning"
            return []
        if token == tokenizer.end_think_id and (declining or self.channel == "reasoning"):
            rest = self.flush()
            self.channel = "content"
            return rest
        if token in tokenizer.stop_ids:
            return self.flush()
        text = self._decoder.push(token)
        return [(self.channel, text)] if text else []

    def flush(self) -> list[tuple[Channel, str]]:
        text = self._decoder.flush()
        return [(self.channel, text)] if text else []
