"""The CLIP that several families stand on: its sizes, its tokenizer, and features that are open_clip's own."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch.nn import functional as F

from mmoe.errors import BadInput, BadOverride, LoadMismatch
from zoo.hosts.clip import CLIPHost, CLIPSizes, check_colour, check_pictures, cosine_patches, make_tokenizer, sizes_of

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 2,
    "text_width": 32,
    "text_heads": 2,
    "text_layers": 2,
    "vocab_size": 600,
    "context_length": 12,
}


@pytest.mark.parametrize("route_padding", [True, False])
def test_features_are_open_clips(route_padding: bool) -> None:
    host = CLIPHost(CLIPSizes(**TINY), route_padding=route_padding).eval()
    image, text = torch.randn(2, 3, 32, 32), make_tokenizer(600, 12)(["a fox", "a"])
    with torch.no_grad():
        torch.testing.assert_close(host.encode_image(image), CLIP.encode_image(host, image))
        torch.testing.assert_close(host.encode_text(text), CLIP.encode_text(host, text), atol=1e-5, rtol=0)
    assert host.cut(text).shape[1] == (12 if route_padding else int(text.argmax(-1).max()) + 1)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_cosine_patches_hear_fine_detail_as_well_as_the_mean(patch: int) -> None:
    side, width = 256, 96
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)).clamp(min=1 / side)
    noise = torch.randn(8, 1, side, side, generator=torch.Generator().manual_seed(0))
    pictures = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real  # amplitudes fall as 1 / f
    pictures = ((pictures - pictures.mean()) / pictures.std()).expand(-1, 3, -1, -1)
    brightness = min(patch * patch, width - width // 3)
    loud = F.conv2d(pictures, cosine_patches(width, patch)[:brightness], stride=patch).std((0, 2, 3))
    assert loud.max() < 3 * loud.min()
    host = CLIPHost(CLIPSizes(**{**TINY, "init_patches": "cosine"}), route_padding=True)
    assert torch.equal(host.visual.conv1.weight, cosine_patches(64, 16))


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"vision_heads": 5},
            "5 heads in a tower of width 64\n  heads must share the width evenly\n  try: vision_heads=1",
        ),
        (
            {"image_size": 30},
            "image_size=30 with patch_size=16\n  patches must cover the picture\n  try: image_size=16",
        ),
        ({"init_patches": "sine"}, "init_patches='sine'"),
        ({"vocab_size": 0}, "vocab_size=0\n  vocab_size is a whole number of at least 1"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std has a number of at least 1e-06 for each of red, green and blue"),
        ({"text_mlp_ratio": 0}, "text_mlp_ratio is a finite number above 0"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, Any], lines: str) -> None:
    with pytest.raises(BadOverride) as error:
        CLIPSizes(**{**TINY, **options})
    assert lines in str(error.value)


def test_sizes_are_read_from_tensors() -> None:
    sizes = CLIPSizes(**{**TINY, "text_layers": 3, "vision_mlp_ratio": 2.0})
    state = CLIPHost(sizes, route_padding=True).state_dict()
    found = sizes_of(state, "a test")
    assert {name: getattr(sizes, name) for name in found} == found
    assert {*TINY, "vision_mlp_ratio", "text_mlp_ratio"} - {"text_heads"} == set(found)
    with pytest.raises(LoadMismatch, match="convert this checkpoint to a test\n  it has no 'text_projection'"):
        sizes_of({name: value for name, value in state.items() if name != "text_projection"}, "a test")
    with pytest.raises(LoadMismatch, match=r"it has no block in visual\.transformer\.resblocks"):
        sizes_of({n: v for n, v in state.items() if not n.startswith("visual.transformer")}, "a test")


def test_checks_of_inputs() -> None:
    assert check_pictures("a.png", "") == ["a.png"] and check_pictures(("a.png", "b.png"), "") == ["a.png", "b.png"]
    with pytest.raises(BadInput, match="an empty list of pictures"):
        check_pictures([], "x")
    for colour in ([255, 255], [256, 0, 0], "white"):
        with pytest.raises(ValueError, match="not a colour"):
            check_colour(colour)


def test_the_whole_vocabulary_is_open_clips() -> None:
    theirs, ours = open_clip.SimpleTokenizer(context_length=77), make_tokenizer(49408, 77)
    texts = ["a fox", "Ein Füchslein, 狐狸 & 🦊!", ""]
    assert ours(texts).equal(theirs(texts))


@pytest.mark.parametrize("size", [514, 600, 4096])
def test_a_reduced_vocabulary(size: int) -> None:
    tokenizer = make_tokenizer(size, 64)
    texts = ["a red fox jumps over the lazy dog", "Ein Füchslein, 狐狸 & 🦊!"]
    ids = tokenizer(texts)
    assert ids.shape == (2, 64) and int(ids.max()) == size - 1
    assert (tokenizer.sot_token_id, tokenizer.eot_token_id) == (size - 2, size - 1)
    assert ids[:, 0].tolist() == [size - 2] * 2
    for text, row in zip(texts, ids.tolist(), strict=True):
        inside = row[1 : row.index(size - 1)]
        assert "".join(tokenizer.decode(inside).split()) == "".join(text.lower().split()), "nothing gets lost"


def test_fewer_merges_give_more_tokens() -> None:
    lengths = [int((make_tokenizer(size, 64)(["a photograph of a guitar"]) > 0).sum()) for size in (514, 4096, 49408)]
    assert lengths[0] > lengths[1] > lengths[2]


@pytest.mark.parametrize("size", [513, 49409, 0])
def test_a_vocabulary_that_cannot_be(size: int) -> None:
    with pytest.raises(BadInput, match=f"no tokenizer with {size} entries\n  it can have 514 to 49408"):
        make_tokenizer(size, 8)
