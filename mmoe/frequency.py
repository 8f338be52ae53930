"""Adapters on the patch tokens of a picture: one on the tokens, one each on their low and high spatial frequencies.

    plain       F' = F + s Adapter_0(F)
    frequency   F' = F + s (w_0 Adapter_0(F) + w_1 Adapter_1(F_low) + w_2 Adapter_2(F_high)),   w = softmax(R F + c)
    Adapter(z) = U relu(V z + a) + b

Paper: Hu et al., "Earth-Adapter: Bridge the Geospatial Domain Gaps with Mixture of Frequency Adaptation", arXiv
2504.06220. Authors' code: github.com/VisionXLab/Earth-Adapter (GPL-3); written from the paper.
The three adapters are packed experts under a dense softmax router, so tracing, overrides and figures see them.

F_low is the part of F inside a box of 2h x 2h low frequencies of an orthonormal FFT over rows and columns, with
h = int(min(H, W) * cutoff // 2), and F_high is the rest. The published box holds the frequencies -h to h - 1, which
is not symmetric: its inverse is complex and the imaginary part is dropped. That is the same as a real filter that
takes every frequency together with its opposite and weights the edges by half, which is what is computed here. A
filter over patches and a product over channels commute, V F_low = (V F)_low, so the F inner channels are filtered in
place of the D outer ones, and the weights w are applied to them too.

Shapes: B pictures, H rows and W columns of patches, N = H*W, P prefix tokens, D width, F inner width, T = B*N.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import BadInput, BadOverride
from mmoe.experts.base import Experts
from mmoe.experts.ffn import FFNExperts
from mmoe.moe import MoE
from mmoe.options import check_bool, check_choice, check_float, check_int
from mmoe.recompute import Calls, in_backward, in_checkpoint
from mmoe.routers.dense import DenseRouter
from mmoe.routing import Routing

Box = Literal["half_open", "symmetric"]
ADAPTERS = ("spatial", "low", "high")


def half_width(grid: tuple[int, int], cutoff: float) -> int:
    """Half the side of the low-pass box of a grid, h; 0 leaves nothing to the low part.

    >>> half_width((32, 32), 0.3), half_width((32, 32), 0.2), half_width((4, 4), 0.3)
    (4, 3, 0)
    """
    return int(min(grid) * cutoff // 2)


def low_pass(grid: tuple[int, int], half: int, box: Box = "half_open", device: Any = None) -> Tensor:
    """Weights in [0, 1] of the frequencies of a real FFT over a grid: (H, W // 2 + 1).

    Args:
        grid: H and W.
        half: h of the box.
        box: "half_open" as published; "symmetric" holds -h to h.
        device: of the result.
    """
    rows, columns = grid
    above = half if box == "half_open" else half + 1
    inside = []
    for size, kept in ((rows, rows), (columns, columns // 2 + 1)):
        position = torch.arange(kept, device=device)
        both = [(sign * position + size // 2) % size - size // 2 for sign in (1, -1)]  # a frequency and its opposite
        inside.append([(-half <= frequency) & (frequency < above) for frequency in both])
    (row, opposite_row), (column, opposite_column) = inside
    return ((row[:, None] & column).float() + (opposite_row[:, None] & opposite_column).float()) / 2


def low_frequencies(maps: Tensor, cutoff: float = 0.3, box: Box = "half_open") -> Tensor:
    """The low spatial frequencies of maps (..., H, W, C) in fp32; see `frequency_split`."""
    grid = maps.shape[-3], maps.shape[-2]
    with torch.autocast("cpu" if maps.is_meta else maps.device.type, enabled=False):
        kept = low_pass(grid, half_width(grid, cutoff), box, maps.device)[..., None]  # (H, W // 2 + 1, 1)
        spectrum = torch.fft.rfft2(maps.float(), dim=(-3, -2), norm="ortho")  # (..., H, W // 2 + 1, C)
        return torch.fft.irfft2(spectrum * kept, s=grid, dim=(-3, -2), norm="ortho")


def frequency_split(maps: Tensor, cutoff: float = 0.3, box: Box = "half_open") -> tuple[Tensor, Tensor]:
    """Low and high spatial frequencies of maps (..., H, W, C); they add up to the maps.

    Computed in fp32 whatever autocast says, since half-precision FFTs know few sizes; returned in the maps' type.

    Args:
        maps: patch tokens in rows and columns.
        cutoff: side of the low-pass box as a share of the shorter side, 0 to 1.
        box: see `low_pass`.

    Example:
        >>> maps = torch.randn(2, 6, 8, 4)
        >>> low, high = frequency_split(maps, cutoff=0.5)
        >>> torch.allclose(low + high, maps, atol=1e-6)
        True
    """
    low = low_frequencies(maps, cutoff, box)
    return low.to(maps.dtype), (maps - low).to(maps.dtype)


def check_split(cutoff: Any, box: Any) -> None:
    """The options of `frequency_split`.

    Raises:
        BadOverride: the cutoff is no share, or there is no such box.
    """
    check_float("cutoff", cutoff, low=0, usual=0.3)
    if cutoff > 1:
        raise BadOverride(f"cutoff={cutoff}", "it is a share of the grid, 0 to 1", "cutoff=0.3")
    check_choice("box", box, get_args(Box))


def _check_grid(token_dim: int, token_grid: Any) -> None:
    asked = f"token_dim={token_dim} with token_grid={token_grid}"
    if bool(token_dim) != (token_grid is not None):
        raise BadOverride(asked, "they belong together", "token_dim=64, token_grid=(32, 32)")
    two = isinstance(token_grid, tuple | list) and len(token_grid) == 2
    if token_grid is not None and not (two and all(isinstance(side, int) and side > 0 for side in token_grid)):
        raise BadOverride(asked, "a grid is its numbers of rows and columns", "token_grid=(32, 32)")


class AdapterExperts(Experts):
    """Packed adapters: one on maps, or three on maps and on their low and high frequencies.

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: 1 (spatial), or 3 (spatial, low, high).
        cutoff, box: see `frequency_split`.
        token_dim: C, width of learned vectors of the patches, which the spatial adapter also reads (its input is then
            D + C wide); 0 where there are none.
        token_grid: rows and columns of the patches that they belong to.
    """

    packed = FFNExperts.packed

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        cutoff: float = 0.3,
        box: Box = "half_open",
        token_dim: int = 0,
        token_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (("dim", dim, 1), ("hidden_dim", hidden_dim, 1), ("token_dim", token_dim, 0)):
            check_int(name, size, least)
        check_split(cutoff, box)
        _check_grid(token_dim, token_grid)
        self.num_experts, self.cutoff, self.box, self.act = num_experts, cutoff, box, F.relu
        plain = FFNExperts(dim, hidden_dim, num_experts)
        self.up_proj, self.down_proj = plain.up_proj, plain.down_proj
        self.up_bias, self.down_bias = plain.up_bias, plain.down_bias
        self.tokens: nn.Parameter | None = None
        self.token_grid = token_grid
        if token_grid is not None:
            spread, bound = math.sqrt(6 / (3 * 16 * 16 + dim)), 1 / math.sqrt(dim + token_dim)
            self.tokens = nn.Parameter(torch.empty(math.prod(token_grid), token_dim).uniform_(-spread, spread))
            self.token_proj = nn.Parameter(torch.empty(hidden_dim, token_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor, counts: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Maps (B, H, W, D) -> weighted sums of what the adapters make of them, (T, D); without a routing the sum."""
        hidden = F.linear(x, self.up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1))  # (B, H, W, E, F)
        spatial = hidden[..., 0, :]
        if self.tokens is not None:
            spatial = spatial + self._of_tokens(x.shape[1], x.shape[2]).to(hidden.dtype)
        parts = [spatial]
        if self.num_experts > 1:
            both = low_frequencies(hidden[..., 1:, :].flatten(-2), self.cutoff, self.box)
            low, others = both.chunk(2, -1)  # (B, H, W, F) each
            parts += [low.to(hidden.dtype), (hidden[..., 2, :] - others).to(hidden.dtype)]
        assert self.up_bias is not None and self.down_bias is not None
        active = self.act(torch.stack(parts, dim=-2) + self.up_bias.to(hidden.dtype)).flatten(0, 2)  # (T, E, F)
        down = self.down_proj.transpose(1, 2).flatten(0, 1)  # (E * F, D)
        if routing is None:
            return active.flatten(1) @ down + self.down_bias.sum(0)
        weights = routing.dense_weights().to(active.dtype)  # (T, E)
        return (weights[..., None] * active).flatten(1) @ down + weights @ self.down_bias

    def _of_tokens(self, rows: int, columns: int) -> Tensor:
        """What the learned vectors add to the inner channels of each patch, (H, W, F)."""
        assert self.tokens is not None and self.token_grid is not None
        if (rows, columns) != tuple(self.token_grid):
            wrong = f"its learned vectors belong to {self.token_grid[0]} x {self.token_grid[1]} patches"
            asked = f"adapt a picture of {rows} x {columns} patches"
            raise BadInput(asked, wrong, "pictures of one size, or token_dim=0")
        return (self.tokens @ self.token_proj.t()).unflatten(0, self.token_grid)


