"""Parameter counts and FLOPs against counts by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe import (
    Context,
    DenseRouter,
    ExpertChoiceRouter,
    FFNExperts,
    GatedFFN,
    GatedFFNExperts,
    MoE,
    TopKRouter,
    WithNullExperts,
    count_params,
    profile,
)

D, HIDDEN, E, B, N = 16, 8, 4, 2, 6
T = B * N
EXPERT = 2 * D * HIDDEN
GATE = D * E


class Block(nn.Module):
    """A transformer block with a MoE layer."""

    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.moe = MoE(TopKRouter(D, E, top_k=top_k), FFNExperts(D, HIDDEN, E, bias=False))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.moe(self.norm2(x), context)


class TestParams:
    def test_of_a_transformer_block_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            block = Block(top_k=1)
        attention = 4 * D * D + 4 * D
        params = count_params(block)
        assert params.total == attention + 4 * D + GATE + E * EXPERT == sum(p.numel() for p in block.parameters())
        assert params.active == attention + 4 * D + GATE + EXPERT
        assert (params.routed, params.routers, params.trainable) == (E * EXPERT, GATE, params.total)

    def test_frozen_parameters_are_not_trainable(self) -> None:
        block = Block()
        block.attention.requires_grad_(False)
        params = count_params(block)
        assert params.total - params.trainable == 4 * D * D + 4 * D

    def test_shared_experts_are_always_active(self) -> None:
        moe = MoE(TopKRouter(D, E, top_k=1), GatedFFNExperts(D, HIDDEN, E), shared=GatedFFN(D, HIDDEN))
        gated = 3 * D * HIDDEN
        assert count_params(moe).active == GATE + 2 * gated and count_params(moe).routed == E * gated

    @pytest.mark.parametrize(
        ("router", "share"),
        [
            (DenseRouter(D, E), 1.0),
            (ExpertChoiceRouter(D, E, capacity_factor=1.0), 0.25),
            (ExpertChoiceRouter(D, E, capacity_factor=9.0), 1.0),
        ],
    )
    def test_active_follows_the_router(self, router: mmoe.Router, share: float) -> None:
        moe = MoE(router, FFNExperts(D, HIDDEN, E, bias=False))
        assert count_params(moe).active == GATE + share * E * EXPERT

    @pytest.mark.parametrize("router", ["dynamic", "by_modality"])
    def test_shared_experts_count_whole_and_top_p_gives_an_upper_bound(self, router: str) -> None:
        sizes = {"num_null": 1, "num_shared": 2, "top_k": 2}
        experts = WithNullExperts(D, HIDDEN, 7, num_null=1, num_shared=2, shared_dim=4, real="gated_ffn")
        real, side = (3 * D * width for width in (HIDDEN, 4))

        def params(top_p: float | None) -> mmoe.profile.Params:  # type: ignore[name-defined]
            spec = {"name": "dynamic", "top_p": top_p, **sizes}
            spec = spec if router == "dynamic" else {"name": router, "inner": spec}
            return count_params(MoE(mmoe.build_router(spec, dim=D, num_experts=7), experts))

        few, most = params(None), params(0.7)
        assert few.active == few.routers + 2 * side + round(4 * real * 2 / 5), "2 of 4 real and 1 null"
        assert most.active == most.routers + 2 * side + 4 * real == most.total
        assert most.at_most and not few.at_most and few.routed == 4 * real + 2 * side

    def test_null_experts_make_real_ones_rarer(self) -> None:
        moe = MoE(TopKRouter(D, E, top_k=1), WithNullExperts(D, HIDDEN, E, num_null=2, real="ffn:bias=false"))
        params = count_params(moe)
        assert params.routed == 2 * EXPERT and params.active == GATE + 2 * EXPERT / E

    def test_layers_that_share_their_experts(self) -> None:
        experts = FFNExperts(D, HIDDEN, E, bias=False)
        host = nn.Sequential(*(MoE(TopKRouter(D, E, top_k=1), experts) for _ in range(3)))
        params = count_params(host)
        assert (params.total, params.routed) == (3 * GATE + E * EXPERT, E * EXPERT)
        assert params.active == 3 * GATE + 3 * EXPERT

    def test_a_dense_model_is_all_active(self) -> None:
        params = count_params(nn.Linear(3, 4))
        assert params.total == params.active == params.trainable == 16 and params.routed == params.routers == 0


def flops_by_hand(slots: int) -> int:
    """Projections and attention of B x N tokens, gate, and `slots` expert runs."""
    attention = 4 * T * D * D + 2 * B * N * N * D
    return 2 * (attention + T * GATE + slots * EXPERT)


class TestFlops:
    @pytest.mark.parametrize("top_k", [1, 2, 4])
    def test_of_a_transformer_block(self, top_k: int) -> None:
        block = Block(top_k).eval()
        assert profile(block, block, torch.randn(B, N, D)).flops == flops_by_hand(T * top_k)

    def test_padding_and_unused_slots_cost_nothing(self) -> None:
        block = Block().eval()
        valid = torch.arange(N) < torch.tensor([[2], [5]])
        seen = profile(block, block, torch.randn(B, N, D), Context(valid=valid))
        assert seen.flops == flops_by_hand(7 * 2)
        assert int(seen.routing[0].counts().sum()) == 7 * 2

    def test_of_grouped_query_attention(self) -> None:
        query, keys = torch.randn(B, 4, N, 8), torch.randn(B, 2, 2 * N, 8)

        def attend() -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)

        assert profile(nn.Identity(), attend).flops == 2 * B * 4 * N * 2 * N * (8 + 8)

    @pytest.mark.parametrize("backend", ["loop", "grouped", "fused", "auto"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_do_not_depend_on_the_backend(self, backend: str, dtype: torch.dtype) -> None:
        block = Block().eval().to(dtype)
        block.moe.backend = backend
        assert profile(block, block, torch.randn(B, N, D, dtype=dtype)).flops == flops_by_hand(2 * T)
        assert block.moe.backend == backend

    def test_switching_experts_off_is_seen(self) -> None:
        moe = MoE(TopKRouter(D, E, top_k=4), FFNExperts(D, HIDDEN, E))
        with mmoe.override(moe, mmoe.switch_off([0])):
            assert profile(moe, moe, torch.randn(T, D)).flops == 2 * (T * GATE + 3 * T * EXPERT)

    def test_a_method_can_be_profiled(self) -> None:
        moe = MoE(TopKRouter(D, E), FFNExperts(D, HIDDEN, E))
        assert profile(moe, moe.route, torch.randn(T, D)).flops == 2 * T * GATE

    def test_settings_are_restored_after_an_exception(self) -> None:
        before = torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(ZeroDivisionError):
            profile(nn.Identity(), lambda: 1 // 0)
        assert torch.backends.mha.get_fastpath_enabled() == before


def test_as_dict_is_plain_data() -> None:
    block = Block()
    found = json.loads(json.dumps(profile(block, block, torch.randn(B, N, D)).as_dict()))
    assert found["flops"] == flops_by_hand(2 * T) and found["active"] == count_params(block).active
    assert [layer["layer"] for layer in found["layers"]] == ["moe"]


def test_gradients_are_not_kept() -> None:
    block = Block()
    seen = profile(block, block, torch.randn(B, N, D, requires_grad=True))
    assert not seen.routing[0].weights.requires_grad
