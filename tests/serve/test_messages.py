"""What travels between the server and the engine's process comes out as it went in; anything else is refused."""

from __future__ import annotations

import json
import random
import struct

import pytest

from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import BusyError, CapacityError, RequestError
from glasklar.serve.grammar import GuideSpec
from glasklar.serve.messages import (
    Call,
    Cancel,
    Frames,
    Loading,
    Message,
    Ready,
    Refused,
    Reply,
    Start,
    Submit,
    Tokens,
    frame,
)

PARAMS = SamplingParams(temperature=0.7, seed=(1 << 63) + 5, stop_ids=(3, 4), logit_bias={7: -1.5})
EVENT = TokenEvent(request=9, token=0, logprob=-0.1, cached=16, drafted=4, accepted=3)
LAST = TokenEvent(
    request=9, token=5, logprob=float("-inf"), alternatives=((5, -0.1), (6, -2.5)), finish="stop", cached=16
)
MESSAGES: list[Message] = [
    Start(folder="/m/ü", device="cpu", compute="bf16", threads=2, max_slots=3, max_tokens=64),
    Submit(id=1, prompt=[1, 2, 3], params=PARAMS, priority=2, guide=GuideSpec(grammar='start: "a"', budget=3)),
    Submit(id=0, prompt=[0], params=SamplingParams()),
    Cancel(id=1),
    Call(id=2, name="inspect", arguments={"ids": [1, 2], "first": 1}),
    Loading(done=1, total=1 << 40),
    Ready(engine={"device": "cpu"}),
    Reply(id=2, result={"layers": [1], "x": 0.1}),
    Tokens(events=[(0, TokenEvent(request=0, token=0, logprob=0.0)), (9, EVENT), (9, LAST)]),
    Tokens(events=[]),
]


def through(content: bytes, pieces: int = 1) -> list[Message]:
    frames, found = Frames(), []
    size = -(-len(content) // pieces)
    for begin in range(0, len(content), size):
        found += frames.feed(content[begin : begin + size])
    return found


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
def test_messages_arrive_as_they_were_sent_however_they_are_cut(pieces: int) -> None:
    assert through(b"".join(map(frame, MESSAGES)), pieces) == MESSAGES


def test_floats_keep_their_bits() -> None:
    chance = random.Random(0)
    values = [struct.unpack("<d", chance.randbytes(8))[0] for _ in range(2000)]
    values = [value for value in values if value == value]
    events = [(1, TokenEvent(request=1, token=1, logprob=value)) for value in values]
    [message] = through(frame(Tokens(events=events)))
    assert isinstance(message, Tokens)
    assert [event.logprob for _, event in message.events] == values


def test_errors_keep_their_kind_and_text() -> None:
    sent = [Refused(id=1, error=RequestError("ü")), Reply(id=2, error=BusyError("now not"))]
    refused, reply = through(b"".join(map(frame, sent)))
    assert isinstance(refused, Refused)
    assert isinstance(reply, Reply)
    assert (type(refused.error), str(refused.error)) == (RequestError, "ü")
    assert (type(reply.error), str(reply.error)) == (CapacityError, "now not")
    failed = TokenEvent(request=1, token=-1, logprob=0.0, finish="error", error=CapacityError("out of memory"))
    [message] = through(frame(Tokens(events=[(1, failed)])))
    assert isinstance(message, Tokens)
    assert str(message.events[0][1].error) == "out of memory"


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    "content",
    [
        framed(b"not JSON"),
        framed(b'{"is": "Shutdown"}'),
        framed(b"{}"),
        framed(b'{"is": "Cancel"}'),
        framed(b'{"is": "Cancel", "id": 1, "more": 2}'),
        framed(json.dumps({"is": "Submit", "id": 1}).encode()),
        framed(b'{"is": "Tokens", "events": [[1, 2]]}'),
        (1 << 31).to_bytes(4, "big"),
        framed(b"[]"),
        framed(b"\xff"),
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        through(content)
