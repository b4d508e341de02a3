"""Launches that meet over sockets of this machine: who comes, who does not, who goes, and what each is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from corpusprep.errors import RunError
from corpusprep.training.machines import Place
from corpusprep.training.meeting import (
    ENDED,
    LOST,
    SAID,
    STOPPED,
    ElsewhereError,
    Follower,
    Leader,
    StageError,
    free_port,
    wait_until_seen,
)

FACTS = {"the mix": "a1", "train.epochs": "1.0"}


class Group:
    """The launches of a training, each in a thread.

    Attributes:
        ended: launch -> the error that it ended with, or None.
        told: what was shown.
    """

    def __init__(self, launches: int, timeout: float = 20.0) -> None:
        self.port, self.launches, self.timeout = free_port(), launches, timeout
        self.ended: dict[Any, BaseException | None] = {}
        self.told: list[str] = []
        self._threads: list[threading.Thread] = []

    def place(self, rank: int) -> Place:
        return Place(self.launches, self.launches, rank, "127.0.0.1", self.port)

    def lead(self, act: Callable[[Leader], None] = lambda leader: leader.finish(), **facts: str) -> None:
        def run() -> None:
            with Leader(self.place(0), self.timeout, self.told.append) as leader:
                leader.gather({**FACTS, **facts})
                act(leader)

        self._start(0, run)

    def come(
        self,
        rank: int,
        act: Callable[[Follower], Any] = lambda follower: follower.next(),
        name: Any = None,
        **facts: str,
    ) -> None:
        def run() -> None:
            with Follower(self.place(rank), self.timeout, self.told.append, {**FACTS, **facts}) as follower:
                act(follower)

        self._start(name or rank, run)

    def _start(self, name: Any, run: Callable[[], None]) -> None:
        def guarded() -> None:
            self.ended[name] = None
            try:
                run()
            except BaseException as error:
                self.ended[name] = error

        self._threads.append(threading.Thread(target=guarded, daemon=True))
        self._threads[-1].start()

    def all_failed(self, ranks: Sequence[Any], kind: type[BaseException], told: str) -> None:
        """Checks with which error some launches ended."""
        for rank in ranks:
            with pytest.raises(kind, match=told):
                raise self.ended[rank] or AssertionError

    def end(self, within: float = 15.0) -> None:
        deadline = time.monotonic() + within
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a launch hangs"

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while not any(text in line for line in self.told):
            assert time.monotonic() < deadline, self.told
            time.sleep(0.01)


def test_all_do_the_same_stages(tmp_path: Path) -> None:
    group, seen = Group(3), []

    def lead(leader: Leader) -> None:
        leader.share(tmp_path)
        for number in (1, 2):
            leader.begin({"job": number})
            leader.wait("done", number)
        leader.finish(folders=["stage-1"])

    def follow(follower: Follower) -> None:
        while (message := follower.next())["kind"] != "end":
            if message["kind"] == "folder":
                wait_until_seen([message["mark"]])
                follower.said("seen")
            else:
                seen.append(message["stage"]["job"])
                follower.said("done", message["stage"]["job"])
        seen.append(message["folders"])

    group.come(2, follow)
    group.lead(lead)
    group.come(1, follow)
    group.end()
    assert group.ended == {0: None, 1: None, 2: None}
    assert seen == [1, 1, 2, 2, ["stage-1"], ["stage-1"]]
    assert not list(tmp_path.iterdir())


def test_those_that_do_not_come_are_named() -> None:
    group = Group(4, timeout=1.5)
    group.lead()
    group.come(2)
    group.end()
    told = rf"Waited 2 s at 127.0.0.1:{group.port} for machines 1 and 3 of 4; machine 2 \(.*\) came. Start the same"
    group.all_failed((0, 2), RunError, told)


def test_machine_0_does_not_come() -> None:
    group = Group(2, timeout=0.5)
    group.come(1)
    group.end()
    told = rf"machine 1 waited 0 s for machine 0 of 2 at 127.0.0.1:{group.port}: Connection refused. Start the same"
    group.all_failed((1,), RunError, told)


def test_a_port_that_is_taken() -> None:
    group = Group(2)
    with socket.create_server(("", group.port)):
        group.lead()
        group.end()
    group.all_failed((0,), RunError, rf"127.0.0.1:{group.port}: another program uses this port on .* Choose another")


def test_other_settings_are_named_and_end_all() -> None:
    group = Group(2)
    group.lead()
    group.come(1, **{"train.epochs": "2.0", "the mix": "b2"})
    group.end()
    told = r"machine 1 \(.*\) does not do the same as machine 0 \(.*\): the mix is b2 instead of a1; train.epochs is 2.0 instead"
    group.all_failed((0, 1), ElsewhereError, told)


def test_another_number_of_machines_is_named() -> None:
    group = Group(2)
    group.lead()
    group.wait_for("waits")
    group.launches = 3
    group.come(2)
    group.end()
    group.all_failed((0,), ElsewhereError, "the number of machines is 3 instead of 2")


def test_the_same_rank_twice_is_refused() -> None:
    group = Group(3)
    group.lead()
    group.come(1)
    group.wait_for("is here")
    group.come(1, name="again")
    group.wait_for("is here already")
    group.come(2)
    group.end()
    assert group.ended[0] is group.ended[1] is group.ended[2] is None
    with pytest.raises(ElsewhereError, match=r"is here already. Give each machine its own train.machine_rank"):
        raise group.ended["again"] or AssertionError


def test_a_launch_that_goes_before_all_are_here_may_come_again() -> None:
    group = Group(3)
    group.lead()
    with contextlib.closing(socket.create_connection(("127.0.0.1", _up(group)))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        group.come(1, lambda follower: None)
        group.wait_for("is here")
        time.sleep(0.3)
        group.come(1)
        group.come(2)
        group.end()
    assert group.ended == {0: None, 1: None, 2: None}


def _up(group: Group) -> int:
    group.wait_for("waits")
    return group.port


def test_one_that_dies_is_missed_by_all() -> None:
    group = Group(3)

    def lead(leader: Leader) -> None:
        leader.begin({})
        leader.wait("done", 1, timeout=60)

    def die(follower: Follower) -> None:
        follower.next()
        follower._link.close()  # as the kernel does for a process that is killed

    group.lead(lead)
    group.come(1, die)
    group.come(2, lambda follower: [follower.next(), follower.next()])
    group.end()
    group.all_failed((0, 2), ElsewhereError, r"machine 1 \(.*\) is gone. Finished work is kept: .* --resume")


def test_machine_0_dies() -> None:
    group = Group(2)

    def die(leader: Leader) -> None:
        for link in leader._links.values():
            link.close()

    group.lead(die)
    group.come(1)
    group.end()
    group.all_failed((1,), ElsewhereError, r"machine 0 \(127.0.0.1\) is gone")


@pytest.mark.parametrize("weight", [SAID, ENDED])
def test_the_reason_is_told_and_not_its_consequences(weight: int) -> None:
    """The stage fails on machine 1; the others lose their connection to it."""
    group = Group(3)

    def lead(leader: Leader) -> None:
        raise leader.verdict(StageError("stage 1: lost another one", LOST))

    def fail(follower: Follower) -> None:
        raise follower.verdict(StageError("stage 1: the loss is nan", weight))

    def lose(follower: Follower) -> None:
        raise follower.verdict(StageError("stage 1: lost another one", LOST))

    group.lead(lead)
    group.come(1, fail)
    group.come(2, lose)
    group.end(30)
    group.all_failed((0, 2), ElsewhereError, r"machine 1 \(.*\): stage 1: the loss is nan")
    assert type(group.ended[1]) is StageError
    assert str(group.ended[1]) == "stage 1: the loss is nan"


def test_a_failure_of_machine_0_reaches_the_others() -> None:
    group = Group(2)

    def lead(leader: Leader) -> None:
        raise leader.verdict(StageError("stage 1: out of memory", SAID))

    def follow(follower: Follower) -> None:
        while follower.trouble() is None:
            time.sleep(0.01)
        raise follower.verdict(StageError("stage 1 was ended", STOPPED))

    group.lead(lead)
    group.come(1, follow)
    group.end()
    group.all_failed((1,), ElsewhereError, r"machine 0 \(.*\): stage 1: out of memory")
    assert type(group.ended[0]) is StageError


def test_an_interruption_reaches_the_others() -> None:
    group = Group(2)

    def lead(leader: Leader) -> None:
        leader.begin({})
        leader.wait("done", 1)

    def interrupt(follower: Follower) -> None:
        follower.next()
        raise KeyboardInterrupt

    group.lead(lead)
    group.come(1, interrupt)
    group.end()
    group.all_failed((0,), ElsewhereError, r"machine 1 \(.*\): was interrupted")


def test_one_that_comes_late_is_told_so() -> None:
    group = Group(2)
    over = threading.Event()

    def lead(leader: Leader) -> None:
        over.wait(10)
        leader.finish()

    group.lead(lead)
    group.come(1)
    group.wait_for("is here")
    time.sleep(0.2)
    group.come(1, name="late")
    while group.ended.get("late") is None:
        time.sleep(0.01)
    over.set()
    group.end()
    assert group.ended[0] is group.ended[1] is None
    with pytest.raises(ElsewhereError, match="has begun a training with all its machines"):
        raise group.ended["late"] or AssertionError


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    group = Group(2)

    def follow(follower: Follower) -> None:
        mark = Path(follower.next()["mark"])
        wait_until_seen([tmp_path / "another" / mark.name], timeout=0.3)

    group.lead(lambda leader: leader.share(tmp_path))
    group.come(1, follow)
    group.end()
    group.all_failed((0, 1), RunError, r"is not seen on .* --out must be a folder on a file system that all machines")


@pytest.mark.filterwarnings("ignore")
def test_the_port_is_found_in_torchruns_store() -> None:
    distributed = pytest.importorskip("torch.distributed")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True)
    places = [
        Place(1, 2, rank, "127.0.0.1", 0, local=rank, local_launches=2, store=("127.0.0.1", store.port)) for rank in (0, 1)
    ]  # fmt: skip
    found: list[str] = []

    def follow() -> None:
        with Follower(places[1], 20, print, FACTS) as follower:
            found.append(follower.next()["kind"])

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    with Leader(places[0], 20, print) as leader:
        leader.gather(FACTS)
        leader.finish()
    thread.join(10)
    assert found == ["end"]
