"""Measures scoring and training on a GPU, in a few minutes: each figure is printed and written as soon as it is there.

    python tests/benchmarks/gpu.py [--minutes 9] [--out out/gpu] [--rehearse]

1. The tests that need a GPU, as `make test-gpu` runs them.
2. The comet scorer against COMET's own `predict` in fp32, TF32 and bf16: the same pairs, and the batch size that suits each best. Where
   COMET is not installed, its encoder by transformers in padded batches takes its place, which is most of what `predict` computes.
3. A whole training of two stages on a small mix, by `corpusprep train`: Qwen3-0.6B's shape with random weights. Tokens a second and
   the share of the GPU's peak, of the bottom 4 and the top 15 layers, and of full fine-tuning.
4. The same with `attention = "varlen"`, and our attention in short rows against PyTorch's.

Nothing is installed or downloaded. A step that fails or has no time left says so, and the next one begins. `--rehearse` does all of it
with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples"))
SHARES = {"tests": 0.15, "scoring": 0.35, "training": 0.3, "attention": 0.2}  # of the minutes
PRECISIONS = {"fp32": "highest", "TF32": "high", "bf16": "highest"}  # and how PyTorch multiplies fp32 in each


class Size(NamedTuple):
    """How large all is.

    Attributes:
        encoder: layers, size, heads and vocabulary of the scorer's model.
        pairs: that are scored at a time.
        batches: sizes that the peer may choose from.
        decoder: layers, size, heads, key heads and vocabulary of the trained model.
        examples: of the mix.
        sequence, batch: tokens.
        stages: layers that each stage trains.
        steps: of trainings that are not run to their end.
    """

    encoder: tuple[int, int, int, int]
    pairs: int
    batches: tuple[int, ...]
    decoder: tuple[int, int, int, int, int]
    examples: int
    sequence: int
    batch: int
    stages: tuple[str, str]
    steps: int


REAL = Size(
    (24, 1024, 16, 250_002), 16_384, (16, 64, 256), (28, 1024, 16, 8, 151_936), 12_000, 4096, 32_768,
    ("bottom:4", "top:15"), 20,
)  # fmt: skip
SMALL = Size((2, 64, 4, 0), 128, (16, 64), (4, 64, 4, 2, 0), 240, 128, 1024, ("bottom:1", "top:2"), 3)


class Figures:
    """Prints figures and appends them to a file, each when it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)

    def add(
        self, what: str, ours: str, peer: str = "", theirs: str = "", ratio: float | None = None, note: str = ""
    ) -> None:
        found = {"what": what, "ours": ours, "peer": peer, "theirs": theirs, "ratio": ratio, "note": note}
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"{what:48}{ours:>20}{peer:>36}{theirs:>20}{shown:>7}  {note}", flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


