"""Completions of plain text: POST /v1/completions, with fill-in-the-middle where the tokenizer has tokens for it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from glasklar.data.foreign import ForeignTokenizer
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.request import SamplingParams
from glasklar.serve.answer import Answer, Piece
from glasklar.serve.chat import Choice, usage_of, whole
from glasklar.serve.question import Question, Speaker, check_bias
from glasklar.serve.schema import Refused, Sampled, Text

MAX_PROMPTS = 16
# Prefix, suffix, middle: DeepSeek's, Qwen's and StarCoder's tokens.
FILLING = [
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
]

Ids = Annotated[list[Annotated[int, Field(ge=0, le=1 << 31)]], Field(min_length=1, max_length=1 << 20)]
Prompt = Text | Ids | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | Annotated[
    list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)
]  # fmt: skip


# Questions, and what each choice's text begins with.
Asked = tuple[list[Question], list[str]]


class CompletionRequest(Sampled):
    """Body of POST /v1/completions. With `suffix`, the model writes what lies between it and the prompt."""

    prompt: Prompt
    suffix: Text | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of the prompt are not computed; leave out echo or logprobs")
        if self.echo and self.suffix is not None:
            raise ValueError("echo: cannot go with suffix")
        return self

    def sampling(self, stop_ids: tuple[int, ...]) -> SamplingParams:
        """OpenAI's default of 16 tokens is this API's too."""
        return self.drawn(self.max_tokens or 16, secrets.randbits(61), stop_ids, self.logprobs or 0)


def questions_of(service: Speaker, body: CompletionRequest) -> Asked:
    """What to ask the engine, and what each choice's text begins with (`echo`). Raises RequestError."""
    tokenizer = service.tokenizer
    given: Sequence[str | list[int]]
    if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
        given = [body.prompt]
    else:
        given = body.prompt  # type: ignore[assignment]
    check_bias(service, body.logit_bias)
    questions, echoes = [], []
    for prompt in given:
        ids = _filling(tokenizer, prompt, body.suffix) if body.suffix is not None else _prompt(service, prompt)
        if len(ids) >= service.context:
            raise Refused(
                "prompt", f"the prompt has {len(ids)} tokens, the model's context is {service.context}; shorten it"
            )
        echo = "" if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        questions.append(
            Question(
                ids=ids,
                params=body.sampling(tokenizer.stop_ids),
                choices=body.choices,
                stops=body.stops,
                alternatives=body.logprobs,
            )
        )
        echoes += [echo] * body.choices
    return questions, echoes


def _prompt(service: Speaker, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = [*service.tokenizer.begin_ids, *service.tokenizer.encode(prompt)]
        if not ids:
            raise Refused("prompt", "is empty; give at least one character")
        return ids
    size = service.guides.vocab_size
    foreign = next((token for token in prompt if not 0 <= token < size), None)
    if foreign is not None:
        raise Refused("prompt", f"token {foreign} is none of this model's, which are 0 to {size - 1}")
    return list(prompt)


def _filling(tokenizer: Tokenizer, prompt: str | list[int], suffix: str) -> list[int]:
    """Prefix, suffix, and the model goes on with the middle (arXiv 2207.14255)."""
    if not isinstance(prompt, str):
        raise Refused("suffix", "needs a prompt of text, not of token ids")
    for names in FILLING:
        found = [tokenizer.added_id(name) for name in names] if isinstance(tokenizer, ForeignTokenizer) else [None]
        if None not in found:
            before, after, middle = (token for token in found if token is not None)
            texts = tokenizer.encode(prompt), tokenizer.encode(suffix)
            return [*tokenizer.begin_ids, before, *texts[0], after, *texts[1], middle]
    raise Refused("suffix", "this model's tokenizer has no tokens for filling in the middle; leave it out")


async def collect(
    arrivals: AsyncIterator[Choice],
    body: CompletionRequest,
    asked: tuple[list[Question], list[str]],
    head: dict[str, Any],
) -> dict[str, Any]:
    """The whole reply (`text_completion`)."""
    questions, echoes = asked
    found = await whole(arrivals)
    done = [
        _choice(index, echo + _text(piece), answer.finish, _logprobs(piece, 0) if body.logprobs is not None else None)
        for index, ((answer, piece), echo) in enumerate(zip(found, echoes, strict=True))
    ]
    return {
        **head,
        "object": "text_completion",
        "choices": done,
        "usage": usage_of(questions, [answer for answer, _ in found]),
    }


async def stream(
    arrivals: AsyncIterator[Choice],
    body: CompletionRequest,
    asked: tuple[list[Question], list[str]],
    head: dict[str, Any],
) -> AsyncGenerator[dict[str, Any], None]:
    """The reply as chunks; usage last and only if it was asked for."""
    questions, echoes = asked
    head = {**head, "object": "text_completion"}
    tail = {"usage": None} if body.usage_wanted else {}
    for index, echo in enumerate(echoes):
        if echo:
            yield {**head, "choices": [_choice(index, echo)], **tail}
    answers: dict[int, Answer] = {}
    lengths: dict[int, int] = {}
    async for index, answer, piece, last in arrivals:
        answers[index] = answer
        if not piece.empty:
            text, offset = _text(piece), lengths.get(index, 0)
            lengths[index] = offset + len(text)
            logprobs = _logprobs(piece, offset) if body.logprobs is not None else None
            yield {**head, "choices": [_choice(index, text, logprobs=logprobs)], **tail}
        if last:
            yield {**head, "choices": [_choice(index, "", answer.finish)], **tail}
    if body.usage_wanted:
        yield {**head, "choices": [], "usage": usage_of(questions, [answers[i] for i in sorted(answers)])}


def _text(piece: Piece) -> str:
    return piece.reasoning + piece.content


def _choice(index: int, text: str, finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _logprobs(piece: Piece, offset: int) -> dict[str, Any]:
    """OpenAI's older form; offsets are characters from the beginning of the answer."""
    entries = [entry for channel in ("reasoning", "content") for entry in piece.entries.get(channel, [])]
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{best["token"]: best["logprob"] for best in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }
