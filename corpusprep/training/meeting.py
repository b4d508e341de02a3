"""How the launches of a training on several machines find each other, compare what they were given, and end together.

Launch 0 listens and leads; each other one holds one connection to it. Messages are lines of JSON. A connection that ends
without a word is a launch that died: the kernel closes it with the process, and its keep-alive finds a machine that is lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from corpusprep.errors import RunError
from corpusprep.training.machines import Place

SAID, ENDED, LOST, STOPPED = 3, 2, 1, 0
"""How much a launch knows of why a stage failed: it said so; its processes ended without a word; they lost another one; they
were stopped because of another one."""
_SETTLE = 5.0  # seconds that a reason may take to arrive after its consequences
_HEARD = 0.5  # seconds after which Ctrl-C is heard
_SEEN = 90.0  # seconds after which a shared file system shows a file to all machines
_COUNT = "the number of machines"
_AGAIN = "Finished work is kept: start the same command with --resume on all machines."


class ElsewhereError(RunError):
    """The training ended because of another launch, which the message names."""


class StageError(RunError):
    """The processes of a stage failed on this machine.

    Attributes:
        weight: `SAID`, `ENDED`, `LOST` or `STOPPED`.
    """

    def __init__(self, text: str, weight: int) -> None:
        super().__init__(text)
        self.weight = weight


class _Trouble(NamedTuple):
    weight: int
    text: str


class _Link:
    """A connection to another launch."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._reader: threading.Thread | None = None
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine without power or network is given up after 45 seconds.
        for name, value in (
            ("TCP_KEEPIDLE", 15),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 6),
            ("TCP_USER_TIMEOUT", 45_000),
        ):
            if hasattr(socket, name):  # not on all systems
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def listen(self, heard: Callable[[dict[str, Any] | None], None]) -> None:
        """Calls `heard` with each message, in a thread, and with None at the end."""

        def read() -> None:
            while (message := self.receive()) is not None:
                heard(message)
            heard(None)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None if the connection has ended, or says what no launch says."""
        try:
            self._socket.settimeout(timeout)
            line = self._lines.readline(1 << 26)
            self._socket.settimeout(None)
            found = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def send(self, **message: Any) -> None:
        """Sends a message. A connection that has ended is told by `receive`."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which ends the thread that reads
        if self._reader is not None:
            self._reader.join(5)
        with contextlib.suppress(OSError):
            self._lines.close()
            self._socket.close()


