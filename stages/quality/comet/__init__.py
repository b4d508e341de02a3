"""The COMET scorer: runs quality estimation checkpoints of COMET (Rei et al. 2020, 2022) without COMET, and faster.

A window of rows is split into slices of texts with similar lengths. A thread tokenises the next slices while the model
processes one. Within a slice, rows with the same number of tokens are adjacent, so that nothing is padded. The model
processes them in batches with a maximum number of tokens.
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
"""Rows that are divided into batches together."""
_SLICE = 8192  # texts tokenised at once
_FIRST = 1024  # texts of the first slice, for which the model waits; each next slice is twice as large
_AHEAD = 2  # slices tokenised in advance
_HEAD_ROWS = 16_384  # embeddings compared at once


class CometScorer:
    """A COMET model, on the GPU if there is one.

    Args:
        files: the model's files, as `find_model` finds them.
        precision: `fp32`, `bf16`, or `auto`, which is bf16 on a GPU that supports it, else fp32.
        batch_tokens: tokens per batch; by default 65,536 on a GPU, 4,096 without.
        kernels: whether to use the built-in kernels if possible.

    Attributes:
        device: `cuda` or `cpu`.
        precision: precision of the encoder, `fp32` or `bf16`.
        tokens: number of tokens that the model has processed.

    Raises:
        RunError: torch is not installed, or the model cannot be read or is not supported.
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
        """The model's score of each row, as from COMET's `predict`, with `src` as the source; shape (n,).

        The scale depends on the model. A side that is longer than the model's window is truncated; null is empty text.
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
        """Scores rows whose sides are embedded separately. Each distinct text of the window is embedded once."""
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
        """Scores of all rows, on the CPU. Nothing waits for the GPU until the last batch is submitted."""
        import torch

        scores = np.empty(count, np.float32)
        with torch.inference_mode():
            rows, parts = zip(*found, strict=True)
            scores[np.concatenate(rows)] = torch.cat(parts).cpu().numpy()
        return scores

    def _embed(self, lengths: I64, tokens: Callable[[pa.Array[Any]], Any]) -> Iterator[tuple[I64, Any]]:
        """Rows and their embeddings, by batch. The longest texts come first, so that a lack of memory shows at once."""
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
        """Embeddings of rows of tokens, which must be sorted by length."""
        import torch

        try:
            embedded = self._model.embed(self._batch(tokens, rows))
            self.tokens += int(tokens.lengths[rows].sum())
            return embedded
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise RunError(f"The comet scorer's model does not fit the GPU's memory: {line(error)}") from None
        half = len(rows) // 2  # after the handler: within it, the error keeps the failed batch's tensors in memory
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
        if self.device == "cuda":  # a copy from pinned memory does not wait for the current batch
            sent = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in sent]
        ids, positions, limits = sent
        return Batch(ids, positions, limits, limits[:-1].long(), tuple(groups))


def _slices(count: int) -> Iterator[slice]:
    start, size = 0, min(_FIRST, _SLICE)
    while start < count:
        yield slice(start, min(start + size, count))
        start, size = start + size, min(2 * size, _SLICE)


def batches(lengths: I64, budget: int) -> Iterator[slice]:
    """Splits rows into runs with at most `budget` tokens, or of one row.

    Args:
        lengths: tokens of each row, (n,).
        budget: maximum number of tokens of a run.
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
        RunError: torch is not installed, or cannot be imported.
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
    """Checks all files of a model, except its weights.

    Raises:
        RunError: the model cannot be read or is not supported.
    """
    from corpusprep.stages.quality.comet.model import shape_of
    from corpusprep.stages.quality.comet.tokens import CometTokenizer

    shape = shape_of(files)
    CometTokenizer(files.tokenizer, shape.positions - 2).check(files.tokenizer, shape.vocabulary, shape.pad)


def precision_of(asked: str) -> str:
    """The precision for the setting `asked`: `fp32` or `bf16`."""
    if asked != "auto":
        return asked
    torch = import_torch()
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def kernels_of(asked: bool) -> bool:
    """Whether the built-in kernels are used for the setting `asked`: they need a GPU, Triton and a C compiler."""
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
