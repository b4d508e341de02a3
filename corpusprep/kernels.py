"""The decorator for compiled kernels, the cache of their code, and that of the tables that they read.

Numba caches compiled code in `__pycache__`, or in the user's cache if it cannot write there. This module changes two
things. First, the folder is named by a digest of the sources of all kernels: Numba checks only a kernel's own file, and
would keep running code that inlines an old version of a kernel in another file. Second, code is saved under a lock:
processes that compile one kernel for different types at the same time would overwrite each other's entries, and then run
code for the wrong types.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import secrets
import shutil
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import numba
import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile

T = TypeVar("T")

_PREFIX = "kernels-"
_TABLES: set[Path] = set()  # folders with tables that this process has read


@overload
def kernel(function: Callable[..., Any], /) -> Callable[..., Any]: ...
@overload
def kernel(
    *, leaf: bool = ..., inline: str = ..., forceinline: bool = ..., error_model: str = ...
) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def kernel(function: Callable[..., Any] | None = None, /, *, leaf: bool = False, **options: Any) -> Any:
    """Compiles a function with Numba on its first call, without the GIL, and caches the code for later processes.

    Only for kernels of this package: the digest does not cover other modules, so their edits would have no effect.

    Args:
        function: the function; if it is not given, a decorator is returned.
        leaf: the function allocates no arrays, and neither do the kernels that it calls. Numba then counts no references to those that it is
            given. In a function that is called for each word, counting can cost more than all the rest: a third of the time of
            language identification.
        options: options of `numba.njit`.
    """
    if function is None:
        return functools.partial(kernel, leaf=leaf, **options)
    if leaf:
        options["_nrt"] = False
    dispatcher = numba.njit(nogil=True, **options)(function)
    with contextlib.suppress(RuntimeError):  # there is no folder for the cache: every process compiles the kernel
        dispatcher._cache = _KernelCache(function)
    return dispatcher


class _KernelCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_path = os.path.join(self._cache_path, _PREFIX + sources_digest())
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, "")

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Loads compiled code. Numba would first import all that it needs to compile, which takes 0.1 s. All that the code itself needs is
        Numba's runtime; a kernel that is not in the cache imports the rest when it is compiled."""
        try:
            from numba.core.runtime.nrt import rtsys

            rtsys.initialize(target)
        except (ImportError, AttributeError):  # another version of Numba
            return super().load_overload(signature, target)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, target)

    def _save_overload(self, signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError), _locked(Path(self._cache_path)):
            super()._save_overload(signature, data)


def kept(kind: Callable[..., T], /) -> Callable[[Callable[[], T]], Callable[[], T]]:
    """Makes tables once for an installation: later processes load them from beside the code of the kernels.

    Args:
        kind: the NamedTuple of NumPy arrays that the function returns. They must follow from the sources of this package and
            Python's version of Unicode alone.
    """

    def decorate(function: Callable[[], T]) -> Callable[[], T]:
        @functools.cache
        def found() -> T:
            try:
                folder = Path(_KernelCache(function).cache_path)
                _TABLES.add(folder)
            except RuntimeError:  # there is no folder for the cache
                return function()
            path = folder / f"{function.__module__}.{function.__name__}-{unicodedata.unidata_version}.npz"
            damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
            with contextlib.suppress(*damaged), np.load(path, allow_pickle=False) as arrays:
                return kind(*(arrays[f"arr_{k}"] for k in range(len(arrays.files))))
            made: Any = function()
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
                try:
                    with scratch.open("wb") as file:
                        np.savez(file, *made)
                    os.replace(scratch, path)
                finally:
                    scratch.unlink(missing_ok=True)
            return kind(*made)

        return functools.wraps(function)(found)

    return decorate


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with the process. Continues without it if there are no locks or the wait is too long."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "wb") as lock:
        for _ in range(100):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


@functools.cache
def sources_digest() -> str:
    """A digest of all modules with kernels or with constants that kernels use: the stages, the sources, and the modules
    of this folder that have kernels. An edit elsewhere does not cost a minute of compiling."""
    package = Path(__file__).parent
    folders = [(package, "*.py"), (package / "sources", "**/*.py"), (package / "stages", "**/*.py")]
    state = hashlib.sha256()
    for folder, pattern in folders:
        for path in sorted(folder.glob(pattern)):
            content = path.read_bytes()
            if folder != package or b"corpusprep.kernels import " in content:
                state.update(str(path.relative_to(package)).encode() + b"\0" + content + b"\0")
    return state.hexdigest()[:16]


def remove_old() -> None:
    """Removes the cached code and tables of other versions of the kernels."""
    folders = {Path(dispatcher._cache.cache_path) for dispatcher in _dispatchers()} | _TABLES
    for folder in folders:
        for other in folder.parent.glob(f"{_PREFIX}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _dispatchers() -> Iterator[Any]:
    import sys

    for name, module in list(sys.modules.items()):
        if name.startswith("corpusprep"):
            for value in vars(module).values():
                if isinstance(getattr(value, "_cache", None), _KernelCache):
                    yield value
