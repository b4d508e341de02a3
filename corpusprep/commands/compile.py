"""Compiles the kernels ahead of their first use; `corpusprep.kernels` says where the code is kept."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from corpusprep.engines.local import LocalEngine
from corpusprep.kernels import remove_old

_ROWS = 40


def _table() -> pa.Table:
    english = [f"The ship left port {n} at noon &amp; came back by night." for n in range(_ROWS)]
    return pa.table(
        {
            "src": english,
            "tgt": [f"Das Schiff verließ Hafen {n} am Mittag und kam nachts zurück." for n in range(_ROWS)],
            "src_lang": ["en"] * _ROWS,
            "tgt_lang": ["de"] * _ROWS,
            "source": ["compile"] * _ROWS,
            "shard": ["compile"] * _ROWS,
            "row": range(_ROWS),
        }
    )


def _read() -> None:
    from corpusprep.sources import SourceSettings, open_source

    with tempfile.TemporaryDirectory() as folder:
        rows = _table().select(["src", "tgt", "row"]).to_pylist()
        written: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
            "a.en-de.tsv": ("src\ttgt\trow\n", lambda row: f"{row['src']}\t{row['tgt']}\t{row['row']}"),
            "b.en": ("", lambda row: row["src"]),
            "b.de": ("", lambda row: row["tgt"]),
            "c.en-de.jsonl": ("", json.dumps),
        }
        for name, (head, line) in written.items():
            (Path(folder) / name).write_text(head + "".join(line(row) + "\n" for row in rows), encoding="utf-8")
        for kind, path in (("tsv", "a.en-de.tsv"), ("moses", "b"), ("jsonl", "c.en-de.jsonl")):
            settings = SourceSettings.model_validate({"format": kind, "path": f"{folder}/{path}"})
            for whole in (False, True):
                source = open_source(settings, whole=whole)
                for shard in source.shards():
                    list(source.read(shard))


def _clean() -> None:
    from corpusprep.stages.clean import clean

    clean(_table())


def _langid() -> None:
    from corpusprep.stages.langid import langid

    langid(_table())


def _dedup() -> None:
    from corpusprep.stages.dedup import DedupSettings, EvaluationIndex, dedup, flaws

    settings = DedupSettings()
    table = _table()
    index = EvaluationIndex.from_texts([(table["src"], table["tgt"])], settings)
    dedup(table, settings, index=index)
    dedup(table, settings)
    flaws(table)


def _quality() -> None:
    from corpusprep.stages.quality import quality
    from corpusprep.stages.quality.comet.tokens import compile_kernels

    quality(_table())
    compile_kernels()


def _balance() -> None:
    from corpusprep.stages.balance import BalanceSettings, balance
    from corpusprep.stages.instruct import instruct

    balance(_table(), BalanceSettings(budget=500))
    instruct(_table())


# The longest first, so that no worker is left with it at the end.
TASKS: dict[str, Callable[[], None]] = {
    "quality": _quality,
    "dedup": _dedup,
    "langid": _langid,
    "clean": _clean,
    "sources": _read,
    "balance": _balance,
}


def run_task(name: str) -> str:
    TASKS[name]()
    remove_old()
    return name


def compile_kernels(workers: int | None = None) -> None:
    """Runs each stage on a few rows, so that its kernels are compiled and kept.

    Args:
        workers: processes; by default one a core.
    """
    with LocalEngine(workers or os.cpu_count() or 1) as engine:
        for _ in engine.map(run_task, TASKS):
            pass
