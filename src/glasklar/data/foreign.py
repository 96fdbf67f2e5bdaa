"""Tokenizers and chat formats of other people's models: `tokenizer.json`, and the chat template beside it.

A rendered prompt holds the template's own control tokens and texts by whoever talks to the model. Only the former may
become control tokens. Before a text goes into the template, a mark (a character that no text uses) is put into whatever
would read as one of the tokenizer's added tokens; a marked token is not found any more, and the marks are taken out
before the pieces between the tokens are encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from glasklar.data.template import ChatTemplate, find_template
from glasklar.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from glasklar.errors import CheckpointError, RequestError

NO_TOKEN = -1  # of a role that the tokenizer does not fill
# Noncharacters: Unicode reserves them for uses like this one.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model: ours if the folder speaks our chat format, otherwise a foreign one.

    Raises CheckpointError where a file is missing or damaged.
    """
    template = find_template(folder)
    ours = template == CHAT_TEMPLATE or (folder / "recipe.json").is_file()
    return Tokenizer.load(folder) if ours else ForeignTokenizer(folder, template)


class ForeignTokenizer(Tokenizer):
    """Any `tokenizer.json`. `template` is None for a base model: such a model takes no messages."""

    def __init__(self, folder: Path, template: str | None) -> None:
        self._folder = folder
        path = folder / "tokenizer.json"
        table = _table(path)
        try:
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(table))
            self._first, self._later = (tokenizers.Tokenizer.from_str(text) for text in _plain(table))
        except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
            raise CheckpointError(f"{path}: not a readable tokenizer ({error}); restore it from a copy") from None
        self._added = {token["content"]: token for token in table.get("added_tokens", [])}
        self._find = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")
        self.special_ids = frozenset(token["id"] for token in self._added.values() if token.get("special"))
        self._named = _named_tokens(folder)
        self.bos_id, self.pad_id = (self._id(self._named.get(role)) for role in ("bos_token", "pad_token"))
        self._stop_ids = self._stops()
        self.eos_id = self._stop_ids[0] if self._stop_ids else NO_TOKEN
        self.user_id = self.assistant_id = NO_TOKEN
        self.think_id, self.end_think_id = self._id("<think>"), self._id("</think>")
        self.template = None if template is None else ChatTemplate(template, str(folder))
        self._opens: dict[bool | None, bool] = {}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer; some models have several."""
        return self._stop_ids

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text; nothing in many families."""
        return tuple(self._inner.encode("", add_special_tokens=True).ids)

    def files(self) -> dict[str, bytes]:
        """The folder's own files of the tokenizer, as they are."""
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        return {name: path.read_bytes() for name in names if (path := self._folder / name).is_file()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing counts as a control token."""
        return list(self._first.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str], *, trusted: bool = False) -> list[list[int]]:
        return [self._with_tokens(text) if trusted else self.encode(text) for text in texts]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Prompt ids by the model's own chat template.

        messages   {"role": …, "content": …} each
        tools      functions that the model may call, in OpenAI's form, for templates that know them
        thinking   is handed to the template under the names that are in use, `thinking` and `enable_thinking`

        Raises RequestError where there is no template, it has no switch for thinking, or it refuses the messages.
        """
        if self.template is None:
            raise RequestError(
                f"{self._folder}: the model has no chat template and takes no messages; give it ids: --prompt-ids"
            )
        if thinking is not None and "thinking" not in self.template.source:
            raise RequestError(f"{self._folder}: its chat template has no switch for thinking; leave the wish out")
        switch = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        mark = _unused([*messages, *(tools or ())])
        safe = [self._marked(message, mark) for message in messages]
        known = None if tools is None else [self._marked({"role": "tool", **tool}, mark) for tool in tools]
        for tool in known or ():
            del tool["role"]
        text = self.template.render(messages=safe, add_generation_prompt=True, tools=known, **self._named, **switch)
        return self._with_tokens(text, mark)

    def added_id(self, text: str) -> int | None:
        """Id of a token that was added to the vocabulary under this very text, if there is one."""
        return int(self._added[text]["id"]) if text in self._added else None

    def opens_thinking(self, thinking: bool | None) -> bool:
        """Whether a prompt ends within a thought, so that the answer begins there."""
        if thinking not in self._opens:
            ids = self.prompt([{"role": "user", "content": "?"}], thinking) if self.think_id != NO_TOKEN else []
            last = {token: place for place, token in enumerate(ids)}
            self._opens[thinking] = last.get(self.think_id, -1) > last.get(self.end_think_id, -1)
        return self._opens[thinking]

    def _marked(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """The message with a mark in each text that could read as a control token."""
        # The model's own thoughts are set off by tokens that templates look for; those stay as they are.
        structure = {"<think>", "</think>"} - self._special_texts() if message["role"] == "assistant" else set()

        def split(match: re.Match[str]) -> str:
            token = match[0]
            return token if token in structure else token[0] + mark + token[1:]

        def safe(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {self._find.sub(split, key): safe(inner) for key, inner in value.items()}
            if isinstance(value, list | tuple):
                return [safe(inner) for inner in value]
            if not isinstance(value, str):
                return value
            value = self._find.sub(split, value)
            body = value.strip()
            start = value.index(body)
            # A beginning or an end of a token might meet the rest of it in the template or in the next message.
            before = mark if any(_meet(token, body) for token in self._added) else ""
            after = mark if any(_meet(body, token) for token in self._added) else ""
            return f"{value[:start]}{before}{body}{after}{value[start + len(body) :]}"

        return {key: value if key == "role" else safe(value) for key, value in message.items()}

    def _with_tokens(self, text: str, mark: str = "") -> list[int]:
        """Ids of a text whose unmarked added tokens count as such."""
        ids: list[int] = []
        place, strip_left = 0, False
        for match in [*self._find.finditer(text), None]:
            piece = text[place : match.start() if match else len(text)]
            token = self._added[match[0]] if match else {}
            piece = piece.lstrip() if strip_left else piece
            piece = piece.rstrip() if token.get("lstrip") else piece
            piece = piece.replace(mark, "") if mark else piece
            if piece:
                inner = self._later if place else self._first
                ids += inner.encode(piece, add_special_tokens=False).ids
            if match:
                ids.append(token["id"])
                place, strip_left = match.end(), bool(token.get("rstrip"))
        return ids

    def _special_texts(self) -> set[str]:
        return {text for text, token in self._added.items() if token.get("special")}

    def _id(self, text: str | None) -> int:
        found = None if text is None else self._inner.token_to_id(text)
        return NO_TOKEN if found is None else found

    def _stops(self) -> tuple[int, ...]:
        """End tokens by generation_config.json, the tokenizer and config.json, each once, in this order."""
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            given = _table(self._folder / name).get("eos_token_id") if (self._folder / name).is_file() else None
            found += [given] if isinstance(given, int) else given if isinstance(given, list) else []
        found.insert(1 if found else 0, self._id(self._named.get("eos_token")))
        return tuple(dict.fromkeys(token for token in found if isinstance(token, int) and token >= 0))


def _meet(left: str, right: str) -> bool:
    """Whether `left` ends with the first characters of `right`."""
    return any(left.endswith(right[:n]) for n in range(1, min(len(left), len(right)) + 1))


def _unused(messages: Sequence[Mapping[str, Any]]) -> str:
    """A mark that none of the messages holds."""
    texts = json.dumps(list(messages), ensure_ascii=False)
    for mark in _MARKS:
        if mark not in texts:
            return mark
    raise RequestError("the messages hold every noncharacter from U+FDD0 to U+FDEF; remove one of them")


def _plain(table: dict[str, Any]) -> tuple[str, str]:
    """The same tokenizer without its added tokens: for the beginning of a text, and for what follows a token."""
    first = {**table, "added_tokens": [], "post_processor": None}
    later = json.loads(json.dumps(first))
    pre = later.get("pre_tokenizer") or {}
    for part in [pre, *pre.get("pretokenizers", [])]:
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return json.dumps(first), json.dumps(later)


def _named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and the like, as templates know them."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        table = _table(folder / file) if (folder / file).is_file() else {}
        for name in names:
            value = table.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; copy the tokenizer that belongs to the model there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the model again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch the file again")
    return table
