"""The COMET scorer: any quality estimation checkpoint of unbabel-comet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.errors import RunError


class CometScorer:
    def __init__(self, model: str, batch_size: int) -> None:
        try:
            import comet  # noqa: F401
        except ImportError:
            raise RunError("The comet scorer needs COMET. Install it with pip install 'corpusprep[comet]'.") from None

    def score(self, table: pa.Table) -> npt.NDArray[np.float32]:
        raise NotImplementedError
