"""corpusprep against its peers, in alternating runs on one machine: prints one table of ratios.

    python tests/benchmarks/bench.py [--parts langid,fingerprints,search,text-dedup,start,learn,whole,pass1,recipes,comet,rounds,train,scale]
                                     [--data FOLDER] [--out DIR]

Peers are installed into environments of their own, in DIR. langid, fingerprints and pass1 run on real text where FOLDER has
it (`bitext/multi30k_train/en-de.tsv.gz` and `bitext/lafand_train/en-swa.tsv.gz`); whole and recipes need it; the rest is
generated (`generate.py`). What a part measured takes the place of its section of `RESULTS.md` beside this file; the other
sections stay.

    langid        both sides of pairs, per core, against fasttext-predict with the same model
    fingerprints  SimHash of character 4-grams, per core, against the simhash package
    search        exact near-duplicate search against one numpy.sort of the same fingerprints
    start         seconds of CPU that commands take for four rows; the quickstart
    learn         the lexical scorer's learning from 100,000 rows, seconds of CPU
    whole         a whole run on real text by one process, against what fasttext-predict alone takes for its lines;
                  `corpusprep langid` from Parquet to Parquet
    pass1         `corpusprep run --until langid` (read, clean, identify, fingerprint, verify, write) against OpusFilter with
                  the same number of processes, and its cheap rules or those for scripts and repetitions too
    recipes       whole runs against the whole recipes of OpusFilter (with its word alignment model, for which a C compiler
                  builds eflomal), datatrove and data-juicer for the same stages (`recipes.py`)
    text-dedup    `corpusprep dedup` against text-dedup's SimHash command
    comet         the comet scorer against COMET's own `predict` (`comet_scorer.py`), models of random weights, on the
                  CPU. TORCH names the PyTorch to install, as in TORCH=torch==2.13.0
    rounds        rows that `quality.until = "budget"` scores, against scoring all
    train         steps of layer-selective tuning against full fine-tuning (`layer_steps.py`), on the CPU
    scale         whole runs of 1, 4 and 16 million rows

What a GPU is worth, `gpu.py` measures.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import recipes
import whole_runs
from _measure import Cost, alternate, command, environment, machine, median_ratio

from corpusprep.commands.thresholds import read_scores
from corpusprep.sources import SourceSettings, open_source
from corpusprep.stages.dedup import DedupSettings, fingerprint, reference_fingerprint
from corpusprep.stages.langid import LangidSettings, langid, model_files

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("corpusprep")
Row = dict[str, Any]
REAL = {
    "multi30k": ("en-de", "bitext/multi30k_train/en-de.tsv.gz"),
    "lafand": ("en-sw", "bitext/lafand_train/en-swa.tsv.gz"),
}


def row(what: str, ours: str, peer: str, theirs: str, ratio: float | None, note: str = "") -> Row:
    shown = "" if ratio is None else f"{ratio:.1f}"
    print(f"{what:44}{ours:>22}{peer:>34}{theirs:>22}{shown:>9}  {note}", flush=True)
    return {"what": what, "ours": ours, "peer": peer, "theirs": theirs, "ratio": shown, "note": note}


def rate(count: int, seconds: float) -> str:
    return f"{count / seconds:,.0f} rows/s"


def taken(cost: Cost) -> str:
    return f"{cost.wall:.1f} s, {cost.peak / 2**30:.2f} GiB"


def fastest(costs: Sequence[Cost]) -> Cost:
    return min(costs, key=lambda cost: cost.wall)


def generate(folder: Path, rows: int, pairs: str, layout: str = "nllb") -> None:
    arguments = [sys.executable, str(HERE / "generate.py"), str(folder), "--rows", str(rows), "--pairs", pairs]
    subprocess.run([*arguments, "--format", layout], check=True, capture_output=True)


def sample(out: Path, rows: int) -> pa.Table:
    folder = out / f"sample-{rows}"
    if not folder.exists():
        generate(folder, rows, "en-de,en-ru")
    source = open_source(SourceSettings(format="nllb", path=str(folder)))
    return pa.concat_tables([batch.table for shard in source.shards() for batch in source.read(shard)])


def texts(out: Path, data: Path | None, rows: int) -> dict[str, pa.Table]:
    """Tables of pairs to measure on, by name: real ones where they are at hand, and a generated one."""
    found = {"generated en-de, en-ru": sample(out, rows)}
    for name, (pair, file) in REAL.items():
        if lines := real_lines(data, file):
            sides = zip(*(line.decode().split("\t") for line in lines[:rows]), strict=True)
            columns = dict(zip(("src", "tgt"), map(list, sides), strict=True))
            languages = zip(("src_lang", "tgt_lang"), pair.split("-"), strict=True)
            found[f"{name} {pair}"] = pa.table(
                columns | {side: [code] * len(columns["src"]) for side, code in languages}
            )
    return found


def real_lines(data: Path | None, file: str) -> list[bytes]:
    """The lines of two columns of a file of real text; none where it is not at hand."""
    if data is None or not (data / file).exists():
        return []
    return [line for line in read_lines(data / file) if line.count(b"\t") == 1]


def bench_langid(out: Path, data: Path | None) -> list[Row]:
    import fasttext

    settings, rows = LangidSettings(), []
    model = fasttext.load_model(str(model_files(settings)[0]))
    for name, table in texts(out, data, 20_000).items():
        lines = [text.replace("\n", " ") for side in ("src", "tgt") for text in table[side].to_pylist()]
        ours, first, five = alternate(
            5,
            lambda t=table: langid(t, settings),
            *(lambda n=n, t=lines: [model.predict(line, n) for line in t] for n in (1, 5)),
        )
        for theirs, asked, note in (
            (first, "the first label", "ours also weighs the expected language and its rival"),
            (five, "five labels", "as it takes to look for the expected language"),
        ):
            rows.append(
                row(f"lines per core, {name}", rate(len(lines), min(ours)), f"fasttext-predict, {asked}",
                    rate(len(lines), min(theirs)), median_ratio(ours, theirs), note)
            )  # fmt: skip
    return rows


def bench_fingerprints(out: Path, data: Path | None) -> list[Row]:
    import simhash

    settings, rows = DedupSettings(), []
    for name, table in texts(out, data, 20_000).items():
        few = table.slice(0, 1000)
        pairs = list(zip(few["src"].to_pylist(), few["tgt"].to_pylist(), strict=True))

        def plain(pairs: Any = pairs) -> None:
            for pair in pairs:
                simhash.Simhash(
                    [side + text[i : i + 4] for side, text in zip("12", pair, strict=True) for i in range(len(text))]
                )

        ours, theirs, bare = alternate(
            5,
            lambda t=table: fingerprint(t, settings),
            lambda p=pairs: [reference_fingerprint(*pair, settings) for pair in p],
            plain,
        )
        mine = rate(table.num_rows, min(ours))
        per_row = [seconds / table.num_rows for seconds in ours]
        for label, seconds, note in (
            ("simhash, plain n-grams", bare, "with the package's own hash, of text that is not normalised"),
            ("simhash, the same features", theirs, "which are normalised and hashed in Python; the same fingerprints"),
        ):
            ratio = median_ratio(per_row, [second / 1000 for second in seconds])
            rows.append(row(f"pairs per core, {name}", mine, label, rate(1000, min(seconds)), ratio, note))
    return rows


def fingerprints_with_clusters(n: int) -> np.ndarray:
    """Random fingerprints, of which a tenth is near another, a fiftieth are copies of a thousand, a hundredth lie in one
    dense neighbourhood, and up to a million are the same."""
    draw = np.random.default_rng(1)
    values = draw.integers(0, 2**64, n, dtype=np.uint64)
    values[::10] = values[1::10] ^ (np.uint64(1) << draw.integers(0, 64, values[1::10].size).astype(np.uint64))
    values[2::50] = values[:1000][draw.integers(0, 1000, values[2::50].size)]
    values[4::100] = values[7] ^ (draw.integers(0, 1 << 16, values[4::100].size).astype(np.uint64) << np.uint64(20))
    same = values[3::30]
    same[:1_000_000] = values[0]
    return values


def bench_search(out: Path, data: Path | None) -> list[Row]:
    rows = []
    script = (
        "import sys, time, numpy as np; sys.path.insert(0, sys.argv[1]); import bench\n"
        "from corpusprep.stages.dedup import DedupSettings, decide\n"
        "n, threads, kind = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]\n"
        "make = bench.fingerprints_with_clusters\n"
        "values = make(n) if kind == 'clusters' else np.random.default_rng(1).integers(0, 2**64, n, dtype=np.uint64)\n"
        "hashes = values.copy()\n"
        "if kind == 'skewed': values[::2] &= ~np.uint64(0xFFFF)\n"  # half of the rows share a block
        "settings = DedupSettings()\n"
        "decide(values[:1000], values[:1000], settings)\n"
        "for _ in range(2):\n"
        "    began = time.perf_counter(); np.sort(values); print('sort', time.perf_counter() - began)\n"
        "    began = time.perf_counter(); decide(values, hashes, settings, threads)\n"
        "    print('search', time.perf_counter() - began)\n"
    )
    for n, threads, kind in (
        (2_000_000, 1, "random"), (20_000_000, 1, "random"), (20_000_000, 1, "clusters"), (20_000_000, 1, "skewed"),
        (50_000_000, 1, "random"), (50_000_000, 2, "random"), (50_000_000, 2, "clusters"),
    ):  # fmt: skip
        cost = command([sys.executable, "-c", script, HERE, str(n), str(threads), kind], out)
        found = [line.split() for line in (out / "last-command.log").read_text().splitlines()]
        search, sort = (min(float(value) for name, value in found if name == wanted) for wanted in ("search", "sort"))
        what = f"search, {n // 1_000_000} M {kind}, {threads} thread{'s' * (threads > 1)}"
        note = f"times a sort; {cost.peak / 2**30:.2f} GiB with the fingerprints"
        rows.append(row(what, f"{search:.2f} s", "one numpy.sort", f"{sort:.2f} s", search / sort, note))
    return rows


def bench_start(out: Path, data: Path | None) -> list[Row]:
    rows = [
        row(f"{name} of four rows", f"{cost.cpu:.2f} s of CPU, {cost.wall:.2f} s", "", "", None)
        for name, cost in whole_runs.start(out / "start").items()
    ]
    build, run = whole_runs.quickstart(out / "quickstart")
    what = f"{build.wall + run.wall:.1f} s, {run.peak / 2**30:.2f} GiB"
    return [*rows, row("quickstart, all installed", what, "", "", None, f"of which the data {build.wall:.1f} s")]


def bench_learn(out: Path, data: Path | None) -> list[Row]:
    count, seconds = whole_runs.learning(out / "learn", generate)
    return [row(f"learning from {count:,} rows, generated en-de", f"{seconds:.1f} s of CPU", "", "", None)]


def bench_whole(out: Path, data: Path | None) -> list[Row]:
    real = {pair: [line.decode() for line in real_lines(data, file)] for pair, file in REAL.values()}
    if not all(real.values()):
        print("whole: needs --data with real text", file=sys.stderr)
        return []
    folder = out / "whole"
    files = whole_runs.set_up(folder, real)
    lines, alone = whole_runs.predicted(folder, model_files(LangidSettings())[0])
    cost = whole_runs.whole(folder, files)
    judged, seconds = whole_runs.stage_on_parquet(folder, files, "langid")
    return [
        row(f"whole run of {lines // 2:,} rows, 2 pairs, 1 process", f"{cost.cpu:.1f} s of CPU, {cost.peak / 2**30:.2f} GiB",
            "fasttext-predict, the first label of its lines", f"{alone:.1f} s of CPU", alone / cost.cpu),
        row("corpusprep langid, Parquet to Parquet", f"{judged / seconds:,.0f} lines/s of CPU",
            "fasttext-predict, the first label", f"{lines / alone:,.0f} lines/s", judged / seconds * alone / lines),
    ]  # fmt: skip


def pass1_input(out: Path, data: Path | None, name: str, pair: str, file: str, rows: int) -> Path:
    """A folder with `many.PAIR.tsv` of the rows asked for, `ten.PAIR.tsv` of ten, and each side of both."""
    folder = out / f"pass1-{name}"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    if lines := real_lines(data, file):
        lines = (lines * (rows // len(lines) + 1))[:rows]
    else:
        generate(folder / "made", rows, pair, "tsv")
        lines = [line for path in sorted((folder / "made").rglob("*.tsv*")) for line in read_lines(path)]
    for size, some in (("many", lines), ("ten", lines[:10])):
        (folder / f"{size}.{pair}.tsv").write_bytes(b"".join(line + b"\n" for line in some))
        for side, code in enumerate(pair.split("-")):
            (folder / f"{size}.{code}").write_bytes(b"".join(line.split(b"\t")[side] + b"\n" for line in some))
    return folder


def read_lines(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).rstrip(b"\n").split(b"\n")


def bench_pass1(out: Path, data: Path | None, rounds: int = 2) -> list[Row]:
    programs = environment("opusfilter", out)
    rows = []
    for name, (pair, file) in REAL.items():
        folder = pass1_input(out, data, name, pair, file, 500_000)
        first, second = pair.split("-")
        distinct = len(set(read_lines(folder / f"many.{pair}.tsv")))
        repeated = f"{distinct:,} rows over and over; " if distinct < 400_000 else ""
        cheap, more = recipes.opusfilter_rules(pair, Path(model_files(LangidSettings())[0]))
        rules = {"cheap rules": cheap, "all rules": [*cheap, *more]}
        costs: dict[tuple[str, str], list[Cost]] = {}
        for _ in range(rounds):
            for size in ("ten", "many"):
                recipe = folder / f"{size}.toml"
                recipe.write_text(f'[[source]]\nformat = "tsv"\npath = "{folder}/{size}.{pair}.tsv"\n')
                shutil.rmtree(folder / "run", ignore_errors=True)
                ours = command(
                    [PROGRAM, "run", recipe, "--out", folder / "run", "--workers", "2", "--until", "langid"], folder
                )
                costs.setdefault(("ours", size), []).append(ours)
                for name_of, filters in rules.items():
                    step = {"inputs": [f"{size}.{first}", f"{size}.{second}"],
                            "outputs": [f"out.{first}", f"out.{second}"], "filters": filters}  # fmt: skip
                    config = {"common": {"output_directory": str(folder), "default_n_jobs": 2},
                              "steps": [{"type": "filter", "parameters": step}]}  # fmt: skip
                    (folder / f"{size}.yaml").write_text(json.dumps(config))  # JSON is YAML
                    theirs = command([programs / "opusfilter", "--overwrite", folder / f"{size}.yaml"], folder)
                    costs.setdefault((name_of, size), []).append(theirs)
        count = 500_000 - 10

        def marginal(who: str, costs: Any = costs) -> float:
            return float(fastest(costs[who, "many"]).wall - fastest(costs[who, "ten"]).wall)

        for name_of, filters in rules.items():
            note = f"2 processes each; {len(filters)} filters; {repeated}ours fingerprints too"
            ours, theirs = marginal("ours"), marginal(name_of)
            what = f"pass 1, {name} {pair}, {name_of}, marginal"
            rows.append(row(what, rate(count, ours), "OpusFilter 3.3.1", rate(count, theirs), theirs / ours, note))
            whole = fastest(costs["ours", "many"]), fastest(costs[name_of, "many"])
            rows.append(
                row(f"pass 1, {name} {pair}, {name_of}, whole run of 500,000", taken(whole[0]), "OpusFilter 3.3.1",
                    taken(whole[1]), whole[1].wall / whole[0].wall, "with the start of the program")
            )  # fmt: skip
    return rows


def bench_recipes(out: Path, data: Path | None, rounds: int = 2) -> list[Row]:
    model, rows = Path(model_files(LangidSettings())[0]), []
    for name, (pair, file) in REAL.items():
        lines = [line.decode() for line in real_lines(data, file)]
        if not lines:
            print(f"recipes: needs --data with {file}", file=sys.stderr)
            continue
        for found in recipes.compare(out, out / f"recipes-{name}", pair, lines, model, rounds):
            mine, other = (
                {size: fastest([cost for cost, _ in runs]) for size, runs in who.items()}
                for who in (found.ours, found.theirs)
            )
            ours, theirs = (cost["many"].wall - cost["ten"].wall for cost in (mine, other))
            kept, left = (who["many"][0][1] for who in (found.ours, found.theirs))
            peer, what, count = found.peer, f"rules to {found.peer.last}, {name} {pair}", found.rows - 10
            rows.append(
                row(f"{what}, marginal", rate(count, ours), peer.name, rate(count, theirs), theirs / ours, peer.note)
            )
            rows.append(
                row(f"{what}, whole run of {found.rows:,}", taken(mine["many"]), peer.name, taken(other["many"]),
                    other["many"].wall / mine["many"].wall,
                    f"with the start of the programs; ours kept {kept:,} rows, theirs {left:,}")
            )  # fmt: skip
    return rows


def bench_text_dedup(out: Path, data: Path | None) -> list[Row]:
    programs = environment("text-dedup", out)
    folder = out / "text-dedup"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = sample(out, 50_000)
    costs: dict[tuple[str, str], list[Cost]] = {}
    for size, some in (("many", table), ("ten", table.slice(0, 10))):
        texts = [f"{a} {b}" for a, b in zip(some["src"].to_pylist(), some["tgt"].to_pylist(), strict=True)]
        pq.write_table(pa.table({"text": texts}), folder / f"{size}-text.parquet")
        pq.write_table(some, folder / f"{size}.parquet")
    for _ in range(3):
        for size in ("ten", "many"):
            ours = command([PROGRAM, "dedup", f"{size}.parquet", "out.parquet"], folder)
            theirs = command(
                [programs / "python", "-m", "text_dedup.simhash", "--path", "parquet", "--data_files", f"{size}-text.parquet",
                 "--split", "train", "--column", "text", "--output", "out", "--cache_dir", "cache", "--num_proc", "2",
                 "--ngram", "4", "--bit_diff", "3", "--num_bucket", "4"], folder,
            )  # fmt: skip
            shutil.rmtree(folder / "cache", ignore_errors=True)
            costs.setdefault(("ours", size), []).append(ours)
            costs.setdefault(("theirs", size), []).append(theirs)
    ours, theirs = (fastest(costs[who, "many"]).wall - fastest(costs[who, "ten"]).wall for who in ("ours", "theirs"))
    count = table.num_rows - 10
    note = "ours on 1 process, theirs on 2; 4-grams, distance 3"
    whole = [fastest(costs[who, "many"]) for who in ("ours", "theirs")]
    ratio = whole[1].wall / whole[0].wall
    return [
        row("dedup of 50,000 pairs, marginal", rate(count, ours), "text-dedup 0.4.0", rate(count, theirs), theirs / ours, note),
        row("dedup of 50,000 pairs, whole command", taken(whole[0]), "text-dedup 0.4.0", taken(whole[1]), ratio,
            "with the start of the program"),
    ]  # fmt: skip


def bench_comet(out: Path, data: Path | None) -> list[Row]:
    programs = environment("comet", out)
    folder = out / "comet"
    folder.mkdir(exist_ok=True)
    # In an order that knows nothing of length, as generated rows are.
    pq.write_table(sample(out, 20_000).select(["src", "tgt"]), folder / "rows.parquet")
    return told(folder, programs / "python", HERE / "comet_scorer.py", "rows.parquet", "models")


def told(folder: Path, *arguments: str | Path) -> list[Row]:
    """The rows that a script prints as JSON."""
    command(arguments, folder)
    lines = (folder / "last-command.log").read_text(encoding="utf-8").splitlines()
    return [row(**found) for found in json.loads(lines[-1])]


def bench_rounds(out: Path, data: Path | None) -> list[Row]:
    """Rows that are scored to fill a tenth of the tokens at hand, against scoring all; nothing here is a time."""
    folder = out / "rounds"
    shutil.rmtree(folder, ignore_errors=True)
    generate(folder, 200_000, "en-de,en-ru,en-fr")
    found = {}
    budget = 800_000
    for until in ("all", "budget"):
        arguments = ["--source", f"nllb={folder}/nllb", "--set", f"balance.budget={budget}"]
        arguments += ["--set", "quality.threshold=0.9", "--set", f'quality.until="{until}"']
        command([PROGRAM, "run", *arguments, "--out", folder / until], out)
        manifest = json.loads((folder / until / "manifest.json").read_text(encoding="utf-8"))
        passing = [pair.scores[pair.scores >= pair.cutoff] for pair in read_scores(folder / until, examples=0)]
        mean = float(np.mean(np.concatenate(passing)))
        found[until] = manifest["quality"]["scores"]["computed"], manifest["mix"], manifest["counts"], mean
    (every, full, _, best), (some, mix, _, mean) = found["all"], found["budget"]
    kept = sum(pair["rows"] for pair in mix["pairs"].values())
    note = (
        f"{mix['tokens']:,} tokens of {budget:,} ({full['tokens']:,} when all are scored); mean score of what passes {mean:.3f} "
        f"({best:.3f}); {some / kept:.2f} rows scored a row kept"
    )
    return [row("rows scored to fill a budget", f"{some:,}", "scoring all", f"{every:,}", every / some, note)]


def bench_train(out: Path, data: Path | None) -> list[Row]:
    return told(out, environment("train", out) / "python", HERE / "layer_steps.py")


def bench_scale(out: Path, data: Path | None) -> list[Row]:
    """Whole runs, one after the other, each on data of its own size and with one budget."""
    rows, before = [], None
    for millions in (1, 4, 16):
        folder = out / "scale"
        shutil.rmtree(folder, ignore_errors=True)
        generate(folder, millions * 1_000_000, "en-de,en-ru,en-sw,en-fr")
        recipe = folder / "recipe.toml"
        recipe.write_text(f'[[source]]\nformat = "nllb"\npath = "{folder}/nllb"\n[balance]\nbudget = 20_000_000\n')
        cost = command([PROGRAM, "run", recipe, "--out", folder / "run"], folder)
        note = f"{cost.wall / before:.2f} times a quarter of the rows" if before else ""
        if millions == 4:
            before = cost.wall
            note = ""
        rows.append(row(f"whole run, {millions} million rows, 4 pairs", taken(cost), "", "", None, note))
    shutil.rmtree(out / "scale")
    return rows


PARTS: dict[str, Callable[..., list[Row]]] = {
    "langid": bench_langid,
    "fingerprints": bench_fingerprints,
    "search": bench_search,
    "text-dedup": bench_text_dedup,
    "start": bench_start,
    "learn": bench_learn,
    "whole": bench_whole,
    "pass1": bench_pass1,
    "recipes": bench_recipes,
    "comet": bench_comet,
    "rounds": bench_rounds,
    "train": bench_train,
    "scale": bench_scale,
}


def write_results(file: Path, found: Mapping[str, Sequence[str]]) -> None:
    """Puts sections in the place of those of the same name in `RESULTS.md`."""
    head, *others = file.read_text(encoding="utf-8").split("\n## ")
    sections = {section.partition("\n")[0]: section.partition("\n")[2].strip("\n").split("\n") for section in others}
    sections |= {name: list(lines) for name, lines in found.items()}
    names = [name for name in dict.fromkeys([*PARTS, *sections]) if name in sections]
    parts = [f"## {name}\n\n" + "\n".join(sections[name]) for name in names]
    file.write_text("\n\n".join([head.strip("\n"), *parts]) + "\n", encoding="utf-8")


def section(about: str, rows: Sequence[Row]) -> list[str]:
    lines = [about, "", "| what | corpusprep | peer | of the peer | ratio | |", "|---|---:|---|---:|---:|---|"]
    return lines + ["| " + " | ".join(str(value) for value in found.values()) + " |" for found in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: all)")
    parser.add_argument("--data", type=Path, help="folder with real text")
    parser.add_argument("--rounds", type=int, default=2, help="of pass1 and recipes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for what is needed")
    options = parser.parse_args(arguments)
    wanted = options.parts.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    out = options.out.resolve()
    data = options.data.resolve() if options.data else None
    out.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        about = f"{time.strftime('%Y-%m-%d')}, {machine()}."
        rounds = {"rounds": options.rounds} if part in ("pass1", "recipes") else {}
        found = PARTS[part](out, data, **rounds)
        write_results(HERE / "RESULTS.md", {part: section(about, found)})


if __name__ == "__main__":
    main()
