"""Training with more to go on with than parameters: a teacher, on pictures without labels; and heads beside LoRA."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train
import zoo
from mmoe.errors import BadInput, Refused
from train import tune
from train.data.base import DataSet, data_sets
from train.engine import StageRun
from train.recipe import Recipe
from train.sections import TuneSection
from train.stages import Run
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.earth_adapter.model import EarthAdapter

CLASSES = ("sea", "land", "ice")
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "classes": CLASSES}
SIZES |= {"adapter_dim": 4, "fft_layers": (1, 3), "cutoff": 0.6, "layer_scale": None, "head": "light", "head_width": 8}
LORA = {"method": "lora", "rank": 2, "modules": ["*.attn.qkv", "*.mlp.*"], "whole": ["head"]}


class Bands(DataSet):
    """Pictures of three bands of colour, labelled, each with an unlabelled one in other colours."""

    fields = ("image", "mask")
    task = "segmentation"
    needs_path = False

    def __init__(self, split: str, *, unlabelled: bool = True, limit: int | None = None) -> None:
        super().__init__()
        self.unlabelled, self.count = unlabelled, min(limit or 8, 8 if split == "eval" else 24)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"band {index}"

    def read(self, index: int) -> dict[str, Any]:
        mask = (np.arange(32) + index) // 12 % 3 * np.ones((32, 1), int)
        pixels = np.array([(10, 20, 90), (30, 120, 20), (240, 240, 250)])[mask].astype(np.uint8)
        found = {"image": Image.fromarray(pixels), "mask": mask}
        return found | ({"target": Image.fromarray(255 - pixels)} if self.unlabelled else {})


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small model, and the data by the name "bands"."""
    monkeypatch.setitem(data_sets._classes, "bands", Bands)
    return EarthAdapter(EarthAdapterConfig(**SIZES)).save(tmp_path / "start")


def recipe(start: Path, *overrides: str, **sections: Any) -> Recipe:
    told = {
        "model": {"name": str(start), "overrides": {"adaptation_begin": 2}},
        "tune": {"method": "adapters"},
        "data": {"name": "bands", "batch_size": 4},
        "optim": {"lr": 1e-2},
        "run": {"steps": 6, "log_every": 2, "save_every": 2},
        "log": [],
        **sections,
    }
    path = start.parent / "bands.yaml"
    path.write_text(yaml.safe_dump(told))
    return Recipe.load(path, *overrides)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    inner = StageRun._clip

    def clip(self: StageRun, each: Any) -> float:
        if self.state.step == step:
            raise KeyboardInterrupt
        return inner(self, each)

    monkeypatch.setattr(StageRun, "_clip", clip)


