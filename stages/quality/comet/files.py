"""The files of a COMET model: its checkpoint, and the shape and the tokenizer of its encoder.

A checkpoint is a folder with `hparams.yaml` and `checkpoints/model.ckpt`. It holds all weights; the tokenizer and the
shape of its encoder come from the model that it was trained from. A name of the Hugging Face hub is looked for in the
local cache first, so that a run needs no network once its files are there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from corpusprep.errors import RunError

LAYOUT = "a folder that holds hparams.yaml and checkpoints/model.ckpt"
_TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model")


class CometFiles(NamedTuple):
    """Where a model's files are.

    Attributes:
        checkpoint: weights and hyperparameters.
        hparams: `hparams.yaml`, which names the class.
        config: `config.json` of the encoder.
        tokenizer: `tokenizer.json`, or a sentencepiece model.
    """

    checkpoint: Path
    hparams: Path
    config: Path
    tokenizer: Path


def find_model(model: str, encoder: str | None = None) -> CometFiles:
    """The files of a model; what is on the hub and not in the local cache is downloaded.

    Args:
        model: name on the hub, folder, or `.ckpt` file in such a folder.
        encoder: name on the hub or folder of the encoder's `config.json` and tokenizer; by default they are looked for in
            the model's folder, then in that folder's `encoder`, then where `hparams.yaml` says that it was trained from.

    Raises:
        RunError: something is missing, or the model needs a reference.
    """
    checkpoint = find_checkpoint(model)
    hparams = read_hparams(checkpoint)
    folder = checkpoint.parent.parent
    if encoder is not None:
        found = _encoder(encoder, "quality.encoder")
    else:
        own = next((f for f in (folder, folder / "encoder") if _encoder_in(f) is not None), None)
        name = str(own) if own is not None else hparams.get("pretrained_model")
        if not name or not isinstance(name, str):
            raise RunError(
                f"{folder / 'hparams.yaml'} does not say what the model was trained from (pretrained_model). Give "
                "quality.encoder: the hub's name or the folder of its config.json and tokenizer."
            )
        found = _encoder(name, f"{checkpoint}: its encoder")
    return CometFiles(checkpoint, folder / "hparams.yaml", *found)


def find_checkpoint(model: str) -> Path:
    """The checkpoint's file, downloaded if need be.

    Raises:
        RunError: there is none.
    """
    path = Path(
        os.path.abspath(os.path.expanduser(model))
    )  # not resolved: the hub's cache links files out of the folder
    if path.is_file():
        return path
    if path.is_dir():
        return _inside(path)
    if model.startswith(("/", ".", "~")) or model.endswith(".ckpt") or model.count("/") != 1:
        raise RunError(
            f"quality.model = {model!r}: there is no such file or folder. Give the name of a model on the Hugging Face hub, "
            f"as in Unbabel/wmt22-cometkiwi-da, or the path of {LAYOUT}."
        )
    return _inside(_download(model))


def _inside(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "model.ckpt"
    if checkpoint.is_file():
        return checkpoint
    found = sorted((folder / "checkpoints").glob("*.ckpt"))  # a model trained by oneself is named after its epoch
    if len(found) != 1:
        raise RunError(f"{folder}: this is no COMET model. quality.model wants {LAYOUT}.")
    return found[0]


def read_hparams(checkpoint: Path) -> dict[str, Any]:
    """What `hparams.yaml` says of a checkpoint. A model that needs a reference is refused here, before gigabytes are read.

    Raises:
        RunError: the file is missing or is not of a COMET model, or the model needs a reference.
    """
    import yaml

    file = checkpoint.parent.parent / "hparams.yaml"
    try:
        hparams = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{checkpoint}: {file} is missing. quality.model wants {LAYOUT}.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read: {line(error)}") from error
    if not isinstance(hparams, dict) or "class_identifier" not in hparams:
        raise RunError(f"{file} does not describe a COMET model: it has no class_identifier.")
    kind, segments = hparams["class_identifier"], hparams.get("input_segments")
    if kind in ("regression_metric", "ranking_metric") or (segments and "src" not in segments):
        raise needs_reference(checkpoint, kind)
    return hparams


def needs_reference(checkpoint: Path, kind: str) -> RunError:
    return RunError(
        f"{checkpoint}: this model ({kind}) compares with a reference translation, and bitext has none. "
        "Use a quality estimation model, as Unbabel/wmt22-cometkiwi-da."
    )


def unreadable(checkpoint: Path, error: Exception) -> RunError:
    return RunError(f"{checkpoint} cannot be read as a COMET checkpoint: {type(error).__name__}: {line(error)}")


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
    copy = f"or give quality.model the path of {LAYOUT}"
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
            f"The model {name} is not in the local cache, and it cannot be downloaded: {line(error.__cause__ or error)} "
            f"Run once with a network, {copy}."
        ) from error


def _encoder(name: str, whose: str) -> tuple[Path, Path]:
    """config.json and tokenizer of an encoder, by folder or name."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = _encoder_in(path)
        if found is None:
            raise RunError(f"{whose}, {path}, lacks config.json or a tokenizer ({' or '.join(_TOKENIZERS)}).")
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = ["config.json", *_TOKENIZERS]
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            found = _encoder_in(Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True)))
            if found is not None:
                return found
        found = _encoder_in(Path(snapshot_download(name, allow_patterns=wanted)))
    except HFValidationError:
        raise RunError(
            f"{whose}, {name}: there is no such folder, and it is no name of the Hugging Face hub."
        ) from None
    except OSError as error:
        raise RunError(
            f"{whose}, {name}, is not whole in the local cache (config.json and tokenizer), and cannot be downloaded: "
            f"{line(error.__cause__ or error)} Run once with a network, or give quality.encoder a folder of these files."
        ) from error
    if found is None:
        raise RunError(f"{whose}, {name}, lacks config.json or a tokenizer ({' or '.join(_TOKENIZERS)}) on the hub.")
    return found


def _encoder_in(folder: Path) -> tuple[Path, Path] | None:
    config = folder / "config.json"
    tokenizer = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    return (config, tokenizer) if config.is_file() and tokenizer is not None else None


def line(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    return first if first.endswith((".", "!", "?")) else f"{first}."
