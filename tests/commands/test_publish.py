"""Publishing a run to folders: what is sent, kept, removed and refused. tests/commands/test_publish_*.py have S3 and the hub."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from datasets import load_dataset
from finished import expected, make_run, sha256, write_manifest
from runs import recipe

from corpusprep import InputError, publish, run
from corpusprep.cli import cli
from corpusprep.report.progress import Progress

FIRST = ["README.md", "SHA256SUMS", "manifest.json"] + [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
FIRST += ["validation/validation-00000-of-00001.parquet"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "published" / "mix"


def url(place: Path) -> str:
    return f"file://{place}"


def contents(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


class At(Progress):
    """Calls a function when a pass begins."""

    def __init__(self, title: str, call: Callable[[], object]) -> None:
        self.title, self.call = title, call

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        if title == self.title:
            self.call()


class During(Progress):
    """Calls a function when so many bytes were sent."""

    def __init__(self, size: int, call: Callable[[], object]) -> None:
        self.left: int | None = size
        self.call, self.sending = call, False

    def start(self, title: str, total: int | None, unit: str = "rows") -> None:
        self.sending = title == "send"

    def advance(self, amount: int, note: str = "") -> None:
        if self.sending and self.left is not None:
            self.left -= amount
            if self.left <= 0:
                self.left = None
                self.call()


def stop() -> None:
    raise KeyboardInterrupt


def test_what_a_run_writes_is_published_and_can_be_loaded(
    bitext: Callable[..., Path], tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("instruct.shard_rows=60", "instruct.validation=5")
    run(recipe(bitext(rows=60, shards=1), *settings), tmp_path / "out", workers=1)
    result = publish(tmp_path / "out", url(place), with_rejects=True)
    assert contents(place) == expected(tmp_path / "out", with_rejects=True)
    assert sorted(result.sent) == sorted(contents(place))
    train = sorted(name for name in contents(place) if name.startswith("train-"))
    assert len(train) > 1
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    loaded = load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    counts = json.loads((place / "manifest.json").read_text())["mix"]
    assert loaded["validation"].num_rows == counts["validation"] > 0
    assert loaded["train"].num_rows == counts["examples"] - counts["validation"]
    # The folder that the other tests use is listed as that of a run is.
    (listed, *_), (made, *_) = (
        json.loads((folder / "manifest.json").read_text())["files"]
        for folder in (tmp_path / "out", make_run(tmp_path / "made"))
    )
    assert set(made) <= set(listed)


@pytest.mark.parametrize("container", ["parquet", "jsonl"])
def test_again_nothing_is_sent(tmp_path: Path, place: Path, container: str) -> None:
    made = make_run(tmp_path / "run", container=container)
    first = publish(made, url(place))
    assert (sorted(first.sent), first.reused, first.removed) == (sorted(expected(made)), [], [])
    assert first.bytes_sent == sum(len(content) for content in expected(made).values())
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    again = publish(made, url(place))
    assert (again.sent, sorted(again.reused), again.bytes_sent) == ([], sorted(expected(made)), 0)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert contents(place) == expected(made)
    loaded = load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
    assert (loaded["train"].num_rows, loaded["validation"].num_rows) == (24, 8)


def test_sums_are_those_of_sha256sum(made: Path, place: Path) -> None:
    publish(made, url(place), with_rejects=True)
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=place, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_target_in_memory(made: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        assert publish(made, "memory://bucket/mix").sent
        assert publish(made, "memory://bucket/mix").sent == []
        found = {name.removeprefix("/bucket/mix/"): memory.cat_file(name) for name in memory.find("/bucket/mix")}
        assert found == expected(made)
        memory.pipe_file("/bucket/mix/train-00001-of-00003.parquet", b"?" * 10)
        assert publish(made, "memory://bucket/mix").sent == ["train-00001-of-00003.parquet"]
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_changed_file_is_sent_again_and_files_of_an_earlier_mix_go(made: Path, place: Path) -> None:
    publish(made, url(place), with_rejects=True)
    (place / "notes.txt").write_text("ours")
    (place / "train-00000-of-00009.parquet").write_text("not of a publish")
    damaged = place / "train-00002-of-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert publish(made, url(place), with_rejects=True).sent == ["train-00002-of-00003.parquet"]
    make_run(made, 2, seed=2)
    result = publish(made, url(place))
    old = [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert result.removed == ["rejects/opus-0001-00000.parquet", *old]
    foreign = {"notes.txt": b"ours", "train-00000-of-00009.parquet": b"not of a publish"}
    assert contents(place) == expected(made) | foreign


def test_an_interrupted_publish_goes_on(made: Path, place: Path) -> None:
    publish(made, url(place))
    make_run(made, 4, seed=2, rows=400)
    size = max(path.stat().st_size for path in (made / "mix").iterdir())
    with pytest.raises(KeyboardInterrupt):
        publish(made, url(place), progress=During(2 * size, stop))
    left = contents(place)
    assert "SHA256SUMS" not in left
    listed = left["SHA256SUMS.incomplete"].decode()
    assert "train-00002-of-00003.parquet" in listed
    assert "train-00003-of-00004.parquet" in listed
    # The mix is made anew before it is published again: files of both attempts go.
    whole = [name for name, content in left.items() if content == expected(made).get(name)]
    assert len(whole) >= 2
    result = publish(made, url(place))
    assert set(whole) <= set(result.reused)
    assert contents(place) == expected(made)

    make_run(made, 5, seed=3, rows=400)
    with pytest.raises(KeyboardInterrupt):
        publish(made, url(place), progress=During(2 * size, stop))
    make_run(made, 2, seed=3)
    publish(made, url(place))
    assert contents(place) == expected(made)


def test_a_file_that_arrives_damaged_is_named(made: Path, place: Path) -> None:
    victim = place / "train-00001-of-00003.parquet"

    def spoil() -> None:
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")

    last = sum(path.stat().st_size for path in (made / "mix").rglob("*.*"))
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet: it has another checksum .* again"):
        publish(made, url(place), progress=During(last, spoil))
    assert "SHA256SUMS" not in contents(place)
    assert publish(made, url(place)).sent == ["train-00001-of-00003.parquet", "SHA256SUMS"]
    assert contents(place) == expected(made)


def test_a_dry_run_changes_nothing(made: Path, place: Path) -> None:
    result = publish(made, url(place), dry_run=True)
    assert sorted(result.sent) == FIRST
    assert not place.exists()
    publish(made, url(place))
    before = contents(place)
    make_run(made, 1)
    command = ["publish", str(made), url(place), "--dry-run", "--quiet"]
    printed = CliRunner().invoke(cli, command)
    assert printed.exit_code == 0
    for text in (
        "send    train-00000-of-00001.parquet",
        "remove  train-00002-of-00003.parquet",
        "3 to remove: file://",
    ):
        assert text in printed.output
    assert contents(place) == before


def test_the_card_may_be_edited_before_but_not_lost_after(made: Path, place: Path) -> None:
    card = made / "mix" / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: cc-by-4.0"))
    result = publish(made, url(place))
    assert "edited after the run" in result.notes[0]
    assert "license: cc-by-4.0" in (place / "README.md").read_text()
    (place / "README.md").write_text("edited there")
    with pytest.raises(InputError, match="the card was changed there"):
        publish(made, url(place))
    assert publish(made, url(place), replace=True).sent == ["README.md"]
    assert contents(place) == expected(made)


def test_files_that_no_publish_sent_are_not_overwritten(made: Path, place: Path) -> None:
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("mine")
    (place / "SHA256SUMS").write_text(f"{sha256(b'other')}  other.bin\n{'0' * 64}  ../run/manifest.json\n")
    (place / "other.bin").write_text("other")
    with pytest.raises(InputError, match=r"manifest\.json: a file is there that no publish has sent"):
        publish(made, url(place))
    assert len(contents(place)) == 3
    publish(made, url(place), replace=True)
    assert contents(place) == expected(made) | {"other.bin": b"other"}


HOSTILE = [
    "../x",
    "mix/../../x",
    "/etc/passwd",
    "mix//x",
    "mix/.hidden",
    "parts/x",
    "mix/SHA256SUMS",
    "mix/a\nb",
    "mix",
    "mix/a\\b",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_manifest_names_only_files_of_the_folder(made: Path, place: Path, path: str) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"].append({"path": path, "bytes": 1, "sha256": "0" * 64})
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="no file that a run writes"):
        publish(made, url(place))
    assert not place.exists()


def _link_file(made: Path) -> None:
    path = made / "mix" / "train-00000-of-00003.parquet"
    path.rename(made / "elsewhere")
    path.symlink_to(made / "elsewhere")


def _link_folder(made: Path) -> None:
    (made / "mix").rename(made / "elsewhere")
    (made / "mix").symlink_to(made / "elsewhere")


def _link_manifest(made: Path) -> None:
    (made / "manifest.json").rename(made / "elsewhere")
    (made / "manifest.json").symlink_to(made / "elsewhere")


def _shorten(made: Path) -> None:
    os.truncate(made / "mix" / "train-00000-of-00003.parquet", 10)


def _flip(made: Path) -> None:
    path = made / "mix" / "train-00000-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _write(text: str) -> Callable[[Path], Any]:
    return lambda made: (made / "manifest.json").write_text(text)


def _leave(name: str) -> Callable[[Path], Any]:
    def leave(made: Path) -> None:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("x")

    return leave


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_link_file, "symbolic link"),
        (_link_folder, "symbolic link"),
        (_link_manifest, "symbolic link"),
        (_shorten, "not the file that the run's manifest lists"),
        (_flip, "not the file that the run's manifest lists"),
        (lambda made: (made / "mix" / "train-00000-of-00003.parquet").unlink(), "it is not there"),
        (lambda made: (made / "mix" / "README.md").unlink(), "it is not there"),
        (_leave("mix/train-00007-of-00003.parquet"), "manifest does not list it"),
        (lambda made: (made / "manifest.json").unlink(), "no manifest.json"),
        (_write("{"), "not the manifest of a run"),
        (_write("[]"), "not the manifest of a run"),
        (_write('{"name": "x", "files": []}'), "lists no mix/README.md"),
        (_write('{"name": "x", "files": [{"path": "mix/README.md"}]}'), "another way"),
        (_write('{"name": "x", "files": [7]}'), "another way"),
        (_leave("parts/output/run.1/mix/train-0.parquet"), "a later run was interrupted"),
        (_leave("parts/tmp/1-ab"), "a later run was interrupted"),
    ],
)
def test_a_folder_that_is_not_that_of_a_finished_run(
    made: Path, place: Path, spoil: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(made)
    with pytest.raises(InputError, match=message):
        publish(made, url(place))
    assert not place.exists()
    shown = CliRunner().invoke(cli, ["publish", str(made), url(place)])
    assert isinstance(shown.exception, InputError)


def test_a_run_at_work_is_waited_for_and_waits(made: Path, place: Path) -> None:
    with open(made / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="a run is writing to it"):
            publish(made, url(place))
    taken: list[str] = []

    def try_to_run() -> None:
        with open(made / ".lock") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken.append("locked")

    publish(made, url(place), progress=At("send", try_to_run))
    assert taken == ["locked"]
    (made / ".lock").unlink()  # a copy of the folder may lack it
    assert publish(made, url(place)).sent == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("published", "not a URL"),
        ("simplecache::s3://bucket/x", "not a URL"),
        ("xyz://bucket/x", "knows no such file system"),
        ("hf://models/me/mix", "not a data set of the hub"),
        ("hf://datasets/mix", "not a data set of the hub"),
        ("hf://datasets/me/mix/a/../b", "its folder"),
        ("file://{run}/mix", "in the folder of the run"),
        ("file://{run}", "in the folder of the run"),
    ],
)
def test_targets_that_are_none(made: Path, target: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(InputError, match=message):
        publish(made, target.format(run=made))


def test_private_is_for_the_hub(made: Path, place: Path) -> None:
    with pytest.raises(InputError, match="only a data set on the hub"):
        publish(made, url(place), private=True)


def test_a_missing_package_is_named(made: Path) -> None:
    code = "import sys; sys.modules.update(s3fs=None, gcsfs=None, huggingface_hub=None)\nfrom corpusprep.cli import main\nmain(sys.argv[1:])"
    for target in ("s3://bucket/mix", "hf://datasets/me/mix"):
        command = [sys.executable, "-c", code, "publish", str(made), target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert "pip install 'corpusprep[publish]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_target_that_may_not_be_written(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="it refuses"):
        publish(made, f"file://{tmp_path}/file/mix")


def test_no_other_command_imports_what_publishing_needs() -> None:
    code = "import sys, corpusprep, corpusprep.cli; print([m for m in ('fsspec', 's3fs', 'huggingface_hub') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rejects_are_checked_only_if_they_are_sent(made: Path, place: Path) -> None:
    (made / "rejects" / "opus-0001-00000.parquet").unlink()
    publish(made, url(place))
    with pytest.raises(InputError, match="it is not there"):
        publish(made, url(place), with_rejects=True)
    write_manifest(made)
    publish(made, url(place), with_rejects=True)
