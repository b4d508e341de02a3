"""Tiny COMET checkpoints with weights drawn at random, of the layout, names and shapes of the published ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

NOUNS = {"house": "Haus", "river": "Boot", "teacher": "Kind", "bread": "Brot", "garden": "Beet", "letter": "Buch"}
LAYERS, HIDDEN, POSITIONS = 4, 32, 64

UNIFIED: dict[str, Any] = {
    "class_identifier": "unified_metric",
    "hidden_sizes": [32, 16],
    "input_segments": ["mt", "src"],
}
QE: dict[str, Any] = {"class_identifier": "referenceless_regression_metric", "hidden_sizes": [32, 16]}
MODELS: dict[str, dict[str, Any]] = {
    "kiwi": UNIFIED | {"layer_transformation": "sparsemax", "layer_norm": False},
    "kiwi-patched": UNIFIED | {"layer_transformation": "sparsemax_patch", "layer_norm": False},
    "kiwi-normed": UNIFIED | {"layer_transformation": "softmax", "layer_norm": True, "final_activation": "Sigmoid"},
    "kiwi-one-layer": UNIFIED | {"sent_layer": 2},
    "kiwi-words": UNIFIED | {"word_level_training": True, "word_layer": 2, "layer_norm": False},
    "kiwi-segments": UNIFIED | {"input_segments": ["mt", "src", "ref"], "layer_norm": False},
    "kiwi-xl": UNIFIED | {"encoder_model": "XLM-RoBERTa-XL", "layer_norm": False},
    "qe": QE,
    "qe-cls": QE | {"pool": "cls", "layer_norm": False, "layer_transformation": "sparsemax"},
    "qe-cls-normed": QE | {"pool": "cls"},
    "qe-max": QE | {"pool": "max"},
    "qe-default": QE | {"pool": "default"},
    "qe-embeddings": QE | {"layer": 0},
    "qe-one-layer": QE | {"layer": 3, "pool": "cls"},
    "qe-xl": QE | {"encoder_model": "XLM-RoBERTa-XL", "pool": "avg"},
}
"""Hyperparameters by name: each way of mixing layers and pooling tokens that checkpoints are trained with."""


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


def odd_rows() -> list[tuple[str, str]]:
    """Texts that go wrong where something is assumed of texts."""
    many = " ".join(random.Random(1).choices(sorted(NOUNS), k=700))
    return [
        ("", ""),
        ("house", ""),
        ("", "Haus"),
        ("house", "Haus"),
        (many, many),
        (many, "Haus"),
        ("house", many),
        ("😀👩‍👩‍👧 \U0001f1e9\U0001f1ea", "ß"),
        ("नमस्ते мир 你好 سلام", "ไทย\u200b한국어"),
        ("a <pad> house <pad>", "<s>ein</s> Haus <mask> <pad>"),
        ("<pad>", "<pad><pad>"),
        ("\0\t\n \u2028", "x" * 3000),
        ("We saw a house. " * 40, "Wir sahen ein Haus."),
    ]


def make_encoder(folder: Path, kind: str = "XLM-RoBERTa", hidden: int = HIDDEN, layers: int = LAYERS) -> None:
    """What the hub has of an encoder, less its weights: a tokenizer trained on the spot, and a config of 64 positions."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds
    from tokenizers.trainers import UnigramTrainer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([text for pair in sentences(300, 2) for text in pair], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    # As in the published file: white space before a mask belongs to it.
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "xlm-roberta-xl" if kind == "XLM-RoBERTa-XL" else "xlm-roberta",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 2 * hidden, "initializer_range": 0.3, "max_position_embeddings": POSITIONS + 2,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_checkpoint(folder: Path, name: str, encoder: Path | str, config: Path) -> None:
    """A checkpoint as Lightning writes it.

    Args:
        folder: to be made.
        name: of `MODELS`.
        encoder: what it is to say that it was trained from.
        config: the folder of that.
    """
    import torch
    import yaml
    from transformers import AutoConfig, XLMRobertaModel, XLMRobertaXLModel

    torch.manual_seed(3)
    hparams = {"encoder_model": "XLM-RoBERTa", "pretrained_model": str(encoder), "activations": "Tanh"} | MODELS[name]
    unified = hparams["class_identifier"] == "unified_metric"
    shape = AutoConfig.from_pretrained(config)
    kind = XLMRobertaXLModel if hparams["encoder_model"] == "XLM-RoBERTa-XL" else XLMRobertaModel
    state = {f"encoder.model.{k}": v for k, v in kind(shape, add_pooling_layer=False).state_dict().items()}
    # Biases and norms begin as zeros and ones, and would hide a mistake.
    state = {k: v + 0.1 * torch.randn_like(v) if v.dtype.is_floating_point else v for k, v in state.items()}
    if hparams.get("sent_layer" if unified else "layer", "mix") == "mix":
        for k in range(shape.num_hidden_layers + 1):
            state[f"layerwise_attention.scalar_parameters.{k}"] = 0.5 * torch.randn(1)
        state["layerwise_attention.gamma"] = torch.tensor([1.3])
    sizes = [shape.hidden_size * (1 if unified else 4), *hparams["hidden_sizes"], 1]
    for k in range(len(sizes) - 1):
        state[f"estimator.ff.{3 * k}.weight"] = torch.randn(sizes[k + 1], sizes[k]) / sizes[k] ** 0.5
        state[f"estimator.ff.{3 * k}.bias"] = 0.1 * torch.randn(sizes[k + 1])
    if hparams.get("word_level_training"):
        state["hidden2tag.weight"], state["hidden2tag.bias"] = torch.randn(3, shape.hidden_size), torch.randn(3)
    (folder / "checkpoints").mkdir(parents=True)
    given = {key: value for key, value in hparams.items() if key != "class_identifier"}
    found = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.5.0", "state_dict": state}
    torch.save(found | {"hyper_parameters": given}, folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams), encoding="utf-8")


class Models:
    """Folders of checkpoints by name, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encoder(self, kind: str = "XLM-RoBERTa") -> Path:
        folder = self._folder / "encoders" / kind
        if not folder.exists():
            make_encoder(folder, kind)
        return folder

    def __getitem__(self, name: str) -> str:
        folder = self._folder / name
        if not folder.exists():
            encoder = self.encoder(MODELS[name].get("encoder_model", "XLM-RoBERTa"))
            make_checkpoint(folder, name, encoder, encoder)
        return str(folder)
