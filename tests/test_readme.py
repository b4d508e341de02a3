"""Every example in README and in docstrings is run, in the order in which a reader meets them."""

from __future__ import annotations

import contextlib
import doctest
import gzip
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from finished import expected
from hub import Hub
from test_imports import MODULES

from corpusprep.cli import cli
from corpusprep.recipe import load_recipe, load_train
from corpusprep.stages.langid import LangidSettings, model_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    section: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, section = [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if match[1]:
            section = match[1]
        else:
            found.append(Block(section, match[2], match[3]))
    return found


BLOCKS = blocks()
PUBLISHED = {
    "Unbabel/wmt22-cometkiwi-da": "models/kiwi",
    "Qwen/Qwen3-8B": "models/tiny",
    "s3://bucket": "file://bucket",
}
"""What stands for models of the hub, small ones of the same classes in folders, and for a bucket."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README takes for granted: its data, under the names that it gives them."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    data = folder / "out" / "example-data"
    build = [sys.executable, str(ROOT / "examples" / "build.py"), str(data), "--rows", "60"]
    subprocess.run(build, check=True, capture_output=True)
    (folder / "data").symlink_to(data)
    (folder / "lid218e.bin").symlink_to(model_files(LangidSettings())[0])
    evaluation = folder / "flores200_dataset" / "devtest"
    evaluation.mkdir(parents=True)
    (evaluation / "eng_Latn.devtest").write_text("This sentence is nowhere else in the examples of the readme.\n")
    rows = [
        ("The bridge near the old village is closed today.", "Daraja karibu na kijiji cha zamani limefungwa leo.")
    ] * 2
    rows += [("We bought bread and water in the morning.", "Tulinunua mkate na maji asubuhi."), ("", "Hakuna.")]
    (folder / "raw.tsv.gz").write_bytes(gzip.compress("".join(f"{a}\t{b}\n" for a, b in rows).encode()))
    scored = "".join(f"A sentence of {n} words.\tEin Satz von {n} Wörtern.\t{n % 7}\n" for n in range(40))
    (folder / "en-de.tsv.gz").write_bytes(gzip.compress(scored.encode()))
    return folder


def run(command: str, place: Path) -> str:
    """Runs a command line: a single command of the program in this process, anything else as a shell does."""
    for name, stand_in in PUBLISHED.items():
        command = command.replace(name, stand_in)
    if command.startswith("corpusprep ") and "|" not in command:
        with contextlib.chdir(place):
            done = CliRunner().invoke(cli, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
        return done.output
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    shell = ["bash", "-o", "pipefail", "-c", command]
    found = subprocess.run(shell, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, f"{command}\n{found.stdout}\n{found.stderr}"
    return found.stdout


def commands(section: str) -> list[str]:
    lines = [line for b in BLOCKS if b.section == section and b.language == "console" for line in b.text.splitlines()]
    return [line[2:].partition("  #")[0].strip() for line in lines if line.startswith("$ ")]


def check_set_up(command: str) -> bool:
    """Whether a command installs or calls make: then what it names must be there, and CI runs it."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), command
        return True
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.fullmatch(r"(?:\.|corpusprep)(?:\[(\w+)\])?", words[2])
        assert named, command
        assert named[1] is None or named[1] in extras, command
        return True
    if words[0] in ("srun", "torchrun"):  # a cluster, too; tests/training has several launches on one machine
        begin = words.index("corpusprep")
        assert words[begin + 1] == "train"
        assert Path(words[begin + 2]).suffix == ".toml"
        return True
    if (
        words[0] == "ray" or "--engine" in words
    ):  # a cluster of several machines; tests/engines/test_ray.py makes small ones
        assert words[0] == "ray" or words[:2] == ["corpusprep", "run"], command
        return True
    return False


def save_toml(section: str, place: Path, name: str) -> None:
    [block] = [block for block in BLOCKS if block.section == section and block.language == "toml"]
    text = block.text
    for published, stand_in in PUBLISHED.items():
        text = text.replace(published, stand_in)
    (place / name).write_text(text, encoding="utf-8")


def run_section(section: str, place: Path) -> None:
    for command in commands(section):
        if not check_set_up(command):
            run(command, place)


def test_the_two_commands(place: Path) -> None:
    commands_found = commands("Two commands")
    assert commands_found[:2] == ["make quickstart", "make test"]
    for command in commands_found:
        if not check_set_up(command) and "build.py" not in command and command != "corpusprep compile":
            run(command + " --quiet", place)
    [block] = [block for block in BLOCKS if block.section == "Two commands" and block.language == "python"]
    run(f"HF_HOME=cache python -c {shlex.quote(block.text + 'assert mix.num_rows > 100')}", place)


def test_a_recipe_runs(place: Path) -> None:
    save_toml("Run a recipe", place, "recipe.toml")
    run_section("Run a recipe", place)
    for name in ("mix/train-00000-of-00001.parquet", "mix/README.md", "manifest.json"):
        assert (place / "out" / "first" / name).exists()
    assert "max_distance" in run("corpusprep settings dedup", place)


def test_stages_run_one_at_a_time(place: Path) -> None:
    run_section("One stage at a time", place)
    assert (place / "train.jsonl").stat().st_size
    assert (place / "kept.parquet").stat().st_size


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.section == "As a library"], ids=["stages", "run"])
def test_the_library_is_used_as_shown(place: Path, block: Block) -> None:
    save_toml("Run a recipe", place, "recipe.toml")
    (place / "script.py").write_text(block.text, encoding="utf-8")
    run("python script.py", place)


