"""Frequency adapters: the split, the mixture as any other MoE layer, the adapter around prefix tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmoe
from mmoe.errors import BadInput, BadOverride, Refused
from mmoe.frequency import FrequencyAdapter, FrequencyMoE, frequency_split, half_width
from mmoe.frequency_maps import frequency_figure, frequency_maps

GRIDS = [(8, 8), (5, 7), (7, 4), (6, 9), (16, 3), (1, 1)]


def by_definition(maps: Tensor, ratio: float, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Low and high part as the paper has them: shifted complex FFT, box, real part of the inverse."""
    rows, columns = maps.shape[1:3]
    spectrum = torch.fft.fftshift(torch.fft.fft2(maps, dim=(1, 2), norm="ortho"), dim=(1, 2))
    half = half_width((rows, columns), ratio)
    box = torch.zeros(rows, columns, 1)
    r, c, more = rows // 2, columns // 2, int(symmetric)
    box[r - half : r + half + more, c - half : c + half + more] = 1
    parts = (torch.fft.ifftshift(spectrum * keep, dim=(1, 2)) for keep in (box, 1 - box))
    low, high = (torch.fft.ifft2(part, dim=(1, 2), norm="ortho").real for part in parts)
    return low, high


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_split_is_that_of_the_definition(grid: tuple[int, int], ratio: float) -> None:
    maps = torch.randn(2, *grid, 3)
    for found, expected in zip(frequency_split(maps, ratio), by_definition(maps, ratio), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (16, 9)])
def test_the_symmetric_box_is_another_one(grid: tuple[int, int]) -> None:
    maps = torch.randn(1, *grid, 2)
    low, _ = frequency_split(maps, 0.5, "symmetric")
    torch.testing.assert_close(low, by_definition(maps, 0.5, symmetric=True)[0], atol=1e-6, rtol=0)
    assert not torch.allclose(low, frequency_split(maps, 0.5)[0], atol=1e-3)


def test_small_grids_have_no_low_part() -> None:
    maps = torch.randn(1, 4, 4, 2)
    low, high = frequency_split(maps, 0.3)
    assert low.count_nonzero() == 0 and high.equal(maps)


