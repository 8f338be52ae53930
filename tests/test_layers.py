"""Which file may import what: `mmoe <- zoo <- train <- demos`, and heavy libraries only where they belong.

Every file's syntax tree is read, so an import inside a function or under `if TYPE_CHECKING` counts too:

* an upward import (say `zoo` in a file of `mmoe`) is wrong anywhere, `import_module("zoo.card")` included;
* a library at module level has to be on the file's list below; it runs whenever the module is imported;
* a backbone library may not be touched by `mmoe` and by zoo's own modules at all, only by the families.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ("mmoe", "zoo", "train", "demos")
BACKBONES = {"open_clip", "timm", "transformers", "diffusers"}

# Libraries at module level. rich and matplotlib are on no list: they are imported by the function that prints or draws.
CORE = {"torch", "numpy", "safetensors"}
ZOO = CORE | {"yaml", "PIL", "huggingface_hub"}
TRAIN = ZOO | {"torchvision", "pydantic", "accelerate", "peft", "sklearn", "scipy"}
DEMOS = TRAIN | {"gradio", "gradio_client"}
LIBRARIES = {"mmoe": CORE, "zoo": ZOO, "zoo family": ZOO | BACKBONES | {"torchvision"}, "train": TRAIN, "demos": DEMOS}
COMMAND_LINE = {  # these may import typer as well
    "mmoe/cli.py",
    "zoo/cli.py",
    "zoo/convert.py",
    "zoo/doctor.py",
    "zoo/predict.py",
    "train/cli.py",
    "train/bench/cli.py",
    "demos/cli.py",
    "demos/tour.py",
}


@dataclass(frozen=True)
class Import:
    """One import: the top-level name, its line, whether it runs with the module, whether it is for types only."""

    name: str
    line: int
    at_module_level: bool
    typing_only: bool


def imports(tree: ast.AST, package: str, at_module_level: bool = True, typing_only: bool = False) -> Iterator[Import]:
    """All imports below a node, relative ones resolved within `package` (the file's dotted folder)."""
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names = [".".join([*above, node.module or ""]).strip(".")]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names = [first.value]
            elif isinstance(first, ast.JoinedStr) and isinstance(first.values[0], ast.Constant):
                names = [str(first.values[0].value)]
        for name in names:
            line = getattr(node, "lineno", 0)
            yield Import(name.split(".")[0], line, at_module_level, typing_only)
        runs = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        yield from imports(node, package, runs, typing)


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(path: str, source: str) -> list[str]:
    """What is wrong in one file, given its path from the root, such as "zoo/clip_moe/model.py"."""
    parts = path.split("/")
    layer = parts[0]
    kind = "zoo family" if layer == "zoo" and len(parts) > 2 else layer
    allowed = LIBRARIES[kind] | ({"typer"} if path in COMMAND_LINE else set())
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    wrong = []
    for found in imports(ast.parse(source), ".".join(parts[:-1])):
        where = f"{path}:{found.line}: "
        if found.name in above:
            wrong.append(f"{where}{layer} may not import {found.name}")
        elif found.name in LAYERS or found.name in sys.stdlib_module_names or not found.name:
            continue
        elif found.name in BACKBONES and kind in ("mmoe", "zoo"):
            wrong.append(f"{where}{found.name} belongs in the folder of a family")
        elif found.at_module_level and not found.typing_only and found.name not in allowed:
            wrong.append(f"{where}{found.name} may not be imported at module level here")
    return wrong


FILES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_layers(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_layer_has_files() -> None:
    assert {path.split("/")[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("mmoe/a.py", "import zoo", "mmoe/a.py:1: mmoe may not import zoo"),
        ("mmoe/a.py", "def f():\n    from zoo.card import Card", "mmoe/a.py:2: mmoe may not import zoo"),
        ("mmoe/a.py", "from importlib import import_module\nimport_module('demos.app')", "may not import demos"),
        ("mmoe/a.py", "import_module(f'zoo.{name}')", "may not import zoo"),
        ("zoo/a.py", "if TYPE_CHECKING:\n    import train", "zoo may not import train"),
        ("zoo/a.py", "import tests.conftest", "zoo may not import tests"),
        ("train/a.py", "from demos import app", "train may not import demos"),
        ("mmoe/a.py", "import yaml", "yaml may not be imported at module level here"),
        ("mmoe/a.py", "try:\n    import PIL\nexcept ImportError:\n    PIL = None", "PIL may not be imported"),
        ("mmoe/a.py", "class A:\n    import rich", "rich may not be imported at module level"),
        ("mmoe/a.py", "import typer", "typer may not be imported"),
        ("mmoe/a.py", "def f():\n    import timm", "timm belongs in the folder of a family"),
        ("zoo/card.py", "import transformers", "transformers belongs in the folder of a family"),
        ("zoo/card.py", "import torchvision", "torchvision may not be imported"),
        ("zoo/x/model.py", "import pydantic", "pydantic may not be imported at module level here"),
        ("train/a.py", "import timm", "timm may not be imported at module level here"),
        ("train/a.py", "import gradio", "gradio may not be imported at module level here"),
        ("demos/a.py", "import matplotlib.pyplot as plt", "matplotlib may not be imported at module level here"),
    ],
)
def test_the_check_finds(path: str, source: str, message: str) -> None:
    (only,) = violations(path, source)
    assert message in only


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mmoe/a.py", "from __future__ import annotations\nimport torch, numpy, os\nfrom . import routing"),
        ("mmoe/a.py", "def draw():\n    import matplotlib\n    import rich.table"),
        ("mmoe/a.py", "if TYPE_CHECKING:\n    from PIL import Image"),
        ("mmoe/cli.py", "import typer"),
        ("zoo/card.py", "import yaml\nimport mmoe\nfrom PIL import Image\nimport huggingface_hub"),
        ("zoo/x/model.py", "import open_clip\nfrom ..model import Model\nfrom torchvision import transforms"),
        ("train/engine.py", "import accelerate\nimport zoo\ndef f():\n    import transformers"),
        ("demos/app.py", "import gradio as gr\nimport train, zoo, mmoe"),
    ],
)
def test_the_check_lets_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_relative_imports_are_resolved() -> None:
    found = imports(ast.parse("from . import a\nfrom ..model import b\nfrom .c import d"), "zoo.clip_moe")
    assert [one.name for one in found] == ["zoo", "zoo", "zoo"]


@pytest.mark.parametrize("package", ["mmoe", "zoo"])
def test_import_is_light(package: str, tmp_path: Path) -> None:
    heavy = sorted(BACKBONES | {"torch", "torchvision", "gradio", "accelerate", "peft", "sklearn", "pydantic"})
    code = f"import sys, {package}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
