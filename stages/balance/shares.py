"""The arithmetic of a budget: exact, in whole tokens, and the same whatever the order of its input."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction


def fill(total: int, weights: Sequence[int], floors: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Shares `total` out in proportion to the weights, within a floor and a cap each.

    This is the limit of handing out shares, cutting them at the caps and handing what is left over round again in the
    same proportion: every share is `min(cap, max(floor, level * weight))` with one level for all.

    Args:
        total: whole tokens, at least the sum of floors.
        weights: of k shares, at least 0. A share without weight gets its floor.
        floors, caps: whole tokens, 0 <= floor <= cap.

    Returns:
        k whole numbers whose sum is `total`, or all that caps and weights allow.
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

    # The sum grows with the level, along a straight line between two neighbouring bends: find the line that meets it.
    bends = sorted({Fraction(bound, weights[i]) for i in open_ for bound in (floors[i], caps[i])})
    wanted = Fraction(rest + sum(floors[i] for i in open_))
    upper = bends[bisect_left(bends, wanted, key=given)]
    free = [i for i in open_ if Fraction(floors[i], weights[i]) < upper <= Fraction(caps[i], weights[i])]
    fixed = sum(floors[i] if Fraction(floors[i], weights[i]) >= upper else caps[i] for i in open_ if i not in free)
    level = (wanted - fixed) / sum(weights[i] for i in free)
    for i in open_:
        shares[i] = int(min(Fraction(caps[i]), max(Fraction(floors[i]), level * weights[i])))
    # What rounding down has left goes to the largest remainders, one token each.
    ranked = sorted(free, key=lambda i: (shares[i] - level * weights[i], i))
    for i in ranked[: total - sum(shares)]:
        shares[i] += 1
    return shares


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of 40 bits: the last bit of a power may differ between machines, a plan must not."""
    largest = max(weights, default=0.0)
    return [max(1, round(weight / largest * 2**40)) if weight > 0 else 0 for weight in weights]
