"""Layer-selective fine-tuning on a mix: each stage trains layers chosen by position; all other weights stay frozen.

`corpusprep train` calls `train` and `dry_run`. They need the extra `train` (trl, accelerate, transformers, torch).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corpusprep.training.export import export_llamafactory
    from corpusprep.training.launch import TrainResult, dry_run, train
    from corpusprep.training.settings import TrainSettings, TrainStage

__all__ = ["TrainResult", "TrainSettings", "TrainStage", "dry_run", "export_llamafactory", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = {"TrainSettings": "settings", "TrainStage": "settings", "export_llamafactory": "export"}.get(name, "launch")
    return getattr(importlib.import_module(f"corpusprep.training.{where}"), name)
