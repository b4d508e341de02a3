"""All settings with their defaults and what they mean: what `corpusprep settings` prints."""

from __future__ import annotations

import json
from typing import Any, get_args

from pydantic import BaseModel

from corpusprep.commands.stage import STAGES
from corpusprep.recipe import RejectsSettings, UserStage
from corpusprep.sources import SourceSettings
from corpusprep.training.settings import TrainSettings


def describe_settings(stage: str | None) -> str:
    """The settings of a stage, of `source`, or of all: name, default, meaning.

    Args:
        stage: a stage, `source`, `stage`, `rejects` or `train`; None for all of them.
    """
    models: dict[str, type[BaseModel]] = {
        "source": SourceSettings,
        **{name: model for name, (model, _) in STAGES.items()},
        "stage": UserStage,
        "rejects": RejectsSettings,
        "train": TrainSettings,
    }
    chosen = models if stage is None else {stage: models[stage]}
    return "\n\n".join(
        _describe(f"[[{name}]]" if name in ("source", "stage") else f"[{name}]", model)
        for name, model in chosen.items()
    )


def _describe(title: str, model: type[BaseModel], depth: int = 0) -> str:
    pad = "  " * depth
    lines = [f"{pad}{title}"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        lines.append(f"{pad}  {name} = {default}")
        lines.append(f"{pad}      {' '.join((field.description or '').split())}")
        nested = [m for m in _nested(field.annotation) if m is not model]
        lines += [_describe(f"{name}.…:", m, depth + 2) for m in nested]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        value = [item.model_dump(exclude_defaults=True) for item in value]
    return json.dumps(value, ensure_ascii=False, default=str) if value is not None else "none"


def _nested(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _nested(part)]
