"""BEATs: sounds become tokens, padding changes nothing, and files of the authors are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmoe.errors import BadInput, BadOverride, LoadMismatch
from zoo.hosts.beats import BEATs, BEATsConfig, from_original, log_mels

SIZES = {"embed_dim": 16, "width": 24, "ffn_dim": 40, "layers": 2, "heads": 3, "conv_pos": 8, "conv_pos_groups": 4}
SIZES |= {"buckets": 16, "max_distance": 40}


def build(**options: int) -> BEATs:
    return BEATs(BEATsConfig(**SIZES | options)).eval()


def sound(seconds: float, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000)


def test_the_released_sizes() -> None:
    with torch.device("meta"):
        released = BEATs(BEATsConfig())
    assert 89e6 < sum(parameter.numel() for parameter in released.parameters()) < 91e6


def test_high_sounds_lie_in_high_bands() -> None:
    low, high = (log_mels(sound(0.5, pitch)).mean(0).argmax().item() for pitch in (200, 4000))
    assert low < 40 < 90 < high


def test_a_sound_shorter_than_a_frame_is_told() -> None:
    with pytest.raises(BadInput, match="hear 399 samples"):
        log_mels(np.zeros(399))


def test_ten_seconds_are_496_tokens() -> None:
    with torch.no_grad():
        assert build()(log_mels(sound(10.0))[None]).shape == (1, 62 * 8, 24)


def test_padding_changes_no_token_of_what_is_there() -> None:
    model, mels = build(), log_mels(sound(2.0))[None]
    padding = torch.zeros(1, 32_000, dtype=torch.bool)
    padding[:, 16_000:] = True
    other = mels.clone()
    other[:, 112:] = torch.randn_like(other[:, 112:])
    with torch.no_grad():
        a, b = model(mels, padding), model(other, padding)
    torch.testing.assert_close(a[:, : 6 * 8], b[:, : 6 * 8], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(mels)[:, : 6 * 8], model(other)[:, : 6 * 8], atol=1e-3)


def test_the_norm_of_the_convolution_is_folded() -> None:
    model = build()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("layers")}
    weight = state.pop("pos_conv.weight")
    theirs = {"encoder.pos_conv.0.weight_g": weight.norm(dim=(0, 1), keepdim=True)}
    theirs |= {"encoder.pos_conv.0.weight_v": 3.0 * weight}
    torch.testing.assert_close(from_original(theirs)["pos_conv.weight"], weight)


def test_tables_that_differ_are_refused() -> None:
    name = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    with pytest.raises(LoadMismatch, match="is not the table of the first layer"):
        from_original({name.format(0): torch.zeros(16, 3), name.format(1): torch.ones(16, 3)})


@pytest.mark.parametrize("options", [{"width": 25}, {"heads": 0}, {"buckets": 6}, {"max_distance": 3}])
def test_sizes_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(BadOverride):
        BEATsConfig(**SIZES | options)
