"""The engine ray, on clusters of several nodes on this machine: the same bytes as here, whatever is lost on the way."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import digests, recipe
from tasks import add, die, fail_at_three, fail_strangely, pid, slow_first

from corpusprep import InputError, RunError, run
from corpusprep.report.progress import Progress

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from corpusprep.engines.ray import RayEngine  # noqa: E402

Corpus = Callable[..., Path]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def node_of(task: int) -> tuple[int, str]:
    return task, ray.get_runtime_context().get_node_id()


def fill_up(task: int) -> int:
    raise OSError(28, "No space left on device")


def die_once(task: tuple[int, str]) -> int:
    number, marker = task
    if number == 3 and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_tasks_are_done_on_all_nodes_in_order_where_asked_with_one_setup_each(cluster: Cluster) -> None:
    with RayEngine(cluster.address) as engine:
        assert (engine.workers, engine.workers_here) == (2, 1)
        found = list(engine.map(node_of, range(40)))
        assert sorted(task for task, _ in found) == list(range(40))
        assert len({node for _, node in found}) == 2
        assert list(engine.map(slow_first, range(9), ordered=True)) == list(range(9))
        contexts = {context for context, _ in engine.map(add, range(30), setup=pid)}
        assert len(contexts) == 2
        assert os.getpid() not in contexts
        assert list(engine.map(slow_first, [])) == []


def test_tasks_are_taken_as_they_are_needed(cluster: Cluster) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with RayEngine(cluster.address) as engine:
        results = engine.map(slow_first, tasks())
        next(results)
        assert len(taken) < 20
        assert len(list(results)) == 99


def test_errors_of_tasks_are_raised_here(cluster: Cluster) -> None:
    with RayEngine(cluster.address) as engine:
        with pytest.raises(InputError, match=r"a\.gz, row 7: is cut short"):
            list(engine.map(fail_at_three, range(10)))
        with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
            list(engine.map(fail_strangely, [1]))
        assert "fail_strangely" in caught.value.__notes__[0]
        with pytest.raises(OSError, match="No space left"):
            list(engine.map(fill_up, range(5)))
        assert sorted(engine.map(slow_first, range(5))) == list(range(5))


def test_a_task_whose_worker_dies_is_done_again_but_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    with RayEngine(cluster.address) as engine:
        tasks = [(number, str(tmp_path / "died")) for number in range(10)]
        assert list(engine.map(die_once, tasks, ordered=True)) == list(range(10))
        assert (tmp_path / "died").exists()
        with pytest.raises(RunError, match="A task ended 3 workers"):
            list(engine.map(die, range(2)))


def test_a_cluster_without_a_gpu_says_so(cluster: Cluster) -> None:
    with RayEngine(cluster.address) as engine, pytest.raises(RunError, match="no node of this Ray cluster has one"):
        list(engine.map(slow_first, range(3), resources={"gpu": 1}))


def test_a_gpu_is_used_after_the_cpus_have_worked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # the node says that it has one; nothing is computed on it
    cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.wait_for_nodes()
    with RayEngine(cluster.address) as engine:
        cpus = {node for _, node in engine.map(node_of, range(30))}
        gpus = {node for _, node in engine.map(node_of, range(9), resources={"gpu": 1.0})}
        assert (len(cpus), len(gpus)) == (3, 1)


def test_memory_limits_the_workers_of_a_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=8)
    cluster.wait_for_nodes()
    with RayEngine(cluster.address, memory=2 << 30) as engine:
        assert (engine.workers, engine.workers_here, engine.memory_here) == (4, 2, 2 << 30)


def test_a_cluster_that_is_not_there_says_so() -> None:
    with pytest.raises(RunError, match=r"Ray: 127\.0\.0\.1:1 cannot be reached"):
        RayEngine("127.0.0.1:1")


def test_a_node_that_does_not_see_a_file_is_named(cluster: Cluster, tmp_path: Path) -> None:
    with RayEngine(cluster.address) as engine, open(__file__) as opened:
        engine.check(tmp_path, [__file__])
        assert list(tmp_path.iterdir()) == []
        number = fcntl.fcntl(opened, fcntl.F_DUPFD, 900)  # a name that only this process has
        with pytest.raises(RunError, match=r"the node \S+ does not see /proc/self/fd"):
            engine.check(tmp_path, [f"/proc/self/fd/{number}"])
        os.close(number)


@pytest.mark.parametrize("nodes", [2, 3])
def test_the_mix_has_the_same_bytes_as_that_of_one_machine(
    cluster: Cluster, bitext: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    data = bitext(shards=8)
    if nodes == 3:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.chdir(tmp_path)  # the nodes were started in another folder
        data = data.relative_to(tmp_path)
    loaded = recipe(data, "balance.budget=9000", "instruct.validation=10")
    run(loaded, tmp_path / "here")
    with RayEngine(cluster.address) as engine:
        assert engine.workers == nodes
        run(loaded, "there" if nodes == 3 else tmp_path / "there", engine=engine)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


class Killing(Progress):
    """Takes a node away while the run is at work."""

    def __init__(self, cluster: Cluster, node: Any) -> None:
        self.cluster, self.node, self.calls = cluster, node, 0

    def advance(self, amount: int, note: str = "") -> None:
        self.calls += 1
        if self.calls == 3:
            self.cluster.remove_node(self.node, allow_graceful=False)


def test_a_node_that_is_lost_does_not_change_a_byte(cluster: Cluster, bitext: Corpus, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    loaded = recipe(bitext(shards=6))
    run(loaded, tmp_path / "here")
    with RayEngine(cluster.address) as engine:
        assert engine.workers == 3
        progress = Killing(cluster, node)
        run(loaded, tmp_path / "there", engine=engine, progress=progress)
    assert progress.calls > 3
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


def test_a_run_whose_cluster_is_lost_ends_with_a_message_and_goes_on(bitext: Corpus, tmp_path: Path) -> None:
    data, out = bitext(shards=6), tmp_path / "out"
    run(recipe(data), tmp_path / "whole")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    command = [sys.executable, "-m", "corpusprep", "run", "--quiet", "--out", str(out), "--engine", made.address]
    command += ["--source", f"opus100={data / 'opus'}", "--source", f"nllb={data / 'nllb'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("parts/pass1/*/batch.json")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        made.shutdown()
    _, errors = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "continues where it stopped" in errors
    result = run(recipe(data), out)
    assert result.reused["pass1"] > 0
    assert digests(out) == digests(tmp_path / "whole")
