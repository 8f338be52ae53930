"""Earth-Adapter as its users meet it: masks of pictures of all kinds and sizes, training, bases, conversions.

That it computes what the authors' code computes is shown by tests/parity/test_earth_adapter.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmoe
import zoo
from mmoe.errors import BadInput, BadOverride, LoadMismatch, Refused
from mmoe.frequency_maps import frequency_figure, frequency_maps
from zoo import routes
from zoo.earth_adapter.adaptation import Adaptation, chosen_pixels, follow, half_of_classes
from zoo.earth_adapter.backbone import backbone_state, to_grid
from zoo.earth_adapter.config import ISAID, ISPRS, LOVEDA, RELEASED, EarthAdapterConfig
from zoo.earth_adapter.convert import from_original, to_original
from zoo.earth_adapter.heads import LightHead, Mask2FormerHead
from zoo.earth_adapter.model import EarthAdapter, window_starts
from zoo.earth_adapter.result import Segmentation, class_colors
from zoo.registry import _cards

CLASSES = ("sea", "land", "ice")
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 4, "classes": CLASSES}
SIZES |= {"adapter_dim": 4, "fft_layers": (1, 3), "cutoff": 0.6, "layer_scale": 1.0}
LIGHT = {**SIZES, "head": "light", "head_width": 8}
PAPER = {
    **SIZES,
    "head": "mask2former",
    "head_width": 32,
    "queries": 6,
    "pixel_layers": 1,
    "query_layers": 2,
    "points": 64,
}
heads = pytest.mark.parametrize("sizes", [LIGHT, PAPER], ids=["light", "mask2former"])


@pytest.fixture(autouse=True)
def _own_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the card of this family."""
    cards = CARDS
    monkeypatch.setattr(zoo.registry, "_cards", lambda: cards)


CARDS = _cards()


def build(**options: Any) -> EarthAdapter:
    return EarthAdapter(EarthAdapterConfig(**{**LIGHT, **options})).eval()


@pytest.fixture
def model() -> EarthAdapter:
    return build()