def test_the_split_has_the_gradient_of_the_definition() -> None:
    maps = torch.randn(1, 6, 5, 2, requires_grad=True)
    coefficients = torch.randn(2, 1, 6, 5, 2)
    gradients = []
    for split in (frequency_split, by_definition):
        loss = sum((part * c).sum() for part, c in zip(split(maps, 0.5), coefficients, strict=True))
        gradients.append(torch.autograd.grad(loss, maps)[0])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_split_in_fp32(dtype: torch.dtype) -> None:
    maps = torch.randn(1, 5, 7, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = frequency_split(maps, 0.5)
    expected = frequency_split(maps.float(), 0.5)
    assert low.dtype == high.dtype == dtype
    assert low.equal(expected[0].to(dtype)) and high.equal(expected[1].to(dtype))


# ---- the mixture ----


def by_hand(layer: FrequencyMoE, maps: Tensor, weights: Tensor | None = None) -> Tensor:
    experts = layer.experts
    parts = maps, *frequency_split(maps, layer.cutoff, layer.box)
    if weights is None:
        weights = (maps @ layer.router.weight.t() + layer.router.bias).softmax(-1)
    total = torch.zeros_like(maps)
    for i, part in enumerate(parts):
        hidden = (part @ experts.up_proj[i].t() + experts.up_bias[i]).relu()
        total = total + weights[..., i : i + 1] * (hidden @ experts.down_proj[i].t() + experts.down_bias[i])
    return total


@pytest.mark.parametrize("box", ["half_open", "symmetric"])
def test_the_mixture_is_that_of_the_equation(box: Any) -> None:
    layer, maps = FrequencyMoE(8, 6, cutoff=0.5, box=box), torch.randn(2, 6, 5, 8)
    torch.testing.assert_close(layer(maps), by_hand(layer, maps), atol=1e-6, rtol=1e-5)


def test_it_is_traced_counted_and_listed() -> None:
    layer = FrequencyMoE(8, 4)
    with mmoe.trace(layer) as routing:
        layer(torch.randn(2, 4, 6, 8))
    assert routing[0].counts().tolist() == [48, 48, 48]
    assert routing.entropy().shape == (1,)
    params = mmoe.count_params(layer)
    assert params.total == params.active == sum(p.numel() for p in layer.parameters())
    assert (params.routers, params.routed) == (27, 3 * (2 * 8 * 4 + 4 + 8))
    assert mmoe.load_heatmap(routing).axes


def test_an_override_changes_what_comes_out() -> None:
    layer, maps = FrequencyMoE(8, 4), torch.randn(1, 8, 8, 8)
    with mmoe.override(layer, mmoe.switch_off([1, 2])):
        only_spatial = layer(maps)
    torch.testing.assert_close(only_spatial, by_hand(layer, maps, torch.tensor([1.0, 0.0, 0.0]).expand(1, 8, 8, 3)))


def test_other_surgery_does_not_take_it_for_plain_experts() -> None:
    site = mmoe.sites(torch.nn.Sequential(FrequencyMoE(8, 4)))["0"]
    assert site.kind == "moe"
    with pytest.raises(Refused):
        site.weights()


def test_padding_gets_nothing() -> None:
    layer, maps = FrequencyMoE(8, 4), torch.randn(1, 4, 4, 8)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    out = layer(maps, mmoe.Context(valid=valid))
    assert out[0, 2:].count_nonzero() == 0 and out[0, :2].count_nonzero() > 0


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"cutoff": 1.5}, "cutoff=1.5"), ({"cutoff": -1.0}, "cutoff=-1.0"), ({"box": "round"}, "box")],
)
def test_options_are_checked(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(BadOverride, match=wrong):
        FrequencyMoE(8, 4, **options)


# ---- the adapter ----


def test_prefix_tokens_pass_untouched_and_patches_do_not() -> None:
    adapter, tokens = FrequencyAdapter(8, 4), torch.randn(2, 3 + 4 * 6, 8)
    out = adapter(tokens, (4, 6))
    assert out[:, :3].equal(tokens[:, :3])
    maps = tokens[:, 3:].unflatten(1, (4, 6))
    expected = maps + 0.1 * by_hand(adapter.adapter, maps)
    torch.testing.assert_close(out[:, 3:], expected.flatten(1, 2), atol=1e-6, rtol=1e-5)


def test_rows_and_columns_are_not_exchanged() -> None:
    adapter, tokens = FrequencyAdapter(8, 4, cutoff=0.6), torch.randn(1, 24, 8)
    assert not torch.allclose(adapter(tokens, (4, 6)), adapter(tokens, (6, 4)), atol=1e-5)


def test_a_grid_that_is_too_large() -> None:
    with pytest.raises(BadInput, match="adapt 10 tokens\n  a grid of 4 x 6 has more"):
        FrequencyAdapter(8, 4)(torch.randn(1, 10, 8), (4, 6))


@pytest.mark.parametrize("frequency", [True, False])
def test_zero_init_is_the_identity_that_learns(frequency: bool) -> None:
    adapter, tokens = FrequencyAdapter(8, 4, frequency=frequency, zero_init=True), torch.randn(1, 17, 8)
    out = adapter(tokens, (4, 4))
    assert out.equal(tokens)
    (out * torch.randn_like(out)).sum().backward()
    assert adapter.adapter.experts.down_proj.grad.count_nonzero() > 0


def test_dead_parts_are_counted_frozen_and_never_run() -> None:
    compact = FrequencyAdapter(8, 4, frequency=False)
    whole = FrequencyAdapter(8, 4, frequency=False, compact=False)
    tokens = torch.randn(1, 16, 8)
    whole.load_state_dict(compact.state_dict(), strict=False)
    assert whole(tokens, (4, 4)).equal(compact(tokens, (4, 4)))
    one = 2 * 8 * 4 + 4 + 8
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in compact.parameters()) == 2 * one + 27
    assert not any(p.requires_grad for p in whole.dead.parameters())
    assert FrequencyAdapter(8, 4, compact=False).dead is None


