"""Moses: `corpus.en` beside `corpus.sw`, and the zips in which OPUS ships them."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable

from corpusprep.codes import canonical
from corpusprep.errors import InputError
from corpusprep.sources.base import Found, is_language, named_pair, pair_name
from corpusprep.sources.files import Tree, find, find_prefix, printable, unpacked_name
from corpusprep.sources.remedies import or_keep
from corpusprep.sources.settings import split_in_path
from corpusprep.sources.sides import LinePairSource, one_sided
from corpusprep.sources.zips import open_zip, unsafe_member

# Suffixes of files that stand beside corpora and are codes of some language as well.
_NOT_LANGUAGES = frozenset(
    {"txt", "tsv", "csv", "xml", "htm", "html", "json", "md", "pdf", "doc", "zip", "tar", "tgz", "gz", "bz2", "xz"}
    | {"zst", "log", "ids", "idx", "bin", "cfg", "ini", "yml", "yaml", "sh", "py", "src", "tgt", "ref", "hyp", "aln"}
    | {"score", "scores", "meta", "info"}
)


class MosesSource(LinePairSource):
    """Line pairs whose two files differ in their suffix, which is the language."""

    def _find(self) -> list[Found]:
        path = self.settings.path
        tree = find_prefix(path) or find(path)
        zips = [name for name in tree.names if name.endswith(".zip")]
        found = self._pairs(tree, (name for name in tree.names if not name.endswith(".zip")))
        for name in zips:
            found.extend(self._zip(tree, name))
        return found

    def _pairs(self, tree: Tree, names: Iterable[str]) -> list[Found]:
        found = []
        for stem, sides in _stems(names).items():
            pairs = _pairs_of(stem, sides)
            if not pairs and tree.single:
                raise InputError(
                    printable(self.settings.path),
                    f"it is one side of a line pair ({', '.join(map(printable, sorted(sides.values())))})",
                    "Name the prefix that both files share, without the language, and check that both are there",
                )
            named = _named(stem)
            if not pairs and named and any(canonical(side) in map(canonical, named) for side in sides):
                found.append(one_sided(self.settings, tree, stem, named, split_in_path(stem), sides))
            for pair in pairs:
                shard = pair_name(stem, pair, len(pairs))
                files = tuple(tree.path(sides[language]) for language in pair)
                found.append(Found(shard, files, pair, self._split(tree, stem)))
        return found

    def _zip(self, tree: Tree, name: str) -> list[Found]:
        path, split = tree.path(name), self._split(tree, name)
        lost: list[str] = []
        try:
            with open_zip(path) as archive:
                infos = archive.infolist()
            self._zips[path] = {info.filename: info for info in infos}
            members = []
            for info in infos:
                fault = unsafe_member(info)
                if fault is None:
                    if info.filename and not info.filename.endswith("/"):  # is_dir fails where there is no name
                        members.append(info.filename)
                    continue
                shown = printable(info.orig_filename)
                problem = f"its member {shown!r} {fault}"
                remedy = ("Do not trust it", or_keep("to read its other members", "; "))
                raise_or_note(InputError(printable(path), problem, remedy), self.settings.on_error, lost)
            stems = _stems(member for member in members if not _beside(member))
            pairs = [(stem, pair) for stem, sides in stems.items() for pair in _pairs_of(stem, sides)]
            if not pairs:
                problem = "it holds no line pair, that is two members that differ in a suffix which is a language"
                raise_or_note(
                    InputError(printable(path), problem, "Check that it is an OPUS zip of the kind Moses"),
                    self.settings.on_error,
                    lost,
                )
        except InputError as error:
            if self.settings.on_error == "stop":
                raise
            return [Found(name, (path,), _named(name), split, lost=(f"{error.file}: {error.problem}.",))]
        if not pairs:
            return [Found(name, (path,), _named(name), split, lost=tuple(lost))]
        found = []
        for stem, pair in pairs:
            shard = name if len(pairs) == 1 else pair_name(f"{name}/{stem}", pair, len(pairs))
            ends = tuple(stems[stem][language] for language in pair)
            found.append(Found(shard, (path,), pair, split, members=ends, lost=tuple(lost)))
        return found

    def _split(self, tree: Tree, name: str) -> str:
        return self.settings.splits[0] if tree.single else split_in_path(name)


def raise_or_note(error: InputError, on_error: str, lost: list[str]) -> None:
    """Raises the error where the settings say to stop, else notes it."""
    if on_error == "stop":
        raise error
    lost.append(f"{error.file}: {error.problem}.")


def _beside(member: str) -> bool:
    return member.startswith("__MACOSX/") or posixpath.basename(member).startswith(".")


def _stems(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Stems, and for each the files by the code of their suffix; a plain file goes before a packed one."""
    stems: dict[str, dict[str, str]] = {}
    for name in names:
        stem, dot, suffix = unpacked_name(name).rpartition(".")
        if not dot or not posixpath.basename(stem) or suffix.lower() in _NOT_LANGUAGES or not is_language(suffix):
            continue
        sides = stems.setdefault(stem, {})
        sides[suffix] = min(name, sides.get(suffix, name), key=len)
    return stems


def _named(stem: str) -> tuple[str, str] | None:
    """The pair that a stem such as `NLLB.en-sw` names in its file name."""
    for part in reversed(posixpath.basename(stem).split(".")):
        pair = named_pair(part)
        if pair:
            return pair
    return None


def _pairs_of(stem: str, sides: dict[str, str]) -> list[tuple[str, str]]:
    """The pairs that a stem's files make: the one that it names, if it names one, else each two languages."""
    named = _named(stem)
    codes = sorted(sides)
    pairs = [(a, b) for a, b in itertools.combinations(codes, 2) if canonical(a) != canonical(b)]
    if named is None:
        return pairs
    languages = {canonical(code) for code in named}
    return [pair for pair in pairs if {canonical(code) for code in pair} == languages]
