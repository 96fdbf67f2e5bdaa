"""The engine: prompts of token ids in, tokens out. Knows no text, no HTTP, no training.

    engine = Engine(model)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16))    # whole answers
    engine.add([1, 2, 3], SamplingParams()); engine.step()         # one by one, as a server does

On a CPU the passes are made in C++ (`native_runner.py`), where that is compiled: then a request's numbers are the same
bits whatever runs beside it. Elsewhere PyTorch makes them (`runner.py`).

Whoever changes a model's weights in place (RL) calls `refresh` before the next request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glasklar.engine.batch import Rows
from glasklar.engine.cache import SlotCache
from glasklar.engine.guide import Guide
from glasklar.engine.native_runner import PASS_TOKENS, NativeRunner, runs_native
from glasklar.engine.packed import PackedModel
from glasklar.engine.paged import PageRoom
from glasklar.engine.request import Completion, FinishReason, Request, SamplingParams, TokenEvent
from glasklar.engine.runner import Result, Runner
from glasklar.engine.sampler import Alternatives, Sampled, SpecialRow, sample, uniform
from glasklar.engine.scheduler import Room, Scheduler, SlotRoom
from glasklar.errors import CapacityError, GlasklarError, RequestError
from glasklar.model.transformer import Transformer


@dataclass(kw_only=True)
class Stats:
    """What the engine has done since it was made. Seconds are wall-clock."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class _Made:
    """What one pass brought, in row order: `sampled` holds a token for each of `requests` (None: the pass failed).

    `finish`, `errors` and `completions` are those of requests that ended, by place; an error has no completion.
    """

    requests: list[Request]
    sampled: Sampled | None
    finish: dict[int, FinishReason]
    errors: dict[int, GlasklarError]
    completions: dict[int, Completion]


