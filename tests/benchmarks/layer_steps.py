"""What a step costs when some layers are trained, against full fine-tuning: prints rows as JSON for `bench.py`.

    python layer_steps.py

Models of Qwen3's shape with random weights. A step is forward, backward and AdamW on one sequence; activations are the bytes
that autograd keeps of the forward pass.
"""

from __future__ import annotations

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
from transformers import Qwen3Config, Qwen3ForCausalLM

from corpusprep.training.layers import freeze, select

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))
ROUNDS = 7
EVERYTHING = ("all", ("model.embed_tokens", "model.norm", "lm_head"))


def make(layers: int, hidden: int, vocabulary: int) -> Any:
    heads = max(2, hidden // (128 if hidden >= 1024 else 64))
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=hidden // heads,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


class Step:
    """A model of which some layers are trained, and what a step of it takes."""

    def __init__(self, model: Any, layers: Any, modules: tuple[str, ...], tokens: int) -> None:
        self.model = model
        freeze(model, select(model, layers, modules))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.ids = torch.randint(0, model.config.vocab_size, (1, tokens))

    def loss(self) -> Any:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def run(self) -> float:
        """Seconds of CPU time, which other programs on the machine do not change."""
        began = time.process_time()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - began

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


def measure(name: str, shape: tuple[int, int, int], tokens: int, ways: dict[str, Any]) -> Iterator[dict[str, Any]]:
    steps = {way: Step(make(*shape), *trained, tokens) for way, trained in ({"full": EVERYTHING} | ways).items()}
    kept = {way: step.activations() for way, step in steps.items()}
    for step in steps.values():
        step.run()  # does not count
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(ROUNDS):  # in turn: what else the machine does is the same for all
        for way, step in steps.items():
            times[way].append(step.run())
    full = min(times["full"])
    for way in ways:
        seconds = min(times[way])
        note = (
            f"{seconds / full:.2f} of a full step; activations {kept[way] / 2**20:,.0f} MiB, "
            f"{kept[way] / kept['full']:.2f} of {kept['full'] / 2**20:,.0f}; {tokens} tokens"
        )
        yield {
            "what": f"a step, {name}, {way}", "ours": f"{seconds * 1000:,.0f} ms", "peer": "full fine-tuning",
            "theirs": f"{full * 1000:,.0f} ms", "ratio": full / seconds, "note": note,
        }  # fmt: skip


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
        small = make(2, 64, len(tokenizer))
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
    shapes = [
        ("8 x 256", (8, 256, 4096), 512, {"top half": ("top:4", ()), "bottom half": ("bottom:4", ())}),
        ("36 x 128", (36, 128, 4096), 256, {"top 15": ("top:15", ()), "bottom 4": ("bottom:4", ())}),
    ]  # fmt: skip
    print(json.dumps([*(row for shape in shapes for row in measure(*shape)), *preparation()]))


if __name__ == "__main__":
    main()
