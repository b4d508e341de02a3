"""Kills a run again and again, and compares what it ends with to a run that was left alone.

    python tests/benchmarks/kills.py RECIPE-ARGUMENTS... [--kills 20] [--seed 1] [--folder DIR]

Everything that is not an option of this script goes to `corpusprep run`. Four folders are made: one by one worker, one by
two, one by two workers killed with SIGKILL at random moments, and one by one worker killed likewise. `mix/` and `rejects/`
of all must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digests(out: Path) -> dict[str, str]:
    files = [path for name in ("mix", "rejects") for path in sorted((out / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(arguments: list[str], out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "corpusprep", "run", *arguments, "--quiet"]
    command += ["--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run failed with {process.returncode}: {errors.decode()}")


def kill_often(arguments: list[str], out: Path, workers: int, kills: int, length: float, draw: random.Random) -> int:
    """Runs with kills at moments drawn over a run's length; finished runs lose their output and start afresh."""
    done = 0
    while done < kills:
        process = start(arguments, out, workers)
        began, limit = time.monotonic(), draw.uniform(0.3, max(length, 4.0))
        while process.poll() is None and time.monotonic() - began < limit:
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
            process.communicate()
        else:
            finish(process)
            (out / "manifest.json").unlink()
            if draw.random() < 0.5:
                kinds = [path for path in (out / "parts").iterdir() if path.is_dir()]
                shutil.rmtree(draw.choice(kinds), ignore_errors=True)
    finish(start(arguments, out, workers))
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options, arguments = parser.parse_known_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        outs = {name: Path(scratch) / name for name in ("one", "two", "killed-two", "killed-one")}
        began = time.monotonic()
        finish(start(arguments, outs["one"], 1))
        length = time.monotonic() - began
        finish(start(arguments, outs["two"], 2))
        kills = kill_often(arguments, outs["killed-two"], 2, options.kills, length, draw)
        kills += kill_often(arguments, outs["killed-one"], 1, options.kills // 4, length, draw)
        found = {name: digests(out) for name, out in outs.items()}
    same = all(digest == found["one"] for digest in found.values())
    print(f"{kills} kills, {len(found['one'])} files: {'the same bytes' if same else 'DIFFERENT bytes'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
