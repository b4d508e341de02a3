"""Sends the mix of a finished run to a bucket, a folder or the Hugging Face hub, and checks what arrived.

At the target lie the files of `mix/` at the root, so that the patterns in the card hold there as they do here; `manifest.json`;
`rejects/` if that is asked for; and `SHA256SUMS`, which is written last. While files are exchanged one by one,
`SHA256SUMS.incomplete` lies there in its place and lists both what was there and what will be: an interrupted publish knows from it
which files are its own. On the hub all is one commit as a rule, and no such file is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpusprep.commands.targets import Advance, File, FolderTarget, Target, open_target
from corpusprep.errors import InputError
from corpusprep.keys import file_digest
from corpusprep.report.progress import Progress
from corpusprep.report.tables import columns
from corpusprep.store import lock_for_reading

SUMS, UNFINISHED = "SHA256SUMS", "SHA256SUMS.incomplete"
_CARD, _MANIFEST = "README.md", "manifest.json"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\x00-\x1f\\]+)")
_DATA = re.compile(r"(?:train|validation/validation)-\d{5,}-of-\d{5,}\.(?:parquet|jsonl)")
_START_AGAIN = "Start the run again, to its end"


@dataclass(frozen=True)
class PublishResult:
    """What became of the files of a mix.

    Attributes:
        target: as it was named.
        sent: names of the files that were sent.
        reused: names of those that were there with the same content.
        removed: names of data files of an earlier mix that were removed.
        sizes: name -> bytes, of all that are there now.
        created: whether the data set on the hub was created.
        dry_run: whether nothing of this was done.
        notes: what the reader should know.
    """

    target: str
    sent: list[str]
    reused: list[str]
    removed: list[str]
    sizes: dict[str, int]
    created: bool = False
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_sent(self) -> int:
        return sum(self.sizes[name] for name in self.sent)


def publish(
    folder: str | Path,
    target: str,
    *,
    with_rejects: bool = False,
    private: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PublishResult:
    """Sends the mix of a finished run, with its card, manifest and a list of checksums, and compares all checksums there.

    Files that are there with the same content are not sent again; an interrupted publish continues where it stopped. Data files
    of an earlier mix are removed if the list of checksums there names them. Other files are left alone.

    Args:
        folder: the folder of a finished run.
        target: `s3://bucket/folder` or another URL of a folder that fsspec opens, or
            `hf://datasets/owner/name[@revision][/folder]`.
        with_rejects: send `rejects/`, too.
        private: if the data set on the hub is not there, create it as a private one.
        replace: replace files of the same names that no publish sent, and a card that was changed at the target.
        dry_run: only find out what would be done.
        progress: receives the progress, in bytes.

    Raises:
        InputError: the folder is not that of a finished run, or its files are not those of its manifest; the target cannot be
            had; a file has another checksum there.
    """
    folder, progress = Path(folder), progress or Progress()
    if not folder.is_dir():
        raise InputError(str(folder), "there is no such folder", "Name the output folder of a run, as in out/first")
    with lock_for_reading(folder), tempfile.TemporaryDirectory() as scratch:
        manifest = _read_manifest(folder)
        entries = _entries(folder, manifest, with_rejects)
        message = f"Publish {manifest['name']}"
        place = open_target(target, private=private, writes=not dry_run, message=message)
        if isinstance(place, FolderTarget) and place.folder is not None:
            _check_outside(folder, place.folder, target)
        files, notes = _check_files(folder, entries, progress)
        plan = _make_plan(place, files, Path(scratch), replace, progress)
        created = place.created
        if not dry_run:
            _carry_out(place, plan, Path(scratch), progress)
    return PublishResult(
        place.url, [file.name for file in plan.send], [file.name for file in plan.keep], plan.remove,
        {file.name: file.size for file in [*plan.send, *plan.keep]}, created, dry_run, notes,
    )  # fmt: skip


def describe(result: PublishResult) -> str:
    """What was done, or with `dry_run` what would be, for a terminal."""
    if result.dry_run:
        rows: list[tuple[str, str, str]] = [("send", name, f"{result.sizes[name]:,}") for name in result.sent]
        rows += [("reuse", name, f"{result.sizes[name]:,}") for name in result.reused]
        rows += [("remove", name, "") for name in result.removed]
        lines = [columns(rows, ("", "file", "bytes")), ""]
    else:
        lines = []
    lines += [f"note: {note}" for note in result.notes]
    if result.created:
        lines.append("The data set would be created." if result.dry_run else "The data set was created.")
    lines.append(
        f"{_counted(len(result.sent))} {'to send' if result.dry_run else 'sent'} ({result.bytes_sent:,} bytes), "
        f"{len(result.reused):,} {'there already' if result.dry_run else 'reused'}, {len(result.removed):,} "
        f"{'to remove' if result.dry_run else 'removed'}: {result.target}"
    )
    return "\n".join(lines)


def _counted(files: int) -> str:
    return f"{files:,} file{'' if files == 1 else 's'}"


# ----------------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Entry:
    """A file as the manifest lists it: its path in the folder, its size and SHA-256."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Its path at the target."""
        return self.path.removeprefix("mix/")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if path.is_symlink():
        raise InputError(str(path), "it is a symbolic link", "Put the file itself in its place")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problem = "it is not the folder of a finished run: it has no manifest.json"
        raise InputError(str(folder), problem, _START_AGAIN) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"it cannot be read ({error})", "Check the file") from None
    for name in ("tmp", "output"):  # what runs have in work; it is empty after each that ended
        if any((folder / "parts" / name).glob("*")):
            remedy = f"{_START_AGAIN}, or remove {folder / 'parts'} to publish the mix as it is"
            raise InputError(str(folder), "a later run was interrupted here", remedy)
    try:
        manifest = json.loads(text)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list) or "name" not in manifest:
        raise InputError(str(path), "it is not the manifest of a run", _START_AGAIN)
    return manifest


