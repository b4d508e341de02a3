"""What a step costs when some layers are trained, against full fine-tuning: prints rows as JSON for `bench.py`.

    python layer_steps.py

Models of Qwen3's shape with random weights. A step is forward, backward and AdamW on one sequence; activations are the bytes
that autograd keeps of the forward pass. On a GPU the shape of Qwen3-0.6B too, in bf16, with tokens a second and the share of
its peak.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from corpusprep.training.layers import freeze, select

ROUNDS = 7
EVERYTHING = ("all", ("model.embed_tokens", "model.norm", "lm_head"))
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations a second, by the makers' data sheets


def make(layers: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Any:
    heads = max(2, hidden // 64)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=hidden // heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).to(device)


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
    steps = {}
    for way, (layers, modules) in ({"full": EVERYTHING} | ways).items():
        steps[way] = Step(make(*shape, dtype, device), layers, modules, tokens, device)
    times: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(ROUNDS + 1):
        for way, step in steps.items():
            taken = step.run()
            if turn:
                times[way].append(taken)
    full, kept = min(times["full"]), {way: step.activations() for way, step in steps.items()}
    for way in ways:
        seconds = min(times[way])
        note = (
            f"{seconds / full:.2f} of a full step; activations {kept[way] / 2**20:,.0f} MiB, "
            f"{kept[way] / kept['full']:.2f} of {kept['full'] / 2**20:,.0f}; {tokens} tokens"
        )
        if device == "cuda":
            share = flops(steps[way], shape, tokens) / seconds
            peak = next((p for n, p in PEAKS.items() if n in torch.cuda.get_device_name()), None)
            note += f"; {tokens / seconds:,.0f} tokens/s" + (f", {share / peak:.0%} of its bf16 peak" if peak else "")
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
    head = step.model.lm_head.weight.numel()
    return 2.0 * tokens * (sum(weights) + head + step.trained + sum(weights[first:]) + head)


def main() -> None:
    warnings.simplefilter("ignore")
    found = list(
        measure("8 x 256", (8, 256, 4096), 512, {"top half": ("top:4", ()), "bottom half": ("bottom:4", ())}, "cpu")
    )
    found += measure("36 x 128", (36, 128, 4096), 256, {"top 15": ("top:15", ()), "bottom 4": ("bottom:4", ())}, "cpu")
    if torch.cuda.is_available():
        found += measure(
            "28 x 1024 (Qwen3-0.6B)", (28, 1024, 151_936), 4096, {"top 12": ("top:12", ()), "bottom 4": ("bottom:4", ())},
            "cuda",
        )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
