"""Trainings on several machines: launches on this one that reach each other over its own network."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from conftest import ROOT, sentences  # noqa: E402
from test_train import changed, processes_of, write_mix  # noqa: E402
from tiny_model import save_model, save_tokenizer  # noqa: E402

from corpusprep.errors import RunError  # noqa: E402
from corpusprep.recipe import load_train  # noqa: E402
from corpusprep.report.progress import Progress  # noqa: E402
from corpusprep.store import lock  # noqa: E402
from corpusprep.training import TrainSettings, dry_run, train  # noqa: E402
from corpusprep.training.meeting import free_port  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that train

RECIPE = """
[train]
model = "{folder}/model"
sequence_length = 256
batch_tokens = 512
max_steps = 16
learning_rate = 2e-3
min_learning_rate = 2e-4
log_steps = 1
checkpoint_steps = 4
validation_examples = 0

[[train.stages]]
layers = "bottom:1"

[[train.stages]]
layers = "top:2"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mix, a model and a recipe."""
    folder = tmp_path_factory.mktemp("several")
    write_mix(folder / "mix", 140)
    texts = [text for pair in sentences(200, 9) for text in pair]
    save_model(folder / "model", len(save_tokenizer(folder / "model", texts, 400)), layers=4)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Starts `corpusprep train` in a process of its own: machine 1, unless the settings say another."""
    begun: list[subprocess.Popen[str]] = []

    def call(out: str, *options: str, **more: Any) -> subprocess.Popen[str]:
        sets = [f"--set=train.{name}={value}" for name, value in {"machines": 2, "machine_rank": 1, **more}.items()]
        command = [
            sys.executable,
            "-m",
            "corpusprep",
            "train",
            "recipe.toml",
            "--mix",
            "mix",
            "--out",
            out,
            *sets,
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        begun.append(
            subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], within: float = 60.0) -> tuple[int, str]:
    """The exit code of a launch and its messages."""
    _, told = process.communicate(timeout=within)
    assert "Traceback" not in told
    return process.returncode, told


def gone(out: Path) -> None:
    """Waits until no process of a training is left."""
    deadline = time.monotonic() + 20
    while processes_of(out):
        assert time.monotonic() < deadline, "a process goes on"
        time.sleep(0.1)


def settings(place: Path, **more: Any) -> TrainSettings:
    found, _ = load_train(place / "recipe.toml", [f"train.{name}={value}" for name, value in more.items()])
    return found


class Steps(Progress):
    """Does something once a stage has taken so many steps.

    Attributes:
        first: steps that had been taken when the stage began.
    """

    def __init__(self, steps: int, act: Callable[[], Any]) -> None:
        self.steps, self.act = steps, act
        self.first: int | None = None
        self._done = 0

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        self._done = 0
        self._counts = unit == "steps"

    def advance(self, amount: int, note: str = "") -> None:
        if not self._counts:
            return
        self.first = amount if self.first is None else self.first
        before, self._done = self._done, self._done + amount
        if before < self.steps <= self._done:
            self.act()


@pytest.fixture(scope="module")
def one(place: Path, one_thread: None) -> Path:
    """Both stages by one launch with two processes."""
    train(settings(place, processes=2), place / "mix", place / "one")
    return place / "one"


def test_two_machines_train_as_one(place: Path, start: Start, one: Path) -> None:
    """Both stages end with the same bits as one launch with two processes."""
    address, two = f"127.0.0.1:{free_port()}", place / "two"
    other = start("two", main_address=address)
    train(settings(place, machines=2, machine_rank=0, main_address=f"'{address}'"), place / "mix", two)
    assert ended(other)[0] == 0
    assert changed(place / "model", two / "stage-1")
    assert changed(two / "stage-1", two / "stage-2")
    for stage in ("stage-1", "stage-2"):
        assert changed(one / stage, two / stage) == set()
        report = json.loads((two / stage / "training.json").read_text())
        assert len(report["machines"]) == report["batches"]["processes"] == 2
        assert report["steps"] == 16
        assert (one / stage / "loss.csv").read_text() == (two / stage / "loss.csv").read_text()
        assert (two / f"{stage}.machine-1.log").exists()
    assert not list((two / ".work").glob("stage-*"))
    gone(two)
    # Where it was trained is no part of what was trained: one machine finds the stages done.
    assert train(settings(place, processes=2), place / "mix", two, resume=True).commands == []


