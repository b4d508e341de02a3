"""Keys: what they are made of, and that no line of code that a part depends on is forgotten."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import digests, recipe, redone
from test_imports import MODULES, PACKAGE

from corpusprep import RunResult, keys, run
from corpusprep.keys import code_digest, digest, imported_modules
from corpusprep.stages.dedup import DedupSettings
from corpusprep.steps import balance, dedup, finish, quality, read, render, taken, verify

Corpus = Callable[..., Path]
TASKS: list[Callable[..., Any]] = [
    read.run_batch, verify.compare, dedup.mark_duplicates,
    quality.learn_pair, quality.score_part, quality.find_cutoff, quality.apply_threshold, quality.copy_score,
    balance.count_part, balance.add_up, balance.mark_candidates, balance.choose_rows,
    taken.summarise, render.render, finish.gather,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ settings


def test_equal_settings_have_one_key_and_others_another() -> None:
    assert digest(DedupSettings()) == digest(DedupSettings(max_distance=3))
    assert digest(DedupSettings()) != digest(DedupSettings(max_distance=2))
    assert digest(DedupSettings(max_distance=2).without("max_distance")) == digest(DedupSettings())
    assert digest({"b": 1, "a": (2, None)}) == digest({"a": [2, None], "b": 1})
    assert digest("1") != digest(1)
    with pytest.raises(TypeError, match="object"):  # its text would be an address, and the key another each time
        digest(object())


# ---------------------------------------------------------------------------------------------------------------- code


def parsed(path: Path) -> tuple[set[str], set[str]]:
    """The modules that a file imports, anywhere and at its top level, by Python's own parser."""
    anywhere, at_top = set[str](), set[str]()

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        found = set[str]()
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names if alias.name.startswith("corpusprep")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corpusprep"):
            assert node.level == 0
            found = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            if len(found) < len(node.names):  # what is not a module of the package is in the package
                found.add(str(node.module))
        anywhere.update(found)
        if top:
            at_top.update(found)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return anywhere, at_top


def test_imports_are_found_as_python_finds_them() -> None:
    for module, path in MODULES.items():
        found = keys._imports_of(path.read_text(encoding="utf-8"))
        assert (set(found.names), set(found.at_top)) == parsed(path), module


LOADED = """
import importlib, json, os, sys
import numba, numpy, polars, pyarrow.compute, pyarrow.parquet, pydantic
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(json.dumps([module, [name for name in sys.modules if name.partition(".")[0] == "corpusprep"]]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_what_is_loaded_is_followed() -> None:
    """Not one module that is loaded with a step's own is left out of its key."""
    names = sorted({task.__module__ for task in TASKS})
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, check=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert sorted(found) == names
    for module, loaded in found.items():
        assert set(loaded) <= set(imported_modules(module)), module


def test_a_changed_line_in_a_module_changes_the_keys_of_those_that_import_it_and_no_others(
    copy: Path,
) -> None:
    before = [code_digest(task) for task in TASKS]
    followed = [set(imported_modules(task.__module__)) for task in TASKS]
    for module, path in MODULES.items():
        file = copy / path.relative_to(PACKAGE)
        text = file.read_bytes()
        file.write_bytes(text + b"# one line more\n")
        keys._modules_digest.cache_clear()
        changed = {task for task, key in zip(TASKS, before, strict=True) if code_digest(task) != key}
        assert changed == {task for task, names in zip(TASKS, followed, strict=True) if module in names}, module
        file.write_bytes(text)


