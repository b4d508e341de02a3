"""Time and memory of commands and calls, the environments of peers, and the machine in words."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PEERS = {
    "opusfilter": ("opusfilter==3.3.1", "fasttext-predict==0.9.2.4", "eflomal==2.0.0"),
    "datatrove": ("datatrove[io,processing]==0.10.1", "spacy==3.8.18"),
    # data-juicer imports aiohttp, which it does not require.
    "data-juicer": ("py-data-juicer==1.6.1", "aiohttp", "simhash-pybind==0.0.3", "fasttext-predict==0.9.2.4"),
    "text-dedup": ("text-dedup==0.4.0",),
    "comet": (os.environ.get("TORCH") or "torch", "-e", f"{ROOT}[comet]"),
    "train": (os.environ.get("TORCH") or "torch", "-e", f"{ROOT}[train]"),
}

_BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense operations a second, by the makers' data sheets


def bf16_peak(gpu: str) -> float | None:
    """Dense bf16 operations a second that a GPU can do, by its name; None where it is not known."""
    return next((peak for name, peak in _BF16_PEAKS.items() if name in gpu), None)


class Cost(NamedTuple):
    """What a command took: seconds of wall time, seconds of CPU time, and bytes of memory at its peak (the proportional
    set size of all its processes, sampled; pages that they share count once)."""

    wall: float
    cpu: float
    peak: int


def command(arguments: Sequence[str | Path], folder: Path, *, environment: dict[str, str] | None = None) -> Cost:
    """Runs a command to its end.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    log = folder / "last-command.log"
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(a) for a in arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        peak = _Peak(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        words = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {process.returncode}:\n{words}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak.stop())


class _Peak:
    """Samples the memory of a session of processes in a thread."""

    def __init__(self, session: int) -> None:
        self._session, self._peak, self._done = session, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._done.wait(0.25):
            self._peak = max(self._peak, sum(map(_pss, self._members())))

    def _members(self) -> list[int]:
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path(f"/proc/{entry}/stat").read_text()
                except OSError:
                    continue
                if int(stat.rpartition(")")[2].split()[3]) == self._session:
                    found.append(int(entry))
        return found


def _pss(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def alternate(rounds: int, *calls: Callable[[], Any]) -> list[list[float]]:
    """CPU seconds of each call, run in turn after one round that does not count; one list a call."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
    return times


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over rounds, of what they took against what we took."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def environment(peer: str, folder: Path) -> Path:
    """The folder of programs of a peer's own environment, made where it is not there."""
    home = folder / "peers" / peer
    stamp = home / ".installed"
    wanted = "\n".join(PEERS[peer])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(PEERS[peer])}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        subprocess.run([home / "bin/pip", "install", "--quiet", *PEERS[peer]], check=True)
        stamp.write_text(wanted)
    return home / "bin"


def machine() -> str:
    """The machine in words."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}; "
        f"load at the start {load}"
    )
