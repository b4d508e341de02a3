"""The COMET scorer: quality estimation checkpoints of COMET (Rei et al. 2020, 2022) without COMET, which they outrun.

A window of rows is cut into slices of texts of like length; the next slices are tokenised in a thread while the model is at
work on one. Within a slice, rows of the same number of tokens stand side by side, so that nothing is padded, and go through
the model in batches of a budget of tokens.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import RunError
from corpusprep.stages.quality.comet.files import CometFiles, line

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

WINDOW = 1 << 16
"""Rows whose order decides the batches."""
_SLICE = 8192  # texts tokenised at once
_FIRST = 1024  # of the first slice, for which the model waits; each next one is twice as large
_AHEAD = 2  # slices tokenised before they are wanted
_HEAD_ROWS = 16_384  # embeddings compared at once


class CometScorer:
    """A COMET model, on the GPU if there is one.

    Args:
        files: the model's files, as `find_model` finds them.
        precision: `fp32`, `bf16`, or `auto`, which is bf16 on a GPU that computes in it, else fp32.
        batch_tokens: tokens a batch; by default 65,536 on a GPU, 4,096 without.
        kernels: whether kernels of our own are used where they can be.

    Attributes:
        device: `cuda` or `cpu`.
        precision: what the encoder computes in, `fp32` or `bf16`.
        tokens: tokens that went through the model so far.

    Raises:
        RunError: torch is not installed, or the model is not one that can be read here.
    """

    def __init__(
        self, files: CometFiles, precision: str = "auto", batch_tokens: int | None = None, kernels: bool = True
    ) -> None:
        torch = import_torch()
        from corpusprep.stages.quality.comet.model import CometModel
        from corpusprep.stages.quality.comet.tokens import CometTokenizer

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = precision_of(precision)
        self.tokens = 0
        with torch.inference_mode():
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            self._model = CometModel(files, dtype, torch.device(self.device), kernels_of(kernels))
        self._tokenizer = CometTokenizer(files.tokenizer, self._model.limit)
        shape = self._model.encoder.shape
        self._tokenizer.check(files.tokenizer, shape.vocabulary, shape.pad)
        self._batch_tokens = batch_tokens or (65_536 if self.device == "cuda" else 4096)

    def score(self, table: pa.Table) -> F32:
        """The model's score of each row as COMET's own `predict` gives it, `src` being the source; shape (n,).

        The scale is the model's own. A side that is longer than the model's window is cut, and a null is an empty side.
        """
        src, tgt = (_strings(table, side) for side in ("src", "tgt"))
        scores = np.empty(table.num_rows, np.float32)
        score = self._score_pairs if self._model.joint else self._compare
        for start in range(0, table.num_rows, WINDOW):
            window = slice(start, min(start + WINDOW, table.num_rows))
            count = window.stop - window.start
            scores[window] = score(src.slice(start, count), tgt.slice(start, count))
        return scores

    def _score_pairs(self, src: pa.Array[Any], tgt: pa.Array[Any]) -> F32:
        def tokens(rows: pa.Array[Any]) -> Any:
            return self._tokenizer.pairs(_taken(tgt, rows), _taken(src, rows))

        lengths = _bytes(src) + _bytes(tgt)
        return self._gather(
            len(src), ((rows, self._model.score(found)) for rows, found in self._embed(lengths, tokens))
        )

    def _compare(self, src: pa.Array[Any], tgt: pa.Array[Any]) -> F32:
        """Scores of rows whose sides are embedded on their own: each text once, however often it stands in the window."""
        import torch

        both: Any = pa.concat_arrays([src, tgt]).dictionary_encode()
        texts = both.dictionary
        places = torch.from_numpy(both.indices.to_numpy().astype(np.int64))
        embeddings = torch.empty((len(texts), self._model.hidden), dtype=torch.float32, device=self.device)

        def tokens(rows: pa.Array[Any]) -> Any:
            return self._tokenizer.texts(_taken(texts, rows))

        with torch.inference_mode():
            for rows, embedded in self._embed(_bytes(texts), tokens):
                embeddings[torch.from_numpy(rows).to(self.device)] = embedded

        def compared() -> Iterator[tuple[I64, Any]]:
            for start in range(0, len(src), _HEAD_ROWS):
                rows = np.arange(start, min(start + _HEAD_ROWS, len(src)))
                sides = torch.stack((places[len(src) + rows], places[rows]), 1).to(self.device)
                yield rows, self._model.score(embeddings[sides])

        return self._gather(len(src), compared())

    def _gather(self, count: int, found: Iterable[tuple[I64, Any]]) -> F32:
        """Scores of all rows on the CPU: nothing waits for the GPU before the last batch is on its way."""
        import torch

        scores = np.empty(count, np.float32)
        with torch.inference_mode():
            rows, parts = zip(*found, strict=True)
            scores[np.concatenate(rows)] = torch.cat(parts).cpu().numpy()
        return scores

    def _embed(self, lengths: I64, tokens: Callable[[pa.Array[Any]], Any]) -> Iterator[tuple[I64, Any]]:
        """Rows and their embeddings, batch by batch: the longest texts first, as what does not fit shows at once."""
        order = np.argsort(-lengths, kind="stable")
        slices = [order[part] for part in _slices(len(order))]
        with ThreadPoolExecutor(1, "tokenise") as thread:
            ahead: deque[Future[Any]] = deque()
            waiting = iter(slices)
            for rows in slices:
                while len(ahead) <= _AHEAD and (coming := next(waiting, None)) is not None:
                    ahead.append(thread.submit(tokens, pa.array(coming)))
                found = ahead.popleft().result()
                by_tokens = np.argsort(-found.lengths, kind="stable")
                for batch in batches(found.lengths[by_tokens], self._batch_tokens):
                    chosen = by_tokens[batch]
                    yield rows[chosen], self._forward(found, chosen)

    def _forward(self, tokens: Any, rows: I64) -> Any:
        """Embeddings of rows of tokens that stand in the order of their lengths."""
        import torch

        try:
            embedded = self._model.embed(self._batch(tokens, rows))
            self.tokens += int(tokens.lengths[rows].sum())
            return embedded
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise RunError(f"The comet scorer's model does not fit the GPU's memory: {line(error)}") from None
        half = len(rows) // 2  # below the handler: while that runs, the error holds the failed batch's tensors
        return torch.cat([self._forward(tokens, rows[:half]), self._forward(tokens, rows[half:])])

    def _batch(self, tokens: Any, rows: I64) -> Any:
        import torch

        from corpusprep.stages.quality.comet.model import Batch
        from corpusprep.stages.quality.comet.tokens import gather

        lengths = tokens.lengths[rows]
        begins = np.cumsum(lengths) - lengths
        edges = np.flatnonzero(np.diff(lengths, prepend=-1))
        counts = np.diff(edges, append=len(rows))
        groups = zip(begins[edges].tolist(), counts.tolist(), lengths[edges].tolist(), strict=True)
        bounds = np.append(begins, begins[-1] + lengths[-1]).astype(np.int32)
        arrays = [*gather(tokens.ids, tokens.offsets, rows, self._model.pad), bounds]
        sent: list[Any] = [torch.from_numpy(array) for array in arrays]
        if self.device == "cuda":  # from pinned memory, a copy does not wait for the batch that is being computed
            sent = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in sent]
        ids, positions, limits = sent
        return Batch(ids, positions, limits, limits[:-1].long(), tuple(groups))


def _slices(count: int) -> Iterator[slice]:
    start, size = 0, min(_FIRST, _SLICE)
    while start < count:
        yield slice(start, min(start + size, count))
        start, size = start + size, min(2 * size, _SLICE)


def batches(lengths: I64, budget: int) -> Iterator[slice]:
    """Stretches of rows of at most a budget of tokens, one row at least.

    Args:
        lengths: tokens of each row, (n,).
        budget: tokens.
    """
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, before + budget, side="right")), start + 1)
        yield slice(start, end)
        start = end


def import_torch() -> Any:
    """The module torch.

    Raises:
        RunError: it is not installed, or cannot be imported.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise RunError(f"PyTorch is installed, but cannot be imported: {line(error)}") from error
        raise RunError("The comet scorer needs PyTorch. Install it with pip install 'corpusprep[quality]'.") from None
    except (ImportError, OSError) as error:
        raise RunError(f"PyTorch is installed, but cannot be imported: {line(error)}") from error
    return torch


