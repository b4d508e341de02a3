"""Runs the whole pipeline on a folder of bitext with planted defects and prints what became of each kind.

    python tests/benchmarks/planted.py FOLDER [--out DIR] [--set stage.key=value]... [--lost N]

FOLDER holds `opus-100-corpus/`, `nllb/`, `ccmatrix/` (those that there are), `evaluation/*.tsv` and `truth.tsv.gz` with the
columns file, row, pair, label, group. Rows of one group come from one clean row: the row itself, its copies, and its
damaged copies. One of them should reach the mix, with the clean row's text. A defect is gone when the row is not in the
mix, or is there as its group's only member with the clean text; `surplus` counts the copies beyond one only. A clean row
is kept when its group is in the mix.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpusprep import load_recipe, run
from corpusprep.recipe import Recipe
from corpusprep.stages.clean import clean
from corpusprep.stages.instruct import invert

SOURCES = {"opus-100-corpus": "opus100", "nllb": "nllb", "ccmatrix": "nllb"}
TARGETS = {
    **dict.fromkeys(
        ["exact_duplicate", "empty_side", "url_only", "no_text", "untranslated", "too_long", "markup"], 0.99
    ),
    **dict.fromkeys(["wrong_source_language", "wrong_target_language", "swapped_sides", "evaluation_leak"], 0.95),
    **dict.fromkeys(["near_duplicate", "truncated", "mojibake"], 0.90),
    "misaligned": 0.85,
}


def recipe_for(folder: Path, overrides: list[str]) -> Recipe:
    """All sources of the folder under their own names, its evaluation text protected, no budget."""
    found = [(name, kind) for name, kind in SOURCES.items() if (folder / name).is_dir()]
    sources = [f"{kind}={folder / name}" for name, kind in found]
    named = [f"source.{i}.name={name}" for i, (name, _) in enumerate(found)]
    against = sorted(str(path) for path in (folder / "evaluation").glob("*.tsv"))
    settings = [f"dedup.against={against!r}", *overrides]
    recipe = load_recipe(None, sources=sources, overrides=settings)
    renamed = tuple(
        s.model_copy(update={"name": n.partition("=")[2]}) for s, n in zip(recipe.source, named, strict=True)
    )
    return recipe.model_copy(update={"source": renamed})


def read_mix(out: Path, recipe: Recipe) -> pl.DataFrame:
    """The mix as pairs: file, row, src, tgt (one line a row, whatever its directions)."""
    examples = pa.concat_tables([pq.read_table(path) for path in sorted((out / "mix").glob("*.parquet"))])
    pairs = invert(examples, recipe.instruct)
    frame = pl.DataFrame(pl.from_arrow(pairs))
    return (
        frame.select(file=pl.col("source") + "/" + pl.col("shard"), row="row", src="src", tgt="tgt")
        .unique(["file", "row"])
        .sort("file", "row")
    )


def read_rejects(out: Path) -> pl.DataFrame:
    columns = ["source", "shard", "row", "src_lang", "tgt_lang", "src", "tgt", "reason"]
    frame = pl.concat([pl.read_parquet(path, columns=columns) for path in sorted((out / "rejects").glob("*.parquet"))])
    return frame.with_columns(file=pl.col("source") + "/" + pl.col("shard")).drop("source", "shard")


def judge(folder: Path, out: Path, recipe: Recipe, lost: int = 0) -> bool:
    """Prints the tables; true where every target is met."""
    truth = pl.read_csv(folder / "truth.tsv.gz", separator="\t", quote_char=None)
    mix = read_mix(out, recipe)
    rejects = read_rejects(out)
    rows = (
        truth.join(mix.with_columns(kept=True), on=["file", "row"], how="left")
        .join(rejects.select("file", "row", "reason"), on=["file", "row"], how="left")
        .with_columns(pl.col("kept").fill_null(False))
    )
    neither = rows.filter(~pl.col("kept") & pl.col("reason").is_null()).height
    both = rows.filter(pl.col("kept") & pl.col("reason").is_not_null()).height
    if neither or both or rows.height != mix.height + rejects.height:
        print(f"accounts: {neither} rows in neither mix nor rejects, {both} in both, {rows.height} true rows")
        return False

    clean_text = _clean_texts(folder, truth)
    members: dict[tuple[str, int], list[tuple[str, str, str]]] = defaultdict(list)
    for pair, group, label, src, tgt in (
        rows.filter(pl.col("kept") & (pl.col("group") >= 0)).select("pair", "group", "label", "src", "tgt").iter_rows()
    ):
        members[pair, group].append((label, src, tgt))
    strict: dict[str, int] = defaultdict(int)
    surplus: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    groups: dict[str, set[int]] = defaultdict(set)
    shown: dict[str, int] = defaultdict(int)
    for pair, group, label, kept, src, tgt in rows.select("pair", "group", "label", "kept", "src", "tgt").iter_rows():
        total[label] += 1
        if label == "clean":
            groups[pair].add(group)
            continue
        if not kept:
            continue
        copies = members.get((pair, group), []) if group >= 0 else []
        alone = group >= 0 and len(copies) == 1
        original = (src, tgt) in clean_text.get((pair, group), ())
        # A copy beside another member is surplus; which of two equal ones is, is arbitrary: the clean row is none.
        surplus[label] += not alone
        strict[label] += not (alone and original)
        if lost and shown[label] < lost:
            shown[label] += 1
            print(f"  in the mix: {label} {pair}: {src[:100]!r} | {tgt[:100]!r}", file=sys.stderr)

    print(f"{'label':24}{'rows':>7}{'gone':>9}{'surplus':>9}{'target':>8}")
    met = True
    for label in sorted(total, key=lambda name: (-TARGETS.get(name, 0), name)):
        if label == "clean":
            continue
        gone = 1 - strict[label] / total[label]
        target = TARGETS.get(label)
        met &= target is None or gone >= target
        mark = "" if target is None or gone >= target else "  missed"
        print(f"{label:24}{total[label]:7,}{gone:9.4f}{surplus[label]:9,}{target or '-':>8}{mark}")
    count = sum(len(g) for g in groups.values())
    kept_groups = {pair: sum((pair, g) in members for g in found) for pair, found in groups.items()}
    share = sum(kept_groups.values()) / count
    met &= share >= 0.95
    print(f"{'clean groups kept':24}{count:7,}{share:9.4f}{'':9}{0.95:>8}{'' if share >= 0.95 else '  missed'}")
    print(
        "clean groups kept by pair: "
        + ", ".join(f"{p} {kept_groups[p] / len(g):.3f}" for p, g in sorted(groups.items()))
    )
    why: dict[str, int] = defaultdict(int)
    for pair, group, label, kept, reason in rows.select("pair", "group", "label", "kept", "reason").iter_rows():
        if label == "clean" and not kept and (pair, group) not in members:
            why[reason] += 1
    print(
        "clean groups lost by reason: "
        + ", ".join(f"{reason} {n}" for reason, n in sorted(why.items(), key=lambda item: -item[1]))
    )
    dropped = rows.filter((pl.col("label") == "clean") & ~pl.col("kept")).group_by("reason").len()
    print(
        "clean rows dropped by reason: "
        + ", ".join(
            f"{reason} {n / total['clean']:.3%}"
            for reason, n in dropped.sort("len", "reason", descending=True).iter_rows()
        )
    )
    return bool(met)


def _clean_texts(folder: Path, truth: pl.DataFrame) -> dict[tuple[str, int], set[tuple[str, str]]]:
    """(pair, group) -> the clean row's text as published, and as the clean stage normalises it."""
    from corpusprep.sources import open_source

    recipe = recipe_for(folder, [])
    wanted = truth.filter(pl.col("label") == "clean").select("file", "row", "pair", "group")
    tables = [
        batch.table
        for settings in recipe.source
        for source in [open_source(settings)]
        for shard in source.shards()
        for batch in source.read(shard)
    ]
    table = pa.concat_tables(tables)
    texts: dict[tuple[str, int], set[tuple[str, str]]] = defaultdict(set)
    for version in (table, clean(table).kept):
        frame = pl.DataFrame(pl.from_arrow(version.select(["source", "shard", "row", "src", "tgt"])))
        frame = frame.with_columns(file=pl.col("source") + "/" + pl.col("shard"))
        joined = wanted.join(frame, on=["file", "row"])
        for pair, group, src, tgt in joined.select("pair", "group", "src", "tgt").iter_rows():
            texts[pair, group].add((src, tgt))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="the run's folder, kept; by default a temporary one")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--lost", type=int, default=0, help="show so many survivors of each kind")
    arguments = parser.parse_args()
    recipe = recipe_for(arguments.folder, arguments.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        run(recipe, out, workers=arguments.workers)
        return 0 if judge(arguments.folder, out, recipe, arguments.lost) else 1


if __name__ == "__main__":
    sys.exit(main())