def test_models_are_used_as_shown(place: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[quality]'")
    from comet_models import Models

    if not (place / "models" / "kiwi").exists():
        shutil.copytree(Models(place / "made")["kiwi"], place / "models" / "kiwi", dirs_exist_ok=True)
    save_toml("Run a recipe", place, "recipe.toml")
    run("corpusprep run recipe.toml --out out/first --quiet", place)
    run_section("Models", place)
    save_toml("Models", place, "part.toml")
    loaded = load_recipe(place / "part.toml", sources=["nllb=data/nllb"])
    assert (loaded.quality.scorer, loaded.quality.until, loaded.balance.budget) == ("comet", "budget", 800_000_000)


def test_publishing_is_as_shown(place: Path) -> None:
    save_toml("Run a recipe", place, "recipe.toml")
    run("corpusprep run recipe.toml --out out/first --quiet", place)
    with Hub() as hub:
        for command in commands("Publish a mix"):
            if check_set_up(command):
                continue
            settings = f"HF_ENDPOINT={hub.url} HF_TOKEN=hf_writer HF_HUB_DISABLE_XET=1 " if "hf://" in command else ""
            assert "first-mix" in run(settings + command, place)
    names = set(expected(place / "out" / "first"))
    assert {path.name for path in (place / "bucket" / "first-mix").iterdir()} == names
    assert set(hub.contents("owner/first-mix")) - {".gitattributes"} == names
    assert hub.repos["owner/first-mix"].private
    assert "train-00000-of-00001.parquet: OK" in run("cd bucket/first-mix && sha256sum -c SHA256SUMS", place)


def test_training_is_as_shown(place: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install '.[train]'")
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    from tiny_model import save_model, save_tokenizer

    model = place / "models" / "tiny"
    texts = ["Translate the following text into German.", "Die Brücke ist heute gesperrt."] * 50
    save_model(model, len(save_tokenizer(model, texts, 300)))
    save_toml("Training", place, "train.toml")
    save_toml("Run a recipe", place, "recipe.toml")
    run("corpusprep run recipe.toml --out out/first --quiet", place)
    published, _ = load_train(place / "train.toml")
    assert [stage.layers for stage in published.stages] == ["bottom:4", "top:15"]
    # One stage and one step of it: whole trainings are run in tests/training.
    small = "--set train.sequence_length=256 --set train.batch_tokens=1024 --set train.max_steps=1 --set train.min_learning_rate=0"
    # The small model has fewer layers than the one that README names.
    text = (place / "train.toml").read_text().replace("top:15", "top:2").replace("bottom:4", "bottom:2")
    (place / "train.toml").write_text(text)
    for command in commands("Training"):
        if "train.machine_rank" in command:
            settings = "--set train.machines=2 --set train.main_address=node1:29400"
            assert "2 processes (2 machines, 1 on each)" in run(f"{command} {small} {settings} --dry-run", place)
        elif not check_set_up(command):
            run(f"{command} {small} {'' if '--dry-run' in command else '--stage 1'} --quiet", place)


def test_no_example_is_left_out() -> None:
    run_by_a_test = {
        ("Two commands", "console"), ("Two commands", "python"), ("Run a recipe", "toml"), ("Run a recipe", "console"),
        ("Publish a mix", "console"),
        ("One stage at a time", "console"), ("As a library", "python"), ("Models", "toml"), ("Models", "console"),
        ("Training", "toml"), ("Training", "console"),
    }  # fmt: skip
    assert {(block.section, block.language) for block in BLOCKS} == run_by_a_test


def documented() -> list[Any]:
    """The docstring examples of the package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [name for name, path in MODULES.items() if ">>>" in path.read_text(encoding="utf-8")]
    return [test for name in names for test in finder.find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("example", documented(), ids=lambda test: test.name)
def test_examples_of_docstrings(example: Any) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(example).failed == 0


def test_each_stage_has_an_example() -> None:
    names = {test.name for test in documented()}
    for stage in ("clean", "langid", "dedup", "quality", "balance", "instruct"):
        assert f"corpusprep.stages.{stage}.{stage}" in names
