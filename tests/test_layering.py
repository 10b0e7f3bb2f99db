"""The house keeps its shape: imports go downward, none goes round in a circle, CONTRIBUTING's map is complete."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.places import ROOT

FLOORS = ("apm", "benchmarks", "cli")  # from the ground up: each may import from those before it
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def module_of(path: Path) -> str:
    """The name under which a file is imported once installed: `cli/main.py` → ``apm.cli.main``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "apm" else ("apm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, anywhere in it."""
    own = module_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                if name in MODULES or module in MODULES:
                    yield name if name in MODULES else module


def floor_of(module: str) -> str:
    return next((floor for floor in FLOORS[1:] if f"{module}.".startswith(f"apm.{floor}.")), "apm")


def room_of(module: str) -> str:
    """The folder below a floor that a module is in: ``apm.student``; of a module right on a floor: its own name."""
    depth = 2 if floor_of(module) == "apm" else 3
    return ".".join(module.split(".")[:depth])


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, as its stations; empty when there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        path.append(node)
        for following in sorted(edges.get(node, ())):
            if state.get(following) == 1:
                return [*path[path.index(following) :], following]
            if following not in state and (found := visit(following)):
                return found
        path.pop()
        state[node] = 2
        return []

    return next((found for node in sorted(edges) if node not in state and (found := visit(node))), [])


@cache
def edges() -> dict[str, set[str]]:
    """Which modules each module imports."""
    return {module: set(imported(path)) - {module} for module, path in MODULES.items()}


def test_the_reader_of_imports_sees_them() -> None:
    assert "apm.student.engine" in edges()["apm.test_time.trainer"]  # absolute
    assert "apm.benchmarks.runs.records" in edges()["apm.benchmarks.runs.runner"]  # relative
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_imports_go_downward() -> None:
    upward = [
        f"{module} imports {name}"
        for module, names in edges().items()
        for name in names
        if module != "apm.__main__"  # the installed command starts here
        and FLOORS.index(floor_of(name)) > FLOORS.index(floor_of(module))
    ]
    assert upward == []


def test_no_file_imports_itself_by_a_detour() -> None:
    # A package's __init__ gathers what its files hold, and is imported with each of them: it is no station of its own
    gathered = {m for m, path in MODULES.items() if path.name == "__init__.py"}
    assert circle({m: names - gathered for m, names in edges().items() if m not in gathered}) == []


def test_no_room_needs_one_that_needs_it() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, names in edges().items():
        if module not in ("apm", "apm.__main__"):
            rooms[room_of(module)] |= {room_of(name) for name in names if name != "apm"} - {room_of(module)}
    assert circle(rooms) == []


def test_the_map_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.parent for path in FILES if path.name == "__init__.py"}
    assert [str(room.relative_to(ROOT)) for room in sorted(rooms) if f"{room.relative_to(ROOT)}/" not in text] == []
