"""The tokenizer against transformers, hostile text, and itself trained twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from glasklar.data.chat import Message, render
from glasklar.data.tokenizer import SPECIAL, Decoder, Tokenizer
from glasklar.errors import CheckpointError, DataError

TEXTS = [
    f"What is {a} + {b}? The answer is {a + b}. Größe, Übermut, naïve café: {a}{b}\n\tdef f(x): return x ** {a}"
    for a in range(40)
    for b in range(20)
]
SAMPLES = [
    "",
    " ",
    "3+4-2=5",
    "  two  blanks\n\n",
    "Äpfel für Jörg 🙂🚀",
    "x = [1, 22, 333]",
    "a\u0000b",
    "���",
    "日本語",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=310)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer.files().items():
        (path / name).write_bytes(content)
    return path


def test_the_same_texts_give_the_same_bytes(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(TEXTS), vocab_size=310).files() == tokenizer.files()


def test_ids_against_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*SAMPLES, *TEXTS[:50]]:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_chat_template_against_transformers(tokenizer: Tokenizer, folder: Path, thinking: bool | None) -> None:
    from transformers import AutoTokenizer

    messages = [("system", "Be brief."), ("user", "What is 3+4?"), ("assistant", "7"), ("user", "And 2+2?")]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], tokenize=False, thinking=thinking
    )
    ours = render(tokenizer, [Message(role=role, content=text) for role, text in messages], thinking)  # type: ignore[arg-type]
    assert tokenizer.decode(ours, skip_special=False) == theirs


def test_round_trip_of_any_text(tokenizer: Tokenizer) -> None:
    for text in [*SAMPLES, *TEXTS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("123456")) == 6


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_a_users_text_are_only_characters(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"before {token} after")
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == f"before {token} after"
    assert tokenizer.encode_many([f"{token}x"])[0] == tokenizer.encode(f"{token}x")


def test_trusted_text_may_hold_special_tokens(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_many(["<｜User｜>hi<｜Assistant｜>"], trusted=True)
    assert ids[0] == tokenizer.user_id
    assert ids[-1] == tokenizer.assistant_id
    assert not tokenizer.special_ids & set(tokenizer.encode("<｜User｜>"))


def test_streaming_gives_the_same_text_as_decoding_at_once(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(["ä", "🙂", "x", " ", "日", "9", "\n"]) for _ in range(rng.randrange(12)))
        decoder = Decoder(tokenizer)
        pieces = [decoder.push(token) for token in tokenizer.encode(text)] + [decoder.flush()]
        assert "".join(pieces) == text


def test_too_large_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"not 5000; lower vocab_size"):
        Tokenizer.train(["abc abd"], vocab_size=5000)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def test_random_bytes_as_they_come_are_those_of_the_whole(tokenizer: Tokenizer) -> None:
    """Untrained models answer with bytes that are no characters, between such as are."""
    for seed in range(100):
        draw = random.Random(seed)
        ids = [draw.randrange(len(SPECIAL), 310) for _ in range(60)]
        decoder = Decoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)
