"""The one way in which columns are derived: what is made, what is found again, and what a task is told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import stepping

from corpusprep import RunError, load_recipe
from corpusprep.derive import Run
from corpusprep.engines import Call, Engine
from corpusprep.parts import Column, Group, Part, Work, by_pair, one_by_one, write_column
from corpusprep.report.progress import Progress
from corpusprep.store import write_table


def twice(work: Work) -> None:
    """Doubles the rows' numbers, plus what is said to all and to the group."""
    for part in work.parts:
        rows = part.read("row")["row"].to_numpy()
        work.write(part, {"value": 2 * rows + work.settings + (work.own or 0)}, {"note": "n"})


def total(work: Work) -> None:
    values = work.columns["values"]
    work.write_value(
        {"sum": sum(int(values.array(part, "value").sum()) for part in work.parts), "threads": work.threads}
    )


def half(work: Work) -> None:
    """Writes one output of two, and fails."""
    work.write(work.parts[0], {"value": np.zeros(work.parts[0].rows)})
    raise RunError("half of it is done")


def hinted(work: Work) -> None:
    work.write_value(work.hints["word"])


class Inline(Engine):
    """Runs tasks in this process, and says that it has more."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, call: Call[Any], tasks: Iterator[Any]) -> Iterator[Any]:
        return map(call.function, tasks)


class Told(Progress):
    def __init__(self) -> None:
        self.titles: list[tuple[str, int | None]] = []
        self.done = 0

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        self.titles.append((title, total))

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount


def begin(folder: Path, workers: int = 1) -> Run:
    return stepping.begin(load_recipe(None, sources=["tsv=x.tsv"]), folder, Inline(workers), Told())


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    found = []
    for number, (pair, rows) in enumerate([("en-de", 3), ("en-fr", 2), ("en-de", 0)]):
        path = tmp_path / f"{number}.parquet"
        write_table(pa.table({"row": pa.array(range(rows), pa.int64())}), path)
        found.append(Part(f"u{number}.{pair}", "k", pair, ((str(path), rows),), "s", "f", (0, 0, number)))
    return found


Derive = Callable[..., Column]


def derive(run: Run, parts: list[Part], settings: int = 1, **more: Any) -> Column:
    return run.derive("twice", "double", twice, one_by_one(parts), settings, **more)


def test_a_column_has_a_file_for_each_part_and_the_second_time_nothing_is_done(
    tmp_path: Path, parts: list[Part]
) -> None:
    run = begin(tmp_path)
    column = derive(run, parts)
    assert [column.array(part, "value").tolist() for part in parts] == [[1, 3, 5], [1, 3], []]
    assert run.result.made == {"twice": 3}
    assert isinstance(run.progress, Told)
    assert (run.progress.titles, run.progress.done) == ([("double", 5)], 5)
    again = begin(tmp_path)
    found = derive(again, parts)
    assert found == column
    assert (again.result.made, again.result.reused) == ({"twice": 0}, {"twice": 3})
    assert [found.digest(part) for part in parts] == [column.digest(part) for part in parts]


def test_a_group_may_have_one_file_for_all_its_parts(tmp_path: Path, parts: list[Part]) -> None:
    run = begin(tmp_path, workers=8)
    values = derive(run, parts)
    sums = run.derive("total", "", total, by_pair(parts), None, of={"values": values}, whole=True)
    assert {pair: sums.value(pair)["sum"] for pair in sums.groups} == {"en-de": 9, "en-fr": 4}
    assert sums.file(parts[0]) == sums.file(parts[2]) != sums.file(parts[1])
    assert sums.value("en-de")["threads"] == 4  # eight workers, two tasks
    assert run.progress.titles == [("double", 5)]  # type: ignore[attr-defined]  # a task without a title has no bar


def test_a_columns_digest_is_of_its_values_and_not_of_its_notes(tmp_path: Path, parts: list[Part]) -> None:
    def digest_of(values: Any, notes: dict[str, str] | None = None) -> str | None:
        column = Column("x", {parts[0].identity: str(tmp_path / "x.parquet")})
        write_column(column.file(parts[0]), parts[0], values, notes)
        return column.digest(parts[0])

    numbers = np.array([1, 2, 3], np.int32)
    first = digest_of({"value": numbers})
    assert (
        first == digest_of({"value": numbers}, {"computed": "3"}) == digest_of({"value": numbers}, {"computed": "30"})
    )
    assert (
        len(
            {
                first,
                digest_of({"other": numbers}),
                digest_of({"value": numbers + 1}),
                digest_of({"value": numbers * 1.0}),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    "change",
    [
        {"settings": 2},
        {"each": lambda group: len(group.name)},
        {"depends": ["another model"]},
        {"of": {"values": Column("other")}},
    ],
)
def test_what_decides_the_result_is_in_the_key(tmp_path: Path, parts: list[Part], change: dict[str, Any]) -> None:
    first = derive(begin(tmp_path), parts)
    run = begin(tmp_path)
    second = derive(run, parts, **change)
    assert run.result.made == {"twice": 3}
    assert not set(first.files.values()) & set(second.files.values())


def test_only_groups_that_are_told_something_else_are_done_again(tmp_path: Path, parts: list[Part]) -> None:
    derive(begin(tmp_path), parts, each=lambda group: 0)
    run = begin(tmp_path)
    column = derive(run, parts, each=lambda group: int(group.parts[0].pair == "en-fr"))
    assert (run.result.made, run.result.reused) == ({"twice": 1}, {"twice": 2})
    assert column.array(parts[1], "value").tolist() == [2, 4]


def test_a_column_counts_by_its_content_and_not_by_where_it_lies(tmp_path: Path, parts: list[Part]) -> None:
    run = begin(tmp_path)
    values = derive(run, parts)
    of = {"values": values}
    before = run.derive("total", "", total, by_pair(parts), None, of=of, whole=True)
    copies = Column("copy")
    for part in parts:
        copies.files[part.identity] = str(tmp_path / f"{part.name}.copy")
        write_column(copies.file(part), part, {"value": values.array(part, "value")}, {"note": "n"})
    run = begin(tmp_path)
    after = run.derive("total", "", total, by_pair(parts), None, of={"values": copies}, whole=True)
    assert after.files == before.files
    write_column(copies.file(parts[1]), parts[1], {"value": np.array([7, 7])})
    copies.digests.clear()
    run = begin(tmp_path)
    run.derive("total", "", total, by_pair(parts), None, of={"values": copies}, whole=True)
    assert (run.result.made, run.result.reused) == ({"total": 1}, {"total": 1})


def test_hints_are_no_part_of_the_key(tmp_path: Path, parts: list[Part]) -> None:
    for word in ("first", "second"):
        found = begin(tmp_path).derive("h", "", hinted, by_pair(parts), None, hints={"word": word}, whole=True)
        assert found.value("en-de") == "first"


def test_a_task_that_fails_leaves_what_is_whole_and_is_done_again(tmp_path: Path, parts: list[Part]) -> None:
    group = [Group("all", tuple(parts))]
    with pytest.raises(RunError, match="half of it"):
        begin(tmp_path).derive("half", "", half, group, None)
    assert len(list((tmp_path / "parts" / "half").iterdir())) == 1
    run = begin(tmp_path)
    with pytest.raises(RunError, match="half of it"):
        run.derive("half", "", half, group, None)
    assert "half" not in run.result.reused


def test_a_file_that_lost_its_bytes_is_made_again(tmp_path: Path, parts: list[Part]) -> None:
    column = derive(begin(tmp_path), parts)
    Path(column.file(parts[0])).write_bytes(b"")
    run = begin(tmp_path)
    again = derive(run, parts)
    assert run.result.made == {"twice": 1}
    assert again.array(parts[0], "value").tolist() == [1, 3, 5]


def test_nothing_is_derived_of_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path)
    column = run.derive("twice", "double", twice, [], 1)
    assert (column.files, column.groups, run.result.made) == ({}, {}, {"twice": 0})


def test_a_column_says_what_it_lacks(tmp_path: Path, parts: list[Part]) -> None:
    column = derive(begin(tmp_path), parts[:1])
    assert parts[0] in column
    assert parts[1] not in column
    assert column.digest(parts[1]) is None
    assert column.of(parts[1:]).files == {}
    assert column.of(parts) == column


def test_values_must_fit_the_rows(tmp_path: Path, parts: list[Part]) -> None:
    with pytest.raises(RunError, match="2 values for 3 rows"):
        write_column(str(tmp_path / "x"), parts[0], {"value": np.zeros(2)})
    assert not (tmp_path / "x").exists()


def test_code_without_a_key_is_refused(tmp_path: Path, parts: list[Part]) -> None:
    with pytest.raises(TypeError, match="its code has no key"):
        begin(tmp_path).derive("p", "", functools.partial(hinted), by_pair(parts), None)
