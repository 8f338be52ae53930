"""Optimisers of a stage, and the learning rate at every step.

Some optimisers see parts of a packed tensor (E, O, I) as matrices of their own: Muon, which orthogonalises matrices,
and training of chosen experts, where the others must not even decay. `Parts` makes such views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.muon import Muon
from train.sections import OptimSection

NO_DECAY = ("*positional*", "*_bias", "*logit_scale*", "*class_embedding*", "*cls_token*", "*pos_embed*")


class Parts:
    """Experts of packed parameters (E, ...) as parameters of their own that share their memory.

    Gradients of experts that are not among them become 0.
    """

    def __init__(self) -> None:
        self._views: list[tuple[nn.Parameter, list[tuple[int, nn.Parameter]]]] = []

    def add(self, packed: nn.Parameter, experts: Sequence[int] | None = None) -> list[nn.Parameter]:
        """Views of some experts, of all by default."""
        chosen = range(len(packed)) if experts is None else experts
        views = [(number, nn.Parameter(packed.detach()[number])) for number in chosen]
        self._views.append((packed, views))
        if len(views) < len(packed):
            kept = torch.zeros(len(packed), *[1] * (packed.ndim - 1), dtype=torch.bool, device=packed.device)
            kept[[number for number, _ in views]] = True
            packed.register_hook(lambda grad: grad * kept)
        return [view for _, view in views]

    def take_gradients(self) -> None:
        """Gives every view its part of the packed gradient; call it when backward is done."""
        for packed, views in self._views:
            for number, view in views:
                view.grad = None if packed.grad is None else packed.grad[number]


class Optimizers(NamedTuple):
    """All that moves the weights of a stage; each group's "peak" is its learning rate after warm-up."""

    each: list[torch.optim.Optimizer]
    parts: Parts

    @classmethod
    def make(
        cls, model: nn.Module, section: OptimSection, chosen: Mapping[nn.Parameter, Sequence[int]] | None = None
    ) -> Optimizers:
        """Optimisers of the parameters that are not frozen.

        Args:
            model: with the others frozen.
            section: of the recipe.
            chosen: packed parameters of which only these experts are trained.
        """
        parts, plain, matrices = Parts(), _Groups(), _Groups()
        packed = {parameter for name, parameter in model.named_parameters() if ".experts." in name}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            factor = next((value for pattern, value in section.factors.items() if fnmatchcase(name, pattern)), 1.0)
            experts = (chosen or {}).get(parameter)
            muon = section.name == "muon" and _is_matrix_of_block(name, parameter)
            views = (
                parts.add(parameter, experts) if experts is not None or (muon and parameter in packed) else [parameter]
            )
            if muon:
                matrices.add(views, section.muon_lr or section.lr, factor, section.muon_weight_decay)
            else:
                plain.add(views, section.lr, factor, section.weight_decay if _decays(name, parameter) else 0.0)
        made: list[torch.optim.Optimizer] = []
        if plain and section.name == "sgd":
            made.append(torch.optim.SGD(plain.as_list(), momentum=section.beta1, foreach=False))
        elif plain:
            betas = section.beta1, section.beta2
            made.append(torch.optim.AdamW(plain.as_list(), betas=betas, eps=section.eps, foreach=False))
        if matrices:
            made.append(Muon(matrices.as_list()))
        return cls(made, parts)

    def set_rate(self, factor: float) -> None:
        """Learning rates as a share of their peaks."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor


class _Groups(dict[tuple[float, float], list[nn.Parameter]]):
    """Parameters by learning rate and weight decay."""

    def add(self, parameters: Sequence[nn.Parameter], rate: float, factor: float, decay: float) -> None:
        self.setdefault((rate * factor, decay), []).extend(parameters)

    def as_list(self) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), parameters in self.items()
        ]


def _is_matrix_of_block(name: str, parameter: Tensor) -> bool:
    """True for matrices inside a stack of layers, one by one or packed; routers are too narrow to orthogonalise."""
    inside = any(part.isdecimal() for part in name.split("."))
    return inside and parameter.ndim in (2, 3) and ".router." not in name and not name.endswith("_bias")


def _decays(name: str, parameter: Tensor) -> bool:
    """False for biases, norms, positions and scales."""
    return parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in NO_DECAY)


def schedule(step: int, steps: int, section: OptimSection) -> float:
    """Factor on the peak learning rate: linear warm-up, then as the recipe says.

    Args:
        step: number of the step, from 0.
        steps: of the stage.
        section: of the recipe.

    >>> section = OptimSection(lr=1.0, warmup=0.5, schedule="linear", end=0.0)
    >>> [round(schedule(step, 4, section), 2) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = max(1, round(section.warmup * steps)) if section.warmup else 0
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[section.schedule]
    return left if section.schedule == "constant" else section.end + (1 - section.end) * left
