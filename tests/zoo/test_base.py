"""Models on the weights of another one: what is saved, what is loaded, and what is told when the base is not right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, Offline, UnknownWeights
from zoo import loading
from zoo.base import check_parts
from zoo.card import Card, Weights
from zoo.model import Model
from zoo.weights import file_sha256


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 4
    base: str | None = None
    base_sha256: str | None = None


class Adapted(Model):
    """A head on a backbone, whose base is a file of plain names."""

    family = "adapted"
    config_class = Config
    base_tensors: ClassVar[dict[str, tuple[str, ...]]] = {"backbone": ("backbone.*",)}
    preprocessing: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backbone = nn.Sequential(nn.Linear(config.width, config.width), nn.BatchNorm1d(config.width))
        self.head = nn.Linear(config.width, 2)

    def from_base(self, state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {f"backbone.{name}": value for name, value in state.items()}


OWN = {"head.weight", "head.bias"}


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "family_class", lambda family: Adapted)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file({name: value.clone() for name, value in Adapted(Config()).backbone.state_dict().items()}, path)
    return path


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Adapted:
    """The base loaded, its head random."""
    Adapted(Config(base=str(base))).save(tmp_path / "start")
    return load(tmp_path / "start", "base", base=str(base))


def load(folder: Path, weights: Any = True, **options: Any) -> Any:
    return zoo.load(folder, weights, device="cpu", **options)


def saved(folder: Path) -> tuple[set[str], dict[str, Any]]:
    return set(load_file(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())["config"]


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(value.equal(theirs[name]) for name, value in one.state_dict().items())


def test_the_base_alone(model: Adapted, base: Path) -> None:
    report = model.load_report
    assert set(report.missing) == OWN and set(report.from_base) == set(report.matched) != set()
    assert report.base == report.source == str(base)
    assert model.backbone.state_dict()["0.weight"].equal(load_file(base)["0.weight"])


def test_only_its_own_is_saved_and_all_is_loaded(model: Adapted, base: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    names, config = saved(tmp_path / "saved")
    assert names == OWN
    assert config == {"width": 4, "base": str(base), "base_sha256": file_sha256(base)}
    again = load(tmp_path / "saved")
    assert same(again, model)
    report = again.load_report
    assert report.random == 0 and set(report.from_base) == set(model.state_dict()) - OWN and report.base == str(base)
    assert f"{len(report.from_base)} of them from the base {base}" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["base"] == str(base)
    again.save(tmp_path / "twice")
    assert saved(tmp_path / "twice") == (names, config)


def test_a_trained_base_is_saved_whole(model: Adapted, base: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model.backbone[0].bias[0] += 1e-3
    model.save(tmp_path / "saved")
    names, config = saved(tmp_path / "saved")
    assert names == set(model.state_dict())
    assert config["base"] is None and config["base_sha256"] is None
    base.unlink()
    again = load(tmp_path / "saved")
    assert same(again, model) and again.load_report.from_base == ()


def test_buffers_count_too(model: Adapted, tmp_path: Path) -> None:
    model.backbone[1].num_batches_tracked += 1
    model.save(tmp_path / "saved")
    assert saved(tmp_path / "saved")[0] == set(model.state_dict())


def test_a_random_backbone_is_not_called_the_base(base: Path, tmp_path: Path) -> None:
    Adapted(Config(base=str(base))).save(tmp_path / "saved")
    names, config = saved(tmp_path / "saved")
    assert names > OWN and config["base"] is None
    assert load(tmp_path / "saved", False).load_report is None


def test_half_precision(model: Adapted, tmp_path: Path) -> None:
    model.bfloat16().save(tmp_path / "saved")
    assert saved(tmp_path / "saved")[0] == OWN
    assert same(load(tmp_path / "saved", dtype="bf16"), model)
    model.to(torch.float32).save(tmp_path / "rounded")  # no longer the values of the base
    assert saved(tmp_path / "rounded")[0] > OWN


def test_a_folder_is_a_base(base: Path, tmp_path: Path, model: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_head(self: Adapted, state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name not in OWN}

    monkeypatch.setattr(Adapted, "from_base", without_head)
    whole = Adapted(Config())
    whole.save(tmp_path / "pretrained")
    model.save(tmp_path / "start")
    found = load(tmp_path / "start", "base", base=str(tmp_path / "pretrained"), base_sha256=None)
    assert same(found.backbone, whole.backbone)


def test_the_base_has_moved(model: Adapted, base: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    base.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(BadInput) as error:
        load(tmp_path / "saved")
    assert str(error.value).startswith(f"cannot get the base '{base}' of this adapted\n  no weights file")
    again = load(tmp_path / "saved", base=str(tmp_path / "elsewhere.safetensors"))
    assert same(again, model)
    again.save(tmp_path / "again")
    assert saved(tmp_path / "again")[1]["base"] == str(tmp_path / "elsewhere.safetensors")


def test_another_file_in_its_place(model: Adapted, base: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    save_file({name: torch.zeros_like(value) for name, value in load_file(base).items()}, base)
    with pytest.raises(CorruptFile) as error:
        load(tmp_path / "saved")
    assert "its checksum is not" in str(error.value) and "base_sha256=None" in str(error.value)
    assert load(tmp_path / "saved", base_sha256=None).backbone[0].weight.count_nonzero() == 0


def test_a_base_on_the_hub_without_network(base: Path, tmp_path: Path, model: Adapted) -> None:
    model.save(tmp_path / "saved")
    with pytest.raises(Offline, match=r"cannot get the base .* of this adapted"):
        load(tmp_path / "saved", base="hf-hub:org/repo/a.safetensors")


@pytest.mark.parametrize(("change", "wrong"), [("more", "it holds 'other.weight'"), ("less", "missing 1: backbone.0")])
def test_a_base_that_does_not_fit(
    change: str, wrong: str, model: Adapted, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path / "saved")
    state = load_file(base)
    if change == "more":
        monkeypatch.setattr(Adapted, "from_base", lambda self, state, part: {"other.weight": state["0.bias"]})
    else:
        del state["0.bias"]
    save_file(state, base)
    for weights in (True, "base"):
        with pytest.raises(LoadMismatch) as error:
            load(tmp_path / "saved", weights, base_sha256=None)
        assert wrong.replace("1:", "1:" if weights is True else "3:") in str(error.value)


def test_a_file_that_holds_all_needs_no_base(model: Adapted, base: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    base.unlink()
    found = load(tmp_path / "saved", tmp_path / "whole.safetensors")
    assert same(found, model) and found.load_report.base == ""


def test_a_file_without_its_base(model: Adapted, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    with pytest.raises(LoadMismatch) as error:
        load(tmp_path / "saved", base=None)
    assert "missing" in str(error.value)


def test_models_without_a_base(tmp_path: Path) -> None:
    model = Adapted(Config())
    model.save(tmp_path / "saved")
    with pytest.raises(UnknownWeights, match="no weights of the base alone\n  its config names none"):
        load(tmp_path / "saved", "base")
    with pytest.raises(UnknownWeights, match="a clip_moe has none"):
        from zoo.clip_moe.model import ClipMoE

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "family_class", lambda family: ClipMoE)
            zoo.load("clip_moe_tiny", "base", device="cpu")


def test_the_card_names_the_base(model: Adapted, base: Path, tmp_path: Path) -> None:
    weights = {"a": Weights(source="bundled:a", licence="MIT")}
    about = {"name": "adapted_tiny", "family": "adapted", "summary": "S.", "model": "m:M", "licence": "MIT"}
    sizes = {"params": {"total": 1, "active": 1}, "tasks": ("t",), "modalities": ("image",)}
    model.card = Card(**about, **sizes, config={}, weights=weights)
    model.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "card.json").read_text())
    assert card["config"] == {"base": str(base), "base_sha256": file_sha256(base)}
    with torch.no_grad():
        model.backbone[0].bias += 1
    model.save(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "card.json").read_text())["config"] == {}


def test_a_card_whose_weights_are_those_of_its_base(
    model: Adapted, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {"name": "adapted_tiny", "family": "adapted", "summary": "S.", "model": "m:M", "licence": "MIT"}
    sizes = {"params": {"total": 1, "active": 1}, "tasks": ("t",), "modalities": ("image",)}
    monkeypatch.setattr(loading, "card", lambda name: Card(**about, **sizes, config={"base": str(base)}))
    with pytest.raises(UnknownWeights) as error:
        zoo.load("adapted_tiny", device="cpu")
    assert str(error.value).endswith("try: zoo.load('adapted_tiny', weights='base')")
    assert same(zoo.load("adapted_tiny", "base", device="cpu").backbone, model.backbone)


# ---- several bases ----


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    width: int = 4
    eye: bool = True
    base: dict[str, str] | None = None
    base_sha256: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for option in ("base", "base_sha256"):
            check_parts(option, getattr(self, option), PARTS, PARTS if self.eye else ("ear",))


PARTS = ("eye", "ear")


class Several(Model):
    """A head on two encoders, each with a base of its own."""

    family = "several"
    config_class = PartsConfig
    base_tensors: ClassVar[dict[str, tuple[str, ...]]] = {part: (f"{part}.*",) for part in PARTS}
    preprocessing: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: PartsConfig) -> None:
        super().__init__(config)
        self.eye = nn.Linear(config.width, config.width) if config.eye else None
        self.ear = nn.Linear(config.width, 2)
        self.head = nn.Linear(config.width, 2)

    def from_base(self, state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {f"{part}.{name}": value for name, value in state.items()}


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Several:
    """Both bases loaded, the head random."""
    monkeypatch.setattr(loading, "family_class", lambda family: Several)
    model = Several(PartsConfig())
    for part in PARTS:
        save_file(getattr(model, part).state_dict(), tmp_path / f"{part}.safetensors")
    model.save(tmp_path / "start")
    return load(tmp_path / "start", "base", base={part: str(tmp_path / f"{part}.safetensors") for part in PARTS})


HEAD = {"head.weight", "head.bias"}


def test_every_part_has_its_base(several: Several, tmp_path: Path) -> None:
    told = f"eye: {tmp_path}/eye.safetensors, ear: {tmp_path}/ear.safetensors"
    assert several.load_report.base == several.load_report.source == told
    assert set(several.load_report.missing) == HEAD
    several.save(tmp_path / "saved")
    names, config = saved(tmp_path / "saved")
    assert names == HEAD
    assert config["base"] == {part: f"{tmp_path}/{part}.safetensors" for part in PARTS}
    assert config["base_sha256"] == {part: file_sha256(tmp_path / f"{part}.safetensors") for part in PARTS}
    again = load(tmp_path / "saved")
    assert same(again, several) and again.load_report.random == 0
    assert f"4 of them from the base {told}" in str(again.load_report)


def test_a_trained_part_is_saved_whole_and_the_other_keeps_its_base(several: Several, tmp_path: Path) -> None:
    with torch.no_grad():
        several.eye.bias[0] += 1e-3
    several.save(tmp_path / "saved")
    names, config = saved(tmp_path / "saved")
    assert names == HEAD | {"eye.weight", "eye.bias"}
    assert list(config["base"]) == list(config["base_sha256"]) == ["ear"]
    (tmp_path / "eye.safetensors").unlink()
    again = load(tmp_path / "saved")
    assert same(again, several) and set(again.load_report.from_base) == {"ear.weight", "ear.bias"}
    with torch.no_grad():
        again.ear.bias[0] += 1e-3
    again.save(tmp_path / "whole")
    names, config = saved(tmp_path / "whole")
    assert names == set(again.state_dict()) and config["base"] is config["base_sha256"] is None


def test_a_part_without_a_base_is_random_and_listed(several: Several, tmp_path: Path) -> None:
    found = load(tmp_path / "start", "base", base={"ear": f"{tmp_path}/ear.safetensors"})
    assert set(found.load_report.missing) == HEAD | {"eye.weight", "eye.bias"}
    assert found.ear.weight.equal(several.ear.weight)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base": {"nose": "a"}}, "base of 'nose'\n  known: ear, eye\n  try: base={'eye': ...}"),
        ({"base": {"eyes": "a"}}, "did you mean: eye"),
        ({"base": {"eye": "a"}, "eye": False}, "base of 'eye'\n  the model is built without it\n  try: base={'ear'"),
        ({"base_sha256": {"ears": "a"}}, "base_sha256 of 'ears'"),
    ],
)
def test_parts_that_are_not_there(options: dict[str, Any], told: str, several: Several, tmp_path: Path) -> None:
    with pytest.raises(BadOverride) as error:
        load(tmp_path / "start", **options)
    assert told in str(error.value)


def test_errors_name_the_part(several: Several, tmp_path: Path) -> None:
    several.save(tmp_path / "saved")
    eye, ear = (tmp_path / f"{part}.safetensors" for part in PARTS)
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, ear)
    with pytest.raises(CorruptFile) as error:
        load(tmp_path / "saved")
    assert f"cannot get the base '{ear}' of ear of this several" in str(error.value)
    assert "base={'ear': 'FILE', ...}) with the right file" in str(error.value)
    assert "base_sha256={'ear': None, ...}) for another base" in str(error.value)
    sums = {"eye": file_sha256(eye), "ear": None}
    assert load(tmp_path / "saved", base_sha256=sums).ear.weight.count_nonzero() == 0
    save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(2)}, ear)
    with pytest.raises(LoadMismatch, match=r"ear\.weight \(3, 4\) for \(2, 4\)"):
        load(tmp_path / "saved", base_sha256=sums)
    ear.unlink()
    with pytest.raises(BadInput, match=r"of ear of this several\n  no weights file"):
        load(tmp_path / "saved")


def test_info_tells_every_base(several: Several, tmp_path: Path, run: Any) -> None:
    about = {"name": "several_tiny", "family": "several", "summary": "S.", "model": "m:M", "licence": "MIT"}
    sizes = {"params": {"total": 1, "active": 1}, "tasks": ("t",), "modalities": ("image",)}
    several.card = Card(**about, **sizes, config={})
    several.save(tmp_path / "saved")
    (tmp_path / "ear.safetensors").rename(tmp_path / "other")
    told = " ".join(run("info", tmp_path / "saved").out.split())
    eye = tmp_path / "eye.safetensors"
    assert f"base eye: {eye}, sha256 {file_sha256(eye)}; {eye}" in told
    assert "not on this machine; it is fetched when the model is loaded" in told
