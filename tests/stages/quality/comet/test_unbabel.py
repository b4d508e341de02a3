"""COMET itself as the scorer, and the comet scorer held against it, on tiny genuine checkpoints made here."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from comet_models import MODELS, Models, odd_rows, sentences, table

from corpusprep.errors import RunError
from corpusprep.stages.quality import QualitySettings, quality
from corpusprep.stages.quality.comet import CometScorer
from corpusprep.stages.quality.comet.files import find_model
from corpusprep.stages.quality.comet.unbabel import UnbabelScorer

pytest.importorskip("comet", reason="COMET is not installed: make test-comet has an environment of its own for it")

KINDS = ["qe", "kiwi", "kiwi-words"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("comet"))


def by_lightning(folder: Path, name: str, encoder: Path) -> None:
    """A checkpoint as Lightning writes it when COMET trains."""
    import pytorch_lightning
    import torch
    import yaml
    from comet.models import ReferencelessRegression, RegressionMetric, UnifiedMetric

    torch.manual_seed(3)
    hparams = dict(MODELS.get(name, {"class_identifier": "regression_metric", "hidden_sizes": [32, 16]}))
    kind = hparams.pop("class_identifier")
    classes = {"referenceless_regression_metric": ReferencelessRegression, "unified_metric": UnifiedMetric}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = classes.get(kind, RegressionMetric)(
            pretrained_model=str(encoder), load_pretrained_weights=False, **hparams
        )
        (folder / "checkpoints").mkdir(parents=True)
        trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.dump(dict(model.hparams) | {"class_identifier": kind}), encoding="utf-8")


def predicted(folder: str, rows: list[tuple[str, str]], batch_size: int) -> list[float]:
    """The scores of COMET's own loader and `predict`."""
    import comet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = comet.load_from_checkpoint(f"{folder}/checkpoints/model.ckpt")
        samples = [{"src": src, "mt": tgt} for src, tgt in rows]
        found = model.predict(samples, batch_size=batch_size, gpus=0, num_workers=0, progress_bar=False)
    return list(found.scores)


@pytest.mark.parametrize("name", MODELS)
def test_the_comet_scorer_scores_as_predict_does(models: Models, name: str) -> None:
    rows = [*sentences(60, 4), *odd_rows()]
    scores = CometScorer(find_model(models[name])).score(table(rows))
    assert scores.std() > 1e-3  # random weights, but not one score for all
    np.testing.assert_allclose(scores, predicted(models[name], rows, 16), atol=1e-5)


@pytest.mark.parametrize("name", ["kiwi", "kiwi-normed", "qe", "qe-xl"])
def test_a_checkpoint_that_comet_wrote_scores_as_predict_does(models: Models, tmp_path: Path, name: str) -> None:
    by_lightning(tmp_path / "model", name, models.encoder(MODELS[name].get("encoder_model", "XLM-RoBERTa")))
    rows = [*sentences(40, 5), *odd_rows()]
    scores = CometScorer(find_model(str(tmp_path / "model"))).score(table(rows))
    np.testing.assert_allclose(scores, predicted(str(tmp_path / "model"), rows, 7), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_unbabel_scores_are_those_of_predict(models: Models, name: str) -> None:
    rows = [*sentences(50, 4), *odd_rows()]
    scores = UnbabelScorer(models[name], 8).score(table(rows))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, predicted(models[name], rows, 16), atol=1e-5)


