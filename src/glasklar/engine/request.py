"""What the engine is asked and what it answers. Token ids only: text belongs to `data`, HTTP to `serve`."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from glasklar.engine.guide import Guarded
from glasklar.errors import GlasklarError, RequestError
from glasklar.model.config import ModelConfig

FinishReason = Literal["stop", "length", "cancelled", "error"]
State = Literal["waiting", "running", "finished"]


# Larger ones would leave the range of fp32 at low temperatures.
MOST_BIAS = 1e6


def whole(name: str, value: object) -> int:
    """The value as an int; raises RequestError for one that is none (2.0 neither)."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name} = {value!r}: must be a whole number") from None


def check_ids(ids: Iterable[int], config: ModelConfig) -> None:
    """Raises RequestError for what is no id, or one outside the vocabulary."""
    foreign = next((i for i in ids if not 0 <= whole("token id", i) < config.vocab_size), None)
    if foreign is not None:
        raise RequestError(f"token id {foreign}: the vocabulary has ids 0 to {config.vocab_size - 1}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.

    max_tokens    most tokens to make, the stopping one included
    temperature   0 = the most probable token
    top_k         0 = all; top_p, min_p as usual (nucleus; share of the best token's probability)
    seed          randomness depends on (seed, position) alone, never on what else runs
    stop_ids      tokens that end the answer; the one that did is part of the ids
    logprobs      number of alternatives to report beside the chosen token's own log-probability
    logit_bias    token id -> added to its logit
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (1, 1 << 24), "temperature": (0.0, 100.0), "top_k": (0, 1 << 24), "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
            "repetition_penalty": (0.01, 100.0), "logprobs": (0, 20), "seed": (-(1 << 63), (1 << 64) - 1),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(low, int):
                whole(name, value)
            elif not isinstance(value, int | float):
                raise RequestError(f"{name} = {value!r}: must be a number")
            if not low <= value <= high:  # also refuses NaN
                raise RequestError(f"{name} = {value}: must lie between {low} and {high}")
        for token, bias in self.logit_bias.items():
            whole("logit_bias: token", token)
            if not abs(bias) <= MOST_BIAS:  # also refuses NaN
                raise RequestError(f"logit_bias of token {token} = {bias}: must lie within {MOST_BIAS:g} of 0")
        if not isinstance(self.stop_ids, tuple):
            raise RequestError(f"stop_ids = {self.stop_ids!r}: must be a tuple of token ids")
        for token in self.stop_ids:
            if not 0 <= whole("stop_ids: token", token) < 1 << 31:
                raise RequestError(f"stop_ids: {token} is no token's id")

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def truncated(self) -> bool:
        """Whether a draw leaves tokens out; the most probable one is never left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def special(self) -> bool:
        """Whether the sampler must do more for it than apply a temperature."""
        return self.penalised or self.truncated or bool(self.logit_bias) or self.logprobs > 0


@dataclass(kw_only=True)
class Request:
    """What the scheduler handles.

    limit      most tokens to make: `max_tokens`, or less where the model's context ends before
    priority   higher runs first; among equals the earlier one
    guide      what may come next, beside the model
    cached     prompt tokens that the cache had already
    drafted    tokens guessed ahead for it so far, of which the model confirmed those `accepted`
    answer     what was made, with its log-probabilities, when the request had to give way; it goes on from there
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    priority: int = 0
    guide: Guarded | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    state: State = "waiting"
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """What must be read before the next token can be made."""
        return self.prompt + self.answer

    @property
    def special(self) -> bool:
        """Whether the sampler must do more for it than apply a temperature."""
        return self.params.special or self.guide is not None

    @property
    def reserve(self) -> int:
        """Most cache tokens the request may come to hold. (The last token made is never put into the cache.)"""
        return len(self.prompt) + self.limit - 1


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One new token of a request.

    logprob        of the token under the model's own distribution (temperature 1, before any truncation)
    alternatives   (id, logprob) of the most probable tokens, best first
    finish         set with the last token
    cached         prompt tokens that the cache had already
    drafted        tokens guessed ahead for this answer so far, of which the model confirmed those `accepted`
    error          why the request failed (finish "error"; then there is no token and `token` is -1)
    """

    request: int
    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    error: GlasklarError | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer: ids with the stopping token, if one ended it; log-probabilities, one an id."""

    ids: list[int]
    logprobs: list[float]
    finish: FinishReason
    alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
