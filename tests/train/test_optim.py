"""Optimisers: every parameter has one, parts of packed tensors, schedules."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

import zoo
from mmoe.moe import moe_layers
from train.muon import Muon
from train.optim import Optimizers, schedule
from train.sections import OptimSection

SIZES = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
SIZES |= {"vision_heads": 2, "text_heads": 2, "moe_layers": 2}
MUON = OptimSection(name="muon", lr=1e-3, muon_lr=1e-3)


def tiny(**options):
    torch.manual_seed(0)
    return zoo.load("clip_moe_tiny", weights=False, device="cpu", **{**SIZES, **options})


def test_every_parameter_is_in_one_group():
    model = tiny()
    (adamw,) = Optimizers.make(model, OptimSection(lr=1e-3)).each
    held = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {names[id(p)] for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"clip.logit_scale", "clip.positional_embedding", "clip.ln_final.weight"} <= still
    assert not any(name.endswith(("attn.in_proj_weight", "up_proj", "router.weight")) for name in still)


def test_factors_scale_the_rate():
    model = tiny()
    optimizers = Optimizers.make(model, OptimSection(lr=1e-3, factors={"*logit_scale": 10, "*router*": 0.5}))
    optimizers.set_rate(0.1)
    rates = {id(p): group["lr"] for one in optimizers.each for group in one.param_groups for p in group["params"]}
    told = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert told["clip.logit_scale"] == pytest.approx(1e-3) and told["clip.ln_final.weight"] == pytest.approx(1e-4)
    assert [told[name] for name in told if ".router." in name] == pytest.approx([5e-5] * 4)


def step(optimizers: Optimizers) -> None:
    optimizers.parts.take_gradients()
    for one in optimizers.each:
        one.step()


def test_a_mixture_moves_with_muon_as_its_experts_would_alone():
    model = tiny()
    layer = next(iter(moe_layers(model).values()))
    packed = layer.experts.up_proj
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in packed.detach()]
    optimizers = Optimizers.make(model, MUON)
    packed.grad = torch.randn_like(packed)
    for matrix, grad in zip(alone, packed.grad, strict=True):
        matrix.grad = grad.clone()
    step(optimizers)
    Muon(alone, lr=1e-3, weight_decay=MUON.muon_weight_decay).step()
    for moved, expected in zip(packed, alone, strict=True):
        assert torch.equal(moved, expected)


SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24), (3, 50)]


def orthogonal(grad: torch.Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """What torch's Muon does in bf16, in fp64."""
    a, b, c = coefficients
    wide = grad.double() if grad.size(0) <= grad.size(1) else grad.double().t()
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.t()
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide if grad.size(0) <= grad.size(1) else wide.t()).to(grad.dtype)


MATCH = {"adjust_lr_fn": "match_rms_adamw"}


@pytest.mark.parametrize(
    ("together", "options"),
    [(2**23, MATCH), (1, MATCH), (1, {**MATCH, "nesterov": False}), (1, {})]
    + [(1, {"adjust_lr_fn": name}) for name in ("original", "spectral_unclamped")],
)
def test_muon_moves_as_that_of_torch(monkeypatch, together, options):
    """Where that is as exact, with all that a state of torch's may ask for; states go both ways."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal)
    monkeypatch.setattr("train.muon._TOGETHER", together)
    begun = [torch.randn(shape) for shape in SHAPES]
    pairs = [[torch.nn.Parameter(matrix.clone()) for matrix in begun] for _ in range(2)]
    theirs = torch.optim.Muon(pairs[0], lr=0.1, weight_decay=0.5, **options)
    ours = Muon(pairs[1], lr=0.1, weight_decay=0.5)
    assert ours.state_dict()["param_groups"] == [{**theirs.state_dict()["param_groups"][0], **MATCH, "nesterov": True}]
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    for _ in range(3):
        grads = [torch.randn(shape) if shape != (3, 50) else None for shape in SHAPES]
        for matrices in pairs:
            for matrix, grad in zip(matrices, grads, strict=True):
                matrix.grad = None if grad is None else grad.clone()
        theirs.step()
        ours.step()
        for matrix, expected in zip(*reversed(pairs), strict=True):
            torch.testing.assert_close(matrix, expected, atol=1e-5, rtol=1e-5)
        states = [one.state_dict() for one in (ours, theirs)]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        for state in states:
            assert {n: list(one) for n, one in state["state"].items()} == {n: ["momentum_buffer"] for n in range(4)}
        theirs.load_state_dict(deepcopy(states[0]))
        ours.load_state_dict(deepcopy(states[1]))
    assert torch.equal(pairs[1][-1], begun[-1]), "one without a gradient does not even decay"


def test_muon_leaves_matrices_without_numbers():
    nothing, some = (torch.nn.Parameter(torch.ones(shape)) for shape in ((0, 5), (2, 5)))
    nothing.grad, some.grad = torch.ones(0, 5), torch.ones(2, 5)
    Muon([nothing, some], lr=0.1).step()
    assert nothing.shape == (0, 5) and not torch.equal(some, torch.ones(2, 5))
    some.grad = torch.ones(2, 5).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        Muon([some]).step()


def test_muon_takes_the_matrices_of_the_blocks():
    model = tiny()
    adamw, muon = Optimizers.make(model, MUON).each
    blocks = [p for name, p in model.named_parameters() if ".resblocks." in name and p.ndim > 1 and "_bias" not in name]
    matrices = [p for p in blocks if p.ndim == 2]
    experts = [matrix for p in blocks if p.ndim == 3 for matrix in p]
    routers = [layer.router.weight for layer in moe_layers(model).values()]
    held = [p for group in muon.param_groups for p in group["params"]]
    assert len(held) == len(matrices) - len(routers) + len(experts)
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert {id(p) for p in routers} <= rest and id(model.clip.text_projection) in rest


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_only_chosen_experts_move(name):
    model = tiny()
    section = OptimSection(name=name, lr=0.1, muon_lr=0.1 if name == "muon" else None, weight_decay=0.5)
    packed = next(iter(moe_layers(model).values())).experts.up_proj
    before = packed.detach().clone()
    optimizers = Optimizers.make(model, section, {packed: (1, 2)})
    packed.sum().backward()
    assert [bool(grad.any()) for grad in packed.grad] == [False, True, True, False]
    step(optimizers)
    assert [torch.equal(*pair) for pair in zip(packed, before, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize(("name", "last"), [("cosine", 0.01), ("linear", 0.01), ("constant", 1.0)])
def test_schedules_warm_up_and_fall(name, last):
    section = OptimSection(lr=1.0, schedule=name, warmup=0.1)
    factors = [schedule(step, 100, section) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0 and factors[-1] == pytest.approx(last, abs=0.02)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert schedule(0, 10, OptimSection(lr=1.0, warmup=0.0)) == 1.0
