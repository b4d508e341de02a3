"""The comet scorer, on tiny checkpoints of both classes; `test_quality_unbabel.py` holds its scores against COMET's own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from comet_models import MODELS, Models, make_checkpoint, odd_rows, sentences, table

from corpusprep.errors import RunError
from corpusprep.stages.quality import QualitySettings, open_scorer, quality, require
from corpusprep.stages.quality.comet import CometScorer, batches
from corpusprep.stages.quality.comet.files import find_model
from corpusprep.stages.quality.comet.tokens import CometTokenizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[quality]'")

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("comet"))


def scorer(model: str, **settings: Any) -> CometScorer:
    return CometScorer(find_model(model), **settings)


def spoilt(models: Models, name: str, folder: Path, change: Any) -> str:
    """A copy of a model whose checkpoint has been changed."""
    shutil.copytree(models[name], folder)
    file = folder / "checkpoints" / "model.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)
    return str(folder)


# Scores


@pytest.mark.parametrize("name", ["kiwi", "kiwi-normed", "kiwi-xl", "qe", "qe-max", "qe-cls"])
def test_a_score_depends_on_its_row_alone(models: Models, name: str) -> None:
    rows = [*sentences(60, 5), *odd_rows()]
    scores = scorer(models[name]).score(table(rows))
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.std() > 1e-3
    order = np.random.default_rng(1).permutation(len(rows))
    small = scorer(models[name], batch_tokens=50)
    np.testing.assert_allclose(small.score(table([rows[i] for i in order])), scores[order], atol=1e-5)
    np.testing.assert_allclose(small.score(table(rows[:1])), scores[:1], atol=1e-5)
    np.testing.assert_array_equal(scorer(models[name]).score(table(rows)), scores)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_whole_network(models: Models, name: str) -> None:
    """transformers' encoder, all layers mixed as COMET mixes them, row by row: nothing left out that is not used."""
    rows = [*sentences(12, 6), ("house", ""), ("We saw a house. " * 40, "Haus " * 90)]
    expected = [by_transformers(models[name], name, *row) for row in rows]
    np.testing.assert_allclose(scorer(models[name]).score(table(rows)), expected, atol=1e-5)


def by_transformers(model: str, name: str, src: str, tgt: str) -> float:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, XLMRobertaModel, XLMRobertaXLModel

    files = find_model(model)
    hparams = {"layer_norm": True, "pool": "avg"} | MODELS[name]
    unified = hparams["class_identifier"] == "unified_metric"
    state = torch.load(files.checkpoint, weights_only=True)["state_dict"]
    encoder_class = XLMRobertaXLModel if hparams.get("encoder_model") == "XLM-RoBERTa-XL" else XLMRobertaModel
    encoder = encoder_class(AutoConfig.from_pretrained(files.config.parent), add_pooling_layer=False).eval()
    encoder.load_state_dict({k[14:]: v for k, v in state.items() if k.startswith("encoder.model.")})
    tokenizer = Tokenizer.from_file(str(files.tokenizer))
    mt, source = (tokenizer.encode(text, add_special_tokens=False).ids[:60] for text in (tgt, src))

    def embedding(ids: list[int]) -> Any:
        with torch.inference_mode():
            states = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
        layer = hparams.get("sent_layer" if unified else "layer", "mix")
        pool = "cls" if unified else hparams["pool"]
        if pool == "default":
            return states[-1][0, 0]
        if layer == "mix":
            scalars = torch.cat([state[f"layerwise_attention.scalar_parameters.{k}"] for k in range(len(states))])
            transformation = hparams.get("layer_transformation", "sparsemax" if unified else "softmax")
            shares = simplex(scalars) if transformation == "sparsemax" else scalars.softmax(0)
            if hparams["layer_norm"]:
                states = [(s - s.mean()) / torch.sqrt(s.var(unbiased=False) + 1e-12) for s in states]
            mixed = state["layerwise_attention.gamma"] * sum(w * s for w, s in zip(shares, states, strict=True))
        else:
            mixed = states[layer]
        mixed = mixed[0]
        return {"avg": lambda: mixed.mean(0), "max": lambda: mixed.amax(0), "cls": lambda: mixed[0]}[pool]()

    if unified:
        found = embedding([0, *mt, 2, 2, *source, 2][:64])
    else:
        m, s = embedding([0, *mt, 2]), embedding([0, *source, 2])
        found = torch.cat((m, s, m * s, (m - s).abs()))
    numbers = sorted({int(key.split(".")[2]) for key in state if key.startswith("estimator.ff.")})
    for number in numbers:
        found = found @ state[f"estimator.ff.{number}.weight"].T + state[f"estimator.ff.{number}.bias"]
        if number != numbers[-1]:
            found = found.tanh()
    return float(found.sigmoid() if hparams.get("final_activation") == "Sigmoid" else found)


