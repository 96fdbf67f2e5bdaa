"""Text to ids and back: byte-level BPE with single digits, in Hugging Face form on disk."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from glasklar.errors import CheckpointError, DataError
from glasklar.provenance.hashing import sha256_hex

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

# Words with the blank before them, single digits, runs of punctuation, runs of white space (the last blank stays with
# the word that follows). Merges never cross these borders.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Renders what `chat.render` renders; for other programs: this project executes no templates.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] + '<｜Assistant｜>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '</think>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if thinking is defined and thinking is not none %}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


class Tokenizer:
    """Byte-level BPE. Special tokens have the lowest ids and are never read out of a user's text."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        # With this, "<think>" in a text is eight characters like any others.
        self._inner.encode_special_tokens = True
        self.bos_id, self.eos_id, self.pad_id, self.user_id, self.assistant_id, self.think_id, self.end_think_id = (
            self._special(token) for token in SPECIAL
        )
        self.special_ids = frozenset(self._special(token) for token in SPECIAL)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A vocabulary of `vocab_size` from the texts; the same texts give the same bytes of tokenizer.json."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        if inner.get_vocab_size() != vocab_size:
            raise DataError(
                f"the texts give a vocabulary of {inner.get_vocab_size()}, not {vocab_size}; "
                "lower vocab_size, in [model] and [tokenizer], or add documents"
            )
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a folder with tokenizer.json. Raises CheckpointError where it is missing or damaged."""
        path = folder / "tokenizer.json"
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; copy the tokenizer that belongs to the model there") from None
        except CheckpointError:
            raise
        except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
            raise CheckpointError(f"{path}: not a readable tokenizer ({error}); restore it from a copy") from None

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (self.eos_id,)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What stands before a text that is no conversation."""
        return (self.bos_id,)

    @property
    def hash(self) -> str:
        """SHA-256 of tokenizer.json."""
        return sha256_hex(self.files()["tokenizer.json"])

    def files(self) -> dict[str, bytes]:
        """What a Hugging Face folder needs for this tokenizer, by file name."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        return {
            "tokenizer.json": self._inner.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        }

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str], *, trusted: bool = False) -> list[list[int]]:
        """Ids of many texts; in `trusted` ones, written by this program itself, special tokens count as such."""
        self._inner.encode_special_tokens = not trusted
        try:
            return [encoding.ids for encoding in self._inner.encode_batch(texts, add_special_tokens=False)]
        finally:
            self._inner.encode_special_tokens = True

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; several tokens may share one character."""
        piece = self._inner.id_to_token(token) or ""
        alphabet = _byte_of_character()
        if token not in self.special_ids and all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return self.decode([token], skip_special=False).encode()

    def _special(self, token: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"the tokenizer lacks the special token {token!r}; it is not one of this model's family"
            )
        return found


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the others from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Decoder:
    """Ids to text as they come: holds back the beginning of a character until all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is unfinished."""
        self._pending.append(token)
        text = self._new()
        if not text.endswith("�"):
            return self._given(text)
        if len(self._pending) < 4:
            return ""
        # Bytes that are no character lie there, but the last ones may still become one.
        kept = self._unfinished() if len(self._pending) < 16 else 0
        last = self._pending[len(self._pending) - kept :]
        del self._pending[len(self._pending) - kept :]
        text = self._given(self._new())
        self._pending = last
        return text

    def flush(self) -> str:
        """What is still held back, as it is."""
        return self._given(self._new())

    def _new(self) -> str:
        """Text of the pending tokens, told from what stands before them: some tokenizers drop the first blank."""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._pending])[len(before) :]

    def _unfinished(self) -> int:
        """How many of the last pending tokens to keep, so that what goes before them ends with a whole character."""
        pieces = [self._tokenizer.token_bytes(token) for token in self._pending]
        for count in range(len(pieces)):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(b"".join(pieces[: len(pieces) - count]))
            if not decoder.getstate()[0]:
                return count
        return len(pieces)

    def _given(self, text: str) -> str:
        if self._pending:
            self._before, self._pending = self._pending, []
        return text
