"""Side experts on hosts of open_clip, timm and transformers: at scale 0 the host is what it was, to the last bit."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe import LearnedScale, add_side_experts
from mmoe.errors import BadInput, BadOverride, Refused, UnknownName
from mmoe.surgery import HostedMoE, sites, upcycle
from tests.foreign_hosts import HOSTS, clip_call, open_clip_host, relative_gap

FOREIGN = ["open_clip", "timm vit", "hf clip", "hf vit"]
EXPERTS = 3


def backward(model: nn.Module, host: str = "open_clip") -> Tensor:
    """The output, after a backward pass from a weighted sum of it."""
    out = HOSTS[host][1](model)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return out


def open_scales(model: nn.Module, value: float = 0.7) -> None:
    """Sets s, makes the experts differ, and lets the routers prefer some."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in mmoe.moe_layers(model).values():
            layer.post.scale.fill_(value)
            for parameter in (*layer.experts.parameters(), *layer.router.parameters()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("dtype", "freeze"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("host", [*HOSTS])
def test_at_scale_0_the_host_is_what_it_was(host: str, dtype: torch.dtype, freeze: bool) -> None:
    build, call, num_sites, _ = HOSTS[host]
    dense = build().to(dtype).requires_grad_(not freeze)  # torch runs some frozen layers by other kernels
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model, report = add_side_experts(dense, EXPERTS, freeze=freeze)
    assert len(report.sites) == num_sites and not report.refused
    with torch.no_grad():
        want, got = call(dense), call(model)
        open_scales(model)
        moved = call(model)
    assert got.dtype == want.dtype and torch.equal(got, want)
    assert relative_gap(want.float(), moved.float()) > 0.02, "the experts reach the output once the scale is not 0"
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = dense.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("host", FOREIGN)
def test_what_is_added_is_the_formula(host: str) -> None:
    dense = HOSTS[host][0]()
    model, report = add_side_experts(dense, EXPERTS)
    open_scales(model)
    for name in report.sites:
        layer, block = model.get_submodule(name), dense.get_submodule(name)
        x = torch.randn(2, 5, layer.router.weight.shape[1])
        p = nn.functional.linear(x, layer.router.weight, layer.router.bias).softmax(-1)  # (2, 5, E)
        outputs = []
        for e in range(EXPERTS):
            expert = copy.deepcopy(block)
            up, down = [m for m in expert.modules() if isinstance(m, nn.Linear)]
            with torch.no_grad():
                up.weight.copy_(layer.experts.up_proj[e])
                up.bias.copy_(layer.experts.up_bias[e])
                down.weight.copy_(layer.experts.down_proj[e])
                down.bias.copy_(layer.experts.down_bias[e])
            outputs.append(expert(x))
        want = block(x) + layer.post.scale * (p[..., None] * torch.stack(outputs, dim=-2)).sum(-2)
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", FOREIGN)
def test_what_is_trained_and_what_moves_first(host: str) -> None:
    dense = HOSTS[host][0]()
    model, report = add_side_experts(dense, EXPERTS)
    added = {name for name, _ in model.named_parameters()} - {
        name.replace(f"{site}.", f"{site}.shared.") if name.startswith(f"{site}.") else name
        for name, _ in dense.named_parameters()
        for site in [next((one for one in report.sites if name.startswith(f"{one}.")), "")]
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == added
    parts = {name.rpartition(".mlp.")[2] if ".mlp." in name else name for name in trained}
    assert {part.split(".")[0] for part in parts} == {"router", "experts", "post"}
    backward(model, host)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grads[name] is None for name in grads.keys() - trained), "the host is frozen"
    scales = {name for name in trained if name.endswith("post.scale")}
    assert len(scales) == len(report.sites)
    assert sum(bool(grads[name].abs() > 0) for name in scales) >= len(scales) - 1, "an unread last block may stay"
    assert all(grads[name] is None or grads[name].abs().max() == 0 for name in trained - scales)
    open_scales(model)
    model.zero_grad()
    backward(model, host)
    moved = [name for name in trained if (grad := model.get_parameter(name).grad) is not None and grad.abs().max() > 0]
    assert len(moved) > len(trained) / 2


def test_the_host_may_be_trained_too() -> None:
    dense = open_clip_host()
    dense.visual.requires_grad_(False)
    model, report = add_side_experts(dense, freeze=False)
    for name in report.sites:
        layer = model.get_submodule(name)
        assert all(p.requires_grad is not name.startswith("visual") for p in layer.shared.parameters())
        assert all(p.requires_grad for part in (layer.router, layer.experts, layer.post) for p in part.parameters())
    assert model.positional_embedding.requires_grad and not model.visual.proj.requires_grad


@pytest.mark.parametrize("host", FOREIGN)
def test_reloading_is_exact(host: str) -> None:
    build, call, _, _ = HOSTS[host]
    model, _ = add_side_experts(build(), EXPERTS)
    open_scales(model)
    again, _ = add_side_experts(build(), EXPERTS)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(call(again), call(model))
    assert not torch.equal(call(again), call(add_side_experts(build(), EXPERTS)[0]))


@pytest.mark.parametrize("host", FOREIGN)
def test_router_probabilities_are_seen(host: str) -> None:
    build, call, _, _ = HOSTS[host]
    model, report = add_side_experts(build(), EXPERTS)
    with mmoe.trace(model) as routing, torch.no_grad():
        call(model)
    assert sorted(routing.layers) == sorted(report.sites)
    for run in routing:
        assert run.probs.shape[1] == EXPERTS and run.n_used().unique().tolist() == [EXPERTS]
        torch.testing.assert_close(run.probs.sum(-1), torch.ones(len(run.probs)))
        assert run.probs.std(0).max() > 1e-4, "tokens are told apart"


def test_compiled() -> None:
    """A whole graph where upcycled blocks give one; the compiled layer learns as the plain one does."""
    model, report = add_side_experts(open_clip_host(), EXPERTS)
    open_scales(model)
    layer = model.get_submodule(next(iter(report.sites)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, grads = torch.randn(2, 5, 64), []
    for run in (layer, compiled):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    for plain, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, plain, atol=1e-4, rtol=1e-4)
    whole = torch.compile(model.visual, backend="eager")
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(whole(image), model.visual(image), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, _ = add_side_experts(open_clip_host(), EXPERTS)
    open_scales(model)
    plain = backward(model).detach()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.set_grad_checkpointing()
    model.zero_grad()
    torch.testing.assert_close(backward(model.train()).detach(), plain)
    for name, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_inplace_and_copy() -> None:
    dense = open_clip_host()
    block = dense.visual.transformer.resblocks[0].mlp
    model, _ = add_side_experts(dense)
    copied = model.visual.transformer.resblocks[0].mlp
    assert copied.shared is not block and dense.visual.transformer.resblocks[0].mlp is block
    assert all(p.requires_grad for p in dense.parameters()), "the given model stays as it was"
    with torch.no_grad():
        copied.shared.c_fc.weight.zero_()
    assert block.c_fc.weight.abs().max() > 0
    same, _ = add_side_experts(dense, inplace=True)
    assert same is dense and dense.visual.transformer.resblocks[0].mlp.shared is block


def test_dropout_is_the_hosts() -> None:
    model, _ = add_side_experts(HOSTS["hf gpt2"][0](), scale=1.0)
    layer = next(iter(mmoe.moe_layers(model).values()))
    assert layer.post.dropout == 0.1 and layer.shared.dropout.p == 0.1 and not layer.training
    x = torch.ones(1000)
    layer.post.train()
    dropped = layer.post(x)
    assert 50 < int((dropped == 0).sum()) < 150 and layer.post.eval()(x).equal(x)


def test_meta_device_and_report() -> None:
    with torch.device("meta"):
        dense = open_clip_host()
    model, report = add_side_experts(dense, EXPERTS, layers=1)
    real, expected = add_side_experts(open_clip_host(), EXPERTS, layers=1)
    assert all(p.is_meta for p in model.parameters()) and report == expected
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    widths = {"visual.transformer.resblocks.1.mlp": 64, "transformer.resblocks.2.mlp": 32}
    data = json.loads(json.dumps(report.as_dict()))
    for name, width in widths.items():
        block = 2 * 4 * width * width + 5 * width
        assert data["sites"][name]["params_before"] == block
        assert data["sites"][name]["params_after"] == (EXPERTS + 1) * block + EXPERTS * width + EXPERTS + 1
    params = mmoe.count_params(real)
    assert data["active_after"] == data["params_after"] == params.total, "every expert sees every row"
    assert str(report).startswith("2 blocks given side experts, ")


def test_another_router_and_start() -> None:
    generator = torch.Generator().manual_seed(5)
    model, _ = add_side_experts(open_clip_host(), 4, router="topk:top_k=1", scale=0.25, generator=generator)
    for layer in mmoe.moe_layers(model).values():
        assert isinstance(layer, HostedMoE) and layer.router.top_k == 1 and layer.post.scale.item() == 0.25
    again, _ = add_side_experts(open_clip_host(), 4, router="topk:top_k=1", generator=torch.Generator().manual_seed(5))
    for one, other in zip(mmoe.moe_layers(model).values(), mmoe.moe_layers(again).values(), strict=True):
        assert torch.equal(one.router.weight, other.router.weight)


def test_open_clip_still_knows_its_dtype() -> None:
    model, _ = add_side_experts(open_clip_host())
    assert model.transformer.get_cast_dtype() == torch.float32
    assert model.bfloat16().transformer.get_cast_dtype() == torch.bfloat16
    assert clip_call(model).dtype == torch.bfloat16


def test_what_cannot_be_done() -> None:
    dense = open_clip_host()
    with pytest.raises(UnknownName, match=r"did you mean: transformer\.resblocks\.0\.mlp"):
        add_side_experts(dense, layers="transformer.resblock.0.mlp")
    with pytest.raises(Refused, match=r"no block can be given side experts\n.*and 4 more: it is a MoE already"):
        add_side_experts(upcycle(dense)[0])
    with pytest.raises(Refused, match="no feed-forward block"):
        add_side_experts(nn.Linear(3, 3))
    with pytest.raises(BadInput, match="it is no model"):
        add_side_experts("vit_tiny")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_experts": 0}, "num_experts=0\n  num_experts is a whole number of at least 1"),
        ({"scale": float("nan")}, "scale=nan\n  scale is a finite number"),
        ({"freeze": 1}, "freeze=1\n  freeze is true or false"),
        ({"layers": 0}, "layers=0"),
        ({"layers": [1, 2]}, "layers=[1, 2]\n  layers are a number of last layers, or patterns"),
        ({"generator": 3}, "generator=3\n  routers are drawn by a generator of the CPU"),
        ({"router": "dense:gate=1"}, "did you mean: gate_bias"),
    ]
    for options, message in wrong:
        with pytest.raises(BadOverride) as error:
            add_side_experts(dense, **options)
        assert message in str(error.value)
    assert list(sites(dense)) and not mmoe.moe_layers(dense) and all(p.requires_grad for p in dense.parameters())


def test_a_learned_scale() -> None:
    scale, x = LearnedScale(0.0), torch.randn(3, 4, requires_grad=True)
    scale(x).sum().backward()
    assert scale.scale.shape == () and x.grad.abs().max() == 0
    torch.testing.assert_close(scale.scale.grad, x.detach().sum())
    assert list(scale.state_dict()) == ["scale"]
    for options in ({"initial": "a"}, {"dropout": 1.0}):
        with pytest.raises(BadOverride):
            LearnedScale(**options)
