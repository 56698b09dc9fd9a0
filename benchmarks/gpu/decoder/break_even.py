"""Speculation: tokens a round by acceptance, and the acceptance from which a round pays.

With random weights a draft is accepted by chance alone, so what is measured is the time of a round
of k drafts. How many tokens it emits depends on the acceptance, which is a property of real models
and their text. With each draft accepted with probability a, independently, a round emits the
accepted drafts and one token more:

    E(a, k) = 1 + a + ... + a^k = (1 - a^(k + 1)) / (1 - a)

Source: Leviathan et al. 2023, arXiv 2211.17192, equation 1.
"""

from __future__ import annotations

_STEPS = 60  # of bisection: 2^-60 of [0, 1] is less than an ulp


def tokens_per_round(acceptance: float, drafts: int) -> float:
    """Expected tokens of a round.

    Args:
        acceptance: of a draft, in [0, 1].
        drafts: in a round, at least 1.

    Raises:
        ValueError: names the argument, what it got and what it wanted.
    """
    if not 0.0 <= acceptance <= 1.0:
        raise ValueError(f"acceptance must be in [0, 1], got {acceptance}")
    if drafts < 1:
        raise ValueError(f"drafts must be at least 1, got {drafts}")
    # Horner's rule; the quotient above is 0 / 0 at acceptance 1.
    total = 1.0
    for _ in range(drafts):
        total = 1.0 + acceptance * total
    return total


def break_even(round_seconds: float, step_seconds: float, drafts: int) -> float | None:
    """The smallest acceptance at which rounds give as many tokens a second as plain steps.

    Args:
        round_seconds: of a round of ``drafts`` drafts, for any number of accepted ones.
        step_seconds: of the plain step that it is compared with, which gives one token.
        drafts: in a round, at least 1.

    Returns:
        In [0, 1]; None where not even ``drafts + 1`` tokens a round make up for its time.

    Raises:
        ValueError: a time that is not positive.
    """
    for name, seconds in (("round_seconds", round_seconds), ("step_seconds", step_seconds)):
        if not seconds > 0.0:
            raise ValueError(f"{name} must be positive, got {seconds}")
    needed = round_seconds / step_seconds
    if needed > drafts + 1:
        return None
    low, high = 0.0, 1.0
    if tokens_per_round(low, drafts) >= needed:
        return low
    # Tokens grow with the acceptance: [low, high] always holds the answer.
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if tokens_per_round(middle, drafts) >= needed:
            high = middle
        else:
            low = middle
    return high
