"""Passes of the model over the cache: prompts with expanded attention, single tokens with absorbed attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.batch import Rows, decode_inputs, distinct, prefill_groups, prefill_inputs
from glasklar.engine.cache import SlotCache
from glasklar.model.attention import cache_mask, document_mask
from glasklar.model.transformer import Transformer

# Tokens of one prefill pass: bounds what attention and the experts need beside the weights.
PREFILL_TOKENS = 1 << 13


@dataclass(frozen=True)
class Result:
    """What a pass brought: logits of the next tokens [n, W]; where it drew them itself, the tokens of plain rows and
    their log-probabilities [n]; `cached`: prompt tokens of each that the cache had already (none: no cache of them)."""

    logits_BW: Tensor
    tokens: NDArray[np.int64] | None = None
    logprobs: NDArray[np.float32] | None = None
    cached: Sequence[int] = ()

    def at(self, places: NDArray[np.int64]) -> Result:
        """The part for some outputs."""
        tokens = None if self.tokens is None else self.tokens[places]
        logprobs = None if self.logprobs is None else self.logprobs[places]
        return Result(self.logits_BW[torch.from_numpy(places)], tokens, logprobs)


class Runner:
    """Holds the model and its cache, and no weights of its own: what the trainer changes in place is used at once."""

    def __init__(self, model: Transformer, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.embed_tokens.weight.device

    def fit(self, rows: int, length: int, keep: int) -> None:
        """Makes room for `rows` requests of up to `length` tokens; the first `keep` keep what they hold."""
        self.cache.fit(rows, length, keep)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Rows change their numbers (from, to)."""
        self.cache.move(moves)

    def release(self, row: int, tokens: Sequence[int]) -> None:
        """A request has ended. Slots forget nothing and keep nothing."""

    def clear_from(self, row: int) -> None:
        """Zeroes what the rows from `row` on hold: something in it may not be finite."""
        self.cache.clear_from(row)

    def fill(
        self, prompt: Sequence[int], row: int, temperature: NDArray[np.float64], uniform: NDArray[np.float64]
    ) -> Result | None:
        """Reads all of a prompt; slots know no pieces."""
        return self.prefill([prompt], row, temperature, uniform)

    def reserve(self, lengths: Sequence[int]) -> None:
        """Nothing to do: `fit` has made room."""

    def abandon(self, prompt: Sequence[int]) -> None:
        """Nothing to do: no prompt is ever half read."""

    def close(self) -> None:
        """Nothing to do: slots are not kept."""

    def refresh(self) -> None:
        """The weights have changed; they are read anew at every pass."""
        self.cache.clear_from(0)

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        start: int,
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
    ) -> Result:
        """Runs prompts through the model, into the slots from `start` on. Returns logits after each prompt [n, W]; the
        sampler draws from them.

        Equal prompts (several samples of one problem) are computed once.
        """
        once, places = distinct(prompts)
        groups = prefill_groups([len(prompt) for prompt in once], PREFILL_TOKENS)
        logits_BW = torch.cat([self._prefill(once[a:b], start + a) for a, b in groups])
        if len(once) == len(prompts):
            return Result(logits_BW)
        self.cache.spread(start, places)
        return Result(logits_BW[torch.tensor(places, device=self.device)])

    def _prefill(self, prompts: Sequence[Sequence[int]], start: int) -> Tensor:
        inputs = prefill_inputs(prompts, self.cache.rows - start)
        ids_BT, position_BT = inputs.ids_BT.to(self.device), inputs.position_BT.to(self.device)
        B, T = ids_BT.shape
        caches = self.cache.layers(start, B, T, position_BT)
        mask_BTT = document_mask(inputs.segments_BT.to(self.device), self.model.dtype)
        output = self.model(ids_BT, self.model.at(position_BT, mask_BTT), caches)
        last_B = inputs.last_B.to(self.device)
        hidden_BD = output.hidden_BTD[torch.arange(B, device=self.device), last_B]
        return self.model.logits(hidden_BD)[: len(prompts)]

    @torch.inference_mode()
    def decode(self, rows: Rows, temperature: NDArray[np.float64], uniform: NDArray[np.float64]) -> Result:
        """Runs the last token of every row. Returns logits of the next ones [n, W]; the sampler draws from them."""
        length = self.cache.length
        ids_BT, position_BT = (tensor.to(self.device) for tensor in decode_inputs(rows))
        caches = self.cache.layers(0, len(ids_BT), length, position_BT)
        slots_S = torch.arange(length, device=self.device)
        at = self.model.at(position_BT, cache_mask(position_BT, length, self.model.dtype), slots_S)
        output = self.model(ids_BT, at, caches, absorbed=True)
        return Result(self.model.logits(output.hidden_BTD[: rows.n, 0]))
