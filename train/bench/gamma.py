"""`mmoe bench gamma`: the image tower of a Gamma beside the same tower with a plain loop over the experts.

Both have the same weights, are shown to agree, and take turns in one process. The loop is what one writes by hand: for
each expert a perceptron on all tokens, times its probability, added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import MmoeError, Refused
from mmoe.moe import MoE, moe_layers
from mmoe.routers import DenseRouter
from train.bench.layer import take_turns
from train.bench.model import load

OURS, LOOP = "mmoe", "loop"


class LoopOverExperts(nn.Module):
    """shared(x) + s * sum_e p_e(x) MLP_e(x) with a loop over e.

    Args:
        layer: whose parts are used.
    """

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        router: Any = self.layer.router
        experts: Any = self.layer.experts
        post: Any = self.layer.post
        shared: Any = self.layer.shared
        probs = F.linear(x, router.weight, router.bias).softmax(-1)  # (..., E)
        mixture = torch.zeros_like(x)
        for e in range(self.layer.num_experts):
            hidden = experts.act(F.linear(x, experts.up_proj[e], experts.up_bias[e]))
            mixture = mixture + probs[..., e : e + 1] * F.linear(hidden, experts.down_proj[e], experts.down_bias[e])
        return shared(x) + post.scale * mixture


def measure(name: str = "gamma_vit_b16", batch: int = 4, dtype: str = "fp32", seconds: float = 20.0) -> dict[str, Any]:
    """Milliseconds of both towers on a batch of crops and how many times as fast ours is, by pass.

    Args:
        name: of a model of the family; its weights are random.
        batch: crops.
        dtype: of its parameters.
        seconds: about what each timing may take.

    Raises:
        Refused: it has no side experts, or other routers. MmoeError: the two towers compute different things.
    """
    torch.manual_seed(0)
    model = load(name, dtype, {}, weights=False)
    layers = [] if model.family != "gamma" else list(moe_layers(model.clip.visual).values())
    if not layers or not all(isinstance(layer.router, DenseRouter) for layer in layers):
        wrong = "it is no Gamma whose routers weigh all experts by a softmax"
        raise Refused(f"compare {name!r} with a loop over its experts", wrong, "mmoe bench gamma")
    for layer in layers:
        nn.init.constant_(layer.get_parameter("post.scale"), 0.5)
    tower: nn.Module = model.clip.visual
    towers = {OURS: tower, LOOP: with_loops(tower)}
    image = torch.randn(batch, 3, model.config.crop, model.config.crop).to(model.dtype)
    _check_agreement(towers, image)
    found: dict[str, Any] = {"name": name, "dtype": dtype, "batch": batch}
    for kind, run in {"forward": _forward, "forward + backward": _backward}.items():
        runs: dict[str, Callable[[], object]] = {key: partial(run, one, image) for key, one in towers.items()}
        ms = take_turns(runs, model.zero_grad, seconds)
        found[kind] = {f"{key}_ms": value for key, value in ms.items()} | {"ratio": round(ms[LOOP] / ms[OURS], 3)}
    return found


def with_loops(tower: nn.Module) -> nn.Module:
    """The same tower, its weights included, with loops in place of its mixtures."""
    kept: dict[int, Any] = {id(value): value for value in (*tower.parameters(), *tower.buffers())}
    loops = {id(layer): LoopOverExperts(layer) for layer in moe_layers(tower).values()}
    return copy.deepcopy(tower, kept | loops)


def _forward(tower: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        tower(image)


def _backward(tower: nn.Module, image: Tensor) -> None:
    tower(image).float().sum().backward()


def _check_agreement(towers: dict[str, nn.Module], image: Tensor) -> None:
    with torch.no_grad():
        ours, loop = (towers[key](image).float() for key in (OURS, LOOP))
    difference = float((ours - loop).norm() / loop.norm())
    if not difference <= (1e-4 if image.dtype == torch.float32 else 0.06):
        wrong = f"their outputs differ by {difference:.1e} of their norm"
        raise MmoeError("the tower with loops computes something else", wrong, "open an issue")