def check(files: CometFiles) -> None:
    """Looks at all of a model's files but its weights.

    Raises:
        RunError: the model is not one that can be read here.
    """
    from corpusprep.stages.quality.comet.model import shape_of
    from corpusprep.stages.quality.comet.tokens import CometTokenizer

    shape = shape_of(files)
    CometTokenizer(files.tokenizer, shape.positions - 2).check(files.tokenizer, shape.vocabulary, shape.pad)


def precision_of(asked: str) -> str:
    """`fp32` or `bf16`: what is computed in where a setting says `asked`."""
    if asked != "auto":
        return asked
    torch = import_torch()
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def kernels_of(asked: bool) -> bool:
    """Whether kernels of our own are used where a setting says `asked`: they need a GPU, and Triton a C compiler."""
    gpu = import_torch().cuda
    if not asked or not gpu.is_available() or gpu.get_device_capability() < (8, 0):
        return False
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return compiler is not None and importlib.util.find_spec("triton") is not None


def _strings(table: pa.Table, side: str) -> pa.Array[Any]:
    column: Any = table[side].cast(pa.large_string())
    return pa.concat_arrays(column.fill_null("").chunks or [pa.array([], pa.large_string())])


def _taken(texts: pa.Array[Any], rows: pa.Array[Any]) -> list[str]:
    found: list[Any] = texts.take(rows).to_pylist()
    return found


def _bytes(texts: Any) -> I64:
    return np.asarray(pc.binary_length(texts)).astype(np.int64)
