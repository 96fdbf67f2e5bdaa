"""Tokens of one answer to what a client sees: thinking, content and calls apart, stop texts, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glasklar.data.chat import Begins, Channel, Splitter
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.request import TokenEvent
from glasklar.serve.tools import MARK, CallDelta, CallFinder, Format, overlap

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(kw_only=True)
class Piece:
    """What one token brought: text of each channel (possibly none yet), pieces of calls, its entry for `logprobs`."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    entries: dict[Channel, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.reasoning or self.content or self.calls or self.entries)

    def add(self, other: Piece) -> None:
        """Goes on with `other`."""
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls
        for channel, entries in other.entries.items():
            self.entries.setdefault(channel, []).extend(entries)


class Answer:
    """One choice while it grows. `push` every event; `finish` is set once no more will be taken.

    begins         where the prompt ended
    stops          texts that end the content; they are not part of it
    alternatives   None: no log-probabilities; otherwise how many alternatives an entry names
    form           how calls are written, if the answer may hold any
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        begins: Begins,
        stops: Sequence[str] = (),
        alternatives: int | None = None,
        form: Format | None = None,
    ) -> None:
        self._tokenizer, self._alternatives = tokenizer, alternatives
        self._splitter = Splitter(tokenizer, place=begins)
        self._stops = StopFinder(stops)
        self._calls = None if form is None else CallFinder(form)
        self._marks = {} if form is None else form.tokens
        self.finish: Finish | None = None
        self.tokens = self.reasoning_tokens = self.cached = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended it, if one did."""
        return self._stops.found

    def push(self, event: TokenEvent) -> Piece:
        """What the token of `event` adds."""
        piece = Piece()
        self.tokens += 1
        self.cached = event.cached
        pieces = self._split(event.token)
        self.reasoning_tokens += self._splitter.channel == "reasoning"
        in_calls = self._calls is not None and self._calls.within
        if self._alternatives is not None and event.token not in self._tokenizer.special_ids and not in_calls:
            piece.entries[self._splitter.channel] = [self._entry(event)]
        if event.finish is not None:
            pieces += self._splitter.flush()
            self.finish = "stop" if event.finish == "stop" else "length"
        for channel, text in pieces:
            if channel == "reasoning":
                piece.reasoning += text
            else:
                self._content(text, piece)
        if self._stops.found:
            self.finish = "stop"
        elif self.finish is not None:
            piece.content += "" if self._calls is None else self._stops.push(self._calls.flush())
            piece.content += self._stops.flush()
            if self.finish == "stop" and self._calls is not None and self._calls.calls:
                self.finish = "tool_calls"
        return piece

    def _split(self, token: int) -> list[tuple[Channel, str]]:
        if self._splitter.channel == "content" and token in self._marks:
            return [*self._splitter.flush(), ("content", MARK + self._marks[token])]
        return self._splitter.push(token)

    def _content(self, text: str, piece: Piece) -> None:
        if self._calls is not None:
            text, calls = self._calls.push(text)
            piece.calls += calls
        piece.content += self._stops.push(text)
        if self._calls is not None and self._calls.within and not self._stops.found:
            piece.content += self._stops.flush()

    def _entry(self, event: TokenEvent) -> dict[str, Any]:
        best = event.alternatives[: self._alternatives]
        return {
            **named(self._tokenizer, event.token, event.logprob),
            "top_logprobs": [named(self._tokenizer, token, logprob) for token, logprob in best],
        }


def named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """OpenAI's entry of a token."""
    raw = tokenizer.token_bytes(token)
    # JSON knows no infinity; -9999 is what OpenAI's API writes for "practically never".
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class StopFinder:
    """Passes text on up to the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            return self._held[:at]
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest
