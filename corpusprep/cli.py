"""The command line. Heavy modules are imported only when a command runs, so that `--help` is immediate."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from corpusprep.errors import CorpusprepError

STAGES = {
    "clean": "Normalise text and drop pairs that break a rule.",
    "langid": "Drop pairs that are not in the languages of their labels.",
    "dedup": "Drop exact and near duplicates, and copies of evaluation text.",
    "quality": "Score pairs and drop those below the threshold.",
    "balance": "Select pairs to fill a budget of tokens, shared between language pairs.",
    "instruct": "Turn pairs into shuffled instruction examples.",
}
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Bytes(click.ParamType[int]):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(value), re.IGNORECASE)
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a size; write 8G or 900M", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="corpusprep")
def cli() -> None:
    """Turns raw parallel corpora into a small, clean, balanced training mix.

    `corpusprep run` runs all stages of a recipe; each stage is also a separate command.
    """


@cli.command("run")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for mix/, rejects/, manifest.json and parts/.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: --set dedup.max_distance=2."
)
@click.option(
    "--source", "sources", multiple=True, metavar="FORMAT=PATH", help="Add a source: --source opus100=data/opus."
)
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: one per core; one for small input]")
@click.option(
    "--memory", type=_Bytes(), help="Memory that the run may use on a machine, such as 8G; limits the workers."
)
@click.option(
    "--engine", metavar="ENGINE", help="Where tasks run: local, ray, or the address of a Ray cluster, ray://host:10001."
)
@click.option("--until", type=click.Choice(list(STAGES)), help="Stop after this stage; no mix is written.")
@click.option("--redo", type=click.Choice(list(STAGES)), help="Do this stage and all that follows from it again.")
@click.option("--dry-run", is_flag=True, help="Read the first rows of the sources and print what would happen.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def run_command(
    recipe: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    sources: tuple[str, ...],
    workers: int | None,
    memory: int | None,
    engine: str | None,
    until: str | None,
    redo: str | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Run RECIPE (TOML) from its sources to the mix; an interrupted run continues where it stopped."""
    from corpusprep.arrow import leave_pandas_out

    leave_pandas_out()
    from corpusprep.engines.open import open_engine
    from corpusprep.pipeline import dry_run as preview
    from corpusprep.pipeline import run
    from corpusprep.recipe import load_recipe
    from corpusprep.report.accounts import mix_line, summary
    from corpusprep.report.progress import Bars, Progress

    started = time.monotonic()
    loaded = load_recipe(recipe, overrides=overrides, sources=sources)
    if dry_run:
        click.echo(preview(loaded))
        return
    with open_engine(engine or loaded.engine.address, workers, memory) as where:
        result = run(
            loaded, out, workers=workers, memory=memory, until=until, redo=redo, engine=where, progress=Progress() if quiet else Bars()
        )  # fmt: skip
    click.echo(summary(result.accounts))
    click.echo()
    for note in result.notes:
        click.echo(f"note: {note}")
    for stage, found in result.verified.items():
        click.echo(
            f"verified: {stage}, {found['agree']:,} of {found['compared']:,} values of {found['rows']:,} rows agree with "
            f"{found['reference']}"
        )
    if result.manifest is None:
        click.echo(
            f"Stopped after {until}: {result.accounts.kept():,} rows are left. Run again without --until to continue."
        )
    else:
        click.echo(mix_line(result.manifest, out))
    made = sum(n for kind, n in result.made.items())
    reused = sum(result.reused.values())
    click.echo(f"{made:,} parts made, {reused:,} reused, in {time.monotonic() - started:.1f} s.")