def picture(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(size: int = 32, seed: int = 0) -> dict[str, Any]:
    mask = np.random.default_rng(seed).integers(0, len(CLASSES), (size, size))
    mask[0, :3] = 255
    return {"image": Image.fromarray(picture(size, size, seed)), "mask": mask}


# ---- sizes and settings ----


@pytest.mark.parametrize(
    ("task", "used", "allocated"),
    [
        ("da_p2v", 3_974_049, 9_589_344),
        ("dg_v2p", 4_776_234, 9_589_344),
        ("da_v2p", 2_007_009, 4_868_448),
        ("da_u2r", 2_415_786, 4_868_448),
        ("dg_p2v", 1_825_674, 3_688_224),
        ("da_r2u", 1_023_489, 2_508_000),
    ],
)
def test_parameters_of_the_adapters_are_those_of_the_paper(task: str, used: int, allocated: int) -> None:
    for compact, expected in ((True, used), (False, allocated)):
        with torch.device("meta"):
            model = EarthAdapter(EarthAdapterConfig(task=task, compact=compact, head="light", head_width=1))
        adapters = {n: p for n, p in model.named_parameters() if ".frequency_adapter." in n}
        assert sum(p.numel() for p in adapters.values()) == expected
        trained = sum(p.numel() for p in adapters.values() if p.requires_grad)
        assert trained == used


def test_the_paper_model_of_every_task() -> None:
    tables = {"p": ISPRS, "v": ISPRS, "r": LOVEDA, "u": LOVEDA, "ss_loveda": LOVEDA, "ss_isaid": ISAID}
    for task, setting in RELEASED.items():
        config = EarthAdapterConfig(task=task)
        assert config.classes == tables.get(task, tables.get(task[3], ())), task
        first, behind = setting.fft_layers
        assert config.fft_layers == tuple(range(first, behind)) and config.adapter_dim == setting.adapter_dim
    model = zoo.load("earth_adapter_dinov2_l", device="meta", task="dg_u2r")
    assert list(mmoe.moe_layers(model)) == [f"backbone.blocks.{i}.frequency_adapter.adapter" for i in (21, 22, 23)]
    assert sum(p.numel() for n, p in model.named_parameters() if n.startswith("head.")) == 20_562_120
    assert model.config.window_stride == 341 and model.config.out_layers == (7, 11, 15, 23)


def test_options_win_over_the_setting_of_a_task() -> None:
    config = EarthAdapterConfig(task="da_u2r", adapter_dim=8, cutoff=0.5)
    assert (config.adapter_dim, config.cutoff, config.fft_layers) == (8, 0.5, tuple(range(18, 24)))
    again = EarthAdapterConfig(**asdict(config))
    assert again == config


def test_a_task_that_changes_nothing_is_refused() -> None:
    wrong = r"(?s)task='dg_p2v'.*all of them are given.*try: adapter_dim=None, fft_layers=None, classes=None"
    with pytest.raises(BadOverride, match=wrong):
        zoo.load("earth_adapter_tiny", task="dg_p2v", device="meta")
    options = {"adapter_dim": None, "fft_layers": None, "classes": None, "cutoff": None, "colors": None}
    assert zoo.load("earth_adapter_tiny", task="dg_p2v", device="meta", **options).config.adapter_dim == 24


def test_blocks_that_split_frequencies_are_among_those_with_adapters() -> None:
    assert EarthAdapterConfig(task="da_r2u", adapter_layers=(22, 23)).fft_layers == (22, 23)
    with pytest.raises(BadOverride, match=r"(?s)fft_layers=\[3\].*try: adapter_layers=\[3, 5\]"):
        EarthAdapterConfig(fft_layers=(3,), adapter_layers=(5,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptation_threshold": 7.0}, "adaptation_threshold is a finite number of at least 0 and of at most 1"),
        ({"task": "da_p2w"}, "task='da_p2w'\n  did you mean: da_p2v"),
        ({"fft_layers": (4,)}, "a layer of fft_layers is a whole number from 0 to 3"),
        (
            {"out_layers": (0, 1)},
            "out_layers=[0, 1]\n  the head takes the patches of four blocks\n  try: out_layers=[0, 1, 2, 3]",
        ),
        ({"heads": 5}, "heads=5 in a backbone of width 32"),
        ({"image_size": 30}, "image_size=30 with patch_size=8\n  patches must cover the picture\n  try: image_size=24"),
        ({"head": "mask2former", "head_width": 24}, "head_width=24\n  Mask2Former norms its channels in 32 groups"),
        ({"classes": ()}, "0 classes"),
        ({"classes": ("a", "b", "a")}, "no two have the same name"),
        ({"out_layers": (1, 1, 2, 3)}, "blocks are named once, the first ones first"),
        ({"out_layers": (3, 2, 1, 0)}, "blocks are named once, the first ones first"),
        ({"colors": ("#000000", "red", "#FFFFFF")}, "the color 'red'\n  colors are written as #RRGGBB"),
        ({"colors": ("#000000", "#11223344", "#FFFFFF")}, "the color '#11223344'"),
        ({"colors": ("#000000",)}, "1 colors for 3 classes"),
        ({"cutoff": 2.0, "adapters": "none"}, "cutoff=2.0\n  it is a share of the grid"),
        ({"box": "round"}, "box='round' does not fit EarthAdapterConfig\n  box is 'half_open' or 'symmetric'"),
        ({"compact": "no"}, "compact='no' does not fit EarthAdapterConfig\n  compact is bool, not str"),
        ({"stride": 40}, "stride is a whole number from 1 to 32"),
        ({"image_std": (0.0, 1.0, 1.0)}, "image_std has a number of at least 1e-06"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOverride) as error:
        EarthAdapterConfig(**{**LIGHT, **options})
    assert message in str(error.value)


# ---- predictions ----


@heads
def test_a_mask_of_a_picture(sizes: dict[str, Any]) -> None:
    model = EarthAdapter(EarthAdapterConfig(**sizes)).eval()
    out = model.predict(picture(), all_probs=True)
    assert out.mask.shape == out.confidence.shape == (32, 32) and out.mask.dtype == torch.uint8
    assert out.classes == CLASSES and len(out.colors) == 3
    torch.testing.assert_close(out.probs.sum(0), torch.ones(32, 32))
    assert out.probs.argmax(0).equal(out.mask.long())
    torch.testing.assert_close(out.probs.amax(0), out.confidence)
    scores = model(**model.preprocess(picture())).scores[0]
    assert out.mask.equal(scores.argmax(0).to(torch.uint8))


@heads
@pytest.mark.parametrize("size", [(20, 50), (7, 9), (100, 75), (33, 32), (1, 1), (5, 40), (32, 200)])
def test_pictures_of_any_size(sizes: dict[str, Any], size: tuple[int, int]) -> None:
    out = build(**{**sizes, "head_width": 64}).predict(picture(*size), all_probs=True)
    assert out.mask.shape == size and out.probs.shape == (3, *size)


@pytest.mark.parametrize("size", [(75, 100), (40, 20)])
def test_windows_are_averaged(model: EarthAdapter, size: tuple[int, int]) -> None:
    """By hand: all windows in a whole picture of sums and counts."""
    pixels, (height, width) = picture(*size), size
    tall, wide = (min(32, -(-side // 8) * 8) for side in size)
    padded = np.pad(pixels, ((0, max(0, tall - height)), (0, max(0, wide - width)), (0, 0)), mode="edge")
    total, count = torch.zeros(3, *padded.shape[:2]), torch.zeros(padded.shape[:2])
    stride = model.config.window_stride
    for top in sorted({min(y, padded.shape[0] - tall) for y in range(0, padded.shape[0], stride)}):
        for left in sorted({min(x, padded.shape[1] - wide) for x in range(0, padded.shape[1], stride)}):
            window = model._pixels(padded[top : top + tall, left : left + wide])[None]
            with torch.no_grad():
                total[:, top : top + tall, left : left + wide] += model(window).scores[0]
            count[top : top + tall, left : left + wide] += 1
    expected = (total / count)[:, :height, :width]
    for batch in (1, 3):
        found = model.predict(pixels, all_probs=True, batch_size=batch)
        torch.testing.assert_close(found.probs, expected, atol=1e-5, rtol=1e-5)


def test_windows_of_a_narrow_picture_are_run_together(model: EarthAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    scores = model._scores
    monkeypatch.setattr(model, "_scores", lambda image: sizes.append(len(image)) or scores(image))
    model.predict(picture(32 + 6 * model.config.window_stride, 20), batch_size=4)
    assert sizes == [4, 3]


@pytest.mark.parametrize(
    ("batch", "wrong"),
    [
        ({"image": torch.zeros(3, 32, 32)}, "pictures of the shape (3, 32, 32) are not (B, 3, H, W)"),
        ({"mask": torch.zeros(2, 16, 16).long()}, "mask is a tensor of torch.int64 and the shape (2, 32, 32), not of"),
        ({"label": torch.zeros(2).long()}, "the head 'light' has no use for a label"),
        (
            {"mask": torch.zeros(2, 32, 32).long(), "target": torch.zeros(2, 3, 32, 32)},
            "a target needs masks, and a model with adaptation_begin",
        ),
    ],
)
def test_batches_that_do_not_fit(model: EarthAdapter, batch: dict[str, Tensor], wrong: str) -> None:
    with pytest.raises(BadInput) as error:
        model(**{"image": torch.zeros(2, 3, 32, 32)} | batch)
    assert wrong in str(error.value)
    assert model._adaptation is None


def test_labels_of_pictures_fit_the_head() -> None:
    model = build(head="classes", adapters="none")
    for label, wrong in ((torch.zeros(3).long(), "not of torch.int64"), (None, "has no use for a mask")):
        given = {"mask": torch.zeros(2, 32, 32).long()} if label is None else {"label": label}
        with pytest.raises(BadInput, match=wrong):
            model(torch.zeros(2, 3, 32, 32), **given)


def test_texts_are_refused(model: EarthAdapter) -> None:
    with pytest.raises(BadInput, match="segment by texts\n  earth_adapter knows its classes alone"):
        model.predict(picture(), ["water"])


def test_windows_of_the_released_setting() -> None:
    assert window_starts(512, 512, 341) == [0] and window_starts(853, 512, 341) == [0, 341]
    for length in range(512, 2000, 37):
        starts = window_starts(length, 512, 341)
        assert starts[0] == 0 and starts[-1] + 512 == length
        assert all(0 < b - a <= 341 for a, b in pairwise(starts))


def test_a_100_megapixel_picture_is_refused_and_a_large_one_is_cut(model: EarthAdapter, tmp_path: Path) -> None:
    Image.new("L", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(BadInput, match="the limit is 50 megapixels"):
        model.predict(tmp_path / "huge.png")
    assert model.predict(picture(30, 900)).mask.shape == (30, 900)


def test_kinds_of_pictures(model: EarthAdapter, tmp_path: Path) -> None:
    rgb = picture(24, 40)
    expected = model.predict(rgb).mask
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert model.predict(tmp_path / "a.png").mask.equal(expected)
    alpha = np.concatenate([rgb, np.full((24, 40, 1), 255, np.uint8)], axis=2)
    assert model.predict(alpha).mask.equal(expected)
    grey = rgb[..., 0]
    assert model.predict(grey).mask.equal(model.predict(np.stack([grey] * 3, -1)).mask)
    Image.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    assert model.predict(tmp_path / "deep.png").mask.equal(model.predict(grey).mask)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with pytest.raises(BadInput, match="the file is damaged"):
        model.predict(tmp_path / "broken.png")


def test_weights_that_hold_no_numbers_are_told(model: EarthAdapter) -> None:
    with torch.no_grad():
        model.head.out.bias[0] = torch.nan
    with pytest.raises(BadInput, match="no classes come out"):
        model.predict(picture())


def test_classes_and_switched_off_experts_make_a_difference(model: EarthAdapter) -> None:
    perturb(model)
    before = model.predict(picture(), all_probs=True).probs
    with mmoe.override(model, mmoe.switch_off([1, 2])):
        after = model.predict(picture(), all_probs=True).probs
    assert not torch.allclose(before, after, atol=1e-4)


def perturb(model: EarthAdapter) -> None:
    for adapter in mmoe.surgery.frequency_adapters(model).values():
        torch.nn.init.ones_(adapter.scale)


# ---- the result ----


def result() -> Segmentation:
    mask = torch.tensor([[0, 0, 1], [2, 2, 2]], dtype=torch.uint8)
    return Segmentation(
        mask=mask, confidence=torch.ones(2, 3), classes=CLASSES, colors=("#0000FF", "#00FF00", "#FFFFFF")
    )


def test_numbers_of_a_result() -> None:
    found = result()
    assert found.shares() == {"sea": pytest.approx(2 / 6), "land": pytest.approx(1 / 6), "ice": 0.5}
    assert found.top(2) == [("ice", 0.5), ("sea", pytest.approx(1 / 3))]
    assert np.asarray(found).tolist() == found.mask.tolist()
    told = json.loads(json.dumps(found.as_dict()))
    assert (told["height"], told["width"], told["confidence"]) == (2, 3, 1.0)


def test_wrong_uses_of_a_result() -> None:
    with pytest.raises(BadInput, match=r"try: save\('mask.png'\)"):
        result().save("")
    with pytest.raises(BadOverride, match="alpha=3"):
        result().overlay(picture(), alpha=3)


def test_a_saved_mask_has_numbers_and_colours(tmp_path: Path) -> None:
    path = result().save(tmp_path / "mask.png")
    with Image.open(path) as saved:
        assert np.asarray(saved).tolist() == result().mask.tolist()
        assert saved.convert("RGB").getpixel((2, 0)) == (0, 255, 0)
    with pytest.raises(BadInput, match=r"other formats than PNG change its numbers\n  try: save\('mask.png'\)"):
        result().save(tmp_path / "mask.jpg")


def test_pictures_of_a_result() -> None:
    over = result().overlay(np.zeros((2, 3, 3), np.uint8), alpha=0.5)
    assert over.getpixel((0, 0)) == (0, 0, 127) and over.size == (3, 2)
    legend = result().legend()
    assert legend.height == 3 * 28 and legend.getpixel((15, 14)) == (255, 255, 255)
    with pytest.raises(BadInput, match="lay a mask over 9 x 9 pixels"):
        result().overlay(np.zeros((9, 9, 3), np.uint8))


def test_colours_differ() -> None:
    for count in (1, 3, 8, 9, 20, 60):
        assert len(set(class_colors(count))) == count


# ---- training ----


@heads
@pytest.mark.parametrize("adapters", ["frequency", "spatial", "none"])
def test_what_is_trained(sizes: dict[str, Any], adapters: str) -> None:
    model = EarthAdapter(EarthAdapterConfig(**{**sizes, "adapters": adapters})).train()
    batch = model.training_batch([sample(seed=1), sample(seed=2)])
    out = model(**batch)
    torch.testing.assert_close(out.loss, torch.stack(list(out.losses.values())).sum())
    out.loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == named
    expected = {n for n in model.state_dict() if n.startswith("head.")}
    if adapters != "none":
        expected |= {n for n in model.state_dict() if ".frequency_adapter." in n}
    assert named == expected
    count = {"frequency": 2, "spatial": 0, "none": 0}[adapters]
    assert len(mmoe.moe_layers(model)) == count


def test_methods_share_one_head() -> None:
    shapes = [
        {n: tuple(p.shape) for n, p in build(adapters=adapters).head.named_parameters()}
        for adapters in ("frequency", "spatial", "none")
    ]
    assert shapes[0] == shapes[1] == shapes[2] != {}


@heads
def test_it_learns_a_picture(sizes: dict[str, Any]) -> None:
    model = EarthAdapter(EarthAdapterConfig(**sizes)).train()
    mask = np.zeros((32, 32), dtype=np.int64)
    mask[:, 16:] = 2
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:, 16:] = 200
    batch = model.training_batch([{"image": image, "mask": mask}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    found = model.eval().predict(image).mask.numpy()
    assert (found == mask).mean() > 0.9


def test_the_light_loss_leaves_255_out(model: EarthAdapter) -> None:
    batch = model.training_batch([sample()])
    whole = model(**batch).loss
    scores = model(image=batch["image"]).scores
    counted = batch["mask"] != 255
    picked = scores.gather(1, torch.where(counted, batch["mask"], 0)[:, None])[:, 0][counted]
    torch.testing.assert_close(whole, -picked.log().mean())
    nothing = model(image=batch["image"], mask=torch.full_like(batch["mask"], 255)).loss
    assert nothing.item() == 0.0


def test_mask2former_without_any_class_has_a_loss() -> None:
    model = EarthAdapter(EarthAdapterConfig(**PAPER))
    image = model.preprocess(picture())["image"]
    loss = model(image=image, mask=torch.full((1, 32, 32), 255)).loss
    assert loss.isfinite()


def test_a_batch_is_resized_and_cut_alike(model: EarthAdapter) -> None:
    image, mask = picture(64, 96), np.zeros((64, 96), dtype=np.int64)
    image[:] = 0
    image[:, 48:], mask[:, 48:] = 255, 1
    batch = model.training_batch([{"image": image, "mask": mask}])
    assert batch["image"].shape == (1, 3, 32, 32) and batch["mask"].shape == (1, 32, 32)
    bright = batch["image"][0, 0] > 0
    assert (bright == (batch["mask"][0] == 1)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"mask": np.full((32, 32), 3)}, BadInput, "train on class 3\n  the model has 3 classes, from 0"),
        ({"mask": np.full((32, 32), -1)}, BadInput, "train on class -1"),
        ({"mask": np.full((32, 32), 1.7)}, BadInput, "train on a mask of float64\n  numbers of classes are whole"),
        ({"mask": np.full((32, 32), np.nan)}, BadInput, "train on a mask of float64"),
        ({"mask": np.full((32, 32), "sea")}, BadInput, "train on a mask of <U3"),
        ({"mask": np.zeros((16, 32), dtype=int)}, BadInput, "train on a mask of (16, 32)\n  its picture has 32 x 32"),
    ],
)
def test_masks_that_do_not_fit(model: EarthAdapter, change: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(kind) as error:
        model.training_batch([{**sample(), **change}])
    assert str(error.value).startswith(message)


def test_data_without_masks(model: EarthAdapter) -> None:
    with pytest.raises(Refused, match="its samples have no mask"):
        model.training_batch([{"image": picture(), "text": "a"}])
    with pytest.raises(Refused, match="its samples have no mask: number 1"):
        model.training_batch([sample(), {"image": picture()}])
    with pytest.raises(BadInput, match="train earth_adapter on no sample"):
        model.training_batch([])


@pytest.mark.parametrize("label", [1.7, "sea", np.array([0, 1]), 3])
def test_labels_that_cannot_be_trained_on(label: Any) -> None:
    with pytest.raises(BadInput, match=r"train on a label|train on class 3"):
        build(head="classes", adapters="none").training_batch([{"image": picture(), "label": label}])


@pytest.mark.parametrize(
    ("shape", "labels", "wrong"),
    [
        ((0, 3, 32, 32), {}, "at least one"),
        ((1, 3, 32, 32), {"mask": torch.zeros(1, 32, 32).byte()}, "mask is a tensor of torch.int64 .* torch.uint8"),
        ((1, 3, 32, 32), {"mask": torch.zeros(1, 32, 32)}, "mask is a tensor of torch.int64 .* torch.float32"),
        ((1, 3, 32, 32), {"mask": [0]}, "mask is a tensor of torch.int64 .* not a list"),
    ],
)
def test_batches_that_cannot_be_run(model: EarthAdapter, shape: Any, labels: Any, wrong: str) -> None:
    with pytest.raises(BadInput, match=f"run earth_adapter on a batch\n  .*{wrong}"):
        model(torch.zeros(shape), **labels)


def test_all_probs_is_true_or_false(model: EarthAdapter) -> None:
    with pytest.raises(BadOverride, match="all_probs is true or false"):
        model.predict(picture(), all_probs=7)


def test_sides_must_be_whole_patches(model: EarthAdapter) -> None:
    with pytest.raises(BadInput, match="run on 30 x 32 pixels\n  the sides are whole patches of 8 pixels"):
        model(torch.zeros(1, 3, 30, 32))


def test_checkpointing_changes_no_gradient(model: EarthAdapter) -> None:
    perturb(model.train())
    batch = model.training_batch([sample()])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.set_grad_checkpointing()
    for name, value in gradients().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def test_a_backbone_learns_labels_and_becomes_a_base(tmp_path: Path) -> None:
    plain = {**LIGHT, "adapters": "none", "head": "classes", "classes": ("day", "night")}
    pretrained = EarthAdapter(EarthAdapterConfig(**plain)).train()
    batch = pretrained.training_batch([{"image": picture(), "label": 1}, {"image": picture(seed=1), "label": 0}])
    out = pretrained(**batch)
    assert out.scores.shape == (2, 2)
    out.loss.backward()
    assert all(p.grad is not None for p in pretrained.parameters())
    with pytest.raises(Refused, match="the head 'classes' tells one label per picture"):
        pretrained.eval().predict(picture())
    pretrained.save(tmp_path / "pretrained")
    build().save(tmp_path / "start")
    model = zoo.load(tmp_path / "start", "base", device="cpu", base=str(tmp_path / "pretrained"))
    own = pretrained.state_dict()
    assert all(
        own[name].equal(value) for name, value in model.state_dict().items() if name in own and "head" not in name
    )
    assert all(".frequency_adapter." in n or n.startswith("head.") for n in model.load_report.missing)
    model.save(tmp_path / "adapted")
    names = set(load_file(tmp_path / "adapted" / "model.safetensors"))
    assert names and all(".frequency_adapter." in n or n.startswith("head.") for n in names)
    again = zoo.load(tmp_path / "adapted", device="cpu")
    assert again.predict(picture()).mask.equal(model.predict(picture()).mask)
    assert again.load_report.base == str(tmp_path / "pretrained" / "model.safetensors")


# ---- adaptation ----


def target(seed: int = 5) -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_the_teacher_is_left_out_of_training() -> None:
    student = build().train()
    adaptation = Adaptation(student, begin=0)
    source = student.training_batch([sample()])
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    adaptation.step = 1
    adaptation.loss(source, target()).loss.backward()
    assert not any(
        p.requires_grad or p.grad is not None for n, p in adaptation.teacher.named_parameters() if "head" in n
    )
    assert set(map(id, optimizer.param_groups[0]["params"])).isdisjoint(map(id, adaptation.teacher.parameters()))
    before = adaptation.state_dict()
    assert set(before) == {"step", *(f"teacher.{n}" for n, p in student.named_parameters() if p.requires_grad)}
    before = {n: v.clone() for n, v in before.items()}
    optimizer.step()
    adaptation.after_step(3)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            expected = 0.75 * before[f"teacher.{name}"] + 0.25 * parameter
            torch.testing.assert_close(adaptation.state_dict()[f"teacher.{name}"], expected.detach())
    assert student.state_dict().keys() == build().state_dict().keys(), "a student is saved without its teacher"


def test_nothing_is_mixed_before_it_begins() -> None:
    student = build()
    source = student.training_batch([sample()])
    adaptation = Adaptation(student, begin=4000)
    adaptation.step = 4000
    assert set(adaptation.loss(source, target()).losses) == {"cross_entropy"}
    adaptation.after_step(4000)
    found = adaptation.loss(source, target())
    assert set(found.losses) == {"cross_entropy", "mix_cross_entropy"}
    torch.testing.assert_close(found.loss, found.losses["cross_entropy"] + found.losses["mix_cross_entropy"])


def test_mixed_pictures_and_labels_belong_together() -> None:
    student = build()
    source = student.training_batch([sample()])
    kept = source["mask"].clone()
    batch, said = Adaptation(student).mix(source, target(), torch.Generator().manual_seed(0))
    pasted = (batch["image"] == source["image"]).all(1)
    assert source["mask"].equal(kept), "labels of the source stay"
    assert batch["mask"][pasted].equal(source["mask"][pasted])
    assert batch["mask"][~pasted].equal(said.labels[~pasted])
    assert batch["image"][0][:, ~pasted[0]].equal(target()[0][:, ~pasted[0]])
    classes = source["mask"][pasted].unique()
    assert len(classes) == 2 and chosen_pixels(source["mask"], [classes]).equal(pasted)


def test_half_of_the_classes_by_chance() -> None:
    labels = torch.tensor([[0, 1], [4, 255]])
    drawn = {tuple(sorted(half_of_classes(labels).tolist())) for _ in range(60)}
    assert all(len(one) == 2 for one in drawn) and {c for one in drawn for c in one} == {0, 1, 4, 255}


def test_a_threshold_weighs_what_the_teacher_is_sure_of() -> None:
    student = build()
    source = student.training_batch([sample()])
    sure = [Adaptation(student, begin=0, threshold=threshold) for threshold in (0.0, 1.1)]
    for one in sure:
        one.step = 1
    losses = [one.loss(source, target(), torch.Generator().manual_seed(0)).losses for one in sure]
    assert losses[0]["mix_cross_entropy"] > 0 and losses[1]["mix_cross_entropy"] == 0


def test_a_teacher_goes_on_from_its_state() -> None:
    student = build()
    first, second = Adaptation(student), None
    first.after_step(6)
    with torch.no_grad():
        student.head.out.bias += 1
    second = Adaptation(student)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.teacher.head.out.bias.equal(first.teacher.head.out.bias) and second.step == 7
    assert not second.teacher.head.out.bias.equal(student.head.out.bias)
    follow(second.teacher, student, 0)
    assert second.teacher.head.out.bias.equal(student.head.out.bias)


def adapted() -> EarthAdapter:
    return build(adaptation_begin=0, adaptation_weight=0.25).train()


def test_a_model_adapts_where_a_batch_has_a_target() -> None:
    model = adapted()
    batch = model.training_batch([{**sample(), "target": picture(seed=7)}])
    assert batch["target"].equal(model._middles([Image.fromarray(picture(seed=7))]))
    model.load_training_state({})
    assert set(model(**batch).losses) == {"cross_entropy"} and model.training_state()["step"] == 0
    model.after_step(0)
    torch.manual_seed(3)
    found = model(**batch)
    adaptation = Adaptation(model, begin=0, weight=0.25)
    adaptation.step = 1
    torch.manual_seed(3)
    expected = adaptation.loss({name: batch[name] for name in ("image", "mask")}, batch["target"])
    assert found.losses.keys() == expected.losses.keys() == {"cross_entropy", "mix_cross_entropy"}
    torch.testing.assert_close(found.losses, expected.losses)
    assert set(model(image=batch["image"], mask=batch["mask"]).losses) == {"cross_entropy"}


def test_a_model_that_adapts_is_saved_without_its_teacher(tmp_path: Path) -> None:
    model = adapted()
    model.load_training_state({})
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in build().named_parameters()}
    model.save(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) <= names
    again = zoo.load(tmp_path / "saved", device="cpu", adaptation_begin=None)
    again.load_training_state({})
    assert again.training_state() == {} and build().training_state() == {}


def test_training_begins_anew_or_goes_on() -> None:
    model = adapted()
    model.load_training_state({})
    model.after_step(4)
    kept = copy.deepcopy(model.training_state())
    with torch.no_grad():
        model.head.out.bias += 1
    model.load_training_state({})
    assert model.training_state()["step"] == 0
    assert model.training_state()["teacher.head.out.bias"].equal(model.head.out.bias)
    model.load_training_state(kept)
    assert model.training_state()["step"] == 5
    assert model.training_state()["teacher.head.out.bias"].equal(kept["teacher.head.out.bias"])
    assert not kept["teacher.head.out.bias"].equal(model.head.out.bias)


def test_adaptation_needs_pictures_without_labels_and_pixels_to_label() -> None:
    with pytest.raises(Refused, match=r"no target: number 0\n  try: data.options.unlabelled=target"):
        adapted().training_batch([sample()])
    assert "target" not in build().training_batch([{**sample(), "target": picture()}])
    for options in ({"adaptation_begin": -1}, {"adaptation_weight": -1}, {"adaptation_threshold": "sure"}):
        with pytest.raises(BadOverride, match=next(iter(options))):
            build(**options)
    with pytest.raises(BadOverride, match="a teacher labels pixels, and this head none"):
        build(adaptation_begin=0, head="classes", adapters="none")


# ---- backbones from elsewhere ----


def dinov2(patch: int = 8, size: int = 32, registers: int = 0) -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 4}
    sizes |= {"image_size": size, "patch_size": patch, "attn_implementation": "sdpa", "layer_norm_eps": 1e-6}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return transformers.Dinov2WithRegistersModel(config).eval()
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()


@pytest.mark.parametrize("registers", [0, 3])
def test_weights_of_transformers_as_a_base(registers: int, tmp_path: Path) -> None:
    host = dinov2(registers=registers)
    for parameter in host.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    host.save_pretrained(tmp_path / "dinov2")
    options = {"adapters": "none", "num_registers": registers}
    build(**options).save(tmp_path / "start")
    model = zoo.load(tmp_path / "start", "base", device="cpu", base=str(tmp_path / "dinov2" / "model.safetensors"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = host(image, output_hidden_states=True).hidden_states
        maps = model.maps(image)
    for one, state in zip(maps, states[1:], strict=True):
        torch.testing.assert_close(one.flatten(2).transpose(1, 2), state[:, 1 + registers :], atol=1e-4, rtol=1e-4)
    in_memory = backbone_state(host.state_dict(), model.config)  # names inside the library differ from those in files
    assert all(value.equal(model.state_dict()[f"backbone.{name}"]) for name, value in in_memory.items())


def test_another_patch_size_and_grid() -> None:
    state = {
        f"backbone.{n}": v for n, v in build(patch_size=4, image_size=28, adapters="none").backbone.state_dict().items()
    }
    model = build(adapters="none")
    found = model.from_base(state, "backbone")
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in model.state_dict().items() if n in found}
    flat = to_grid({"patch_embed.proj.weight": torch.full((2, 3, 14, 14), 0.7)}, 16, (2, 2))
    torch.testing.assert_close(flat["patch_embed.proj.weight"], torch.full((2, 3, 16, 16), 0.7))


def test_timm_positions_without_a_class_row() -> None:
    table = torch.randn(1, 16, 6)
    found = to_grid({"pos_embed": table}, 8, (4, 4))["pos_embed"]
    assert found[:, 0].count_nonzero() == 0 and found[:, 1:].equal(table)


def test_a_file_of_something_else_is_no_backbone(model: EarthAdapter) -> None:
    with pytest.raises(LoadMismatch, match=r"unknown keys: encoder\.layer\.0\.other"):
        model.from_base({"embeddings.cls_token": torch.zeros(1), "encoder.layer.0.other": torch.zeros(1)}, "backbone")


# ---- the authors' files ----


def original(config: EarthAdapterConfig, **changes: Any) -> dict[str, Tensor]:
    """A file as released: dead experts of all layers, old norms, adapters and decoder alone."""
    model = EarthAdapter(replace(config, compact=False, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = to_original(model.state_dict())
    kept = {n: v for n, v in state.items() if "refine_feat" in n or n.startswith("decode_head.")}
    for layer in range(config.depth):
        kept |= {
            f"backbone.refine_feat.layer_norm.{layer}.{kind}": torch.zeros(config.width) for kind in ("weight", "bias")
        }
    return kept


def paper(**options: Any) -> EarthAdapterConfig:
    return EarthAdapterConfig(**{**PAPER, **options})


def test_a_released_file_on_its_base(tmp_path: Path) -> None:
    state, backbone = original(paper()), EarthAdapter(paper(adapters="none")).backbone.state_dict()
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "released.pth")
    save_file(backbone, tmp_path / "dinov2.safetensors")
    EarthAdapter(paper()).save(tmp_path / "model")
    file, base = tmp_path / "released.pth", str(tmp_path / "dinov2.safetensors")
    with pytest.raises(LoadMismatch, match="missing"):
        zoo.load(tmp_path / "model", file, device="cpu")
    model = zoo.load(tmp_path / "model", file, device="cpu", base=base)
    report = model.load_report
    assert report.random == 0 and len(report.from_base) == len(backbone) and report.base == base
    own = model.state_dict()
    packed = own["backbone.blocks.1.frequency_adapter.adapter.experts.up_proj"]
    assert packed[2].equal(state["backbone.refine_feat.mlp_list3.1.0.weight"])
    plain = own["backbone.blocks.0.frequency_adapter.adapter.experts.up_proj"]
    assert plain[0].equal(state["backbone.refine_feat.mlp_list1.0.0.weight"]) and len(plain) == 1
    attention = own["head.transformer_module.decoder.layers.0.self_attn.k_proj.weight"]
    assert attention.equal(state["decode_head.transformer_decoder.layers.0.self_attn.attn.in_proj_weight"][32:64])
    assert model.predict(picture()).mask.shape == (32, 32)


def test_a_file_with_the_backbone_needs_no_base(tmp_path: Path) -> None:
    whole = EarthAdapter(paper())
    state = to_original(whole.state_dict())
    state |= {"backbone.mask_token": torch.zeros(1, 32), "backbone.norm.weight": torch.ones(32)}
    save_file(state, tmp_path / "whole.safetensors")
    whole.save(tmp_path / "model")
    model = zoo.load(tmp_path / "model", tmp_path / "whole.safetensors", device="cpu")
    assert all(value.equal(whole.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("token_dim", [0, 5])
def test_there_and_back(compact: bool, token_dim: int) -> None:
    model = EarthAdapter(paper(compact=compact, token_dim=token_dim))
    written = to_original(model.state_dict())
    config, again = from_original(written, like=model.config)
    assert config == model.config
    assert again.keys() == model.state_dict().keys()
    assert all(value.equal(model.state_dict()[name]) for name, value in again.items())
    if token_dim:
        assert written["backbone.refine_feat.refine_token"].shape == (4, 16, 5)
        assert written["backbone.refine_feat.mlp_list1.1.0.weight"].shape == (4, 37)


def test_a_file_without_dead_parts_says_which_layers_split() -> None:
    model = EarthAdapter(paper(fft_layers=(0, 2)))
    config, state = from_original(to_original(model.state_dict()), like=paper())
    assert config.fft_layers == (0, 2) and state.keys() == model.state_dict().keys()


def test_a_file_with_adapters_has_adapters_whatever_the_config_said() -> None:
    model = EarthAdapter(paper())
    config, state = from_original(to_original(model.state_dict()), like=paper(adapters="none"))
    assert config.adapters == "frequency" and state.keys() == EarthAdapter(config).state_dict().keys()


def test_plain_adapters_are_known_by_their_file() -> None:
    model = EarthAdapter(paper(adapters="spatial"))
    config, _ = from_original(to_original(model.state_dict()), like=paper())
    assert config.adapters == "spatial" and config.fft_layers == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"backbone.refine_feat.other": torch.zeros(1)}), "unknown keys: refine_feat.other"),
        (lambda s: s.update({"decode_head.other.weight": torch.zeros(1)}), "unknown keys: decode_head.other.weight"),
        (lambda s: s.update({"ema_backbone.cls_token": torch.zeros(1)}), "unknown keys: ema_backbone.cls_token"),
        (lambda s: s.pop("backbone.refine_feat.scale"), "it has no 'refine_feat.scale'"),
        (lambda s: s.pop("backbone.refine_feat.router.1.bias"), "it has no 'refine_feat.router.1.bias'"),
    ],
)
def test_files_that_are_not_theirs(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    state = original(paper())
    change(state)
    with pytest.raises(LoadMismatch) as error:
        from_original(state, like=paper())
    assert message in str(error.value)


def test_the_wrong_file_for_a_model(tmp_path: Path) -> None:
    torch.save(original(paper(adapter_dim=8)), tmp_path / "other.pth")
    EarthAdapter(paper()).save(tmp_path / "model")
    with pytest.raises(LoadMismatch, match="adapter_dim: 8 in the file, 4 asked"):
        zoo.load(tmp_path / "model", tmp_path / "other.pth", device="cpu")


def test_models_that_their_layout_cannot_hold() -> None:
    with pytest.raises(Refused, match=r"they have no head\."):
        to_original(build().state_dict())


def test_conversion_from_the_command_line(run: Any, tmp_path: Path) -> None:
    torch.save(original(paper()), tmp_path / "released.pth")
    save_file(EarthAdapter(paper(adapters="none")).backbone.state_dict(), tmp_path / "dinov2.safetensors")
    options = {"image_size": 32, "patch_size": 8, "heads": 4, "layer_scale": 1.0, "cutoff": 0.6, "fft_layers": "[1,3]"}
    options |= {"base": tmp_path / "dinov2.safetensors", "queries": 6, "pixel_layers": 1, "query_layers": 2}
    options |= {"head_width": 32, "classes": "[sea,land,ice]"}
    settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "converted"
    done = run("convert", "from-original", "earth_adapter", tmp_path / "released.pth", "--out", out, *settings)
    assert done.code == 0, done.err
    model = zoo.load(out, device="cpu")
    assert model.config.fft_layers == (1, 3) and model.config.base == str(tmp_path / "dinov2.safetensors")
    assert not any("backbone.blocks.0.attn" in n for n in load_file(out / "model.safetensors"))
    back = run("convert", "to-original", out, "--out", tmp_path / "back.safetensors")
    assert back.code == 0, back.err
    again = run("convert", "from-original", "earth_adapter", tmp_path / "back.safetensors", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    other = zoo.load(tmp_path / "again", device="cpu")
    assert all(value.equal(model.state_dict()[name]) for name, value in other.state_dict().items())


# ---- the command line ----


@pytest.fixture
def saved(model: EarthAdapter, tmp_path: Path) -> Path:
    """A folder of the small model, with a card that says what it does."""
    perturb(model)
    return model.save(tmp_path / "saved", card=replace(zoo.card("earth_adapter_dinov2_l"), weights={}))


@pytest.mark.parametrize("size", [(32, 32), (70, 90), (9, 20)])
def test_predict_from_the_command_line(run: Any, saved: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    tile, mask, trace = tmp_path / "tile.png", tmp_path / "mask.png", tmp_path / "trace.json"
    Image.fromarray(picture(*size)).save(tile)
    drawn = {"heatmap": tmp_path / "heatmap.png", "overlay": tmp_path / "overlay.png"}
    files = ["--out", mask, "--trace", trace, *(word for kind, path in drawn.items() for word in (f"--{kind}", path))]
    done = run("predict", saved, tile, *files)
    assert done.code == 0, done.err
    assert "note: experts are drawn as in one pass over the whole picture" in done.err
    model = zoo.load(saved, device="cpu")
    expected = model.predict(tile)
    with Image.open(mask) as found:
        assert np.asarray(found).tolist() == expected.mask.tolist()
    name, share = expected.top(1)[0]
    assert done.out.splitlines()[0].split() == [str(tile), "share", "confidence"]
    assert done.out.splitlines()[1].split()[:2] == [name, f"{share:.1%}"]
    assert "3 of 3" in done.out and f"out: {mask}" in done.out
    whole = model.preprocess(tile)
    with torch.no_grad(), mmoe.trace(model) as routing:
        model(**whole)
    (view,) = model.views(whole)
    told = json.loads(trace.read_text())
    assert [entry["layer"] for entry in told["tokens"]] == routing.layers
    for entry, rows in zip(told["tokens"], routing, strict=True):
        assert entry["grid"] == list(view.grid) and len(entry["experts"]) == view.rows
        torch.testing.assert_close(torch.tensor(entry["weights"]), rows.weights, atol=1e-4, rtol=1e-4)
    assert told["result"]["pictures"][0]["height"] == size[0]
    with Image.open(drawn["overlay"]) as overlay, Image.open(drawn["heatmap"]) as heatmap:
        assert overlay.width >= size[1] and overlay.height > size[0] and heatmap.width > 100


def test_predict_several_pictures_from_the_command_line(run: Any, saved: Path, tmp_path: Path) -> None:
    tiles = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, (tile, size) in enumerate(zip(tiles, ((32, 32), (40, 70)), strict=True)):
        Image.fromarray(picture(*size, seed=number)).save(tile)
    done = run("predict", saved, *tiles, "--out", tmp_path / "mask.png", "--overlay", tmp_path / "o.png", "--json")
    assert done.code == 0, done.err
    model = zoo.load(saved, device="cpu")
    assert done.json["pictures"] == [model.predict(tile).as_dict() for tile in tiles]
    with Image.open(tmp_path / "mask.png") as found:
        assert found.size == (32, 32)
    assert run("predict", saved, *tiles).out.count("confidence") == 2


def test_masks_that_cannot_be_written(run: Any, saved: Path, tmp_path: Path, fox: Path) -> None:
    done = run("predict", saved, fox, "--out", tmp_path / "mask.jpg")
    assert done.code == 2 and done.err.endswith("the suffix names the format: png\n  try: --out mask.png\n")
    done = run("predict", saved, fox, "--with", "texts=hello")
    assert done.code == 2 and f"try: mmoe predict {saved} {fox}\n" in done.err
    done = run("predict", saved, fox, "--with", "scene=natural")
    assert done.code == 2 and "no input 'scene' of EarthAdapter" in done.err
    done = run("predict", saved, fox, "a forest")
    assert done.code == 2 and "it takes no texts" in done.err


def test_a_result_of_several_pictures(model: EarthAdapter) -> None:
    pictures = [picture(20, 40), picture(70, 33, seed=1)]
    found = model.predict(pictures)
    assert len(found) == 2 and [one.mask.shape for one in found] == [(20, 40), (70, 33)]
    for index, one in enumerate(pictures):
        alone = model.predict(one)
        assert found[index].mask.equal(alone.mask) and found.table(index) == alone.table()
        assert found.top(2, index) == alone.top(2)
    header, rows = found.table(1)
    assert all(len(row) == 1 + len(header) for row in rows)
    assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.3)
    with pytest.raises(BadOverride, match="picture is a whole number from 0 to 1"):
        found.table(2)
    with pytest.raises(BadInput, match="an empty list of pictures"):
        model.predict([])


# ---- routing, saving, evaluation ----


def test_views_and_pictures_of_routing(model: EarthAdapter) -> None:
    pixels = picture(20, 40)
    batch = model.preprocess(pixels)
    assert batch["image"].shape == (1, 3, 16, 32)
    with torch.no_grad(), mmoe.trace(model) as routing:
        model(**batch)
    (view,) = model.views(batch)
    assert view.grid == (2, 4) and len(routing) == 2
    assert view.of_sample(routing[0].experts, 0).shape == (8, 3)
    overlay = routes.picture_overlay(routing, [view], model.seen(pixels))
    assert overlay.width >= 40
    maps = frequency_maps(model, model, batch["image"])
    assert list(maps) == routing.layers
    figure = frequency_figure(maps[routing.layers[0]], Image.fromarray(pixels))
    assert [axes.get_title(loc="left") for axes in figure.axes][:4] == ["picture", "features", "low", "high"]


def test_several_pictures_of_several_shapes(model: EarthAdapter) -> None:
    assert model.preprocess([picture(20, 40), picture(40, 20)])["image"].shape == (2, 3, 32, 32)
    assert model.preprocess([picture(20, 40)] * 2)["image"].shape == (2, 3, 16, 32)
    with pytest.raises(BadInput, match="an empty list of pictures"):
        model.preprocess([])


def test_saved_and_loaded(model: EarthAdapter, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = zoo.load(tmp_path / "saved", device="cpu")
    assert again.config == model.config and again.preprocessing == model.preprocessing
    assert again.predict(picture(50, 70)).mask.equal(model.predict(picture(50, 70)).mask)
    told = json.loads((tmp_path / "saved" / "preprocess.json").read_text())
    (tmp_path / "saved" / "preprocess.json").write_text(json.dumps({**told, "classes": ["a"], "colors": ["#000000"]}))
    with pytest.raises(Exception, match="it has 1 classes, the model 3"):
        zoo.load(tmp_path / "saved", device="cpu")


def test_the_paper_model_names_its_base() -> None:
    card = zoo.card("earth_adapter_dinov2_l")
    assert card.config["base"].startswith("hf-hub:facebook/dinov2-large")
    with pytest.raises(Exception, match="weights='base'"):
        zoo.load(card.name, device="cpu")


def test_bf16_agrees(model: EarthAdapter) -> None:
    expected = model.predict(picture(), all_probs=True).probs
    found = copy.deepcopy(model).bfloat16().predict(picture(), all_probs=True).probs
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@heads
def test_bf16_trains(sizes: dict[str, Any]) -> None:
    model = build(**sizes).bfloat16()
    batch = model.preprocess(picture())
    out = model.train()(**batch, mask=torch.randint(3, (1, 32, 32)))
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()


def test_heads_say_what_they_are() -> None:
    assert isinstance(build().head, LightHead) and isinstance(EarthAdapter(paper()).head, Mask2FormerHead)
    a, b = EarthAdapter(paper()), EarthAdapter(paper())
    offsets = "pixel_decoder.encoder.layers.0.self_attn.sampling_offsets.bias"
    assert a.head.state_dict()[offsets].equal(b.head.state_dict()[offsets]), "offsets start as rays, not by chance"
    assert a.head.state_dict()["pixel_decoder.level_embed"].isfinite().all()


def test_a_mask_lies_over_the_background_that_the_model_saw(model: EarthAdapter, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    model.preprocessing = {**model.preprocessing, "background": [10, 20, 30]}
    found = model.predict(tmp_path / "clear.png")
    assert found.overlay(tmp_path / "clear.png", alpha=0.0).getpixel((0, 0)) == (10, 20, 30)
