"""How files look: names that say what they hold, sizes, docstrings, nothing of one developer's machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGES = ("mmoe", "zoo", "train", "demos")
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
LIBRARY_LINES, FAMILY_LINES, FUNCTION_LINES = 400, 600, 60
TEXT = {
    "",
    ".cfg",
    ".css",
    ".html",
    ".in",
    ".js",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".svg",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
}

# A home folder or a checkout's folder, not part of a URL or of a longer path.
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|Users|root|work)/[A-Za-z0-9_.]|\b[A-Z]:\\\\?Users\\")


def repository_files() -> list[str]:
    """Files of the repository that git does not ignore, from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in listed.split("\0") if path and (ROOT / path).is_file())


def python_faults(path: str, source: str) -> Iterator[str]:
    """What is wrong with one Python file of the packages."""
    stem = path.rsplit("/", 1)[-1].removesuffix(".py")
    if stem in VAGUE:
        yield f"{path}: the name says nothing; name it after what it holds"
    parts = path.split("/")
    limit = FAMILY_LINES if parts[0] == "zoo" and len(parts) > 2 else LIBRARY_LINES
    lines = len(source.splitlines())
    if lines > limit:
        yield f"{path}: {lines} lines, {limit} are allowed"
    tree = ast.parse(source)
    if not ast.get_docstring(tree):
        yield f"{path}: no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = function_lines(node)
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} are allowed"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from `def` to its end, its docstring left out."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node):
        length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return length


def machine_paths(path: str, text: str) -> list[str]:
    """Lines with an absolute path of somebody's machine."""
    return [
        f"{path}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


FILES = repository_files()
PYTHON = [path for path in FILES if path.endswith(".py") and path.split("/")[0] in PACKAGES]


@pytest.mark.parametrize("path", PYTHON)
def test_python_file(path: str) -> None:
    assert list(python_faults(path, (ROOT / path).read_text(encoding="utf-8"))) == []


def test_every_test_module_says_what_it_tests() -> None:
    tests = [path for path in FILES if path.startswith("tests/") and path.endswith(".py")]
    assert [path for path in tests if not ast.get_docstring(ast.parse((ROOT / path).read_text()))] == []


def test_no_path_of_a_developers_machine() -> None:
    found = []
    for path in FILES:
        file = ROOT / path
        if file.suffix in TEXT and file.stat().st_size < 2_000_000:
            found += machine_paths(path, file.read_text(encoding="utf-8"))
    assert found == []


def test_one_version() -> None:
    import tomllib

    import mmoe

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mmoe.__version__


def test_every_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    def plain(name: str) -> str:
        return re.split(r"[^\w.-]", name)[0].lower().replace("_", "-")

    assert sorted({plain(name) for name in wanted} - {plain(name) for name in pins} - {project["name"]}) == []


LONG = "def f():\n" + "    x = 1\n" * 60


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("mmoe/utils.py", '"""A."""\n', "the name says nothing"),
        ("zoo/clip_moe/helpers.py", '"""A."""\n', "the name says nothing"),
        ("mmoe/a.py", '"""A."""\n' + "x = 1\n" * 400, "401 lines, 400 are allowed"),
        ("zoo/card.py", '"""A."""\n' + "x = 1\n" * 400, "401 lines, 400 are allowed"),
        ("zoo/clip_moe/a.py", '"""A."""\n' + "x = 1\n" * 600, "601 lines, 600 are allowed"),
        ("train/a.py", "x = 1\n", "no module docstring"),
        ("demos/a.py", f'"""A."""\n{LONG}', "f has 61 lines, 60 are allowed"),
        ("demos/a.py", f'"""A."""\nclass A:\n    async {LONG}'.replace("\n    x", "\n        x"), "f has 61 lines"),
    ],
)
def test_the_check_finds(path: str, source: str, message: str) -> None:
    (only,) = python_faults(path, source)
    assert message in only


def test_the_check_lets_pass() -> None:
    documented = 'def f():\n    """Says\n\n    much."""\n' + "    x = 1\n" * 59
    assert list(python_faults("mmoe/a.py", f'"""A."""\n{documented}')) == []
    assert list(python_faults("zoo/clip_moe/a.py", '"""A."""\n' + "x = 1\n" * 599)) == []


@pytest.mark.parametrize("folder", ["home/me", "Users/me", "root/x", "work/main"])
def test_the_check_finds_machine_paths(folder: str) -> None:
    assert machine_paths("a.md", f"see `/{folder}/mmoe`") != []
    assert machine_paths("a.md", f"see https://a.org/{folder} and ~/{folder} and assets/{folder}") == []
