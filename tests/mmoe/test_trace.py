"""Recording of routings: complete, once, without a trace nothing, also with checkpointing and torch.compile."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmoe
from mmoe import Context, FFNExperts, FixedRouter, MoE, Routing, TopKRouter, Trace, balance_loss, z_loss
from mmoe.errors import UnknownName

D, E = 16, 4


def layer() -> MoE:
    return MoE(TopKRouter(D, E), FFNExperts(D, 8, E))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Host(nn.Module):
    """Two towers of blocks, each optionally checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.visual = nn.ModuleList([Block(), Block()])
        self.text = nn.ModuleList([Block()])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.visual, *self.text]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


NAMES = ["visual.0.moe", "visual.1.moe", "text.0.moe"]


def loss_and_grads(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, inside: bool) -> list[Tensor]:
    """Task plus auxiliary loss, and all gradients; the backward pass runs inside or after the trace."""
    model.zero_grad()
    with mmoe.trace(model) as routing:
        loss = call(x).square().mean() + balance_loss(routing) + z_loss(routing)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert routing.names == list(mmoe.moe_layers(model))
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


class TestRecording:
    def test_every_layer_is_recorded_in_order_under_its_name(self) -> None:
        host, x = Host(), torch.randn(2, 5, D)
        with mmoe.trace(host) as routing:
            host(x)
        assert routing.names == routing.layers == NAMES and len(routing) == 3
        assert all(isinstance(one, Routing) and len(one.experts) == 10 for one in routing)
        first = host.visual[0]
        torch.testing.assert_close(routing[0].logits, first.moe.router(first.norm(x).flatten(0, 1)).logits)

    def test_nothing_is_stored_outside(self) -> None:
        host, x = Host(), torch.randn(5, D)
        with mmoe.trace(host):
            pass
        before = {name: dict(vars(module)) for name, module in host.named_modules()}
        host(x)
        with mmoe.trace(host) as routing:
            host(x)
        host(x)
        assert len(routing) == 3
        assert {name: dict(vars(module)) for name, module in host.named_modules()} == before
        assert [key for key in host.state_dict() if "record" in key] == []

    def test_an_exception_ends_the_recording(self) -> None:
        host = Host()
        with pytest.raises(ZeroDivisionError), mmoe.trace(host):
            raise ZeroDivisionError
        assert all(not module._recorders for module in mmoe.moe_layers(host).values())

    def test_traces_nest(self) -> None:
        host, x = Host(), torch.randn(5, D)
        with mmoe.trace(host) as outer:
            host(x)
            with mmoe.trace(host) as inner:
                host(x)
            host(x)
        assert (len(outer), len(inner)) == (9, 3)
        assert inner[0] is outer[3]

    def test_a_trace_of_a_part_has_the_parts_names(self) -> None:
        host = Host()
        with mmoe.trace(host.visual) as part, mmoe.trace(host) as whole:
            host(torch.randn(5, D))
        assert part.names == ["0.moe", "1.moe"] and whole.names == NAMES

    def test_recorded_routings_carry_gradients_and_detached_ones_do_not(self) -> None:
        host = Host()
        features = torch.randn(5, D, requires_grad=True)
        with mmoe.with_context(host, Context(features=features)), mmoe.trace(host) as routing:
            host(torch.randn(5, D))
        assert routing[0].weights.requires_grad
        detached = routing.detach()[0]
        assert detached.context is not None and detached.logits is not None and detached.probs is not None
        tensors = [detached.weights, detached.logits, detached.probs, detached.context.features]
        assert not any(tensor.requires_grad for tensor in tensors)

    def test_detach_reaches_losses_and_state(self) -> None:
        on = torch.ones(1, requires_grad=True) * 2
        routing = Routing(
            experts=torch.zeros(1, 1, dtype=torch.long), weights=on, num_experts=1, losses={"a": on}, state=(on, [on])
        ).detach()
        assert not any(tensor.requires_grad for tensor in (routing.losses["a"], routing.state[0], routing.state[1][0]))


def test_every_router_takes_its_own_step_for_each_run() -> None:
    host = nn.ModuleDict({name: MoE(TopKRouter(D, 2, top_k=1, bias_rate=0.1), FFNExperts(D, 4, 2)) for name in "ab"})
    x = torch.ones(3, D)
    with mmoe.trace(host) as routing:
        host["a"](x)
        host["b"](x)
        host["b"](x)
    mmoe.update_routers(host, routing)
    steps = {name: sorted(round(b, 2) for b in layer.router.select_bias.tolist()) for name, layer in host.items()}
    assert steps == {"a": [-0.1, 0.1], "b": [-0.2, 0.2]}


