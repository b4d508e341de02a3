"""The decorator of compiled kernels, and where their code is kept.

Numba keeps compiled code in `__pycache__`, or in the user's cache where that cannot be written to. Two things are
different here. The code lies in a folder named by a digest of all sources of kernels: Numba looks at a kernel's own file
alone, and would go on running what an edited kernel of another file has become part of. And it is saved under a lock:
processes that compile one kernel for different types at the same time would overwrite each other's entries, and then run
code made for other types.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, overload

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_PREFIX = "kernels-"


@overload
def kernel(function: Callable[..., Any], /) -> Callable[..., Any]: ...
@overload
def kernel(*, inline: str = ..., forceinline: bool = ...) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def kernel(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Compiles a function with Numba on its first call, without the GIL, and keeps the code for later processes.

    For kernels of this package: code kept for a function of another module would outlive edits of that module.

    Args:
        function: the function; where it is not given, a decorator is returned.
        options: of `numba.njit`.
    """
    if function is None:
        return functools.partial(kernel, **options)
    dispatcher = numba.njit(nogil=True, **options)(function)
    with contextlib.suppress(RuntimeError):  # there is no folder to keep it in: it is compiled by every process
        dispatcher._cache = _KernelCache(function)
    return dispatcher


class _KernelCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_path = os.path.join(self._cache_path, _PREFIX + sources_digest())
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, "")

    def _save_overload(self, signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError), _locked(Path(self._cache_path)):
            super()._save_overload(signature, data)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that ends with the process; goes without one where the file system has none, or gives it to nobody."""
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
    """A digest of the modules that kernels and the constants that they use are in: the stages, the sources, and those of
    the engine room that hold kernels. An edit elsewhere need not cost a minute of compiling."""
    package = Path(__file__).parent
    folders = [(package, "*.py"), (package / "sources", "**/*.py"), (package / "stages", "**/*.py")]
    state = hashlib.sha256()
    for folder, pattern in folders:
        for path in sorted(folder.glob(pattern)):
            content = path.read_bytes()
            if folder != package or b"kernels import kernel" in content:
                state.update(str(path.relative_to(package)).encode() + b"\0" + content + b"\0")
    return state.hexdigest()[:16]


def remove_old() -> None:
    """Removes the code that other versions of the kernels left beside this one's."""
    folders = {Path(dispatcher._cache.cache_path) for dispatcher in _dispatchers()}
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
