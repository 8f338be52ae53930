"""The delay between codebooks in which UniMoE-Audio writes sound: later codebooks of a frame come some steps later.

    channel c at step t holds the code of frame t - delay[c]

Source: github.com/HITsz-TMG/Uni-MoE (UniMoE-Audio); the pattern is MusicGen's (Copet et al. 2023, arXiv 2306.05284).
Shapes: B samples, T steps, C codebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNKNOWN = -1  # a code that is still to be generated


def delayed(codes: Tensor, delays: Sequence[int], bos: int) -> Tensor:
    """Codes (B, T, C) with each codebook late by its delay; what comes before is `bos`.

    >>> delayed(torch.tensor([[[1, 4], [2, 5], [3, 6]]]), [0, 1], 9).tolist()
    [[[1, 9], [2, 4], [3, 5]]]
    """
    frames = torch.arange(codes.shape[1], device=codes.device)[:, None] - codes.new_tensor(list(delays))  # (T, C)
    found = codes.gather(1, frames.clamp(min=0).expand_as(codes))
    return torch.where(frames < 0, bos, found)


def undelayed(codes: Tensor, delays: Sequence[int]) -> Tensor:
    """Codes (B, T - max delay, C) frame by frame again; the last steps do not hold whole frames.

    >>> undelayed(torch.tensor([[[1, 9], [2, 4], [3, 5]]]), [0, 1]).tolist()
    [[[1, 4], [2, 5]]]
    """
    whole = codes.shape[1] - max(delays)
    frames = torch.arange(whole, device=codes.device)[:, None] + codes.new_tensor(list(delays))  # (T', C)
    return codes.gather(1, frames.expand(len(codes), -1, -1))


def prefill(prompts: Sequence[Tensor | None], delays: Sequence[int], bos: int) -> tuple[Tensor, Tensor]:
    """What is known before the first step of generation, delayed; the rest is `UNKNOWN`.

    Args:
        prompts: codes (T_b, C) that each sample begins with, or None.
        delays: of the codebooks.
        bos: code before the first frame.

    Returns:
        Codes (B, 1 + longest prompt + max delay, C), and steps known per sample (B,).
    """
    known = [0 if prompt is None else len(prompt) for prompt in prompts]
    rows = torch.full((len(prompts), 1 + max(known) + max(delays), len(delays)), UNKNOWN)
    rows[:, 0] = bos
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt is not None:
            row[1 : 1 + len(prompt)] = prompt
    return delayed(rows, delays, bos), torch.tensor(known) + 1
