"""A Hugging Face tokenizer as llama.cpp wants it: tokens, kinds, merges, pre-tokenizer, chat template.

llama.cpp has pre-tokenizers built in and a file only names one. Those whose regular expressions a tokenizer.json spells
out are recognised by them; anything else is refused rather than split in other places than the model learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasklar.data.template import find_template
from glasklar.data.tokenizer import PIECES
from glasklar.errors import CheckpointError
from glasklar.model.hf_config import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in llama.cpp's numbers

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DIGITS = "digits"  # stands for tokenizers' own Digits(individual_digits=True)

# Where a tokenizer.json splits, in order -> llama.cpp's name for it.
PRE_TOKENIZERS = {
    (_GPT2,): "gpt-2",
    (_DIGITS, _GPT2): "smollm",
    (rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}",): "llama-bpe",
    (rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}|{_MARKS}",): "qwen2",
    _DEEPSEEK_V3: "deepseek-v3",
    # Ours: digits one by one, then words as GPT-2 has them. Merges never cross our borders, so that its short forms
    # ("'s") change nothing; runs of blanks before a digit do, see `_caveats`.
    (PIECES,): "smollm",
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What goes into the file. `notes`: what a user should know about it."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a folder for a network of `vocab_size` entries. Raises CheckpointError where llama.cpp's would
    give other ids, or where the tokenizer is not a byte-level BPE."""
    path = folder / "tokenizer.json"
    table = read_json(path)
    model = table.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{path}: a tokenizer of type {kind!r}; only byte-level BPE can be written as GGUF")
    splits = tuple(_splits(table.get("pre_tokenizer"), path))
    if splits not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: it splits texts at {str(splits)[:300]}, which llama.cpp has no pre-tokenizer for that is known "
            f"here; known are {', '.join(sorted(set(PRE_TOKENIZERS.values())))}"
        )
    tokens, kinds = _tokens(table, model, vocab_size, path)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        pre=PRE_TOKENIZERS[splits],
        special=dict(_special(config, read_json(folder / "config.json"), tokens)),
        add_bos=_adds_bos(table, config),
        chat_template=find_template(folder),
        notes=_caveats(splits, tokens),
    )


def _tokens(table: dict[str, Any], model: dict[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Text and kind of every id; ids that the network has and the tokenizer lacks are marked as unused."""
    names = {token: text for text, token in model["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for token in table.get("added_tokens", []):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    if max(names) >= vocab_size:
        raise CheckpointError(
            f"{path}: has the id {max(names)} ({names[max(names)]!r}) and the network only {vocab_size} entries; "
            "take the tokenizer that belongs to the model"
        )
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    return tokens, [kinds.get(index, UNUSED) for index in range(vocab_size)]


def _splits(pre: Any, path: Path) -> Iterator[str]:
    """The regular expressions of a pre-tokenizer in their order."""
    if not isinstance(pre, dict):
        raise CheckpointError(f"{path}: has no pre-tokenizer; only byte-level BPE can be written as GGUF")
    match pre.get("type"):
        case "Sequence":
            for part in pre["pretokenizers"]:
                yield from _splits(part, path)
        case "Split" if pre.get("behavior") == "Isolated" and not pre.get("invert") and "Regex" in pre["pattern"]:
            yield pre["pattern"]["Regex"]
        case "Digits" if pre.get("individual_digits"):
            yield _DIGITS
        case "ByteLevel" if not pre.get("add_prefix_space"):
            if pre.get("use_regex", True):
                yield _GPT2
        case kind:
            raise CheckpointError(f"{path}: llama.cpp has nothing like the pre-tokenizer {str(pre)[:200]} ({kind})")


def _special(config: dict[str, Any], network: dict[str, Any], tokens: list[str]) -> Iterator[tuple[str, int]]:
    """("bos", id) and the like: by the tokenizer's names, otherwise by the network's ids."""
    ids = {text: index for index, text in enumerate(tokens)}
    for role in ("bos", "eos", "pad"):
        named = config.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        given = network.get(f"{role}_token_id")
        first = given[0] if isinstance(given, list) and given else given
        if text in ids:
            yield role, ids[text]
        elif type(first) is int and 0 <= first < len(tokens):
            yield role, first


def _adds_bos(table: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts the begin token before a text."""
    if isinstance(config.get("add_bos_token"), bool):
        return config["add_bos_token"]
    after = table.get("post_processor")
    processors = [] if not isinstance(after, dict) else after.get("processors", [after])
    single: list[Any] = next((p["single"] for p in processors if p.get("type") == "TemplateProcessing"), [])
    return bool(single) and "SpecialToken" in single[0]


def _caveats(splits: tuple[str, ...], tokens: list[str]) -> list[str]:
    if splits != (PIECES,) or not any(len(token) > 1 and set(token) <= set("ĠĊĉč") for token in tokens):
        return []
    return [
        "llama.cpp has no pre-tokenizer just like this model's: it takes several blanks before a digit as one piece, "
        "where the model learned the last of them on its own; all other texts get the same ids"
    ]
