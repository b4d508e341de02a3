"""What the tests of whole runs share: a recipe, and what a run left."""

from __future__ import annotations

import hashlib
from pathlib import Path

import polars as pl

from corpusprep import Recipe, RunResult, load_recipe


def recipe(data: Path, *overrides: str) -> Recipe:
    sources = [f"opus100={data / 'opus'}", f"nllb={data / 'nllb'}"]
    return load_recipe(None, sources=sources, overrides=overrides)


def digests(out: Path) -> dict[str, str]:
    """Name -> hash of every file of the output proper."""
    files = [path for name in ("mix", "rejects") for path in sorted((out / name).rglob("*")) if path.is_file()]
    assert files
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rejects(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((out / "rejects").glob("*.parquet"))])


def mix(out: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted((out / "mix").glob("*.parquet"))])


def redone(result: RunResult) -> dict[str, int]:
    return {kind: count for kind, count in result.made.items() if count}
