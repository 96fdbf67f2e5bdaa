"""What an answer may look like, from plain data to a guide of the engine: a grammar for the content (JSON, calls of
tools; compiled by llguidance) and a budget for the thinking before it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from glasklar.data.foreign import NO_TOKEN, ForeignTokenizer
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.guide import Guide
from glasklar.errors import CheckpointError, RequestError

# Bytes of a grammar. With the limits below, the slowest one found in the tests compiles in some 0.2 seconds.
MAX_GRAMMAR = 1 << 17
COMPILED = 32  # compiled grammars kept for the next request
LIMITS = LLParserLimits(initial_lexer_fuel=400_000, step_lexer_fuel=100_000, max_grammar_size=100_000)

Begins = Literal["thinking", "content", "choice"]


@dataclass(frozen=True, kw_only=True)
class GuideSpec:
    """What guides an answer; plain data, so that it can travel to the engine.

    grammar   of the content, as llguidance takes it; None: free
    budget    most tokens of thinking; None: no limit
    begins    where the prompt ends: within the thinking, in the content, or where the model's first token chooses
    """

    grammar: str | None = None
    budget: int | None = None
    begins: Begins = "content"


class GuideMaker:
    """Guides for one model. Methods may be called from any thread.

    vocab_size   of the model, which may be larger than the tokenizer's
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._table: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, spec: GuideSpec) -> Guide:
        """A guide for one answer. Raises RequestError for a grammar that cannot be used."""
        return AnswerGuide(spec, self, None if spec.grammar is None else self.matcher(spec.grammar))

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the grammar. Raises RequestError for one that is wrong or asks for too much."""
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(f"a grammar of {len(grammar)} characters; at most {MAX_GRAMMAR} are taken")
        with self._lock:
            found = self._compiled.pop(grammar, None)
            table = self._table = self._table or self._read_tokenizer()
        if found is None:
            found = LLMatcher(table, grammar, log_level=0, limits=LIMITS)
            if not found.is_error():
                found.compute_bitmask()  # tells whether there is any answer at all, and what a step may cost
            if found.is_error():
                raise RequestError(f"the grammar cannot be used: {_reason(found)}")
        with self._lock:
            self._compiled[grammar] = found
            while len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        return found.deep_copy()

    def _read_tokenizer(self) -> LLTokenizer:
        # Slices make masks fast for large vocabularies; the default ones suit most grammars.
        text = self.tokenizer.files()["tokenizer.json"].decode()
        try:
            return LLTokenizer(text, n_vocab=self.vocab_size, eos_token=list(self.tokenizer.stop_ids))
        except ValueError as error:
            raise CheckpointError(f"grammars cannot be used with this tokenizer: {error}") from None


class AnswerGuide:
    """The thinking within its budget, then the content by its grammar. Where there is a grammar, the answer cannot end
    before it has begun with the content."""

    def __init__(self, spec: GuideSpec, maker: GuideMaker, matcher: LLMatcher | None) -> None:
        tokenizer = maker.tokenizer
        self._open, self._close, self._stops = tokenizer.think_id, tokenizer.end_think_id, tokenizer.stop_ids
        # Ours say by their first token whether they think; others need not.
        self._must_choose = not isinstance(tokenizer, ForeignTokenizer)
        self._size, self._matcher = maker.vocab_size, matcher
        self._place: Begins = spec.begins
        if self._open == NO_TOKEN and self._place == "choice":
            self._place = "content"
        self._left = spec.budget
        self._mask: NDArray[np.bool_] | None = None
        self._known = False

    def allowed(self) -> NDArray[np.bool_] | None:
        if not self._known:
            self._mask, self._known = self._allowed(), True
        return self._mask

    def accept(self, token: int) -> None:
        self._known = False
        if self._place == "thinking":
            if token == self._close:
                self._place = "content"
            elif self._left is not None:
                self._left -= 1
            return
        if self._place == "choice":
            self._place = "thinking" if token == self._open else "content"
            if token == self._open or (self._must_choose and token == self._close):
                return
        if self._matcher is not None:
            self._matcher.consume_token(token)  # a token that was not allowed leaves it in a state that allows none

    def _allowed(self) -> NDArray[np.bool_] | None:
        if self._place == "thinking" and self._left is not None and self._left <= 0:
            return self._only([self._close])
        if self._matcher is None:
            return None
        if self._place == "thinking":
            return ~self._only(self._stops)
        if self._place == "content":
            return self._by_grammar(self._matcher)
        chosen = self._only([self._open])
        return self._only([self._open, self._close]) if self._must_choose else chosen | self._by_grammar(self._matcher)

    def _by_grammar(self, matcher: LLMatcher) -> NDArray[np.bool_]:
        if matcher.is_error():
            return self._only([])
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():  # the step asked for more than LIMITS allow
            return self._only([])
        return np.unpackbits(bits, bitorder="little")[: self._size].astype(np.bool_)

    def _only(self, tokens: Iterable[int]) -> NDArray[np.bool_]:
        mask = np.zeros(self._size, np.bool_)
        mask[list(tokens)] = True
        return mask


def _reason(matcher: LLMatcher) -> str:
    """The first line of the library's message; what follows is its own state."""
    return (matcher.get_error().strip().splitlines() or ["no reason given"])[0][:300]
