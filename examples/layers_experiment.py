"""Tests layer-selective tuning on a small model: `python examples/layers_experiment.py --out out/layers-experiment`.

LLaMAX2 / Qwen3-XPlus (arXiv 2510.09189) tunes only the bottom layers of an instruct model, then only the top layers, on
a small translation mix. It reports that the model gains translation and keeps its reasoning. Here a Qwen3 of eight
layers and 0.6 million parameters first learns two skills from scratch: sums modulo 10 with written steps, and
untranslated text in three languages. Then it is tuned on English-German and English-Spanish from the quickstart's mix
in three ways. All training uses `corpusprep.training.train`.

    full         all layers, embeddings, norm and head, in both stages
    bottom, top  layer 0, then layers 5-7: the paper's choice, in about its shares (4 and 15 of 36)
    middle       layer 1, then layers 2-4: as many parameters per stage, in layers that the paper's choice leaves frozen

All ways have two stages with the same number of steps, examples, order and schedule. The learning rate of each way is
the tried rate with the lowest translation loss on the development half of the held-out rows, for the first seed; the
other half is reported. This rule considers only translation, so a second table shows all rates; `--rates 1e-3` uses one
rate for all ways. The seed sets the initial weights and the order of examples.

    translation  answers to held-out rows of the mix; the mix has their phrases in other combinations
    sums         answers to held-out sums; an answer is right if every token is the most likely one, so that greedy
                 decoding gives the whole answer
    English      text of phrases that are in the first training but not in the translation mix

The base model has read all three languages, like an instruct model: otherwise, frozen embeddings of unseen tokens would
decide the comparison. Unlike the paper's models, it cannot translate at all, so it has more to learn. The script needs
the extra `train`, and the quickstart's mix (`make quickstart`). Three seeds take 26 minutes on one core (half an hour
on two busy ones); `--size tiny --seeds 1 --steps 5` takes six, and only checks that everything works. If started again,
it continues where it stopped; the printed seconds count from that start.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from build import EVALUATION_PHRASES, Phrasebook  # beside this script
from tiny_model import save_model, save_tokenizer

from corpusprep.training import TrainSettings, TrainStage, train
from corpusprep.training.examples import IGNORED, Encoder

Chat = list[dict[str, str]]

LANGUAGES = {"en": "English", "de": "German", "es": "Spanish"}
RATES = (1e-3, 3e-3, 1e-2)
BASE_RATE = 4e-3
HELD_OUT_ROWS = 80  # of the mix, both directions each; half for development
HELD_OUT = 200  # sums, and English texts
ENDS = ("model.embed_tokens", "model.norm", "lm_head")
WAYS = {
    "full": (TrainStage(layers="all", modules=ENDS), TrainStage(layers="all", modules=ENDS)),
    "bottom, top": (TrainStage(layers="bottom:1"), TrainStage(layers="top:3")),
    "middle": (TrainStage(layers=(1,)), TrainStage(layers="2-4")),
}
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Size:
    """The model's width and vocabulary, and the number of sums, and of texts per language, to train the base on."""

    hidden: int
    vocabulary: int
    sums: int
    texts: int


SIZES = {"small": Size(64, 1536, 5_000, 800), "tiny": Size(32, 768, 500, 50)}


def chat(prompt: str, answer: str) -> Chat:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def sums(count: int, random: Random, without: Iterable[str] = ()) -> list[Chat]:
    """Distinct sums modulo 10 of a digit and five steps between -3 and 3, with every step written down."""
    seen = set(without)
    made: list[Chat] = []
    while len(made) < count:
        total, lines = random.randrange(10), []
        prompt = f"Modulo 10: {total}"
        for _ in range(5):
            step = random.choice((-3, -2, -1, 1, 2, 3))
            prompt += f"{step:+}"
            lines.append(f"{total}{step:+}={(total + step) % 10}")
            total = (total + step) % 10
        if prompt not in seen:
            seen.add(prompt)
            made.append(chat(prompt, "\n".join(lines)))
    return made


def texts(count: int, language: str, places: Sequence[int], random: Random, without: Iterable[str] = ()) -> list[Chat]:
    """Distinct texts of two phrases from the phrasebook, with newly filled slots."""
    book = Phrasebook.read()
    seen = set(without)
    made: list[Chat] = []
    while len(made) < count:
        text = book.text(tuple(book.fill(place, random) for place in random.sample(places, 2)), language)
        if text not in seen:
            seen.add(text)
            made.append(chat(f"Write something in {LANGUAGES[language]}.", text))
    return made


