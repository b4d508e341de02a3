"""What a result depends on, as a key: settings, the content of files, versions of packages, and the code that makes it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

_ROOT = Path(__file__).parent
_PACKAGE = __name__.partition(".")[0]


def digest(*values: Any) -> str:
    """A key of 20 hex digits, made of settings, dataclasses and JSON values."""
    text = json.dumps(_plain(values), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _plain(value: Any) -> Any:
    """The value as JSON's types. Raises TypeError for anything else: the key must not depend on a memory address."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a key cannot be made of {type(value).__name__}")


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def large_file_digest(path: str | os.PathLike[str]) -> str:
    """`file_digest`, computed once as long as the file is not written to."""
    status = os.stat(path)
    return _known_digest(os.fspath(path), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=64)
def _known_digest(path: str, _size: int, _changed: int, _inode: int) -> str:
    return file_digest(path)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide the bytes of the output."""
    names = ("corpusprep", "ftfy", "langcodes", "language-data", "numba", "numpy", "polars", "pyarrow", "tokenizers")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"unicode": unicodedata.unidata_version}


def user_code(references: Iterable[str]) -> list[str]:
    """Digests of the source files of a user's `module:function` references. Imports of those files are not followed."""
    found = []
    for reference in references:
        try:
            spec = importlib.util.find_spec(reference.partition(":")[0])
        except (ImportError, ValueError):
            spec = None
        origin = spec.origin if spec is not None else None
        found.append(file_digest(origin) if origin and os.path.isfile(origin) else reference)
    return found


# ----------------------------------------------------------------------------------------------------------------- code


def code_digest(*objects: Callable[..., Any]) -> str:
    """A digest of the code that functions or classes of this package run: the source text of their modules and of every
    module of the package that these import, however indirectly.

    A part that was made by other code has another key, and is made again. Nothing has to be listed by hand. Of a module outside
    the package the file itself counts.

    Raises:
        TypeError: an object is not a function or class of a module with a file, such as a `functools.partial`.
    """
    names = set()
    for each in objects:
        if not isinstance(each, type | types.FunctionType):
            raise TypeError(f"{each!r} is not a function or a class: its code has no key")
        names.add(each.__module__)
    return _modules_digest(tuple(sorted(names)))


@functools.cache
def _modules_digest(names: tuple[str, ...]) -> str:
    state = hashlib.sha256()
    files = imported_modules(*names)
    for name in names:
        if name not in files:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is None:
                raise TypeError(f"the module {name} has no file: its code has no key")
            files[name] = Path(file)
    for name, path in sorted(files.items()):
        state.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:20]


def imported_modules(*names: str) -> dict[str, Path]:
    """The modules of this package that modules import, themselves included, with their files, sorted by name.

    Imports inside functions count. Those under `if TYPE_CHECKING:` do not, as they are never executed. Of a package that is
    only imported on the way to one of its modules (`a` on the way to `a.b`), only the imports at its top level are executed,
    and only those are followed.

    Args:
        names: full names, as in `corpusprep.steps.dedup`.
    """
    whole: set[str] = set()  # imported by name: any of their functions may be called
    passed: set[str] = set()  # packages on the way
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in whole or (path := _file_of(name)) is None:
            continue
        whole.add(name)
        found = list(_imports_of(path.read_text(encoding="utf-8")).names)
        above = name.rpartition(".")[0]
        while above:
            if above not in passed | whole and (package := _file_of(above)) is not None:
                passed.add(above)
                found += _imports_of(package.read_text(encoding="utf-8")).at_top
            above = above.rpartition(".")[0]
        todo += found
    return {name: path for name in sorted(whole | passed) if (path := _file_of(name)) is not None}


class Imports(NamedTuple):
    """The modules of this package that one file imports: anywhere, and at its top level."""

    names: tuple[str, ...]
    at_top: tuple[str, ...]


_IMPORT = re.compile(
    rf"^(?P<indent>[ \t]*)(?:from[ \t]+(?P<module>{_PACKAGE}(?:\.\w+)*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n(]+)"
    rf"|import[ \t]+(?P<plain>{_PACKAGE}[\w., \t]*)|(?P<types>if[ \t]+TYPE_CHECKING:)|(?P<other>[^\s#]))",
    re.MULTILINE,
)


@functools.cache
def _imports_of(text: str) -> Imports:
    """Looks through the text of a file for import statements, many times as fast as by parsing it; the tests compare the two."""
    names: dict[str, None] = {}
    at_top: dict[str, None] = {}
    types: int | None = None  # the indentation of the `if TYPE_CHECKING:` whose block this is
    for match in _IMPORT.finditer(text):
        depth = len(match["indent"])
        if types is not None and depth > types:
            continue
        types = depth if match["types"] else None
        found = _named(match)
        names.update(dict.fromkeys(found))
        if depth == 0:
            at_top.update(dict.fromkeys(found))
    return Imports(tuple(names), tuple(at_top))


def _named(match: re.Match[str]) -> list[str]:
    """The modules that one import statement names."""
    if match["plain"]:
        return [part.split()[0] for part in match["plain"].split(",") if part.strip()]
    if not match["module"]:
        return []
    text = re.sub(r"#[^\n]*", "", match["names"]).strip("() \t")
    below = [f"{match['module']}.{part.split()[0]}" for part in text.split(",") if part.strip()]
    modules = [name for name in below if _file_of(name) is not None]
    # `from package import module` imports the package on the way only, but for what else it names.
    return modules if len(modules) == len(below) else [match["module"], *modules]


def _file_of(name: str) -> Path | None:
    """The file of a module of this package; None where there is no such module."""
    package, _, rest = name.partition(".")
    if package != _PACKAGE:
        return None
    base = _ROOT.joinpath(*rest.split(".")) if rest else _ROOT
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None