@pytest.mark.parametrize("name", ["qe", "kiwi"])
def test_a_score_depends_on_its_row_alone(models: Models, name: str) -> None:
    rows = [*sentences(40, 5), ("A.", "Ein sehr viel längerer Satz, der nicht zu dem kurzen passt."), ("", "")]
    scorer = UnbabelScorer(models[name], 7)
    scores = scorer.score(table(rows))
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = scorer.score(table([rows[i] for i in order]))
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-5)
    np.testing.assert_allclose(scorer.score(table(rows[:1])), scores[:1], atol=1e-5)
    np.testing.assert_array_equal(scorer.score(table(rows)), scores)
    np.testing.assert_allclose(UnbabelScorer(models[name], 1000).score(table(rows)), scores, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_empty_null_and_very_long_texts_are_scored(models: Models, name: str) -> None:
    words = " ".join(["house", "river", "teacher", "bread"] * 2500)
    rows: list[tuple[str | None, str | None]] = [("", ""), (None, "Haus"), (words, words), ("", words), ("\0😀", "ß")]
    scores = UnbabelScorer(models[name], 2).score(table(rows))
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(UnbabelScorer(models[name], 2).score(table([("", "Haus")])), scores[1:2], atol=1e-5)


def test_no_rows_give_no_scores(models: Models) -> None:
    scores = UnbabelScorer(models["qe"], 4).score(table([]))
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


def test_chunked_and_large_strings_are_taken(models: Models) -> None:
    rows = table(sentences(12, 6))
    expected = UnbabelScorer(models["qe"], 4).score(rows)
    large = rows.set_column(0, "src", rows["src"].cast(pa.large_string()))
    chunked = pa.concat_tables([large.slice(0, 5), large.slice(5)])
    np.testing.assert_allclose(UnbabelScorer(models["qe"], 4).score(chunked), expected, atol=1e-5)


def test_the_stage_drops_what_scores_below_the_threshold(models: Models) -> None:
    rows = table(sentences(30, 7))
    scores = UnbabelScorer(models["qe"], 64).score(rows)
    limit = float(np.sort(scores)[[9, 10]].mean())
    outcome = quality(rows, QualitySettings(scorer="comet", backend="unbabel", model=models["qe"], threshold=limit))
    assert outcome.kept.select(["src", "tgt"]) == rows.select(["src", "tgt"]).filter(pa.array(scores >= limit))
    assert outcome.dropped.num_rows == 10
    assert set(outcome.dropped["reason"].to_pylist()) == {"quality.score"}
    np.testing.assert_allclose(outcome.kept["quality"].to_numpy(), scores[scores >= limit], atol=1e-5)
    assert quality(rows, QualitySettings(scorer="comet", backend="unbabel", model=models["qe"])).dropped.num_rows == 0


def test_a_batch_that_does_not_fit_is_halved(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from comet.models import ReferencelessRegression

    rows = table(sentences(11, 8))
    expected = UnbabelScorer(models["qe"], 8).score(rows)
    whole = ReferencelessRegression.predict_step

    def small(self: Any, batch: Any) -> Any:
        if len(batch["src_input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return whole(self, batch)

    monkeypatch.setattr(ReferencelessRegression, "predict_step", small)
    fits = 3
    np.testing.assert_allclose(UnbabelScorer(models["qe"], 8).score(rows), expected, atol=1e-5)
    fits = 0
    with pytest.raises(RunError, match="does not fit the GPU's memory: CUDA out of memory"):
        UnbabelScorer(models["qe"], 8).score(rows)


def test_a_model_that_needs_a_reference_is_refused(models: Models, tmp_path: Path) -> None:
    by_lightning(tmp_path / "model", "regression", models.encoder())
    for scorer in (lambda model: UnbabelScorer(model, 8), lambda model: CometScorer(find_model(model))):
        with pytest.raises(RunError, match=r"\(regression_metric\) needs a reference translation"):
            scorer(str(tmp_path / "model"))


def test_what_is_no_checkpoint_is_refused(models: Models, tmp_path: Path) -> None:
    import torch

    with pytest.raises(
        RunError, match=r"this is not a COMET model\. quality\.model must be a folder with hparams\.yaml"
    ):
        UnbabelScorer(str(models.encoder()), 8)
    folder = tmp_path / "model"
    shutil.copytree(models["qe"], folder)
    checkpoint, hparams = folder / "checkpoints" / "model.ckpt", folder / "hparams.yaml"
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint\n", whole[: len(whole) // 2]):
        checkpoint.write_bytes(content)
        with pytest.raises(RunError, match=r"model\.ckpt cannot be read as a COMET checkpoint: \w+"):
            UnbabelScorer(str(folder), 8)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, checkpoint)
    with pytest.raises(RunError, match=r"model\.ckpt"):
        UnbabelScorer(str(checkpoint), 8)
    checkpoint.write_bytes(whole)
    for content, problem in (
        ("layer: mix\n", "no class_identifier"),
        ("a: [", "cannot be read"),
        ("", "does not describe"),
    ):
        hparams.write_text(content)
        with pytest.raises(RunError, match=problem):
            UnbabelScorer(str(folder), 8)
    hparams.write_text("class_identifier: other_metric\n")
    with pytest.raises(RunError, match="cannot be read as a COMET checkpoint: KeyError: 'other_metric'"):
        UnbabelScorer(str(folder), 8)
    hparams.unlink()
    with pytest.raises(RunError, match=r"hparams\.yaml is missing"):
        UnbabelScorer(str(checkpoint), 8)


def test_a_checkpoint_that_lacks_weights_is_refused(models: Models, tmp_path: Path) -> None:
    import torch

    shutil.copytree(models["qe"], tmp_path / "model")
    file = tmp_path / "model" / "checkpoints" / "model.ckpt"
    checkpoint = torch.load(file)
    del checkpoint["state_dict"]["estimator.ff.0.weight"]
    checkpoint["state_dict"]["encoder.model.embeddings.position_ids"] = torch.arange(66)  # old ones hold it: no harm
    torch.save(checkpoint, file)
    with pytest.raises(RunError, match=r"1 of the model's weights are missing, such as estimator\.ff\.0\.weight"):
        UnbabelScorer(str(tmp_path / "model"), 8)


def test_logging_and_warnings_are_left_as_they_were(models: Models) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.root.manager.disable, warnings.filters[:])
    UnbabelScorer(models["qe"], 8).score(table(sentences(3, 1)))
    assert before == (root.handlers[:], root.level, logging.root.manager.disable, warnings.filters[:])
