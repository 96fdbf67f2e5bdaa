"""The house as docs/DESIGN.md draws it: imports go down only, no cycles, no peers at run time, nothing too long.

The order is read from the document itself, so that text and test cannot drift apart.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "glasklar"
SOURCE = ROOT / "src" / PACKAGE
PEERS = {"transformers", "trl", "llama_cpp"}
LONGEST_FUNCTION, LONGEST_FILE = 70, 600

Modules = dict[str, ast.Module]


def parse_order(text: str) -> dict[str, tuple[int, int]]:
    """Room -> (level, group), the highest level 0, from the line "`a > b | c > d, e`".

    Rooms joined by `|` do not see each other: they are groups of their own. Rooms joined by commas share a group.
    """
    lines = re.findall(r"^`(cli\b[^`]*>[^`]+)`$", text, re.MULTILINE)
    assert len(lines) == 1, f"docs/DESIGN.md holds {len(lines)} lines of the form `cli > ...`, expected one"
    order = {}
    for level, rooms in enumerate(lines[0].split(" > ")):
        for group, names in enumerate(rooms.split(" | ")):
            for name in names.split(", "):
                assert name.isidentifier(), f"{name!r} in the import order is no room"
                order[name] = (level, group)
    return order


def read_modules(folder: Path) -> Modules:
    """Dotted name -> syntax tree of every module under `folder`, the package's own folder."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return modules


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """Full dotted targets of all imports of a module, those inside functions and TYPE_CHECKING blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(modules: Modules) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports. `from a.b import c` means a.b.c where that is a module."""
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for target in imported(name, tree):
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            if target in modules and target != name:
                edges[name].add(target)
    return edges


def room(module: str) -> str | None:
    """First name below the package; None for the package itself and `python -m glasklar`, which stand above all."""
    parts = module.split(".")
    return None if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def upward(edges: dict[str, set[str]], order: dict[str, tuple[int, int]]) -> list[str]:
    """Imports that do not go down: "importer -> imported". Rooms without a place are another test's business."""
    found = []
    for name, targets in edges.items():
        here = room(name)
        for target in sorted(targets):
            there = room(target)
            if here is None or here == there or here not in order or (there is not None and there not in order):
                continue
            if there is None or not _may_see(order[here], order[there]):
                found.append(f"{name} -> {target}")
    return found


def _may_see(here: tuple[int, int], there: tuple[int, int]) -> bool:
    return here == there or here[0] < there[0]


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead += edges[module]
        return seen

    return [name for name in edges if name in reach(name)]


@pytest.fixture(scope="module")
def modules() -> Modules:
    return read_modules(SOURCE)


@pytest.fixture(scope="module")
def order() -> dict[str, tuple[int, int]]:
    return parse_order((ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8"))


def test_every_module_has_its_place_in_the_order(modules, order):
    homeless = sorted({here for name in modules if (here := room(name)) is not None} - order.keys())
    assert not homeless, f"give {homeless} a place in the import order of docs/DESIGN.md"


def test_imports_go_down_only(modules, order):
    assert upward(graph(modules), order) == []


def test_there_are_no_import_cycles(modules):
    assert cycles(graph(modules)) == []


def test_peers_are_never_imported(modules):
    found = [
        f"{name} -> {target}"
        for name, tree in modules.items()
        for target in imported(name, tree)
        if target.split(".")[0] in PEERS
    ]
    assert found == []


def test_functions_fit_a_screen(modules):
    functions = (
        (name, node)
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = {f"{name}.{f.name}": f.end_lineno - f.lineno + 1 for name, f in functions if f.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


def test_files_fit_a_sitting():
    lines = {path.relative_to(ROOT).as_posix(): _lines(path) for path in SOURCE.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > LONGEST_FILE} == {}


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


# The checks themselves, on a small package.

ORDER = "`cli > serve | rl > model > config, errors`"


def package(**sources: str) -> Modules:
    names = {f"{PACKAGE}.{name.replace('__', '.')}": ast.parse(text) for name, text in sources.items()}
    return {PACKAGE: ast.parse(""), **names}


@pytest.mark.parametrize(
    ("importer", "text", "allowed"),
    [
        ("cli", "from glasklar import serve", True),
        ("cli", "import glasklar.config", True),
        ("config", "from glasklar.errors import X", True),
        ("model__cost", "from glasklar.model import init", True),
        ("model__cost", "from glasklar.serve.app import x", False),
        ("model__cost", "def f():\n    from glasklar import cli", False),
        ("serve__app", "import glasklar.rl.loop", False),
        ("errors", "from glasklar.model import init", False),
        ("model__cost", "from glasklar import load", False),
    ],
)
def test_upward_imports_are_found(importer, text, allowed):
    rooms = dict.fromkeys(
        ("cli", "config", "errors", "model", "model__init", "rl", "rl__loop", "serve", "serve__app"), ""
    )
    edges = graph(package(**(rooms | {importer: text})))
    assert (upward(edges, parse_order(ORDER)) == []) == allowed


def test_cycles_are_found_inside_functions_and_across_names():
    closed = package(model__a="def f():\n    from glasklar.model.b import x", model__b="from glasklar.model import a")
    assert cycles(graph(closed)) == ["glasklar.model.a", "glasklar.model.b"]
    assert cycles(graph(package(model__a="import glasklar.model.b", model__b="import os"))) == []


def test_order_is_read_with_its_separators():
    assert parse_order(ORDER) == {
        "cli": (0, 0), "serve": (1, 0), "rl": (1, 1), "model": (2, 0), "config": (3, 0), "errors": (3, 0),
    }  # fmt: skip
