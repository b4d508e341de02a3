"""The COMET scorer: any quality estimation checkpoint of unbabel-comet (Rei et al. 2020, 2022), read and run by its code.

A checkpoint is a folder with `hparams.yaml` and `checkpoints/model.ckpt`. It holds all weights; the tokenizer and the
shape of its encoder come from the model on the Hugging Face hub that it was trained from. Both are looked for in the local
cache first, so that a run needs no network once they are there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from corpusprep.errors import RunError

F32 = npt.NDArray[np.float32]

_LAYOUT = "a folder that holds hparams.yaml and checkpoints/model.ckpt"


class CometScorer:
    """A COMET model, on the GPU if there is one.

    Args:
        model: name on the Hugging Face hub, folder, or `.ckpt` file in such a folder.
        batch_size: rows a batch, at most.

    Raises:
        RunError: COMET is not installed, the model cannot be had, or it needs a reference.
    """

    def __init__(self, model: str, batch_size: int) -> None:
        with _quiet():
            _import_comet()
            import torch

            self._model = _load(*_find(model))
            self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._model.to(self._device).eval()
        self._batch_size = batch_size

    def score(self, table: pa.Table) -> F32:
        """The model's score of each row as COMET's own `predict` gives it; shape (n,).

        The scale is the model's own. A side that is longer than the model's window is cut, and a null is an empty side.
        """
        import torch

        src, tgt = (_texts(table, side) for side in ("src", "tgt"))
        # Rows of like length share a batch, or most of it is padding. The longest come first: what does not fit shows at
        # once. Bytes, since a token is about as many of them in every script.
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
        """What `predict` does with a batch, without the Trainer, its workers and its progress bar."""
        import torch

        try:
            batch = self._model.prepare_for_inference(rows)
            batch = self._model.transfer_batch_to_device(batch, self._device, 0)
            return np.asarray(self._model.predict_step(batch)["scores"].float().cpu().numpy(), np.float32)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise RunError(f"The comet scorer's model does not fit the GPU's memory: {_line(error)}") from None
        half = len(rows) // 2  # below the handler: while that runs, the error holds the failed batch's tensors
        return np.concatenate([self._predict(rows[:half]), self._predict(rows[half:])])


def _texts(table: pa.Table, side: str) -> pa.ChunkedArray[Any]:
    column: Any = table[side].cast(pa.string())
    filled: pa.ChunkedArray[Any] = column.fill_null("")
    return filled


def _import_comet() -> None:
    try:
        import comet  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "comet":
            raise _broken(error) from error
        raise RunError("The comet scorer needs COMET. Install it with pip install 'corpusprep[comet]'.") from None
    except ImportError as error:
        raise _broken(error) from error


def _broken(error: ImportError) -> RunError:
    return RunError(
        f"COMET is installed, but cannot be imported: {_line(error)} It needs old versions of other packages: "
        "pip install 'corpusprep[comet]' in an environment of its own has those that work together."
    )


def _find(model: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's file and its hyperparameters, downloaded if need be."""
    path = Path(
        os.path.abspath(os.path.expanduser(model))
    )  # not resolved: in the hub's cache, files link out of the folder
    if path.is_file():
        return path, _hparams(path)
    if path.is_dir():
        return _inside(path)
    if model.startswith(("/", ".", "~")) or model.endswith(".ckpt") or model.count("/") != 1:
        raise RunError(
            f"quality.model = {model!r}: there is no such file or folder. Give the name of a model on the Hugging Face hub, "
            f"as in Unbabel/wmt22-cometkiwi-da, or the path of {_LAYOUT}."
        )
    return _inside(_download(model))


def _inside(folder: Path) -> tuple[Path, dict[str, Any]]:
    checkpoint = folder / "checkpoints" / "model.ckpt"
    if not checkpoint.is_file():
        found = sorted((folder / "checkpoints").glob("*.ckpt"))  # a model trained by oneself is named after its epoch
        if len(found) != 1:
            raise RunError(f"{folder}: this is no COMET model. quality.model wants {_LAYOUT}.")
        checkpoint = found[0]
    return checkpoint, _hparams(checkpoint)


