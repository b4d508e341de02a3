"""A target that is a folder of a file system which fsspec opens."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from corpusprep.commands.targets.base import BLOCK, BUGS, EXTRA, Advance, File, causes, first_line, unreachable
from corpusprep.errors import InputError
from corpusprep.store import writing

T = TypeVar("T")

_AT_ONCE = 4  # small files sent, parts of a large one, and checksums asked for, at the same time
_PART = 32 << 20  # bytes of a part of an object; one of less than two parts is sent whole
_PARTS = 10_000  # parts that an object may have


class FolderTarget:
    """A folder of a file system that fsspec opens.

    How contents are compared: sizes first. Objects on S3 of less than 64 MiB are sent with their SHA-256, which S3 checks when it
    takes them and reports afterwards. For larger ones, and those that others sent, the ETag counts where it is the MD5 of the
    content, or of the MD5s of its parts. Where it is neither (with KMS keys, or other sizes of parts), and on all other file
    systems, the file is read back and hashed.

    A file of this machine appears whole or not at all, and so does an object on S3.
    """

    created = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, found, _ = url.partition("://")
        if not found or "::" in url:
            remedy = (
                "Write s3://bucket/folder, hf://datasets/owner/name, file:///folder or another URL that fsspec opens"
            )
            raise InputError(url, "it is not a URL of a folder", remedy)
        with self._refusals(scheme=scheme):
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        self._root = str(root).rstrip("/")
        protocols = self._fs.protocol
        self._kind = {"s3a": "s3", "local": "file"}.get(scheme, scheme)
        assert scheme in ((protocols,) if isinstance(protocols, str) else protocols)
        self.folder = Path(self._root or "/") if self._kind == "file" else None
        """The folder, if it is one of this machine."""
        if self._kind == "s3":
            if not self._root:
                raise InputError(url, "it names no bucket", "Write s3://bucket/folder")
            bucket, _, prefix = self._root.partition("/")
            with self._refusals():  # a key that is not there and a bucket that is not there look alike
                self._fs.call_s3("list_objects_v2", self._fs.kwargs, Bucket=bucket, Prefix=prefix, MaxKeys=1)

    def present(self, names: Sequence[str]) -> set[str]:
        found = self._map(lambda name: self._info(name) is not None, names, _Told(lambda size: None))
        return {name for name, there in zip(names, found, strict=True) if there}

    def read(self, name: str) -> bytes | None:
        if self._info(name) is None:
            return None
        with self._refusals():
            content: bytes = self._fs.cat_file(self._path(name))
            return content

    def compare(self, files: Sequence[File], advance: Advance) -> dict[str, bool]:
        told = _Told(advance)

        def same(file: File) -> bool | None:
            info = self._info(file.name)
            answer = None if info is None else self._same(file, info)
            told.add(file.size)
            return answer

        found = zip(files, self._map(same, files, told), strict=True)
        return {file.name: answer for file, answer in found if answer is not None}

    def change(self, send: Sequence[File], remove: Sequence[str], advance: Advance) -> None:
        told = _Told(advance)
        self._map(lambda file: self._send(file, told), [file for file in send if file.size < 2 * _PART], told)
        large = [file for file in send if file.size >= 2 * _PART]  # each goes in several parts at the same time
        self._map(lambda file: self._send(file, told), large, told, threads=1)
        self._map(self._remove, remove, told)

    def at_once(self, changes: int) -> bool:
        return False

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _info(self, name: str) -> dict[str, Any] | None:
        """What the file system says of a file; None if it is not there."""
        path = self._path(name)
        with self._refusals(absent=True):
            try:
                if self._kind == "s3":
                    bucket, _, key = path.partition("/")
                    asked = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"}
                    head: dict[str, Any] = self._fs.call_s3("head_object", self._fs.kwargs, **asked)
                    return {"size": head["ContentLength"]} | head
                self._fs.invalidate_cache()
                info: dict[str, Any] = self._fs.info(path)
            except FileNotFoundError:
                return None
        if info["type"] != "file":
            raise InputError(f"{self.url}/{name}", "there is a folder in the place of a file", "Remove it")
        return info

    def _same(self, file: File, info: dict[str, Any]) -> bool:
        if info.get("size") not in (None, file.size):
            return False
        checksum = info.get("ChecksumSHA256") or ""
        if checksum and "-" not in checksum:
            return base64.b64decode(checksum).hex() == file.sha256
        if "ETag" in info and info["ETag"].strip('"') == _etag(file):
            return True
        state = hashlib.sha256()
        with self._refusals(), self._fs.open(self._path(file.name), "rb") as stream:
            while block := stream.read(BLOCK):
                state.update(block)
        return state.hexdigest() == file.sha256

    def _send(self, file: File, told: _Told) -> None:
        path = self._path(file.name)
        with self._refusals():
            if self._kind == "file":
                with writing(path) as scratch:
                    shutil.copyfile(file.path, scratch)
                told.add(file.size)
                return
            options: dict[str, Any] = {}
            if self._kind == "s3":
                options = {"chunksize": _part(file.size), "max_concurrency": _AT_ONCE}
                if file.size < 2 * _PART:
                    options["ChecksumAlgorithm"] = "SHA256"
            callback = _callback(told)
            self._fs.put_file(str(file.path), path, callback=callback, **options)
            if not callback.value:  # not all file systems tell how far they are
                told.add(file.size)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._refusals(absent=True):
            self._fs.rm_file(self._path(name))

    def _map(self, call: Callable[[Any], T], values: Sequence[Any], told: _Told, threads: int = _AT_ONCE) -> list[T]:
        """Calls a function for several values at the same time. If a call fails, the others end before long."""
        pool = ThreadPoolExecutor(threads)
        results = []
        try:
            for future in [pool.submit(call, value) for value in values]:
                while not future.done():
                    wait([future], timeout=0.2)
                    told.pass_on()
                results.append(future.result())
            told.pass_on()
        except BaseException:
            told.stopped = True
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return results

    @contextlib.contextmanager
    def _refusals(self, *, scheme: str | None = None, absent: bool = False) -> Iterator[None]:
        """Turns what a file system raises into an InputError.

        Args:
            scheme: of the URL, before the file system is open.
            absent: let FileNotFoundError through.
        """
        try:
            yield
        except (InputError, *BUGS):
            raise
        except Exception as error:
            if absent and isinstance(error, FileNotFoundError):
                raise
            raise self._refused(error, self._kind if scheme is None else scheme) from None

    def _refused(self, error: Exception, kind: str) -> InputError:
        chain = list(causes(error))
        names = " ".join(type(each).__name__ for each in chain)
        text = first_line(error)
        if isinstance(error, ImportError):
            remedy = EXTRA if kind == "s3" else "Install it with pip"
            return InputError(self.url, f"its file system needs a package that is missing ({text})", remedy)
        if isinstance(error, ValueError) and "rotocol not known" in text:
            return InputError(self.url, "fsspec knows no such file system", "Write s3://…, gs://…, file:///… or hf://…")
        if re.search(r"Credentials|Token(Load|Retrieval|Expired)|SSO|ProfileNotFound|LoginError", names):
            remedy = (
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in with the AWS command line"
                if kind == "s3"
                else "Log in as its library asks"
            )
            return InputError(self.url, f"there are no valid credentials ({text})", remedy)
        if isinstance(error, PermissionError):
            remedy = (
                "Check the credentials. They need the rights s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
                if kind == "s3"
                else "Check that you may read and write there"
            )
            return InputError(self.url, f"access is denied ({text})", remedy)
        if isinstance(error, FileNotFoundError) and kind == "s3":
            bucket = self._root.partition("/")[0]
            return InputError(self.url, f"there is no bucket {bucket} ({text})", "Check its name, or create it")
        if isinstance(error, NotImplementedError):
            return InputError(self.url, f"{kind}:// cannot be written to", "Choose another target")
        if unreachable(chain):
            return InputError(self.url, f"it cannot be reached ({text})", "Check the network and the endpoint")
        remedy = "What was sent is kept: start the command again"
        return InputError(self.url, f"it refuses ({type(error).__name__}: {text})", remedy)


def _part(size: int) -> int:
    """Bytes of a part of an object: the size alone decides, so that a later publish computes the same ETag."""
    return max(_PART, -(-size // _PARTS))


def _etag(file: File) -> str:
    """The ETag that S3 gives the file's content as `FolderTarget` sends it, without a KMS key."""
    if file.size < 2 * _PART:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    whole, parts = hashlib.md5(usedforsecurity=False), 0
    with open(file.path, "rb") as stream:
        while part := stream.read(_part(file.size)):
            whole.update(hashlib.md5(part, usedforsecurity=False).digest())
            parts += 1
    return f"{whole.hexdigest()}-{parts}"


class _Told:
    """Bytes that threads have dealt with; the main thread passes them on, so that nothing of the caller's runs elsewhere."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._lock, self._bytes = advance, threading.Lock(), 0
        self.stopped = False
        """Set to make threads end: a file that is sent in parts is given up, and what S3 has of it is removed there."""

    def add(self, size: int) -> None:
        if self.stopped:
            raise InterruptedError("another file failed")
        with self._lock:
            self._bytes += size

    def pass_on(self) -> None:
        with self._lock:
            size, self._bytes = self._bytes, 0
        if size:
            self._advance(size)


def _callback(told: _Told) -> Any:
    """An fsspec callback that adds up what was sent."""
    from fsspec.callbacks import Callback

    class Sum(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            told.add(inc)

        def absolute_update(self, value: int) -> None:
            self.relative_update(value - self.value)

    return Sum()