class FrequencyMoE(MoE):
    """The mixture of three adapters: maps (B, H, W, D) -> (B, H, W, D).

    Args:
        dim: D.
        hidden_dim: F.
        cutoff, box: see `frequency_split`.
        token_dim, token_grid: learned vectors of the spatial adapter; see `AdapterExperts`.

    Example:
        >>> from mmoe import trace
        >>> mixture = FrequencyMoE(8, 4)
        >>> with trace(mixture) as routing:
        ...     y = mixture(torch.randn(2, 4, 6, 8))
        >>> y.shape, routing[0].weights.shape
        (torch.Size([2, 4, 6, 8]), torch.Size([48, 3]))
    """

    experts: AdapterExperts

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        cutoff: float = 0.3,
        box: Box = "half_open",
        token_dim: int = 0,
        token_grid: tuple[int, int] | None = None,
    ) -> None:
        learned: dict[str, Any] = {"token_dim": token_dim, "token_grid": token_grid}
        experts = AdapterExperts(dim, hidden_dim, len(ADAPTERS), cutoff=cutoff, box=box, **learned)
        super().__init__(DenseRouter(dim, len(ADAPTERS), gate_bias=True), experts)

    @property
    def cutoff(self) -> float:
        """Side of the low-pass box as a share of the shorter side."""
        return self.experts.cutoff

    @property
    def box(self) -> Box:
        """Which low-pass box."""
        return self.experts.box

    def _mix(self, inputs: Tensor, routing: Routing, shape: torch.Size) -> Tensor:
        y: Tensor = self.experts(inputs.unflatten(0, shape), None, routing)
        return y


