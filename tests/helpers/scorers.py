"""A scorer for tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from corpusprep.arrow import hash_strings


def by_hash(table: pa.Table) -> np.ndarray:
    """A score in [0, 1) that text alone decides, and length does not."""
    return (hash_strings(table["src"], 7) >> np.uint64(40)).astype(np.float64) / 2**24
