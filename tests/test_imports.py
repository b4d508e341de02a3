"""Imports run downward: no module imports one of a higher layer, and none imports itself by a detour."""

from __future__ import annotations

import ast
from pathlib import Path

import corpusprep

PACKAGE = Path(corpusprep.__file__).parent
LAYERS = [
    "errors",
    "kernels keys",
    "codes arrow",
    "stage",
    "store engines report",
    "sources",
    "stages",
    "training.layers training.settings",
    "recipe parts",
    "derive",
    "steps",
    "pipeline",
    "training commands",
    "cli",
    "__main__",
]
"""From the bottom up; modules of one line do not import each other, but for those of one folder."""
_FACADES = {"corpusprep", "corpusprep.training"}
"""Packages that import what they offer when it is first used: for type checkers they name what lies above them."""


def modules() -> dict[str, Path]:
    found = {}
    for folder in (PACKAGE, PACKAGE / "stages"):  # a link, which is not followed below the first
        for path in sorted(folder.rglob("*.py")):
            parts = ["corpusprep", *path.relative_to(PACKAGE).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, types: bool = False) -> set[str]:
    """The modules of the package that a file imports at any place; those of TYPE_CHECKING blocks only with `types`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            and not types
        ):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            # `from package import module` imports the module; what else is named comes from the package itself.
            found.update(below)
            if len(below) < len(node.names):
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def layer(module: str) -> int:
    """The place of a module in `LAYERS`, by the longest name given there that it is or lies in."""
    inside = module.removeprefix("corpusprep.")
    named = {name: number for number, line in enumerate(LAYERS) for name in line.split()}
    while inside:
        if inside in named:
            return named[inside]
        inside = inside.rpartition(".")[0]
    raise AssertionError(f"{module} has no layer: give it one")


def folder(module: str) -> str:
    return module.split(".")[1]


def test_no_import_runs_upward() -> None:
    """Not for a type either. Within a folder order is free, as the modules of a stage name the types of its settings."""
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in sorted(imports(path, types=True) - {"corpusprep"})
        if module not in _FACADES and layer(other) >= layer(module) and folder(module) != folder(other)
    ]
    assert not wrong


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: imports(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_house_is_in_order() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 14
    root = PACKAGE.parent
    sources = [path for name in ("corpusprep", "stages", "tests", "examples") for path in (root / name).rglob("*.py")]
    long = [str(path.relative_to(root)) for path in sources if path.read_text(encoding="utf-8").count("\n") > 600]
    assert not long
