"""What the launcher and its workers say to each other, and how they tell what a stage changed."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("accelerate")

from corpusprep.errors import RunError  # noqa: E402
from corpusprep.training.job import COMPLETE, difference, made_of, received  # noqa: E402
from corpusprep.training.layers import Selection  # noqa: E402
from corpusprep.training.tensors import compare, digests  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that train


def test_a_mark_that_is_empty_is_none(tmp_path: Path) -> None:
    assert made_of(tmp_path) is None
    (tmp_path / COMPLETE).write_text("")
    assert made_of(tmp_path) is None
    (tmp_path / COMPLETE).write_text('{"seed": 1}')
    assert made_of(tmp_path) == {"seed": 1}


def test_what_others_say_is_for_the_log() -> None:
    assert received("Loading weights\n") is None
    assert received('\x1e{"kind": "step"}\n') == {"kind": "step"}
    assert received('\x1e{"kind": "step"}warning: x\n') is None


def test_difference_names_what_is_another() -> None:
    assert difference({"seed": 1, "mix": "a"}, {"seed": 1, "mix": "a", "new": 1}) is None
    assert "the mix has changed (from a to b)" in str(difference({"mix": "a"}, {"mix": "b"}))


def test_changes_are_counted_by_bits() -> None:
    """A frozen tensor that lost the sign of a zero was touched, and a step that bf16 rounds away did not survive."""
    before = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.zeros(3)}
    chosen = Selection((0,), 1, "layers", ("a", "b"), ("c",))
    after = {
        "a": torch.tensor([1.0, 1.0001, 1.5, 1.0]), "b": torch.ones(2), "c": torch.tensor([0.0, -0.0, 0.0]),
    }  # fmt: skip
    found = compare(after, before, digests({"c": before["c"]}.items()), chosen)
    assert found.touched == ("c",)
    assert found.unmoved == ("b",)
    assert found.not_finite == ()
    after["b"][0] = float("nan")
    assert compare(after, before, {}, chosen).not_finite == ("b",)
    assert (found.values, found.changed, found.survived) == (6, 2, 1)


def test_examples_that_do_not_stay_apart_are_refused_packed() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from corpusprep.training.worker import check_packing

    torch.manual_seed(1)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=100,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
        )
    ).eval()
    with pytest.raises(RunError, match=r"OPTForCausalLM does not separate examples .* Set train\.packing = false"):
        check_packing(opt)