def test_learned_vectors_are_read_by_the_spatial_adapter_only() -> None:
    layer, maps = FrequencyMoE(8, 4, cutoff=0.6, token_dim=5, token_grid=(4, 5)), torch.randn(2, 4, 5, 8)
    experts = layer.experts
    wide = torch.cat([maps, experts.tokens.unflatten(0, (4, 5)).expand(2, -1, -1, -1)], -1)
    weight = torch.cat([experts.up_proj[0], experts.token_proj], 1)
    hidden = (wide @ weight.t() + experts.up_bias[0]).relu()
    with mmoe.override(layer, mmoe.switch_off([1, 2])):
        torch.testing.assert_close(layer(maps), hidden @ experts.down_proj[0].t() + experts.down_bias[0])
    with mmoe.override(layer, mmoe.switch_off([0])):
        before = layer(maps)
        with torch.no_grad():
            experts.tokens += 1
        assert layer(maps).equal(before)
    with pytest.raises(BadInput, match="of 5 x 4 patches\n  its learned vectors belong to 4 x 5 patches"):
        layer(torch.randn(1, 5, 4, 8))


def test_bf16_and_autocast_agree_with_fp32() -> None:
    adapter, tokens = FrequencyAdapter(16, 8), torch.randn(2, 37, 16)
    expected = adapter(tokens, (6, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapter(tokens, (6, 6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    half = copy.deepcopy(adapter).bfloat16()(tokens.bfloat16(), (6, 6))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=5e-2, rtol=2e-2)


def test_compiled_it_computes_the_same() -> None:
    adapter, tokens = FrequencyAdapter(16, 8, cutoff=0.5), torch.randn(2, 25, 16)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, (4, 6)), adapter(tokens, (4, 6)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls_keep_their_grid(reentrant: bool) -> None:
    """Backward runs the layer again after pictures of another shape came by."""
    adapter = FrequencyAdapter(8, 4, cutoff=0.9)
    grid = {"now": (4, 6)}

    def run(tokens: Tensor) -> Tensor:
        return adapter(tokens, grid["now"])

    first, second = (torch.randn(1, 24, 8, requires_grad=True) for _ in range(2))
    run(first).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    loss = checkpoint(run, first, use_reentrant=reentrant).square().sum()
    grid["now"] = (6, 4)
    checkpoint(run, second, use_reentrant=reentrant)
    loss.backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_copies_and_pickles() -> None:
    adapter, tokens = FrequencyAdapter(8, 4), torch.randn(1, 17, 8)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert other(tokens, (4, 4)).equal(adapter(tokens, (4, 4)))


# ---- what it shows ----


def test_maps_of_a_picture() -> None:
    layer, maps = FrequencyMoE(8, 4, cutoff=0.5), torch.randn(2, 8, 6, 8)
    (found,) = frequency_maps(layer, layer, maps).values()
    low, high = by_definition(maps, 0.5)
    torch.testing.assert_close(found.low, low, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.high, high, atol=1e-6, rtol=0)
    expected = (maps @ layer.router.weight.t() + layer.router.bias).softmax(-1)
    torch.testing.assert_close(found.weights, expected.detach())
    assert found.strength("high", 1).shape == (8, 6)
    figure = frequency_figure(found, picture=1)
    assert [axes.get_title(loc="left") for axes in figure.axes][3:] == [
        "weight of spatial",
        "weight of low",
        "weight of high",
    ]


def test_maps_of_a_model_without_frequencies() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(Refused, match="no layer splits frequencies"):
        frequency_maps(model, model, torch.randn(1, 2))
