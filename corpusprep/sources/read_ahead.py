"""Several iterators read ahead in threads, so that who takes from them computes while they read."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_WAIT = 0.2  # seconds between looks at whether anybody still wants what is read
_PATIENCE = 2.0  # seconds to wait at the end for a thread, which may be held up by a file system


class _End:
    """A thread has nothing more to read."""


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def read_ahead(sources: Sequence[Callable[[], Iterator[T]]], readers: int, ahead: int = 1) -> Generator[T]:
    """Yields what all sources yield: that of one source in its order, and of several as it comes.

    Args:
        sources: each is called and read to its end by one thread, the first ones first.
        readers: threads.
        ahead: items a thread may be ahead of who takes them.

    Raises:
        Exception: what a source raised, when its turn comes; the others are left off. Closing the iterator leaves off all.
    """
    items: queue.Queue[T | _Failure | _End] = queue.Queue(ahead * readers)
    waiting = iter(sources)
    lock, stopped = threading.Lock(), threading.Event()

    def put(item: T | _Failure | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=_WAIT)
                return

    def read() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    source = next(waiting, None)
                if source is None:
                    break
                for item in source():
                    put(item)
                    if stopped.is_set():
                        break
        except BaseException as error:
            put(_Failure(error))
        put(_End())

    threads = [
        threading.Thread(target=read, name="read-ahead", daemon=True) for _ in range(max(1, min(readers, len(sources))))
    ]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            item = items.get()
            if isinstance(item, _End):
                running -= 1
            elif isinstance(item, _Failure):
                raise item.error
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(_PATIENCE)