class Leader:
    """Launch 0, which all others report to.

    Args:
        place: where this launch stands.
        timeout: seconds to wait for the others.
        say: shows a line of text.
    """

    def __init__(self, place: Place, timeout: float, say: Callable[[str], None]) -> None:
        self.place, self.timeout, self.say = place, timeout, say
        self.hosts: dict[int, str] = {0: _host()}
        self._links: dict[int, _Link] = {}
        self._opened: list[_Link] = []  # also of launches that went before all were here
        self._changed = threading.Condition()
        self._troubles: list[_Trouble] = []
        self._said: set[tuple[int, str, int]] = set()
        self._over = False
        self._listener = self._listen()
        _tell_port(place, self._listener.getsockname()[1])

    def _listen(self) -> socket.socket:
        where = f"{self.place.host}:{self.place.port}"
        try:
            return socket.create_server(("", self.place.port), backlog=128, dualstack_ipv6=False)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise RunError(
                f"{where}: {'another program uses this port' if taken else f'cannot be used ({error.strerror})'} on "
                f"{self.hosts[0]}. Choose another port, the same on all machines: --set "
                f"train.main_address={self.place.host}:…"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        """Tells all others how the training ended, and waits for them to go."""
        if error is not None:
            text = _words(error) if isinstance(error, ElsewhereError) else f"{self._named(0)}: {_words(error)}"
            self._send(kind="stop", text=text)
        deadline = time.monotonic() + _SETTLE
        with self._changed:
            self._over = True
            while (set(self._links) - {rank for rank, kind, _ in self._said if kind == "gone"}) and (
                left := deadline - time.monotonic()
            ) > 0:
                self._changed.wait(min(left, _HEARD))
        with contextlib.suppress(OSError):
            self._listener.close()
        for link in self._opened:
            link.close()

    def gather(self, facts: Mapping[str, str]) -> None:
        """Waits for all other launches, and compares what they were given.

        Args:
            facts: what all must have alike, by what messages call it.

        Raises:
            RunError: a launch does not come, comes twice, or has other facts.
        """
        where = f"{self.place.host}:{self._listener.getsockname()[1]}"
        self.say(
            f"{self._named(0)} waits at {where} for {self.place.names(self._awaited())}, up to {self.timeout:,.0f} s"
        )
        deadline = time.monotonic() + self.timeout
        while awaited := self._awaited():
            left = deadline - time.monotonic()
            if left <= 0:
                came = ", ".join(self._named(rank) for rank in sorted(self._links)) or "no other one"
                raise RunError(
                    f"Waited {self.timeout:,.0f} s at {where} for {self.place.names(awaited)} of {self.place.launches}; "
                    f"{came} came. Start the same command there, each with its rank, and check that {self.place.host} is "
                    "this machine and that no firewall is between; or raise train.machine_timeout."
                )
            self._listener.settimeout(min(left, 1.0))
            with contextlib.suppress(OSError):
                self._meet(self._listener.accept()[0], facts)
        self._listener.settimeout(None)
        threading.Thread(target=self._refuse_late, daemon=True).start()

    def share(self, folder: Path) -> None:
        """Makes sure that all launches see the same folder.

        Raises:
            RunError: one of them does not.
        """
        mark = folder / f".together-{secrets.token_hex(8)}"
        mark.touch()
        try:
            self._send(kind="folder", mark=str(mark))
            self.wait("seen", 0, _SEEN + 30)
        finally:
            mark.unlink(missing_ok=True)

    def begin(self, stage: Mapping[str, Any]) -> None:
        """Tells all others to begin a stage."""
        self.check()
        self._send(kind="stage", stage=stage)

    def wait(self, kind: str, number: int = 0, timeout: float = 600.0) -> None:
        """Waits until all others have said something.

        Raises:
            RunError: one of them failed or is gone, or does not say it in time.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while missing := [rank for rank in self._links if (rank, kind, number) not in self._said]:
                self.check()
                if (left := deadline - time.monotonic()) <= 0:
                    raise ElsewhereError(f"{self._named(missing[0])} has not answered for {timeout:,.0f} s. {_AGAIN}")
                self._changed.wait(min(left, _HEARD))

    def finish(self, **result: Any) -> None:
        """Tells all others that the training is done."""
        self._send(kind="end", **result)

    def check(self) -> None:
        """Raises ElsewhereError if another launch has failed or is gone."""
        with self._changed:
            if self._troubles:
                raise ElsewhereError(self._worst().text)

    def trouble(self) -> int | None:
        """Whether another launch has failed or is gone, and how much it knows of the reason; None if all are at work."""
        with self._changed:
            return self._worst().weight if self._troubles else None

    def verdict(self, failed: StageError) -> RunError:
        """The reason of a failed stage: what this launch knows, or what another one does."""
        deadline = time.monotonic() + _SETTLE
        with self._changed:
            while (
                max([failed.weight, *(t.weight for t in self._troubles)]) < SAID
                and (left := deadline - time.monotonic()) > 0
            ):
                self._changed.wait(min(left, _HEARD))
            if self._troubles and self._worst().weight >= failed.weight:
                return ElsewhereError(self._worst().text)
        return failed

    def _worst(self) -> _Trouble:
        return max(self._troubles, key=lambda trouble: trouble.weight)  # of equals the first

    def _named(self, rank: int) -> str:
        return f"{self.place.name(rank)} ({self.hosts.get(rank, '?')})"

    def _awaited(self) -> list[int]:
        return [rank for rank in range(1, self.place.launches) if rank not in self._links]

    def _send(self, **message: Any) -> None:
        for link in list(self._links.values()):
            link.send(**message)

    def _meet(self, connection: socket.socket, facts: Mapping[str, str]) -> None:
        """Receives a launch that reports. One that goes again before all are here may come again."""
        link = _Link(connection)
        hello = link.receive(5.0) or {}
        rank, host, told_facts = hello.get("rank"), str(hello.get("host")), hello.get("facts")
        if hello.get("kind") != "hello" or not isinstance(rank, int) or not isinstance(told_facts, dict) or rank < 1:
            link.close()  # of another program
            return
        named = f"{self.place.name(rank)} ({host})"
        if hello.get("launches") == self.place.launches and rank in self._links:
            told = f"{named}: {self._named(rank)} is here already. Give each machine its own train.machine_rank."
            link.send(kind="stop", text=told)
            link.close()
            self.say(told)
            return
        theirs: dict[str, str] = {**told_facts, _COUNT: str(hello.get("launches"))}
        ours = {**facts, _COUNT: str(self.place.launches)}
        if (differ := _difference(self._named(0), ours, named, theirs)) is not None:
            link.send(kind="stop", text=differ)
            link.close()
            raise ElsewhereError(differ)
        with self._changed:
            self.hosts[rank] = host
            self._links[rank] = link
            self._opened.append(link)
        self.say(f"{named} is here")
        link.listen(lambda message: self._hear(rank, link, message))

    def _hear(self, rank: int, link: _Link, message: dict[str, Any] | None) -> None:
        with self._changed:
            if message is None:
                self._said.add((rank, "gone", 0))
                if self._awaited():
                    del self._links[rank]
                    self._said.discard((rank, "gone", 0))
                elif not self._over and (rank, "bye", 0) not in self._said:
                    self._troubles.append(_Trouble(SAID, f"{self._named(rank)} is gone. {_AGAIN}"))
            elif message.get("kind") == "failed":
                text = f"{self._named(rank)}: {message.get('text')}"
                self._troubles.append(_Trouble(int(message.get("weight", ENDED)), text))
            else:
                self._said.add((rank, str(message.get("kind")), int(message.get("number", 0))))
            self._changed.notify_all()

    def _refuse_late(self) -> None:
        while True:
            try:
                link = _Link(self._listener.accept()[0])
            except OSError:
                return
            link.send(kind="stop", text=f"{self._named(0)}: has begun a training with all its machines.")
            link.close()


class Follower:
    """A launch that reports to launch 0.

    Args:
        place: where this launch stands.
        timeout: seconds to wait for launch 0.
        say: shows a line of text.
        facts: what all launches must have alike.

    Raises:
        RunError: launch 0 does not answer in time.
    """

    def __init__(self, place: Place, timeout: float, say: Callable[[str], None], facts: Mapping[str, str]) -> None:
        self.place, self.timeout, self.say = place, timeout, say
        self._messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stopped = threading.Event()
        self._reason = ""
        self._over = self._failed = False
        self._link = _Link(self._connect())
        self._link.send(
            kind="hello", rank=place.rank, launches=place.launches, host=_host(), facts=dict(facts)
        )  # fmt: skip
        self._link.listen(self._hear)

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + self.timeout
        place, named, told = self.place, self.place.name(self.place.rank), False
        while True:
            where = f"{place.host}:{place.port or '?'}"
            try:
                host, port = _ask_port(place)
                where = f"{host}:{port}"
                return socket.create_connection((host, port), timeout=5)
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                raise RunError(
                    f"{named} waited {self.timeout:,.0f} s for {place.name(0)} of {place.launches} at {where}: {reason}. Start "
                    "the same command there with train.machine_rank = 0, and check the address and that no firewall is "
                    "between; or raise train.machine_timeout."
                )
            if not told:
                self.say(f"{named} waits for {place.name(0)} at {where}, up to {self.timeout:,.0f} s")
                told = True
            time.sleep(min(0.5, self.timeout / 10))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is None:
            self._link.send(kind="bye")
        elif not isinstance(error, ElsewhereError) and not self._failed:
            self._link.send(kind="failed", text=_words(error), weight=SAID)
        self._link.close()

    def next(self) -> dict[str, Any]:
        """The next thing to do: a message of the kinds `folder`, `stage` and `end`.

        Raises:
            ElsewhereError: another launch has failed or is gone.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                return self._messages.get(timeout=0.2)
            if self._stopped.is_set() and self._messages.empty():
                raise ElsewhereError(self._reason)

    def said(self, kind: str, number: int = 0) -> None:
        """Tells launch 0 that something is done."""
        self._link.send(kind=kind, number=number)

    def trouble(self) -> int | None:
        """`SAID` if another launch has failed or is gone; None if all are at work."""
        return SAID if self._stopped.is_set() else None

    def verdict(self, failed: StageError) -> RunError:
        """The reason of a failed stage: what this launch knows, or what launch 0 says."""
        if failed.weight > STOPPED:
            self._link.send(kind="failed", text=_words(failed), weight=failed.weight)
            self._failed = True
        self._stopped.wait(4 * _SETTLE)
        own = f"{self.place.name(self.place.rank)} ("
        if not self._stopped.is_set() or self._reason.startswith(own):
            return failed
        return ElsewhereError(self._reason)

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is None:
            self._reason = self._reason or f"{self.place.name(0)} ({self.place.host}) is gone. {_AGAIN}"
            self._stopped.set()
        elif message.get("kind") == "stop":
            self._reason = str(message.get("text"))
            self._stopped.set()
        else:
            self._messages.put(message)


def wait_until_seen(paths: Sequence[str | Path], timeout: float = _SEEN) -> None:
    """Waits until files that another machine wrote are seen on this one.

    Raises:
        RunError: they are not.
    """
    deadline = time.monotonic() + timeout
    for path in map(Path, paths):
        while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):  # reads the folder anew
            if time.monotonic() > deadline:
                raise RunError(
                    f"{path}: is not seen on {_host()}. --out must be a folder on a file system that all machines share, "
                    "under the same path."
                )
            time.sleep(0.2)


