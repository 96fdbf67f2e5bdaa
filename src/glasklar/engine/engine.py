"""The engine: prompts of token ids in, tokens out. Knows no text, no HTTP, no training.

    engine = Engine(model)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16))    # whole answers
    engine.add([1, 2, 3], SamplingParams()); engine.step()         # one by one, as a server does

Passes of our own (`paged_runner.py`), in C++ where that is compiled and on a GPU in Triton, give a request's numbers
the same bits whatever runs beside it. Elsewhere PyTorch makes them (`runner.py`).

Whoever changes a model's weights in place (RL) calls `refresh` before the next request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glasklar.engine.batch import Rows
from glasklar.engine.cache import SlotCache
from glasklar.engine.cpu.library import CACHES, CacheKind
from glasklar.engine.draft import DRAFT_ROWS, PLAIN, Drafter
from glasklar.engine.guide import Guarded, Guide
from glasklar.engine.packed import PackedModel
from glasklar.engine.paged import PageRoom
from glasklar.engine.paged_runner import PagedRunner, lacking
from glasklar.engine.request import Completion, FinishReason, Request, SamplingParams, TokenEvent, check_ids, whole
from glasklar.engine.runner import Result, Runner
from glasklar.engine.sampler import Alternatives, Sampled, SpecialRow, sample, uniform
from glasklar.engine.scheduler import Room, Scheduler, SlotRoom
from glasklar.engine.spill import SpillConfig
from glasklar.errors import CapacityError, GlasklarError, RequestError
from glasklar.model.transformer import Transformer

log = logging.getLogger(__name__)

# Longest that running answers wait for prompts in a step, and the shortest piece of a prompt that is worth a pass.
STALL_SECONDS, SHORTEST_PIECE = 0.5, 64


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
    preempted: int = 0  # times that a request gave way to another


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
    prefill_tokens   prompt tokens taken up in one step
    chunk_tokens     a longer prompt is read in pieces of so many tokens, one in a step; while answers run, in pieces
                     that hold them up for half a second at most; None: as many as a pass takes (passes of our own only)
    draft_tokens     most tokens guessed ahead for a request, while few run and it gains; 0: none; None: 4, with passes
                     of PyTorch none (they cannot)
    cache            what the cache holds of a token: "int16", "float32", or "int8", which takes half the memory of
                     int16; None: float32 if the weights are, else int16 (C++ passes only)
    spill            where on disk to keep beginnings of texts that memory has no room for, also for the next start
                     (passes of our own only)
    native           True: passes of our own, False: of PyTorch; None: our own where that is possible, else a warning
                     is logged

    Raises RequestError for a setting that is out of bounds or that these passes do not have, CapacityError where memory
    or threads do not suffice.
    """

    def __init__(
        self,
        model: Transformer | PackedModel,
        *,
        max_slots: int = 512,
        max_tokens: int = 1 << 17,
        prefill_tokens: int = 1 << 13,
        chunk_tokens: int | None = None,
        draft_tokens: int | None = None,
        cache: CacheKind | None = None,
        spill: SpillConfig | None = None,
        native: bool | None = None,
    ) -> None:
        self.model, self.config = model, model.config
        lack = lacking(model)
        if native is None and lack is not None:
            log.warning("%s; PyTorch makes the passes, slower", lack)
        native = lack is None if native is None else native
        if cache not in (None, *CACHES):
            raise RequestError(f"cache = {cache!r}: use one of {', '.join(CACHES)}")
        for name, value, least in (
            ("max_slots", max_slots, 1), ("max_tokens", max_tokens, 1), ("prefill_tokens", prefill_tokens, 1),
            ("chunk_tokens", chunk_tokens, 1), ("draft_tokens", draft_tokens, 0),
        ):  # fmt: skip
            if value is not None and whole(name, value) < least:
                raise RequestError(f"{name} = {value}: must be {least} or more")
        self.room: Room
        self.runner: Runner | PagedRunner
        self.drafter: Drafter | None = None
        if native:
            if lack is not None:
                raise RequestError(f"native = True: {lack}; leave `native` out")
            ahead = 4 if draft_tokens is None else draft_tokens
            self.room = PageRoom(max_slots=max_slots, max_tokens=max_tokens)
            self.runner = PagedRunner(
                model, max_slots=max_slots, max_tokens=max_tokens, chunk_tokens=chunk_tokens, draft=ahead > 0,
                cache=cache, spill=spill,
            )  # fmt: skip
            self.drafter = Drafter(self.runner, ahead)
        else:
            if spill is not None:
                raise RequestError(
                    "spill: only passes of our own keep pages; leave `spill` (serve --cache-disk) out, or `native`"
                )
            own = {"cache": cache, "chunk_tokens": chunk_tokens, "draft_tokens": draft_tokens or None}
            for name, chosen in own.items():
                if chosen is not None:
                    raise RequestError(
                        f"{name} = {chosen!r}: only passes of our own have it; leave `{name}` out, or `native`"
                    )
            if not isinstance(model, Transformer):
                raise RequestError("packed weights need the C++ pass; leave `native` out")
            weight = model.embed_tokens.weight
            self.room = SlotRoom(max_slots=max_slots, max_tokens=max_tokens)
            self.runner = Runner(
                model, SlotCache(model.config, max_tokens=max_tokens, dtype=weight.dtype, device=weight.device)
            )
        self.chunk_tokens = self.runner.chunk_tokens if isinstance(self.runner, PagedRunner) else None
        chunk = self.chunk_tokens
        self.scheduler = Scheduler(self.room, prefill_tokens=prefill_tokens, chunk=chunk)
        self._pace = 0.0  # prompt tokens a second, as lately measured
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
        priority = whole("priority", priority)
        limit = min(params.max_tokens, self.config.max_position_embeddings - len(prompt))
        request = Request(
            id=self._next_id, prompt=prompt, params=params, limit=limit, priority=priority,
            guide=None if guide is None else Guarded(guide, self.config.vocab_size),
        )  # fmt: skip
        if not self.room.fits(1, request.reserve, request.reserve):
            raise CapacityError(
                f"prompt of {len(prompt)} and answer of up to {limit} tokens: the cache holds {self.room.max_tokens}; "
                f"lower the request's max_tokens or raise the engine's"
            )
        self._next_id += 1
        self.scheduler.add(request)
        return request.id

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        context = self.config.max_position_embeddings
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        check_ids((*prompt, *params.logit_bias), self.config)
        if len(prompt) >= context:
            raise RequestError(
                f"prompt of {len(prompt)} tokens: the model's context is {context} tokens, prompt and answer together"
            )

    def cancel(self, request_id: int) -> None:
        """Drops a request at once; no further events come from it. Unknown and finished ids are left alone."""
        filling = self.scheduler.filling
        row = self.scheduler.cancel(request_id)
        if row is not None:
            self._release([row])
        elif filling is not None and filling.id == request_id:
            self.runner.abandon(filling.text)
        self._drop(request_id)

    def close(self) -> None:
        """Ends what runs, and keeps what the cache holds for the next start, where `spill` says so."""
        for request in [*self.scheduler.present, *self.scheduler.waiting]:
            self.cancel(request.id)
        self.runner.close()

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
        self._follow()
        budget = self._piece()
        if self.scheduler.waiting:
            self._give_way(self.scheduler.outranked(self._lengths()))
        first, read = self.rows.n, self.stats.prompt_tokens
        if admitted := self.scheduler.admit(self._lengths(), budget):
            texts = [request.text for request in admitted]
            self.rows.append(admitted)
            made += self._pass(first, first, lambda: self._prefill(admitted, texts, first))
        if (filled := self._fill()) is not None:
            made.append(filled)
        middle = time.perf_counter()
        if (read := self.stats.prompt_tokens - read) >= SHORTEST_PIECE:
            self._pace = read / (middle - start)
        if self.rows.n:
            made += self._decode_all()
        self.stats.prefill_seconds += middle - start
        self.stats.decode_seconds += time.perf_counter() - middle
        return made

    def _lengths(self) -> list[int]:
        return self.rows.length[: self.rows.n].tolist()

    def _piece(self) -> int | None:
        """How much of prompts is read in this step: while answers run, no more than they can wait for."""
        piece = self.chunk_tokens
        if piece is None:
            return None
        if self.rows.n and self._pace:
            piece = min(piece, max(SHORTEST_PIECE, int(self._pace * STALL_SECONDS)))
        self.scheduler.chunk = piece
        if isinstance(self.runner, PagedRunner):
            self.runner.chunk_tokens = min(piece, self.runner.most)
        return piece if self.rows.n else None

    def _follow(self) -> None:
        """Whether this step's passes must leave the draft module what it needs to guess."""
        if self.drafter is not None:
            coming = self.rows.n + len(self.scheduler.waiting)
            self.drafter.runner.following = self.drafter.way(coming).source == "module"

    def _give_way(self, requests: Sequence[Request]) -> None:
        """Takes requests off the cache; they wait and go on later from where they are."""
        for request in requests:
            if request is self.scheduler.filling:
                self.runner.abandon(request.text)
            else:
                row = self.scheduler.running.index(request)
                request.answer = self.rows.answer(row)
                request.logprobs = self.rows.logprobs[row, : self.rows.made[row]].tolist()
                self._release([row], whole=[row], ended=False)
            self.scheduler.requeue(request)
            self.stats.preempted += 1

    def _with_room(self, reserve: Callable[[], None]) -> None:
        """Reserves pages; where they are used up the weakest request gives way, until they suffice."""
        while True:
            try:
                return reserve()
            except CapacityError:
                weakest = self.scheduler.weakest()
                if weakest is None:
                    raise
                self._give_way([weakest])

    def _prefill(self, admitted: Sequence[Request], texts: Sequence[Sequence[int]], first: int) -> list[_Made]:
        rows, n = self.rows, self.rows.n
        numbers = uniform(rows.seed[first:n], rows.length[first:n])
        result = self.runner.prefill(texts, first, rows.temperature[first:n], numbers)
        cached = result.cached or [0] * len(texts)
        for request, text, known in zip(admitted, texts, cached, strict=True):
            self._took_up(request, text, known)
        return [self._sample(result, first)]

    def _took_up(self, request: Request, text: Sequence[int], known: int) -> None:
        """A text has been read, of which the cache had `known` tokens."""
        if not request.answer:  # else it had been running before
            request.cached = known
            self.stats.prompt_tokens += len(text)

    def _fill(self) -> _Made | None:
        """Reads a piece of the long prompt; after the last one its request becomes a row."""
        result: Result | None = None

        def read() -> None:
            nonlocal result
            if (request := self.scheduler.filling) is not None:
                text, params = request.text, request.params
                number = uniform(np.array([params.seed % (1 << 64)], np.uint64), np.array([len(text)]))
                result = self.runner.fill(text, self.rows.n, np.array([params.temperature]), number)

        request = self.scheduler.filling
        if request is None:
            return None
        try:
            self._with_room(read)
        except torch.OutOfMemoryError as error:  # of a GPU; the others go on
            self.cancel(request.id)
            reason = CapacityError(f"out of memory: {error}")
            return _Made(np.zeros(1, np.int64), [request], None, {0: "error"}, {0: reason}, {})
        except BaseException:
            self.cancel(request.id)
            raise
        if result is None:
            return None
        row = self.rows.n
        self._took_up(request, request.text, result.cached[0] if result.cached else 0)
        self.rows.append([self.scheduler.start()])
        last = result
        return self._pass(row, row, lambda: [self._sample(last, row)])[0]

    def _decode_all(self) -> list[_Made]:
        """A token for every row, or several where guesses hold."""
        begin, before = time.perf_counter(), self.stats.tokens
        self._with_room(lambda: self.runner.reserve(self._lengths()))
        if not (n := self.rows.n):  # the last one gave way to a prompt that is being read
            return []
        way = PLAIN if self.drafter is None else self.drafter.way(n)
        guesses = self._guesses() if way != PLAIN else []
        made = self._pass(0, n, (lambda: self._verify(guesses)) if any(guesses) else self._decode)
        if self.drafter is not None and n <= DRAFT_ROWS:
            self.drafter.gain.note(way, (self.stats.tokens - before) / n, time.perf_counter() - begin)
        return made

    def _guesses(self) -> list[list[int]]:
        """Tokens that may come next, for each row; none where the cache has no room for them."""
        assert self.drafter is not None
        way = self.drafter.way(self.rows.n)
        most = np.minimum(way.depth, self.rows.limit[: self.rows.n] - self.rows.made[: self.rows.n] - 1)
        try:
            self.runner.reserve((self.rows.length[: self.rows.n] + most).tolist())
        except CapacityError:
            return []
        return self.drafter.guesses(way, self.rows, self.scheduler.running)

    def _verify(self, guesses: Sequence[Sequence[int]]) -> list[_Made]:
        """Runs the last token of each row and its guesses. A guess stands where it is what is then chosen."""
        assert isinstance(self.runner, PagedRunner)
        assert self.drafter is not None
        rows, n = self.rows, self.rows.n
        counts = np.array([1 + len(guess) for guess in guesses])
        first = np.cumsum(counts) - counts
        depth = np.arange(counts.sum()) - np.repeat(first, counts)
        numbers = uniform(np.repeat(rows.seed[:n], counts), np.repeat(rows.length[:n], counts) + depth)
        result = self.runner.decode(rows, np.repeat(rows.temperature[:n], counts), numbers, guesses)
        for request, guess in zip(self.scheduler.running, guesses, strict=True):
            request.drafted += len(guess)
        going, made, accepted = np.arange(n), list[_Made](), 0
        for place in range(int(counts.max())):
            made.append(self._record(going, self._choose(result.at(first[going] + place), going)))
            ended = {int(going[i]) for i in made[-1].finish}
            stands = [
                row
                for row in going.tolist()
                if row not in ended and place + 1 < counts[row] and rows.last[row] == guesses[row][place]
            ]
            going = np.array(stands, np.int64)
            if not stands:
                break
            for row in stands:
                self.scheduler.running[row].accepted += 1
            accepted += len(stands)
        drafted = int((counts - 1).sum())
        self.stats.drafted += drafted
        self.stats.accepted += accepted
        self.drafter.note(self.drafter.way(n), drafted, accepted)
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

    def _choose(self, result: Result, places: NDArray[np.int64]) -> Sampled:
        """A token for each of the rows."""
        rows = self.rows
        requests = [self.scheduler.running[row] for row in places.tolist()]
        special = np.flatnonzero(rows.special[places])
        temperature, numbers = rows.temperature[places], uniform(rows.seed[places], rows.length[places])

        def special_row(place: int, i: int) -> SpecialRow:
            request = requests[i]
            allowed = request.guide.allowed() if request.guide is not None else None
            return SpecialRow(place, request.params, request.prompt, rows.answer(int(places[i])), allowed)

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
        places = np.arange(first, self.rows.n)
        made = self._record(places, self._choose(result, places))
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

    def _release(self, gone: Iterable[int], whole: Collection[int] = (), ended: bool = True) -> None:
        """Lets go of rows; what the cache holds of the `whole` ones (all but the last token) is fit for later use.
        Unless they have `ended`, what else is known of their requests is kept."""
        rows = list(gone)
        for row in rows:
            request = self.scheduler.running[row]
            if ended:
                self._drop(request.id)
            self.runner.release(row, [*request.prompt, *self.rows.answer(row)[:-1]] if row in whole else [])
        moves = self.scheduler.release(rows)
        self.runner.move(moves)
        self.rows.move(moves, len(self.scheduler.running))

    def _drop(self, request_id: int) -> None:
        self._alternatives.pop(request_id, None)
        if self.drafter is not None:
            self.drafter.drop(request_id)


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
    if request.guide is not None and request.guide.error is not None:
        return GlasklarError(f"request {request.id}: the answer cannot go on, its guide failed ({request.guide.error})")
    if request.guide is not None and (allowed := request.guide.allowed()) is not None and not allowed.any():
        return RequestError(f"request {request.id}: the answer cannot go on, its guide allows no token here")
    return GlasklarError(
        f"request {request.id} (prompt of {len(request.prompt)} tokens): the model's logits hold NaN or infinity; "
        "its weights are damaged or its training has diverged"
    )
