"""Whole runs of corpusprep against whole recipes of peers for the same stages. A part of `bench.py`.

What is compared is the work from the rows to the rows that are left, in two processes. corpusprep's run goes on to the mix: it
also writes two examples of each row and all rejects with their reasons, and computes a sample again. The peers write what is
left. Each reads its own format: TSV, lines of each side (OpusFilter), or JSON lines (datatrove, data-juicer). A program that
drops more rows early has less to do later.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _measure import Cost, command, environment
from whole_runs import mixed

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("corpusprep")
PROCESSES = 2  # of each program
ROWS = 200_000  # of a pair, at most
SAMPLE = 100_000  # rows that scorers learn from
ALIGNED = 7  # eflomal's score of a row that stays is less, both ways; OpusFilter's default, 0, drops most of real rows

Result = tuple[Cost, int]  # of a run, and the rows that it left


class Peer(NamedTuple):
    """A peer's recipe.

    Attributes:
        name: the peer and its version.
        last: the last stage that it has.
        settings: those with which corpusprep does the same stages.
        note: what each does.
        run: runs it on one input, by the input's name.
    """

    name: str
    last: str
    settings: tuple[str, ...]
    note: str
    run: Callable[[str], Result]


class Comparison(NamedTuple):
    """Runs of corpusprep and of a peer: on all rows, and on ten."""

    peer: Peer
    rows: int
    ours: Mapping[str, Sequence[Result]]
    theirs: Mapping[str, Sequence[Result]]


def opusfilter_rules(pair: str, model: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """OpusFilter's cheap rules, with language identification, and those for scripts and repetitions."""
    cheap: list[dict[str, Any]] = [
        {"LengthFilter": {"unit": "char", "min_length": 1, "max_length": 1000}},
        {"LengthRatioFilter": {"unit": "char", "threshold": 3}},
        {"LongWordFilter": {"threshold": 40}},
        {"HtmlTagFilter": {}},
        {"AlphabetRatioFilter": {"threshold": 0.5}},
        {"NonZeroNumeralsFilter": {"threshold": 0.5}},
        {"SimilarityFilter": {"threshold": 0.75}},
        {"FastTextFilter": {"languages": pair.split("-"), "thresholds": [0.2, 0.2], "model_path": str(model)}},
    ]
    more: list[dict[str, Any]] = [
        {"CharacterScoreFilter": {"scripts": ["Latin", "Latin"], "thresholds": [0.9, 0.9]}},
        {"RepetitionFilter": {"threshold": 4}},
    ]
    return cheap, more