def _stage_command(name: str, text: str) -> click.Command:
    @click.command(
        name,
        help=f"{text}\n\nIN is a file, a folder or a glob; gzip, bzip2 and xz are unpacked. OUT is a .parquet, .jsonl or .tsv "
        "file, the last two also with .gz, .bz2 or .xz. The columns are src, tgt, src_lang and tgt_lang; other columns are kept. "
        "- is standard input as IN, and standard output as OUT.",
    )
    @click.argument("in_file", metavar="IN")
    @click.argument("out_file", metavar="OUT")
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=f"Change a setting of {name}.")
    @click.option("--rejects", metavar="FILE", help="File for the rows that are dropped, with their reason.")
    @click.option("--src-lang", help="Language of src, where the file has no column src_lang.")
    @click.option("--tgt-lang", help="Language of tgt, where the file has no column tgt_lang.")
    @click.option(
        "--column",
        "columns",
        multiple=True,
        metavar="FIELD=COLUMN",
        help="The column of src, tgt, src_lang, tgt_lang, score or translation: --column src=german. TSV: also by number from 0.",
    )
    @click.option(
        "--from",
        "read_as",
        type=click.Choice(["tsv", "jsonl", "parquet", "moses", "nllb", "opus100"]),
        help="Format of IN, if its suffix does not name it.",
    )
    @click.option(
        "--to",
        "write_as",
        type=click.Choice(["tsv", "jsonl", "parquet"]),
        help="Format of OUT, if its suffix does not name it.",
    )
    @click.option(
        "--on-error",
        type=click.Choice(["stop", "keep"]),
        default="stop",
        show_default=True,
        help="What to do at a damaged file: stop, or keep what can be read.",
    )
    @click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Decides whatever is drawn.")
    def command(in_file: str, out_file: str, columns: tuple[str, ...], **options: Any) -> None:
        from corpusprep.arrow import leave_pandas_out

        leave_pandas_out()
        from corpusprep.commands.stage import run_stage
        from corpusprep.errors import SettingsError

        places: dict[str, str | int] = {}
        for each in columns:
            field, equals, column = each.partition("=")
            if not equals or not field or not column:
                raise SettingsError(f"--column {each}: write field=column, as in --column src=german.")
            places[field] = int(column) if column.isdecimal() else column
        try:
            report = run_stage(name, in_file, out_file, columns=places, say=_warn, **options)
        except BrokenPipeError:
            _leave_pipe()
            sys.exit(141)  # click would make it 1
        click.echo(report, err=out_file == "-")

    return command


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


def _leave_pipe() -> None:
    """Redirects standard output, so that Python does not flush its buffer into the closed pipe at exit."""
    import contextlib

    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


for _name, _text in STAGES.items():
    cli.add_command(_stage_command(_name, _text))


@cli.command("thresholds")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--pair", "pairs", multiple=True, metavar="PAIR", help="Only this pair, such as en-sw; can be repeated.")
@click.option(
    "--budget", type=click.IntRange(1), help="Suggest thresholds that leave this many tokens. [default: the recipe's]"
)
@click.option(
    "--examples", type=click.IntRange(0), default=3, show_default=True, help="Rows to show beside the cut-off."
)
def thresholds_command(folder: Path, pairs: tuple[str, ...], budget: int | None, examples: int) -> None:
    """Show what different quality thresholds would leave of the run in DIR.

    DIR is the folder of a run whose rows are scored (corpusprep run --until quality is enough). Another threshold needs
    no new scoring: change the recipe and start the run again.
    """
    from corpusprep.commands.thresholds import describe, read_recipe, read_scores

    recipe = read_recipe(folder)
    found = list(read_scores(folder, pairs, examples))
    partial = recipe.quality.until == "budget"
    wanted = None if pairs or partial else budget or recipe.balance.budget
    click.echo(describe(found, wanted, recipe.balance))
    if partial:
        click.echo(
            "\nThese are only the rows that were scored until the budget was filled. To see all rows, and the "
            "thresholds that fill a budget, run with --until quality --set quality.until=all."
        )
    elif pairs and budget:
        click.echo("\nA budget is shared by all pairs: leave out --pair to see thresholds for it.")