@pytest.mark.parametrize(("method", "step"), [("adapters", 1), ("adapters", 5), ("lora", 4)])
def test_a_stopped_adaptation_ends_with_the_same_bits(
    start: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    tiny = recipe(start, **({"tune": LORA} if method == "lora" else {}))
    a, b = start.parent / "a", start.parent / "b"
    train.run(tiny, a, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        train.run(tiny, b, progress=False)
    train.run(tiny, b, resume=True, progress=False)
    for name, value in load_file(a / "model" / "model.safetensors").items():
        assert value.equal(load_file(b / "model" / "model.safetensors")[name]), name
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    for line in (*logs[0], *logs[1]):
        line.pop("samples_per_second", None)
    assert logs[0] == logs[1] and "loss/mix_cross_entropy" in logs[0][-2]
    assert "loss/mix_cross_entropy" not in logs[0][0]


def test_without_its_teacher_a_run_would_end_elsewhere(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    tiny = recipe(start)
    train.run(tiny, start.parent / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        train.run(tiny, start.parent / "b", progress=False)
    inner = EarthAdapter.load_training_state

    def forgetful(self: EarthAdapter, state: Mapping[str, Tensor]) -> None:
        inner(self, state)
        if state:
            teacher = {name: value + 1 for name, value in state.items() if name != "step"}
            inner(self, {**teacher, "step": state["step"]})

    monkeypatch.setattr(EarthAdapter, "load_training_state", forgetful)
    train.run(tiny, start.parent / "b", resume=True, progress=False)
    weights = [load_file(start.parent / name / "model" / "model.safetensors") for name in "ab"]
    assert any(not value.equal(weights[1][name]) for name, value in weights[0].items())


def test_a_teacher_is_in_the_checkpoint_alone(start: Path) -> None:
    tiny = recipe(start)
    run = Run(tiny, start.parent / "a", progress=False)
    stage = run.start(tiny.stages[0])
    stage.train()
    stage.save()
    _, _, state = stage.checkpoints.newest() or (None, None, {})
    student = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert set(state["training"]) == {"step", *(f"teacher.{name}" for name in student)}
    assert state["training"]["step"] == 6 and set(state["model"]) >= student
    assert not any("teacher" in name for name in stage.model.state_dict())
    moved = {id(p) for optimizer in stage.optimizers.each for group in optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in stage.model.parameters() if p.requires_grad}
    names = set(load_file(stage.model.save(start.parent / "saved") / "model.safetensors"))
    assert names == set(stage.model.state_dict())


def test_a_teacher_follows_as_published(start: Path) -> None:
    tiny = recipe(start, "run.steps=3")
    stage = Run(tiny, start.parent / "a", progress=False).start(tiny.stages[0])
    seen: list[Tensor] = []
    inner = stage.model.after_step

    def after_step(step: int) -> None:
        seen.append(stage.model.head.out.bias.detach().clone())
        inner(step)

    stage.model.after_step = after_step  # type: ignore[method-assign]  # watched in place
    stage.train()
    expected = (seen[0] + seen[1]) / 2 * (2 / 3) + seen[2] / 3
    torch.testing.assert_close(stage.model.training_state()["teacher.head.out.bias"], expected)


def test_parts_of_a_step_adapt_alike(start: Path) -> None:
    found = {}
    for parts in (1, 2):
        tiny = recipe(start, f"run.accumulate={parts}")
        found[parts] = train.run(tiny, start.parent / str(parts), progress=False)[""]["loss"]
    assert found[1] == pytest.approx(found[2], rel=0.2)


def test_data_without_targets_are_told_before_training(start: Path) -> None:
    with pytest.raises(Refused, match="its samples have no target"):
        train.run(recipe(start, "data.options.unlabelled=false"), start.parent / "a", progress=False)
    plain = recipe(start, "data.options.unlabelled=false", "model.overrides.adaptation_begin=null", "run.steps=1")
    assert train.run(plain, start.parent / "b", progress=False)[""]["steps"] == 1


# ---- modules that are trained as they are beside LoRA ----


def plain() -> EarthAdapter:
    return EarthAdapter(EarthAdapterConfig(**SIZES, adapters="none")).eval()


def adapted(model: EarthAdapter, **options: Any) -> Any:
    return tune.add_adapters(model, TuneSection(**{**LORA, **options})).eval()


def test_a_whole_head_beside_lora(tmp_path: Path) -> None:
    model = plain()
    wrapped = adapted(copy.deepcopy(model))
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)
    rows = tune.table(wrapped, {})
    counts = {group: count for group, count, _ in rows}
    head = sum(count for group, count in counts.items() if group.startswith("head."))
    assert head == sum(p.numel() for p in model.head.parameters())
    assert counts["adapters"] == 4 * 2 * ((16 + 48) + (16 + 64) * 2)
    assert sum(total for *_, total in rows) == counts["adapters"] + model.num_params().total
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    image = torch.randn(1, 3, 32, 32)
    expected = wrapped(image=image).scores
    assert not torch.allclose(expected, model(image=image).scores)
    tune.save_adapters(wrapped, tmp_path / "merged", str(tmp_path), merge=True)
    found = zoo.load(tmp_path / "merged", device="cpu")
    assert set(found.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(found(image=image).scores, expected, atol=1e-5, rtol=1e-5)
    loaded = tune.load_adapters(model, tmp_path / "merged" / tune.ADAPTERS)
    torch.testing.assert_close(loaded.eval()(image=image).scores, expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_trained_as_it_is() -> None:
    with pytest.raises(BadInput, match=r"'heads' as it is\n  no module with parameters has such a name; one is head"):
        adapted(plain(), whole=["heads"])
    model = plain()
    model.norm1 = torch.nn.LayerNorm(2)
    with pytest.raises(BadInput, match=r"'norm1' as it is\n  peft would train 'backbone.blocks.0.norm1' too"):
        adapted(model, whole=["norm1"])
    with pytest.raises(ValueError, match="whole says nothing to method: full"):
        TuneSection(whole=("head",))


def test_nothing_in_a_whole_module_is_adapted() -> None:
    model = EarthAdapter(EarthAdapterConfig(**SIZES))
    wrapped = adapted(model, modules=["*.attn.*"], whole=["backbone.blocks.3.attn.*", "backbone.blocks.3", "head"])
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert not any(".3.attn." in name and ".lora_" in name for name in names)
    for part in (".2.attn.", ".1.frequency_adapter.adapter."):
        assert any(part in name and ".lora_" in name for name in names), part
    whole = {name.partition(".modules_to_save.")[0] for name in names if ".lora_" not in name}
    assert whole == {"base_model.model.backbone.blocks.3", "base_model.model.head"}
