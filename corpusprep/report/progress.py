"""What a run shows while it works."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """What a run tells while it works; this one says nothing."""

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        """A pass begins; total is in units, None where it is not known."""

    def advance(self, amount: int, note: str = "") -> None:
        """So many units more are done."""

    def end(self) -> None:
        """The pass is over."""

    def say(self, text: str) -> None:
        """A line for the reader."""


class Bars(Progress):
    """Progress as bars on standard error: rows, rows a second, and what remains where that is known."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._tqdm: Any = tqdm
        self._bar: Any = None

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        self._bar = self._tqdm(
            total=total,
            desc=title,
            unit=f" {unit}",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def advance(self, amount: int, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(amount)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        self._tqdm.write(text, file=sys.stderr)
