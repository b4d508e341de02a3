"""Tasks for engines, which import them by name."""

from __future__ import annotations

import os
import signal
import time

from corpusprep.errors import InputError


def slow_first(task: int) -> int:
    time.sleep(0.5 if task == 0 else 0)
    return task


def add(context: int, task: int) -> tuple[int, int]:
    return context, task


def pid() -> int:
    return os.getpid()


def fail_at_three(task: int) -> int:
    if task == 3:
        raise InputError("a.gz", "is cut short", "Fetch it again", 7)
    return task


def fail_strangely(task: int) -> int:
    raise ZeroDivisionError(f"task {task}")


def die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task