def sentences(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Pairs of random words of two languages, 4 to 30 words each."""
    draw = random.Random(seed)
    words = [line.split("\t") for line in (HERE / "words.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    rows = []
    for _ in range(count):
        chosen = draw.choices(words, k=draw.randint(4, 30))
        rows.append((" ".join(word[0] for word in chosen), " ".join(word[1] for word in chosen)))
    return rows


def rate(call: Callable[[], int], seconds: float) -> float:
    """What a call does in a second: it is repeated for about so long, after one time that does not count."""
    call()
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < seconds:
        done += call()
    return done / (time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------------------- scoring


def score(size: Size, out: Path, figures: Figures, seconds: float, device: str) -> None:
    import numpy as np
    import pyarrow as pa
    import torch
    from _measure import bf16_peak
    from comet_scorer import make_model

    from corpusprep.stages.quality.comet import CometScorer
    from corpusprep.stages.quality.comet.files import find_model

    rows = sentences(size.pairs)
    table = pa.table({"src": [a for a, _ in rows], "tgt": [b for _, b in rows]})
    layers, hidden, heads, vocabulary = size.encoder
    make_model(out / "comet", table, layers, hidden, heads, vocabulary)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    each = min(seconds / (len(PRECISIONS) * (1 + len(size.batches))), 0.3 if size is SMALL else seconds)
    wanted = None
    for precision, multiplied in PRECISIONS.items():
        torch.set_float32_matmul_precision(multiplied)
        scorer = CometScorer(find_model(str(out / "comet")), "bf16" if precision == "bf16" else "fp32")
        scores = scorer.score(table)
        wanted = scores if wanted is None else wanted

        def ours(scorer: Any = scorer) -> int:
            scorer.score(table)
            return size.pairs

        speed = rate(ours, each)
        note = f"{where}; {float(np.sqrt(np.mean((scores - wanted) ** 2))):.1e} from fp32 (root mean square), deviation {wanted.std():.2g}"
        peak = bf16_peak(where)
        if peak is not None:
            done = operations(scorer, table) * speed / size.pairs
            note += f"; {done / 1e12:.0f} TFLOP/s" + (
                f", {done / peak:.0%} of the bf16 peak" if precision == "bf16" else ""
            )
        del scorer
        figures.add(f"scoring, {layers} x {hidden}, {precision}", f"{speed:,.0f} pairs/s", note=note)
        peer = predict(out / "comet", rows, precision, device)
        best = max((rate(functools.partial(peer.call, number), each), number) for number in size.batches)
        figures.add(
            f"scoring, {layers} x {hidden}, {precision}", f"{speed:,.0f} pairs/s", f"{peer.name}, batches of {best[1]}",
            f"{best[0]:,.0f} pairs/s", speed / best[0], where,
        )  # fmt: skip
        del peer
        if device == "cuda":
            torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("highest")


class _Peer(NamedTuple):
    name: str
    call: Callable[[int], int]


def predict(folder: Path, rows: Sequence[tuple[str, str]], precision: str, device: str) -> _Peer:
    """COMET's `predict` on some of the rows, or the same encoder by transformers in padded batches; a call returns the number of rows."""
    import torch

    few = rows[: max(256, len(rows) // 8)]
    if importlib.util.find_spec("comet") is not None and precision != "bf16":
        from comet_scorer import stock

        model = stock(folder)
        samples = [{"src": a, "mt": b} for a, b in few]

        def stock_predict(batch: int) -> int:
            model.predict(samples, batch_size=batch, gpus=int(device == "cuda"), progress_bar=False)
            return len(few)

        return _Peer("COMET's predict", stock_predict)
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    config = XLMRobertaConfig.from_pretrained(folder)
    with torch.device(device):
        encoder = XLMRobertaModel(config, add_pooling_layer=False).eval()
    encoder.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    ordered = sorted(few, key=lambda row: len(row[0]))  # as predict does

    def encode(batch: int) -> int:
        with torch.inference_mode():
            for start in range(0, len(ordered), batch):
                some = ordered[start : start + batch]
                given = tokenizer(
                    [b for _, b in some],
                    [a for a, _ in some],
                    padding=True,
                    truncation=True,
                    max_length=512,
                    return_tensors="pt",
                )
                states = encoder(given["input_ids"].to(device), given["attention_mask"].to(device)).last_hidden_state
                states[:, 0].float().cpu()
        return len(ordered)

    return _Peer("transformers' encoder, padded", encode)


def operations(scorer: Any, table: Any) -> float:
    """Multiplications and additions that scoring takes: of the encoder's weights and of attention. The last layer computes
    keys and values for all tokens, and all else for the first token of a row alone."""
    shape = scorer._model.encoder.shape
    h, layers, rows = shape.hidden, shape.layers, table.num_rows
    lengths = scorer._tokenizer.pairs(table["tgt"].to_pylist(), table["src"].to_pylist()).lengths.astype(float)
    tokens, squares = lengths.sum(), (lengths**2).sum()
    whole = 2 * 12 * h * h * tokens + 4 * h * squares
    last = 2 * 2 * h * h * tokens + 2 * 10 * h * h * rows + 4 * h * tokens
    return float((layers - 1) * whole + last)


# -------------------------------------------------------------------------------------------------------------- training


def prepare_training(size: Size, out: Path) -> None:
    """A mix and a model of Qwen3's kind with random weights."""
    import torch
    from tiny_model import save_tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rows = sentences(size.examples, 2)
    (out / "mix").mkdir(parents=True)
    with (out / "mix" / "train.jsonl").open("w", encoding="utf-8") as file:
        for asked, answer in rows:
            turns = [("user", f"Translate into German: {asked}"), ("assistant", answer)]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    tokenizer = save_tokenizer(out / "model", (text for row in rows[:2000] for text in row), 4000)
    layers, hidden, heads, keys, vocabulary = size.decoder
    config = Qwen3Config(
        vocab_size=max(vocabulary, len(tokenizer)), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=128 if hidden >= 1024 else hidden // heads,
        max_position_embeddings=max(4096, size.sequence), tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).cpu().save_pretrained(out / "model")


def train(
    size: Size, out: Path, name: str, layers: Sequence[str], attention: str, steps: int | None, seconds: float
) -> list[dict[str, Any]]:
    """Runs `corpusprep train`, and returns what it says of each stage.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    stages = "".join(f'[[train.stages]]\nlayers = "{each}"\n' for each in layers)
    limit = f"max_steps = {steps}\n" if steps else ""
    recipe = out / f"{name}.toml"
    recipe.write_text(
        f'[train]\nmodel = "{out}/model"\nsequence_length = {size.sequence}\nbatch_tokens = {size.batch}\nvalidation_examples = 0\n'
        f'gradient_checkpointing = false\nattention = "{attention}"\nlog_steps = 1\n{limit}{stages}'
    )
    shutil.rmtree(out / name, ignore_errors=True)
    call = ["-m", "corpusprep", "train", recipe, "--mix", out / "mix", "--out", out / name]
    _, log = finished([sys.executable, *map(str, call)], out / f"{name}.log", seconds)
    found = [out / name / f"stage-{k}" / "training.json" for k in range(1, len(layers) + 1)]
    if not all(path.exists() for path in found):
        raise RuntimeError(f"corpusprep train {name}: {log[-800:]}")
    return [json.loads(path.read_text()) for path in found]


def finished(command: Sequence[str], log: Path, seconds: float) -> tuple[int, str]:
    """Runs a command, with all that it starts, for so long at most; returns its exit code and what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            cwd=ROOT,
        )
        try:
            process.wait(max(5.0, seconds))
        except subprocess.TimeoutExpired:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            return 124, f"it was ended after {seconds:.0f} s"
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def flops(size: Size, trained: Sequence[int]) -> float:
    """Operations of training on a token: two for each weight forward, as many for the gradient of each trained weight, and for that
    of the input of each layer behind the first trained one. Attention's own products are left out."""
    layers, hidden, heads, keys, vocabulary = size.decoder
    width = 128 if hidden >= 1024 else hidden // heads
    layer = hidden * width * (2 * heads + 2 * keys) + 9 * hidden * hidden
    head = vocabulary * hidden
    return 2.0 * (layers * layer + head + len(trained) * layer + (layers - min(trained)) * layer + head)


def told(size: Size, figures: Figures, name: str, report: dict[str, Any], full: float | None) -> float:
    """Adds the figures of a stage; returns its tokens a second."""
    import torch
    from _measure import bf16_peak

    speed = report["tokens_seen"] / report["seconds"]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = bf16_peak(where)
    note = f"{where}; {report['steps']} steps, {report['tokens_seen']:,} tokens, {report['seconds']:.1f} s"
    if peak is not None:
        note += f"; {speed * flops(size, report['layers']) / peak:.0%} of the dense bf16 peak"
    ratio = speed / full if full else None
    peer = ("full fine-tuning", f"{full:,.0f} tokens/s") if full else ("", "")
    figures.add(f"training, {name}", f"{speed:,.0f} tokens/s", *peer, ratio, note)
    return float(speed)


def compare_training(size: Size, out: Path, figures: Figures, seconds: float) -> None:
    began = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - began)

    prepare_training(size, out)
    [whole] = train(size, out, "full", ["all"], "auto", size.steps, left())
    full = told(size, figures, "all layers", whole, None)
    for report, layers in zip(
        train(size, out, "two-stages", size.stages, "auto", None, left()), size.stages, strict=True
    ):
        told(size, figures, layers, report, full)


def compare_attention(size: Size, out: Path, figures: Figures, seconds: float) -> None:
    began = time.monotonic()
    speeds = {}
    for way in ("auto", "varlen"):
        left = seconds - (time.monotonic() - began)
        [report] = train(size, out, f"attention-{way}", [size.stages[1]], way, size.steps, left)
        speeds[way] = report["tokens_seen"] / report["seconds"], report["attention"]
    (usual, name), (ours, _) = speeds["auto"], speeds["varlen"]
    what = f"training, {size.stages[1]}, attention = varlen"
    figures.add(what, f"{ours:,.0f} tokens/s", name, f"{usual:,.0f} tokens/s", ours / usual, f"{size.steps} steps")
    import torch

    if torch.cuda.is_available():
        for row in short_rows():
            figures.add(**row)


def short_rows() -> Iterator[dict[str, Any]]:
    """Sixteen heads of 64 in rows of equal length, 65,536 tokens in all, against PyTorch's flash attention of such rows."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from corpusprep.stages.quality.comet import fused as kernels

    def microseconds(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(20):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) * 1000)
        return sorted(taken[3:])[len(taken[3:]) // 2]

    for length in (24, 47, 64, 90, 128, 200):
        rows = 65_536 // length
        sides = torch.randn(rows * length, 3, 16, 64, device="cuda").bfloat16().unbind(1)
        bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device="cuda")
        ours = microseconds(lambda s=sides, b=bounds, n=length: kernels.attention(*s, b, b, n, n))
        theirs = microseconds(lambda s=sides, b=bounds, n=length: varlen_attn(*s, b, b, n, n))
        yield {
            "what": f"attention, rows of {length} tokens", "ours": f"{ours:.0f} us", "peer": "torch's varlen_attn",
            "theirs": f"{theirs:.0f} us", "ratio": theirs / ours, "note": torch.cuda.get_device_name(),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ all


def steps(size: Size, out: Path, figures: Figures, device: str) -> Iterator[tuple[str, Callable[[float], None]]]:
    def tests(seconds: float) -> None:
        code, log = finished([sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu"], out / "tests.log", seconds)
        last = (log.strip().splitlines() or ["nothing"])[-1]
        figures.add("tests that need a GPU", last)
        if code not in (0, 5):  # 5: all were skipped
            raise RuntimeError(last)

    if device == "cuda":
        os.environ["CORPUSPREP_TEST_GPU"] = "1"
    yield "tests", tests
    yield "scoring", lambda seconds: score(size, out, figures, seconds, device)
    yield "training", lambda seconds: compare_training(size, out, figures, seconds)
    yield "attention", lambda seconds: compare_attention(size, out, figures, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="time for all (default: 9)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="folder for figures and what is needed; it is emptied"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU; --rehearse does without")
    device, size = ("cpu", SMALL) if options.rehearse else ("cuda", REAL)
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    figures = Figures(out / "figures.jsonl")
    began, failed, spare = time.monotonic(), 0, 0.0
    for name, step in steps(size, out, figures, device):
        seconds = 60 * options.minutes * SHARES[name] + spare  # what a step leaves is the next one's
        start = time.monotonic()
        try:
            step(seconds)
        except Exception as error:  # the next step may work
            failed += 1
            (out / f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")
            figures.add(name, "failed", note=f"{type(error).__name__}: {error}")
        spare = seconds - (time.monotonic() - start)
    figures.add("all", f"{time.monotonic() - began:.0f} s", note=f"{failed} steps failed" if failed else "")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
