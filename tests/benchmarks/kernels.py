"""Kernels against the packages that do the same, in alternating runs on one machine; prints ratios.

    python tests/benchmarks/kernels.py [--rows 20000] [--rounds 3]

Everything runs on generated text (`generate.py`) on one core: fastText prediction against `fasttext-predict` with the same
model, SimHash fingerprints against the `simhash` package on the same features, the near-duplicate search against one
`numpy.sort` of the same fingerprints, and the first pass as a whole.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from corpusprep.sources import SourceSettings, open_source
from corpusprep.stages.clean import clean
from corpusprep.stages.dedup import DedupSettings, decide, fingerprint, reference_fingerprint
from corpusprep.stages.langid import LangidSettings, langid, model_files


def read(rows: int) -> pa.Table:
    with tempfile.TemporaryDirectory() as folder:
        generator = Path(__file__).with_name("generate.py")
        command = [
            sys.executable,
            str(generator),
            folder,
            "--rows",
            str(rows),
            "--pairs",
            "en-de,en-ru",
            "--format",
            "nllb",
        ]
        subprocess.run(command, check=True, capture_output=True)
        source = open_source(SourceSettings(format="nllb", path=folder))
        return pa.concat_tables([batch.table for shard in source.shards() for batch in source.read(shard)])


def against(name: str, rounds: int, count: int, ours: Callable[[], Any], theirs: Callable[[], Any], peer: str) -> None:
    """Runs both in turn and prints rows a second of CPU time of each, and the median of the ratios."""
    ours(), theirs()
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        pair = []
        for call in (ours, theirs):
            began = time.process_time()
            call()
            pair.append(time.process_time() - began)
        times.append((pair[0], pair[1]))
    ratio = statistics.median(b / a for a, b in times)
    mine, other = (count / statistics.median(column) for column in zip(*times, strict=True))
    print(f"{name:28}{mine:14,.0f}{other:14,.0f}  {peer:28}{ratio:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = read(options.rows)
    rows = table.num_rows
    print(f"{'':28}{'ours, rows/s':>14}{'peer, rows/s':>14}  {'peer':28}{'ratio':>8}")

    import fasttext

    settings = LangidSettings()
    model = fasttext.load_model(str(model_files(settings)[0]))
    lines = [text.replace("\n", " ") for side in ("src", "tgt") for text in table[side].to_pylist()]
    against("langid, both sides", options.rounds, rows, lambda: langid(table, settings),
            lambda: [model.predict(line, 5) for line in lines], "fasttext-predict")  # fmt: skip

    few = table.slice(0, min(rows, 1000))
    pairs = list(zip(few["src"].to_pylist(), few["tgt"].to_pylist(), strict=True))
    against("SimHash fingerprints", options.rounds, few.num_rows, lambda: fingerprint(few, DedupSettings()),
            lambda: [reference_fingerprint(*pair, DedupSettings()) for pair in pairs], "simhash and Python n-grams")  # fmt: skip

    draw = np.random.default_rng(1)
    values = draw.integers(0, 2**64, 2_000_000, dtype=np.uint64)
    values[::10] = values[1::10] ^ np.uint64(1 << 40)
    against("near-duplicate search", options.rounds, values.size, lambda: decide(values, values, DedupSettings()),
            lambda: np.sort(values), "one np.sort")  # fmt: skip

    def first_pass() -> None:
        fingerprint(langid(clean(table).kept).kept, DedupSettings())

    first_pass()
    began = time.process_time()
    first_pass()
    print(f"{'clean, langid, fingerprint':28}{rows / (time.process_time() - began):14,.0f}")


if __name__ == "__main__":
    main()
