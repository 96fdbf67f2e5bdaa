"""Sizes of tensors, rounded so that few different shapes occur: oneDNN compiles a kernel for every new bf16 product."""

from __future__ import annotations

LENGTHS = 32


def rounded_length(tokens: int) -> int:
    """Length of cache or prompt: a multiple of 32 up to 512, then with at most an eighth to spare."""
    multiple = max(LENGTHS, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // multiple) * multiple


def rounded_rows(count: int) -> int:
    """Rows of a batch: a power of two up to 16, then multiples of 16 up to 128, then of 32."""
    if count <= 16:
        return 1 << max(count - 1, 0).bit_length()
    multiple = 16 if count <= 128 else 32
    return -(-count // multiple) * multiple
