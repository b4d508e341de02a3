"""The step that CONTRIBUTING shows as an example works as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from pydantic import create_model
from stepping import begin, nothing_dropped, read_parts, with_column, write_jsonl

from corpusprep.recipe import Recipe
from corpusprep.stage import Settings
from corpusprep.steps import verdicts


class DatesSettings(Settings):
    enabled: bool = False
    pattern: str = r"\d{4}-\d{2}-\d{2}"


def test_the_example_of_a_step_drops_rows_and_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "step_of_dates.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(verdicts, "VERDICTS", (*verdicts.VERDICTS, "dates.source"))
    import step_of_dates  # type: ignore[import-not-found]

    sources = ("It was on 2021-05-04.", "It was last week.", "On 1999-12-31, at night.", "")
    rows = [{"src": source, "tgt": "etwas", "src_lang": "en", "tgt_lang": "de"} for source in sources]
    write_jsonl(tmp_path / "data" / "x.jsonl", rows)
    kind = create_model("Dated", __base__=Recipe, dates=(DatesSettings, DatesSettings()))
    off = {"clean": {"enabled": False}, "langid": {"enabled": False}, "dedup": {"enabled": False}}
    for enabled, expected in ((False, ["", "", "", ""]), (True, ["dates.source", "", "dates.source", ""])):
        for _ in range(2):
            recipe = kind.model_validate(
                {"source": [{"format": "jsonl", "path": str(tmp_path / "data")}], **off, "dates": {"enabled": enabled}}
            )
            step = begin(recipe, tmp_path / "out")
            parts = read_parts(step)
            found = step_of_dates.drop_dates(step, parts, nothing_dropped(tmp_path / "out", parts))
            codes = with_column(parts, found)["verdict"].to_pylist()
            assert [verdicts.VERDICTS[code] for code in codes] == expected
    assert (step.result.made["dates"], step.result.reused["dates"]) == (0, 1)
    sys.modules.pop("step_of_dates")
