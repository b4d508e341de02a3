"""The COMET scorer, on genuine checkpoints: tiny ones with weights drawn at random, made here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from corpusprep.errors import RunError
from corpusprep.stages._quality_comet import CometScorer
from corpusprep.stages.quality import QualitySettings, quality

pytest.importorskip("comet", reason="COMET is not installed: pip install '.[comet]' in an environment of its own")

ROOT = Path(__file__).parents[2]
NOUNS = {"house": "Haus", "river": "Boot", "teacher": "Kind", "bread": "Brot", "garden": "Beet", "letter": "Buch"}
QE, UNIFIED, WORDS, REGRESSION = "referenceless", "unified", "words", "regression"


def sentences(rows: int, seed: int) -> list[tuple[str, str]]:
    """English and German sentences of one to twelve nouns."""
    draw = random.Random(seed)
    drawn = [draw.choices(sorted(NOUNS), k=draw.randint(1, 12)) for _ in range(rows)]
    return [
        (f"We saw a {' and a '.join(n)}.", f"Wir sahen ein {' und ein '.join(NOUNS[w] for w in n)}.") for n in drawn
    ]


def table(rows: list[tuple[str | None, str | None]]) -> pa.Table:
    src, tgt = zip(*rows, strict=True) if rows else ((), ())
    return pa.table(
        {
            "src": pa.array(src, pa.string()),
            "tgt": pa.array(tgt, pa.string()),
            "src_lang": pa.array(["en"] * len(rows), pa.string()),
            "tgt_lang": pa.array(["de"] * len(rows), pa.string()),
        }
    )


@dataclass(frozen=True)
class Models:
    """Folders of checkpoints by kind, and that of their encoder."""

    folder: Path
    encoder: Path

    def __getitem__(self, kind: str) -> str:
        return str(self.folder / kind)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("comet")
    encoder = folder / "encoder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_encoder(encoder)
        for kind in (QE, UNIFIED, WORDS, REGRESSION):
            make_checkpoint(folder / kind, kind, str(encoder))
    return Models(folder, encoder)


def make_encoder(folder: Path) -> None:
    """What the hub has of an encoder, less its weights: a tokenizer trained on the spot, and a config of 64 positions."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds
    from tokenizers.trainers import UnigramTrainer
    from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text for pair in sentences(300, 2) for text in pair], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    XLMRobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.5, max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    ).save_pretrained(folder)  # fmt: skip


def make_checkpoint(folder: Path, kind: str, encoder: str) -> None:
    """A checkpoint as Lightning writes it when COMET trains."""
    import pytorch_lightning
    import torch
    import yaml
    from comet.models import ReferencelessRegression, RegressionMetric, UnifiedMetric

    torch.manual_seed(3)
    common: dict[str, Any] = {"pretrained_model": encoder, "hidden_sizes": [32, 16], "load_pretrained_weights": False}
    if kind == QE:
        model = ReferencelessRegression(**common)
    elif kind == REGRESSION:
        model = RegressionMetric(**common)
    elif kind == UNIFIED:
        model = UnifiedMetric(**common, input_segments=["mt", "src"], layer_transformation="sparsemax_patch")
    else:
        model = UnifiedMetric(**common, word_level_training=True, word_layer=2)
    (folder / "checkpoints").mkdir(parents=True)
    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.dump(dict(model.hparams)), encoding="utf-8")


def predicted(folder: str, rows: list[tuple[str, str]], batch_size: int) -> list[float]:
    """The scores of COMET's own loader and `predict`."""
    import comet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = comet.load_from_checkpoint(f"{folder}/checkpoints/model.ckpt")
        samples = [{"src": src, "mt": tgt} for src, tgt in rows]
        found = model.predict(samples, batch_size=batch_size, gpus=0, num_workers=0, progress_bar=False)
    return list(found.scores)


