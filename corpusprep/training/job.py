"""The job that the launcher gives to the training processes, and the messages that they send back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPLETE = "corpusprep.json"
"""File in a checkpoint's folder: marks the checkpoint as complete and holds its fingerprint."""
TENSORS = "tensors.json"
"""File in a stage's folder: the digest of each tensor."""
LOST_SIGN = "\x1e"
"""Begins the error of a process that only lost its connection to another one."""
_SIGN = "\x1e"  # begins a line for the launcher; all other lines go to the log


@dataclass(frozen=True)
class Job:
    """One stage, with all its settings.

    Attributes:
        number: number of the stage, from 1.
        model: folder or hub name of the model that the stage starts from.
        previous: folder of the previous stage, whose weights the model must have; None for the first stage.
        work: folder for checkpoints and results.
        train: folder of the data set that `tokenise` wrote.
        validation: folder of the validation examples; None without validation.
        fingerprint: settings and inputs; a checkpoint with other ones is not resumed.
        processes: number of processes on all machines together.
        launches, launch: number of launches of the command that train together, and which of them this job is for.
        resume: folder of the checkpoint to resume.
        launcher: process ID of the launcher.
    """

    number: int
    model: str
    previous: str | None
    work: str
    train: str
    validation: str | None
    layers: Any
    modules: tuple[str, ...]
    precision: str
    cpu: bool
    processes: int
    launches: int
    launch: int
    attention: str
    gradient_checkpointing: bool
    packing: bool
    sequence_length: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    min_learning_rate: float
    schedule: str
    warmup_steps: int
    epochs: float
    max_steps: int | None
    weight_decay: float
    max_grad_norm: float
    seed: int
    log_steps: int
    checkpoint_steps: int
    fingerprint: dict[str, Any]
    resume: str | None
    launcher: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: str | Path) -> Job:
        return Job(**json.loads(Path(path).read_text()))


def error_file(job: Job) -> Path:
    """Where the processes of a launch leave the reason why they ended."""
    return Path(job.work) / (f"error-{job.launch}.txt" if job.launch else "error.txt")


def send(what: dict[str, Any]) -> None:
    """Sends a message to the launcher."""
    # In one write, at the beginning of a line: other processes and threads write to the same pipe.
    os.write(1, f"\n{_SIGN}{json.dumps(what)}\n".encode())


def received(line: str) -> dict[str, Any] | None:
    """The message to the launcher in a line of output; None if the line is for the log."""
    if not line.startswith(_SIGN):
        return None
    try:
        found: dict[str, Any] = json.loads(line[1:])
    except ValueError:
        return None
    return found


def made_of(checkpoint: Path) -> dict[str, Any] | None:
    """The fingerprint of a checkpoint; None if the checkpoint is incomplete."""
    try:
        found: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return found


_WORDS = {
    "trained": "the set of trained tensors",
    "mix": "the mix",
    "seed": "the seed",
    "model": "the starting model",
    "start": "the starting model",
    "processes": "the number of processes",
}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why work with fingerprint `before` cannot be continued with `now`, in one sentence; None if it can."""
    differ = [key for key in now if key in before and before[key] != now[key]]
    if not differ:
        return None
    told = []
    for key in sorted(differ, key=lambda k: (k not in _WORDS, k)):
        if key == "trained":
            more, fewer = (sorted(set(a) - set(b)) for a, b in ((now[key], before[key]), (before[key], now[key])))
            shown = [f"{name} is new" for name in more[:1]] + [f"{name} is missing" for name in fewer[:1]]
            told.append(f"{_WORDS[key]} has changed ({', '.join(shown)})")
        else:
            word = _WORDS.get(key, f"train.{key}")
            told.append(f"{word} has changed (from {before[key]} to {now[key]})")
    return "; ".join(told) + ". Change it back, or train into another --out."
