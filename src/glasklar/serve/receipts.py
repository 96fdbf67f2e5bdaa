"""GET /v1/receipts/{id}?choice=0: a signed receipt of an answer that this server gave, by the id of its reply.

    {"object": "receipt", "id": "chatcmpl-…", "choice": 0, "choices": 1, "receipt": {the signed envelope}}

Saved as a file it is what `glasklar verify answer.json` takes: it gives the answer again, token for token. Every answer
has one, streamed or whole, guided or free; the newest replies are remembered (MOST_REPLIES, MOST_TOKENS) until the
server ends. Whoever knows the id gets the receipt, which holds prompt and answer. 404 for an id that is not (or no
longer) known, 400 while the answer is still being made.

What is signed are the very tokens and log-probabilities that were served. On the C++ passes they do not depend on what
else ran, on how the prompt was cut, on the prefix cache or on drafts: the receipt says `exact`, and a verifier must
come to the same bits. Elsewhere a near tie may round otherwise in company, so only the tokens are compared.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import RequestError
from glasklar.provenance.receipt import engine_identity, make_receipt, model_root, model_stamps
from glasklar.provenance.signing import Signer
from glasklar.serve.grammar import GuideSpec

MOST_REPLIES, MOST_TOKENS = 1024, 1 << 22


@dataclass(kw_only=True)
class Given:
    """One answer. `finish`: None while it is made, "cancelled" where its reader took no more, "error": it failed."""

    prompt: Sequence[int]
    params: SamplingParams
    guide: GuideSpec | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def take(self, event: TokenEvent) -> None:
        self.ids.append(event.token)
        self.logprobs.append(event.logprob)
        self.finish = event.finish

    def end(self, failed: bool) -> None:
        """Nothing more comes."""
        self.finish = "error" if failed else self.finish or "cancelled"


# The answers of the reply that is being made in this context; None: nobody will ask for receipts.
_reply: ContextVar[list[Given] | None] = ContextVar("reply", default=None)


def given(prompt: Sequence[int], params: SamplingParams, guide: GuideSpec | None) -> Given:
    """The record of an answer that begins now, kept if it belongs to a named reply. Choices begin in their order."""
    record, reply = Given(prompt=prompt, params=params, guide=guide), _reply.get()
    if reply is not None:
        reply.append(record)
    return record


class Receipts:
    """The newest replies of a server, and the key that signs for them: the user's own, in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._replies: OrderedDict[str, list[Given]] = OrderedDict()
        self._lock = threading.Lock()
        self._identity: dict[Path, tuple[str, dict[str, Any]]] = {}

    def name(self, reply: str) -> None:
        """From here on, answers made in this context belong to the reply with this id."""
        answers: list[Given] = []
        _reply.set(answers)
        with self._lock:
            self._replies[reply] = answers
            while len(self._replies) > MOST_REPLIES or (len(self._replies) > 1 and self._tokens() > MOST_TOKENS):
                self._replies.popitem(last=False)

    def receipt(
        self, reply: str, choice: int, *, folder: Path, stamps: dict[str, Any], engine: dict[str, Any]
    ) -> dict[str, Any]:
        """See above. `folder` of the model, its `model_stamps` before it was loaded, and the `engine` that runs it
        (`ModelService.engine`). Reads all weights when it is asked first. Raises HTTPException 404, RequestError."""
        with self._lock:
            answers = list(self._replies.get(reply, ()))
        if not 0 <= choice < len(answers):
            what = f"choice {choice} of {reply!r}" if answers else f"reply {reply!r}"
            raise HTTPException(404, f"{what} is not known here; receipts are kept for the newest replies of a server")
        answer = answers[choice]
        if answer.finish is None:
            raise RequestError(f"choice {choice} of {reply!r} is still being made; ask again when it is done")
        if answer.finish == "error" or not answer.ids:
            raise RequestError(f"choice {choice} of {reply!r} failed or was stopped before its first token")
        root, identity = self._signs_for(folder, engine)
        if model_stamps(folder) != stamps:
            raise RequestError(
                f"{folder}: its files were changed after they were loaded, so nobody can say which model answered; "
                "restart the server"
            )
        envelope = make_receipt(
            Signer.open(self.home),
            model=root,
            engine=identity,
            prompt=answer.prompt,
            sampling=asdict(answer.params),
            guide=None if answer.guide is None else asdict(answer.guide),
            ids=answer.ids,
            logprobs=answer.logprobs,
            finish=answer.finish,
            exact=engine["passes"] == "C++",
        )
        return {"object": "receipt", "id": reply, "choice": choice, "choices": len(answers), "receipt": envelope}

    def _signs_for(self, folder: Path, engine: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if folder not in self._identity:
            self._identity[folder] = (model_root(folder), engine_identity(engine))
        return self._identity[folder]

    def _tokens(self) -> int:
        return sum(len(answer.prompt) + len(answer.ids) for answers in self._replies.values() for answer in answers)
