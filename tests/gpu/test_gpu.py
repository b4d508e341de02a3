"""What runs on a GPU alone: `make test-gpu`. Elsewhere these are skipped, and all other tests hide the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU is to be seen; run make test-gpu", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip("the GPU does not compute in bf16", allow_module_level=True)

from comet_models import Models, make_checkpoint, make_encoder, odd_rows, sentences, table  # noqa: E402

from corpusprep.stages.quality.comet import CometScorer  # noqa: E402
from corpusprep.stages.quality.comet.files import find_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("comet"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of eight heads of 32, as flash attention wants them."""
    folder = tmp_path_factory.mktemp("wide")
    make_encoder(folder / "encoder", hidden=256, layers=6)
    config = json.loads((folder / "encoder" / "config.json").read_text())
    (folder / "encoder" / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 8, "initializer_range": 0.05})
    )
    make_checkpoint(folder / "model", "kiwi", folder / "encoder", folder / "encoder")
    return str(folder / "model")


def on_cpu(model: str, rows: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return CometScorer(find_model(model), "fp32").score(table(rows))


@pytest.mark.parametrize("name", ["kiwi", "kiwi-normed", "kiwi-xl", "qe", "qe-max", "qe-cls"])
def test_fp32_on_a_gpu_is_fp32_on_a_cpu(models: Models, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*sentences(300, 5), *odd_rows()]
    scorer = CometScorer(find_model(models[name]), "fp32")
    assert scorer.device == "cuda"
    assert scorer._model.encoder._kernels is not None
    np.testing.assert_allclose(scorer.score(table(rows)), on_cpu(models[name], rows, monkeypatch), atol=2e-5)


def test_bf16_scores_come_near_and_are_the_same_each_time(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*sentences(3000, 5), *odd_rows()]
    scorer = CometScorer(find_model(wide))
    assert scorer.precision == "bf16"
    assert scorer._model.encoder._quick
    found, wanted = scorer.score(table(rows)), on_cpu(wide, rows, monkeypatch)
    assert np.corrcoef(found, wanted)[0, 1] > 0.99
    assert np.abs(found - wanted).max() < 0.1 * wanted.std() + 0.05
    np.testing.assert_array_equal(CometScorer(find_model(wide)).score(table(rows)), found)


def test_bf16_without_kernels_of_ones_own_comes_as_near(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no C compiler."""
    rows = sentences(500, 5)
    found = CometScorer(find_model(wide)).score(table(rows))
    plain = CometScorer(find_model(wide), kernels=False).score(table(rows))
    wanted = on_cpu(wide, rows, monkeypatch)
    ours, theirs = (float(np.sqrt(np.mean((scores - wanted) ** 2))) for scores in (found, plain))
    assert ours < 1.5 * theirs


def test_a_sum_and_its_norm_in_one_kernel() -> None:
    from corpusprep.stages.quality.comet.fused import add_norm

    for size in (32, 1000, 1024, 2560):
        x, y = torch.randn(2, 77, size, device="cuda")
        weight, bias = torch.randn(2, size, device="cuda")
        wanted = torch.nn.functional.layer_norm((x + y).double(), (size,), weight.double(), bias.double(), 1e-5)
        torch.testing.assert_close(add_norm(x, y, weight, bias, 1e-5).double(), wanted, atol=2e-5, rtol=2e-5)
        half = [value.bfloat16() for value in (x, y, weight, bias)]
        exact = torch.nn.functional.layer_norm(
            (half[0].double() + half[1]), (size,), half[2].double(), half[3].double(), 1e-5
        )
        torch.testing.assert_close(add_norm(*half, 1e-5).double(), exact, atol=2e-2, rtol=1e-2)
    assert add_norm(x[:0], y[:0], weight, bias, 1e-5).shape == (0, 2560)


@pytest.mark.parametrize(("heads", "size"), [(4, 64), (2, 80), (4, 8)])
@pytest.mark.parametrize("sizes", [[50, 1, 130, 7], [47], [16] * 9, [3, 2, 5], [512, 300]])
def test_attention_within_rows(heads: int, size: int, sizes: list[int]) -> None:
    from corpusprep.stages.quality.comet.fused import attention

    draw = torch.Generator("cuda").manual_seed(1)
    sides = torch.randn(sum(sizes), 3, heads, size, generator=draw, device="cuda").bfloat16().unbind(1)
    bounds = torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int32, device="cuda")
    found = attention(*sides, bounds, bounds, max(sizes), max(sizes))
    first = sides[0][bounds[:-1].long()]
    one = torch.arange(len(bounds), device="cuda")
    of_first = attention(first, *sides[1:], one, bounds, 1, max(sizes))
    for row, start in enumerate(bounds[:-1].tolist()):
        q, k, v = (side[start : start + sizes[row]].transpose(0, 1)[None].double() for side in sides)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
        torch.testing.assert_close(found[start : start + sizes[row]].double(), wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(of_first[row].double(), wanted[0], atol=2e-2, rtol=2e-2)


def test_a_batch_that_does_not_fit_is_halved(wide: str) -> None:
    rows = sentences(60_000, 5)
    wanted = CometScorer(find_model(wide)).score(table(rows))
    tight = CometScorer(find_model(wide), batch_tokens=1 << 21)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()["num_ooms"]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (500 << 20)) / total)
    try:
        found = tight.score(table(rows))
        retries = torch.cuda.memory_stats()["num_ooms"] - before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert retries > 0
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_packed_attention_is_that_of_each_example() -> None:
    from corpusprep.training.attention import attend, flash

    if flash() is None:
        pytest.skip("PyTorch 2.11 and later has flash attention of rows of many lengths")
    sizes = [50, 1, 130, 7]
    draw = torch.Generator("cuda").manual_seed(1)
    sides = [
        torch.randn(1, heads, sum(sizes), 64, generator=draw, device="cuda").requires_grad_() for heads in (8, 2, 2)
    ]
    positions = torch.cat([torch.arange(size, device="cuda") for size in sizes])[None]
    bounds = torch.tensor([0, *np.cumsum(sizes).tolist()], device="cuda")
    exact, _ = attend(torch.nn.Module(), *sides, None, position_ids=positions)
    exact.square().sum().backward()
    wanted = [side.grad.clone() for side in sides]
    for told in ({"position_ids": positions}, {"cu_seq_lens_q": bounds.int(), "max_length_q": max(sizes)}):
        for side in sides:
            side.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            found, _ = attend(torch.nn.Module(), *sides, None, **told)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=2e-2)
        found.float().square().sum().backward()
        for side, grad in zip(sides, wanted, strict=True):
            assert float((side.grad - grad).norm() / grad.norm()) < 0.02


def test_a_training_on_a_gpu(tmp_path: Path) -> None:
    from test_train import settings, write_mix
    from tiny_model import save_model, save_tokenizer

    from corpusprep.training import TrainStage, train

    write_mix(tmp_path / "mix", 300)
    texts = [text for pair in sentences(200, 9) for text in pair]
    size = len(save_tokenizer(tmp_path / "model", texts, 400))
    save_model(tmp_path / "model", size, hidden=64).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    found = {}
    for attention in ("varlen", "sdpa"):
        asked = settings(tmp_path, attention=attention, stages=(TrainStage(layers="top:3"),))
        found[attention] = train(asked, tmp_path / "mix", tmp_path / attention).reports[0]
        assert found[attention]["losses"]["after"] < found[attention]["losses"]["before"]
    assert found["varlen"]["attention"] == "varlen"
    assert found["sdpa"]["attention"] == "sdpa"
    assert found["varlen"]["losses"]["after"] == pytest.approx(found["sdpa"]["losses"]["after"], rel=0.02)
