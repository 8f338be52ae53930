"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) as torch has it, quick on CPUs and for many matrices.

    m = mu m + (1 - mu) g;  W = (1 - lr wd) W - lr 0.2 sqrt(max(O, I)) orthogonal(mu m + (1 - mu) g)

Shapes: W (O, I).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_SCALES = {None: "original", "spectral_unclamped": "rms_to_rms"}  # names of torch -> of timm, where they differ
_TOGETHER = 2**23  # numbers that are orthogonalised at a time


class Muon(torch.optim.Muon):
    """torch's Muon with the step sizes of AdamW (Liu et al. 2025, arXiv 2502.16982), and the same state.

    Matrices of one shape are orthogonalised together; on CPUs in fp32, since few of them multiply in bf16.

    Args:
        params: matrices, or groups of them with "lr" and "weight_decay".
        lr: learning rate.
        weight_decay: times the learning rate.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # decorated there
        """Moves all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict[tuple[torch.Size, torch.device], list[Tensor]](list)
            for matrix in group["params"]:
                if matrix.grad is None or not matrix.numel():
                    continue
                if matrix.grad.is_sparse:
                    raise RuntimeError("Muon does not support sparse gradients")
                alike[matrix.shape, matrix.device].append(matrix)
            for (shape, _), matrices in alike.items():
                most = max(1, _TOGETHER // shape.numel())
                for first in range(0, len(matrices), most):
                    self._move(matrices[first : first + most], group)
        return loss

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """A step of matrices of one shape, (n, O, I) together."""
        from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz

        ahead = []
        for matrix in matrices:
            grad, state = matrix.grad, self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            mean = state["momentum_buffer"]
            mean.lerp_(grad, 1 - group["momentum"])
            ahead.append(grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean)
        orthogonal = zeropower_via_newtonschulz(
            torch.stack(ahead),
            group["ns_steps"],
            [group["ns_coefficients"]],
            eps=group["eps"],
            dtype=torch.float32 if ahead[0].device.type == "cpu" else torch.bfloat16,
        )
        scale = _SCALES.get(group["adjust_lr_fn"], group["adjust_lr_fn"])
        size = group["lr"] * get_lr_scale(orthogonal.shape[1:], scale)
        for matrix, direction in zip(matrices, orthogonal, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(matrix.dtype), alpha=-size)
