"""The files of a COMET model: its checkpoint, and the shape and the tokenizer of its encoder.

A checkpoint is a folder with `hparams.yaml` and `checkpoints/model.ckpt`. It has all weights; the tokenizer and the
shape of its encoder come from the pretrained model. A name on the Hugging Face hub is first searched in the local
cache, so that a run needs no network if its files are there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from corpusprep.errors import RunError

LAYOUT = "a folder with hparams.yaml and checkpoints/model.ckpt"
_TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model")


class CometFiles(NamedTuple):
    """Paths of a model's files.

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
    """The files of a model; hub files that are not in the local cache are downloaded.

    Args:
        model: name on the hub, folder, or `.ckpt` file in such a folder.
        encoder: name on the hub or folder of the encoder's `config.json` and tokenizer. By default they are searched in
            the model's folder, then in its subfolder `encoder`, then in the pretrained model that `hparams.yaml` names.

    Raises:
        RunError: a file is missing, or the model needs a reference.
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
                f"{folder / 'hparams.yaml'} does not name the pretrained model (pretrained_model). Set "
                "quality.encoder to the hub's name or the folder of its config.json and tokenizer."
            )
        found = _encoder(name, f"{checkpoint}: its encoder")
    return CometFiles(checkpoint, folder / "hparams.yaml", *found)


def find_checkpoint(model: str) -> Path:
    """The checkpoint's file; it is downloaded if necessary.

    Raises:
        RunError: the checkpoint cannot be found or downloaded.
    """
    path = Path(
        os.path.abspath(os.path.expanduser(model))
    )  # not resolved: the hub's cache links to files outside the folder
    if path.is_file():
        return path
    if path.is_dir():
        return _inside(path)
    if model.startswith(("/", ".", "~")) or model.endswith(".ckpt") or model.count("/") != 1:
        raise RunError(
            f"quality.model = {model!r}: there is no such file or folder. Give the name of a model on the Hugging Face hub, "
            f"such as Unbabel/wmt22-cometkiwi-da, or the path of {LAYOUT}."
        )
    return _inside(_download(model))


def _inside(folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "model.ckpt"
    if checkpoint.is_file():
        return checkpoint
    found = sorted((folder / "checkpoints").glob("*.ckpt"))  # a user's own model is named after its epoch
    if len(found) != 1:
        raise RunError(f"{folder}: this is not a COMET model. quality.model must be {LAYOUT}.")
    return found[0]


def read_hparams(checkpoint: Path) -> dict[str, Any]:
    """The `hparams.yaml` of a checkpoint. A model that needs a reference is rejected here, before gigabytes are read.

    Raises:
        RunError: the file is missing or does not describe a COMET model, or the model needs a reference.
    """
    import yaml

    file = checkpoint.parent.parent / "hparams.yaml"
    try:
        hparams = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{checkpoint}: {file} is missing. quality.model must be {LAYOUT}.") from None
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
        f"{checkpoint}: this model ({kind}) needs a reference translation, which bitext does not have. "
        "Use a quality estimation model, such as Unbabel/wmt22-cometkiwi-da."
    )


def unreadable(checkpoint: Path, error: Exception) -> RunError:
    return RunError(f"{checkpoint} cannot be read as a COMET checkpoint: {type(error).__name__}: {line(error)}")


def _download(name: str) -> Path:
    """The folder of a hub model in the local cache."""
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
            return folder  # else a download was interrupted
    copy = f"or set quality.model to the path of {LAYOUT}"
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError:
        raise RunError(
            f"The model {name} is gated. Accept its licence at {constants.ENDPOINT}/{name}, then log in with hf auth login "
            f"(or set HF_TOKEN), {copy}."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RunError(
            f"The Hugging Face hub has no model {name} that you can access. Check the name, log in with hf auth login "
            f"if it is private, {copy}."
        ) from None
    except OSError as error:
        raise RunError(
            f"The model {name} is not in the local cache and cannot be downloaded: {line(error.__cause__ or error)} "
            f"Run once with network access, {copy}."
        ) from error


def _encoder(name: str, whose: str) -> tuple[Path, Path]:
    """The config.json and tokenizer of an encoder, by folder or name."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = _encoder_in(path)
        if found is None:
            raise RunError(f"{whose}, {path}, has no config.json or no tokenizer ({' or '.join(_TOKENIZERS)}).")
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
            f"{whose}, {name}: there is no such folder, and this is not a name on the Hugging Face hub."
        ) from None
    except OSError as error:
        raise RunError(
            f"{whose}, {name}, is incomplete in the local cache (config.json and tokenizer) and cannot be downloaded: "
            f"{line(error.__cause__ or error)} Run once with network access, or set quality.encoder to a folder with "
            "these files."
        ) from error
    if found is None:
        raise RunError(f"{whose}, {name}, has no config.json or no tokenizer ({' or '.join(_TOKENIZERS)}) on the hub.")
    return found


def _encoder_in(folder: Path) -> tuple[Path, Path] | None:
    config = folder / "config.json"
    tokenizer = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    return (config, tokenizer) if config.is_file() and tokenizer is not None else None


def line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()
    return first if first.endswith((".", "!", "?")) else f"{first}."
