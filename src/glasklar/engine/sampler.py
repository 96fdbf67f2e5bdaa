"""From logits to tokens, for a whole batch at once.

A token depends on its row's logits, seed and position alone: randomness is a hash of (seed, position) and the draw
inverts the cumulative distribution in the order of the vocabulary, so neither the company in the batch nor the state of
any generator matters.

Order of the steps: penalties, bias, what a guide allows, temperature; top-k; top-p among what top-k left; min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.request import SamplingParams

Alternatives = tuple[tuple[int, float], ...]
# Logits divided by less could overflow; there is nothing left to chance below it anyway.
COLDEST = 1e-5
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampled:
    """One token a row.

    logprobs       under the model's own distribution (temperature 1, nothing left out), fp32
    finite         False where the logits hold NaN or infinity; the row's token then means nothing
    alternatives   most probable tokens for rows that asked for them
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finite: NDArray[np.bool_]
    alternatives: dict[int, Alternatives]


@dataclass(frozen=True)
class SpecialRow:
    """A row of the batch whose request asks for more than a temperature: its settings, prompt and answer so far, and
    the tokens that its guide allows."""

    row: int
    params: SamplingParams
    prompt: Sequence[int]
    made: Sequence[int]
    allowed: NDArray[np.bool_] | None = None


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 bits each: SplitMix64 (Steele et al., OOPSLA 2014), generator `mix(seed)`, output number
    `position`."""
    mixed = _mix(_mix(seeds) + GOLDEN * (positions.astype(np.uint64) + np.uint64(1)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@torch.inference_mode()
def sample(
    logits_BW: Tensor,
    temperature_B: NDArray[np.float64],
    uniform_B: NDArray[np.float64],
    special: Sequence[SpecialRow] = (),
) -> Sampled:
    """Chooses a token for each row.

    temperature   below 1e-5 = the most probable token
    uniform       from `uniform`
    special       rows that need more than a temperature
    """
    if logits_BW.is_cuda and len(logits_BW) > 1:
        return _one_by_one(logits_BW, temperature_B, uniform_B, special)
    own_BW = logits_BW.float()
    # Of a row as a whole, by one thread: `logsumexp` of a single long row is shared out, and adds up otherwise.
    own_logprobs_BW = own_BW.log_softmax(-1)
    chosen_BW = _adjust(own_BW, temperature_B, special) if special else own_BW
    greedy = temperature_B < COLDEST
    if greedy.all():
        tokens_B = chosen_BW.argmax(-1)
    else:
        tokens_B = draw(_scaled(chosen_BW, np.where(greedy, 1.0, temperature_B)), _to(uniform_B, own_BW))
        if greedy.any():
            tokens_B = torch.where(_to(greedy, own_BW), chosen_BW.argmax(-1), tokens_B)
    logprobs_B = own_logprobs_BW.gather(-1, tokens_B[:, None])[:, 0]
    finite_B = own_logprobs_BW.amax(-1).isfinite()
    return Sampled(
        tokens_B.cpu().numpy(),
        logprobs_B.cpu().numpy(),
        finite_B.cpu().numpy(),
        _alternatives(own_logprobs_BW, special),
    )


def _one_by_one(
    logits_BW: Tensor, temperature_B: NDArray[np.float64], uniform_B: NDArray[np.float64], special: Sequence[SpecialRow]
) -> Sampled:
    """As `sample`: on a GPU torch adds up a row in an order that depends on how many there are."""
    by_row = {s.row: replace(s, row=0) for s in special}
    each = [
        sample(logits_BW[i : i + 1], temperature_B[i : i + 1], uniform_B[i : i + 1], [by_row[i]] if i in by_row else [])
        for i in range(len(logits_BW))
    ]
    return Sampled(
        np.concatenate([one.tokens for one in each]),
        np.concatenate([one.logprobs for one in each]),
        np.concatenate([one.finite for one in each]),
        {i: one.alternatives[0] for i, one in enumerate(each) if one.alternatives},
    )


def draw(logits_BW: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverts the cumulative softmax of the logits: the first token whose cumulative probability exceeds the number."""
    cumulative_BW = logits_BW.softmax(-1).cumsum(-1, dtype=torch.float64)
    # A number below 1 times the sum stays below the sum, also after rounding; tokens of probability 0 are never met.
    threshold_B = uniform_B * cumulative_BW[:, -1]
    tokens_B = torch.searchsorted(cumulative_BW, threshold_B[:, None], right=True)[:, 0]
    return tokens_B.clamp_(max=logits_BW.shape[-1] - 1)  # reached by rows of NaN only


