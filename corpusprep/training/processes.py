"""Runs the processes of one stage on this machine, through `accelerate launch`."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corpusprep.report.progress import Progress
from corpusprep.training.job import LOST_SIGN, Job, error_file, received
from corpusprep.training.machines import Place, without_places
from corpusprep.training.meeting import ENDED, LOST, SAID, STOPPED, StageError

_GRACE = 3.0  # seconds in which processes that lost another one end by themselves, and may say why
_PATIENCE = 40.0  # seconds after which processes that were asked to end are killed


def prepare(job: Job, place: Place, parallel: str, port: int, gpus: int) -> list[str]:
    """Writes the job and accelerate's config, and returns the command.

    Args:
        parallel: `ddp` or `fsdp`.
        port: where the processes of all machines find each other; 0 on one machine.
        gpus: number of visible GPUs.
    """
    here = job.processes // job.launches
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "mixed_precision": "bf16" if job.precision == "bf16" else "no",
        "num_machines": job.launches,
        "num_processes": job.processes,
        "machine_rank": job.launch,
        "use_cpu": job.cpu,
        "main_process_port": port,
    }
    if job.launches > 1:
        config["main_process_ip"] = place.host
    if here == 1 and gpus > 1:
        config["gpu_ids"] = _visible(place.local or 0)
    if job.processes > 1:
        config["distributed_type"] = "MULTI_GPU"  # this starts several processes, on CPUs too
        if parallel == "fsdp":
            config["distributed_type"] = "FSDP"
            config["fsdp_config"] = {
                "fsdp_version": 2,
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_state_dict_type": "FULL_STATE_DICT",
                "fsdp_reshard_after_forward": True,
                "fsdp_cpu_ram_efficient_loading": False,
            }
    own = f"-{job.launch}" if job.launch else ""
    work = Path(job.work)
    file = work / f"accelerate{own}.json"  # a separate file, because the user's own config may differ
    file.write_text(json.dumps(config, indent=1))
    job.write(work / f"job{own}.json")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    if job.launches > 1:
        launch.append("--same_network")  # the processes meet at the address and port above
    return [*launch, "-m", "corpusprep.training.worker", str(work / f"job{own}.json")]


def _visible(number: int) -> str:
    """The name of a GPU for CUDA_VISIBLE_DEVICES, which may name only some of the machine's."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[number].strip() if number < len(named) else str(number)


def run_stage(
    command: Sequence[str],
    job: Job,
    log: Path,
    threads: int | None,
    progress: Progress,
    trouble: Callable[[], int | None] | None,
) -> None:
    """Runs the processes of a stage, reports their progress, and writes their other output to a log.

    Args:
        threads: threads of each process for work on the CPU; None leaves them to accelerate.
        trouble: whether another machine has failed, and how much it knows of the reason; the processes are then ended.

    Raises:
        StageError: the processes failed, or were ended.
    """
    # Threads that spin while they wait take CPU time from those that work.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment |= {**without_places(os.environ), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as kept:
        kept.write(f"$ {shlex.join(command)}\n")
        kept.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        watch, lines = _Watch(process, trouble), _Lines(process)
        try:
            _follow(lines, job, kept, progress)
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            watch.done.set()
            lines.close()
    if code == 0 and (job.launch or (Path(job.work) / "report.json").is_file()):
        return
    error = error_file(job)
    stage = f"stage {job.number}"
    if error.is_file() and (told := error.read_text()):
        text = f"{stage}: {told.removeprefix(LOST_SIGN)}\nThe full output is in {log}."
        raise StageError(text, LOST if told.startswith(LOST_SIGN) else SAID)
    if watch.stopped:
        raise StageError(f"{stage} was ended, because another machine has failed.", STOPPED)
    raise StageError(
        f"{stage}: the training processes ended with exit code {code}. The full output is in {log}. "
        "Finished work is kept: continue with --resume.",
        ENDED,
    )


class _Lines:
    """The lines that processes write. They are read in a thread: libraries have the system resume a read that Ctrl-C broke
    off, so that Python, waiting in one, would not hear of it.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._from = process.stdout
        self._read: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        for line in self._from:
            self._read.put(line)
        self._read.put(None)

    def __iter__(self) -> Iterator[str]:
        while True:
            with contextlib.suppress(queue.Empty):
                if (line := self._read.get(timeout=0.5)) is None:
                    return
                yield line

    def close(self) -> None:
        self._thread.join(_GRACE)
        if not self._thread.is_alive():  # else a process that would not end still writes
            self._from.close()


def _follow(lines: _Lines, job: Job, kept: Any, progress: Progress) -> None:
    note, begun, done = "", False, 0
    try:
        for line in lines:
            said = received(line)
            if said is None:
                kept.write(line)
                kept.flush()
            elif said["kind"] == "begin":
                progress.start(f"stage {job.number}", said["total"], "steps")
                begun, done = True, said["done"]
                progress.advance(done)
            elif said["kind"] == "step":
                progress.advance(said["done"] - done, note)
                done = said["done"]
            elif said["kind"] == "log":
                speed = f", {said['speed']:,.0f} tokens/s" if said["speed"] else ""
                note = f"loss {said['loss']:.4f}{speed}"
    finally:
        if begun:
            progress.end()


class _Watch:
    """Ends the processes of a stage when another machine has failed."""

    def __init__(self, process: subprocess.Popen[str], trouble: Callable[[], int | None] | None) -> None:
        self.done = threading.Event()
        self.stopped = False
        if trouble is not None:
            threading.Thread(target=self._look, args=(process, trouble), daemon=True).start()

    def _look(self, process: subprocess.Popen[str], trouble: Callable[[], int | None]) -> None:
        while (weight := trouble()) is None:
            if self.done.wait(0.2):
                return
        if weight < SAID and self.done.wait(_GRACE):  # the reason may be here
            return
        self.stopped = True
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a launcher and its processes, which accelerate would leave running."""
    for sign, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
