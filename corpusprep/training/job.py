"""What the launcher hands to the processes that train, and what they say to it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPLETE = "corpusprep.json"
"""In a checkpoint's folder: it is whole, and what it was made of."""
TENSORS = "tensors.json"
"""In a stage's folder: the digest of each tensor."""
ERROR = "error.txt"
_SIGN = "\x1e"  # begins a line for the launcher; all other lines are for the log


@dataclass(frozen=True)
class Job:
    """One stage, with nothing left open.

    Attributes:
        number: of the stage, from 1.
        model: folder or hub name that the stage starts from.
        previous: folder of the stage before, whose weights these must be; None for the first.
        work: folder for checkpoints and results.
        train: folder of the data set, as `tokenise` makes it.
        validation: folder of the examples whose loss is measured; None for none.
        fingerprint: what a checkpoint must have been made of to go on with it.
        resume: folder of the checkpoint to go on with.
        launcher: its process.
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


def send(what: dict[str, Any]) -> None:
    """Says something to the launcher."""
    # In one write, at the beginning of a line: other processes and threads write to the same pipe.
    os.write(1, f"\n{_SIGN}{json.dumps(what)}\n".encode())


def received(line: str) -> dict[str, Any] | None:
    """What a line of output says to the launcher; None where it is for the log."""
    if not line.startswith(_SIGN):
        return None
    try:
        found: dict[str, Any] = json.loads(line[1:])
    except ValueError:
        return None
    return found


def made_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint was made of, by its mark; None where it is not whole."""
    try:
        found: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError):
        return None
    return found


_WORDS = {
    "trained": "the set of trained tensors",
    "mix": "the mix",
    "seed": "the seed",
    "model": "the model that it started from",
    "start": "the model that it started from",
    "processes": "the number of processes",
}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why what was begun cannot be gone on with, in one sentence; None where it can."""
    differ = [key for key in now if key in before and before[key] != now[key]]
    if not differ:
        return None
    told = []
    for key in sorted(differ, key=lambda k: (k not in _WORDS, k)):
        if key == "trained":
            more, fewer = (sorted(set(a) - set(b)) for a, b in ((now[key], before[key]), (before[key], now[key])))
            shown = [f"{name} is new" for name in more[:1]] + [f"{name} is missing" for name in fewer[:1]]
            told.append(f"{_WORDS[key]} is another ({', '.join(shown)})")
        else:
            word = _WORDS.get(key, f"train.{key}")
            told.append(f"{word} is another (it was {before[key]}, and is {now[key]})")
    return "; ".join(told) + ". Put it back, or train anew into another --out."
