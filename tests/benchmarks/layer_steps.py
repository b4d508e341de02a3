"""What a step costs when some layers are trained, against full fine-tuning: prints rows as JSON for `bench.py`.

    python layer_steps.py cpu|cuda

Models of Qwen3's shape with random weights. A step is forward, backward and AdamW on one sequence; activations are the bytes
that autograd keeps of the forward pass. On a GPU, the shape of Qwen3-1.7B in bf16, with tokens a second and the share of its
peak.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _measure import bf16_peak
from transformers import Qwen3Config, Qwen3ForCausalLM

from corpusprep.training.layers import freeze, select

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))
ROUNDS = 7
EVERYTHING = ("all", ("model.embed_tokens", "model.norm", "lm_head"))


def make(layers: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Any:
    heads = max(2, hidden // (128 if hidden >= 1024 else 64))
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=hidden // heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)


class Step:
    """A model of which some layers are trained, and what a step of it takes."""

    def __init__(self, model: Any, layers: Any, modules: tuple[str, ...], tokens: int, device: str) -> None:
        self.model, self.device = model, device
        freeze(model, select(model, layers, modules))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)

    def loss(self) -> Any:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def run(self) -> float:
        """Seconds: of the GPU's time, or of CPU time, which other programs on the machine do not change."""
        wait = torch.cuda.synchronize if self.device == "cuda" else (lambda: None)
        clock = time.perf_counter if self.device == "cuda" else time.process_time
        wait()
        began = clock()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        return clock() - began

    def activations(self) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values())


def measure(
    name: str, shape: tuple[int, int, int], tokens: int, ways: dict[str, Any], device: str
) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ways = {"full": EVERYTHING} | ways
    kept, peaks = {}, dict.fromkeys(ways, 0)
    times: dict[str, list[float]] = {way: [] for way in ways}
    work = {}

    def run(way: str, step: Step, rounds: int) -> None:
        for _ in range(rounds):
            times[way].append(step.run())

    def build(way: str) -> Step:
        step = Step(make(*shape, dtype, device), *ways[way], tokens, device)
        kept[way], work[way] = step.activations(), flops(step, shape, tokens)
        step.run()  # does not count
        return step

    if device == "cuda":  # one after the other: what each takes of the memory is to be seen
        for way in ways:
            step = build(way)
            torch.cuda.reset_peak_memory_stats()
            run(way, step, ROUNDS)
            peaks[way] = torch.cuda.max_memory_allocated()
            del step
            gc.collect()
            torch.cuda.empty_cache()
    else:  # in turn: what else the machine does is the same for all
        steps = {way: build(way) for way in ways}
        for _ in range(ROUNDS):
            for way, step in steps.items():
                run(way, step, 1)
    full = min(times["full"])
    for way in list(ways)[1:] if device == "cpu" else ways:
        seconds = min(times[way])
        note = (
            f"{seconds / full:.2f} of a full step; activations {kept[way] / 2**20:,.0f} MiB, "
            f"{kept[way] / kept['full']:.2f} of {kept['full'] / 2**20:,.0f}; {tokens} tokens"
        )
        if device == "cuda":
            share, name_of = work[way] / seconds, torch.cuda.get_device_name()
            peak = bf16_peak(name_of)
            note += f"; {peaks[way] / 2**30:.1f} GiB at most; {tokens / seconds:,.0f} tokens/s"
            note += f", {share / peak:.0%} of the dense bf16 peak" if peak else ""
            note += f"; {name_of}"
        yield {
            "what": f"a step, {name}, {way}", "ours": f"{seconds * 1000:,.0f} ms", "peer": "full fine-tuning",
            "theirs": f"{full * 1000:,.0f} ms", "ratio": full / seconds, "note": note,
        }  # fmt: skip


