"""Which rows fill a target of tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

# Rows that may be passed over, one after another, in search of one that fits what is left.
_PATIENCE = 1000


@kernel
def take(
    tokens: npt.NDArray[np.int32], order: npt.NDArray[np.int64], target: int, copies: npt.NDArray[np.int32]
) -> int:
    """Adds a copy of rows, in order, until their tokens are as near to the target as they come.

    A row is taken if it brings the sum closer to the target, so that a row larger than what is left is passed over and
    does not end the filling early.

    Args:
        tokens: of all rows, int32 of shape (n,).
        order: indices of the rows to choose from, the best first.
        target: tokens wanted.
        copies: of all rows, int32 of shape (n,); one is added to each row that is taken.

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
