"""The layout's rule: which way imports go, and how much there is to read."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("handler", "server", "scripts")
FILES = {str(path.relative_to(ROOT)): path for top in TOPS for path in (ROOT / top).rglob("*.py")}
MOST_LINES_OF_A_FILE = 300
# Lines of code of each room of handler/. A room that needs more says why in docs/architecture.md, or is split.
MOST_LINES = {"engine": 3440, "protocols": 1200, "weights": 1620, "kernels": 1560, "": 900}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere."""
    package = list(path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*above, *([node.module] if node.module else [])]))
    return names


def lines_of_code(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in ignored for line in range(t.start[0], t.end[0] + 1)}
    return len(lines - documented)


@pytest.mark.parametrize(
    "folder, never",
    [
        ("handler/", ("scripts", "server")),
        ("handler/engine/", ("handler.protocols", "handler.service", "handler.loading", "handler.checkpoint")),
        ("handler/weights/", ("handler.engine", "handler.protocols", "handler.loading", "handler.checkpoint")),
        (
            "handler/kernels/",
            ("handler.engine", "handler.weights", "handler.protocols", "handler.loading", "handler.checkpoint"),
        ),
        ("handler/protocols/", ("handler.service", "handler.weights", "handler.loading")),
        ("server/", ("handler", "scripts")),
    ],
)
def test_imports_go_one_way(folder, never):
    def is_below(name, parents):
        return any(f"{name}.".startswith(f"{parent}.") for parent in parents)

    found = {file: imports(path) for file, path in FILES.items() if file.startswith(folder)}
    assert found and not {(file, name) for file, names in found.items() for name in names if is_below(name, never)}


def test_one_file_knows_torchserve():
    knowing = {file for file, path in FILES.items() if {name.split(".")[0] for name in imports(path)} & {"ts"}}
    assert knowing == {"handler/service.py"}


def test_a_file_is_read_in_a_sitting_and_a_room_in_an_evening():
    lines = {file: lines_of_code(path) for file, path in FILES.items()}
    assert not {file: count for file, count in lines.items() if count > MOST_LINES_OF_A_FILE}
    rooms = dict.fromkeys(MOST_LINES, 0)
    for file, count in lines.items():
        top, room, *rest = file.split("/")
        if top == "handler":
            rooms[room if rest else ""] += count
    assert not {room: count for room, count in rooms.items() if count > MOST_LINES[room]}
