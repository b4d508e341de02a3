"""Where a mix is published: a folder of any file system that fsspec opens, or a data set of the Hugging Face hub."""

from __future__ import annotations

from corpusprep.commands.targets.base import Advance, File, Target
from corpusprep.commands.targets.folder import FolderTarget
from corpusprep.commands.targets.hub import HubTarget
from corpusprep.errors import InputError

__all__ = ["Advance", "File", "FolderTarget", "Target", "open_target"]


def open_target(url: str, *, private: bool, writes: bool, message: str) -> Target:
    """The place that a URL names.

    Args:
        url: `hf://datasets/owner/name[@revision][/folder]`, or a URL of a folder that fsspec opens.
        private: create a data set that is not there as a private one.
        writes: whether something will be sent; the hub then asks for a token.
        message: of commits on the hub.

    Raises:
        InputError: the URL is not one, the place cannot be reached, or a package is missing.
    """
    if url.startswith("hf://"):
        return HubTarget(url, private=private, writes=writes, message=message)
    if private:
        raise InputError(url, "only a data set on the hub can be made private by --private", "Leave the option out")
    return FolderTarget(url)