def _difference(our_name: str, ours: Mapping[str, str], their_name: str, theirs: Mapping[str, str]) -> str | None:
    """What two launches were given differently; None if all is alike."""
    differ = [name for name in (*ours, *(n for n in theirs if n not in ours)) if ours.get(name) != theirs.get(name)]
    if not differ:
        return None
    shown = "; ".join(
        f"{name} is {theirs.get(name, 'unknown')} instead of {ours.get(name, 'unknown')}" for name in differ
    )
    return (
        f"{their_name} does not do the same as {our_name}: {shown}. Start the same command, with the same files and versions, "
        "on all machines."
    )


def _words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    return str(error) if isinstance(error, RunError) or str(error) else type(error).__name__


def _host() -> str:
    return socket.gethostname()


def _key(place: Place) -> str:
    return f"corpusprep/{place.attempt}/port"


def _tell_port(place: Place, port: int) -> None:
    """Leaves the port of launch 0 in torchrun's store."""
    if place.store is not None:
        try:
            _store(place.store, 60).set(_key(place), str(port))
        except OSError as error:
            raise RunError(
                f"torchrun's store at {place.store[0]}:{place.store[1]} does not answer ({error}). Set train.main_address."
            ) from None


def _ask_port(place: Place) -> tuple[str, int]:
    """Host and port of launch 0. Raises OSError if they are not known yet."""
    if place.store is None:
        return place.host, place.port
    store = _store(place.store, 10)
    if not store.check([_key(place)]):
        raise OSError("it has not told its port yet")
    return place.host, int(store.get(_key(place)))


def _store(where: tuple[str, int], seconds: float) -> Any:
    import datetime

    from torch.distributed import TCPStore

    try:
        return TCPStore(*where, is_master=False, timeout=datetime.timedelta(seconds=seconds))
    except Exception as error:  # torch raises errors of several kinds
        raise OSError(str(error).splitlines()[0]) from None


def free_port() -> int:
    """A port that no program uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
