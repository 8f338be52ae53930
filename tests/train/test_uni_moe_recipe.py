"""The three stages of Uni-MoE's training as one recipe, from scratch and on pretrained parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
import zoo
from train.engine import StageRun
from train.recipe import Recipe
from zoo.assets import asset
from zoo.hosts.decoder import PROJECTIONS, pack_ffns
from zoo.uni_moe.model import UniMoE

EXPERTS = ("seer", "listener", "hearer", "talker")
CHAIN = ("base", "connectors", *EXPERTS, "uni_moe")


@pytest.fixture(scope="module", autouse=True)
def _evaluated_briefly() -> Iterator[None]:
    """The mixture alone, with short replies: models that are not trained write until there is no place left."""
    inner = StageRun._evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UniMoE.predict.__kwdefaults__, "max_new_tokens", 4)
        patch.setattr(StageRun, "_evaluate", lambda self: inner(self) if self.stage.name == "uni_moe" else {})
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps a stage."""
    out = tmp_path_factory.mktemp("uni_moe") / "run"
    names = [stage.name for stage in Recipe.load("uni_moe_tiny").stages]
    short = [f"stages.{name}.run.steps=2" for name in names]
    recipe = Recipe.load("uni_moe_tiny", *short, "data.limit=4", "data.batch_size=4", "log=[]")
    results = train.run(recipe, out, stages=CHAIN, progress=False)
    assert list(results) == list(CHAIN) and "pictures/new concept/choice" in results["uni_moe"]["metrics"]
    return out


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = zoo.load(run / stage / "model", device="cpu").state_dict()
    return found


def changed(run: Path, before: str, after: str) -> set[str]:
    """Parts of the model that a stage trained."""
    first, second = weights(run, before), weights(run, after)
    return {".".join(name.split(".")[:2]) for name in first if not torch.equal(first[name], second[name])}


def test_every_stage_trains_what_it_says(run: Path) -> None:
    assert changed(run, "base", "connectors") == {"vision.projector", "speech.resampler", "sound.resampler"}
    for expert in EXPERTS:
        first, second = weights(run, "connectors"), weights(run, expert)
        moved = {name for name in first if not torch.equal(first[name], second[name])}
        assert moved and all(".mlp." in name for name in moved), expert


def test_experts_are_the_feed_forward_layers_of_the_models_of_stage_2(run: Path) -> None:
    """Up to what two steps of low-rank adapters change."""
    models, mixed = [weights(run, name) for name in EXPERTS], weights(run, "uni_moe")
    for layer in range(4):
        place = f"llm.model.layers.{layer}.mlp"
        packed = pack_ffns([{name: one[f"{place}.{name}.weight"] for name in PROJECTIONS} for one in models])
        for name, value in packed.items():
            assert (mixed[f"{place}.experts.{name}"] - value).abs().max() < 2e-3
    assert not torch.equal(packed["down_proj"][0], packed["down_proj"][1]), "they are trained on different data"
    for name in ("llm.model.norm.weight", "vision.encoder.post_layernorm.weight", "speech.encoder.conv1.weight"):
        assert torch.equal(mixed[name], models[0][name])


def test_the_mixture_stands_on_the_bundled_image_encoder_and_talks(run: Path) -> None:
    model: Any = zoo.load(run / "uni_moe" / "model", device="cpu")
    assert model.config.base == {"vision": "bundled:weights/clip_tiny.safetensors"}
    assert all(name.startswith("vision.encoder.") for name in model.load_report.from_base)
    assert model.predict(image=asset("examples/fox.png"), max_new_tokens=3).tokens <= 3


def test_the_twin_has_as_many_active_parameters() -> None:
    mixture = zoo.load("uni_moe_tiny", weights=False, device="meta")
    (twin,) = (one for one in Recipe.load("uni_moe_tiny").stages if one.name == "twin")
    dense = zoo.load("uni_moe_tiny", weights=False, device="meta", **twin.model.overrides)
    routers = mixture.num_params().routers
    assert dense.num_params().active == mixture.num_params().active - routers


def test_the_twin_sees_as_many_samples() -> None:
    steps = {stage.name: stage.run.steps for stage in Recipe.load("uni_moe_tiny").stages}
    assert steps["base"] == steps["twin_base"] and steps["connectors"] == steps["twin_connectors"]
    assert sum(steps[name] or 0 for name in EXPERTS) == steps["twin_ffn"] and steps["uni_moe"] == steps["twin"]


# ---- the small one ----

SMALL = {"vocab_size": 2048, "width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "ffn_dim": 48, "positions": 512}
SMALL |= {"tokenizer": "bundled:tokenizers/uni_moe_tiny.json", "base": None, "base_sha256": None}
SMALL |= {"vision": {"timm": "test_efficientnet", "image_size": 64}}
SPEECH = {"width": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "mels": 80, "positions": 300}
SMALL |= {"speech": {**SPEECH, "connector": "stack", "stack": 5}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its stages at tiny width, without what is pretrained, and without the program that reads aloud."""
    out, stages = tmp_path_factory.mktemp("uni_moe_small") / "run", Recipe.load("uni_moe_small").stages
    options = [f"model.overrides.{name}={json.dumps(value)}" for name, value in SMALL.items()]
    options += [f"stages.{stage.name}.run.steps=2" for stage in stages]
    recipe = Recipe.load(
        "uni_moe_small", "model.weights=false", *options, "data.limit=4", "data.batch_size=4", "log=[]"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.aloud.read_aloud", lambda text, voice: np.zeros(8000, np.float32))
        results = train.run(recipe, out, stages=[stage.name for stage in stages], progress=False)
    told = set(results["uni_moe"]["metrics"])
    assert told > {f"pictures/{group}/choice" for group in ("seen", "new style", "new concept")}
    assert told > {"speech/WER", "sounds/exact match", "dialogues/perplexity"} and "aloud/WER" not in told
    return out


def test_small_experts_are_factors_on_one_frozen_model(small: Path) -> None:
    first = weights(small, "connectors")
    for expert in EXPERTS:
        own = weights(small, expert)
        moved = {name for name in first if not torch.equal(first[name], own[name])}
        assert moved and all(".experts." in name and name.endswith(("_a", "_b")) for name in moved), expert
    mixed = weights(small, "uni_moe")
    kept = {name for name in first if name in mixed and ".mlp." not in name and "projector" not in name}
    assert all(torch.equal(mixed[name], first[name]) for name in kept)
    for layer in (0, 2):
        place = f"llm.model.layers.{layer}.mlp.experts"
        frozen = first[f"{place}.gate_up_proj"]
        assert torch.equal(mixed[f"{place}.gate_up_proj"], frozen.expand(4, -1, -1)), (
            "the feed-forward layer, four times"
        )
        for number, expert in enumerate(EXPERTS):
            (alone,) = weights(small, expert)[f"{place}.gate_up_a"]
            assert (mixed[f"{place}.gate_up_a"][number] - alone).abs().max() < 5e-3, "up to what two steps change"
    assert "llm.model.layers.1.mlp.up_proj.weight" in mixed, "every second block is dense"


def test_the_small_twin_has_as_many_active_parameters() -> None:
    stages = {stage.name: stage for stage in Recipe.load("uni_moe_small").stages}
    models = [
        zoo.load("uni_moe_small", device="meta", **stages[name].model.overrides).num_params()
        for name in ("uni_moe", "twin")
    ]
    assert len({one.active - one.routers for one in models}) == 1
    steps = {name: stage.run.steps or 0 for name, stage in stages.items()}
    assert sum(steps[name] for name in EXPERTS) == steps["twin_factors"] and steps["uni_moe"] == steps["twin"]