@cli.command("agree")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--scorer", default="lexical", show_default=True, help="lexical, comet, or your own as module:function.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of quality: --set model=…"
)
@click.option(
    "--human", metavar="COLUMN", help="Column of the human scores, by name or number from 0. [default: the third]"
)
@click.option("--src-lang", help="Language of the first column, where the file is not named as en-de.tsv.")
@click.option("--tgt-lang", help="Language of the second.")
@click.option(
    "--shuffled",
    type=click.FloatRange(0, 0.5),
    default=0.1,
    show_default=True,
    help="Share of rows to mismatch for the AUC.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Decides which.")
def agree_command(
    files: tuple[Path, ...],
    scorer: str,
    overrides: tuple[str, ...],
    human: str | None,
    src_lang: str | None,
    tgt_lang: str | None,
    shuffled: float,
    seed: int,
) -> None:
    """See what a scorer is worth on your languages.

    FILE is tab-separated, packed or not, or - for standard input: source, translation, and human scores where there are any.
    Prints the correlation with the human scores, and the AUC of telling true pairs from mismatched ones. A COMET model takes
    the first column as the source, unless --set direction=… says otherwise.
    """
    from corpusprep.commands.agree import agree, describe
    from corpusprep.errors import CorpusprepError
    from corpusprep.recipe import apply_overrides, validate
    from corpusprep.stages.quality import QualitySettings, learns, open_scorer

    data: dict[str, Any] = {"scorer": scorer, "direction": "forward"}
    apply_overrides(data, overrides)
    settings = validate(QualitySettings, data, where="quality")
    column = int(human) if human is not None and human.isdigit() else human
    opened = None if learns(settings) else open_scorer(settings, {})
    found, failed = [], []
    for file in files:
        try:
            one = agree(
                file, settings, src_lang=src_lang, tgt_lang=tgt_lang, human=column, shuffled=shuffled, seed=seed,
                scorer=opened,
            )  # fmt: skip
        except CorpusprepError as error:
            failed.append(error)
        else:
            found.append(one)
    if found:
        click.echo(describe(found))
    for unread in failed[:-1]:
        click.echo(f"error: {unread}", err=True)
    if failed:
        raise failed[-1]


@cli.command("train")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--mix", required=True, type=click.Path(path_type=Path, file_okay=False), help="Mix folder of a run: out/run/mix."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for stage-1, stage-2 and their logs."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting: --set train.model=Qwen/Qwen3-8B."
)
@click.option("--stage", type=click.IntRange(1), help="Train only this stage; it starts from the previous one.")
@click.option("--resume", is_flag=True, help="Continue the training in --out.")
@click.option("--dry-run", is_flag=True, help="Print trained layers, steps and memory, and stop.")
@click.option(
    "--export",
    type=(click.Choice(["llamafactory"]), click.Path(path_type=Path, file_okay=False)),
    metavar="llamafactory DIR",
    help="Write files to DIR that run the same stages with LLaMA-Factory, and stop.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def train_command(
    recipe: Path | None,
    mix: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    stage: int | None,
    resume: bool,
    dry_run: bool,
    export: tuple[str, Path] | None,
    quiet: bool,
) -> None:
    """Train a model on a mix, with the [train] table of RECIPE.

    By default, the bottom layers are trained first, then the top layers; everything else is frozen. Each stage writes a
    model folder for transformers, with a model card, the loss curve and a report of the changes. Needs pip install
    'corpusprep[train]'.

    On several machines, start the same command on each, with srun, torchrun, or --set train.machines=…,
    train.machine_rank=… and train.main_address=….
    """
    from corpusprep.recipe import load_train
    from corpusprep.report.progress import Bars, Progress
    from corpusprep.training import dry_run as preview
    from corpusprep.training import train

    settings, seed = load_train(recipe, overrides)
    if dry_run:
        click.echo(preview(settings, mix))
        return
    if export is not None:
        from corpusprep.training import export_llamafactory

        for path in export_llamafactory(settings, mix, export[1], seed=seed):
            click.echo(path)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    result = train(settings, mix, out, seed=seed, stage=stage, resume=resume, progress=Progress() if quiet else Bars())
    if result.place.rank:  # launch 0 has written the folders and tells about them
        return
    for folder, report in zip(result.folders, result.reports, strict=True):
        click.echo(_trained_line(folder, report))


