"""What the tests of stage commands share: a small corpus in any format and packing, and reading what a command wrote."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import polars as pl

ROWS = [
    ("The bridge near the old village is closed today.", "Die Brücke bei dem alten Dorf ist heute gesperrt."),
    ("The bridge near the old village is closed today.", "Die Brücke bei dem alten Dorf ist heute gesperrt."),
    ("", "Niemand weiß, was hier steht."),
    ("We bought bread and water in the morning.", "Am Morgen kauften wir Brot und Wasser."),
]
PACKERS: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def table() -> pl.DataFrame:
    return pl.DataFrame(ROWS, schema=["src", "tgt"], orient="row").with_columns(
        src_lang=pl.lit("en"), tgt_lang=pl.lit("deu_Latn")
    )


def content(kind: str, frame: pl.DataFrame | None = None) -> bytes:
    """The bytes of a file of a format, not packed."""
    frame = table() if frame is None else frame
    if kind == "parquet":
        stream = io.BytesIO()
        frame.write_parquet(stream)
        return stream.getvalue()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in frame.iter_rows(named=True)).encode()
    rows = [tuple(frame.columns), *frame.rows()]
    return "".join("\t".join("" if cell is None else str(cell) for cell in row) + "\n" for row in rows).encode()


def write(path: Path, frame: pl.DataFrame | None = None) -> Path:
    """Writes the corpus, or another, in the format and packing that the suffixes name."""
    packer = PACKERS.get(path.suffix)
    kind = (path.with_suffix("") if packer else path).suffix[1:]
    data = content(kind, frame)
    path.write_bytes(packer.compress(data) if packer else data)
    return path


def read(path: Path) -> pl.DataFrame:
    """What a command wrote."""
    packer = PACKERS.get(path.suffix)
    data = packer.decompress(path.read_bytes()) if packer else path.read_bytes()
    name = path.with_suffix("").name if packer else path.name
    if name.endswith(".parquet"):
        return pl.read_parquet(data)
    if name.endswith(".jsonl"):
        return pl.DataFrame([json.loads(line) for line in data.splitlines()])
    return pl.read_csv(data, separator="\t", quote_char=None)
