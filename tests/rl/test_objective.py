"""The policy objective against its formula, term by term, and its gradient against the textbook's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from glasklar.data.batches import Batch
from glasklar.learn.objectives import LanguageConfig
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer
from glasklar.rl.doctor import examine
from glasklar.rl.objective import PolicyBatch, PolicyConfig, group_advantages, k3, policy_loss, token_logprobs

PLAIN = LanguageConfig(mtp_weight=0.0, balance_weight=0.0)


@pytest.fixture
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, initializer_range=0.5,
    )  # fmt: skip
    return initialise(build(config), 0)


def rollouts(model: Transformer, shift: float = 0.0) -> PolicyBatch:
    """One row of 8 tokens, 3 of the prompt; `shift` moves the sampler's log-probabilities away from the model's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (1, 8), generator=generator)
    weight = torch.tensor([[0.0, 0, 0, 1, 1, 1, 1, 1]])
    batch = Batch(ids_BT=ids, segments_BT=torch.zeros_like(ids), position_BT=torch.arange(8)[None], weight_BT=weight)
    advantage = torch.tensor([[0.0, 0, 0, 0.5, 0.5, -0.25, -0.25, 0.5]])
    sampled = token_logprobs(model, batch) + shift * weight
    return PolicyBatch(batch=batch, advantage_BT=advantage, sampled_BT=sampled)


def test_advantages_sum_to_zero_in_each_group_and_keep_their_scale() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 4)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]


def test_on_policy_gradient_is_that_of_weighted_likelihood(model: Transformer) -> None:
    data = rollouts(model)
    policy_loss(model, data, PolicyConfig(), PLAIN).total.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    batch = data.batch
    at = model.at(batch.position_BT, torch.triu(torch.full((1, 8, 8), -math.inf), 1))
    logprobs = model.logits(model(batch.ids_BT, at).hidden_BTD).log_softmax(-1)
    picked = logprobs[0, torch.arange(7), batch.ids_BT[0, 1:]]
    (-(picked * data.advantage_BT[0, 1:])[2:].sum() / 5).backward()
    textbook = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(ours, textbook, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -0.1, 0.1, -0.5, 0.5])
def test_clipping_against_the_formula(model: Transformer, shift: float) -> None:
    data, config = rollouts(model, shift), PolicyConfig(clip_low=0.2, clip_high=0.28)
    ratio = math.exp(-shift)
    clipped = min(max(ratio, 0.8), 1.28)
    wanted = -sum(min(ratio * a, clipped * a) for a in (0.5, 0.5, -0.25, -0.25, 0.5)) / 5
    assert policy_loss(model, data, config, PLAIN).parts["loss"] == pytest.approx(wanted, rel=1e-4)


def test_tokens_of_weight_zero_do_not_count(model: Transformer) -> None:
    data = rollouts(model)
    weight = data.batch.weight_BT.clone()
    weight[0, 5:] = 0  # a truncated answer
    masked = replace(data, batch=replace(data.batch, weight_BT=weight))
    assert policy_loss(model, masked, PolicyConfig(), PLAIN).parts["loss"] == pytest.approx(-0.5, rel=1e-4)


def test_k3_is_never_negative_and_its_mean_is_the_kl() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    estimate = k3((q / p).log())
    assert (estimate >= 0).all()
    torch.testing.assert_close((p * estimate).sum(), (p * (p / q).log()).sum())


def test_kl_penalty_pulls_towards_the_reference(model: Transformer) -> None:
    data = rollouts(model)
    away = replace(data, reference_BT=data.sampled_BT + 0.3 * data.batch.weight_BT, advantage_BT=data.advantage_BT * 0)
    config = PolicyConfig(kl_weight=1.0)
    loss = policy_loss(model, away, config, PLAIN)
    assert loss.parts["kl"] == pytest.approx(math.exp(0.3) - 0.3 - 1, rel=1e-4)
    before = token_logprobs(model, data.batch)[0, 3:].sum()
    loss.total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert token_logprobs(model, data.batch)[0, 3:].sum() > before


def test_the_doctor_speaks_only_when_something_is_wrong() -> None:
    well = {
        "loss": 0.01, "zero_variance": 0.2, "truncated": 0.0, "unformed": 0.01, "clipped": 0.01, "sampler_kl": 1e-4,
        "entropy": 0.1, "correct": 0.6, "load_max_mean": [1.2, 1.1],
    }  # fmt: skip
    assert examine(well) == []
    for name, value, word in (
        ("zero_variance", 0.95, "teach nothing"),
        ("truncated", 0.5, "max_tokens"),
        ("unformed", 0.5, "well-formed"),
        ("sampler_kl", 0.2, "disagree"),
        ("kl", 2.0, "kl_weight"),
        ("entropy", 0.001, "nothing new"),
        ("load_max_mean", [3.0], "balance_speed"),
    ):
        [warning] = examine({**well, name: value})
        assert word in warning, name
    assert "nothing was learnt" in examine({"zero_variance": 0.5})[0]