def translations(mix: Path) -> tuple[list[Chat], list[Chat], list[Chat]]:
    """A mix's examples of the languages, for training, development and test. A row's two directions stay together."""
    files = [*sorted(mix.glob("train-*.parquet")), *sorted((mix / "validation").glob("*.parquet"))]
    rows: dict[tuple[str, int], list[Chat]] = {}
    for file in files:
        for row in pq.read_table(file).to_pylist():
            if {row["src_lang"], row["tgt_lang"]} <= set(LANGUAGES):
                rows.setdefault((row["shard"], row["row"]), []).append(row["messages"])
    if len(rows) <= HELD_OUT_ROWS:
        raise SystemExit(
            f"{mix}: has {len(rows)} rows of {', '.join(LANGUAGES)}; it must have more than {HELD_OUT_ROWS}."
        )
    keys = sorted(rows)
    Random("held out").shuffle(keys)
    cuts = (keys[HELD_OUT_ROWS:], keys[: HELD_OUT_ROWS // 2], keys[HELD_OUT_ROWS // 2 : HELD_OUT_ROWS])
    train_, development, test = ([example for key in cut for example in rows[key]] for cut in cuts)
    return train_, development, test


def write_mix(folder: Path, examples: list[Chat], validation: list[Chat] | None = None) -> Path:
    """Writes a mix folder like that of `corpusprep run`."""
    for file, chats in (
        (folder / "train-0.parquet", examples),
        (folder / "validation/validation-0.parquet", validation),
    ):
        if chats is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"messages": chats}), file)
    return folder


def save_base(folder: Path, tokenizer: Any, hidden: int, seed: int) -> Path:
    """Saves a Qwen3 with random weights. Its head and embeddings are two tensors, so that each can be trained."""
    save_model(folder, len(tokenizer), hidden=hidden, seed=seed, initializer_range=hidden**-0.5)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, stages: tuple[TrainStage, ...], rate: float, **more: Any) -> TrainSettings:
    return TrainSettings(
        model=str(model),
        stages=stages,
        learning_rate=rate,
        min_learning_rate=rate / 10,
        warmup=0.1,
        sequence_length=320,
        batch_tokens=640,
        precision="fp32",
        gradient_checkpointing=False,
        template_arguments={},
        processes=1,
        checkpoint_steps=1_000_000,
        **more,
    )


