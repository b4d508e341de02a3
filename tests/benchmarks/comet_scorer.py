"""The comet scorer against COMET's own `predict`, in one environment that has both: prints rows as JSON for `bench.py`.

    python comet_scorer.py ROWS.parquet FOLDER

On a CPU. Models have random weights and the shapes of small encoders; their tokenizer is trained on the rows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from corpusprep.stages.quality.comet import CometScorer
from corpusprep.stages.quality.comet.files import find_model
from corpusprep.stages.quality.comet.tokens import CometTokenizer

# Layers, size, heads, entries of the vocabulary, and rows to score.
SHAPES = {"tiny, 2 x 64": (2, 64, 4, 0, 5000), "mid size, 6 x 384": (6, 384, 12, 0, 1000)}
VOCABULARY = 16_000
ROUNDS = 3
BATCHES = (16, 64)  # of predict: its default, and what a user may try


def make_model(folder: Path, table: pa.Table, layers: int, hidden: int, heads: int, vocabulary: int) -> None:
    """A checkpoint of the shape of wmt22-cometkiwi-da, but for the encoder's sizes. Its tokenizer is smaller than its vocabulary
    where that is large."""
    import yaml
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds
    from tokenizers.trainers import UnigramTrainer
    from transformers import XLMRobertaConfig, XLMRobertaModel

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    tokenizer = Tokenizer(kinds.Unigram())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFKC(), decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False)
    texts = table["src"].to_pylist()[:5000] + table["tgt"].to_pylist()[:5000]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = XLMRobertaConfig(
        vocab_size=max(vocabulary, tokenizer.get_vocab_size()), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, initializer_range=1.5 * hidden**-0.5,  # so that a score depends on its text
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = [hidden, 3072, 1024, 1]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        encoder = XLMRobertaModel(config, add_pooling_layer=False)
    state = {f"encoder.model.{name}": weight.cpu() for name, weight in encoder.state_dict().items()}
    state |= {f"layerwise_attention.scalar_parameters.{k}": 0.1 * torch.randn(1) for k in range(layers + 1)}
    state["layerwise_attention.gamma"] = torch.ones(1)
    for k in range(3):
        state[f"estimator.ff.{3 * k}.weight"] = torch.randn(sizes[k + 1], sizes[k]) / sizes[k] ** 0.5
        state[f"estimator.ff.{3 * k}.bias"] = torch.zeros(sizes[k + 1])
    hparams = {
        "encoder_model": "XLM-RoBERTa", "pretrained_model": str(folder), "input_segments": ["mt", "src"], "layer_norm": False,
        "layer_transformation": "softmax", "hidden_sizes": sizes[1:3], "activations": "Tanh", "word_level_training": False,
    }  # fmt: skip
    found = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.5.0", "state_dict": state}
    torch.save(found | {"hyper_parameters": hparams}, folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams | {"class_identifier": "unified_metric"}))


def stock(folder: Path) -> Any:
    import comet

    return comet.load_from_checkpoint(str(folder / "checkpoints" / "model.ckpt"))


def fastest(rounds: int, calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Seconds of the fastest of several runs of each call, in turn, after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                taken.append(time.perf_counter() - began)
    return [min(taken) for taken in times]


def measure(table: pa.Table, folder: Path) -> Iterator[dict[str, Any]]:
    for name, (layers, hidden, heads, vocabulary, count) in SHAPES.items():
        home = folder / name.split(",")[0].replace(" ", "-")
        make_model(home, table, layers, hidden, heads, vocabulary)
        some = table.slice(0, count)
        samples = [{"src": s, "mt": t} for s, t in zip(some["src"].to_pylist(), some["tgt"].to_pylist(), strict=True)]
        model, ours = stock(home), CometScorer(find_model(str(home)), "fp32")
        if "tiny" in name:
            yield from tokenisation(home, samples[:5000], model, ours)

        def predict(size: int, rows: int, model: Any = model, samples: Any = samples) -> list[float]:
            return list(model.predict(samples[:rows], batch_size=size, gpus=0, progress_bar=False).scores)

        few = min(count, 1000)
        theirs = np.array(predict(64, few))
        scorers = {"fp32": ours}
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else it is emulated, and slower than fp32
            scorers["bf16"] = CometScorer(find_model(str(home)), "bf16")
        each = {
            precision: fastest(ROUNDS, [lambda o=scorer, t=some: o.score(t)])[0] / count
            for precision, scorer in scorers.items()
        }
        taken = fastest(ROUNDS, [lambda n=n, c=count: predict(n, c) for n in BATCHES])
        best = min(taken)
        for precision, scorer in scorers.items():
            apart = np.abs(scorer.score(some.slice(0, few)) - theirs).max()
            yield {
                "what": f"scoring, {name}, {precision}", "ours": f"{1 / each[precision]:,.0f} pairs/s",
                "peer": f"predict, fp32, batches of {BATCHES[taken.index(best)]}", "theirs": f"{count / best:,.0f} pairs/s",
                "ratio": best / count / each[precision],
                "note": f"{torch.get_num_threads()} threads of a CPU; scores differ by {apart:.0e} at most, of a deviation of {theirs.std():.2g}",
            }  # fmt: skip


def tokenisation(
    home: Path, samples: list[dict[str, str]], model: Any, scorer: CometScorer
) -> Iterator[dict[str, Any]]:
    tokenizer = CometTokenizer(home / "tokenizer.json", 512)
    translations, sources = ([row[side] for row in samples] for side in ("mt", "src"))
    padded = []

    def collate() -> None:
        padded.clear()
        order = sorted(range(len(samples)), key=lambda k: len(samples[k]["src"]))
        padded.extend(
            model.prepare_for_inference([samples[k] for k in order[start : start + 16]])[0]
            for start in range(0, len(order), 16)
        )

    def per_core(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
        return min(times[1:])

    ours, theirs = per_core(lambda: tokenizer.pairs(translations, sources)), per_core(collate)
    yield {
        "what": "tokenisation per core", "ours": f"{len(samples) / ours:,.0f} pairs/s", "peer": "COMET's collate function",
        "theirs": f"{len(samples) / theirs:,.0f} pairs/s", "ratio": theirs / ours, "note": "seconds of CPU; the same tokens",
    }  # fmt: skip
    real = sum(int(batch["attention_mask"].sum()) for batch in padded)
    whole = sum(batch["attention_mask"].numel() for batch in padded)
    lengths = tokenizer.pairs(translations, sources).lengths
    assert int(lengths.sum()) == real
    scorer.score(pa.table({"src": sources, "tgt": translations}))
    yield {
        "what": "padding efficiency", "ours": f"{real / scorer.tokens:.3f}", "peer": "batches of 16, sorted by source", "theirs": f"{real / whole:.3f}",
        "ratio": whole / real, "note": "tokens that are no padding among those that are computed",
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    rows, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(os.devnull, "w") as nowhere:
        words, sys.stdout = sys.stdout, nowhere
        found = list(measure(pq.read_table(rows), folder))
    print(json.dumps(found), file=words)


if __name__ == "__main__":
    main()
