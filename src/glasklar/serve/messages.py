"""What the server and the engine's process say to each other: frames of JSON over a pair of sockets, no pickle.

A frame is its length (4 bytes, big-endian) and a JSON object: the fields of one of the classes below, its name under
"is". Floats keep their bits (JSON text of a float is exact in Python); tensors never travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import CapacityError, CheckpointError, GlasklarError, RequestError
from glasklar.serve.grammar import GuideSpec

CLOSING_SECONDS = 30.0  # in which an engine that keeps pages on disk must have written them when the server has gone
MAX_FRAME = 1 << 28  # bytes; the longest prompts have a few MB
_LENGTH = 4

# --- to the engine -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message: which model, computed how. `max_slots`, `max_tokens`, `cache_kind`: see `Engine`; `locked`:
    see `load`; `pages`: folder of the cache's pages on disk, at most `disk_bytes`."""

    folder: str
    device: str
    compute: str
    threads: int
    max_slots: int
    max_tokens: int
    quantize: str | None = None
    cache: str | None = None
    cache_kind: CacheKind | None = None
    locked: bool = False
    pages: str | None = None
    disk_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request. `id` is chosen by the server."""

    id: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    guide: GuideSpec | None = None


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Nobody waits for this answer any more."""

    id: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """Something else to be done with the model: a function of `worker.CALLS` or `worker.ASIDE` by its name."""

    id: int
    name: str
    arguments: dict[str, Any]


# --- from the engine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The model is being loaded: bytes read, and bytes in all."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The model is loaded. `engine`: what computes it, for the record."""

    engine: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one step brought, with the server's number of each request; nothing while a long prompt is being read, as
    a sign of life."""

    events: list[tuple[int, TokenEvent]]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A request that the engine does not take."""

    id: int
    error: GlasklarError


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The result of a call; `error` in its place where it failed."""

    id: int
    result: dict[str, Any] | None = None
    error: GlasklarError | None = None


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The engine cannot start; its process ends."""

    error: GlasklarError


ToEngine = Start | Submit | Cancel | Call
FromEngine = Loading | Ready | Tokens | Refused | Reply | Failed
Message = ToEngine | FromEngine

# --- frames ------------------------------------------------------------------------------------------------------


def frame(message: Message) -> bytes:
    """A message as it goes over the socket."""
    if isinstance(message, Tokens):
        fields: dict[str, Any] = {"events": [_packed(*entry) for entry in message.events]}
    else:
        fields = vars(message)
    text = json.dumps({"is": type(message).__name__, **fields}, default=_plain, separators=(",", ":")).encode()
    return len(text).to_bytes(_LENGTH, "big") + text


class Frames:
    """Bytes as they arrive to messages. Raises ValueError for what is no message."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, content: bytes) -> Iterator[Message]:
        """The messages that are complete with `content`."""
        self._held += content
        while len(self._held) >= _LENGTH:
            length = int.from_bytes(self._held[:_LENGTH], "big")
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME} are allowed")
            if len(self._held) < _LENGTH + length:
                return
            text = bytes(self._held[_LENGTH : _LENGTH + length])
            del self._held[: _LENGTH + length]
            yield message_of(json.loads(text))


def message_of(table: Any) -> Message:
    """The message that a JSON object stands for. Raises ValueError for any other."""
    if not isinstance(table, dict):
        raise ValueError(f"a message of type {type(table).__name__}; an object is wanted")
    kind = table.pop("is", None)
    try:
        match kind:
            case "Submit":
                guide = None if table["guide"] is None else GuideSpec(**table["guide"])
                return Submit(**table | {"params": _params(table["params"]), "guide": guide})
            case "Tokens":
                return Tokens(events=[_unpacked(entry) for entry in table["events"]])
            case "Cancel":
                return Cancel(**table)
            case "Start":
                return Start(**table)
            case "Call":
                return Call(**table)
            case "Loading":
                return Loading(**table)
            case "Ready":
                return Ready(**table)
            case "Refused" | "Failed" | "Reply":
                named = {"Refused": Refused, "Failed": Failed, "Reply": Reply}[kind]
                return named(**table | {"error": _error(table["error"])})
    except (TypeError, LookupError) as error:
        raise ValueError(f"a message {kind!r} with other fields than its own: {error}") from None
    raise ValueError(f"a message {kind!r}; none has that name")


def _params(table: dict[str, Any]) -> SamplingParams:
    bias = {int(token): value for token, value in table["logit_bias"].items()}
    return SamplingParams(**table | {"stop_ids": tuple(table["stop_ids"]), "logit_bias": bias})


def _packed(number: int, event: TokenEvent) -> list[Any]:
    """The most frequent message of all: values without names, and the rarer ones only where there are any."""
    packed: list[Any] = [number, event.token, event.logprob, event.cached, event.drafted, event.accepted]
    if event.finish is not None or event.alternatives or event.error is not None:
        packed += [event.finish, event.alternatives, event.error]
    return packed


def _unpacked(entry: list[Any]) -> tuple[int, TokenEvent]:
    request, token, logprob, cached, drafted, accepted = entry[:6]
    finish, alternatives, error = entry[6:] or (None, (), None)
    event = TokenEvent(
        request=request,
        token=token,
        logprob=logprob,
        alternatives=tuple((id, value) for id, value in alternatives),
        finish=finish,
        cached=cached,
        drafted=drafted,
        accepted=accepted,
        error=_error(error),
    )
    return request, event


_ERRORS = {kind.__name__: kind for kind in (GlasklarError, CapacityError, CheckpointError, RequestError)}


def _plain(value: Any) -> Any:
    """What JSON does not know: errors by their nearest known kind, frozen settings by their fields."""
    if isinstance(value, GlasklarError):
        kind = next(base.__name__ for base in type(value).__mro__ if base.__name__ in _ERRORS)
        return {"kind": kind, "message": str(value)}
    return vars(value)


def _error(table: dict[str, str] | None) -> GlasklarError | None:
    return None if table is None else _ERRORS[table["kind"]](table["message"])
