"""Recipes: a TOML file, `--set` and `--source` on top of it, and hints for misspelt keys."""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from corpusprep.errors import InputError, SettingsError
from corpusprep.sources.settings import SourceSettings
from corpusprep.stage import Settings
from corpusprep.stages.balance import BalanceSettings
from corpusprep.stages.clean import CleanSettings
from corpusprep.stages.dedup import DedupSettings
from corpusprep.stages.instruct import InstructSettings
from corpusprep.stages.langid import LangidSettings
from corpusprep.stages.quality import QualitySettings
from corpusprep.training.settings import TrainSettings

STAGES = ("clean", "langid", "dedup", "quality", "balance", "instruct")


class UserStage(Settings):
    """A user-defined stage, a `[[stage]]` table. It runs in the first pass, on one batch of rows at a time."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`, called as `function(table, options)`. It returns (kept, dropped) or `Outcome`. `dropped` has a
    column `reason`; a reason that names no stage gets the prefix `<function>.`."""
    after: Literal["read", "clean", "langid"] = "langid"
    """The stage that it follows; several that follow the same stage run in the order of the recipe."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options that are passed to the function unchanged."""


class RejectsSettings(Settings):
    """The content of `rejects/`."""

    text: Literal["judged", "all", "none"] = "judged"
    """Which dropped rows keep their text: all, none, or those that a rule or a score judged (exact duplicates and rows
    beyond the quota then have only ids)."""


class EngineSettings(Settings):
    """Where tasks run. It does not change the mix."""

    address: str = "local"
    """`local`, `ray` (the cluster that runs on this machine or that `RAY_ADDRESS` names), or the address of a Ray cluster, such
    as `ray://host:10001`. `--engine` takes precedence."""


