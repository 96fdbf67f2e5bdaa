"""POST /v1/trace: which training documents hold a span of an answer verbatim, and which steps showed them.

    {"text": "Tom buys 3 apples …"}   or   {"ids": [17, 4, …]}
    "shortest": 15     least tokens in common; spans below 15 may be missed, so fewer are refused
    "most": 8          most documents named for one stretch
    "states": false    true: also the span's log-probability at every kept checkpoint (takes some tenths of a second)

    -> {"object": "trace", "data_root": "…", "label": "verbatim overlap with training documents; it does not show …",
        "overlaps": [{                          longest first
            "start": 3, "stop": 21,             tokens of the query
            "begin": 9, "end": 57,              characters (code points) of the text; only where a text was sent
            "text": "…", "before": "…", "after": "…",      the span, and what stands around it in the document
            "document": 4711, "place": 12,      the document's number, and where in it the span begins, in tokens
            "source": "task:sum", "licence": "CC0-1.0", "date": "", "origin": "0/train/4711",
            "leaf": "…", "proof": [["left", "…"], …],      the document's hash and its way to data_root
            "steps": [[0, 17], …],              pretraining steps that showed the span: stage from 0, step from 1
            "states": [{"checkpoint": "00-pretrain-00001500", "logprob": -0.21, "shown": 2}, …]}],
                                                mean nats a token; shown: how many of the steps lay before
        "left_out": 0}                          shorter overlaps beyond the 200 that a reply holds

`begin` and `end` are exact where tokens end with characters; a token that is a part of a character counts as one.
Overlap is no cause: the label says so, and whoever shows the answer shows the label. 400 where the server's model has
no run with training data beside it, 503 while the model is still being trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field, model_validator

from glasklar.data.trace import SHORTEST
from glasklar.errors import RequestError
from glasklar.serve.schema import Strict

MAX_CHARACTERS, MAX_TOKENS = 1 << 16, 1 << 14


class TraceRequest(Strict):
    """Body of POST /v1/trace: exactly one of `text` and `ids`."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)] | None = None
    ids: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=MAX_TOKENS)] | None = (
        None
    )
    shortest: Annotated[int, Field(ge=SHORTEST, le=MAX_TOKENS)] = SHORTEST
    most: Annotated[int, Field(ge=1, le=64)] = 8
    states: bool = False

    @model_validator(mode="after")
    def _one(self) -> TraceRequest:
        if (self.text is None) == (self.ids is None):
            raise ValueError("give either text or ids")
        return self


class Tracing(Protocol):
    """What answers: the audit's view of a run, which `serve` does not know."""

    def trace(
        self, text: str | None, ids: Sequence[int] | None, *, shortest: int, most: int, states: bool
    ) -> dict[str, Any]:
        """The reply, JSON values only; any thread may call it."""
        ...


def traced(tracing: Tracing | None, body: TraceRequest) -> dict[str, Any]:
    """Raises RequestError where there is nothing to trace in."""
    if tracing is None:
        raise RequestError(
            "this server's model came without the run that made it, so its training documents are not known here; "
            "serve the run: glasklar serve RUN"
        )
    return tracing.trace(body.text, body.ids, shortest=body.shortest, most=body.most, states=body.states)
