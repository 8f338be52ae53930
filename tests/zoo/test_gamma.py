"""Gamma as its users meet it: scores, scenes, crops, training samples, conversions, and what the backbone keeps.

That it computes what the authors' code computes is shown by tests/parity/test_gamma.py.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mmoe
import zoo
from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, Refused, UnknownName
from mmoe.moe import moe_layers
from train.data.base import DataSet
from train.evaluate import tasks
from train.sections import TuneSection
from train.tune import freeze
from zoo.gamma import convert, losses
from zoo.gamma.crops import cut, enlarge, five_offsets, random_offsets
from zoo.gamma.host import resize_positions
from zoo.gamma.model import AUTO, Assessment, Gamma, GammaConfig

LEVELS = ("bad", "poor", "fair", "good", "perfect")
SIZES: dict[str, Any] = {
    "embed_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 64,
    "vision_layers": 3,
    "text_width": 64,
    "text_layers": 3,
    "vocab_size": 600,
    "context_length": 32,
    "first_layer": 1,
}


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """The family's own cards, where the folder's fixture leaves two of another one."""


def build(seed: int = 0, moved: bool = True, **options: Any) -> Gamma:
    """A small model with random weights; `moved` opens the scales, so that the experts count."""
    torch.manual_seed(seed)
    model = Gamma(GammaConfig(**{**SIZES, **options})).eval()
    if moved:
        with torch.no_grad():
            for layer in moe_layers(model).values():
                layer.post.scale.fill_(0.5)
                for parameter in (*layer.router.parameters(), *layer.experts.parameters()):
                    parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def model() -> Gamma:
    return build()


def picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


# ---- scores ----


def test_one_picture(model: Gamma) -> None:
    found = model.predict(picture())
    assert isinstance(found, Assessment) and found.labels == LEVELS
    assert len(found.scores) == len(found.scenes) == 1 and found.upscaled == (False,)
    assert found.probs.shape == (1, 5) and found.scenes[0] in model.scenes
    torch.testing.assert_close(found.probs.sum(1), torch.ones(1))
    values = model.level_values.detach()
    assert float(found) == found.scores[0] == pytest.approx(float(found.probs[0] @ values), abs=1e-6)
    assert values.min() <= float(found) <= values.max() and not found.probs.requires_grad
    best = found.top(2)
    assert best[0][1] >= best[1][1] and [level for level, _ in found.top(9)] == [
        LEVELS[i] for i in found.probs[0].argsort(descending=True)
    ]
    assert json.loads(json.dumps(found.as_dict()))["scores"] == list(found.scores)


@pytest.mark.parametrize("scene", ["auto", "face"])
def test_many_pictures_give_what_each_gives_alone(model: Gamma, scene: str) -> None:
    """More than fit into one forward, of different sizes, and one smaller than a crop."""
    many = [picture(seed, (32 + 3 * seed, 40)) for seed in range(9)] + [picture(9, (20, 50))]
    together, alone = model.predict(many, scene), [model.predict(one, scene) for one in many]
    assert together.scores == pytest.approx([float(one) for one in alone], abs=1e-5)
    assert together.scenes == tuple(one.scenes[0] for one in alone)
    assert together.upscaled == (*[False] * 9, True)
    with pytest.raises(BadInput, match="no single score of 10 pictures"):
        float(together)


def test_pictures_of_one_batch_have_scenes_of_their_own(model: Gamma) -> None:
    """The released evaluation compares them with those of their neighbours."""
    many = [picture(seed) for seed in range(5)]
    order = ["face", "natural", "aesthetic", "natural", "underwater"]
    mixed = model.predict(many, order)
    alone = [model.predict(one, scene) for one, scene in zip(many, order, strict=True)]
    assert mixed.scores == pytest.approx([float(one) for one in alone], abs=1e-5)
    assert mixed.scenes == tuple(order)
    other = model.predict(many, order[::-1])
    assert np.abs(np.array(mixed.scores) - np.array(other.scores)).max() > 1e-3


def test_auto_takes_the_scene_with_the_best_fitting_prompt(model: Gamma) -> None:
    with torch.no_grad():  # all features alike would fit the same prompt
        model.clip.visual.class_embedding.zero_()
        model.clip.visual.positional_embedding.zero_()
        model.clip.visual.conv1.weight.mul_(10)
        model.adapter.up.weight.zero_()
    many = [Image.new("RGB", (40, 48), colour) for colour in ("red", "lime", "blue", "white", "black", "yellow")]
    many += [picture(seed) for seed in range(4)]
    found = model.predict(many)
    with torch.no_grad():
        batch = model.preprocess(many)
        out = model(**batch)
        texts = torch.stack([model.scene_features([scene])[0] for scene in range(5)])  # (S, K, C)
        directions = nn.functional.normalize(out.adapted, dim=-1)
        fit = (directions[:, :, None, None] * texts).sum(-1).mean(1).amax(-1)  # (B, S)
    assert found.scenes == tuple(model.scenes[i] for i in fit.argmax(1))
    assert len(set(found.scenes)) > 1, "or the test shows nothing"
    again = model.predict(many, list(found.scenes))
    assert again.scores == pytest.approx(found.scores, abs=1e-6)
    some = ["auto" if i % 2 else scene for i, scene in enumerate(found.scenes)]
    assert model.predict(many, some).scenes == found.scenes


def test_naive_prompts_take_the_same_weights(model: Gamma) -> None:
    naive = Gamma(replace(model.config, prompts="naive")).eval()
    naive.load_state_dict(model.state_dict())
    assert naive.scenes == ("any",) and naive.config.prompt_texts()[0] == "bad image"
    assert naive.predict(picture()).scenes == ("any",)
    assert abs(float(naive.predict(picture())) - float(model.predict(picture(), "natural"))) > 1e-4


def test_scenes_and_levels_of_ones_own() -> None:
    model = build(scenes={"photo": "a {} photo", "map": "a {} map"}, levels=("ugly", "fine"), level_values=(0.0, 1.0))
    found = model.predict(picture(), "map")
    assert model.config.prompt_texts() == ["a ugly photo", "a fine photo", "a ugly map", "a fine map"]
    assert found.labels == ("ugly", "fine") and float(found) == pytest.approx(found.probs[0, 1].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("given", "scene", "error", "lines"),
    [
        ([], "auto", BadInput, "cannot prepare an empty list of pictures"),
        ("gone.png", "auto", BadInput, "cannot read the picture 'gone.png'\n  no such file"),
        (None, "nature", UnknownName, "no scene 'nature'\n  did you mean: natural\n  try: scene='natural'"),
        (
            None,
            ["face", "face"],
            BadInput,
            "score with the scenes ['face', 'face']\n  each picture has one; pictures: 1, ",
        ),
        (None, [3], UnknownName, "no scene 3"),
    ],
)
def test_inputs_that_cannot_be_used(model: Gamma, given: Any, scene: Any, error: type, lines: str) -> None:
    with pytest.raises(error) as told:
        model.predict(picture() if given is None else given, scene)
    assert str(told.value).startswith(lines)


def test_weights_that_diverged_are_told(model: Gamma) -> None:
    with torch.no_grad():
        model.adapter.up.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match="no score comes out\n  the model computes NaN or infinity"):
        model.predict(picture())


# ---- kinds of pictures ----


def test_kinds_of_pictures(model: Gamma, tmp_path: Path) -> None:
    grey = np.asarray(picture().convert("L"))
    expected = float(model.predict(np.repeat(grey[..., None], 3, axis=2), "natural"))
    alpha = Image.fromarray(np.dstack([np.repeat(grey[..., None], 3, axis=2), np.full_like(grey, 255)]), "RGBA")
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    paths = []
    for name, image in (("grey", Image.fromarray(grey)), ("alpha", alpha), ("deep", deep)):
        paths.append(tmp_path / f"{name}.png")
        image.save(paths[-1])
    assert Image.open(paths[2]).mode.startswith("I")
    for source in (*paths, grey, alpha, deep, grey / 255.0):
        assert float(model.predict(source, "natural")) == pytest.approx(expected, abs=1e-4)


def test_what_is_transparent_shows_the_background(model: Gamma) -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    white, black = (float(model.predict(Image.new("RGB", (40, 40), colour), "face")) for colour in ("white", "black"))
    assert float(model.predict(clear, "face")) == white != black
    model.preprocessing = {**model.preprocessing, "background": [0, 0, 0]}
    assert float(model.predict(clear, "face")) == black


def test_pictures_that_cannot_be_read(model: Gamma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadInput, match="the file is damaged"):
        model.predict(path)
    (tmp_path / "b.jpg").write_text("no picture")
    with pytest.raises(BadInput, match="not a picture in a known format"):
        model.predict(tmp_path / "b.jpg")
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(BadInput, match="10000 x 10000 pixels; the limit is 50 megapixels"):
        model.predict(tmp_path / "large.png")
    with pytest.raises(BadInput, match="cannot crop a picture of 1 x 60000\n  its short side is scaled up to 32"):
        model.predict(Image.new("RGB", (1, 60_000)))


# ---- crops ----


def test_five_crops_are_the_mean_of_five(model: Gamma) -> None:
    image = picture(size=(70, 45))
    boxes = [(top, left) for top, left in five_offsets(45, 70, 32)]
    assert boxes == [(6, 19), (0, 0), (0, 38), (13, 0), (13, 38)]
    parts = [model.predict(image.crop((x, y, x + 32, y + 32)), "face") for y, x in boxes]
    whole = model.predict(image, "face")
    assert float(whole) == pytest.approx(np.mean([float(part) for part in parts]), abs=1e-5)
    torch.testing.assert_close(whole.probs, torch.cat([part.probs for part in parts]).mean(0, keepdim=True))
    centre = build(crops="centre").predict(image, "face")
    assert float(centre) == pytest.approx(float(parts[0]), abs=1e-5)


def test_random_crops_come_from_the_seed() -> None:
    image = picture(size=(90, 80))
    first, same, other = (build(crops="random", num_crops=3, crop_seed=seed) for seed in (1, 1, 2))
    batch = first.preprocess([image, picture(1, (90, 80))])["image"]
    assert batch.shape == (2, 3, 3, 32, 32)
    torch.manual_seed(99)
    assert float(first.predict(image)) == float(same.predict(image)) != float(other.predict(image))
    assert torch.equal(first.preprocess(image)["image"], batch[:1]), "the draw does not depend on other pictures"


def test_offsets_stay_inside_and_cuts_agree() -> None:
    for offsets in (five_offsets(40, 33, 32), random_offsets(40, 33, 32, 200, torch.Generator().manual_seed(0))):
        assert all(0 <= top <= 8 and 0 <= left <= 1 for top, left in offsets)
    tops = {top for top, _ in offsets}
    assert tops == set(range(9)), "every place can come up"
    image = torch.arange(2 * 3 * 40 * 33.0).view(2, 3, 40, 33)
    crops = cut(image, offsets[:2], 32)
    assert crops.shape == (2, 2, 3, 32, 32)
    (top, left) = offsets[1]
    assert torch.equal(crops[1, 1], image[1, :, top : top + 32, left : left + 32])


@pytest.mark.parametrize("size", [(20, 50), (31, 31), (32, 10), (1, 1)])
def test_small_pictures_are_scaled_up_and_it_is_said(model: Gamma, size: tuple[int, int]) -> None:
    image, upscaled = enlarge(picture(size=size), 32)
    assert upscaled and min(image.size) == 32
    assert image.size[0] / image.size[1] == pytest.approx(size[0] / size[1], rel=0.05)
    assert model.predict(picture(size=size)).upscaled == (True,)
    assert model.predict(picture(size=(32, 32))).upscaled == (False,)


# ---- texts that are kept ----


def count_texts(model: Gamma, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    encoded: list[int] = []
    encode = model.clip.encode_text
    monkeypatch.setattr(model.clip, "encode_text", lambda text, **o: encoded.append(len(text)) or encode(text, **o))
    return encoded


def test_large_pictures_are_made_smaller_where_the_config_says_so(tmp_path: Path) -> None:
    config = replace(build().config, short_side=40)
    model = Gamma(config).eval()
    large = picture(size=(120, 96))
    assert model._read(large)[0][0].size == (50, 40), "before crops are cut"
    small = large.resize((50, 40), Image.Resampling.LANCZOS)
    assert float(model.predict(large, "face")) == float(model.predict(small, "face"))
    assert model.training_batch([{"image": large, "score": 0.5, "scene": "face", "seed": 0}])["image"].shape[-1] == 32
    model.save(tmp_path / "g")
    assert zoo.load(tmp_path / "g", device="cpu").preprocessing["short_side"] == 40
    with pytest.raises(BadOverride, match="a crop of 32 pixels has to fit"):
        replace(config, short_side=31)


def test_texts_are_encoded_once(model: Gamma, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_texts(model, monkeypatch)
    first = model.predict(picture(), "face")
    assert encoded == [5]
    assert model.predict(picture(), "face").scores == first.scores and encoded == [5]
    model.predict([picture(), picture()], ["face", "natural"])
    assert encoded == [5, 5], "only the new scene"
    model.predict(picture())
    assert encoded == [5, 5, 15]


CHANGES = {
    "in place": lambda p: p.add_(torch.randn_like(p)),
    "behind autograd's back": lambda p: p.data.add_(torch.randn_like(p)),
    "other memory": lambda p: setattr(p, "data", p.data + torch.randn_like(p)),
    "a step": lambda p: torch.optim.SGD([p], 1.0).step(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["clip.ln_final.weight", "clip.transformer.resblocks.2.mlp.experts.down_bias"])
def test_kept_texts_follow_the_parameters(model: Gamma, change: str, name: str) -> None:
    before = model.predict(picture(), "face").scores
    parameter = model.get_parameter(name)
    parameter.grad = torch.randn_like(parameter)
    with torch.no_grad():
        CHANGES[change](parameter)
    fresh = Gamma(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert model.predict(picture(), "face").scores == fresh.predict(picture(), "face").scores != before


def test_kept_texts_are_not_used_where_they_would_be_wrong(model: Gamma, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.predict(picture(), "face")
    encoded = count_texts(model, monkeypatch)
    with mmoe.override(model.clip.transformer, mmoe.switch_off([0])):
        changed = model.predict(picture(), "face")
    assert changed.scores != plain.scores and model.predict(picture(), "face").scores == plain.scores
    assert encoded == [5]
    with mmoe.trace(model) as routing:
        assert model.predict(picture(), "face").scores == plain.scores
    assert any(name.startswith("clip.transformer") for name in routing.layers), "routing of the texts is seen"
    out = model(**model.preprocess(picture(), "face"))
    out.score.sum().backward()
    grads = [layer.router.weight.grad for layer in moe_layers(model.clip.transformer).values()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads), "gradients reach the text tower"


def test_copies_keep_texts_of_their_own(model: Gamma) -> None:
    plain = model.predict(picture(), "face").scores
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.clip.ln_final.weight.add_(torch.randn_like(again.clip.ln_final.weight))
    assert again.predict(picture(), "face").scores != plain == model.predict(picture(), "face").scores
    assert model.double().predict(picture(), "face").scores == pytest.approx(plain, abs=1e-5)


# ---- training ----


def test_a_batch_of_samples(model: Gamma) -> None:
    samples = [
        {"image": picture(0), "score": 0.25, "scene": "face", "seed": 3},
        {"image": picture(1, (20, 90)), "score": 1, "seed": 4},
    ]
    batch = model.training_batch(samples)
    assert batch["image"].shape == (2, 3, 32, 32) and batch["score"].tolist() == [0.25, 1.0]
    assert batch["scene"].tolist() == [model.scenes.index("face"), AUTO]
    assert torch.equal(model.training_batch(samples)["image"], batch["image"]), "the seed decides"
    others = [model.training_batch([{**samples[0], "seed": seed}])["image"][0] for seed in range(40)]
    assert len({tuple(image.flatten().tolist()) for image in others}) > 30
    out = model.train()(**batch)
    assert out.loss.ndim == 0 and set(out.losses) == {"mse"}
    torch.testing.assert_close(out.loss, (out.score - batch["score"]).square().mean())
    for missing in ({"image": picture()}, {"score": 1.0}):
        with pytest.raises(Refused, match="its samples have no"):
            model.training_batch([missing])
    with pytest.raises(UnknownName, match="no scene 'fac'"):
        model.training_batch([{**samples[0], "scene": "fac"}])


@pytest.mark.parametrize("scene", [None, 1, {"natural": 1}, ["natural", None]])
def test_what_is_no_scene(model: Gamma, scene: Any) -> None:
    with pytest.raises(UnknownName, match="no scene"):
        model.scene_ids(scene, 2)


def test_captions_are_learned_beside_the_scores() -> None:
    model = build(num_experts=0, loss="levels", caption_coef=0.5)
    captions = ["strong jpeg", "pristine", "strong jpeg"]
    samples = [
        {"image": picture(i), "score": i / 4, "scene": "face", "text": text, "seed": i}
        for i, text in enumerate(captions)
    ]
    batch = model.training_batch(samples)
    out = model.train()(**batch)
    torch.testing.assert_close(out.loss, out.losses["levels"] + 0.5 * out.losses["captions"])
    features = nn.functional.normalize(out.image_features[:, 0], dim=-1)
    texts = model.encode_text(batch["text"][:2], normalize=True)
    probs = (model.clip.logit_scale.exp() * features @ texts.t()).softmax(-1)
    torch.testing.assert_close(out.losses["captions"], -probs[range(3), [0, 1, 0]].log().mean())
    with pytest.raises(Refused, match=r"(?s)its samples have no text.*caption_coef=0"):
        model.training_batch([{"image": picture(), "score": 0.5}])
    with pytest.raises(BadOverride, match="caption_coef"):
        build(caption_coef=-1)


def test_flips_and_places_of_crops(model: Gamma) -> None:
    """A picture whose columns say where they are: half of the crops run backwards, and all places come up."""
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (40, 1)))
    crops = [model._random_crop(ramp, seed) for seed in range(200)]
    columns = [np.asarray(crop)[0].astype(int) // 6 for crop in crops]
    backwards = [column for column in columns if column[0] > column[-1]]
    assert 70 < len(backwards) < 130
    assert {int(column.min()) for column in columns} == set(range(9))


class Scored(DataSet):
    fields, task = ("image", "score"), "quality"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> dict[str, Any]:
        return {"image": picture(index), "score": index / self.count, "scene": "natural"}


def test_data_sets_hand_on_their_seeds(model: Gamma) -> None:
    data = Scored(4)
    one, same, other = (data.batch([0, 1], model, seeds) for seeds in ([5, 6], [5, 6], [7, 6]))
    assert torch.equal(one["image"], same["image"])
    assert not torch.equal(one["image"][0], other["image"][0]) and torch.equal(one["image"][1], other["image"][1])


def test_it_is_measured_as_quality(model: Gamma) -> None:
    found = tasks.build("quality").measure(model, Scored(6))
    scores = [float(model.predict(picture(index), "natural")) for index in range(6)]
    ranks = np.argsort(np.argsort(scores))
    assert found["SRCC"] == pytest.approx(np.corrcoef(ranks, range(6))[0, 1], abs=1e-3)


def test_the_backbone_is_frozen_and_the_rest_learns() -> None:
    model = build(moved=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {name.partition(".mlp.")[2].split(".")[0] if ".mlp." in name else name.split(".")[0] for name in trained}
    assert parts == {"router", "experts", "post", "adapter", "level_values"}
    freeze(model.requires_grad_(True), TuneSection(method="adapters"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    images = [picture(seed) for seed in range(4)]
    labels = [0.3, 0.9, 0.4, 0.7]
    samples = [
        {"image": image, "score": label, "scene": "natural", "seed": 0}
        for image, label in zip(images, labels, strict=True)
    ]
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    found = []
    for step in range(40):
        adam.zero_grad()
        out = model.train()(**model.training_batch(samples))
        out.loss.backward()
        if step == 0:
            experts = [p.grad for layer in moe_layers(model).values() for p in layer.experts.parameters()]
            assert all(grad.abs().max() == 0 for grad in experts), "scales are 0"
            assert all(layer.post.scale.grad.abs() > 0 for layer in moe_layers(model).values())
        adam.step()
        found.append(out.loss.item())
    assert found[-1] < 0.3 * found[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    layers = moe_layers(model).values()
    assert all(layer.post.scale.abs() > 0 for layer in layers)
    assert any(not torch.equal(layer.experts.up_proj[0], layer.experts.up_proj[1]) for layer in layers)


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_trains(loss: str) -> None:
    model = build(loss=loss)
    out = model.train()(**model.preprocess([picture(0), picture(1)], "face"), score=torch.tensor([0.3, 0.85]))
    out.loss.backward()
    assert set(out.losses) == {loss} and out.loss.isfinite() and out.loss > 0
    grad = model.adapter.up.weight.grad
    assert grad.isfinite().all() and grad.abs().max() > 0
    alone = model(**model.preprocess(picture(0), "face"), score=torch.tensor([0.3]))
    assert alone.loss.isfinite()


def test_labels_between_two_levels() -> None:
    values = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    labels = torch.tensor([0.0, 0.2, 0.25, 0.6, 0.95, 1.0, 1.3])
    table = losses.spread(labels, values)
    torch.testing.assert_close(table @ values, labels.clamp(0.2, 1.0))
    torch.testing.assert_close(table.sum(1), torch.ones(7))
    assert (table > 1e-6).sum(1).max() == 2 and (table >= 0).all()
    torch.testing.assert_close(table[2], torch.tensor([0.75, 0.25, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(losses.levels(torch.full((1, 5), 2.0), table[2:3]), torch.tensor(5.0).log())


def test_a_dense_base_is_trained_and_then_given_experts() -> None:
    dense = build(num_experts=0, loss="levels")
    assert all(p.requires_grad for p in dense.parameters()) and not moe_layers(dense)
    assert dense.adapters == ("adapter.*", "level_values")
    samples = [{"image": picture(seed), "score": seed / 4, "scene": "natural", "seed": 0} for seed in range(4)]
    adam = torch.optim.Adam(dense.parameters(), lr=1e-3)
    found = []
    for _ in range(15):
        adam.zero_grad()
        out = dense.train()(**dense.training_batch(samples))
        out.loss.backward()
        adam.step()
        dense.after_step(0)
        found.append(out.loss.item())
    assert found[-1] < 0.8 * found[0]
    assert Gamma.assembled_from({}) == 1
    options = {**SIZES, "num_experts": 2, "crops": "centre"}
    model = Gamma.assemble([dense.eval()], options)
    assert (model.config.loss, model.config.crops, len(moe_layers(model))) == ("mse", "centre", 4)
    batch = dense.preprocess([picture(seed) for seed in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).score, dense(**batch).score, atol=1e-5, rtol=0)
    for layer in moe_layers(model).values():
        assert torch.equal(layer.experts.up_proj[1], layer.shared.c_fc.weight) and layer.post.scale == 0
    assert {p.requires_grad for p in model.clip.visual.transformer.resblocks[0].parameters()} == {False}
    with pytest.raises(Refused, match="it takes one model of this family with num_experts=0"):
        Gamma.assemble([model], options)
    with pytest.raises(Refused, match="its sizes are not those of the config"):
        Gamma.assemble([dense], {**options, "text_width": 128})


def test_the_temperature_is_kept_in_range() -> None:
    dense, frozen = build(num_experts=0), build()
    for model in (dense, frozen):
        nn.init.constant_(model.clip.logit_scale, 7.0)
        model.after_step(0)
    assert dense.clip.logit_scale.exp().item() == pytest.approx(100) and frozen.clip.logit_scale == 7.0


def test_gradient_checkpointing_changes_nothing(model: Gamma) -> None:
    batch = {**model.preprocess([picture(0), picture(1)], ["face", "natural"]), "score": torch.tensor([0.3, 0.8])}
    grads = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.set_grad_checkpointing()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


# ---- sizes and types ----


def test_the_papers_model_has_the_papers_parameters() -> None:
    params = zoo.load("gamma_vit_b16", device="meta").num_params()
    assert (params.total, params.trainable) == (272_704_566, 123_083_829)
    assert params.routers == 6 * (3 * 768 + 3) + 6 * (3 * 512 + 3)
    dense = zoo.load("gamma_vit_b16", device="meta", num_experts=0).num_params()
    assert dense.total == 149_620_737 + 262_144 + 5


def test_half_precision(model: Gamma) -> None:
    many = [picture(seed) for seed in range(3)]
    want = model.predict(many, "natural")
    half = copy.deepcopy(model).bfloat16()
    got = half.predict(many, "natural")
    assert got.scores == pytest.approx(want.scores, abs=0.05) and got.probs.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = model(**model.preprocess(many, "natural"))
    assert out.logits.dtype == torch.float32
    assert out.score.tolist() == pytest.approx(want.scores, abs=0.05)


@pytest.mark.parametrize("mode", ["grid", "reference"])
def test_crops_of_another_size(mode: str) -> None:
    model, native = build(crop_size=48, positions=mode), build(positions=mode)
    assert model.grid == (6, 6) and model.preprocess(picture(size=(60, 60)))["image"].shape[-1] == 48
    assert np.isfinite(float(model.predict(picture(size=(60, 60)))))
    model.load_state_dict(native.state_dict())
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), native.encode_image(image)), "at the native size nothing changes"
    with pytest.raises(BadInput, match="cannot score crops of 30 x 32"):
        model.encode_image(torch.randn(1, 3, 30, 32))


def test_positions_for_another_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.cat([torch.full((1, 2), 9.0), torch.stack([rows, columns], dim=-1).view(64, 2)])
    grid = resize_positions(table, (16, 8), "grid")
    assert grid.shape == (129, 2) and torch.equal(grid[0], table[0]), "the class row stays"
    inner = grid[1:].view(16, 8, 2)[4:12, 2:6]
    torch.testing.assert_close(
        inner[:, :, 0], (torch.arange(4, 12.0) / 2 - 0.25)[:, None].expand(-1, 4), atol=0.05, rtol=0
    )
    reference = resize_positions(table, (8, 8), "reference")
    torch.testing.assert_close(reference, table, atol=1e-5, rtol=0)
    mixed = resize_positions(table, (16, 8), "reference")
    assert not torch.equal(mixed[0], table[0]), "the class row is resampled with the others"
    assert resize_positions(table, (3, 2), "none").abs().max() == 0


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"crop_size": 30}, "crop_size=30 with patch_size=8\n  patches must cover the picture\n  try: crop_size=24"),
        ({"first_layer": 3}, "first_layer=3\n  first_layer is a whole number from 0 to 2"),
        ({"loss": "mae"}, "loss='mae'"),
        ({"levels": ("a", "a"), "level_values": (0, 1)}, "levels=['a', 'a']\n  there are two levels at least"),
        ({"level_values": (0.0, 1.0)}, "level_values=[0.0, 1.0]\n  there are 5 levels"),
        ({"level_values": (1, 0.8, 0.6, 0.4, 0.2)}, "they rise from the worst level to the best"),
        ({"scenes": {"a": "a photo"}}, "'a' has no place {} for the level"),
        ({"scenes": ["a {}"]}, "scenes=['a {}'] does not fit GammaConfig\n  scenes is Mapping, not list"),
        ({"prompts": "scenes"}, "prompts='scenes' does not fit GammaConfig\n  prompts is 'scene' or 'naive'"),
        ({"positions": "zero"}, "positions='zero'"),
        ({"crops": "four"}, "crops='four'"),
        ({"scenes": {}}, "scenes={}\n  name one, not auto"),
        ({"num_crops": 0}, "num_crops=0\n  num_crops is a whole number of at least 1"),
        ({"vision_heads": 5}, "5 heads in a tower of width 64"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], lines: str) -> None:
    with pytest.raises(BadOverride) as error:
        GammaConfig(**{**SIZES, **options})
    assert lines in str(error.value)


@pytest.mark.parametrize(
    ("batch", "wrong"),
    [
        ({"image": torch.zeros(3, 32, 32)}, "not (3, 32, 32) float32"),
        ({"image": torch.zeros(2, 1, 32, 32)}, "not (2, 1, 32, 32) float32"),
        ({"image": torch.zeros(2, 3, 32, 32).byte()}, "not (2, 3, 32, 32) uint8"),
        ({"scene": torch.zeros(1).long()}, "the shape (2,), not of torch.int64 and the shape (1,)"),
        ({"score": torch.zeros(1)}, "the shape (2,), not of torch.float32 and the shape (1,)"),
    ],
)
def test_batches_that_do_not_fit(model: Gamma, batch: dict[str, Tensor], wrong: str) -> None:
    with pytest.raises(BadInput) as error:
        model(**{"image": torch.zeros(2, 3, 32, 32)} | batch)
    assert wrong in str(error.value)


def test_a_table_of_a_picture_that_there_is_not(model: Gamma) -> None:
    with pytest.raises(BadOverride, match="picture=7"):
        model.predict(picture()).table(picture=7)


@pytest.mark.parametrize("scene", [5, -2])
def test_scenes_that_there_are_not(model: Gamma, scene: int) -> None:
    with pytest.raises(BadInput, match="they have numbers from 0 to 4, and -1 leaves the choice to the model"):
        model(torch.zeros(2, 3, 32, 32), torch.tensor([0, scene]))


def test_another_router(tmp_path: Path) -> None:
    model = build(router="topk:top_k=1", num_experts=4)
    with mmoe.trace(model) as routing:
        model.predict(picture())
    assert {run.experts.shape[1] for run in routing} == {1} and routing[0].num_experts == 4
    again = zoo.load(model.save(tmp_path / "a"), device="cpu")
    assert float(again.predict(picture(), "face")) == float(model.predict(picture(), "face"))
    swapped = zoo.load(tmp_path / "a", router="topk:top_k=2", device="cpu")
    assert {layer.router.top_k for layer in moe_layers(swapped).values()} == {2}


def test_the_name_of_the_own_router_is_that_router() -> None:
    plain = zoo.load("gamma_tiny", device="cpu")
    named = zoo.load("gamma_tiny", device="cpu", router="dense")
    assert named.load_report is not None and not named.load_report.unexpected and not named.load_report.missing
    assert named.predict(picture(), "natural").scores == plain.predict(picture(), "natural").scores
    warm = zoo.load("gamma_tiny", False, device="meta", router="dense:temperature=2")
    bare = zoo.load("gamma_tiny", False, device="meta", router={"name": "dense", "gate_bias": False})
    for model, temperature, biased in ((warm, 2, True), (bare, 1, False)):
        routers = [layer.router for layer in moe_layers(model).values()]
        assert {(router.temperature, router.bias is not None) for router in routers} == {(temperature, biased)}


# ---- routing ----


def test_routing_is_seen_and_maps_to_patches_and_words(model: Gamma) -> None:
    many = [picture(0), picture(1)]
    batch = model.preprocess(many, ["face", "natural"])
    with mmoe.trace(model) as routing:
        model.predict(many, ["face", "natural"])
    image, text = model.views(batch)
    layers = routing.select(image.layers)
    assert len(layers) == 2 and image.grid == (4, 4) and image.rows == 17
    assert layers[0].probs.shape == (2 * 5 * 17, 3)
    assert image.of_sample(layers[0].probs, 5).shape == (16, 3), "the centre crop of the second picture"
    words = routing.select(text.layers)
    assert len(words) == 2 and text.of_sample(words[0].probs, 0).shape == (len(text.tokens[0]), 3)
    assert "".join(text.tokens[0][1:-1]) == "naturalbad-qualityimage", "scenes in the order of the config"
    auto = model.views(model.preprocess(many))[1]
    assert len(auto.tokens) == 25


# ---- files ----


def test_save_and_load(model: Gamma, tmp_path: Path) -> None:
    model = Gamma(replace(model.config, scenes={"photo": "a {} photo"}, crops="centre")).eval()
    model.preprocessing = {**model.preprocessing, "background": [1, 2, 3]}
    again = zoo.load(model.save(tmp_path / "a"), device="cpu")
    assert again.config == model.config and again.preprocessing == model.preprocessing
    assert again.predict(picture()).as_dict() == model.predict(picture()).as_dict()
    assert again.load_report.coverage == 1.0
    values = json.loads((tmp_path / "a" / "preprocess.json").read_text())
    (tmp_path / "a" / "preprocess.json").write_text(json.dumps({**values, "image_size": 64}))
    with pytest.raises(CorruptFile, match="image_size is 64, the model has 32"):
        zoo.load(tmp_path / "a")


def test_saved_in_half_precision(model: Gamma, tmp_path: Path) -> None:
    again = zoo.load(model.save(tmp_path / "a", dtype="bf16"), device="cpu")
    assert float(again.predict(picture(), "face")) == pytest.approx(float(model.predict(picture(), "face")), abs=0.05)


def theirs(model: Gamma) -> dict[str, Tensor]:
    return convert.to_original(model.state_dict())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params": {f"module.{k}": v for k, v in s.items()}}])
@pytest.mark.parametrize("options", [{}, {"num_experts": 1, "first_layer": 2}, {"num_experts": 0}])
def test_the_authors_layout(wrap: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(**options)
    config, state = convert.from_original(wrap(theirs(model)))
    for name in ("num_experts", "embed_dim", "vocab_size", "vision_layers", "image_size", *list(options)):
        assert getattr(config, name) == getattr(model.config, name), name
    again = Gamma(config).eval()
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    path = tmp_path / "gamma.pth"
    torch.save(wrap(theirs(model)), path)
    torch.manual_seed(5)
    loaded = Gamma(config)
    loaded.save(tmp_path / "b")
    read = zoo.load(tmp_path / "b", weights=str(path), device="cpu")
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_that_are_not_gammas(model: Gamma) -> None:
    state = theirs(model)
    with pytest.raises(LoadMismatch, match="unknown keys: extra"):
        convert.from_original({**state, "extra": torch.zeros(1)})
    with pytest.raises(LoadMismatch, match="it has no score_level"):
        convert.from_original({k: v for k, v in state.items() if k != "score_level"})
    gone = "clip_model.transformer.resblocks.2.mlp.experts.expert_1.c_fc.weight"
    with pytest.raises(LoadMismatch, match=r"has experts \[0, 2\] of 3"):
        convert.from_original({k: v for k, v in state.items() if k != gone})
    gone = "clip_model.transformer.resblocks.2.mlp.scale"
    with pytest.raises(LoadMismatch, match=r"experts in blocks \[1\] of 3 of the text tower"):
        convert.from_original({k: v for k, v in state.items() if k != gone})
    with pytest.raises(LoadMismatch, match=r"it has no 'visual\.conv1\.weight'"):
        convert.from_original({k: v for k, v in state.items() if k != "clip_model.visual.conv1.weight"})


def test_what_the_authors_have_no_names_for() -> None:
    other = build(router="topk:score=sigmoid,bias_rate=0.1")
    with pytest.raises(Refused, match="they have no router 'topk"):
        convert.check_expressible(other.config)
    with pytest.raises(Refused, match="cannot write this model under the authors' names"):
        theirs(other)
    convert.check_expressible(build().config)


CHOSEN = "prompts", "scenes", "levels", "positions", "short_side", "crop_size", "crops", "num_crops", "crop_seed"
CHOSEN += "image_mean", "image_std"


def test_what_the_way_back_needs_is_told(run: Any, tmp_path: Path) -> None:
    done = run("convert", "to-original", "gamma_tiny", "--out", tmp_path / "theirs.pt")
    assert done.code == 0, done.err
    options = shlex.split(done.err.partition("the way back needs ")[2])
    assert options.count("--set") > 5
    done = run("convert", "from-original", "gamma", tmp_path / "theirs.pt", "--out", tmp_path / "back", *options)
    assert done.code == 0, done.err
    again, before = zoo.load(tmp_path / "back", device="cpu"), zoo.load("gamma_tiny", device="cpu")
    assert again.predict(picture(size=(200, 120))).as_dict() == before.predict(picture(size=(200, 120))).as_dict()


def test_from_the_command_line(run: Any, model: Gamma, tmp_path: Path) -> None:
    torch.save({"params": theirs(model)}, tmp_path / "gamma.pth")
    done = run("convert", "from-original", "gamma", tmp_path / "gamma.pth", "--out", tmp_path / "g", "--json")
    assert done.code == 0, done.err
    assert done.json["assumed"] == {
        "activation": "quick_gelu",
        "vision_heads": 1,
        "text_heads": 1,
        **{name: json.loads(json.dumps(getattr(GammaConfig(), name))) for name in CHOSEN},
    }
    again = zoo.load(tmp_path / "g", device="cpu")
    assert float(again.predict(picture(), "face")) == pytest.approx(float(model.predict(picture(), "face")), abs=1e-6)
    done = run("convert", "to-original", tmp_path / "g", "--out", tmp_path / "back.safetensors", "--json")
    assert done.code == 0, done.err
    assert done.json["round_trip"] == "exact" and done.json["tensors"] == len(theirs(model))


def test_predictions_on_the_command_line(run: Any, model: Gamma, tmp_path: Path) -> None:
    model.save(tmp_path / "g", card=replace(zoo.card("gamma_vit_b16"), weights={}))
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    picture(size=(90, 60)).save(large)
    picture(size=(8, 9)).save(small)
    done = run("predict", tmp_path / "g", large, small, "--with", "scene=face", "--overlay", tmp_path / "o.png")
    assert done.code == 0, done.err
    assert "note: the overlay shows the first of the crops that are scored, the one in the middle" in done.err
    expected = model.predict([large, small], "face")
    assert [f"{score:.3f}" for score in expected.scores] == re.findall(r"score +([\d.]+)", done.out)
    assert done.out.count("face, scaled up") == 1 and done.out.count("perfect") == 2
    with Image.open(tmp_path / "o.png") as overlay, Image.open(large) as whole:
        assert overlay.width > 0 and model.seen(large).size == (model.config.crop,) * 2 < whole.size
    done = run("predict", tmp_path / "g", large, "--with", "scene=fase")
    assert done.code == 2 and "did you mean: face" in done.err
    for words, works in (
        (["scene=fase"], ["--with", "scene=natural"]),
        (["scene=[face, face]"], ["--with", "scene=auto"]),
    ):
        done = run("predict", tmp_path / "g", large, "--with", *words)
        assert (
            done.code == 2
            and f"try: {shlex.join(map(str, ['mmoe', 'predict', tmp_path / 'g', large, *works]))}\n" in done.err
        )


def test_the_host_is_open_clips(model: Gamma) -> None:
    from open_clip.model import CLIP

    assert isinstance(model.clip, CLIP)
    image = model.preprocess(picture())["image"][0]
    with torch.no_grad():
        torch.testing.assert_close(model.clip.visual(image), model.encode_image(image))
        features = model.clip(image, model.prompt_ids([0]))
    assert len(features) == 3


# ---- what is no input, no label and no prompt ----


@pytest.mark.parametrize(
    ("shape", "labels", "wrong"),
    [
        ((0, 3, 32, 32), {}, r"there is no picture in a batch of the shape \(0, 3, 32, 32\)"),
        ((2, 0, 3, 32, 32), {}, "there is no picture"),
        ((1, 3, 0, 32), {}, "there is no picture"),
        ((1, 3, 32, 32), {"scene": [0]}, r"scene is a tensor of torch.int64 and the shape \(1,\), not a list"),
        ((1, 3, 32, 32), {"scene": torch.tensor([0.0])}, "scene is a tensor of torch.int64"),
        ((1, 3, 32, 32), {"score": torch.zeros(1, 1)}, r"score is a tensor of numbers .* and the shape \(1, 1\)"),
        ((2, 3, 32, 32), {"score": torch.zeros(2, 2)}, "score is a tensor"),
        ((1, 3, 32, 32), {"score": torch.tensor(0.5)}, "score is a tensor"),
        ((1, 3, 32, 32), {"score": torch.zeros(1), "text": torch.zeros(1)}, r"text is a tensor .* shape \(1, any\)"),
    ],
)
def test_batches_that_cannot_be_run(model: Gamma, shape: Any, labels: Any, wrong: str) -> None:
    with pytest.raises(BadInput, match=f"run gamma on a batch\n  {wrong}"):
        model(torch.zeros(shape), **labels)


@pytest.mark.parametrize("score", ["abc", float("nan"), 55, -0.1, None, torch.zeros(2, 2), np.zeros((2, 2))])
def test_scores_that_cannot_be_trained_on(model: Gamma, score: Any) -> None:
    with pytest.raises(BadInput, match=r"(?s)train on the score .*it is a number from 0 to 1"):
        model.training_batch([{"image": picture(), "score": score}])


def test_samples_that_cannot_be_trained_on(model: Gamma) -> None:
    with pytest.raises(BadInput, match="train gamma on no sample"):
        model.training_batch([])
    with pytest.raises(Refused, match="its samples have no score: number 1"):
        model.training_batch([{"image": picture(), "score": 0.5}, {"image": picture()}])


def test_scenes_may_come_as_an_array(model: Gamma) -> None:
    found = model.predict([picture(0), picture(1)], scene=np.array(["natural", "face"]))
    assert found.scenes == ("natural", "face")
    assert model.scene_ids(np.array("face"), 2).tolist() == model.scene_ids("face", 2).tolist()
    with pytest.raises(UnknownName, match=r"no scene \['face'\]"):
        model.scene_ids([["face"]], 1)


def test_prompts_that_are_cut_off_before_the_level_are_told() -> None:
    long = build(scenes={"long": "a very long sentence of many words before the level, which is {}"})
    with pytest.raises(BadOverride, match=r"(?s)the prompt 'a very long .* has \d+ tokens.*; the model reads 32"):
        long.predict(picture())
    same = build(levels=("bad", "BAD"), level_values=(0.0, 1.0))
    with pytest.raises(BadOverride, match=r"levels \['bad', 'BAD'\] of 'natural' have the same tokens"):
        same.predict(picture())


def test_the_seed_of_crops_has_an_end() -> None:
    with pytest.raises(BadOverride, match="crop_seed is a whole number from 0 to"):
        GammaConfig(crop_seed=2**70)
    assert build(crops="random", crop_seed=2**63 - 1).predict(picture()).scores
