"""The RL doctor: vital signs of a step to plain words. It reads figures and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NORMAL = (
    "a loss near 0 is normal in RL: the advantages of a group sum to 0. Watch accuracy on unseen problems, not the loss"
)

# figure, limit, what it means and what helps; a sign is given where the figure exceeds its limit.
SIGNS: tuple[tuple[str, float, str], ...] = (
    ("zero_variance", 0.8, "of the groups got one reward and teach nothing: make problems harder or easier"),
    ("truncated", 0.1, "of the answers were cut off: raise `max_tokens`, or demonstrate shorter thoughts"),
    ("unformed", 0.2, "of the answers are not well-formed (they never end): more SFT, or a `format_weight`"),
    ("clipped", 0.2, "of the tokens moved beyond the clip range: lower the learning rate or `updates`"),
)  # fmt: skip
SAMPLER_KL, REFERENCE_KL, LOAD, ENTROPY = 0.05, 0.5, 2.0, 0.005


def examine(line: Mapping[str, Any]) -> list[str]:
    """Warnings about one metrics line of stage `rl`; none if all is well."""
    found = [f"{line[name]:.0%} {words}" for name, limit, words in SIGNS if line.get(name, 0.0) > limit]
    if "loss" not in line:
        found.append("no group had unequal rewards: nothing was learnt in this step")
        return found
    # Rejection sampling maximises a likelihood: it knows neither the sampler's policy nor an entropy.
    if line.get("sampler_kl", 0.0) > SAMPLER_KL:
        found.append(
            f"sampler and trainer disagree (KL {line['sampler_kl']:.2g}): expected below {SAMPLER_KL}; "
            "bf16 routing can flip, fp32 compute removes it"
        )
    if line.get("kl", 0.0) > REFERENCE_KL:
        found.append(f"far from the reference (KL {line['kl']:.2g}): raise `kl_weight` or lower the learning rate")
    if line.get("entropy", 1.0) < ENTROPY and line["correct"] < 0.9:
        found.append(
            f"entropy {line['entropy']:.4f}: the model tries nothing new any more; start from an earlier checkpoint"
        )
    if max(line["load_max_mean"], default=0.0) > LOAD:
        busiest = max(line["load_max_mean"])
        found.append(f"the busiest expert sees {busiest:.1f} times the mean: raise `balance_speed`")
    return found
