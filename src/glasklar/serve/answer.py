"""Tokens of one answer to what a client sees: thinking and content apart, stop texts, log-probabilities, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glasklar.data.chat import Channel, Splitter
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.request import TokenEvent

Finish = Literal["stop", "length"]


@dataclass(kw_only=True)
class Piece:
    """What one token brought: text of each channel (possibly none yet) and its entry for `logprobs`."""

    reasoning: str = ""
    content: str = ""
    entries: dict[Channel, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.reasoning or self.content or self.entries)


class Answer:
    """One choice while it grows. `push` every event; `finish` is set once no more will be taken.

    thinking       as the prompt was rendered
    stops          texts that end the content; they are not part of it
    alternatives   None: no log-probabilities; otherwise how many alternatives an entry names
    """

    def __init__(
        self, tokenizer: Tokenizer, thinking: bool | None, stops: Sequence[str], alternatives: int | None
    ) -> None:
        self._tokenizer, self._alternatives = tokenizer, alternatives
        self._splitter = Splitter(tokenizer, thinking)
        self._stops = StopFinder(stops)
        self.finish: Finish | None = None
        self.tokens = self.reasoning_tokens = 0

    def push(self, event: TokenEvent) -> Piece:
        """What the token of `event` adds."""
        piece = Piece()
        self.tokens += 1
        pieces = self._splitter.push(event.token)
        self.reasoning_tokens += self._splitter.channel == "reasoning"
        if self._alternatives is not None and event.token not in self._tokenizer.special_ids:
            piece.entries[self._splitter.channel] = [self._entry(event)]
        if event.finish is not None:
            pieces += self._splitter.flush()
            self.finish = "stop" if event.finish == "stop" else "length"
        for channel, text in pieces:
            if channel == "reasoning":
                piece.reasoning += text
            else:
                piece.content += self._stops.push(text)
        if self._stops.found:
            self.finish = "stop"
        elif self.finish is not None:
            piece.content += self._stops.flush()
        return piece

    def _entry(self, event: TokenEvent) -> dict[str, Any]:
        best = event.alternatives[: self._alternatives]
        return {
            **self._named(event.token, event.logprob),
            "top_logprobs": [self._named(token, logprob) for token, logprob in best],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        # JSON knows no infinity; -9999 is what OpenAI's API writes for "practically never".
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class StopFinder:
    """Passes text on up to the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        self._held += text
        places = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
