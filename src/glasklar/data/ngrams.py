"""Hashes of every stretch of a few neighbours in a sequence: of tokens for `trace`, of words for `cleaning`."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_MIX = np.uint64(0x9E3779B97F4A7C15)
# Letters and digits of any script; a sign of Chinese or Japanese, which knows no blanks, is a word by itself.
_WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W_぀-ヿ㐀-䶿一-鿿]+")


def ngram_hashes(values: NDArray, width: int) -> Hashes:
    """Of every window of `width` values: a polynomial hash, stirred so that its smallest values are spread evenly."""
    count = len(values) - width + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(width):
        total *= _MIX
        total += values[i : i + count].astype(np.uint64) + np.uint64(1)
    return stir(total)


def stir(x: Hashes) -> Hashes:
    """Finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and what only typography distinguishes."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def word_hashes(words: list[str], known: dict[str, int]) -> Hashes:
    """64 bits of SHA-256 for each word; `known` keeps those that came before."""
    for word in set(words) - known.keys():
        known[word] = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.fromiter((known[word] for word in words), np.uint64, len(words))
