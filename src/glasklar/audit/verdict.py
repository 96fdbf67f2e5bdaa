"""One honest sentence on what reinforcement did, chosen from measured figures alone."""

from __future__ import annotations

from dataclasses import dataclass

SMALL = 0.05  # differences up to five points are taken for noise: about two standard errors of 500 problems


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Shares of right answers, means over the tasks. Before RL also with thinking forced and the best of 16 samples;
    None where that was not measured."""

    greedy_before: float
    greedy_after: float
    thinking_before: float | None
    pass16_before: float | None


def what_rl_did(figures: Measured) -> str:
    """A switch of mode, a sharpening, a new skill, or nothing; both shares of the gain where it was two of them.

    switch of mode   the model could already do it when made to think; RL taught it to think
    sharpening       one of 16 samples was right already; RL made that the rule
    new skill        after RL more is right than the best of 16 samples was before
    """
    before, after = figures.greedy_before, figures.greedy_after
    thinking, best = figures.thinking_before, figures.pass16_before
    change = f"greedy answers went from {before:.0%} to {after:.0%} right"
    if after < before - SMALL:
        return f"RL did harm: {change}."
    if after - before <= SMALL:
        return f"RL changed little: {change}, which is within the noise of the evaluation."
    if best is not None and after > best + SMALL:
        return (
            f"RL taught a new skill: {change}, more than the best of 16 samples reached before it ({best:.0%}); "
            "that much was not in the model to be picked out."
        )
    if thinking is not None and thinking >= after - SMALL:
        return (
            f"RL was a switch of mode, not a new skill: {change}, and made to think the model was right in "
            f"{thinking:.0%} already before it{_best(best)}; RL taught it to choose thinking."
        )
    if thinking is not None and thinking > before + SMALL:
        share = (thinking - before) / (after - before)
        return (
            f"RL did two things: {change}; about {share:.0%} of the gain is a switch of mode (made to think, the model "
            f"was right in {thinking:.0%} already before it), the rest {_rest(best)}."
        )
    if best is None:
        return f"RL helped: {change}; whether by a new skill cannot be said, since pass@16 before it was not measured."
    return (
        f"RL sharpened what was there: {change}; made to think the model did no better before it, but the best of 16 "
        f"samples was right in {best:.0%}. RL made the exception the rule."
    )


def _best(best: float | None) -> str:
    return "" if best is None else f" (the best of 16 samples in {best:.0%})"


def _rest(best: float | None) -> str:
    if best is None:
        return "is more reliable or new work; pass@16 before RL, which would tell, was not measured"
    return f"is greater reliability, since the best of 16 samples was right in {best:.0%} before"