def measure(folder: Path, sets: dict[str, list[Chat]]) -> dict[str, dict[str, float]]:
    """Loss of the answers' tokens, and the share of answers in which every token is the most likely one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(folder), {})
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = {}
    for name, chats in sets.items():
        loss, tokens, exact = 0.0, 0, 0
        encoded = sorted(encoder.encode(chats, name), key=lambda pair: len(pair[0]))
        for start in range(0, len(encoded), 20):
            pairs = [tuple(map(torch.tensor, pair)) for pair in encoded[start : start + 20]]
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([ids for ids, _ in pairs], batch_first=True)
            labels = pad([labels for _, labels in pairs], batch_first=True, padding_value=IGNORED).long()[:, 1:]
            with torch.inference_mode():  # padding is at the end, where earlier tokens do not attend to it
                logits = model(input_ids=ids).logits[:, :-1].float()
            known = labels != IGNORED
            loss += float(torch.nn.functional.cross_entropy(logits[known], labels[known], reduction="sum"))
            tokens += int(known.sum())
            exact += int(((logits.argmax(-1) == labels) | ~known).all(1).sum())
        found[name] = {"loss": loss / tokens, "exact": exact / len(encoded)}
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Mean, lowest and highest value."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(rows: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """A Markdown table: each row has a name and its measurements, one per seed."""
    columns = (
        ("translation", "loss", ".3f"),
        ("sums", "exact", ".1%"),
        ("sums", "loss", ".3f"),
        ("English", "loss", ".3f"),
    )
    lines = ["| | translation loss | sums right | loss of sums | English loss |", "|---|---|---|---|---|"]
    for name, found in rows:
        cells = [spread([f[what][which] for f in found], form) for what, which, form in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def experiment(
    mix: Path, out: Path, seeds: Sequence[int], steps: int, rates: Sequence[float], size: Size
) -> dict[str, Any]:
    """Trains and measures all models; returns the content of `results.json`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    begun = time.monotonic()
    taught, development, test = translations(mix)
    random = Random("base")
    everywhere = range(len(Phrasebook.read().phrases))
    sets = {
        "translation": test,
        "sums": sums(HELD_OUT, random),
        "English": texts(HELD_OUT, "en", everywhere[EVALUATION_PHRASES], random),
    }
    kept = [example[0]["content"] for example in sets["sums"]], [example[1]["content"] for example in sets["English"]]
    base = sums(size.sums, random, kept[0])
    for language in LANGUAGES:
        base += texts(size.texts, language, everywhere, random, kept[1])
    base_mix = write_mix(out / "mix-base", base)
    translation_mix = write_mix(out / "mix-translation", taught, development)
    lines = (f"{turn['role']}\n{turn['content']}" for turns in base + taught for turn in turns)
    tokenizer = save_tokenizer(out / "tokenizer", lines, size.vocabulary, TEMPLATE, digits=True)

    def tune(way: str, rate: float, seed: int) -> dict[str, Any]:
        # The steps end a stage; the number of epochs must only be large enough.
        how = settings(bases[seed], WAYS[way], rate, epochs=1000, max_steps=steps)
        made = train(
            how, translation_mix, out / f"seed-{seed}" / f"{way.replace(', ', '-')}-{rate:g}", seed=seed, resume=True
        )
        stages = [
            {
                "layers": report["layers"],
                "trained": report["parameters"]["trained"],
                "steps": report["steps"],
                "seconds": report["seconds"],
                "frozen_tensors_changed": len(report["checks"]["frozen_tensors_changed"]),
            }
            for report in made.reports
        ]
        found = measure(made.folders[-1], sets)
        print(f"{time.monotonic() - begun:6.0f} s  seed {seed}, {way} at {rate:g}: {json.dumps(found)}", flush=True)
        return {
            "way": way,
            "rate": rate,
            "seed": seed,
            "development_loss": made.reports[-1]["losses"]["after"],
            "stages": stages,
            "after": found,
        }

    bases, before = {}, {}
    for seed in seeds:
        first = save_base(out / f"seed-{seed}" / "random", tokenizer, size.hidden, seed)
        how = settings(first, (TrainStage(layers="all", modules=ENDS),), BASE_RATE)
        bases[seed] = train(how, base_mix, out / f"seed-{seed}" / "base", seed=seed, resume=True).folders[0]
        before[seed] = measure(bases[seed], sets)
        print(f"{time.monotonic() - begun:6.0f} s  seed {seed}, base: {json.dumps(before[seed])}", flush=True)
    sweep = [tune(way, rate, seeds[0]) for way in WAYS for rate in rates]
    chosen = {
        way: min((run for run in sweep if run["way"] == way), key=lambda run: run["development_loss"])["rate"]
        for way in WAYS
    }
    runs = [run for run in sweep if run["rate"] == chosen[run["way"]]]
    runs += [tune(way, chosen[way], seed) for seed in seeds[1:] for way in WAYS]
    rows = [("before", [before[seed] for seed in seeds])]
    rows += [(f"{way} at {chosen[way]:g}", [run["after"] for run in runs if run["way"] == way]) for way in WAYS]
    swept = [("before", [before[seeds[0]]])]
    swept += [(f"{run['way']} at {run['rate']:g}", [run["after"]]) for run in sweep]
    of = f"mean (lowest to highest) of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    told = (
        f"After two stages of {steps} steps, at the chosen rate; {of}:\n\n{table(rows)}\n\n"
        f"All rates, seed {seeds[0]}:\n\n{table(swept)}\n"
    )
    return {
        "table": told,
        "size": asdict(size),
        "steps_a_stage": steps,
        "examples": {"base": len(base), "translation": len(taught), "development": len(development), "test": len(test)},
        "chosen_rates": chosen,
        "before": before,
        "runs": runs,
        "sweep": sweep,
        "seconds": round(time.monotonic() - begun),
        "processor_seconds": round(sum(os.times()[:4])),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "corpusprep")},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compares three choices of layers on a model trained from scratch.")
    parser.add_argument("--out", type=Path, default=Path("out/layers-experiment"), help="folder (default: %(default)s)")
    parser.add_argument("--mix", type=Path, default=Path("out/quickstart/mix"), help="mix (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 1 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps per tuning stage (default: %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to try (default: %(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny only checks that it runs")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps must be 1 or more.")
    if not list(options.mix.glob("train-*.parquet")):
        parser.error(f"{options.mix} has no mix: make it with make quickstart.")
    found = experiment(
        options.mix, options.out, range(1, options.seeds + 1), options.steps, options.rates, SIZES[options.size]
    )
    print(f"\n{found['table']}")
    file = options.out / "results.json"
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{found['seconds']} s, {found['processor_seconds']} s of processor time; {file}")


if __name__ == "__main__":
    main()
