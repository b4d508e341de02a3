"""Progress of a run."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Receives the progress of a run; this base class shows nothing."""

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        """Begins a pass. `total` is in units; None if it is unknown."""

    def advance(self, amount: int, note: str = "") -> None:
        """Adds `amount` finished units."""

    def end(self) -> None:
        """Ends the pass."""

    def say(self, text: str) -> None:
        """Shows a line of text."""


class Bars(Progress):
    """Progress bars on standard error: rows, rows per second, and the remaining time if it is known."""

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
