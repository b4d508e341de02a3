"""All settings with their defaults and what they mean: what `corpusprep settings` prints."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Container
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from corpusprep.errors import SettingsError
from corpusprep.recipe import Recipe
from corpusprep.stage import Settings


def describe_settings(table: str | None) -> str:
    """The settings of a table of a recipe, or of all tables: name, default, meaning.

    Args:
        table: the name of a table of the recipe: a stage, `source`, `stage`, `rejects` or `train`; None for all that a recipe
            may say.

    Raises:
        SettingsError: a recipe has no such table.
    """
    tables = {name: _nested(field.annotation) for name, field in Recipe.model_fields.items()}
    described = {
        name: _describe(f"[[{name}]]" if _is_list(name) else f"[{name}]", models[0])
        for name, models in tables.items()
        if models
    }
    if table is None:
        alone = {name for name, models in tables.items() if not models}
        return "\n\n".join([_describe("At the top of a recipe", Recipe, alone), *described.values()])
    if table not in described:
        raise SettingsError(f"{table} is not a table of a recipe. Write one of {', '.join(described)}.")
    return described[table]


def _is_list(table: str) -> bool:
    """Whether a recipe may have several of these tables."""
    return get_origin(Recipe.model_fields[table].annotation) is tuple


def _describe(title: str, model: type[BaseModel], only: Container[str] | None = None, depth: int = 0) -> str:
    pad, meanings = "  " * depth, _meanings(model)
    lines = [f"{pad}{title}"]
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        lines.append(f"{pad}  {name} = {default}")
        lines.append(f"{pad}      {' '.join(meanings.get(name, '').split())}")
        nested = [m for m in _nested(field.annotation) if m is not model]
        lines += [_describe(f"{name}.…:", m, depth=depth + 2) for m in nested]
    return "\n".join(lines)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a model, in its source and that of its bases; none where there is no source."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if not issubclass(each, Settings):
            continue
        try:
            tree = ast.parse(inspect.getsource(each))
        except (OSError, SyntaxError):
            continue
        for body in (node.body for node in tree.body if isinstance(node, ast.ClassDef)):
            for field, text in itertools.pairwise(body):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                ) and isinstance(text.value, ast.Constant):
                    found[field.target.id] = str(text.value.value)
    return found


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
