"""The house's walls: which room may import which, and which must open without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sanity

PACKAGE = Path(sanity.__file__).parent
STRANGERS = ("images", "models", "randomization", "attributions", "similarity")
WITHOUT_TORCH = ("records", "summary", "gate", "report")


def rooms() -> list[str]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files)


def imports(room: str) -> set[str]:
    """Rooms of the package that a room's file imports, at the top or inside a function."""
    path = PACKAGE.joinpath(*room.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sanity":
            module = (node.module or "").removeprefix("sanity").removeprefix(".")
            found |= {module} if module else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sanity.") for alias in node.names if alias.name.startswith("sanity.")}
    return found


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_side_by_side_do_not_know_one_another(room: str) -> None:
    inner = [name for name in rooms() if name.split(".")[0] == room] + ([room] if room == "attributions" else [])
    known = {top.split(".")[0] for name in inner for top in imports(name)}
    assert not known & (set(STRANGERS) - {room})


def test_data_walks_one_way() -> None:
    """No circle of imports at the top of modules."""
    graph = {room: {name for name in imports(room) if name in rooms()} for room in rooms()}
    lazy = {("run", "session"), ("cli", "plan")}

    def reach(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, f"circle: {' -> '.join((*seen, room))}"
        for further in graph[room]:
            if (room, further) not in lazy:
                reach(further, (*seen, room))

    for room in graph:
        reach(room, ())


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_a_stored_run_is_read_without_torch(room: str) -> None:
    if not (PACKAGE / f"{room}.py").exists() and not (PACKAGE / room).is_dir():
        pytest.skip(f"no room {room} yet")
    program = f"import sys; sys.modules['torch'] = None; import sanity.{room}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packages_face_imports_nothing_that_a_verb_runs_twice() -> None:
    program = "import runpy, sys; sys.argv = ['run', '--list']; runpy.run_module('sanity.run', run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "guided_backprop" in done.stdout
