"""Publishing a run to the hub, of which a small stand-in answers on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished import expected, make_run, sha256, write_manifest
from hub import Hub

from corpusprep import InputError, publish
from corpusprep.commands import targets
from corpusprep.commands.targets import hub as hub_target

huggingface_hub = pytest.importorskip("huggingface_hub", minversion="1.0", reason="the hub's library is not installed")

from datasets import load_dataset  # noqa: E402

TARGET = "hf://datasets/me/first-mix"
# The library's own call of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, with a token that may write; files go there by plain HTTP, and not to Xet's servers."""
    with Hub() as made:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, made.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield made


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def contents(hub: Hub, repo: str = "me/first-mix") -> dict[str, bytes]:
    """What lies in a data set, without the file that the hub itself makes."""
    return {name: content for name, content in hub.contents(repo).items() if name != ".gitattributes"}


def test_a_data_set_is_created_in_one_commit_and_can_be_loaded(hub: Hub, made: Path, tmp_path: Path) -> None:
    preview = publish(made, TARGET, private=True, dry_run=True)
    assert (preview.created, hub.repos) == (True, {})
    result = publish(made, TARGET, private=True)
    assert result.created
    assert contents(hub) == expected(made)
    assert hub.repos["me/first-mix"].private
    assert hub.repos["me/first-mix"].messages == ["initial commit", "Publish first-mix"]
    for name, content in contents(hub).items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    loaded = load_dataset(str(tmp_path / "there"), cache_dir=str(tmp_path / "cache"))
    assert (loaded["train"].num_rows, loaded["validation"].num_rows) == (24, 8)


def test_again_nothing_is_sent_and_nothing_committed(hub: Hub, made: Path) -> None:
    publish(made, TARGET, with_rejects=True)
    sent = list(hub.uploads)
    again = publish(made, TARGET, with_rejects=True)
    assert (again.sent, again.removed, sorted(again.reused)) == ([], [], sorted(expected(made, with_rejects=True)))
    assert hub.uploads == sent
    assert len(hub.repos["me/first-mix"].commits) == 2


def test_an_interrupted_publish_sends_no_large_file_twice(hub: Hub, made: Path) -> None:
    broken = sha256((made / "mix" / "train-00002-of-00003.parquet").read_bytes())
    hub.failing = {broken}
    with pytest.raises(InputError, match=r"the hub refuses .*507.* What was sent is kept"):
        publish(made, TARGET)
    assert hub.repos["me/first-mix"].messages == ["initial commit"]
    hub.failing = set()
    publish(made, TARGET)
    assert contents(hub) == expected(made)
    assert sorted(hub.uploads) == sorted(set(hub.uploads))


