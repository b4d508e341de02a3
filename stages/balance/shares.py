"""Exact arithmetic for a budget, in whole tokens. The result does not depend on the order of the input."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction


def fill(total: int, weights: Sequence[int], floors: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to the weights, with a floor and a cap for each share.

    Each share is `min(cap, max(floor, level * weight))`, with the same level for all shares. This is the limit of
    dividing in proportion, cutting shares at their caps, and dividing the excess again in the same proportion.

    Args:
        total: whole tokens, at least the sum of floors.
        weights: of k shares, at least 0. A share with weight 0 gets its floor.
        floors, caps: whole tokens, 0 <= floor <= cap.

    Returns:
        k whole numbers that sum to `total`, or to the most that caps and weights allow.
    """
    shares = list(floors)
    open_ = [i for i, weight in enumerate(weights) if weight > 0 and caps[i] > floors[i]]
    rest = total - sum(shares)
    if rest >= sum(caps[i] - floors[i] for i in open_):
        for i in open_:
            shares[i] = caps[i]
        return shares
    if rest <= 0 or not open_:
        return shares

    def given(level: Fraction) -> Fraction:
        return sum((min(Fraction(caps[i]), max(Fraction(floors[i]), level * weights[i])) for i in open_), Fraction(0))

    # The sum is piecewise linear in the level and grows with it. Find the segment in which it reaches the wanted sum.
    bends = sorted({Fraction(bound, weights[i]) for i in open_ for bound in (floors[i], caps[i])})
    wanted = Fraction(rest + sum(floors[i] for i in open_))
    upper = bends[bisect_left(bends, wanted, key=given)]
    free = [i for i in open_ if Fraction(floors[i], weights[i]) < upper <= Fraction(caps[i], weights[i])]
    fixed = sum(floors[i] if Fraction(floors[i], weights[i]) >= upper else caps[i] for i in open_ if i not in free)
    level = (wanted - fixed) / sum(weights[i] for i in free)
    for i in open_:
        shares[i] = int(min(Fraction(caps[i]), max(Fraction(floors[i]), level * weights[i])))
    # The tokens lost by rounding down go to the largest remainders, one token each.
    ranked = sorted(free, key=lambda i: (shares[i] - level * weights[i], i))
    for i in ranked[: total - sum(shares)]:
        shares[i] += 1
    return shares


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as 40-bit integers: the last bit of a power can differ between machines, but a plan must not."""
    largest = max(weights, default=0.0)
    return [max(1, round(weight / largest * 2**40)) if weight > 0 else 0 for weight in weights]
