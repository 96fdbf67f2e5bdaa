"""Rollouts: groups of answers that teach something, rewarded and packed for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasklar.data.batches import pack_rows
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.eval.answers import Answer, ask
from glasklar.rl.objective import PolicyBatch, group_advantages


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What a step sampled.

    kept        answers of groups with unequal rewards, group after group; their rewards and advantages beside them
    sampled     all answers, the dropped groups included, with `rewards`
    """

    kept: list[Answer]
    advantages: Tensor
    sampled: list[Answer]
    rewards: Tensor

    @property
    def zero_variance(self) -> float:
        """Share of sampled answers in groups that all got the same reward and so teach nothing."""
        return 1 - len(self.kept) / len(self.sampled)


def reward(answer: Answer, format_weight: float) -> float:
    """1 for a right answer, plus `format_weight` for a well-formed one."""
    return float(answer.correct) + format_weight * float(answer.formed)


def sample_groups(
    engine: Engine,
    tokenizer: Tokenizer,
    mixture: Mixture,
    *,
    seed: int,
    first: int,
    prompts: int,
    samples: int,
    rounds: int,
    max_tokens: int,
    temperature: float,
    format_weight: float,
) -> Groups:
    """`samples` answers to each of `prompts` training problems; groups without variance are replaced by fresh problems.

    Problems are numbered from `first`, at most `rounds * prompts` of them, so that a step's problems follow from its
    number. What is missing after the last round stays missing.
    """
    kept: list[Answer] = []
    advantages: list[Tensor] = []
    sampled: list[Answer] = []
    rewards: list[Tensor] = []
    for round_ in range(rounds):
        wanted = prompts - len(kept) // samples
        start = first + round_ * prompts
        problems = [mixture.draw("train", seed, start + i) for i in range(wanted)]
        answers = ask(
            engine,
            tokenizer,
            problems,
            max_tokens=max_tokens,
            samples=samples,
            temperature=temperature,
            seed=(seed << 32) + start * samples,
        )
        scores = torch.tensor([reward(answer, format_weight) for answer in answers])
        sampled += answers
        rewards.append(scores)
        uneven = scores.view(-1, samples).std(dim=1) > 0
        kept += [answer for i, answer in enumerate(answers) if uneven[i // samples]]
        advantages.append(group_advantages(scores, samples)[uneven.repeat_interleave(samples)])
        if len(kept) == prompts * samples:
            break
    return Groups(kept=kept, advantages=torch.cat(advantages), sampled=sampled, rewards=torch.cat(rewards))


def pack(
    answers: Sequence[Answer], advantages: Tensor, tokenizer: Tokenizer, *, length: int, rows_multiple: int
) -> PolicyBatch:
    """Prompts and answers in packed rows. Truncated answers keep weight 0: their end is unknown, so is their worth."""
    sequences = []
    for answer in answers:
        made = 0.0 if answer.truncated else 1.0
        ids = answer.prompt + answer.completion.ids
        sequences.append((ids, [0.0] * len(answer.prompt) + [made] * len(answer.completion.ids)))
    packed = pack_rows(sequences, length=length, rows_multiple=rows_multiple, pad_id=tokenizer.pad_id)
    advantage_BT = torch.zeros_like(packed.batch.weight_BT)
    sampled_BT = torch.zeros_like(packed.batch.weight_BT)
    for answer, advantage, row, start in zip(answers, advantages.tolist(), packed.rows, packed.starts, strict=True):
        begin = start + len(answer.prompt)
        end = begin + len(answer.completion.ids)
        advantage_BT[row, begin:end] = advantage
        sampled_BT[row, begin:end] = torch.tensor(answer.completion.logprobs)
    return PolicyBatch(batch=packed.batch, advantage_BT=advantage_BT, sampled_BT=sampled_BT)
