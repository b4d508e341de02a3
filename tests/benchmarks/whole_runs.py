"""What users wait for: the start, learning, a stage on a file, and a whole run, in seconds of CPU time. Parts of `bench.py`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from _measure import Cost, command

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("corpusprep")
COPIES = 6

_PREDICT = """
import sys, time
import fasttext
lines = open(sys.argv[2], encoding="utf-8", newline="\\n").read().split("\\n")[:-1]
model = fasttext.load_model(sys.argv[1])
began = time.process_time()
for line in lines:
    model.predict(line)
print(len(lines), time.process_time() - began)
"""
_LEARN = """
import sys, time
import pyarrow.parquet as pq
from corpusprep.stages.quality import QualitySettings, prepare
table, settings = pq.read_table(sys.argv[1]), QualitySettings()
prepare(table.slice(0, 2000), settings, 1)
began = time.process_time()
prepare(table, settings, 1)
print(table.num_rows, time.process_time() - began)
"""


def mixed(lines: Sequence[str], copies: int = COPIES) -> list[str]:
    """Rows of tab-separated sides, so many times over, each time other rows: in all copies but the first, the first half of the
    words of a row is followed by the second half of another row's."""
    rows = [line.split("\t") for line in lines]
    found = list(lines)
    for copy in range(1, copies):
        for k, row in enumerate(rows):
            other = rows[(k + 1000 * copy) % len(rows)]
            sides = [(a.split(" "), b.split(" ")) for a, b in zip(row, other, strict=True)]
            found.append("\t".join(" ".join([*a[: len(a) // 2], *b[len(b) // 2 :]]) for a, b in sides))
    return found


def set_up(folder: Path, real: dict[str, Sequence[str]]) -> list[Path]:
    """A file of rows for each pair, and one of all their sides, line by line."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files, lines = [], []
    for pair, rows in real.items():
        made = [row for row in mixed(rows) if row.strip("\t")]
        files.append(folder / f"rows.{pair}.tsv")
        files[-1].write_text("".join(f"{row}\n" for row in made), encoding="utf-8")
        lines += [side for row in made for side in row.split("\t")]
    (folder / "lines").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return files


def measured(folder: Path, script: str, *arguments: str | Path) -> tuple[int, float]:
    """What a script prints: a number of rows, and seconds of CPU time."""
    command([sys.executable, "-c", script, *arguments], folder)
    rows, seconds = (folder / "last-command.log").read_text().split()[-2:]
    return int(rows), float(seconds)


def start(folder: Path) -> dict[str, Cost]:
    """What commands cost on four rows, the least of five."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["Good morning.\tGuten Morgen.", "The house is old.\tDas Haus ist alt.",
            "Where is the station?\tWo ist der Bahnhof?", "Thank you very much.\tVielen Dank."]  # fmt: skip
    (folder / "four.en-de.tsv").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    wanted: dict[str, list[str | Path]] = {
        "corpusprep run": ["run", "--source", "tsv=four.en-de.tsv", "--out", "run", "--quiet"],
        **{f"corpusprep {stage}": [stage, "four.en-de.tsv", "out.tsv"] for stage in ("clean", "langid", "dedup")},
    }
    found: dict[str, Cost] = {}
    for name, arguments in wanted.items():
        costs = []
        for _ in range(6):
            shutil.rmtree(folder / "run", ignore_errors=True)
            costs.append(command([PROGRAM, *arguments], folder))
        found[name] = min(costs[1:], key=lambda cost: cost.cpu)
    return found


def whole(folder: Path, files: Sequence[Path]) -> Cost:
    """A run from the rows to the mix, by one process."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    sources = [part for file in files for part in ("--source", f"tsv={file}")]
    return command([PROGRAM, "run", *sources, "--out", "run", "--workers", "1", "--quiet"], folder)


def learning(folder: Path, generate: Any) -> tuple[int, float]:
    """Seconds of CPU time to learn from 100,000 rows of a pair, that are generated."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generate(folder, 110_000, "en-de", "tsv")
    lines = [
        line.split("\t") for path in sorted(folder.rglob("*.tsv*")) for line in path.read_text("utf-8").splitlines()
    ]
    rows = list({tuple(line): None for line in lines if len(line) == 2 and all(line)})[:100_000]
    sides = dict(zip(("src", "tgt"), map(list, zip(*rows, strict=True)), strict=True))
    codes = {"src_lang": ["en"] * len(rows), "tgt_lang": ["de"] * len(rows)}
    pq.write_table(pa.table({**sides, **codes}), folder / "rows.parquet")
    return measured(folder, _LEARN, folder / "rows.parquet")


def predicted(folder: Path, model: Path) -> tuple[int, float]:
    """What fasttext-predict takes for all lines alone."""
    return measured(folder, _PREDICT, model, folder / "lines")


def stage_on_parquet(folder: Path, files: Sequence[Path], stage: str) -> tuple[int, float]:
    """Lines, and seconds of CPU time of a stage command from Parquet to Parquet; those of ten rows are taken off."""
    tables = []
    for file in files:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        pair = file.name.split(".")[1].split("-")
        columns: dict[str, Any] = dict(
            zip(("src", "tgt"), map(list, zip(*(row for row in rows if len(row) == 2), strict=True)), strict=True)
        )
        codes = {side: [code] * len(columns["src"]) for side, code in zip(("src_lang", "tgt_lang"), pair, strict=True)}
        tables.append(pa.table({**columns, **codes}))
    table = pa.concat_tables(tables)
    pq.write_table(table, folder / "in.parquet")
    pq.write_table(table.slice(0, 10), folder / "ten.parquet")
    costs = {
        name: min(command([PROGRAM, stage, name, "out.parquet"], folder).cpu for _ in range(3))
        for name in ("ten.parquet", "in.parquet")
    }
    return 2 * table.num_rows, costs["in.parquet"] - costs["ten.parquet"]


def quickstart(folder: Path) -> list[Cost]:
    """The README's first command once all is installed: making the data, and the run, with as many processes as it likes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    examples = HERE.parents[1] / "examples"
    return [
        command([sys.executable, examples / "build.py", "out/example-data"], folder),
        command([PROGRAM, "run", examples / "quickstart.toml", "--out", "out/quickstart"], folder),
    ]
