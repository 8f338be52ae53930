"""What Uni-MoE's encoders get of pictures, videos, speech and sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor

from mmoe.errors import BadInput, BadOverride
from zoo.sounds import RATE
from zoo.uni_moe.media import image_tensor, sound_tensor, speech_tensor, video_tensor


def plain(level: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def voice(seconds: float) -> np.ndarray:
    return (0.3 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def test_a_picture_is_cut_to_its_middle() -> None:
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    found = image_tensor(wide, 28)
    assert found.shape == (3, 28, 28)
    red, _, blue = found[:, 14, 14]
    assert blue > 1 > -1 > red


def test_frames_are_evenly_spaced() -> None:
    found = video_tensor([plain(10 * number) for number in range(21)], 28, frames=3)
    assert found.shape == (3, 3, 28, 28)
    for tensor, level in zip(found, (0, 100, 200), strict=True):
        torch.testing.assert_close(tensor, image_tensor(plain(level), 28))
    assert len(video_tensor([plain(0), plain(9)], 28)) == 2


def test_a_folder_and_an_animation_are_videos(tmp_path: Path) -> None:
    frames = [plain(level) for level in (0, 120, 250)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no frame")
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    expected = video_tensor(frames, 28)
    torch.testing.assert_close(video_tensor(tmp_path / "frames", 28), expected)
    torch.testing.assert_close(video_tensor(str(tmp_path / "a.gif"), 28), expected, atol=0.1, rtol=0)


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, told in (
        (tmp_path / "empty", "it has no frames"),
        (tmp_path / "a.mp4", "ffmpeg -i a.mp4"),
        ([], "no frames"),
    ):
        with pytest.raises(BadInput, match=told):
            video_tensor(source, 28)
    with pytest.raises(BadOverride, match="frames=0"):
        video_tensor([plain(0)], 28, frames=0)


@pytest.mark.parametrize("seconds", [0.1, 29.9, 30.0, 30.1, 61.0])
def test_speech_is_what_whisper_hears(seconds: float) -> None:
    found, filled = speech_tensor(voice(seconds), 80, 1500, most=20)
    assert filled == -(-round(seconds * RATE) // 320)
    assert found.shape == (-(-round(seconds * 10) // 300), 80, 3000)
    heard = WhisperFeatureExtractor()(voice(seconds)[: 30 * RATE], sampling_rate=RATE)["input_features"]
    torch.testing.assert_close(found[:1], torch.as_tensor(np.asarray(heard)), atol=1e-4, rtol=1e-4)


def test_an_encoder_that_hears_less_at_once() -> None:
    assert speech_tensor(voice(4.5), 80, 100, most=20)[0].shape == (3, 80, 200)


def test_a_sound_is_filled_up_with_its_last_sample() -> None:
    mels, padding = sound_tensor(voice(31.0), most=20)
    assert mels.shape == (2, 2998, 128) and padding.shape == (2, 30 * RATE)
    assert not padding[0].any() and (~padding[1]).sum() == RATE
    assert mels.isfinite().all()


def test_long_recordings_are_told() -> None:
    for read in (lambda: sound_tensor(voice(61.0), most=2), lambda: speech_tensor(voice(61.0), 80, 1500, most=2)):
        with pytest.raises(BadInput, match="at most 2 parts of 30 seconds fit"):
            read()
