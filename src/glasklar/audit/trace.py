"""`glasklar trace`: which training documents hold a span verbatim, where they come from, which steps showed them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasklar.audit.trace_tables import Tables
from glasklar.corpus import prepare
from glasklar.data.tokenizer import Tokenizer
from glasklar.data.trace import SHORTEST, Span
from glasklar.errors import CapacityError, RequestError
from glasklar.loading import Model
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import Recipe
from glasklar.runtime import Runtime
from glasklar.training import state_at

AROUND = 60  # tokens of a document shown on either side of a span
MOST_SHOWN = 200  # overlaps in a reply of the server
LABEL = "verbatim overlap with training documents; it does not show that the answer came from them"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One stretch of the query in one document.

    start, stop   tokens of the query; text: what they say
    before, after what stands around it in the document, up to AROUND tokens
    place         token of the document at which it begins
    leaf, proof   the document's hash and its way to the Merkle root of the data (`hashing.proves`)
    steps         pretraining steps that showed the span: [stage, from 0; step, from 1], in order
    """

    start: int
    stop: int
    text: str
    before: str
    after: str
    document: int
    place: int
    source: str
    licence: str
    date: str
    origin: str
    leaf: str
    proof: list[tuple[str, str]]
    steps: list[tuple[int, int]]

    def __str__(self) -> str:
        seen = f"{len(self.steps)} steps" if self.steps else "no step"
        return (
            f"{self.stop - self.start} tokens: {self.text!r}\n"
            f"    {self.source}, {self.origin}, licence {self.licence}; shown in {seen}; leaf {self.leaf[:16]}…"
        )


@dataclass(frozen=True, kw_only=True)
class StateLikelihood:
    """A kept checkpoint: mean log-probability (nats) of a span's tokens, and how many of the steps that showed the
    span's document it has behind it. The span stands alone after the beginning token, so that all are asked the same.
    """

    checkpoint: str
    logprob: float
    shown: int


