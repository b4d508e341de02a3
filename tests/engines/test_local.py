"""The local engine: order, laziness, errors, and workers that die."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
from tasks import add, die, fail_at_three, fail_strangely, pid, slow_first

from corpusprep.engines.local import LocalEngine
from corpusprep.errors import InputError, RunError


def square(task: int) -> int:
    return task * task


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    with LocalEngine(workers) as engine:
        assert sorted(engine.map(square, range(50))) == [n * n for n in range(50)]
        assert list(engine.map(square, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_ordered_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    with LocalEngine(workers) as engine:
        assert list(engine.map(slow_first, range(20), ordered=True)) == list(range(20))


def test_setup_runs_once_a_worker_and_again_for_the_next_call() -> None:
    with LocalEngine(2) as engine:
        first = list(engine.map(add, range(40), setup=pid))
        assert {task for _, task in first} == set(range(40))
        assert 1 <= len({context for context, _ in first}) <= 2
        assert os.getpid() not in {context for context, _ in first}
        second = list(engine.map(add, range(10), setup=os.getppid))
        assert {context for context, _ in second} == {os.getpid()}


def test_tasks_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    with LocalEngine(2) as engine:
        results = engine.map(square, tasks())
        next(results)
        assert len(taken) < 12
        results.close()  # type: ignore[attr-defined]
        assert sorted(engine.map(square, range(4))) == [0, 1, 4, 9]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_as_it_was(workers: int) -> None:
    with LocalEngine(workers) as engine, pytest.raises(InputError, match=r"a\.gz, row 7") as caught:
        list(engine.map(fail_at_three, range(10)))
    assert caught.value.row == 7


def test_an_unexpected_error_carries_the_workers_trace() -> None:
    with LocalEngine(2) as engine, pytest.raises(ZeroDivisionError) as caught:
        list(engine.map(fail_strangely, range(3)))
    assert any("fail_strangely" in note for note in caught.value.__notes__)


def test_a_killed_worker_is_told_of() -> None:
    with LocalEngine(2) as engine, pytest.raises(RunError, match="exit code -9"):
        list(engine.map(die, range(3)))


def test_workers_die_with_their_maker() -> None:
    script = textwrap.dedent("""
        import os, sys, time
        from corpusprep.engines.local import LocalEngine
        def main():
            engine = LocalEngine(2)
            results = engine.map(time.sleep, [0.01] + [60] * 4)
            next(results)
            print(*[process.pid for process, _ in engine._processes], flush=True)
            next(results)
        if __name__ == "__main__":
            main()
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_alive(worker) for worker in workers):
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def device(task: int) -> tuple[int, str | None, int]:
    time.sleep(0.2)
    return task, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def test_tasks_that_want_a_gpu_have_one_each() -> None:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    with LocalEngine(1, gpus=["3", "GPU-5f"]) as engine:
        found = list(engine.map(device, range(6), resources={"gpu": 1}))
        assert sorted(task for task, _, _ in found) == list(range(6))
        assert {name for _, name, _ in found} == {"3", "GPU-5f"}
        assert len({process for _, _, process in found}) == 2
        assert os.getpid() not in {process for _, _, process in found}
        again = {process for _, _, process in engine.map(device, range(4), resources={"gpu": 1})}
        assert again == {process for _, _, process in found}  # the model that a worker has loaded is there still
    assert all(not os.path.exists(f"/proc/{process}") for process in again)
    with LocalEngine(2, gpus=["0"]) as engine:
        assert {process for _, _, process in engine.map(device, range(2), resources={"gpu": 1})} == {os.getpid()}
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
