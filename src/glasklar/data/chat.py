"""Messages to ids and ids to replies, in the form of DeepSeek-V3.1; other models' own forms come in by their templates.

    <BOS>system<User>question<Assistant><think>thought</think>answer<EOS>      a reply that thinks
    <BOS>system<User>question<Assistant></think>answer<EOS>                    one that answers at once

A prompt ends after <Assistant> (the model chooses by its first token), or with <think> or </think> (the caller chose).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from glasklar.data.foreign import ForeignTokenizer
from glasklar.data.tokenizer import Decoder, Tokenizer
from glasklar.errors import RequestError

Role = Literal["system", "user", "assistant"]
Channel = Literal["reasoning", "content"]


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    content: str
    reasoning_content: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A generated answer taken apart. `complete`: thinking closed or not begun, and the end token reached."""

    reasoning: str
    content: str
    complete: bool


def render(tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
    """Prompt ids. Thoughts of earlier turns are left out, as DeepSeek does.

    thinking   True: the reply must think; False: it must not; None: the model decides

    Raises RequestError for an unknown role, no message, or a last message that is not the user's.
    """
    if not messages:
        raise RequestError("messages = []: at least one message is needed")
    if messages[-1].role != "user":
        raise RequestError(f"the last message is of role {messages[-1].role!r}; it must be the user's")
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
    """Ids as they are generated to pieces of reasoning and content; concatenated they give what `parse` gives."""

    def __init__(self, tokenizer: Tokenizer, thinking: bool | None = None) -> None:
        self._tokenizer, self._decoder = tokenizer, Decoder(tokenizer)
        foreign = isinstance(tokenizer, ForeignTokenizer)
        opened = tokenizer.opens_thinking(thinking) if isinstance(tokenizer, ForeignTokenizer) else bool(thinking)
        self.channel: Channel = "reasoning" if opened else "content"
        self._may_open = not opened and (foreign or thinking is None)
        self._may_decline = not foreign and thinking is None

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