def _trained_line(folder: Path, report: dict[str, Any]) -> str:
    checks, losses = report["checks"], report["losses"]
    loss = f", validation loss {losses['before']:.4f} to {losses['after']:.4f}" if len(losses) == 2 else ""
    return (
        f"{folder}: {report['steps']:,} steps in {report['seconds']:,.0f} s{loss}; {checks['trained_tensors']} tensors trained, "
        f"{checks['frozen_tensors']} frozen and bit-identical."
    )


@cli.command("publish")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET")
@click.option("--with-rejects", is_flag=True, help="Send rejects/, too.")
@click.option("--private", is_flag=True, help="Create a data set on the hub that is not there as a private one.")
@click.option(
    "--replace", is_flag=True, help="Replace files of the same names that no publish sent, and a changed card."
)
@click.option("--dry-run", is_flag=True, help="Print what would be sent and removed, and stop.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def publish_command(
    folder: Path, target: str, with_rejects: bool, private: bool, replace: bool, dry_run: bool, quiet: bool
) -> None:
    """Send the mix of the finished run in DIR to TARGET, and check what arrived.

    TARGET is s3://bucket/folder, another URL of a folder that fsspec opens, or hf://datasets/owner/name[@revision][/folder].
    Files that are there already are not sent again. Data files of an earlier mix are removed. Needs pip install
    'corpusprep[publish]'.
    """
    from corpusprep.commands.publish import describe, publish
    from corpusprep.report.progress import Bars, Progress

    shown = Progress() if quiet else Bars()
    result = publish(
        folder, target, with_rejects=with_rejects, private=private, replace=replace, dry_run=dry_run, progress=shown
    )
    click.echo(describe(result))


@cli.command("settings")
@click.argument("table", required=False)
def settings_command(table: str | None) -> None:
    """Print the settings of a TABLE of the recipe, or of all, with their defaults and meanings.

    TABLE is a stage, or one of source, stage (a stage of your own), rejects, engine and train.
    """
    from corpusprep.commands.settings import describe_settings

    click.echo(describe_settings(table))


@cli.command("compile")
def compile_command() -> None:
    """Compile the kernels now rather than on first use (once per installation, about a minute)."""
    from corpusprep.commands.compile import compile_kernels

    compile_kernels()


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An error that the user can solve gives one message and exit code 2; a bug gives exit code 70."""
    code = _guard(lambda: cli.main(arguments, standalone_mode=False))
    sys.exit(code if isinstance(code, int) else 0)


def _guard(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\nInterrupted. Start the same command again: run, publish, and train with --resume, continue where they stopped.",
            err=True,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except CorpusprepError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        remedy = "Free some space and start the command again." if error.errno == 28 else "Finished work is kept."
        click.echo(f"error: {error.filename or 'input or output'}: {error.strerror or error}. {remedy}", err=True)
        sys.exit(2)
    except MemoryError:
        click.echo(
            "error: out of memory. Start again with fewer workers or a smaller --memory: the run continues.", err=True
        )
        sys.exit(2)
    except Exception as error:
        if os.environ.get("CORPUSPREP_TRACEBACK"):
            raise
        click.echo(
            f"internal error: {type(error).__name__}: {error}\nThis is a bug in corpusprep. Finished work is kept. "
            "Please report it with the traceback that CORPUSPREP_TRACEBACK=1 prints.",
            err=True,
        )
        sys.exit(70)


if __name__ == "__main__":
    main()