def test_large_files_go_in_parts(hub: Hub, tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", 1)
    with open(made / "mix" / "train-00000-of-00001.parquet", "ab") as file:
        file.write(os.urandom((5 << 20) + 7))
    write_manifest(made)
    publish(made, TARGET)
    assert contents(hub) == expected(made)
    assert [len(parts) for parts in hub.parts.values()] == [6]


def test_one_changed_file_and_fewer_than_before(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    repo = hub.repos["me/first-mix"]
    repo.files["notes/plan.txt"] = (b"ours", False)
    repo.files["train-00000-of-00009.parquet"] = (b"not of a publish", True)
    damaged = "train-00001-of-00003.parquet"
    repo.files[damaged] = (b"?" * len(repo.files[damaged][0]), True)
    assert publish(made, TARGET).sent == [damaged]
    make_run(made, 2, seed=2)
    result = publish(made, TARGET)
    assert result.removed == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    foreign = {"notes/plan.txt": b"ours", "train-00000-of-00009.parquet": b"not of a publish"}
    assert contents(hub) == expected(made) | foreign
    assert len(repo.commits) == 4


def test_many_files_are_several_commits(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_target, "_COMMIT", 3)
    publish(made, TARGET)
    assert contents(hub) == expected(made)
    make_run(made, 5, seed=2)
    failing = sha256((made / "mix" / "train-00004-of-00005.parquet").read_bytes())
    hub.failing = {failing}
    with pytest.raises(InputError):
        publish(made, TARGET)
    assert "SHA256SUMS" not in contents(hub)
    hub.failing = set()
    publish(made, TARGET)
    assert contents(hub) == expected(made)


def test_a_file_that_arrives_damaged_is_named(hub: Hub, made: Path) -> None:
    hub.corrupted = {sha256((made / "mix" / "train-00001-of-00003.parquet").read_bytes())}
    with pytest.raises(InputError, match=r"first-mix/train-00001-of-00003\.parquet: it has another checksum"):
        publish(made, TARGET)


def test_a_file_that_the_data_set_ignores_is_named(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    make_run(made, 1)
    hub.ignored = {"train-00000-of-00001.parquet"}
    with pytest.raises(InputError, match=r"train-00000-of-00001\.parquet: it did not arrive"):
        publish(made, TARGET)


def test_a_folder_of_a_data_set(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    publish(made, f"{TARGET}@main/second/mix")
    names = expected(made)
    assert contents(hub) == names | {f"second/mix/{name}": content for name, content in names.items()}
    assert publish(made, f"{TARGET}/second/mix").sent == []


def test_a_card_that_was_edited_on_the_hub_is_not_lost(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    hub.repos["me/first-mix"].files["README.md"] = (b"---\nlicense: mit\n---\n", False)
    with pytest.raises(InputError, match="the card was changed there"):
        publish(made, TARGET)
    assert publish(made, TARGET, replace=True).sent == ["README.md"]


def test_what_another_commits_at_the_same_time_is_not_overwritten(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    make_run(made, 2)
    opened = targets.open_target(TARGET, private=False, writes=True, message="x")
    hub.repos["me/first-mix"].commit("of another")
    content = (made / "manifest.json").read_bytes()
    file = targets.File("manifest.json", made / "manifest.json", len(content), sha256(content))
    with pytest.raises(InputError, match="changed by another"):
        opened.change([file], [], lambda size: None)


@pytest.mark.parametrize(
    ("token", "target", "message"),
    [
        (None, TARGET, "there is no token.* hf auth login"),
        ("hf_unknown", TARGET, "does not know the token.* hf auth login"),
        ("hf_reader", TARGET, "access is denied .*write token"),
        ("hf_reader", "hf://datasets/me/new", "access is denied .*rights"),
        ("hf_writer", f"{TARGET}@draft", "no revision draft.* hf repos branch create"),
        ("hf_writer", "hf://datasets/me/new@draft", "no data set me/new"),
        ("hf_writer", "hf://datasets/me/not..allowed", "allows no such name"),
    ],
)
def test_denied(
    hub: Hub, made: Path, tmp_path: Path, token: str | None, target: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_run(tmp_path / "other", 1), TARGET)
    before = hub.contents("me/first-mix")
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message):
        publish(made, target)
    assert (list(hub.repos), hub.contents("me/first-mix")) == (["me/first-mix"], before)


def test_a_public_data_set_is_not_taken_for_a_private_one(hub: Hub, made: Path) -> None:
    publish(made, TARGET)
    with pytest.raises(InputError, match="is public"):
        publish(made, TARGET, private=True)


def test_no_network(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        publish(made, TARGET)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        publish(made, TARGET)


def test_the_command(hub: Hub, made: Path) -> None:
    """In a process of its own, with the variables that users set."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writer"}

    def call(*options: str, **others: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "corpusprep", "publish", str(made), TARGET, *options]
        return subprocess.run(command, env={**os.environ, **variables, **others}, capture_output=True, text=True)

    done = call("--private")
    assert done.returncode == 0, done.stderr
    sizes = sum(map(len, expected(made).values()))
    assert done.stdout == f"The data set was created.\n7 files sent ({sizes:,} bytes), 0 reused, 0 removed: {TARGET}\n"
    make_run(made, 2)
    refused = call("--quiet", HF_TOKEN="hf_reader")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {TARGET}: access is denied")
    assert len(refused.stderr.splitlines()) == 1