def _hparams(checkpoint: Path) -> dict[str, Any]:
    """Hyperparameters of a checkpoint. A model that needs a reference is refused here, before gigabytes are read."""
    import yaml

    file = checkpoint.parent.parent / "hparams.yaml"
    try:
        hparams = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.FullLoader)
    except FileNotFoundError:
        raise RunError(f"{checkpoint}: {file} is missing. quality.model wants {_LAYOUT}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read: {_line(error)}") from error
    if not isinstance(hparams, dict) or "class_identifier" not in hparams:
        raise RunError(f"{file} does not describe a COMET model: it has no class_identifier.")
    kind, segments = hparams["class_identifier"], hparams.get("input_segments")
    if kind in ("regression_metric", "ranking_metric") or (segments and "src" not in segments):
        raise _needs_reference(checkpoint, kind)
    return hparams


def _needs_reference(checkpoint: Path, kind: str) -> RunError:
    return RunError(
        f"{checkpoint}: this model ({kind}) compares with a reference translation, and bitext has none. "
        "Use a quality estimation model, as Unbabel/wmt22-cometkiwi-da."
    )


def _download(name: str) -> Path:
    """The folder of a model of the hub in the local cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = ["hparams.yaml", "checkpoints/*.ckpt"]
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if (folder / "hparams.yaml").is_file() and any(folder.glob("checkpoints/*.ckpt")):
            return folder  # else a download was cut off
    copy = f"or give quality.model the path of {_LAYOUT}"
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError:
        raise RunError(
            f"The model {name} is gated. Accept its licence at {constants.ENDPOINT}/{name}, then log in with hf auth login "
            f"(or set HF_TOKEN), {copy}."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RunError(
            f"The Hugging Face hub has no model {name} that you may see. Check the name, log in with hf auth login if it is "
            f"private, {copy}."
        ) from None
    except OSError as error:
        raise RunError(
            f"The model {name} is not in the local cache, and it cannot be downloaded: {_line(error.__cause__ or error)} "
            f"Run once with a network, {copy}."
        ) from error


def _load(checkpoint: Path, hparams: dict[str, Any]) -> Any:
    """The model of a checkpoint, on the CPU."""
    weights, encoder = _contents(checkpoint)
    try:
        model = _open(checkpoint)
    except OSError as error:
        raise RunError(
            f"{checkpoint}: the tokenizer and config.json of its encoder, {encoder}, are not in the local cache, and cannot "
            f"be downloaded: {_line(error)} Run once with a network, or run hf download {encoder} where there is one and "
            "set HF_HOME to a copy of its cache."
        ) from error
    except Exception as error:  # whatever building a model after a stranger's file may come upon
        raise _unreadable(checkpoint, error) from error
    # COMET loads without strictness, since old checkpoints hold buffers that encoders no longer have: a weight that a
    # checkpoint lacks would be left as it was drawn at random.
    missing = [name for name, _ in model.named_parameters() if name not in weights]
    if missing:
        raise RunError(
            f"{checkpoint} is incomplete or does not fit its hparams.yaml: it lacks {len(missing)} of the model's weights, "
            f"as {missing[0]}."
        )
    if model.requires_references():
        raise _needs_reference(checkpoint, hparams["class_identifier"])
    return model


def _contents(checkpoint: Path) -> tuple[frozenset[str], str]:
    """Names of a checkpoint's weights and of its encoder. The weights are mapped, not read."""
    import torch

    try:
        found = torch.load(checkpoint, map_location="cpu", mmap=True)
        return frozenset(found["state_dict"]), str(found["hyper_parameters"]["pretrained_model"])
    except Exception as error:  # whatever unpickling a stranger's file may come upon
        raise _unreadable(checkpoint, error) from error


def _open(checkpoint: Path) -> Any:
    import comet

    try:
        return comet.load_from_checkpoint(str(checkpoint), local_files_only=True)
    except Exception:  # transformers has many ways to say that a file is not in the cache
        return comet.load_from_checkpoint(str(checkpoint))


def _unreadable(checkpoint: Path, error: Exception) -> RunError:
    return RunError(f"{checkpoint} cannot be read as a COMET checkpoint: {type(error).__name__}: {_line(error)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences COMET, Lightning and transformers: they warn of what the user cannot change, and set up the root logger."""
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


def _line(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    return first if first.endswith((".", "!", "?")) else f"{first}."