def test_steps_follow_what_they_run_and_not_what_they_do_not() -> None:
    decide = imported_modules(dedup.mark_duplicates.__module__)
    assert {
        f"corpusprep.{name}" for name in ("kernels", "arrow", "parts", "stages.dedup.search", "steps.dedup")
    } <= set(decide)
    for name in ("stages.quality", "stages.instruct", "sources.nllb", "derive", "recipe", "pipeline", "cli", "engines"):
        assert f"corpusprep.{name}" not in decide
    assert "corpusprep.stages.quality.lexical.model1" in imported_modules(quality.score_part.__module__)
    above = {
        f"corpusprep.{name}" for name in ("recipe", "derive", "pipeline", "cli", "engines", "training", "commands")
    }
    for task in TASKS:  # or an edit there would make everything again
        assert not above & set(imported_modules(task.__module__)), task


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, from which the keys read the code, so that it can be edited."""
    folder = tmp_path / "corpusprep"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(keys, "_ROOT", folder)
    keys._modules_digest.cache_clear()
    yield folder
    keys._modules_digest.cache_clear()


OUTPUT = ["render", "mix"]
CHOICE = ["tokens", "sums", "balance", *OUTPUT]
SCORES = ["state", "quality", "cutoff", "passed"]


@pytest.mark.parametrize(
    ("module", "made"),
    [
        ("kernels.py", ["pass1", "verify", "dedup", *SCORES, *CHOICE, "taken"]),
        ("sources/lines.py", ["pass1", "verify", "dedup", *SCORES, *CHOICE, "taken"]),
        ("stages/languages.py", ["pass1", "verify", "dedup", *SCORES, *CHOICE, "taken"]),
        ("steps/verify.py", ["verify"]),
        ("stages/dedup/greedy.py", ["dedup"]),
        ("steps/dedup.py", ["dedup"]),
        ("stages/quality/lexical/features.py", SCORES),
        ("stages/quality/comet/model.py", SCORES),
        ("steps/kept_scores.py", SCORES),
        ("steps/verdicts.py", [*SCORES, *CHOICE]),
        ("stages/balance/take.py", CHOICE),
        ("stages/instruct/templates.py", [*CHOICE, "taken"]),
        ("steps/taken.py", ["taken", *OUTPUT]),
        ("steps/render.py", OUTPUT),
        ("steps/finish.py", OUTPUT),
        ("report/accounts.py", OUTPUT),
    ],
)
def test_a_changed_line_redoes_what_depends_on_it(
    bitext: Corpus, tmp_path: Path, copy: Path, module: str, made: list[str]
) -> None:
    """Of what follows a step, that is redone which its result changed: an edit that changes no result ends there."""
    data, out = bitext(rows=60, shards=1), tmp_path / "out"
    run(recipe(data), out)
    before = digests(out)
    assert sorted(redone(after_edit(copy / module, lambda: run(recipe(data), out)))) == sorted(made)
    assert digests(out) == before


@pytest.mark.parametrize(
    ("module", "made"),
    [
        ("stages/quality/lexical/features.py", [*SCORES, "prior"]),
        ("steps/quality.py", [*SCORES, "prior"]),
        ("stages/balance/take.py", [*CHOICE, "estimate", "wanted"]),
        ("steps/rounds.py", []),
    ],
)
def test_in_rounds_a_changed_line_redoes_what_depends_on_it(
    bitext: Corpus, tmp_path: Path, copy: Path, module: str, made: list[str]
) -> None:
    data, out = bitext(rows=300, shards=1), tmp_path / "out"
    rounds = (
        "quality.scorer=scorers:by_hash", "quality.prior=lexical", "quality.threshold=0.5", "quality.until=budget",
        "balance.budget=4000",
    )  # fmt: skip
    run(recipe(data, *rounds), out)
    before = digests(out)
    assert sorted(redone(after_edit(copy / module, lambda: run(recipe(data, *rounds), out)))) == sorted(made)
    assert digests(out) == before


def test_a_changed_line_elsewhere_redoes_nothing(bitext: Corpus, tmp_path: Path, copy: Path) -> None:
    data, out = bitext(rows=60, shards=1), tmp_path / "out"
    run(recipe(data), out)
    for module in (
        "cli.py",
        "derive.py",
        "training/worker.py",
        "commands/stage.py",
        "engines/local.py",
        "sources/moses.py",
    ):
        assert redone(after_edit(copy / module, lambda: run(recipe(data), out))) == {}, module


def test_a_changed_reader_redoes_the_shards_that_it_reads(bitext: Corpus, tmp_path: Path, copy: Path) -> None:
    data, out = bitext(rows=60, shards=2), tmp_path / "out"
    run(recipe(data), out)
    result = after_edit(copy / "sources" / "nllb.py", lambda: run(recipe(data), out))
    assert (result.made["pass1"], result.reused["pass1"]) == (2, 1)


def test_a_changed_reader_of_evaluation_text_redoes_all_parts(bitext: Corpus, tmp_path: Path, copy: Path) -> None:
    data, out = bitext(rows=60, shards=1), tmp_path / "out"
    for code in ("en", "de"):
        (data / f"opus/supervised/de-en/opus.de-en-test.{code}").write_text("bread\n", encoding="utf-8")
    run(recipe(data), out)
    result = after_edit(copy / "sources" / "opus100.py", lambda: run(recipe(data), out))
    assert (result.made["pass1"], result.reused.get("pass1", 0)) == (2, 0)


def after_edit(file: Path, call: Callable[[], RunResult]) -> RunResult:
    file.write_text(file.read_text(encoding="utf-8") + "# one line more\n", encoding="utf-8")
    keys._modules_digest.cache_clear()
    return call()