def truncate(logits_BW: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Which tokens top-k (0: all), top-p and min-p leave [B, W]; ties go to the lower id, the best token stays."""
    sorted_BW, ids_BW = logits_BW.sort(dim=-1, descending=True, stable=True)
    W = logits_BW.shape[-1]
    rank_W = torch.arange(W, device=logits_BW.device)
    k_B1 = torch.where(top_k_B > 0, top_k_B, W)[:, None]
    sorted_BW = sorted_BW.masked_fill(rank_W >= k_B1, float("-inf"))
    probs_BW = sorted_BW.softmax(-1, dtype=torch.float64)
    before_BW = probs_BW.cumsum(-1) - probs_BW
    kept_BW = (before_BW < top_p_B[:, None]) & (probs_BW >= min_p_B[:, None] * probs_BW[:, :1])
    kept_BW[:, 0] = True
    return torch.empty_like(kept_BW).scatter_(-1, ids_BW, kept_BW)


def penalise(logits_W: Tensor, params: SamplingParams, prompt: Sequence[int], made: Sequence[int]) -> Tensor:
    """Penalties on earlier tokens. Repetition (arXiv 1909.05858: prompt and answer; positive logits are divided,
    negative multiplied), then frequency and presence (answer only; subtracted per occurrence and once)."""
    logits_W = logits_W.clone()
    seen = torch.tensor(sorted({*prompt, *made}), device=logits_W.device)
    old = logits_W[seen]
    logits_W[seen] = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    made_ids = torch.tensor(list(made), dtype=torch.int64, device=logits_W.device)
    counts_W = torch.bincount(made_ids, minlength=len(logits_W))
    return logits_W - params.frequency_penalty * counts_W - params.presence_penalty * (counts_W > 0)


def _adjust(
    logits_BW: Tensor,
    temperature_B: NDArray[np.float64],
    special: Sequence[SpecialRow],
) -> Tensor:
    """What the rows' settings make of the logits; left-out tokens get -inf."""
    logits_BW = logits_BW.clone()
    for s in special:
        if s.params.penalised:
            logits_BW[s.row] = penalise(logits_BW[s.row], s.params, s.prompt, s.made)
        for token, bias in s.params.logit_bias.items():
            logits_BW[s.row, token] += bias
        if s.allowed is not None:
            logits_BW[s.row].masked_fill_(~_to(s.allowed, logits_BW), float("-inf"))
    cut = [s for s in special if s.params.truncated]
    if cut:
        device, rows = logits_BW.device, [s.row for s in cut]
        kept_BW = truncate(
            _scaled(logits_BW[rows], temperature_B[rows].clip(min=COLDEST)),
            torch.tensor([s.params.top_k for s in cut], device=device),
            torch.tensor([s.params.top_p for s in cut], device=device, dtype=torch.float64),
            torch.tensor([s.params.min_p for s in cut], device=device, dtype=torch.float64),
        )
        logits_BW[rows] = logits_BW[rows].masked_fill(~kept_BW, float("-inf"))
    return logits_BW


def _scaled(logits_BW: Tensor, temperature_B: NDArray[np.float64]) -> Tensor:
    if (temperature_B == 1).all():
        return logits_BW
    return logits_BW / _to(temperature_B, logits_BW)[:, None].float()


def _alternatives(logprobs_BW: Tensor, special: Sequence[SpecialRow]) -> dict[int, Alternatives]:
    """The most probable tokens of the rows that asked for them, by row."""
    wanted = {s.row: min(s.params.logprobs, logprobs_BW.shape[-1]) for s in special if s.params.logprobs}
    if not wanted:
        return {}
    rows = list(wanted)
    values, ids = logprobs_BW[rows].topk(max(wanted.values()), dim=-1)
    return {
        row: tuple(zip(best[:count], logprobs[:count], strict=True))
        for (row, count), best, logprobs in zip(wanted.items(), ids.tolist(), values.tolist(), strict=True)
    }


def _to(array: NDArray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
