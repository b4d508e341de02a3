"""Runs COMET checkpoints with unbabel-comet: for model classes that the comet scorer lacks, and for comparison."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import RunError
from corpusprep.stages.quality.comet.files import find_checkpoint, line, needs_reference, read_hparams, unreadable

F32 = npt.NDArray[np.float32]


class UnbabelScorer:
    """A COMET model, on the GPU if there is one.

    Args:
        model: name on the Hugging Face hub, folder, or `.ckpt` file in such a folder.
        batch_size: maximum rows per batch.

    Raises:
        RunError: COMET is not installed, the model cannot be loaded, or it needs a reference.
    """

    def __init__(self, model: str, batch_size: int) -> None:
        with _quiet():
            import_comet()
            import torch

            checkpoint = find_checkpoint(model)
            self._model = _load(checkpoint, read_hparams(checkpoint))
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._model.to(self._device).eval()
        self._batch_size = batch_size

    def score(self, table: pa.Table) -> F32:
        """The model's score of each row, as from COMET's `predict`, with `src` as the source; shape (n,).

        The scale depends on the model. A side that is longer than the model's window is truncated; null is empty text.
        """
        import torch

        src, tgt = (_texts(table, side) for side in ("src", "tgt"))
        # Rows with similar lengths share a batch; otherwise most of it would be padding. The longest rows come first,
        # so that a lack of memory shows at once. Lengths are in bytes: a token has about as many bytes in each script.
        lengths = np.asarray(pc.binary_length(src)) + np.asarray(pc.binary_length(tgt))
        order = np.argsort(-lengths, kind="stable")
        rows = [{"src": s, "mt": t} for s, t in zip(src.to_pylist(), tgt.to_pylist(), strict=True)]
        scores = np.empty(len(rows), np.float32)
        with _quiet(), torch.inference_mode():
            for start in range(0, len(rows), self._batch_size):
                batch = order[start : start + self._batch_size]
                scores[batch] = self._predict([rows[i] for i in batch])
        return scores

    def _predict(self, rows: list[dict[str, str]]) -> F32:
        """Scores a batch like `predict`, without the Trainer, its workers and its progress bar."""
        import torch

        try:
            batch = self._model.prepare_for_inference(rows)
            batch = self._model.transfer_batch_to_device(batch, self._device, 0)
            return np.asarray(self._model.predict_step(batch)["scores"].float().cpu().numpy(), np.float32)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise RunError(f"The comet scorer's model does not fit the GPU's memory: {line(error)}") from None
        half = len(rows) // 2  # after the handler: within it, the error keeps the failed batch's tensors in memory
        return np.concatenate([self._predict(rows[:half]), self._predict(rows[half:])])


def _texts(table: pa.Table, side: str) -> pa.ChunkedArray[Any]:
    column: Any = table[side].cast(pa.string())
    filled: pa.ChunkedArray[Any] = column.fill_null("")
    return filled


def import_comet() -> None:
    """Imports COMET.

    Raises:
        RunError: COMET is not installed, or cannot be imported.
    """
    try:
        import comet  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "comet":
            raise _broken(error) from error
        raise RunError(
            "quality.backend = \"unbabel\" needs COMET. Install it with pip install 'corpusprep[comet]' in a separate "
            "environment, or remove quality.backend."
        ) from None
    except ImportError as error:
        raise _broken(error) from error


def _broken(error: ImportError) -> RunError:
    return RunError(
        f"COMET is installed, but cannot be imported: {line(error)} It needs old versions of other packages. "
        "To get them, run pip install 'corpusprep[comet]' in a separate environment."
    )


def _load(checkpoint: Path, hparams: dict[str, Any]) -> Any:
    """The model of a checkpoint, on the CPU."""
    weights, encoder = _contents(checkpoint)
    try:
        model = _open(checkpoint)
    except OSError as error:
        raise RunError(
            f"{checkpoint}: the tokenizer and config.json of its encoder, {encoder}, are not in the local cache and "
            f"cannot be downloaded: {line(error)} Run once with network access. Or run hf download {encoder} on a "
            "machine with network access, and set HF_HOME to a copy of its cache."
        ) from error
    except Exception as error:  # a model from an unknown file can raise any error
        raise unreadable(checkpoint, error) from error
    # COMET does not load strictly, because old checkpoints have buffers that encoders no longer have. A weight that is
    # missing in a checkpoint would keep its random initial value.
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    if missing:
        raise RunError(
            f"{checkpoint} is incomplete or does not match its hparams.yaml: {len(missing)} of the model's weights are "
            f"missing, such as {missing[0]}."
        )
    if model.requires_references():
        raise needs_reference(checkpoint, hparams["class_identifier"])
    return model


def _contents(checkpoint: Path) -> tuple[frozenset[str], str]:
    """Names of a checkpoint's weights and of its encoder. The weights are memory-mapped, not read."""
    import torch

    try:
        found = torch.load(checkpoint, map_location="cpu", mmap=True)
        return frozenset(found["state_dict"]), str(found["hyper_parameters"]["pretrained_model"])
    except Exception as error:  # unpickling an unknown file can raise any error
        raise unreadable(checkpoint, error) from error


def _open(checkpoint: Path) -> Any:
    import comet

    try:
        return comet.load_from_checkpoint(str(checkpoint), local_files_only=True)
    except Exception:  # transformers raises many types of errors if a file is not in the cache
        return comet.load_from_checkpoint(str(checkpoint))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences COMET, Lightning and transformers: their warnings do not help users, and they set up the root logger."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