def inputs(folder: Path, pair: str, lines: Sequence[str]) -> int:
    """Writes `many`, rows made of real ones, and `ten` of them, in the format of each program; how many there are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sides = pair.split("-")
    made = [line.split("\t") for line in mixed(lines)]
    rows = [row for row in made if all(side.strip() for side in row)][:ROWS]
    for name, some in (("many", rows), ("ten", rows[:10])):
        write(folder / f"{name}.{pair}.tsv", ("\t".join(row) for row in some))
        texts = ({"src": a, "tgt": b, "text": f"{a} {b}"} for a, b in some)
        write(folder / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in texts))
        for k, side in enumerate(sides):
            write(folder / f"{name}.{side}", (row[k] for row in some))
            documents = [
                json.dumps({"id": str(number), "text": row[k]}, ensure_ascii=False) for number, row in enumerate(some)
            ]
            half = len(documents) // PROCESSES
            for part, few in enumerate((documents[:half], documents[half:])):
                write(folder / name / side / f"{part}.jsonl", few)
    return len(rows)


def write(file: Path, lines: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def count(file: Path) -> int:
    return file.read_bytes().count(b"\n")


def corpusprep(folder: Path, pair: str, settings: Sequence[str], name: str) -> Result:
    shutil.rmtree(folder / "run", ignore_errors=True)
    changed = [part for setting in settings for part in ("--set", setting)]
    source = ["--source", f"tsv={folder}/{name}.{pair}.tsv", "--out", "run"]
    cost = command([PROGRAM, "run", *source, "--workers", str(PROCESSES), "--quiet", *changed], folder)
    return cost, json.loads((folder / "run/manifest.json").read_text(encoding="utf-8"))["counts"]["kept"]


def opusfilter(programs: Path, folder: Path, pair: str, model: Path, scorer: bool, name: str) -> Result:
    first, second = pair.split("-")

    def both(stem: str) -> list[str]:
        return [f"{stem}.{first}", f"{stem}.{second}"]

    cheap, more = opusfilter_rules(pair, model)
    tokenizers = {"src_tokenizer": ["moses", first], "tgt_tokenizer": ["moses", second]}
    aligned = {"priors": "priors", "src_threshold": ALIGNED, "tgt_threshold": ALIGNED, **tokenizers}
    steps: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "rules": [
            ("remove_duplicates", {"inputs": both(name), "outputs": both("unique"), "lowercase": True}),
            ("filter", {"inputs": both("unique"), "outputs": both("clean"), "filters": [*cheap, *more]}),
        ],
        "scorer": [
            ("subset", {"inputs": both("clean"), "outputs": both("some"), "size": SAMPLE, "seed": 1}),
            ("train_alignment", {"src_data": f"some.{first}", "tgt_data": f"some.{second}", "output": "priors",
                                 "parameters": tokenizers}),
            ("filter", {"inputs": both("clean"), "outputs": both("good"), "filters": [{"WordAlignFilter": aligned}]}),
        ],
    }  # fmt: skip
    wanted = [*steps["rules"], *(steps["scorer"] if scorer else [])]
    config = {
        "common": {"output_directory": str(folder), "default_n_jobs": PROCESSES},
        "steps": [{"type": kind, "parameters": parameters} for kind, parameters in wanted],
    }
    (folder / "opusfilter.yaml").write_text(json.dumps(config))  # JSON is YAML
    cost = command([programs / "opusfilter", "--overwrite", "opusfilter.yaml"], folder)
    return cost, count(folder / f"{'good' if scorer else 'clean'}.{first}")


def datatrove(programs: Path, folder: Path, pair: str, model: Path, name: str) -> Result:
    """Documents of one language, each side for itself; the rows of which both sides are left."""
    shutil.rmtree(folder / "datatrove", ignore_errors=True)
    sides = pair.split("-")
    arguments: list[str | Path] = [
        programs / "python",
        HERE / "datatrove_recipe.py",
        folder / name,
        folder / "datatrove",
        model,
        *sides,
    ]
    cost = command(arguments, folder, environment={"HF_HOME": str(folder / "datatrove-cache")})
    left = []
    for side in sides:
        files = sorted((folder / "datatrove" / side / "good").glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        left.append({json.loads(line)["id"] for line in lines})
    return cost, len(set.intersection(*left))


def data_juicer(programs: Path, folder: Path, pair: str, model: Path, name: str) -> Result:
    """Two commands, one a side: a second filter of the same kind would use the figures that the first wrote for the row."""
    home = folder / "data-juicer"
    shutil.rmtree(home, ignore_errors=True)
    (home / "models").mkdir(parents=True)
    (home / "models/lid.176.bin").symlink_to(model.resolve())  # the name that it looks for
    places = {
        "DATA_JUICER_EXTERNAL_MODELS_HOME": str(home / "models"),
        "DATA_JUICER_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    near = {"text_key": "text", "tokenization": "character", "window_size": 4, "ignore_pattern": r"[\p{P}\s]",
            "num_blocks": 4, "hamming_distance": 3}  # fmt: skip
    before, costs = folder / f"{name}.jsonl", []
    for side, language in zip(("src", "tgt"), pair.split("-"), strict=True):
        rules: list[tuple[str, dict[str, Any]]] = [
            ("text_length_filter", {"min_len": 1, "max_len": 2000}),
            ("alphanumeric_filter", {"min_ratio": 0.4, "tokenization": False}),
            ("special_characters_filter", {"max_ratio": 0.5}),
            ("character_repetition_filter", {"rep_len": 8, "max_ratio": 0.6}),
            ("word_repetition_filter", {"rep_len": 5, "max_ratio": 0.6}),
            ("language_id_score_filter", {"lang": language, "min_score": 0.2}),
        ]
        process: list[dict[str, Any]] = [{rule: {"text_key": side, **values}} for rule, values in rules]
        if side == "tgt":
            process.append({"document_simhash_deduplicator": near})
        after = home / side / "out.jsonl"
        config = {"dataset_path": str(before), "export_path": str(after), "np": PROCESSES, "use_cache": False,
                  "turbo": True, "process": process}  # fmt: skip
        (home / f"{side}.yaml").write_text(json.dumps(config))
        costs.append(command([programs / "dj-process", "--config", f"{side}.yaml"], home, environment=places))
        before = after
    walls, cpus, peaks = zip(*costs, strict=True)
    return Cost(sum(walls), sum(cpus), max(peaks)), count(before)


def peers(out: Path, folder: Path, pair: str, model: Path) -> list[Peer]:
    opus, trove, juicer = (environment(peer, out) for peer in ("opusfilter", "datatrove", "data-juicer"))
    exact, none = ("dedup.near=false",), ("quality.enabled=false",)
    filters = f"{PROCESSES} processes each; theirs: 10 filters, equal rows"
    documents = f"{PROCESSES} processes each; theirs: each side a document, 2 filters and language, MinHash of a side"
    rows = f"{PROCESSES} processes each; theirs: one command a side, 5 filters and language, SimHash of 4-grams within 3 bits"
    return [
        Peer("OpusFilter 3.3.1", "scorer", exact,
             f"{filters}, eflomal trained on at most {SAMPLE:,} rows; ours: all stages, only equal rows",
             lambda name: opusfilter(opus, folder, pair, model, True, name)),
        Peer("OpusFilter 3.3.1", "exact duplicates", (*exact, *none),
             f"{filters}; ours: all stages but quality, only equal rows",
             lambda name: opusfilter(opus, folder, pair, model, False, name)),
        Peer("datatrove 0.10.1", "near duplicates", none, f"{documents}, no rule for both; ours: all stages but quality",
             lambda name: datatrove(trove, folder, pair, model, name)),
        Peer("data-juicer 1.6.1", "near duplicates", none, f"{rows}, no rule for both; ours: all stages but quality",
             lambda name: data_juicer(juicer, folder, pair, model, name)),
    ]  # fmt: skip


def compare(out: Path, folder: Path, pair: str, lines: Sequence[str], model: Path, rounds: int) -> list[Comparison]:
    """Runs all recipes in turn, so many times."""
    rows = inputs(folder, pair, lines)
    found = [Comparison(peer, rows, {}, {}) for peer in peers(out, folder, pair, model)]
    runs: dict[tuple[object, str], list[Result]] = {}
    for _ in range(rounds):
        for name in ("ten", "many"):
            for settings in dict.fromkeys(comparison.peer.settings for comparison in found):
                runs.setdefault((settings, name), []).append(corpusprep(folder, pair, settings, name))
            for k, comparison in enumerate(found):
                runs.setdefault((k, name), []).append(comparison.peer.run(name))
    sizes = ("ten", "many")
    return [
        comparison._replace(
            ours={name: runs[comparison.peer.settings, name] for name in sizes},
            theirs={name: runs[k, name] for name in sizes},
        )
        for k, comparison in enumerate(found)
    ]
