"""`train.fine_tune`: what moves, what stays as it was, and what is refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import train
import zoo
from mmoe.errors import BadInput, BadOverride
from mmoe.moe import moe_layers

SIZES = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
SIZES |= {"vision_heads": 2, "text_heads": 2, "moe_layers": 2}


def tiny(**options):
    torch.manual_seed(0)
    return zoo.load("clip_moe_tiny", weights=False, device="cpu", **{**SIZES, **options})


def short(model, steps=1, **options):
    return train.fine_tune(model, steps, batch_size=16, progress=False, **options)


def test_only_the_routers_move():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert len(short(model, 2)) == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".router." in name}


def test_it_is_left_as_it_was():
    model = tiny().train()
    model.clip.logit_scale.requires_grad_(False)
    numbers = torch.get_rng_state()
    short(model, trainable=["*.router.*", "*.attn.*"])
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["clip.logit_scale"]
    assert model.training and torch.equal(torch.get_rng_state(), numbers)
    assert all(p.grad is None for p in model.parameters())


def test_it_trains_in_full_precision_after_a_run_that_did_not():
    expected = short(tiny())
    AcceleratorState._reset_state()
    Accelerator(mixed_precision="bf16", cpu=True)
    assert short(tiny()) == expected


def test_training_lowers_the_loss():
    losses = short(tiny(num_experts=0, init_logit_scale=2.6), 60, lr=3e-3, trainable="*")
    assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.2


def test_bias_balancing_moves_with_the_steps():
    model = tiny(router="topk:bias_rate=0.01")
    short(model, 3)
    biases = torch.stack([layer.router.select_bias for layer in moe_layers(model).values()])
    assert biases.abs().max() > 0.005 and biases.abs().max() < 0.031


def test_any_picture_size_and_context_length():
    assert len(short(tiny(image_size=32, context_length=12))) == 1


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"steps": 0}, "steps=0\n  steps is a whole number of at least 1\n  try: steps=1"),
        ({"lr": -1.0}, "lr=-1.0\n  lr is a finite number above 0\n  try: lr=0.003"),
    ],
)
def test_options_without_a_meaning(options, wrong):
    with pytest.raises(BadOverride) as error:
        train.fine_tune(tiny(), progress=False, **options)
    assert str(error.value) == wrong


def test_a_pattern_that_names_nothing():
    with pytest.raises(BadInput, match="no parameter has such a name"):
        short(tiny(), trainable="*.ruoter.*")
