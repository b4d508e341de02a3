"""Which parameters are chosen, in models of several families, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from corpusprep.errors import SettingsError  # noqa: E402
from corpusprep.recipe import load_train  # noqa: E402
from corpusprep.training.layers import find_layers, freeze, parse_layers, select  # noqa: E402
from corpusprep.training.settings import TrainSettings, TrainStage  # noqa: E402


def qwen3(tied: bool = False) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("bottom:4", (0, 1, 2, 3)),
        ("top:3", (5, 6, 7)),
        ("top:8", tuple(range(8))),
        ("2-4", (2, 3, 4)),
        ("7-7", (7,)),
        ("all", tuple(range(8))),
        ("none", ()),
        ((5, 0, 2), (0, 2, 5)),
    ],
)
def test_layers_are_named_in_many_ways(spec: Any, found: tuple[int, ...]) -> None:
    assert parse_layers(spec, 8) == found


@pytest.mark.parametrize("spec", ["bottom:9", "top:9", "3-8", (1, 8)])
def test_layers_that_a_model_has_not_are_told(spec: Any) -> None:
    with pytest.raises(SettingsError, match=r"8 layers|0 to 7"):
        parse_layers(spec, 8)


@pytest.mark.parametrize("spec", ["bottom", "bottom:0", "4-2", "first:3", "-1", "", (1, 1), (-1,)])
def test_what_names_no_layers_is_refused_with_the_setting(spec: Any) -> None:
    with pytest.raises(ValueError, match="layers"):
        TrainStage(layers=spec)


def test_a_stage_trains_its_layers_and_nothing_else() -> None:
    model = qwen3()
    chosen = select(model, "bottom:2", ())
    assert chosen.stack == "model.layers"
    assert chosen.of == 8
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in chosen.trained)
    assert len(chosen.trained) == 22
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(chosen.frozen)
    assert sorted(chosen.trained + chosen.frozen) == sorted(name for name, _ in model.named_parameters())
    with_norm = select(model, "top:1", ("model.norm",))
    assert set(with_norm.trained) == {n for n in with_norm.trained if n.startswith(("model.layers.7.", "model.norm."))}
    assert "model.norm.weight" in with_norm.trained
    assert select(model, "none", ("lm_head",)).trained == ("lm_head.weight",)


def test_layer_1_is_not_layer_10() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=12, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert all(name.startswith("model.layers.1.") for name in select(model, (1,), ()).trained)


@pytest.mark.parametrize(
    ("config", "stack"),
    [
        (transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2), "transformer.h"),
        (
            transformers.GPTNeoXConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
            ),
            "gpt_neox.layers",
        ),
        (
            transformers.MixtralConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=2,
            ),
            "model.layers",
        ),
    ],
)  # fmt: skip
def test_layers_are_found_in_other_families(config: Any, stack: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert find_layers(model)[0] == stack


def test_a_model_without_layers_is_refused() -> None:
    model = qwen3()
    model.config.num_hidden_layers = 9
    with pytest.raises(SettingsError, match="the model must have one list of 9 decoder layers, but it has none"):
        find_layers(model)


def test_a_tied_head_is_refused_with_the_reason() -> None:
    for name in ("lm_head", "model.embed_tokens"):
        with pytest.raises(SettingsError, match=f"'{name}' cannot be trained: .* one tensor"):
            select(qwen3(tied=True), "top:1", (name,))
    assert "lm_head.weight" in select(qwen3(), "top:1", ("lm_head",)).trained
    assert select(qwen3(tied=True), "top:1", ("model.norm",)).trained[-1] == "model.norm.weight"


def test_modules_are_named_exactly() -> None:
    with pytest.raises(SettingsError, match=r"no module 'model\.norms'\. Did you mean 'model.norm'"):
        select(qwen3(), "top:1", ("model.norms",))
    with pytest.raises(SettingsError, match="nothing would be trained"):
        select(qwen3(), "none", ())


def test_trained_tensors_become_fp32_and_frozen_ones_stay() -> None:
    model = transformers.AutoModelForCausalLM.from_config(qwen3().config, dtype=torch.bfloat16)
    chosen = select(model, "top:2", ())
    freeze(model, chosen)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in chosen.trained), name
        assert parameter.dtype == (torch.float32 if name in chosen.trained else torch.bfloat16), name


def test_the_default_is_the_published_recipe() -> None:
    settings, seed = load_train(None, ["train.model=some/model", "train.warmup=0.1"])
    assert [stage.layers for stage in settings.stages] == ["bottom:4", "top:15"]
    whole = settings.of(settings.stages[0])
    assert (whole.learning_rate, whole.min_learning_rate, whole.warmup, whole.epochs) == (1e-5, 2e-6, 0.1, 1.0)
    assert whole.schedule == "cosine"
    assert (settings.sequence_length, seed) == (4096, 1)
    own = TrainSettings(model="m", stages=(TrainStage(layers="all", learning_rate=3e-4, epochs=2),))
    assert own.of(own.stages[0]).learning_rate == 3e-4
    assert own.of(own.stages[0]).warmup == 0.03


def test_a_recipe_without_the_table_is_told() -> None:
    with pytest.raises(SettingsError, match=r"has no table \[train\]"):
        load_train(None, [])
    with pytest.raises(SettingsError, match="Did you mean 'learning_rate'"):
        load_train(None, ["train.model=m", "train.learn_rate=1e-4"])


def test_attention_that_is_more_than_causal_is_named() -> None:
    from transformers import Gemma2Config, GPT2Config, MistralConfig, Qwen3Config

    from corpusprep.training.attention import unsuited

    assert unsuited(Qwen3Config()) is None
    assert unsuited(MistralConfig(sliding_window=None)) is None
    assert unsuited(MistralConfig(sliding_window=4096)) == "sliding_window"
    assert unsuited(GPT2Config()) == "attn_pdrop"
    assert unsuited(GPT2Config(attn_pdrop=0.0)) is None
    assert unsuited(Qwen3Config(attention_dropout=0.1)) == "attention_dropout"
    windows = Qwen3Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=64, max_window_layers=2)
    assert unsuited(windows) in ("layer_types with sliding_attention", "sliding_window")
    assert "softcap" in str(unsuited(Gemma2Config(layer_types=["full_attention"] * 26, sliding_window=None)))
