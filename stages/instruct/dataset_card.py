"""The dataset card of the mix: a README.md that lists the files for `datasets` and the facts for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from corpusprep import codes
from corpusprep.stages.languages import name as language_name

_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7),
          ("10M<n<100M", 10**8), ("100M<n<1B", 10**9), ("1B<n<10B", 10**10))  # fmt: skip
_FIELDS = {
    "messages": "`messages`, a list of turns with `role` and `content`",
    "prompt_completion": "`prompt` and `completion`",
    "alpaca": "`instruction`, `input` and `output`",
    "sharegpt": "`conversations`, a list of turns with `from` and `value`",
}


@dataclass(frozen=True)
class PairFacts:
    """Counts of one pair in the mix: rows of bitext, their examples, tokens of the examples."""

    rows: int
    examples: int
    tokens: int | None = None


@dataclass(frozen=True)
class CardFacts:
    """Content of a card.

    Attributes:
        name: name of the mix.
        pairs: counts by pair (`en-sw`).
        files: glob patterns by split (`train`, `validation`), relative to the card.
        examples: number of examples by split.
        format, container: as in the settings of `instruct`.
        sources: one line per source.
        tokenizer: name of the tokenizer, or None if tokens are estimated from bytes.
        budget: requested tokens, or None.
        seed: seed of the run.
    """

    name: str
    pairs: Mapping[str, PairFacts]
    files: Mapping[str, list[str]]
    examples: Mapping[str, int]
    format: str = "messages"
    container: str = "parquet"
    sources: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    budget: int | None = None
    seed: int = 1


def card(facts: CardFacts) -> str:
    """The text of README.md, with the YAML front matter from which `datasets.load_dataset(folder)` reads the splits."""
    total = sum(facts.examples.values())
    sides = sorted({side for pair in facts.pairs for side in pair.split("-")})
    languages = sorted({codes.language_of(side) for side in sides})
    front = [
        "---",
        f"pretty_name: {_quoted(facts.name)}",
        *(["language:", *(f"- {_quoted(language)}" for language in languages)] if languages else []),
        "license: unknown",
        "task_categories:",
        "- translation",
        "- text-generation",
        f"size_categories:\n- {_quoted(next((name for name, limit in _SIZES if total < limit), 'n>1T'))}",
        "configs:",
        "- config_name: default",
        "  data_files:",
    ]
    for split, patterns in facts.files.items():
        front += [f"  - split: {split}", "    path:", *(f"    - {_quoted(pattern)}" for pattern in patterns)]
    front.append("---")
    counted = f"by the tokenizer {facts.tokenizer}" if facts.tokenizer else "estimated from bytes"
    tokens = [pair.tokens for pair in facts.pairs.values()]
    has_tokens = bool(tokens) and None not in tokens
    body = [
        "",
        f"# {facts.name}",
        "",
        f"Translation examples for instruction tuning, made by corpusprep from parallel corpora: {total:,} examples of "
        f"{sum(pair.rows for pair in facts.pairs.values()):,} sentence pairs in {len(sides)} languages"
        + (f", {sum(t for t in tokens if t is not None):,} tokens ({counted})." if has_tokens else "."),
        "",
        *([f"The requested budget was {facts.budget:,} tokens.", ""] if facts.budget is not None else []),
        "## Use",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'mix = load_dataset("path/to/this/folder")',
        "```",
        "",
        "## Splits",
        "",
        "| split | examples |",
        "|---|---:|",
        *(f"| {split} | {count:,} |" for split, count in facts.examples.items()),
        "",
        "## Fields",
        "",
        f"- {_FIELDS.get(facts.format, facts.format)}: the example.",
        "- `src_lang`, `tgt_lang`: the languages of the sentence pair; `direction`: the translation direction of this "
        "example.",
        "- `source`, `shard`, `row`: the origin of the sentence pair.",
        "- `template`, `copy`: the index of the prompt, and of the repetition of the sentence pair.",
        "",
        "## Language pairs",
        "",
        "| pair | languages | sentence pairs | examples | tokens |",
        "|---|---|---:|---:|---:|",
    ]
    for pair, count in sorted(facts.pairs.items()):
        names = ", ".join(language_name(side) for side in pair.split("-"))
        shown = "" if count.tokens is None else f"{count.tokens:,}"
        body.append(f"| {pair} | {names} | {count.rows:,} | {count.examples:,} | {shown} |")
    body += [
        "",
        "## Sources and licence",
        "",
        *[f"- {source}" for source in facts.sources],
        *([""] if facts.sources else []),
        "The text comes from the sources and has their licences. Check the terms of each source before you share this "
        "dataset, then set `license` above.",
        "",
        f"The recipe, the sources and the seed ({facts.seed}) determine the dataset; see the run's `manifest.json`.",
        "",
    ]
    return "\n".join([*front, *body])


def _quoted(text: str) -> str:
    """A YAML string with JSON quoting, which is valid YAML; without quotes, `no` would be read as false."""
    return json.dumps(text, ensure_ascii=False)
