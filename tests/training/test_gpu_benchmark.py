"""The script for a GPU is rehearsed: all its steps, with tiny models on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_step_gives_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--rehearse", "--minutes", "15", "--out", tmp_path / "gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "gpu" / "figures.jsonl").read_text().splitlines()]
    names = [figure["what"] for figure in found]
    assert names[0] == "tests that need a GPU"
    assert [name.rpartition(" ")[2] for name in names[1:7]] == ["fp32", "fp32", "TF32", "TF32", "bf16", "bf16"]
    assert names[7:] == [
        "training, all layers", "training, bottom:1", "training, top:2", "training, top:2, attention = varlen", "all",
    ]  # fmt: skip
    assert all(figure["ratio"] is None or figure["ratio"] > 0 for figure in found)
    assert not list((tmp_path / "gpu").glob("*.error"))
