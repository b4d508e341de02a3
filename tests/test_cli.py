"""The command line: exit codes, messages, and a quick start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corpusprep.cli import main


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "corpusprep", *arguments], capture_output=True, text=True)


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def test_a_run_prints_its_tables(bitext: Callable[..., Path], tmp_path: Path) -> None:
    data = bitext(rows=60, shards=1)
    done = call("run", "--source", f"opus100={data / 'opus'}", "--source", f"nllb={data / 'nllb'}", "--out", str(tmp_path / "o"),
                "--set", "balance.budget=3000")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("rows in", "template_tokens 1", "en-de", "budget 3,000", "parts made"):
        assert text in done.stdout
    assert "rows/s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--out", "x"), "has no source"),
        (("run", "nowhere.toml", "--out", "x"), "nowhere.toml"),
        (("run", "--source", "opus100=nowhere", "--out", "x"), "nowhere"),
        (("run", "--source", "opsu=nowhere", "--out", "x"), "opus100"),
        (("run", "--source", "tsv=a.tsv", "--out", "x", "--memory", "lots"), "not a size"),
        (("clean", "nowhere.tsv", "out.tsv"), "nowhere.tsv"),
        (("clean", "a.docx", "out.tsv"), "suffix"),
        (("cleen",), "No such command"),
    ],
)
def test_mistakes_end_with_two_and_a_message(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"], ["quality", "--help"]):
        assert exit_code(*arguments) == 0
    assert exit_code("--version") == 0
    assert "corpusprep" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, corpusprep.cli; print([m for m in ('numba', 'polars', 'pyarrow', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
