"""The COMET scorer where COMET is not installed, as in most environments."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest

from corpusprep.errors import RunError
from corpusprep.stages._quality_comet import CometScorer
from corpusprep.stages.quality import QualitySettings, quality

ROWS = pa.table({"src": ["The house."], "tgt": ["Das Haus."], "src_lang": ["en"], "tgt_lang": ["de"]})


def test_without_comet_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(RunError, match=r"pip install 'corpusprep\[comet\]'"):
        CometScorer(str(tmp_path), 8)
    settings = QualitySettings(scorer="comet", model=str(tmp_path))
    with pytest.raises(RunError, match=r"pip install 'corpusprep\[comet\]'"):
        quality(ROWS, settings)


def test_a_broken_installation_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "comet").mkdir()
    (tmp_path / "comet" / "__init__.py").write_text("import pkg_resources_of_old\n")
    monkeypatch.delitem(sys.modules, "comet", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match="cannot be imported: No module named 'pkg_resources_of_old'"):
        CometScorer("some/model", 8)
