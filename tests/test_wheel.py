"""The built wheel holds everything that a run needs: a link that vanishes from it is the classic failure."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is not installed; make test installs it")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*(ROOT / "corpusprep").glob("**/*.py"), *(ROOT / "stages").glob("**/*.py")]:
        inside = path.relative_to(ROOT)
        name = f"corpusprep/{inside}" if inside.parts[0] == "stages" else str(inside)
        assert name in names, name
    assert "corpusprep/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "examples", "stages/"))]


def share_compiled_kernels(site: Path) -> None:
    """Puts the kernels that are compiled already beside the same sources: Numba knows these by size and time."""
    for below in ("corpusprep", "corpusprep/sources", "corpusprep/stages"):
        for path in (ROOT / below).glob("*.py" if below == "corpusprep" else "**/*.py"):
            twin = site / path.relative_to(ROOT)
            shutil.copystat(path, twin)
        for folder in (ROOT / below).glob(
            "__pycache__/kernels-*" if below == "corpusprep" else "**/__pycache__/kernels-*"
        ):
            shutil.copytree(folder, site / folder.relative_to(ROOT), dirs_exist_ok=True)


def test_the_wheel_alone_runs_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    share_compiled_kernels(site)
    data, out = tmp_path / "out" / "example-data", tmp_path / "run"
    build = [sys.executable, str(ROOT / "examples" / "build.py"), str(data), "--rows", "60"]
    subprocess.run(build, check=True, capture_output=True)
    # -S -P and a path of our own: the source tree cannot stand in for what the wheel lacks.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    script = (
        f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({packages!r}); import corpusprep, corpusprep.cli; "
        f"assert corpusprep.__file__.startswith({str(site)!r}), corpusprep.__file__; corpusprep.cli.main()"
    )
    run = [sys.executable, "-S", "-P", "-c", script, "run", str(ROOT / "examples" / "quickstart.toml"), "--quiet"]
    done = subprocess.run([*run, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples" in done.stdout
    assert list((out / "mix").glob("*.parquet"))
