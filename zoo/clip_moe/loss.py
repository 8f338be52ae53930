"""Losses of CLIP-MoE: symmetric contrastive loss over all processes, and the balance loss pooled over a tower's layers.

    L = ITC(long) + ITC(short) + 0.01 * (aux_image + aux_text / 2 + aux_short / 2)

Source: arXiv 2409.19291 section 3, and the authors' code for what it leaves open (label smoothing 0.1, the half
weight of text, the division of the balance loss by the number of processes).
Shapes: B samples per process, R processes, C width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mmoe.losses import balance_loss
from mmoe.trace import Trace

if TYPE_CHECKING:
    from zoo.clip_moe.model import ClipMoEConfig


def world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes; backward adds the gradients that all processes have for one's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)  # (R*B, C)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Mean of image-to-text and text-to-image cross-entropy of this process' rows against all processes' columns.

    Args:
        image: (B, C) features, normalised here.
        text: (B, C) features, normalised here.
        scale: inverse temperature.
        label_smoothing: share of the target spread over all columns.

    Example:
        >>> same = torch.eye(4)
        >>> contrastive_loss(same, same, torch.tensor(100.0), label_smoothing=0.0).item()
        0.0
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    rank, processes = world()
    all_image, all_text = (_Gather.apply(x) if processes > 1 else x for x in (image, text))  # (R*B, C)
    targets = torch.arange(len(image), device=image.device) + rank * len(image)
    to_text = F.cross_entropy(scale * image @ all_text.t(), targets, label_smoothing=label_smoothing)
    to_image = F.cross_entropy(scale * text @ all_image.t(), targets, label_smoothing=label_smoothing)
    return (to_text + to_image) / 2


def pooled_balance(routing: Trace, config: ClipMoEConfig) -> Tensor:
    """Balance loss of one tower; balanced routing gives K, divided by the number of processes where configured."""
    over_ranks = config.balance_over_ranks
    loss = balance_loss(routing, pool=config.balance_pooled, all_processes=not over_ranks)
    return loss / world()[1] if over_ranks else loss