class Engine:
    """Continuous batching over one model.

    max_slots        most requests that run at once
    max_tokens       most cache tokens of all slots together; memory is taken as it is needed
    prefill_tokens   prompt tokens taken up in one step, so that running answers keep flowing
    chunk_tokens     a longer prompt is read in pieces of so many tokens, one in a step (C++ passes only)
    native           True: passes in C++, False: in PyTorch; None: in C++ where that is possible
    """

    def __init__(
        self,
        model: Transformer | PackedModel,
        *,
        max_slots: int = 512,
        max_tokens: int = 1 << 17,
        prefill_tokens: int = 1 << 13,
        chunk_tokens: int = PASS_TOKENS,
        native: bool | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        if native is None:
            native = runs_native(model)
        self.room: Room
        self.runner: Runner | NativeRunner
        if native:
            self.room = PageRoom(max_slots=max_slots, max_tokens=max_tokens)
            self.runner = NativeRunner(model, max_slots=max_slots, max_tokens=max_tokens, chunk_tokens=chunk_tokens)
        else:
            if not isinstance(model, Transformer):
                raise RequestError("packed weights need the C++ pass; leave `native` out")
            weight = model.embed_tokens.weight
            self.room = SlotRoom(max_slots=max_slots, max_tokens=max_tokens)
            self.runner = Runner(
                model, SlotCache(model.config, max_tokens=max_tokens, dtype=weight.dtype, device=weight.device)
            )
        chunk = chunk_tokens if native else None
        self.scheduler = Scheduler(self.room, prefill_tokens=prefill_tokens, chunk=chunk)
        self.rows = Rows()
        self.stats = Stats()
        self._next_id = 0
        self._alternatives: dict[int, list[Alternatives]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.present)

    def refresh(self) -> None:
        """Forgets what was computed with earlier weights. Refused while requests run, which would mix both."""
        if self.has_work:
            raise RequestError("refresh: requests are running; finish or cancel them before the weights change")
        self.runner.refresh()

    def add(
        self, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0, guide: Guide | None = None
    ) -> int:
        """Queues a prompt; returns the request's id. Answers end where the model's context does.

        priority   higher runs first; among equals the earlier one
        guide      says token by token what may come next

        Raises RequestError for an empty prompt, ids outside the vocabulary or a prompt that fills the context, and
        CapacityError where the cache could never hold prompt and answer.
        """
        prompt = list(prompt_ids)
        self._check(prompt, params)
        limit = min(params.max_tokens, self.config.max_position_embeddings - len(prompt))
        request = Request(id=self._next_id, prompt=prompt, params=params, limit=limit, priority=priority, guide=guide)
        if not self.room.fits(1, request.reserve, request.reserve):
            raise CapacityError(
                f"prompt of {len(prompt)} and answer of up to {limit} tokens: the cache holds {self.room.max_tokens}; "
                f"lower the request's max_tokens or raise the engine's"
            )
        self._next_id += 1
        self.scheduler.add(request)
        return request.id

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        foreign = next((i for i in (*prompt, *params.logit_bias) if not 0 <= i < vocabulary), None)
        if foreign is not None:
            raise RequestError(f"token id {foreign}: the vocabulary has ids 0 to {vocabulary - 1}")
        if len(prompt) >= context:
            raise RequestError(
                f"prompt of {len(prompt)} tokens: the model's context is {context} tokens, prompt and answer together"
            )

    def cancel(self, request_id: int) -> None:
        """Drops a request at once; no further events come from it. Unknown and finished ids are left alone."""
        row = self.scheduler.cancel(request_id)
        if row is not None:
            self._release([row])
        if self.scheduler.filling is None:
            self.runner.abandon()

    def step(self) -> list[TokenEvent]:
        """Takes up waiting requests, then makes one token for every running one."""
        return [event for made in self._advance() for event in _events(made)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts; `progress(finished, all)` is called after each step.

        Raises GlasklarError if one of them fails; the others are then dropped.
        """
        if self.has_work:
            raise RequestError("generate: other requests are running; use add and step beside them")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but {len(each)} sampling settings")
        completions: dict[int, Completion] = {}
        ids: list[int] = []
        try:
            for prompt, settings in zip(prompts, each, strict=True):
                ids.append(self.add(prompt, settings))
            while self.has_work:
                for made in self._advance():
                    for error in made.errors.values():
                        raise error
                    completions.update((made.requests[i].id, done) for i, done in made.completions.items())
                if progress is not None:
                    progress(len(completions), len(ids))
        finally:
            for request_id in ids:
                self.cancel(request_id)
        return [completions[request_id] for request_id in ids]

    def _advance(self) -> list[_Made]:
        """One step: the prompts that are admitted, a piece of a long one, then one token for all rows."""
        self.stats.steps += 1
        made = []
        start = time.perf_counter()
        first = self.rows.n
        if admitted := self.scheduler.admit():
            prompts = [request.prompt for request in admitted]
            self.rows.append(admitted)
            made.append(self._pass(first, first, lambda: self._prefill(admitted, prompts, first)))
            self.stats.prompt_tokens += sum(len(prompt) for prompt in prompts)
        if (filled := self._fill()) is not None:
            made.append(filled)
        middle = time.perf_counter()
        if self.rows.n:
            made.append(self._pass(0, self.rows.n, self._decode))
        self.stats.prefill_seconds += middle - start
        self.stats.decode_seconds += time.perf_counter() - middle
        return made

    def _prefill(self, admitted: Sequence[Request], prompts: Sequence[Sequence[int]], first: int) -> Result:
        result = self.runner.prefill(prompts, first)
        for request, known in zip(admitted, result.cached, strict=bool(result.cached)):
            request.cached = known
        return result

    def _fill(self) -> _Made | None:
        """Reads a piece of the long prompt; after the last one its request becomes a row."""
        request, row = self.scheduler.filling, self.rows.n
        if request is None:
            return None
        try:
            result = self.runner.fill(request.prompt, row)
        except BaseException:
            self.cancel(request.id)
            raise
        if result is None:
            return None
        request.cached = result.cached[0] if result.cached else 0
        self.rows.append([self.scheduler.start()])
        self.stats.prompt_tokens += len(request.prompt)
        return self._sample(result, row)

    def _decode(self) -> Result:
        rows, n = self.rows, self.rows.n
        return self.runner.decode(rows, rows.temperature[:n], uniform(rows.seed[:n], rows.length[:n]))

    def _pass(self, first: int, cached: int, run: Callable[[], Result]) -> _Made:
        """A pass for the rows from `first` on, while the first `cached` rows have something in the cache.

        Where memory does not suffice, the pass's requests end with the error. Whatever else happens, they do not stay
        behind half done.
        """
        try:
            self.runner.fit(self.rows.n, self.rows.longest, keep=cached)
            return self._sample(run(), first)
        except (CapacityError, torch.OutOfMemoryError) as error:
            requests = self.scheduler.running[first:]
            reason = error if isinstance(error, CapacityError) else CapacityError(f"out of memory: {error}")
            self._release(range(first, self.rows.n))
            places = range(len(requests))
            return _Made(requests, None, dict.fromkeys(places, "error"), dict.fromkeys(places, reason), {})
        except BaseException:
            self._release(range(first, self.rows.n))
            raise

    def _choose(self, result: Result, first: int) -> Sampled:
        """A token for each row from `first` on."""
        rows, n = self.rows, self.rows.n
        requests = self.scheduler.running[first:n]
        special = np.flatnonzero(rows.special[first:n])
        temperature, numbers = rows.temperature[first:n], uniform(rows.seed[first:n], rows.length[first:n])

        def special_row(place: int, i: int) -> SpecialRow:
            request = requests[i]
            allowed = request.guide.allowed() if request.guide is not None else None
            return SpecialRow(place, request.params, request.prompt, rows.answer(first + i), allowed)

        if result.tokens is None or result.logprobs is None:
            wanted = [special_row(i, i) for i in special.tolist()]
            return sample(result.logits_BW, temperature, numbers, wanted)
        finite = np.isfinite(result.logprobs)
        if not len(special):
            return Sampled(result.tokens, result.logprobs, finite, {})
        wanted = [special_row(place, i) for place, i in enumerate(special.tolist())]
        chosen = sample(result.logits_BW[special], temperature[special], numbers[special], wanted)
        tokens, logprobs = result.tokens.copy(), result.logprobs.copy()
        tokens[special], logprobs[special], finite[special] = chosen.tokens, chosen.logprobs, chosen.finite
        alternatives = {int(special[place]): found for place, found in chosen.alternatives.items()}
        return Sampled(tokens, logprobs, finite, alternatives)

    def _sample(self, result: Result, first: int) -> _Made:
        """Chooses and records a token for each row from `first` on, and lets go of those that ended."""
        rows, n = self.rows, self.rows.n
        requests = self.scheduler.running[first:n]
        sampled = self._choose(result, first)
        stopped = rows.record(first, sampled.tokens, sampled.logprobs)
        self._guide(requests, sampled, first)
        self.stats.tokens += int(sampled.finite.sum())
        for i, alternatives in sampled.alternatives.items():
            self._alternatives.setdefault(requests[i].id, []).append(alternatives)
        ended = stopped | (rows.made[first:n] >= rows.limit[first:n]) | ~sampled.finite
        made = _Made(requests, sampled, {}, {}, {})
        for i in np.flatnonzero(ended).tolist():
            if not sampled.finite[i]:
                made.finish[i], made.errors[i] = "error", _failure(requests[i])
                continue
            made.finish[i] = "stop" if stopped[i] else "length"
            made.completions[i] = self._completion(first + i, made.finish[i])
        self._release([first + i for i in made.finish], whole=[first + i for i in made.completions])
        if made.errors:
            self.runner.clear_from(self.rows.n)
        return made

    def _guide(self, requests: Sequence[Request], sampled: Sampled, first: int) -> None:
        """Tells guides what was chosen; a row whose guide allowed nothing has failed."""
        for i in np.flatnonzero(self.rows.special[first : self.rows.n]).tolist():
            guide = requests[i].guide
            if guide is None or not sampled.finite[i]:
                continue
            allowed = guide.allowed()
            if allowed is None or allowed[sampled.tokens[i]]:
                guide.accept(int(sampled.tokens[i]))
            else:
                sampled.finite[i] = False

    def _completion(self, row: int, finish: FinishReason) -> Completion:
        return Completion(
            ids=self.rows.answer(row),
            logprobs=self.rows.logprobs[row, : self.rows.made[row]].tolist(),
            finish=finish,
            alternatives=self._alternatives.get(self.scheduler.running[row].id, []),
        )

    def _release(self, gone: Iterable[int], whole: Collection[int] = ()) -> None:
        """Lets go of rows; what the cache holds of the `whole` ones (all but the last token) is fit for later use."""
        rows = list(gone)
        for row in rows:
            request = self.scheduler.running[row]
            self._alternatives.pop(request.id, None)
            self.runner.release(row, [*request.prompt, *self.rows.answer(row)[:-1]] if row in whole else [])
        moves = self.scheduler.release(rows)
        self.runner.move(moves)
        self.rows.move(moves, len(self.scheduler.running))


def _events(made: _Made) -> list[TokenEvent]:
    events = []
    for i, request in enumerate(made.requests):
        if made.sampled is None or i in made.errors:
            failed = TokenEvent(request=request.id, token=-1, logprob=0.0, finish="error", error=made.errors[i])
            events.append(failed)
            continue
        events.append(
            TokenEvent(
                request=request.id,
                token=int(made.sampled.tokens[i]),
                logprob=float(made.sampled.logprobs[i]),
                alternatives=made.sampled.alternatives.get(i, ()),
                finish=made.finish.get(i),
                cached=request.cached,
            )
        )
    return events


def _failure(request: Request) -> GlasklarError:
    """Why a row brought no token."""
    if request.guide is not None and (allowed := request.guide.allowed()) is not None and not allowed.any():
        return RequestError(f"request {request.id}: the answer cannot go on, its guide allows no token here")
    return GlasklarError(
        f"request {request.id} (prompt of {len(request.prompt)} tokens): the model's logits hold NaN or infinity; "
        "its weights are damaged or its training has diverged"
    )