def simplex(values: Any) -> Any:
    """The nearest point of the simplex, by bisection for what is taken off."""
    low, high = values.min() - 1, values.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp_min(0).sum() > 1 else (low, middle)
    return (values - low).clamp_min(0)


def test_bf16_is_near(models: Models) -> None:
    rows = table(sentences(80, 7))
    exact, rough = scorer(models["kiwi"]).score(rows), scorer(models["kiwi"], precision="bf16").score(rows)
    assert 0 < np.abs(exact - rough).max() < 0.1
    assert np.corrcoef(exact, rough)[0, 1] > 0.99


def test_no_rows_give_no_scores(models: Models) -> None:
    for name in ("kiwi", "qe"):
        scores = scorer(models[name]).score(table([]))
        assert scores.shape == (0,)
        assert scores.dtype == np.float32


def test_nulls_chunks_and_large_strings_are_taken(models: Models) -> None:
    rows = table([*sentences(12, 6), (None, "Haus"), ("house", None)])
    expected = scorer(models["qe"]).score(rows)
    large = rows.set_column(0, "src", rows["src"].cast(pa.large_string()))
    chunked = pa.concat_tables([large.slice(0, 5), large.slice(5)])
    np.testing.assert_array_equal(scorer(models["qe"]).score(chunked), expected)
    np.testing.assert_allclose(scorer(models["qe"]).score(table([("", "Haus")])), expected[12:13], atol=1e-5)


