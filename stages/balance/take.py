"""Selects rows that fill a token target."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

# Maximum number of consecutive rows that are skipped in search of one that fits.
_PATIENCE = 1000


@kernel
def take(
    tokens: npt.NDArray[np.int32], order: npt.NDArray[np.int64], target: int, copies: npt.NDArray[np.int32]
) -> int:
    """Adds one copy of rows, in order, until their tokens are as close to the target as possible.

    A row is taken if it brings the sum closer to the target. A row that is too large is skipped, so that it does not
    end the selection early.

    Args:
        tokens: tokens of each row, int32 of shape (n,).
        order: indices of the candidate rows, best first.
        target: number of tokens to reach.
        copies: copies of each row, int32 of shape (n,); increased by 1 for each row that is taken.

    Returns:
        The sum of tokens taken.
    """
    total = 0
    passed = 0
    for row in order:
        left = target - total
        if left <= 0 or passed >= _PATIENCE:
            break
        if tokens[row] < 2 * left:
            copies[row] += 1
            total += tokens[row]
            passed = 0
        else:
            passed += 1
    return total