def _entries(folder: Path, manifest: Mapping[str, Any], with_rejects: bool) -> list[_Entry]:
    """The files to publish, as the manifest lists them: each is there, and `mix/` has no others."""
    where = str(folder / _MANIFEST)
    found: dict[str, _Entry] = {}
    for listed in manifest["files"]:
        try:
            path, size, sha256 = listed["path"], listed["bytes"], listed["sha256"]
            valid = (
                isinstance(size, int) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None and isinstance(path, str)
            )
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise InputError(where, f"it lists a file in another way than runs do ({listed})", _START_AGAIN)
        if not _is_safe(path):
            raise InputError(where, f"it names {path!r}, which is no file that a run writes", _START_AGAIN)
        if path.startswith("mix/") or with_rejects:
            found[path] = _Entry(path, size, sha256)
    if f"mix/{_CARD}" not in found:
        raise InputError(where, f"it lists no mix/{_CARD}", _START_AGAIN)
    plain: set[Path] = set()
    for entry in found.values():
        _check_is_plain(folder, folder / entry.path, plain)
    for path in sorted((folder / "mix").rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and (path.is_symlink() or not path.is_dir()) and relative.as_posix() not in found:
            raise InputError(
                str(path), "the run's manifest does not list it", f"Move it elsewhere, or {_START_AGAIN.lower()}"
            )
    return [found[path] for path in sorted(found)]


def _is_safe(path: str) -> bool:
    """Whether a path is one of a file in `mix/` or `rejects/` whose name at the target is not needed otherwise."""
    first, *rest = path.split("/")
    if first not in ("mix", "rejects") or not rest or any(part.startswith(".") or not part for part in rest):
        return False
    taken = first == "mix" and rest[0] in (SUMS, UNFINISHED, _MANIFEST, "rejects")
    return not taken and re.search(r"[\x00-\x1f\x7f\\]", path) is None


def _is_data(name: str) -> bool:
    """Whether a name at the target is one that runs give: no other file is ever removed, whatever a list there says."""
    if _DATA.fullmatch(name):
        return True
    return name.startswith("rejects/") and name.endswith(".parquet") and _is_safe(name)


def _check_is_plain(folder: Path, path: Path, plain: set[Path]) -> None:
    """Raises if a file is not there, or is or lies behind a symbolic link.

    Args:
        plain: folders that are known to be no links; the ones met here are added.
    """
    for above in reversed(path.relative_to(folder).parents):
        if above not in plain:
            if (folder / above).is_symlink() and above != Path():
                raise InputError(str(folder / above), "it is a symbolic link", "Put the folder itself in its place")
            plain.add(above)
    if path.is_symlink():
        raise InputError(str(path), "it is a symbolic link", "Put the file itself in its place")
    if not path.is_file():
        raise InputError(str(path), "it is not there, although the run's manifest lists it", _START_AGAIN)


def _check_outside(folder: Path, target: Path, url: str) -> None:
    if target.resolve().is_relative_to(folder.resolve()):
        raise InputError(url, f"it lies in the folder of the run, {folder}", "Choose a folder elsewhere")


def _check_files(folder: Path, entries: Sequence[_Entry], progress: Progress) -> tuple[list[File], list[str]]:
    """The files, after their checksums were compared with the manifest, and notes.

    The card may be another than the run wrote: it asks its reader to fill in the licence.
    """
    files, notes = [], []
    with _bar(progress, "check the files", sum(entry.size for entry in entries)) as advance:
        for entry in entries:
            path = folder / entry.path
            size, is_card = path.stat().st_size, entry.name == _CARD
            sha256 = file_digest(path) if is_card or size == entry.size else ""
            if sha256 != entry.sha256:
                if not is_card:
                    raise InputError(str(path), "it is not the file that the run's manifest lists", _START_AGAIN)
                notes.append(f"{path} was edited after the run, and is published as it is")
            files.append(File(entry.name, path, size, sha256))
            advance(size)
    manifest = folder / _MANIFEST
    files.append(File(_MANIFEST, manifest, manifest.stat().st_size, file_digest(manifest)))
    return sorted(files, key=lambda file: file.name), notes


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Plan:
    """What is to be done.

    Attributes:
        send: files that are not there with the same content, the list of checksums last.
        keep: files that are.
        remove: names of data files of an earlier mix.
        listed: name -> checksums, as lists at the target have them.
        lists: those of the two lists that are at the target.
    """

    send: list[File]
    keep: list[File]
    remove: list[str]
    listed: Mapping[str, set[str]]
    lists: set[str]


def _make_plan(place: Target, files: Sequence[File], scratch: Path, replace: bool, progress: Progress) -> _Plan:
    listed: dict[str, set[str]] = {}
    lists = place.present([SUMS, UNFINISHED])
    for name in sorted(lists):
        for found, sha256 in _parse(place.read(name) or b""):
            listed.setdefault(found, set()).add(sha256)
    sums = _text_file(scratch, SUMS, ((file.name, file.sha256) for file in files))
    wanted = [*files, sums]
    with _bar(progress, "look at the target", sum(file.size for file in wanted)) as advance:
        same = place.compare(wanted, advance)
    if not replace:
        for file in files:
            if same.get(file.name) is False:
                _check_is_ours(place, file, listed.get(file.name, set()), UNFINISHED in lists)
    names = {file.name for file in files}
    old = [name for name in listed if name not in names and _is_data(name)]
    return _Plan(
        [file for file in wanted if not same.get(file.name)], [file for file in wanted if same.get(file.name)],
        sorted(place.present(old)), listed, lists,
    )  # fmt: skip


def _check_is_ours(place: Target, file: File, listed: set[str], unfinished: bool) -> None:
    """Raises if a file in the way of one of ours is another's: no list names it, or it is a card that was edited there."""
    where = f"{place.url}/{file.name}"
    remedy = "Choose another target, remove the file, or give --replace"
    if not listed:
        raise InputError(where, "a file is there that no publish has sent", remedy)
    if file.name != _CARD or unfinished:
        return
    if hashlib.sha256(place.read(_CARD) or b"").hexdigest() not in listed:
        remedy = f"Write into {file.path} what should stay of it, then give --replace"
        raise InputError(where, "the card was changed there", remedy)


def _parse(text: bytes) -> Iterator[tuple[str, str]]:
    """The names and checksums of a list in the format of sha256sum; other lines are passed over."""
    for line in text.decode("utf-8", "replace").split("\n"):
        if match := _LINE.fullmatch(line):
            yield match[2], match[1]


def _text_file(scratch: Path, name: str, lines: Iterable[tuple[str, str]]) -> File:
    """A list of checksums, as a file in a temporary folder."""
    path = scratch / name
    content = "".join(f"{sha256}  {of}\n" for of, sha256 in sorted(lines)).encode()
    path.write_bytes(content)
    return File(name, path, len(content), hashlib.sha256(content).hexdigest())


def _carry_out(place: Target, plan: _Plan, scratch: Path, progress: Progress) -> None:
    """Sends and removes files, and compares what arrived."""
    left = [UNFINISHED] if UNFINISHED in plan.lists else []
    if not plan.send and not plan.remove and not left:
        return
    with _bar(progress, "send", sum(file.size for file in plan.send)) as advance:
        if place.at_once(len(plan.send) + len(plan.remove) + len(left)):
            place.change(plan.send, [*plan.remove, *left], advance)
            _verify(place, plan.send)
            return
        data = [file for file in plan.send if file.name != SUMS]
        sums = [file for file in plan.send if file.name == SUMS]
        if data or plan.remove:
            lines = {(name, sha256) for name, all_of in plan.listed.items() for sha256 in all_of}
            lines |= {(file.name, file.sha256) for file in [*data, *plan.keep] if file.name != SUMS}
            both = _text_file(scratch, UNFINISHED, lines)
            place.change([both], [SUMS] if SUMS in plan.lists else [], lambda size: None)
            left, sums = [UNFINISHED], [_listing(plan)]
            place.change(data, [], advance)
            _verify(place, data)
            place.change([], plan.remove, advance)
        place.change(sums, left, advance)
        _verify(place, sums)


def _listing(plan: _Plan) -> File:
    """The list of checksums, whether the one at the target was the same or not."""
    return next(file for file in [*plan.send, *plan.keep] if file.name == SUMS)


def _verify(place: Target, files: Sequence[File]) -> None:
    same = place.compare(files, lambda size: None)
    for file in files:
        if not same.get(file.name):
            problem = (
                "it has another checksum than the file that was sent" if file.name in same else "it did not arrive"
            )
            raise InputError(f"{place.url}/{file.name}", problem, "Start the command again, which sends it again")


@contextmanager
def _bar(progress: Progress, title: str, size: int) -> Iterator[Advance]:
    progress.start(title, size, "bytes")
    try:
        yield progress.advance
    finally:
        progress.end()
