"""corpusprep: from raw parallel corpora to a small, clean, balanced training mix.

The names below are the public interface; single stages are `corpusprep.stages.clean`, `.langid`, `.dedup`, `.quality`,
`.balance` and `.instruct`. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corpusprep.commands.publish import PublishResult, publish
    from corpusprep.errors import CorpusprepError, InputError, RunError, SettingsError
    from corpusprep.pipeline import RunResult, run
    from corpusprep.recipe import Recipe, load_recipe
    from corpusprep.stage import Outcome

__all__ = [
    "CorpusprepError",
    "InputError",
    "Outcome",
    "PublishResult",
    "Recipe",
    "RunError",
    "RunResult",
    "SettingsError",
    "load_recipe",
    "publish",
    "run",
]

_HOME = {
    "CorpusprepError": "errors", "InputError": "errors", "RunError": "errors", "SettingsError": "errors",
    "Outcome": "stage", "Recipe": "recipe", "load_recipe": "recipe", "RunResult": "pipeline", "run": "pipeline",
    "PublishResult": "commands.publish", "publish": "commands.publish",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"corpusprep.{_HOME[name]}"), name)
    raise AttributeError(f"module 'corpusprep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