def test_when_one_dies_the_others_end_and_all_resume(place: Path, start: Start, one: Path) -> None:
    out = place / "died"

    def both(progress: Steps, *options: str) -> subprocess.Popen[str]:
        """Begins stage 1, or resumes it, at another address each time."""
        nonlocal other
        address = f"127.0.0.1:{free_port()}"
        other = start("died", "--stage=1", *options, main_address=address)
        asked = settings(place, machines=2, machine_rank=0, main_address=f"'{address}'")
        train(asked, place / "mix", out, stage=1, resume=bool(options), progress=progress)
        return other

    def kill_worker() -> None:
        for process in processes_of(out / ".work" / "stage-1" / "job-1.json"):
            if "accelerate" not in Path(f"/proc/{process}/cmdline").read_text():
                os.kill(process, signal.SIGKILL)

    other: subprocess.Popen[str]
    with pytest.raises(RunError, match=r"machine 1 \(.*\): stage 1: the training processes ended with exit code"):
        both(Steps(6, kill_worker))
    code, told = ended(other)
    assert code == 2
    assert "error: stage 1: the training processes ended with exit code" in told
    gone(out)

    resumed = Steps(10, lambda: other.send_signal(signal.SIGKILL))
    with pytest.raises(
        RunError, match=r"machine 1 \(.*\) is gone. Finished work is kept: start the same command with --r"
    ):
        both(resumed, "--resume")
    assert resumed.first in (4, 8, 12)  # workers go on for some steps until the signal reaches them
    gone(out)
    assert not (out / "stage-1").exists()

    again = Steps(99, lambda: None)
    assert ended(both(again, "--resume"))[0] == 0
    assert again.first % 4 == 0
    assert again.first >= max(8, resumed.first)
    assert changed(one / "stage-1", out / "stage-1") == set()


def test_machines_that_do_not_agree_or_do_not_come(place: Path, start: Start) -> None:
    address, alone = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    waits = start("alone", main_address=alone, machine_timeout=1)
    differs = start("differ", main_address=address, learning_rate=1e-3)
    told = r"machine 1 \(.*\) does not do the same as machine 0 \(.*\): train.learning_rate is 0.001 instead of 0.002\. Start"
    asked = {"machines": 2, "machine_rank": 0}
    with pytest.raises(RunError, match=told):
        train(settings(place, **asked, main_address=f"'{address}'"), place / "mix", place / "differ")
    code, text = ended(differs)
    assert code == 2
    assert re.search(told, text)
    assert [path.name for path in (place / "differ").iterdir()] == [".lock"]
    code, text = ended(waits)
    assert code == 2
    assert f"error: machine 1 waited 1 s for machine 0 of 2 at {alone}: Connection refused." in text
    with pytest.raises(RunError, match=rf"Waited 1 s at {alone} for machine 1 of 2; no other one came"):
        train(settings(place, **asked, main_address=f"'{alone}'", machine_timeout=1), place / "mix", place / "alone")


def test_machine_0_holds_the_folder(place: Path, tmp_path: Path) -> None:
    asked = settings(place, machines=2, machine_rank=0, main_address=f"'127.0.0.1:{free_port()}'")
    with lock(tmp_path), pytest.raises(RunError, match="another corpusprep process is using this folder"):
        train(asked, place / "mix", tmp_path)


def test_the_dry_run_tells_machines_and_the_whole_batch(place: Path) -> None:
    text = dry_run(settings(place, machines=4, processes=2, batch_tokens=8192), place / "mix")
    assert "1 x 4 packed sequences on 8 processes (4 machines, 2 on each): 32 packed sequences in all" in text