class SpatialAdapter(nn.Module):
    """The plain adapter: maps (B, H, W, D) -> (B, H, W, D). Arguments are those of `FrequencyMoE`."""

    def __init__(
        self, dim: int, hidden_dim: int, *, token_dim: int = 0, token_grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.experts = AdapterExperts(dim, hidden_dim, 1, token_dim=token_dim, token_grid=token_grid)

    def forward(self, maps: Tensor) -> Tensor:
        """Applies the adapter."""
        out: Tensor = self.experts(maps)
        return out.reshape(maps.shape)


class FrequencyAdapter(nn.Module):
    """What follows a transformer block: adapts patch tokens and passes the prefix tokens before them untouched.

    Args:
        dim: D.
        hidden_dim: F.
        frequency: mixes three adapters; False has the spatial one alone.
        cutoff, box: see `frequency_split`.
        scale: initial value of the learned factor s.
        token_dim, token_grid: learned vectors of the spatial adapter; see `AdapterExperts`.
        zero_init: starts with up projections of 0, so that nothing changes at first.
        compact: False keeps the low and high adapters and the router of a plain layer, as released files do. They are
            never run, and frozen.

    Example:
        >>> adapter = FrequencyAdapter(8, 4, frequency=True, zero_init=True)
        >>> tokens = torch.randn(2, 1 + 4 * 6, 8)
        >>> torch.equal(adapter(tokens, (4, 6)), tokens)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 64,
        *,
        frequency: bool = True,
        cutoff: float = 0.3,
        box: Box = "half_open",
        scale: float = 0.1,
        token_dim: int = 0,
        token_grid: tuple[int, int] | None = None,
        zero_init: bool = False,
        compact: bool = True,
    ) -> None:
        super().__init__()
        check_float("scale", scale)
        check_split(cutoff, box)
        for name, value in (("frequency", frequency), ("zero_init", zero_init), ("compact", compact)):
            check_bool(name, value)
        learned: dict[str, Any] = {"token_dim": token_dim, "token_grid": token_grid}
        self.adapter: FrequencyMoE | SpatialAdapter
        self.adapter = (
            FrequencyMoE(dim, hidden_dim, cutoff=cutoff, box=box, **learned)
            if frequency
            else SpatialAdapter(dim, hidden_dim, **learned)
        )
        self.scale = nn.Parameter(torch.full((1,), float(scale)))
        self.dead: nn.ModuleDict | None = None
        if not compact and not frequency:
            unused = {"router": DenseRouter(dim, 3, gate_bias=True), "experts": AdapterExperts(dim, hidden_dim, 2)}
            self.dead = nn.ModuleDict(unused).requires_grad_(False)
        if zero_init:
            for name in ("down_proj", "down_bias"):
                nn.init.zeros_(getattr(self.adapter.experts, name))
        self._calls: Calls[tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": None}

    def forward(self, tokens: Tensor, grid: tuple[int, int], prefix: int | None = None) -> Tensor:
        """Adapts tokens (B, P + N, D), patches row by row.

        Args:
            tokens: of a batch.
            grid: H and W; where backward repeats a call, the grid of its first run is taken instead.
            prefix: P, where it is known; else all before the last H*W tokens. There may be none yet: class tokens of
                some hosts join in a later block.

        Raises:
            BadInput: there are fewer tokens than patches, or others than those and the prefix.
        """
        rows, columns = grid = self._first_grid(tokens, grid)
        before = tokens.shape[1] - rows * columns
        if prefix is not None and before not in (0, prefix):
            wrong = f"the picture has {prefix} and {rows} x {columns}"
            raise BadInput(f"adapt {tokens.shape[1]} tokens", wrong, "a model that drops and adds no patches")
        if before < 0:
            wrong = f"a grid of {rows} x {columns} has more"
            raise BadInput(f"adapt {tokens.shape[1]} tokens", wrong, "the grid of the picture that they come from")
        maps = tokens[:, before:].unflatten(1, grid)  # (B, H, W, D)
        adapted = maps + self.scale * self.adapter(maps)
        return torch.cat([tokens[:, :before], adapted.flatten(1, 2).to(tokens.dtype)], dim=1)

    def _first_grid(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid, or that of the first run where backward repeats a call: other pictures may have come since."""
        if torch.compiler.is_compiling():
            return grid
        if in_backward():
            return grid if self._calls is None else self._calls.find(tokens, grid)
        if in_checkpoint():
            self._calls = self._calls or Calls()
            self._calls.keep(tokens, grid)
        return grid
