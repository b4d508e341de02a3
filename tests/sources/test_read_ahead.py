"""Reading ahead in threads: everything arrives, failures do too, and nobody reads on for nobody."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from corpusprep.sources.read_ahead import read_ahead


def numbers(first: int, count: int) -> Iterator[tuple[int, int]]:
    for i in range(count):
        yield first, i


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_everything_arrives_and_each_source_in_its_order(readers: int) -> None:
    found = list(read_ahead([partial(numbers, source, 30 * source) for source in range(4)], readers))
    assert len(found) == 30 * (1 + 2 + 3)
    for source in range(4):
        assert [i for s, i in found if s == source] == list(range(30 * source))
    if readers == 1:
        assert found == sorted(found)


def test_no_sources() -> None:
    assert list(read_ahead([], 3)) == []


def test_it_reads_while_the_taker_works_and_no_further_than_asked() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for i in itertools.count():
            read.append(i)
            yield i

    taken = read_ahead([source], 1, ahead=3)
    assert next(taken) == 0
    deadline = time.monotonic() + 20
    while len(read) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(read) == 5  # one taken, three waiting, one that finds no room
    taken.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_a_failure_comes_in_its_place_and_ends_the_others() -> None:
    def failing() -> Iterator[str]:
        yield "before"
        raise ValueError("broken")

    def endless() -> Iterator[str]:
        while True:
            yield "other"

    taken = read_ahead([failing, endless], 2)
    found: list[str] = []
    with pytest.raises(ValueError, match="broken"):
        found.extend(taken)
    assert set(found) <= {"before", "other"}
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    assert list(taken) == []