@pytest.mark.parametrize("kind", [QE, UNIFIED, WORDS])
def test_scores_are_those_of_predict(models: Models, kind: str) -> None:
    rows = sentences(50, 4)
    scores = CometScorer(models[kind], 8).score(table(rows))
    assert scores.dtype == np.float32
    assert scores.std() > 1e-3  # random weights, but not one score for all
    np.testing.assert_allclose(scores, predicted(models[kind], rows, 16), atol=1e-5)


@pytest.mark.parametrize("kind", [QE, UNIFIED])
def test_a_score_depends_on_its_row_alone(models: Models, kind: str) -> None:
    rows = [*sentences(40, 5), ("A.", "Ein sehr viel längerer Satz, der nicht zu dem kurzen passt."), ("", "")]
    scorer = CometScorer(models[kind], 7)
    scores = scorer.score(table(rows))
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = scorer.score(table([rows[i] for i in order]))
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-5)
    np.testing.assert_allclose(scorer.score(table(rows[:1])), scores[:1], atol=1e-5)
    np.testing.assert_array_equal(scorer.score(table(rows)), scores)
    np.testing.assert_allclose(CometScorer(models[kind], 1000).score(table(rows)), scores, atol=1e-5)


@pytest.mark.parametrize("kind", [QE, UNIFIED, WORDS])
def test_empty_null_and_very_long_texts_are_scored(models: Models, kind: str) -> None:
    words = " ".join(["house", "river", "teacher", "bread"] * 2500)
    rows: list[tuple[str | None, str | None]] = [("", ""), (None, "Haus"), (words, words), ("", words), ("\0😀", "ß")]
    scores = CometScorer(models[kind], 2).score(table(rows))
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(CometScorer(models[kind], 2).score(table([("", "Haus")])), scores[1:2], atol=1e-5)


def test_no_rows_give_no_scores(models: Models) -> None:
    scores = CometScorer(models[QE], 4).score(table([]))
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


def test_chunked_and_large_strings_are_taken(models: Models) -> None:
    rows = table(sentences(12, 6))
    expected = CometScorer(models[QE], 4).score(rows)
    large = rows.set_column(0, "src", rows["src"].cast(pa.large_string()))
    chunked = pa.concat_tables([large.slice(0, 5), large.slice(5)])
    np.testing.assert_allclose(CometScorer(models[QE], 4).score(chunked), expected, atol=1e-5)


def test_the_stage_drops_what_scores_below_the_threshold(models: Models) -> None:
    rows = table(sentences(30, 7))
    scores = CometScorer(models[QE], 64).score(rows)
    limit = float(np.sort(scores)[[9, 10]].mean())
    outcome = quality(rows, QualitySettings(scorer="comet", model=models[QE], threshold=limit))
    assert outcome.kept.select(["src", "tgt"]) == rows.select(["src", "tgt"]).filter(pa.array(scores >= limit))
    assert outcome.dropped.num_rows == 10
    assert set(outcome.dropped["reason"].to_pylist()) == {"quality.score"}
    np.testing.assert_allclose(outcome.kept["quality"].to_numpy(), scores[scores >= limit], atol=1e-5)
    assert quality(rows, QualitySettings(scorer="comet", model=models[QE])).dropped.num_rows == 0