class TestCheckpointing:
    @pytest.mark.parametrize("inside", [True, False])
    def test_records_once_and_gradients_of_the_aux_loss_agree(self, inside: bool) -> None:
        plain, checkpointed = Host(), Host(checkpointed=True)
        checkpointed.load_state_dict(plain.state_dict())
        x = torch.randn(6, D)
        expected = loss_and_grads(plain, plain, x, inside)
        for a, b in zip(loss_and_grads(checkpointed, checkpointed, x, inside), expected, strict=True):
            torch.testing.assert_close(a, b)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> None:
        torch._dynamo.reset()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_trace_opened_after_compilation_records(self, dtype: torch.dtype) -> None:
        self.check(Block().to(dtype), "aot_eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_with_the_default_compiler(self, dtype: torch.dtype) -> None:
        self.check(Host().to(dtype), "inductor")

    def check(self, host: nn.Module, backend: str) -> None:
        x = torch.randn(6, D, dtype=next(host.parameters()).dtype)
        compiled = torch.compile(host, backend=backend)
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if x.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
        torch.testing.assert_close(compiled(x), host(x), **tolerance)
        expected = loss_and_grads(host, host, x, inside=False)
        for a, b in zip(loss_and_grads(host, compiled, x, inside=False), expected, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        compiled(x)
        assert all(not module._recorders for module in mmoe.moe_layers(host).values())

    @pytest.mark.parametrize("padded", [False, True])
    def test_compiled_around_checkpointing_records_once(self, padded: bool) -> None:
        host = Host(checkpointed=True)
        compiled, x = torch.compile(host, backend="aot_eager"), torch.randn(6, D)
        context = Context(valid=torch.arange(6) < 4) if padded else None
        with mmoe.with_context(host, context):
            expected = loss_and_grads(host, host, x, inside=False)
            for inside in (True, False):
                for a, b in zip(loss_and_grads(host, compiled, x, inside), expected, strict=True):
                    torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_dropless_layer_is_one_graph(self, dtype: torch.dtype) -> None:
        moe = layer().to(dtype)
        torch.compile(moe, backend="eager", fullgraph=True)(torch.randn(6, D, dtype=dtype))


def recorded() -> Trace:
    """Two layers, one of them run twice, with routes that are easy to count."""

    def one(ids: list[list[int]], num_experts: int, probs: list[float], valid: list[bool] | None = None) -> Routing:
        experts = torch.tensor(ids)
        return Routing(
            experts=experts,
            weights=(experts < num_experts).float(),
            num_experts=num_experts,
            probs=torch.tensor([probs] * len(ids)),
            context=None if valid is None else Context(valid=torch.tensor(valid)),
        )

    trace = Trace()
    trace.add("visual.0", one([[0, 1], [0, 2]], 4, [0.25] * 4))
    trace.add("text.0", one([[0], [1], [2]], 2, [0.5, 0.5], [True, True, False]))
    trace.add("visual.0", one([[0, 1], [0, 4]], 4, [0.25] * 4))
    return trace


class TestStatistics:
    def test_numbers(self) -> None:
        trace = recorded()
        assert trace.layers == ["visual.0", "text.0"]
        assert trace.counts().tolist() == [[4, 2, 1, 0], [1, 1, 0, 0]]
        torch.testing.assert_close(trace.load()[0], torch.tensor([4, 2, 1, 0]) / 7)
        torch.testing.assert_close(trace.entropy(), torch.tensor([math.log(4), math.log(2)]))

    def test_summary(self) -> None:
        assert recorded().summary() == [
            {
                "layer": "visual.0",
                "num_experts": 4,
                "experts_per_token": 1.75,
                "load": [0.5714, 0.2857, 0.1429, 0.0],
                "use": [0.5714, 0.2857, 0.1429, 0.0],
                "max_over_mean": 2.286,
                "dead": [3],
                "entropy": 1.3863,
            },
            {
                "layer": "text.0",
                "num_experts": 2,
                "experts_per_token": 1.0,
                "load": [0.5, 0.5],
                "use": [0.5, 0.5],
                "max_over_mean": 1.0,
                "dead": [],
                "entropy": 0.6931,
            },
        ]

    def test_use_of_a_dense_mixture_is_its_share_of_the_weights(self) -> None:
        """Every token goes to every expert, so that counts say nothing; runs count by their rows."""

        def routing(experts: list[list[int]], weights: list[list[float]]) -> Routing:
            return Routing(experts=torch.tensor(experts), weights=torch.tensor(weights), num_experts=2)

        trace = Trace()
        trace.add("a", routing([[0, 1]], [[0.5, 0.5]]))
        trace.add("a", routing([[0, 1], [0, 1]], [[0.9, 0.1], [0.6, 0.4]]))
        assert trace.load().tolist() == [[0.5, 0.5]]
        torch.testing.assert_close(trace.use(), torch.tensor([[2.0, 1.0]]) / 3)
        sparse = routing([[0, 2], [1, 0]], [[0.3, 0.0], [0.1, 0.9]])
        torch.testing.assert_close(sparse.use(), torch.tensor([2.0, 1.0]) / 3)

    def test_summary_of_nothing_counted_is_plain_numbers(self) -> None:
        moe = layer()
        with mmoe.trace(moe) as routing:
            moe(torch.randn(3, D), Context(valid=torch.zeros(3, dtype=torch.bool)))
        (row,) = json.loads(json.dumps(routing.summary(), allow_nan=False))
        assert row["experts_per_token"] == row["entropy"] == 0 and row["dead"] == [0, 1, 2, 3]

    def test_summary_of_a_router_without_scores(self) -> None:
        moe = MoE(FixedRouter(E), FFNExperts(D, 8, E))
        with mmoe.trace(moe) as routing:
            moe(torch.randn(3, D), Context(expert_ids=torch.tensor([0, 0, 2])))
        (row,) = routing.summary()
        assert row["dead"] == [1, 3] and row["entropy"] == 0 and row["load"] == [0.6667, 0.0, 0.3333, 0.0]

    def test_empty(self) -> None:
        trace = Trace()
        assert len(trace) == 0 and trace.summary() == [] and trace.layers == []
        assert trace.counts().shape == (0, 0) and trace.entropy().shape == (0,)


class TestLookup:
    def test_select_and_names(self) -> None:
        trace = recorded()
        assert trace.select("visual.*").names == ["visual.0", "visual.0"]
        assert list(trace.select("*")) == list(trace) and len(trace.select("audio.*")) == 0
        assert trace["text.0"] is trace[1] and trace[-1] is trace[2] and trace[:2] == [trace[0], trace[1]]

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownName) as error:
            recorded()["visual.1"]
        assert str(error.value) == "routing of layer 'visual.1'\n  did you mean: visual.0\n  try: routing.layers"

    def test_a_layer_that_ran_twice_has_no_single_routing(self) -> None:
        with pytest.raises(UnknownName) as error:
            recorded()["visual.0"]
        assert str(error.value) == (
            "routing of layer 'visual.0'\n  the layer ran 2 times\n  try: routing.select('visual.0')"
        )


def test_the_function_keeps_its_name_whatever_is_imported_first() -> None:
    code = "import mmoe.trace, mmoe.override, mmoe.dispatch, mmoe; print(all(map(callable, ({}))))"
    names = ", ".join(f"mmoe.{name}" for name in ("trace", "override", "dispatch", "profile"))
    done = subprocess.run([sys.executable, "-c", code.format(names)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("whole", [False, True])
def test_routers_that_peft_stands_around_take_their_step(whole: bool) -> None:
    from peft import LoraConfig, get_peft_model

    host = nn.Sequential(mmoe.MoE(mmoe.TopKRouter(8, 4, top_k=1, bias_rate=0.1), mmoe.FFNExperts(8, 16, 4)))
    kept = {"modules_to_save": ["0.router"], "target_parameters": ["0.experts.up_proj"]}
    options = kept if whole else {"target_parameters": ["0.router.weight"]}
    adapted = get_peft_model(host, LoraConfig(target_modules=[], **options))
    with mmoe.trace(adapted) as routing:
        adapted(torch.ones(6, 8))
    mmoe.update_routers(adapted, routing)
    moved = [value for name, value in adapted.named_buffers() if name.endswith("select_bias") and value.any()]
    assert len(moved) == 1
    with mmoe.trace(adapted) as again:
        adapted(torch.ones(6, 8))
    mmoe.update_routers(adapted, again)
    assert moved[0].abs().max() > 0.15, "the router that runs is the one that took the step"
