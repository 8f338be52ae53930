"""Recorded tensors of the authors' code: where they are, and a ledger that shows which were compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


class Recording:
    """One family's recorded tensors; remembers which were read and which were compared.

    Args:
        family: folder name below $MMOE_PARITY, or below the copies in this repository.
    """

    def __init__(self, family: str) -> None:
        root = Path(os.environ.get("MMOE_PARITY", Path(__file__).parent / "data"))
        self.folder = root / family
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.files = {path.stem: load_file(path) for path in sorted(self.folder.glob("*.safetensors"))}
        self.inputs: set[str] = set()
        self.compared: set[str] = set()

    def json(self, name: str) -> Any:
        """A JSON file of the folder; reading it counts as comparing it."""
        self.compared.add(name)
        return json.loads((self.folder / f"{name}.json").read_text())

    def take(self, file: str, name: str) -> Tensor:
        """A tensor that goes into the computation."""
        self.inputs.add(f"{file}:{name}")
        value = self.files[file][name]
        return value.float() if value.is_floating_point() else value

    def take_all(self, file: str, prefix: str) -> dict[str, Tensor]:
        """All tensors below a prefix that go into the computation, by the rest of their names."""
        return {name[len(prefix) :]: self.take(file, name) for name in self.files[file] if name.startswith(prefix)}

    def check(self, file: str, name: str, found: Tensor, tolerance: float = 1e-5) -> None:
        """Compares a result with a recorded tensor: |a - b| <= tolerance * (1 + max|b|), equal for integers."""
        self.compared.add(f"{file}:{name}")
        expected = self.files[file][name]
        found = found.detach().reshape(expected.shape)
        if not expected.is_floating_point():
            assert torch.equal(found.to(expected.dtype), expected), f"{file}:{name}"
            return
        error = (found.float() - expected.float()).abs().max().item()
        bound = tolerance * (1 + expected.float().abs().max().item())
        assert error <= bound, f"{file}:{name} differs by {error:.2e}, allowed {bound:.2e}"

    def untouched(self) -> list[str]:
        """Recorded tensors that were neither an input nor compared."""
        names = {f"{file}:{name}" for file, tensors in self.files.items() for name in tensors}
        return sorted(names - self.inputs - self.compared)


@pytest.fixture(scope="module")
def recording(request: pytest.FixtureRequest) -> Recording:
    """The recording of the family that the module's FAMILY names."""
    return Recording(request.module.FAMILY)


@pytest.fixture
def whole_module(request: pytest.FixtureRequest) -> None:
    """Skips a test that needs all others of its module where only some were selected."""
    ran = {i.name.split("[")[0] for i in request.session.items if getattr(i, "module", None) is request.module}
    if ran != {name for name in vars(request.module) if name.startswith("test_")}:
        pytest.skip("only part of this module was selected")