def test_a_batch_that_does_not_fit_is_halved(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from comet.models import ReferencelessRegression

    rows = table(sentences(11, 8))
    expected = CometScorer(models[QE], 8).score(rows)
    whole = ReferencelessRegression.predict_step

    def small(self: Any, batch: Any) -> Any:
        if len(batch["src_input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return whole(self, batch)

    monkeypatch.setattr(ReferencelessRegression, "predict_step", small)
    fits = 3
    np.testing.assert_allclose(CometScorer(models[QE], 8).score(rows), expected, atol=1e-5)
    fits = 0
    with pytest.raises(RunError, match="does not fit the GPU's memory: CUDA out of memory"):
        CometScorer(models[QE], 8).score(rows)


def test_a_model_is_given_as_folder_or_file(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(sentences(5, 9))
    expected = CometScorer(models[UNIFIED], 8).score(rows)
    own = tmp_path / "own"
    shutil.copytree(models[UNIFIED], own)
    (own / "checkpoints" / "model.ckpt").rename(own / "checkpoints" / "epoch=3-step=5.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("own", "./own", "~/own", "own/checkpoints/epoch=3-step=5.ckpt"):
        np.testing.assert_allclose(CometScorer(model, 8).score(rows), expected, atol=1e-5)
    monkeypatch.chdir(own / "checkpoints")
    np.testing.assert_allclose(CometScorer("epoch=3-step=5.ckpt", 8).score(rows), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["/no/such/folder", "./kiwi", "kiwi", "a/b/c", "models/kiwi.ckpt", "~/kiwi"])
def test_a_path_that_is_missing_is_named(models: Models, model: str) -> None:
    with pytest.raises(RunError, match=f"quality.model = '{model}': there is no such file or folder"):
        CometScorer(model, 8)


def test_a_model_that_needs_a_reference_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"\(regression_metric\) compares with a reference translation"):
        CometScorer(models[REGRESSION], 8)
    shutil.copytree(models[UNIFIED], tmp_path / "unified")
    hparams = tmp_path / "unified" / "hparams.yaml"
    hparams.write_text(hparams.read_text().replace("- src\n", "- ref\n"))
    with pytest.raises(RunError, match=r"\(unified_metric\) compares with a reference translation"):
        CometScorer(str(tmp_path / "unified"), 8)


def test_what_is_no_checkpoint_is_refused(models: Models, tmp_path: Path) -> None:
    import torch

    with pytest.raises(
        RunError, match=r"this is no COMET model\. quality\.model wants a folder that holds hparams\.yaml"
    ):
        CometScorer(str(models.encoder), 8)
    folder = tmp_path / "model"
    shutil.copytree(models[QE], folder)
    checkpoint, hparams = folder / "checkpoints" / "model.ckpt", folder / "hparams.yaml"
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint\n", whole[: len(whole) // 2]):
        checkpoint.write_bytes(content)
        with pytest.raises(RunError, match=r"model\.ckpt cannot be read as a COMET checkpoint: \w+"):
            CometScorer(str(folder), 8)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, checkpoint)
    with pytest.raises(RunError, match=r"model\.ckpt"):
        CometScorer(str(checkpoint), 8)
    checkpoint.write_bytes(whole)
    for content, problem in (
        ("layer: mix\n", "no class_identifier"),
        ("a: [", "cannot be read"),
        ("", "does not describe"),
    ):
        hparams.write_text(content)
        with pytest.raises(RunError, match=problem):
            CometScorer(str(folder), 8)
    hparams.write_text("class_identifier: other_metric\n")
    with pytest.raises(RunError, match="cannot be read as a COMET checkpoint: KeyError: 'other_metric'"):
        CometScorer(str(folder), 8)
    hparams.unlink()
    with pytest.raises(RunError, match=r"hparams\.yaml is missing"):
        CometScorer(str(checkpoint), 8)


def test_a_checkpoint_that_lacks_weights_is_refused(models: Models, tmp_path: Path) -> None:
    import torch

    shutil.copytree(models[QE], tmp_path / "model")
    file = tmp_path / "model" / "checkpoints" / "model.ckpt"
    checkpoint = torch.load(file)
    del checkpoint["state_dict"]["estimator.ff.0.weight"]
    checkpoint["state_dict"]["encoder.model.embeddings.position_ids"] = torch.arange(66)  # old ones hold it: no harm
    torch.save(checkpoint, file)
    with pytest.raises(RunError, match=r"lacks 1 of the model's weights, as estimator\.ff\.0\.weight"):
        CometScorer(str(tmp_path / "model"), 8)


def test_logging_and_warnings_are_left_as_they_were(models: Models) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.root.manager.disable, warnings.filters[:])
    CometScorer(models[QE], 8).score(table(sentences(3, 1)))
    assert before == (root.handlers[:], root.level, logging.root.manager.disable, warnings.filters[:])


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks for: `folders` are its models, by name."""

    folders: dict[str, Path]
    gated: frozenset[str]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        owner = parts[2:4] if parts[:2] == ["api", "models"] else parts[:2]
        name = "/".join(owner)
        if name not in self.folders:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = self.folders[name]
        if parts[0] == "api":
            if parts[4:5] != ["revision"] and parts[4:]:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            files = [{"rfilename": str(f.relative_to(folder))} for f in sorted(folder.rglob("*")) if f.is_file()]
            return self.answer(200, json.dumps({"id": name, "sha": "1" * 40, "siblings": files}).encode(), {})
        if name in self.gated:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, file.read_bytes(), {"ETag": f'"{len(parts)}{file.name}"', "X-Repo-Commit": "1" * 40})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub(folders: dict[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serves models on this machine: the address, and the list of what is asked for, as it grows."""
    handler = type("Handler", (Hub,), {"folders": folders, "gated": gated, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_SCRIPT = """
import json, logging, sys
import pyarrow as pa
from corpusprep.errors import RunError
from corpusprep.stages._quality_comet import CometScorer
answers = []
for model in json.loads(sys.argv[1]):
    try:
        scores = CometScorer(model, 8).score(pa.table({"src": ["The house."], "tgt": ["Das Haus."]}))
        answers.append(float(scores[0]))
    except RunError as error:
        answers.append(str(error))
assert not logging.getLogger().handlers
print(json.dumps(answers))
"""


def scored(models: list[str], home: Path, **environment: str) -> tuple[list[Any], str]:
    """Scores one row with each model in a process of its own, where warnings are errors: scores or messages, and stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1", **environment}
    command = [sys.executable, "-W", "error", "-c", _SCRIPT, json.dumps(models)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_models_of_the_hub(models: Models, tmp_path: Path) -> None:
    served = tmp_path / "served"
    make_quietly(served, "tiny/encoder", models.encoder, tmp_path)
    expected = float(CometScorer(models[QE], 8).score(table([("The house.", "Das Haus.")]))[0])
    folders = {"tiny/qe": served, "tiny/gated": Path(models[UNIFIED]), "tiny/encoder": models.encoder}
    home = tmp_path / "home"
    with hub(folders, frozenset({"tiny/gated"})) as (address, asked):
        models_asked = ["tiny/qe", "tiny/qe", "tiny/gated", "tiny/none"]
        (score, again, gated, missing), _ = scored(models_asked, home, HF_ENDPOINT=address)
    assert score == pytest.approx(expected, abs=1e-5)
    assert again == score
    assert (
        sum(path.startswith("/api/models/tiny/qe/revision") for path in asked) == 1
    )  # the second time, the cache has it
    assert f"tiny/gated is gated. Accept its licence at {address}/tiny/gated, then log in with hf auth login" in gated
    assert "has no model tiny/none that you may see" in missing
    assert "quality.model the path of a folder that holds hparams.yaml" in missing
    (offline, absent), noise = scored(["tiny/qe", "tiny/other"], home, HF_HUB_OFFLINE="1")
    assert offline == score
    assert "tiny/other is not in the local cache, and it cannot be downloaded" in absent
    assert noise == ""
    with hub({"tiny/qe": served}) as (address, _):
        messages, _ = scored(["tiny/qe", str(served)], tmp_path / "new", HF_ENDPOINT=address)
    for message in messages:
        assert "the tokenizer and config.json of its encoder, tiny/encoder, are not in the local cache" in message


def make_quietly(folder: Path, encoder: str, files: Path, tmp_path: Path) -> None:
    """A checkpoint whose encoder is a model of the hub, `encoder`."""
    shutil.copytree(files, tmp_path / encoder)
    with warnings.catch_warnings(), contextlib.chdir(tmp_path):
        warnings.simplefilter("ignore")
        make_checkpoint(folder, QE, encoder)