def flops(step: Step, shape: tuple[int, int, int], tokens: int) -> float:
    """Operations of a step: two a weight and token forward; as many for the gradient of each trained weight, and as many for
    that of the input of each layer behind the first trained one. Attention's products are left out."""
    layers, _, _ = shape
    stack = step.model.model.layers
    weights = [sum(p.numel() for p in layer.parameters()) for layer in stack]
    first = next(k for k in range(layers) if any(p.requires_grad for p in stack[k].parameters()))
    head, looked_up = step.model.lm_head.weight.numel(), step.model.model.embed_tokens.weight
    trained = step.trained - (looked_up.numel() if looked_up.requires_grad else 0)
    return 2.0 * tokens * (sum(weights) + head + trained + sum(weights[first:]) + head)


def preparation() -> Iterator[dict[str, Any]]:
    """From conversations to packed tokens with the loss on answers, by one process, against what TRL's trainer does first."""
    import datasets
    from tiny_model import TEMPLATE, save_tokenizer
    from trl import SFTConfig, SFTTrainer

    from corpusprep.report.progress import Progress
    from corpusprep.training.dataset import open_parts, tokenise

    datasets.disable_caching()
    datasets.disable_progress_bars()
    draw, count = random.Random(1), 20_000
    words = (HERE / "words.tsv").read_text(encoding="utf-8").split()
    sides = [[" ".join(draw.choices(words, k=draw.randint(5, 25))) for _ in range(count)] for _ in range(2)]
    chats = [
        [{"role": "user", "content": f"Translate into German: {asked}"}, {"role": "assistant", "content": answer}]
        for asked, answer in zip(*sides, strict=True)
    ]
    with tempfile.TemporaryDirectory() as place:
        mix, model = Path(place) / "mix.jsonl", Path(place) / "model"
        mix.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        tokenizer = save_tokenizer(model, sides[0][:2000], 4000)
        small = make(2, 64, len(tokenizer), torch.float32, "cpu")
        small.config.save_pretrained(model)

        def ours(turn: int) -> int:
            arguments = {"enable_thinking": False}
            out = Path(place) / str(turn)
            tokenise([mix], str(model), arguments, 4096, True, out, Progress(), workers=1)
            return len(open_parts(out))

        def theirs(turn: int) -> int:
            said = "{{- message.content + '<|im_end|>\\n' -}}"
            assert said in TEMPLATE
            marked = (
                "{%- if message.role == 'assistant' -%}{% generation %}{{- message.content + '<|im_end|>' -}}"
                "{% endgeneration %}{{- '\\n' -}}{%- else -%}" + said + "{%- endif -%}"
            )
            tokenizer.chat_template = TEMPLATE.replace(said, marked)
            asked = SFTConfig(
                output_dir=place, packing=True, max_length=4096, assistant_only_loss=True, use_cpu=True, bf16=False,
                report_to="none",
            )  # fmt: skip
            rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
            began = time.perf_counter()
            trainer = SFTTrainer(model=small, args=asked, train_dataset=rows, processing_class=tokenizer)
            waits.append(time.perf_counter() - began)
            return len(trainer.train_dataset)

        waits: list[float] = []
        own, sequences = [], set()
        for turn in range(3):
            began = time.perf_counter()
            sequences.add(ours(turn))
            own.append(time.perf_counter() - began)
            other = theirs(turn)
    [packed] = sequences
    yield {
        "what": "tokens of a mix, packed", "ours": f"{count / min(own):,.0f} examples/s", "peer": "TRL's preparation",
        "theirs": f"{count / min(waits):,.0f} examples/s", "ratio": min(waits) / min(own),
        "note": f"one process each; {packed} sequences of 4096 against {other}",
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1] == "cuda":
        shapes = [
            (
                "28 x 2048 (Qwen3-1.7B)",
                (28, 2048, 151_936),
                4096,
                {"top 12": ("top:12", ()), "bottom 4": ("bottom:4", ())},
            )
        ]
    else:
        shapes = [
            ("8 x 256", (8, 256, 4096), 512, {"top half": ("top:4", ()), "bottom half": ("bottom:4", ())}),
            ("36 x 128", (36, 128, 4096), 256, {"top 15": ("top:15", ()), "bottom 4": ("bottom:4", ())}),
        ]  # fmt: skip
    found = [row for shape in shapes for row in measure(*shape, sys.argv[1])]
    if sys.argv[1] == "cpu":
        found += preparation()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
