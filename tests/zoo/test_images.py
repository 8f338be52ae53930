"""Pictures from files, arrays and PIL, and one clear error for whatever is not one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmoe.errors import BadInput
from zoo import images
from zoo.images import as_seen, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 3)) if mode in ("I;16", "F") else Image.new("RGB", (5, 3), RED).convert(mode)
    assert (read_image(image).mode, read_image(image).size) == ("RGB", (5, 3))


def test_transparency_is_laid_over_the_background() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert read_image(clear).getpixel((0, 0)) == WHITE
    assert read_image(clear, background=(0, 0, 255)).getpixel((0, 0)) == (0, 0, 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert read_image(half).getpixel((0, 0)) == (255, 127, 127)


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, 0, 255, 0])
    image.save(tmp_path / "a.gif", transparency=0)
    assert read_image(tmp_path / "a.gif").getpixel((1, 1)) == WHITE


def test_the_cameras_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), WHITE)
    image.paste(RED, (0, 0, 4, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter to the right
    image.save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.size == (4, 8)
    assert (turned.getpixel((1, 1)), turned.getpixel((1, 6))) == (RED, WHITE)


def test_grey_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    grey = np.array([[0, 128 << 8], [255, 255 << 8]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[..., 0].tolist() == [[0, 128], [0, 255]]


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.full((4, 6, 3), 128, np.uint8), 128),
        (np.full((4, 6, 3), 128, np.int64), 128),
        (np.full((4, 6, 3), 0.5, np.float32), 128),
        (np.full((4, 6), 0.5), 128),
        (np.full((4, 6, 4), 1.0), 255),
        (np.ones((4, 6), dtype=bool), 255),
    ],
)
def test_arrays(array: np.ndarray, value: int) -> None:
    image = read_image(array)
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == (value,) * 3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((3, 4, 6)),
            "cannot read a picture from an array of shape (3, 4, 6)\n  a picture is (H, W), (H, W, 3)",
        ),
        (np.zeros((2, 4, 4, 3)), "array of shape (2, 4, 4, 3)"),
        (np.zeros((0, 4, 3)), "array of shape (0, 4, 3)"),
        (None, "cannot read a picture from NoneType\n  a picture is a path, a PIL image or an array"),
        (7, "cannot read a picture from int"),
        (
            np.full((2, 2), 128.0),
            "numbers between 128 and 128\n  floats of a picture lie between 0 and 1\n  try: array / 255",
        ),
        (np.full((2, 2), 300), "integers of a picture lie between 0 and 255"),
        (np.full((2, 2), -0.5), "numbers between -0.5 and -0.5"),
        (np.full((2, 2), np.nan), "numbers between nan and nan"),
        (np.array([["a", "b"]]), "it holds no real numbers"),
    ],
)
def test_arrays_that_are_no_pictures(array: Any, message: str) -> None:
    with pytest.raises(BadInput) as error:
        read_image(array)
    assert message in str(error.value)


def test_files_that_are_no_pictures(tmp_path: Path, fox: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(fox.read_bytes()[:1500])
    for path, wrong in (
        (text, "it is not a picture in a known format"),
        (cut, "the file is damaged: "),
        (tmp_path, "it is a folder"),
        (tmp_path / "gone.png", f"no such file (looked in {tmp_path})"),
        (tmp_path / ("x" * 5000), f"no such file (looked in {tmp_path})"),
    ):
        with pytest.raises(BadInput) as error:
            read_image(path)
        assert str(error.value).startswith(f"cannot read the picture '{str(path)[:80]}")
        assert f"\n  {wrong}" in str(error.value) and len(str(error.value)) < 800
        assert str(error.value).endswith("\n  try: give a PNG, JPEG or WebP file")


def test_a_picture_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 2_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)  # Pillow would warn here as well
    path = tmp_path / "large.png"
    Image.new("1", (2000, 1001)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadInput, match="it has 2000 x 1001 pixels; the limit is 2 megapixels"):
            read_image(path)
        with pytest.raises(
            BadInput, match=r"(?s)exceeds limit.*try: make it smaller first"
        ):  # Pillow refuses what is twice as large
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900_000)
            read_image(path)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_transparency(mode: str) -> None:
    plain = Image.new({"La": "LA", "RGBa": "RGBA"}[mode], (2, 2), (200, 128) if mode == "La" else (200, 100, 50, 128))
    expected = np.asarray(read_image(plain)).astype(int)
    assert np.abs(np.asarray(read_image(plain.convert(mode))).astype(int) - expected).max() <= 1


def test_an_address_is_not_a_file() -> None:
    with pytest.raises(BadInput) as error:
        read_image("https://example.org/fox.png")
    assert str(error.value) == (
        "cannot read the picture 'https://example.org/fox.png'\n  it is an address, not a file\n"
        "  try: download it first: wget 'https://example.org/fox.png'"
    )


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0.0, 0.5]], np.float32), [0, 128]),
    ],
)
def test_grey_of_more_than_8_bits(tmp_path: Path, grey: np.ndarray, expected: list[int]) -> None:
    path = tmp_path / "grey.tiff"
    Image.fromarray(grey).save(path)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


def test_grey_out_of_range_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "grey.tiff"
    Image.fromarray(np.array([[0.0, 900.0]], np.float32)).save(path)
    with pytest.raises(BadInput) as error:
        read_image(path)
    assert str(error.value) == (
        f"cannot read the picture '{path}'\n"
        "  its numbers lie between 0 and 900; floats of a picture lie between 0 and 1\n"
        "  try: save it with 8 bits per channel"
    )
    with pytest.raises(BadInput, match="cannot read an empty picture"):
        read_image(Image.new("I", (0, 4)))


def test_the_original_is_not_changed() -> None:
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    read_image(image).putpixel((0, 0), (1, 2, 3))
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 0))


def test_what_a_model_sees_of_a_picture() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    seen = np.asarray(as_seen(wide))
    assert seen.shape == (10, 10, 3) and seen.min() == 255
    assert as_seen(wide, "longest").size == (30, 30)
    assert as_seen(wide, "squash").size == (30, 10)


def test_the_limit_of_pixels_holds_for_pictures_and_arrays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for source in (Image.new("RGB", (11, 10)), np.zeros((10, 11, 3), np.uint8), np.zeros((10, 11), np.float32)):
        with pytest.raises(BadInput, match="it has 11 x 10 pixels; the limit is 0 megapixels"):
            read_image(source)
    assert read_image(Image.new("RGB", (10, 10))).size == (10, 10)


def test_transparency_is_kept_where_there_is_no_background() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    kept = read_image(half, None)
    assert (kept.mode, kept.getpixel((0, 0))) == ("RGBA", (255, 0, 0, 128))
    assert read_image(Image.new("L", (2, 2)), None).mode == "RGB"
    assert read_image(kept, (0, 0, 255)) == read_image(half, (0, 0, 255))


def test_what_a_model_sees_has_its_background() -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert as_seen(clear, "squash", (0, 0, 255)).getpixel((0, 0)) == (0, 0, 255)
