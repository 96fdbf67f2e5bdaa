"""Messages to ids and back."""

from __future__ import annotations

import random

import pytest

from glasklar.data.chat import Message, Splitter, demonstration, parse, render
from glasklar.data.tokenizer import Tokenizer
from glasklar.errors import RequestError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"what is {a} plus {b} äöü" for a in range(30) for b in range(30)], vocab_size=270)


def test_a_demonstration_parses_into_what_it_was_made_of(tokenizer: Tokenizer) -> None:
    for thought in (None, "3+4=7"):
        ids, weights = demonstration(tokenizer, "what is 3+4?", thought, "7")
        start = ids.index(tokenizer.assistant_id) + 1
        reply = parse(tokenizer, ids[start:])
        assert (reply.reasoning, reply.content, reply.complete) == (thought or "", "7", True)
        assert weights == [0.0] * start + [1.0] * (len(ids) - start)


def test_forced_modes_parse_what_follows_the_forcing_token(tokenizer: Tokenizer) -> None:
    body = [*tokenizer.encode("3+4=7"), tokenizer.end_think_id, *tokenizer.encode("7"), tokenizer.eos_id]
    assert parse(tokenizer, body, True).reasoning == "3+4=7"
    direct = parse(tokenizer, [*tokenizer.encode("7"), tokenizer.eos_id], False)
    assert (direct.reasoning, direct.content, direct.complete) == ("", "7", True)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: [t.think_id, *t.encode("3+4=7"), t.eos_id],  # thinking never closed
        lambda t: [t.think_id, *t.encode("3"), t.end_think_id, *t.encode("7")],  # cut off
        lambda t: [*t.encode("7"), t.eos_id],  # neither thought nor said that it does not
        lambda t: [],
    ],
)
def test_incomplete_replies_are_not_complete(tokenizer: Tokenizer, make) -> None:
    assert not parse(tokenizer, make(tokenizer)).complete


@pytest.mark.parametrize("thinking", [None, True, False])
def test_streamed_pieces_join_to_the_parsed_reply(tokenizer: Tokenizer, thinking: bool | None) -> None:
    rng = random.Random(1)
    for _ in range(300):
        body = tokenizer.encode("".join(rng.choice("ä3+ =x") for _ in range(rng.randrange(10))))
        answer = tokenizer.encode(rng.choice(["7", "", "x = ö"]))
        opening = [] if thinking is not None else [rng.choice([tokenizer.think_id, tokenizer.end_think_id])]
        thinks = thinking or opening == [tokenizer.think_id]
        ids = [*opening, *(([*body, tokenizer.end_think_id]) if thinks else []), *answer, tokenizer.eos_id]
        splitter, pieces = Splitter(tokenizer, thinking), []
        for token in ids:
            pieces += splitter.push(token)
        pieces += splitter.flush()
        reply = parse(tokenizer, ids, thinking)
        assert "".join(text for channel, text in pieces if channel == "reasoning") == reply.reasoning
        assert "".join(text for channel, text in pieces if channel == "content") == reply.content


def test_thoughts_of_earlier_turns_are_left_out(tokenizer: Tokenizer) -> None:
    said = Message(role="assistant", content="7", reasoning_content="3+4=7")
    plain = Message(role="assistant", content="7")
    ask = Message(role="user", content="what is 3+4?")
    assert render(tokenizer, [ask, said, ask]) == render(tokenizer, [ask, plain, ask])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([Message(role="assistant", content="7")], "last message is of role 'assistant'"),
        ([Message(role="pirate", content="7"), Message(role="user", content="?")], "role = 'pirate'"),  # type: ignore[arg-type]
    ],
)
def test_messages_that_make_no_prompt_are_refused(tokenizer: Tokenizer, messages: list[Message], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        render(tokenizer, messages)
