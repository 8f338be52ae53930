"""Overrides of routing decisions: what they change, where, and that they are gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe import Context, FFNExperts, FixedRouter, MoE, Router, Routing, TopKRouter, override, switch_off
from mmoe.errors import BadInput, BadOverride, UnknownName
from mmoe.moe import Override

T, D, E = 12, 16, 5


def moe(router: Router | None = None) -> MoE:
    return MoE(router or TopKRouter(D, E), FFNExperts(D, 8, E)).eval()


def host() -> nn.Module:
    return nn.ModuleDict({"visual": nn.Sequential(moe(), moe()), "text": nn.Sequential(moe())})


def all_to(expert: int) -> Override:
    """An override that sends everything to one expert."""

    def hook(x: Tensor, router: Router, routing: Routing) -> Routing:
        ids = torch.full((len(x), 1), expert)
        return replace(routing, experts=ids, weights=torch.ones(len(x), 1), all_used=True)

    return hook


def chosen(model: nn.Module, x: Tensor) -> dict[str, list[int]]:
    """Which experts each layer uses."""
    found = {}
    for name, layer in mmoe.moe_layers(model).items():
        with mmoe.trace(layer) as routing:
            layer(x)
        found[name] = routing[0].counts().nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize("backend", ["fused", "grouped", "loop"])
def test_slots_that_an_override_leaves_unused(backend: str) -> None:
    """Though it keeps the promise of the routing that all are used."""
    layer, x = moe(), torch.randn(200, D)
    layer.experts.backend = backend  # type: ignore[assignment]  # any of the names

    def hook(x: Tensor, router: Router, routing: Routing) -> Routing:
        gone = torch.arange(200)[:, None] % 2 == torch.arange(2)
        weights = routing.weights.masked_fill(gone, 0.0)
        return replace(routing, experts=routing.experts.masked_fill(gone, E), weights=weights)

    with override(layer, hook), mmoe.trace(layer) as routing:
        y = layer(x)
    assert routing[0].counts().sum() == 200
    single = [layer.experts(x, (torch.arange(E) == e) * 200) for e in range(E)]
    kept = torch.stack([single[e][i] for i, e in enumerate(mmoe.first_choice(routing[0]).tolist())])
    torch.testing.assert_close(y, routing[0].weights.sum(1, keepdim=True) * kept, atol=1e-5, rtol=1e-4)


def negative(x: Tensor, router: Router, routing: Routing) -> Routing:
    return replace(routing, experts=routing.experts - E)


@pytest.mark.parametrize("hook", [5, lambda x, router, routing: None, negative])
def test_hooks_that_are_none(hook: Override) -> None:
    layer = moe()
    with pytest.raises(BadOverride), override(layer, hook):
        layer(torch.randn(T, D))
    layer(torch.randn(T, D))


@pytest.mark.parametrize(
    "experts", [1, (1,), range(1, 2), torch.tensor([1]), torch.tensor(1), torch.tensor([1]).numpy()]
)
def test_experts_in_any_form(experts: Any) -> None:
    layer = moe()
    with override(layer, switch_off(experts)), mmoe.trace(layer) as routing:
        layer(torch.randn(T, D))
    assert routing[0].counts()[1] == 0


def test_an_override_of_tensors_compiles() -> None:
    layer, x = moe(), torch.randn(T, D)
    with override(layer, lambda x, router, routing: routing):
        y = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("experts", ["01", [0.5], None])
def test_what_is_no_list_of_experts(experts: object) -> None:
    with pytest.raises(BadInput, match="experts are a list of whole numbers"):
        switch_off(experts)  # type: ignore[arg-type]  # wrong on purpose


class TestOverride:
    def test_the_hook_sees_the_decision_and_replaces_it(self) -> None:
        layer, x = moe(), torch.randn(T, D)
        seen = []

        def hook(rows: Tensor, router: Router, routing: Routing) -> Routing:
            seen.append((rows, router, routing))
            return all_to(3)(rows, router, routing)

        with override(layer, hook):
            y = layer(x)
        ((rows, router, routing),) = seen
        assert torch.equal(rows, x) and router is layer.router
        assert torch.equal(routing.experts, layer.router(x).experts)
        torch.testing.assert_close(y, layer.experts(x, torch.tensor([0, 0, 0, T, 0])))

    def test_traces_record_the_replaced_decision(self) -> None:
        layer = moe()
        with override(layer, all_to(2)), mmoe.trace(layer) as routing:
            layer(torch.randn(T, D))
        assert routing[0].counts().tolist() == [0, 0, T, 0, 0]

    def test_it_is_gone_afterwards(self) -> None:
        layer, x = moe(), torch.randn(T, D)
        before = layer(x)
        with override(layer, all_to(3)):
            assert not torch.allclose(layer(x), before)
        assert torch.equal(layer(x), before)

    def test_it_is_gone_after_an_exception(self) -> None:
        layer, x = moe(), torch.randn(T, D)
        before = layer(x)

        def broken(rows: Tensor, router: Router, routing: Routing) -> Routing:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), override(layer, broken):
            layer(x)
        assert torch.equal(layer(x), before)

    def test_patterns_name_layers(self) -> None:
        model, x = host(), torch.randn(200, D)
        everything = list(range(E))
        with override(model, {"visual.*": all_to(1), "text.0": all_to(2)}):
            assert chosen(model, x) == {"visual.0": [1], "visual.1": [1], "text.0": [2]}
        with override(model, {"*.1": all_to(1)}):
            assert chosen(model, x) == {"visual.0": everything, "visual.1": [1], "text.0": everything}

    def test_unknown_pattern_changes_nothing(self) -> None:
        model, x = host(), torch.randn(200, D)
        with pytest.raises(UnknownName) as error, override(model, {"visual.0": all_to(1), "visul.1": all_to(2)}):
            pass
        assert str(error.value) == (
            "no MoE layer named 'visul.1'\n  did you mean: visual.1, visual.0\n  try: mmoe.moe_layers(model)"
        )
        assert chosen(model, x)["visual.0"] == list(range(E))

    def test_the_inner_one_replaces_the_outer_one_while_it_lasts(self) -> None:
        model, x = host(), torch.randn(200, D)
        with override(model, all_to(1)):
            with override(model, {"text.*": all_to(2)}):
                assert chosen(model, x) == {"visual.0": [1], "visual.1": [1], "text.0": [2]}
            assert chosen(model, x) == {"visual.0": [1], "visual.1": [1], "text.0": [1]}


@pytest.mark.parametrize("name", mmoe.list_routers())
def test_no_router_uses_an_expert_that_is_switched_off(name: str) -> None:
    layer, x = moe(mmoe.build_router(name, dim=D, num_experts=E)), torch.randn(200, D)
    context = Context(expert_ids=torch.randint(0, E, (200, 2))) if name == "fixed" else Context()
    off = [0, 3]
    with override(layer, switch_off(off)), mmoe.trace(layer) as routing:
        y = layer(x, context)
    assert routing[0].counts()[off].tolist() == [0, 0] and (routing[0].counts()[[1, 2, 4]] > 0).all()
    other = moe(layer.router)
    with torch.no_grad():
        for parameter, theirs in zip(other.experts.parameters(), layer.experts.parameters(), strict=True):
            parameter.copy_(theirs)
            parameter[off] = torch.nan
    with override(other, switch_off(off)):
        torch.testing.assert_close(other(x, context), y)


class TestSwitchOff:
    def test_the_router_chooses_among_the_others(self) -> None:
        layer, x = moe(), torch.randn(T, D)
        logits = layer.router(x).logits
        assert logits is not None
        left = [0, 1, 3]
        with override(layer, switch_off([2, 4])), mmoe.trace(layer) as routing:
            layer(x)
        best = logits[:, left].topk(2)
        assert torch.equal(routing[0].experts, torch.tensor(left)[best.indices])
        torch.testing.assert_close(routing[0].weights, best.values.softmax(-1))

    def test_bias_balancing_brings_no_expert_back(self) -> None:
        router = TopKRouter(D, E, top_k=1, bias_rate=0.1)
        router.select_bias[0] = 100.0
        layer = moe(router)
        with override(layer, switch_off([0])), mmoe.trace(layer) as routing:
            layer(torch.randn(T, D))
        assert routing[0].counts()[0] == 0 and routing[0].counts().sum() == T

    def test_fewer_experts_than_slots(self) -> None:
        layer, x = moe(TopKRouter(D, E, top_k=3)), torch.randn(T, D)
        with override(layer, switch_off([0, 1, 2])), mmoe.trace(layer) as routing:
            y = layer(x)
        assert routing[0].counts().tolist() == [0, 0, 0, T, T] and y.isfinite().all()
        torch.testing.assert_close(routing[0].weights.sum(-1), torch.ones(T))

    def test_given_routes_lose_slots_and_scale_up_the_rest(self) -> None:
        layer = moe(FixedRouter(E))
        ids = torch.tensor([[0, 1], [1, 2], [0, 0]])
        with override(layer, switch_off([0])), mmoe.trace(layer) as routing:
            layer(torch.randn(3, D), Context(expert_ids=ids))
        assert routing[0].experts.tolist() == [[E, 1], [1, 2], [E, E]]
        assert routing[0].weights.tolist() == [[0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]

    def test_padding_stays_out(self) -> None:
        layer = moe()
        with override(layer, switch_off([0])), mmoe.trace(layer) as routing:
            layer(torch.randn(T, D), Context(valid=torch.arange(T) < 4))
        assert routing[0].counts().sum() == 8

    def test_gradients_are_finite(self) -> None:
        layer, x = moe(), torch.randn(T, D, requires_grad=True)
        with override(layer, switch_off([0, 1])), mmoe.trace(layer) as routing:
            loss = layer(x).sum() + mmoe.balance_loss(routing) + mmoe.z_loss(routing) + mmoe.entropy_loss(routing)
        loss.backward()
        assert x.grad is not None and x.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("off", "text"),
        [
            ([5], "switch off experts [5]\n  the layer has experts 0 to 4\n  try: switch_off([0])"),
            ([-1], "switch off experts [-1]\n  the layer has experts 0 to 4\n  try: switch_off([0])"),
            (range(5), "switch off all 5 experts\n  at least one must stay\n  try: switch_off([0])"),
        ],
    )
    def test_errors(self, off: list[int], text: str) -> None:
        layer = moe()
        with pytest.raises(BadInput) as error, override(layer, switch_off(off)):
            layer(torch.randn(T, D))
        assert str(error.value) == text
        layer(torch.randn(T, D))
