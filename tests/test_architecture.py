"""The code keeps to docs/architecture.md: levels, imports, sizes, and a front door that loads nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinybert

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "tinybert"
ROOMS = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "datasets", "numpy")
VAGUE = {"utils", "util", "common", "base", "helpers", "helper", "misc", "tools", "lib"}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def table() -> list[tuple[str, int]]:
    """Every room in the table of docs/architecture.md with its level."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if re.match(r"\|\s*level\s*\|\s*room\s*\|", line))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        level, rooms = (cell.strip() for cell in line.split("|")[1:3])
        rows += [(room, int(level)) for room in re.findall(r"`([^`]+)`", rooms)]
    return rows


LEVELS = dict(table())


def imported_rooms(room: str) -> Iterator[tuple[str, int]]:
    """Each room that a room imports, at the top or inside a function, with the line."""
    for node in ast.walk(ast.parse((SOURCE / room).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}:{node.lineno} imports relatively"
            # ``from tinybert import models``: the room is among the names.
            bare = node.module == "tinybert"
            names = [f"tinybert.{alias.name}" for alias in node.names] if bare else [str(node.module)]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "tinybert":
                yield (f"{rest.split('.')[0]}.py" if rest else "__init__.py"), node.lineno


def test_the_table_lists_every_room_once_and_no_other() -> None:
    """A room that is not in the table has no level, and nobody said what it is for."""
    listed = [room for room, _ in table()]
    assert len(ROOMS) > 10
    assert sorted(listed) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_of_lower_levels(room: str) -> None:
    """Imports that point up or sideways make a knot that can only be changed as a whole."""
    for imported, line in imported_rooms(room):
        assert imported in LEVELS, f"{room}:{line} imports {imported}, which is no room"
        assert LEVELS[imported] < LEVELS[room], f"{room}:{line} imports {imported}"


def test_the_imports_are_seen() -> None:
    """The test above would hold of anything if it found no imports."""
    assert {room for room, _ in imported_rooms("stages.py")} >= {"models.py", "data.py", "trainer.py"}
    assert {room for room, _ in imported_rooms("cli.py")} >= {"stages.py", "errors.py", "trainer.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_files_and_functions_are_short(room: str) -> None:
    """What does not fit on a screen or two is not read before it is changed."""
    text = (SOURCE / room).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{room}:{node.lineno} {node.name} has {lines} lines"


def test_no_room_is_called_after_nothing_in_particular() -> None:
    """``utils`` is where things go that nobody can find again."""
    parts = {part for room in ROOMS for part in Path(room).with_suffix("").parts}
    assert parts.isdisjoint(VAGUE)


@pytest.mark.parametrize(
    "statement",
    [
        "import tinybert; dir(tinybert)",
        "import tinybert.cli",
        "import sys; from tinybert.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import tinybert", "import tinybert.cli", "tinybert --help"],
)
def test_the_front_door_loads_nothing_heavy(statement: str) -> None:
    """Help that takes ten seconds is not asked for twice."""
    check = f"import sys; print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_every_public_name_is_there_and_they_are_few() -> None:
    """A name that is listed but cannot be imported fails only at the user's."""
    assert 1 < len(tinybert.__all__) <= 10
    for name in tinybert.__all__:
        assert getattr(tinybert, name).__name__ == name
        assert name in dir(tinybert)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tinybert.nothing
