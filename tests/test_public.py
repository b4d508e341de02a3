"""The public surface: names, signatures, the recipe's keys with their defaults, and the command line's options.

`tests/public.txt` holds it. A change that is meant goes there (`python tests/test_public.py > tests/public.txt`) and into
CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

import corpusprep
from corpusprep import training
from corpusprep.cli import cli
from corpusprep.recipe import STAGES, Recipe

FROZEN = Path(__file__).with_name("public.txt")
SETTINGS = {name: f"{name.title()}Settings" for name in STAGES}


def surface() -> Iterator[str]:
    """The lines of the file."""
    for name in corpusprep.__all__:
        yield described("corpusprep", name, getattr(corpusprep, name))
    for name in training.__all__:
        yield described("corpusprep.training", name, getattr(training, name))
    for stage in STAGES:
        module = importlib.import_module(f"corpusprep.stages.{stage}")
        yield described(module.__name__, stage, getattr(module, stage))
        assert issubclass(getattr(module, SETTINGS[stage]), BaseModel)
        yield f"{module.__name__}.{SETTINGS[stage]}"
    yield from keys(Recipe, "")
    for name, command in sorted(cli.commands.items()):
        options = [
            option
            for p in command.params
            for option in (p.opts if isinstance(p, click.Option) else [p.human_readable_name])
        ]
        yield f"$ corpusprep {name} {' '.join(options)}"


def described(module: str, name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f"{module}.{name}"
    parameters = inspect.signature(value).parameters.values()
    shown = [
        ("*" if p.kind == p.KEYWORD_ONLY else "") + p.name + ("" if p.default is p.empty else "=") for p in parameters
    ]
    return f"{module}.{name}({', '.join(shown)})"


def keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The keys of settings and of the tables in them, with their defaults."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        inner = list(models(field.annotation))
        if inner:
            yield from keys(inner[0], f"{key}.")
        else:
            default = "required" if field.is_required() else plain(field.get_default(call_default_factory=True))
            yield f"{key} = {default}"


def plain(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 200 else f"{len(value)} values"


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models(part)


def test_the_public_surface_is_as_it_was() -> None:
    assert "\n".join(surface()) + "\n" == FROZEN.read_text(encoding="utf-8")


def test_public_names_are_imported_when_they_are_used() -> None:
    for name in corpusprep.__all__:
        assert getattr(corpusprep, name).__name__ == name
    assert dir(corpusprep) == sorted(corpusprep.__all__)
    with pytest.raises(AttributeError):
        _ = corpusprep.missing


if __name__ == "__main__":
    print("\n".join(surface()))
