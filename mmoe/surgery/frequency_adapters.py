"""Puts frequency adapters after the blocks of a frozen vision transformer of any library.

Paper: arXiv 2504.06220 (Earth-Adapter); the adapters are those of `mmoe.frequency`. The published module
is made for one width, depth and grid and comes as a part of its own backbone; here every host that
`mmoe.surgery.blocks` understands gets them, for pictures of any size.
Shapes: B pictures, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from mmoe.errors import BadInput, BadOverride, Refused
from mmoe.frequency import Box, FrequencyAdapter
from mmoe.options import check_bool, check_int
from mmoe.surgery.blocks import NotesGrid, PatchGrid, check_extendable, extend, vision_blocks

Model = TypeVar("Model", bound=nn.Module)


class AdaptedBlock:
    """Mixin of a transformer block: adapts what the block gives, the first entry where it gives several."""

    frequency_adapter: FrequencyAdapter
    patch_grid: PatchGrid
    prefix: int
    tokens_first: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host, and then the adapter."""
        out = super().forward(*args, **kwargs)  # type: ignore[misc]  # the host's
        if isinstance(out, Tensor):
            return self._adapt(out)
        if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
            return type(out)([self._adapt(out[0]), *out[1:]])
        kind = type(out).__name__
        raise BadInput("adapt what a block gives", f"it is a {kind}, not tokens or a tuple", "a ViT of timm")

    def _adapt(self, tokens: Tensor) -> Tensor:
        if tokens.ndim == 4:  # maps (B, H, W, D), as in SAM
            flat: Tensor = self.frequency_adapter(tokens.flatten(1, 2), self.patch_grid.now, 0)
            return flat.view_as(tokens)
        tokens = tokens.transpose(0, 1) if self.tokens_first else tokens  # (B, P + N, D)
        adapted: Tensor = self.frequency_adapter(tokens, self.patch_grid.now, self.prefix)
        return adapted.transpose(0, 1) if self.tokens_first else adapted


def add_frequency_adapters(
    model: Model,
    dim: int = 64,
    *,
    fft_layers: Sequence[int] = (),
    adapter_layers: Sequence[int] | None = None,
    cutoff: float = 0.3,
    box: Box = "half_open",
    scale: float = 0.1,
    token_dim: int = 0,
    token_grid: tuple[int, int] | None = None,
    zero_init: bool = False,
    compact: bool = True,
    freeze: bool = True,
    inplace: bool = False,
) -> Model:
    """Puts an adapter after each chosen block of a vision transformer.

    Names of the host's parameters stay; the adapters' are `BLOCKS.0.frequency_adapter.*`, on the device and of the
    type of their blocks. Dropout of the host is not touched: for a backbone that stays as it is call `eval()`.

    Args:
        model: host of any library; see `mmoe.surgery.vision_blocks`.
        dim: inner width of the adapters.
        fft_layers: blocks, from 0, whose adapters split frequencies and have a router; the others are plain.
        adapter_layers: blocks that get an adapter, those of `fft_layers` among them; None: all of them. Others stay as
            they are.
        cutoff, box: see `mmoe.frequency_split`.
        scale: initial value of the learned factor of each adapter.
        token_dim: width of learned vectors per patch that the spatial adapters also read; they fix the grid.
        token_grid: rows and columns of patches, for `token_dim`.
        zero_init: the model computes at first what it did before.
        compact: see `mmoe.FrequencyAdapter`.
        freeze: freezes everything else.
        inplace: changes `model` instead of a copy.

    Returns:
        The model with adapters.

    Raises:
        Refused: no blocks are found, or there are adapters already. BadOverride: there is no such block, or an
            option is none; the model is as it was then, `inplace` or not.

    Example:
        >>> class ViT(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patch = nn.Conv2d(3, 8, 4, 4)
        ...         block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...         self.blocks = nn.Sequential(block, copy.deepcopy(block))
        ...
        ...     def forward(self, x):
        ...         return self.blocks(self.patch(x).flatten(2).transpose(1, 2))
        >>> import torch
        >>> vit = ViT().eval()
        >>> adapted = add_frequency_adapters(vit, 4, fft_layers=[1], zero_init=True)
        >>> x = torch.randn(1, 3, 16, 24)
        >>> torch.allclose(adapted(x), vit(x), atol=1e-6)
        True
    """
    if isinstance(model, nn.Module) and frequency_adapters(model):
        raise Refused(f"add adapters to a {type(model).__name__}", "it has them already", "frequency_adapters(model)")
    check_int("dim", dim, 1)
    check_bool("freeze", freeze)
    model = model if inplace else copy.deepcopy(model)
    stack = vision_blocks(model)
    depth = len(stack.blocks)
    split = _layers("fft_layers", fft_layers, depth)
    chosen = _layers("adapter_layers", range(depth) if adapter_layers is None else adapter_layers, depth)
    check_split_layers(split, chosen)
    blocks: list[Any] = [stack.blocks[layer] for layer in chosen]
    check_extendable([stack.patches, *blocks])
    adapters = [
        FrequencyAdapter(
            stack.dim,
            dim,
            frequency=layer in split,
            cutoff=cutoff,
            box=box,
            scale=scale,
            token_dim=token_dim,
            token_grid=token_grid,
            zero_init=zero_init,
            compact=compact,
        )
        for layer in chosen
    ]
    if freeze:
        model.requires_grad_(False)
    extend(stack.patches, NotesGrid)
    grid = stack.patches.patch_grid = PatchGrid()  # type: ignore[assignment]  # no module
    for block, adapter in zip(blocks, adapters, strict=True):
        like = next(block.parameters())
        extend(block, AdaptedBlock)
        block.frequency_adapter = adapter.to(like.device, like.dtype).train(block.training)
        block.patch_grid, block.prefix, block.tokens_first = grid, stack.prefix, stack.tokens_first
    return model


def check_split_layers(fft_layers: Collection[int], adapter_layers: Collection[int]) -> None:
    """Makes sure that blocks whose adapters split frequencies have adapters.

    Raises:
        BadOverride: one has none.

    >>> check_split_layers([1], [0, 1])
    """
    bare = [layer for layer in fft_layers if layer not in adapter_layers]
    if bare:
        wrong = f"block {bare[0]} has no adapter that could split frequencies: adapter_layers={list(adapter_layers)}"
        works = sorted({*adapter_layers, *fft_layers})
        raise BadOverride(f"fft_layers={list(fft_layers)}", wrong, f"adapter_layers={works}")


def _layers(name: str, layers: Any, depth: int) -> list[int]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise BadOverride(f"{name}={layers!r}", "it is a list of blocks, from 0", f"{name}=[0]")
    listed = list(layers)
    for layer in listed:
        check_int(f"a layer of {name}", layer, 0, depth - 1)
    return sorted(set(listed))


def frequency_adapters(model: nn.Module) -> dict[str, FrequencyAdapter]:
    """Adapters of a model by name, in the order of its blocks."""
    return {name: part for name, part in model.named_modules() if isinstance(part, FrequencyAdapter)}
