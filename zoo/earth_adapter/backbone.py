"""The backbone of Earth-Adapter: timm's vision transformer with DINOv2's way to resize positions, and weights for it.

Source: arXiv 2504.06220 and its code for what the paper leaves open: LayerNorm eps 1e-6, positions interpolated by a
factor of (side + 0.1) / stored side, no final norm. DINOv2: Oquab et al. 2023, arXiv 2304.07193 (code and weights
Apache-2.0). Shapes: B pictures, H rows and W columns of patches, P prefix tokens, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import LoadMismatch
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.state import State, collapse

UNUSED = ("mask_token", "norm.weight", "norm.bias")  # of DINOv2, on the way to its maps
_HF_BLOCK = re.compile(r"(?:dinov2\.|model\.)?encoder\.layer\.(\d+)\.(.+)")
_HF_PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_QKV = re.compile(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)")
_HF_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


class DinoViT(VisionTransformer):
    """A vision transformer for pictures of any number of whole patches.

    Args:
        config: of the family. With the head "classes" it has the final norm, which maps do without.

    Attributes:
        pos_embed: (1, 1 + N, D), of the class token and the patches; registers have no position.
    """

    def __init__(self, config: EarthAdapterConfig) -> None:
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="token",
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads or 1,
            mlp_ratio=config.mlp_ratio,
            init_values=config.layer_scale,
            reg_tokens=config.num_registers,
            final_norm=config.head == "classes",
            dynamic_img_size=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + config.grid[0] * config.grid[1], config.width))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Adds positions to patches (B, H, W, D) and puts prefix tokens before them: (B, P + H*W, D)."""
        batch, rows, columns, dim = x.shape
        patches = self.pos_embed[:, 1:]
        if (rows, columns) != self.patch_embed.grid_size:
            patches = resize_positions(patches, self.patch_embed.grid_size, (rows, columns))
        registers = [] if self.reg_token is None else [self.reg_token.expand(batch, -1, -1)]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        return torch.cat([first, *registers, x.reshape(batch, -1, dim) + patches], dim=1)


def resize_positions(positions: Tensor, stored: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position vectors (1, H*W, D) of another grid, as DINOv2 does at run time.

    The factor has 0.1 patches more than asked for, so that rounding loses no row; it also shifts the samples a little,
    so a resize to the size itself gives other numbers.
    """
    maps = positions.float().unflatten(1, stored).permute(0, 3, 1, 2)  # (1, D, H, W)
    factors = [(side + 0.1) / before for side, before in zip(grid, stored, strict=True)]
    resized = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)


def to_grid(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> State:
    """A backbone's tensors for another patch size and grid, as the authors convert DINOv2 from 14 to 16 pixels.

    Patch kernels and the position table are resized by plain bicubic interpolation; the class token's row stays.

    Args:
        state: with "patch_embed.proj.weight" and "pos_embed", and whatever else.
        patch_size: side of the new patches.
        grid: rows and columns of the new table.
    """
    found = dict(state)
    kernel = found.get("patch_embed.proj.weight")
    if kernel is not None and kernel.shape[-2:] != (patch_size, patch_size):
        found["patch_embed.proj.weight"] = _bicubic(kernel, (patch_size, patch_size))
    table = found.get("pos_embed")
    if table is not None and (side := math.isqrt(table.shape[1])) ** 2 == table.shape[1]:
        table = F.pad(table, (0, 0, 1, 0))  # timm adds the class token's position to the token itself
    elif table is not None:
        side = math.isqrt(table.shape[1] - 1)
    if table is not None:
        if (side, side) != grid:
            maps = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            table = torch.cat([table[:, :1], _bicubic(maps, grid).flatten(2).transpose(1, 2)], dim=1)
        found["pos_embed"] = table
    return found


def _bicubic(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps.float(), size=size, mode="bicubic", align_corners=False).to(maps.dtype)


def backbone_state(state: Mapping[str, Tensor], config: EarthAdapterConfig) -> State:
    """Tensors of a pretrained backbone under the names of `DinoViT`, in its sizes.

    Args:
        state: in the layout of DINOv2 or timm, of transformers' Dinov2, or of a model of this family.
        config: of the model that gets them.

    Raises:
        LoadMismatch: it holds what none of them has.
    """
    own = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    if own:  # a model of this family: its head and adapters are not part of the base
        plain = {name: value for name, value in own.items() if ".frequency_adapter." not in name}
    elif any(name.endswith("embeddings.cls_token") for name in state):
        plain = _from_transformers(state)
    else:
        plain = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    if "register_tokens" in plain:
        plain["reg_token"] = plain.pop("register_tokens")
    dropped = UNUSED[:1] if config.head == "classes" else UNUSED
    plain = {name: value for name, value in plain.items() if name not in dropped}
    return to_grid(plain, config.patch_size, config.grid)


def _from_transformers(state: Mapping[str, Tensor]) -> State:
    found: State = {}
    attention: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in state.items():
        outside = _HF_OUTSIDE.get(name.removeprefix("dinov2.").removeprefix("model."))
        block = _HF_BLOCK.fullmatch(name)
        number, part = (block[1], block[2]) if block is not None else ("", "")
        qkv = _HF_QKV.fullmatch(part)
        stem, _, kind = part.rpartition(".")
        inside = _HF_PARTS.get(part) or (f"{_HF_PARTS[stem]}.{kind}" if stem in _HF_PARTS else None)
        if outside is not None:
            found[outside] = value
        elif qkv is not None:
            attention.setdefault(f"blocks.{number}.attn.qkv.{qkv[2]}", {})[qkv[1][0]] = value
        elif inside is not None:
            found[f"blocks.{number}.{inside}"] = value
        else:
            unknown.append(name)
    if unknown:
        wrong = f"unknown keys: {collapse(unknown)}"
        raise LoadMismatch("use these weights as a backbone", wrong, "the weights of a Dinov2Model")
    return found | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in attention.items()}
