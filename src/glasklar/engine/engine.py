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
from numpy.typing import NDArray

from glasklar.engine.batch import Rows
from glasklar.engine.cache import SlotCache
from glasklar.engine.draft import Gain, Lookup
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

# Most rows for which drafts are made: with more, a pass is full without them.
DRAFT_ROWS = 8


@dataclass(kw_only=True)
class Stats:
    """What the engine has done since it was made. Seconds are wall-clock. `drafted` tokens were guessed, of which the
    model confirmed those `accepted`."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class _Made:
    """What one pass brought: `sampled` holds a token for each of `requests`, in rows `places` (None: the pass failed).

    `finish`, `errors` and `completions` are those of requests that ended, by place; an error has no completion.
    """

    places: NDArray[np.int64]
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
    draft_tokens     most tokens guessed ahead for a request, while few run and it gains; 0: none (C++ passes only)
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
        draft_tokens: int = 4,
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
        self.draft_tokens = draft_tokens if native else 0
        self.gain = Gain()
        self._lookups: dict[int, Lookup] = {}
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
        made: list[_Made] = []
        start = time.perf_counter()
        first = self.rows.n
        if admitted := self.scheduler.admit():
            prompts = [request.prompt for request in admitted]
            self.rows.append(admitted)
            made += self._pass(first, first, lambda: self._prefill(admitted, prompts, first))
            self.stats.prompt_tokens += sum(len(prompt) for prompt in prompts)
        if (filled := self._fill()) is not None:
            made.append(filled)
        middle = time.perf_counter()
        if self.rows.n:
            made += self._decode_all()
        self.stats.prefill_seconds += middle - start
        self.stats.decode_seconds += time.perf_counter() - middle
        return made

    def _prefill(self, admitted: Sequence[Request], prompts: Sequence[Sequence[int]], first: int) -> list[_Made]:
        result = self.runner.prefill(prompts, first)
        for request, known in zip(admitted, result.cached, strict=bool(result.cached)):
            request.cached = known
        return [self._sample(result, first)]

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

    def _decode_all(self) -> list[_Made]:
        """A token for every row, or several where guesses hold."""
        n = self.rows.n
        if not self.draft_tokens or n > DRAFT_ROWS:
            return self._pass(0, n, self._decode)
        begin, before = time.perf_counter(), self.stats.tokens
        guesses = self._guesses() if self.gain.drafting else []
        made = self._pass(0, n, (lambda: self._verify(guesses)) if any(guesses) else self._decode)
        self.gain.note((self.stats.tokens - before) / n, time.perf_counter() - begin)
        return made

    def _guesses(self) -> list[list[int]]:
        """Tokens that may come next, for each row; none for those that ask for more than a temperature."""
        guesses: list[list[int]] = []
        for row, request in enumerate(self.scheduler.running):
            most = min(self.draft_tokens, request.limit - int(self.rows.made[row]) - 1)
            if request.special or most < 1:
                guesses.append([])
                continue
            lookup = self._lookups.setdefault(request.id, Lookup())
            known, prompt = len(lookup.tokens), request.prompt
            if known == 0:
                lookup.extend(prompt)
                known = len(prompt)
            lookup.extend(self.rows.answer(row)[known - len(prompt) :])
            guesses.append(lookup.guess(most))
        return guesses

    def _verify(self, guesses: Sequence[Sequence[int]]) -> list[_Made]:
        """Runs the last token of each row and its guesses. A guess stands where it is what the model then chooses."""
        assert isinstance(self.runner, NativeRunner)
        rows, n = self.rows, self.rows.n
        counts = np.array([1 + len(guess) for guess in guesses])
        first = np.cumsum(counts) - counts
        depth = np.arange(counts.sum()) - np.repeat(first, counts)
        numbers = uniform(np.repeat(rows.seed[:n], counts), np.repeat(rows.length[:n], counts) + depth)
        result = self.runner.decode(rows, np.repeat(rows.temperature[:n], counts), numbers, guesses)
        assert result.tokens is not None
        assert result.logprobs is not None
        going = np.arange(n)
        made = [self._record(going, self._choose(result.at(first), 0))]
        self.stats.drafted += int((counts - 1).sum())
        for request, guess in zip(self.scheduler.running, guesses, strict=True):
            request.drafted += len(guess)
        for place in range(1, int(counts.max())):
            ended = {int(going[i]) for i in made[-1].finish}
            at = first[going] + place - 1
            going = np.array(
                [
                    row
                    for row, i in zip(going.tolist(), at.tolist(), strict=True)
                    if row not in ended and place < counts[row] and result.tokens[i] == guesses[row][place - 1]
                ],
                np.int64,
            )
            if not len(going):
                break
            for row in going.tolist():
                self.scheduler.running[row].accepted += 1
            at = first[going] + place
            logprobs = result.logprobs[at]
            made.append(self._record(going, Sampled(result.tokens[at], logprobs, np.isfinite(logprobs), {})))
            self.stats.accepted += len(going)
        self._let_go(made)
        return made

    def _decode(self) -> list[_Made]:
        rows, n = self.rows, self.rows.n
        numbers = uniform(rows.seed[:n], rows.length[:n])
        return [self._sample(self.runner.decode(rows, rows.temperature[:n], numbers), 0)]

    def _pass(self, first: int, cached: int, run: Callable[[], list[_Made]]) -> list[_Made]:
        """A pass for the rows from `first` on, while the first `cached` rows have something in the cache.

        Where memory does not suffice, the pass's requests end with the error. Whatever else happens, they do not stay
        behind half done.
        """
        try:
            self.runner.fit(self.rows.n, self.rows.longest, keep=cached)
            return run()
        except (CapacityError, torch.OutOfMemoryError) as error:
            requests = self.scheduler.running[first:]
            reason = error if isinstance(error, CapacityError) else CapacityError(f"out of memory: {error}")
            self._release(range(first, self.rows.n))
            every = range(len(requests))
            places = np.arange(first, first + len(requests))
            return [_Made(places, requests, None, dict.fromkeys(every, "error"), dict.fromkeys(every, reason), {})]
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
        made = self._record(np.arange(first, self.rows.n), self._choose(result, first))
        self._let_go([made])
        return made

    def _record(self, places: NDArray[np.int64], sampled: Sampled) -> _Made:
        """Records a token for each of the rows; those that ended are still there."""
        rows = self.rows
        requests = [self.scheduler.running[row] for row in places.tolist()]
        stopped = rows.record(places, sampled.tokens, sampled.logprobs)
        self._guide(places, requests, sampled)
        self.stats.tokens += int(sampled.finite.sum())
        for i, alternatives in sampled.alternatives.items():
            self._alternatives.setdefault(requests[i].id, []).append(alternatives)
        ended = stopped | (rows.made[places] >= rows.limit[places]) | ~sampled.finite
        made = _Made(places, requests, sampled, {}, {}, {})
        for i in np.flatnonzero(ended).tolist():
            if not sampled.finite[i]:
                made.finish[i], made.errors[i] = "error", _failure(requests[i])
                continue
            made.finish[i] = "stop" if stopped[i] else "length"
            made.completions[i] = self._completion(int(places[i]), made.finish[i])
        return made

    def _let_go(self, made: Sequence[_Made]) -> None:
        """Closes the rows that ended."""
        gone = [int(part.places[i]) for part in made for i in part.finish]
        self._release(gone, whole=[int(part.places[i]) for part in made for i in part.completions])
        if any(part.errors for part in made):
            self.runner.clear_from(self.rows.n)

    def _guide(self, places: NDArray[np.int64], requests: Sequence[Request], sampled: Sampled) -> None:
        """Tells guides what was chosen; a row whose guide allowed nothing has failed."""
        for i in np.flatnonzero(self.rows.special[places]).tolist():
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
            self._lookups.pop(request.id, None)
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
                drafted=request.drafted,
                accepted=request.accepted,
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