class Recipe(Settings):
    """The settings of a run: sources, the settings of each stage, a name and a seed."""

    name: str = Field(default="corpusprep", pattern=r"^[\w.+-]+$", max_length=80)
    """Name of the mix, in its dataset card and manifest."""
    seed: int = Field(default=1, ge=0, lt=1 << 32)
    """Seed of samples, quotas, templates and the shuffle."""
    verify: int = Field(default=1000, ge=0)
    """Number of rows, drawn by the seed, whose languages and fingerprints are computed again with fastText and the
    `simhash` package. A value that differs stops the run. 0 turns the check off."""
    source: tuple[SourceSettings, ...] = Field(min_length=1)
    """The `[[source]]` tables. Of equally good duplicates, the row of the first source is kept."""
    clean: CleanSettings = CleanSettings()
    langid: LangidSettings = LangidSettings()
    dedup: DedupSettings = DedupSettings()
    quality: QualitySettings = QualitySettings()
    balance: BalanceSettings = BalanceSettings()
    instruct: InstructSettings = InstructSettings()
    stage: tuple[UserStage, ...] = ()
    rejects: RejectsSettings = RejectsSettings()
    engine: EngineSettings = EngineSettings()
    train: TrainSettings | None = None
    """Settings of `corpusprep train`. They do not change the mix."""

    def of_the_mix(self) -> Self:
        """The recipe without the tables that do not change the mix, for keys."""
        return self.without("engine", "train")

    @field_validator("source")
    @classmethod
    def _named(cls, sources: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        """Names sources without a name after their format, numbered from the second on."""
        taken = {source.name for source in sources if source.name}
        if len(taken) < sum(1 for source in sources if source.name):
            raise ValueError("two sources have the same name, so their rows could not be told apart")
        named = []
        for source in sources:
            name, number = source.name or source.format, 2
            while not source.name and name in taken:
                name, number = f"{source.format}-{number}", number + 1
            taken.add(name)
            named.append(source.model_copy(update={"name": name}))
        return tuple(named)

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        if self.balance.budget is not None and not self.balance.enabled:
            raise ValueError("balance.budget is set, but balance.enabled is false")
        if self.quality.until == "budget" and self.balance.budget is None:
            raise ValueError('quality.until = "budget" needs balance.budget')
        return self


def load_recipe(
    path: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> Recipe:
    """Reads a recipe.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: `stage.key=value` each; the value is read as TOML, else as text.
        sources: `format=path` each, added to the recipe's sources.

    Raises:
        InputError: the file does not exist, or is not TOML.
        SettingsError: a key or value is not valid; the message says where, what is allowed and the nearest name.
    """
    text, data = _read(path)
    for source in sources:
        kind, equals, place = source.partition("=")
        if not equals or not place:
            raise SettingsError(f"--source {source}: write format=path, as in --source opus100=data/opus-100-corpus.")
        tables = data.setdefault("source", [])
        if isinstance(tables, list):
            tables.append({"format": kind, "path": place})
    apply_overrides(data, overrides)
    if "source" not in data:
        raise SettingsError(
            f"{path or 'The recipe'} has no source. Add a [[source]] table with format and path, or "
            "--source format=path."
        )
    return validate(Recipe, data, where=str(path or "settings"), text=text)


class _TrainRecipe(Settings):
    train: TrainSettings
    seed: int = Field(default=1, ge=0, lt=1 << 32)


def load_train(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[TrainSettings, int]:
    """The table `[train]` of a recipe, and the recipe's seed; the rest of the recipe is ignored.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: `train.key=value` each.

    Raises:
        InputError: the file does not exist, or is not TOML.
        SettingsError: the table is missing, or a key or value in it is not valid.
    """
    text, data = _read(path)
    for override in overrides:
        if not override.startswith(("train.", "seed=")):
            raise SettingsError(
                f"--set {override}: training reads only train.… and seed. Write, for example, --set train.seed=2."
            )
    apply_overrides(data, overrides)
    if "train" not in data:
        raise SettingsError(
            f'{path or "The recipe"} has no table [train]. Add one with model = "...", or --set train.model=Qwen/Qwen3-8B.'
        )
    asked = {name: value for name, value in data.items() if name in ("train", "seed")}
    found = validate(_TrainRecipe, asked, where=str(path or "settings"), text=text)
    return found.train, found.seed


def _read(path: str | Path | None) -> tuple[str, dict[str, Any]]:
    text, data = "", dict[str, Any]()
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
            data = tomllib.loads(text)
        except OSError as error:
            raise InputError(str(path), f"cannot be read ({error.strerror})", "Give a recipe in TOML") from None
        except UnicodeDecodeError:
            raise InputError(str(path), "is not UTF-8", "Save the recipe as UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(str(path), f"is not TOML: {error}", "Correct that line") from None
    return text, data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `a.b.c=value` in nested tables; `source.0.limit=10` reaches into a list."""
    for override in overrides:
        dotted, equals, raw = override.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not equals or not all(keys):
            raise SettingsError(f"--set {override}: write key=value, as in --set dedup.max_distance=2.")
        place: Any = data
        for key in keys[:-1]:
            if isinstance(place, list):
                if not key.isdigit() or int(key) >= len(place):
                    raise SettingsError(f"--set {override}: the list has no item {key}; items are counted from 0.")
                place = place[int(key)]
            else:
                place = place.setdefault(key, {})
            if not isinstance(place, dict | list):
                raise SettingsError(f"--set {override}: {key} is a value, not a table.")
        if isinstance(place, list):
            raise SettingsError(f"--set {override}: choose one table of the list by its number, from 0.")
        place[keys[-1]] = parse_value(raw)


def parse_value(raw: str) -> Any:
    """Parses a value from the command line as TOML, or returns the text if it is not TOML."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


_TYPE_LABEL = re.compile(
    r"(constrained-\w+|(literal|function-\w+|dict|list|tuple|nullable)\[.*\]|int|float|bool|str|none)$"
)
M = typing.TypeVar("M", bound=BaseModel)


def validate(model: type[M], data: Mapping[str, Any], *, where: str, text: str = "") -> M:
    """Makes settings from a table.

    Args:
        where: the file that the keys come from, for error messages.
        text: the file's content, to find the line.

    Raises:
        SettingsError: a key or value is not valid; the message has one line for each.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        items = error.errors()
        below = {item["loc"][:1] for item in items if len(item["loc"]) > 1}
        # A list with invalid items is also reported as too short, which adds nothing.
        items = [item for item in items if not (item["type"] == "too_short" and item["loc"] in below)]
        merged: dict[tuple[str, ...], dict[str, Any]] = {}
        for item in items:
            # A setting with several types fails once per type, at a location that ends in the type's name.
            place = tuple(str(part) for part in item["loc"] if not _TYPE_LABEL.match(str(part)))
            if place in merged and item["type"] != "extra_forbidden":
                merged[place]["msg"] += f", or {item['msg'].removeprefix('Input should be ')}"
            else:
                merged[place] = {**item, "loc": place}
        raise SettingsError("\n".join(_explain(model, item, where, text) for item in merged.values())) from None


def _explain(model: type[BaseModel], error: Any, where: str, text: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    line = _line(text, path)
    place = f"{where}, line {line}" if line else where
    if error["type"] == "extra_forbidden":
        parent = _model_at(model, path[:-1])
        allowed = sorted(parent.model_fields) if parent is not None else []
        near = difflib.get_close_matches(path[-1], allowed, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{place}: {key} is not a setting.{hint} Allowed here: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"{place}: {key} is missing."
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = error.get("input")
    shown = f" = {given!r}" if not isinstance(given, dict | list | BaseModel) else ""
    allowed_values = error.get("ctx", {}).get("expected")
    if allowed_values and isinstance(given, str):
        near = difflib.get_close_matches(given, re.findall(r"'([^']+)'", allowed_values), n=1, cutoff=0.5)
        message += f" (did you mean {near[0]!r}?)" if near else ""
    return f"{place}: {key or 'recipe'}{shown}: {message}."


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The settings class that a path of keys leads to."""
    for part in path:
        if part.isdigit():
            continue
        field = model.model_fields.get(part)
        if field is None:
            continue  # a key of a mapping: its class was reached with the mapping's field
        found = _models_in(field.annotation)
        if not found:
            return None
        model = found[0]
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _line(text: str, path: list[str]) -> int | None:
    """The line of the file, from 1, that sets a key; found by the header of its table and its name."""
    if not text or not path:
        return None
    lines = text.split("\n")
    tables = [part for part in path[:-1] if not part.isdigit()]
    number = next((int(part) for part in path[:-1] if part.isdigit()), 0)
    header = re.compile(r"^\s*\[\[?\s*" + r"\s*\.\s*".join(map(re.escape, tables)) + r"\s*\]\]?") if tables else None
    setting = re.compile(rf"^\s*(\"?)({re.escape(path[-1])})\1\s*[=.]")
    table = re.compile(rf"^\s*\[\[?\s*{re.escape('.'.join([*tables, path[-1]]))}\s*\]")
    inside, seen = header is None, -1
    for index, line in enumerate(lines, start=1):
        if table.match(line):
            return index
        if header is not None and header.match(line):
            seen += 1
            inside = seen == number
        elif line.lstrip().startswith("["):
            inside = False
        elif inside and setting.match(line):
            return index
    return None
