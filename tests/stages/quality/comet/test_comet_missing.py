"""The comet scorer where PyTorch or COMET is not installed, as in most environments."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest

from corpusprep.errors import RunError
from corpusprep.stages.quality import QualitySettings, quality, require

ROWS = pa.table({"src": ["The house."], "tgt": ["Das Haus."], "src_lang": ["en"], "tgt_lang": ["de"]})


@pytest.mark.parametrize(
    ("backend", "module", "extra"), [("native", "torch", "quality"), ("unbabel", "comet", "comet")]
)
def test_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, module: str, extra: str
) -> None:
    (tmp_path / "hparams.yaml").write_text(f"class_identifier: unified_metric\npretrained_model: {tmp_path}\n")
    (tmp_path / "checkpoints").mkdir()
    for file in ("checkpoints/model.ckpt", "config.json", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    monkeypatch.setitem(sys.modules, module, None)
    settings = QualitySettings.model_validate({"scorer": "comet", "model": str(tmp_path), "backend": backend})
    for call in (lambda: require(settings), lambda: quality(ROWS, settings)):
        with pytest.raises(RunError, match=rf"pip install 'corpusprep\[{extra}\]'"):
            call()


@pytest.mark.parametrize(("backend", "module"), [("native", "torch"), ("unbabel", "comet")])
def test_a_broken_installation_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, module: str
) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("import pkg_resources_of_old\n")
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    settings = QualitySettings.model_validate({"scorer": "comet", "model": "some/model", "backend": backend})
    with pytest.raises(RunError, match="cannot be imported: No module named 'pkg_resources_of_old'"):
        require(settings)
