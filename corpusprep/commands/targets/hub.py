"""A target that is a data set of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from corpusprep.commands.targets.base import BLOCK, BUGS, EXTRA, Advance, File, causes, first_line, unreachable
from corpusprep.errors import InputError

_COMMIT = 1000  # files that one commit adds or removes
_FILES = 16  # files that are handed to the hub's library together; progress is told after each such group
_URL = re.compile(
    r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?"
)
_LOGIN = "Log in with a token that may write: hf auth login, or set HF_TOKEN"


class HubTarget:
    """A data set of the Hugging Face hub, or a folder in one.

    Up to 1,000 changes are one commit, which readers see all at once. Large files go to the hub's storage before the commit: what
    an interrupted publish sent there is not sent again. Contents are compared by the checksums that the hub reports: SHA-256 of
    large files, the SHA-1 of the git blob of others.
    """

    def __init__(self, url: str, *, private: bool, writes: bool, message: str) -> None:
        self.url = url.rstrip("/")
        match = _URL.fullmatch(self.url)
        if match is None:
            remedy = "Write hf://datasets/owner/name, with @revision and /folder behind it where they are wanted"
            raise InputError(url, "it is not a data set of the hub", remedy)
        self._name = match["name"]
        self._revision = unquote(match["revision"]) if match["revision"] else "main"
        self._folder = f"{match['folder']}/" if match["folder"] else ""
        if any(part in ("", ".", "..") for part in self._folder.split("/")[:-1]):
            raise InputError(url, "its folder is not one", "Write the folder's path in the data set")
        self._private, self._message = private, message
        try:
            import huggingface_hub
        except ImportError as error:
            raise InputError(url, f"the hub's library is missing ({first_line(error)})", EXTRA) from None
        self._hub: Any = huggingface_hub
        self._api: Any = huggingface_hub.HfApi(library_name="corpusprep")
        self.created = False
        self._head: str | None = None
        if writes and huggingface_hub.get_token() is None:
            raise InputError(self.url, "there is no token for the hub", _LOGIN)
        self._look()

    def present(self, names: Sequence[str]) -> set[str]:
        return set(self._infos(names))

    def read(self, name: str) -> bytes | None:
        if not self._infos([name]):
            return None
        path, version = self._folder + name, self._head or self._revision
        with self._refusals(), tempfile.TemporaryDirectory() as cache:
            file = self._api.hf_hub_download(self._name, path, repo_type="dataset", revision=version, cache_dir=cache)
            return Path(file).read_bytes()

    def compare(self, files: Sequence[File], advance: Advance) -> dict[str, bool]:
        infos = self._infos([file.name for file in files])
        found: dict[str, bool] = {}
        for file in files:
            if file.name in infos:
                found[file.name] = _same_blob(file, infos[file.name])
            advance(file.size)
        return found

    def change(self, send: Sequence[File], remove: Sequence[str], advance: Advance) -> None:
        with self._refusals():
            if self.created:
                self._api.create_repo(self._name, repo_type="dataset", private=self._private or None)
                self.created = False
                self._look()
            add, delete = self._hub.CommitOperationAdd, self._hub.CommitOperationDelete
            operations = [add(self._folder + file.name, str(file.path)) for file in send]
            at = {"repo_type": "dataset", "revision": self._revision}
            with _silent(self._hub):
                for start in range(0, len(operations), _FILES):
                    self._api.preupload_lfs_files(self._name, additions=operations[start : start + _FILES], **at)
                    advance(sum(file.size for file in send[start : start + _FILES]))
                operations += [delete(self._folder + name, is_folder=False) for name in remove]
                for start in range(0, len(operations), _COMMIT):
                    done = self._api.create_commit(
                        self._name,
                        operations[start : start + _COMMIT],
                        commit_message=self._message,
                        parent_commit=self._head,
                        **at,
                    )
                    self._head = str(done.oid)

    def at_once(self, changes: int) -> bool:
        return changes <= _COMMIT

    def _look(self) -> None:
        """Finds out whether the data set is there, and its last commit."""
        missing = self._hub.errors.RepositoryNotFoundError
        with self._refusals():
            try:
                info = self._api.dataset_info(self._name, revision=self._revision, expand=["sha", "private"])
            except self._hub.errors.GatedRepoError:
                raise
            except missing as error:
                if error.response.status_code == 401:
                    raise
                if self._revision != "main":
                    remedy = "Publish it without a revision first"
                    raise InputError(self.url, f"there is no data set {self._name}", remedy) from None
                self.created = True
                return
        self._head = info.sha
        if self._private and not info.private:
            remedy = "Make it private in its settings on the hub, or leave out --private"
            raise InputError(self.url, f"the data set {self._name} is there and is public", remedy)

    def _infos(self, names: Sequence[str]) -> dict[str, Any]:
        """Name -> what the hub says of the file."""
        if self.created:
            return {}
        found: dict[str, Any] = {}
        version = self._head or self._revision
        paths = [self._folder + name for name in names]
        with self._refusals():
            for start in range(0, len(paths), 500):
                some = paths[start : start + 500]
                for info in self._api.get_paths_info(self._name, some, repo_type="dataset", revision=version):
                    if not hasattr(info, "blob_id"):
                        place = f"{self.url}/{info.path}"
                        raise InputError(place, "there is a folder in the place of a file", "Remove it")
                    found[info.path.removeprefix(self._folder)] = info
        return found

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns what the hub's library raises into an InputError."""
        try:
            yield
        except (InputError, *BUGS):
            raise
        except Exception as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> InputError:
        chain = list(causes(error))
        names = [type(each).__name__ for each in chain]
        statuses = [getattr(getattr(each, "response", None), "status_code", None) for each in chain]
        status = next((each for each in statuses if each is not None), None)
        text = first_line(chain[-1] if status is None else chain[statuses.index(status)])
        again = "What was sent is kept: start the command again"
        if "OfflineModeIsEnabled" in names:
            return InputError(self.url, "the hub is switched off by HF_HUB_OFFLINE", "Unset it")
        if "RevisionNotFoundError" in names:
            remedy = f"Create it: hf repos branch create {self._name} {self._revision} --type dataset"
            return InputError(self.url, f"there is no revision {self._revision}", remedy)
        if "HFValidationError" in names:
            return InputError(self.url, f"the hub allows no such name ({text})", "Write hf://datasets/owner/name")
        if status == 401 or "LocalTokenNotFoundError" in names:
            return InputError(self.url, "the hub does not know the token", _LOGIN)
        if status == 403:
            remedy = f"Use a token that may write to {self._name}: hf auth login"
            return InputError(self.url, f"access is denied ({text})", remedy)
        if status in (409, 412):
            return InputError(self.url, "it was changed by another at the same time", "Start the command again")
        if status == 429:
            return InputError(self.url, "the hub has had too many requests", f"Wait a while. {again}")
        if status is None and unreachable(chain):
            return InputError(self.url, f"the hub cannot be reached ({text})", f"Check the network. {again}")
        if isinstance(error, ValueError) and "README.md" in text:
            detail = " ".join(str(error).split())
            return InputError("mix/README.md", f"the hub refuses the card ({detail})", "Mend its head")
        return InputError(self.url, f"the hub refuses ({type(error).__name__}: {text})", again)


def _same_blob(file: File, info: Any) -> bool:
    if info.size != file.size:
        return False
    if info.lfs is not None:
        return bool(info.lfs.sha256 == file.sha256)
    state = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(file.path, "rb") as stream:
        while block := stream.read(BLOCK):
            state.update(block)
    return bool(info.blob_id == state.hexdigest())


@contextlib.contextmanager
def _silent(hub: Any) -> Iterator[None]:
    """Hides the bars of the hub's library, as there is one of ours."""
    if hub.utils.are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()