def test_many_windows_and_slices_keep_the_order(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from corpusprep.stages.quality import comet as _comet

    rows = table(sentences(300, 8))
    for name in ("kiwi", "qe"):
        expected = scorer(models[name]).score(rows)
        with monkeypatch.context() as patch:
            patch.setattr(_comet, "WINDOW", 70)
            patch.setattr(_comet, "_SLICE", 16)
            patch.setattr(_comet, "_HEAD_ROWS", 9)
            np.testing.assert_allclose(scorer(models[name], batch_tokens=99).score(rows), expected, atol=1e-5)


def test_a_text_is_embedded_once_a_window(models: Models) -> None:
    rows = [("We saw a house.", german) for _, german in sentences(40, 9)] * 2
    found, apart = scorer(models["qe"]), scorer(models["qe"])
    found.score(table(rows))
    for text in {text for row in rows for text in row}:
        apart.score(table([(text, text)]))
    assert found.tokens == apart.tokens


@pytest.mark.parametrize("budget", [1, 7, 50, 10_000])
def test_batches_keep_to_their_budget(budget: int) -> None:
    lengths = np.sort(np.random.default_rng(2).integers(2, 60, 500))[::-1]
    found = list(batches(lengths, budget))
    assert np.concatenate([np.arange(500)[rows] for rows in found]).tolist() == list(range(500))
    for rows in found:
        assert lengths[rows].sum() <= budget or rows.stop - rows.start == 1
    assert list(batches(lengths[:0], budget)) == []


def test_a_batch_that_does_not_fit_is_halved(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from corpusprep.stages.quality.comet.model import CometModel

    rows = table(sentences(11, 8))
    expected = scorer(models["kiwi"]).score(rows)
    whole = CometModel.embed

    def small(self: Any, batch: Any) -> Any:
        if len(batch.first) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return whole(self, batch)

    monkeypatch.setattr(CometModel, "embed", small)
    fits = 3
    np.testing.assert_allclose(scorer(models["kiwi"]).score(rows), expected, atol=1e-5)
    fits = 0
    with pytest.raises(RunError, match="does not fit the GPU's memory: CUDA out of memory"):
        scorer(models["kiwi"]).score(rows)


# The stage


def test_the_stage_drops_what_scores_below_the_threshold(models: Models) -> None:
    rows = table(sentences(30, 7))
    scores = scorer(models["qe"]).score(rows)
    limit = float(np.sort(scores)[[9, 10]].mean())
    outcome = quality(rows, QualitySettings(scorer="comet", model=models["qe"], threshold=limit))
    assert outcome.kept.select(["src", "tgt"]) == rows.select(["src", "tgt"]).filter(pa.array(scores >= limit))
    assert outcome.dropped.num_rows == 10
    assert set(outcome.dropped["reason"].to_pylist()) == {"quality.score"}
    np.testing.assert_allclose(outcome.kept["quality"].to_numpy(), scores[scores >= limit], atol=1e-5)
    assert quality(rows, QualitySettings(scorer="comet", model=models["qe"])).dropped.num_rows == 0


def test_english_is_the_source_unless_it_is_said_otherwise(models: Models) -> None:
    pairs = sentences(6, 3)
    forward = scorer(models["kiwi"]).score(table(pairs))
    backward = scorer(models["kiwi"]).score(table([(b, a) for a, b in pairs]))
    assert np.abs(forward - backward).max() > 1e-3
    codes = [("en", "de"), ("de", "eng_Latn"), ("de", "fr"), ("en-GB", "en"), ("?", "en"), ("deu_Latn", "xx")]
    rows = table(pairs)
    for k, side in ((2, "src_lang"), (3, "tgt_lang")):
        rows = rows.set_column(k, side, pa.array([pair[k - 2] for pair in codes]))
    turned = [False, True, False, False, True, False]
    for direction, mask in (("english", turned), ("forward", [False] * 6), ("backward", [True] * 6)):
        settings = QualitySettings(scorer="comet", model=models["kiwi"], direction=direction)
        found = open_scorer(settings, {}).score(rows)
        np.testing.assert_allclose(found, np.where(mask, backward, forward), atol=1e-5)


# Files


def test_a_model_is_given_as_folder_or_file(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(sentences(5, 9))
    expected = scorer(models["kiwi"]).score(rows)
    own = tmp_path / "own"
    shutil.copytree(models["kiwi"], own)
    (own / "checkpoints" / "model.ckpt").rename(own / "checkpoints" / "epoch=3-step=5.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("own", "./own", "~/own", "own/checkpoints/epoch=3-step=5.ckpt"):
        np.testing.assert_array_equal(scorer(model).score(rows), expected)
    monkeypatch.chdir(own / "checkpoints")
    np.testing.assert_array_equal(scorer("epoch=3-step=5.ckpt").score(rows), expected)


def test_the_encoder_is_looked_for_where_it_may_be(models: Models, tmp_path: Path) -> None:
    rows = table(sentences(5, 9))
    expected = scorer(models["kiwi"]).score(rows)
    for name in ("", "encoder"):
        folder = tmp_path / f"in-{name}"
        shutil.copytree(models["kiwi"], folder)
        hparams = folder / "hparams.yaml"
        hparams.write_text(hparams.read_text().replace(str(models.encoder()), "/no/such/folder"))
        np.testing.assert_array_equal(CometScorer(find_model(str(folder), str(models.encoder()))).score(rows), expected)
        with pytest.raises(RunError, match="its encoder, /no/such/folder: there is no such folder"):
            find_model(str(folder))
        shutil.copytree(models.encoder(), folder / name, dirs_exist_ok=True)
        np.testing.assert_array_equal(scorer(str(folder)).score(rows), expected)
    hparams.write_text("class_identifier: unified_metric\n")
    shutil.rmtree(folder / "encoder")
    with pytest.raises(RunError, match=r"does not name the pretrained model .* Set\s+quality\.encoder"):
        find_model(str(folder))
    with pytest.raises(RunError, match=r"quality\.encoder, .*, has no config\.json or no tokenizer"):
        find_model(str(folder), str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such/folder", "./kiwi", "kiwi", "a/b/c", "models/kiwi.ckpt", "~/kiwi"])
def test_a_path_that_is_missing_is_named(model: str) -> None:
    with pytest.raises(RunError, match=f"quality.model = '{model}': there is no such file or folder"):
        find_model(model)


def test_a_model_that_needs_a_reference_is_refused(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["kiwi"], tmp_path / "unified")
    hparams = tmp_path / "unified" / "hparams.yaml"
    hparams.write_text(hparams.read_text().replace("- src\n", "- ref\n"))
    with pytest.raises(RunError, match=r"\(unified_metric\) needs a reference translation"):
        find_model(str(tmp_path / "unified"))
    hparams.write_text("class_identifier: regression_metric\n")
    with pytest.raises(RunError, match=r"\(regression_metric\) needs a reference translation"):
        find_model(str(tmp_path / "unified"))


def test_what_is_no_checkpoint_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"this is not a COMET model\. quality\.model must be a folder with"):
        find_model(str(models.encoder()))
    folder = tmp_path / "model"
    shutil.copytree(models["qe"], folder)
    checkpoint, hparams = folder / "checkpoints" / "model.ckpt", folder / "hparams.yaml"
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint\n", whole[: len(whole) // 2]):
        checkpoint.write_bytes(content)
        with pytest.raises(RunError, match=r"model\.ckpt cannot be read as a COMET checkpoint: \w+"):
            scorer(str(folder))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, checkpoint)
    with pytest.raises(RunError, match=r"model\.ckpt cannot be read as a COMET checkpoint: KeyError"):
        scorer(str(checkpoint))
    checkpoint.write_bytes(whole)
    for content, problem in (
        ("layer: mix\n", "no class_identifier"),
        ("a: [", "cannot be read"),
        ("", "does not describe"),
        ("!!python/object/apply:os.getcwd []", "cannot be read"),
    ):
        hparams.write_text(content)
        with pytest.raises(RunError, match=problem):
            scorer(str(folder))
    hparams.write_text(f"class_identifier: other_metric\npretrained_model: {models.encoder()}\n")
    with pytest.raises(RunError, match=r'class other_metric are not supported\. Set quality\.backend = "unbabel"'):
        scorer(str(folder))
    hparams.unlink()
    with pytest.raises(RunError, match=r"hparams\.yaml is missing"):
        scorer(str(checkpoint))


def test_a_checkpoint_runs_no_code(models: Models, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    shutil.copytree(models["qe"], tmp_path / "model")
    file = tmp_path / "model" / "checkpoints" / "model.ckpt"
    torch.save(torch.load(file, weights_only=True) | {"callbacks": Trap()}, file)
    with pytest.raises(RunError, match="cannot be read as a COMET checkpoint"):
        scorer(str(tmp_path / "model"))
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(RunError, match="cannot be read as a COMET checkpoint"):
        scorer(str(tmp_path / "model"))
    assert not (tmp_path / "sprung").exists()


def test_weights_must_be_there_and_fit(models: Models, tmp_path: Path) -> None:
    def less(checkpoint: Any) -> None:
        del checkpoint["state_dict"]["estimator.ff.0.weight"]

    def old(checkpoint: Any) -> None:
        checkpoint["state_dict"]["encoder.model.embeddings.position_ids"] = torch.arange(66)

    def more(checkpoint: Any) -> None:
        checkpoint["state_dict"]["encoder.model.encoder.layer.4.output.dense.bias"] = torch.zeros(32)

    def wide(checkpoint: Any) -> None:
        checkpoint["state_dict"]["estimator.ff.3.weight"] = torch.zeros(16, 31)

    with pytest.raises(RunError, match=r"1 of the model's weights are missing, such as estimator\.ff\.0\.weight"):
        scorer(spoilt(models, "qe", tmp_path / "less", less))
    with pytest.raises(RunError, match=r"has 1 weights that do not match its hyperparameters, such as encoder\.model"):
        scorer(spoilt(models, "qe", tmp_path / "more", more))
    with pytest.raises(RunError, match=r"estimator\.ff\.3\.weight has shape \(16, 31\), but .* require \(16, 32\)"):
        scorer(spoilt(models, "qe", tmp_path / "wide", wide))
    rows = table(sentences(3, 1))
    scores = scorer(spoilt(models, "qe", tmp_path / "old", old)).score(rows)
    np.testing.assert_array_equal(scores, scorer(models["qe"]).score(rows))


def test_an_encoder_that_is_not_known_is_told(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["kiwi"], tmp_path / "model")
    shutil.copytree(models.encoder(), tmp_path / "model" / "encoder")
    config = tmp_path / "model" / "encoder" / "config.json"
    whole = json.loads(config.read_text())
    for change, problem in (
        ({"hidden_act": "swish"}, "swish or its type of positions is not supported"),
        ({"num_attention_heads": 5}, "its sizes are inconsistent"),
        ({"hidden_size": "many"}, "does not describe an encoder: ValueError"),
        ({"hidden_size": 64}, "has shape"),
    ):
        config.write_text(json.dumps(whole | change))
        with pytest.raises(RunError, match=problem):
            scorer(str(tmp_path / "model"))
    config.write_text(json.dumps(whole))
    tokenizer = tmp_path / "model" / "encoder" / "tokenizer.json"
    for content, problem in (
        ("{}", "cannot be read as a tokenizer"),
        (tokenizer.read_text().replace("<pad>", "<pod>"), "no tokens"),
    ):
        tokenizer.write_text(content)
        with pytest.raises(RunError, match=problem):
            scorer(str(tmp_path / "model"))


def test_what_does_not_belong_together_shows_before_weights_are_read(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models["kiwi"], tmp_path / "model")
    shutil.copytree(models.encoder(), tmp_path / "model" / "encoder")
    (tmp_path / "model" / "checkpoints" / "model.ckpt").write_bytes(b"not read")
    config = tmp_path / "model" / "encoder" / "config.json"
    whole = json.loads(config.read_text())
    settings = QualitySettings(scorer="comet", model=str(tmp_path / "model"))
    require(settings)
    for change, problem in (
        (
            {"vocab_size": 10},
            r"does not match the model's encoder: it has \d+ tokens and <pad> is 1, but .* 10 and 1",
        ),
        ({"pad_token_id": 3}, "but the encoder has .* and 3"),
        ({"hidden_act": "swish"}, "is not supported"),
    ):
        config.write_text(json.dumps(whole | change))
        with pytest.raises(RunError, match=problem):
            require(settings)
    config.write_text(json.dumps(whole))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"quality\.cache = .*: the folder cannot be created"):
        require(settings.model_copy(update={"cache": str(tmp_path / "file" / "kept")}))
    hparams = tmp_path / "model" / "hparams.yaml"
    hparams.write_text(hparams.read_text().replace("unified_metric", "xcomet_metric"))
    with pytest.raises(RunError, match="models of class xcomet_metric are not supported"):
        require(settings)


@pytest.mark.filterwarnings("ignore")  # of the packages that convert
def test_a_sentencepiece_model_is_read_as_a_tokenizer(models: Models, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="sentencepiece is not installed: pip install '.[quality]'"
    )
    (tmp_path / "text").write_text("".join(f"{a}\n{b}\n" for a, b in sentences(500, 2)), encoding="utf-8")
    shutil.copy(models.encoder() / "config.json", tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sentencepiece.bpe"), vocab_size=120, model_type="unigram",
        pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    found = CometTokenizer(tmp_path / "sentencepiece.bpe.model", 64).texts(["We saw a house.", ""])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.bpe.model"))
    # XLM-RoBERTa's ids are those of the pieces, one further on.
    expected = [0, *(piece + 1 for piece in pieces.encode("We saw a house.")), 2, 0, 2]
    assert found.ids.tolist() == expected


def test_logging_and_warnings_are_left_as_they_were(models: Models) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.root.manager.disable, warnings.filters[:])
    scorer(models["qe"]).score(table(sentences(3, 1)))
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
            if parts[4:5] == ["tree"]:
                listed = [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": "2" * 40}
                    for f in sorted(folder.rglob("*"))
                    if f.is_file()
                ]
                return self.answer(200, json.dumps(listed).encode(), {})
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
from corpusprep.stages.quality.comet import CometScorer
from corpusprep.stages.quality.comet.files import find_model
answers = []
for model in json.loads(sys.argv[1]):
    try:
        scores = CometScorer(find_model(model)).score(pa.table({"src": ["The house."], "tgt": ["Das Haus."]}))
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
    make_checkpoint(served, "qe", "tiny/encoder", models.encoder())
    expected = float(scorer(models["qe"]).score(table([("The house.", "Das Haus.")]))[0])
    folders = {"tiny/qe": served, "tiny/gated": Path(models["kiwi"]), "tiny/encoder": models.encoder()}
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
    assert "has no model tiny/none that you can access" in missing
    assert "quality.model to the path of a folder with hparams.yaml" in missing
    (offline, absent), noise = scored(["tiny/qe", "tiny/other"], home, HF_HUB_OFFLINE="1")
    assert offline == score
    assert "tiny/other is not in the local cache and cannot be downloaded" in absent
    assert noise == ""
    with hub({"tiny/qe": served}) as (address, _):
        messages, _ = scored(["tiny/qe", str(served)], tmp_path / "new", HF_ENDPOINT=address)
    for message in messages:
        assert "its encoder, tiny/encoder, is incomplete in the local cache (config.json and tokenizer)" in message
