"""Makes a small Qwen3 with random weights, and a tokenizer from the text of the mix, to train without a download.

    python examples/tiny_model.py out/quickstart/mix out/train-demo/model

It has eight layers of width 64, half a million weights, and learns only which characters and words follow each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The turns of Qwen3's template: the last answer begins with an empty thought, and so does the prompt without thinking.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)


def save_tokenizer(
    folder: Path, texts: Iterable[str], size: int = 512, template: str | None = TEMPLATE, digits: bool = False
) -> Any:
    """Makes a byte-level BPE tokenizer from the texts, like Qwen's. With `digits`, each digit is a separate token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_model(
    folder: Path, vocabulary: int, layers: int = 8, hidden: int = 32, tied: bool = False, seed: int = 1, **more: Any
) -> Any:
    """A Qwen3 with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=2,
        **more,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model


def main(mix: Path, folder: Path) -> None:
    import pyarrow.parquet as pq

    files = sorted(mix.glob("*.parquet"))
    if not files:
        sys.exit(f"{mix}: has no Parquet files. Run make quickstart first.")
    chats = [chat for file in files for chat in pq.read_table(file, columns=["messages"])["messages"].to_pylist()]
    tokenizer = save_tokenizer(folder, (turn["content"] for chat in chats for turn in chat), 2048)
    model = save_model(folder, len(tokenizer), hidden=64)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} weights")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
