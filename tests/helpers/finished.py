"""The folder of a finished run, without the run: a mix of any number of files, in a moment."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa

from corpusprep.stages import instruct
from corpusprep.store import write_table


def make_run(folder: Path, shards: int = 3, *, seed: int = 1, container: str = "parquet", rows: int = 4) -> Path:
    """Writes mix, rejects and manifest as a run does, over those of an earlier call; returns the folder.

    Args:
        shards: files of the training split.
        seed: other seeds give other sentences in the same files.
        rows: sentence pairs in each file.
    """
    for name in ("mix", "rejects"):
        shutil.rmtree(folder / name, ignore_errors=True)
    names = [f"mix/train-{n:05d}-of-{shards:05d}.{container}" for n in range(shards)]
    names.append(f"mix/validation/validation-00000-of-00001.{container}")
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        instruct.write(instruct.instruct(pairs(number, seed, rows)).kept, folder / name, container)  # type: ignore[arg-type]
    (folder / "rejects").mkdir()
    write_table(pa.table({"reason": [f"clean.empty {seed}"]}), folder / "rejects" / "opus-0001-00000.parquet")
    facts = instruct.CardFacts(
        name="first-mix",
        pairs={"en-de": instruct.PairFacts(shards * rows, 2 * shards * rows, 900)},
        files={"train": [f"train-*.{container}"], "validation": [f"validation/*.{container}"]},
        examples={"train": 2 * shards * rows, "validation": 2 * rows},
        container=container,
    )
    (folder / "mix" / "README.md").write_text(instruct.card(facts), encoding="utf-8")
    (folder / ".lock").touch()
    write_manifest(folder)
    return folder


def pairs(number: int, seed: int, rows: int) -> pa.Table:
    texts = [f"{number} {seed} {row}" for row in range(rows)]
    sides = {
        "src": [f"The ship {text} left." for text in texts],
        "tgt": [f"Das Schiff {text} ist fort." for text in texts],
    }
    return pa.table(sides | {"src_lang": ["en"] * rows, "tgt_lang": ["de"] * rows})


def write_manifest(folder: Path) -> None:
    """A manifest that lists the files as they are."""
    found = [path for name in ("mix", "rejects") for path in sorted((folder / name).rglob("*")) if path.is_file()]
    files = [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
        for path in found
    ]
    (folder / "manifest.json").write_text(
        json.dumps({"name": "first-mix", "key": "0", "files": files}), encoding="utf-8"
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def expected(folder: Path, *, with_rejects: bool = False) -> dict[str, bytes]:
    """Name -> content of what a publish of the folder should leave at the target."""
    files = {
        path.relative_to(folder).as_posix().removeprefix("mix/"): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] in ("mix", "manifest.json", *["rejects"] * with_rejects)
    }
    lines = "".join(f"{sha256(content)}  {name}\n" for name, content in sorted(files.items()))
    return files | {"SHA256SUMS": lines.encode()}