class Tracer:
    """The documents of a run and their tables, made once and kept under `cache`.

    Raises DataError where a source of the recipe is gone, RecordError where it is not what it was.
    """

    def __init__(self, run: RunDir, cache: Path) -> None:
        self.run = run
        self.recipe = Recipe.read(run.recipe(), run.identity_file.name)
        corpus = prepare(self.recipe, run.data)
        self.tokenizer, self.packed, self.facts = corpus.tokenizer, corpus.train, corpus.facts
        self.tables = Tables.open(self.recipe, corpus, run.data, cache)

    def find(self, query: Sequence[int], *, shortest: int = SHORTEST, most: int = 8) -> list[Overlap]:
        """Overlaps of at least so many tokens, longest first; `most` documents for one stretch."""
        return [self._overlap(span, query) for span in self.tables.index.find(query, shortest=shortest, most=most)]

    def find_text(self, text: str, **how: Any) -> list[Overlap]:
        """As `find`, for a text. Its first and last word may be tokenised otherwise than within a document."""
        return self.find(self.tokenizer.encode(text), **how)

    def likelihoods(
        self, spans: Sequence[Overlap], query: Sequence[int], runtime: Runtime
    ) -> list[list[StateLikelihood]]:
        """For each span what every kept state makes of it, in the order of the training. Of a span longer than the
        model's context its beginning."""
        asked = [[self.tokenizer.bos_id, *query[span.start : span.stop]] for span in spans]
        found: list[list[StateLikelihood]] = [[] for _ in spans]
        for folder in sorted(path for path in self.run.checkpoints.iterdir() if path.is_dir()) if spans else []:
            model = self._model(folder, runtime)
            stage, step = int(folder.name[:2]), int(folder.name.rpartition("-")[2])
            for span, ids, states in zip(spans, asked, found, strict=True):
                logprob = _mean_logprob(model, ids[: model.config.max_position_embeddings])
                shown = sum(tuple(seen) <= (stage, step) for seen in span.steps)
                states.append(StateLikelihood(checkpoint=folder.name, logprob=logprob, shown=shown))
        return found

    def _model(self, checkpoint: Path, runtime: Runtime) -> Model:
        network = state_at(self.recipe, checkpoint, runtime).requires_grad_(False)
        return Model(
            network=network, config=network.config, tokenizer=self.tokenizer, folder=checkpoint, runtime=runtime
        )

    def _overlap(self, span: Span, query: Sequence[int]) -> Overlap:
        document = self.tables.document(span.document, self.tokenizer)
        begin, end = self.packed.starts[span.document : span.document + 2].tolist()
        first, last = begin + span.place, begin + span.place + span.stop - span.start
        return Overlap(
            start=span.start,
            stop=span.stop,
            text=self.text(query[span.start : span.stop]),
            before=self.text(self.packed.ids[max(begin + 1, first - AROUND) : first].tolist()),
            after=self.text(self.packed.ids[last : min(end - 1, last + AROUND)].tolist()),
            document=span.document,
            place=span.place,
            source=document.source,
            licence=document.licence,
            date=document.date,
            origin=document.origin,
            leaf=self.tables.leaves[span.document].hex(),
            proof=self.tables.proof(span.document),
            steps=self.tables.steps(self.recipe, span),
        )

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, special ones included."""
        return self.tokenizer.decode(ids, skip_special=False)


def parse_query(tokenizer: Tokenizer, text: str | None, ids: str | None) -> list[int]:
    """Token ids of a text or of a list "3,17,9"; exactly one must be given. Raises RequestError."""
    if (text is None) == (ids is None):
        raise RequestError("give either a text or --ids 3,17,9")
    if text is not None:
        return tokenizer.encode(text)
    try:
        return [int(part) for part in str(ids).split(",")]
    except ValueError:
        raise RequestError(f"--ids {ids!r}: whole numbers separated by commas, please") from None


def as_json(overlaps: Sequence[Overlap], root: object) -> dict[str, Any]:
    return {"label": LABEL, "data_root": root, "overlaps": [asdict(overlap) for overlap in overlaps]}


class RunTracing:
    """Traces for a server (`serve.trace.Tracing`): opens the run's tables when somebody asks for the first time.

    Tables that are not there yet are made in a process of their own, so that answers keep flowing.
    """

    def __init__(self, run: RunDir, cache: Path, runtime: Runtime) -> None:
        self._run, self._cache, self._runtime = run, cache, runtime
        self._lock = threading.Lock()
        self._tracer: Tracer | None = None

    def trace(
        self, text: str | None, ids: Sequence[int] | None, *, shortest: int, most: int, states: bool
    ) -> dict[str, Any]:
        """See `serve.trace`. Raises CapacityError while another caller waits for the tables."""
        tracer = self._tracer or self._open()
        query = tracer.tokenizer.encode(text) if text is not None else list(ids or ())
        found = tracer.find(query, shortest=shortest, most=most)
        left, found = len(found[MOST_SHOWN:]), found[:MOST_SHOWN]
        overlaps = [asdict(overlap) for overlap in found]
        if text is not None:
            for shown, overlap in zip(overlaps, found, strict=True):
                shown["begin"] = len(tracer.text(query[: overlap.start]))
                shown["end"] = len(tracer.text(query[: overlap.stop]))
        if states:
            for shown, measured in zip(overlaps, tracer.likelihoods(found, query, self._runtime), strict=True):
                shown["states"] = [asdict(state) for state in measured]
        head = {"object": "trace", "label": LABEL, "data_root": tracer.facts["root"]}
        return {**head, "overlaps": overlaps, "left_out": left}

    def _open(self) -> Tracer:
        if not self._lock.acquire(blocking=False):
            raise CapacityError("the index of the training documents is being made; ask again in a moment")
        try:
            if self._tracer is None:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    pool.submit(_make_tables, self._run.path, self._cache).result()
                self._tracer = Tracer(self._run, self._cache)
            return self._tracer
        finally:
            self._lock.release()


def _make_tables(run: Path, cache: Path) -> None:
    Tracer(RunDir(run), cache)


def _mean_logprob(model: Model, ids: list[int]) -> float:
    logprobs_TW: Tensor = model.logits(ids).log_softmax(-1)
    return logprobs_TW[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
