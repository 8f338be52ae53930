"""The host of Gamma: open_clip's CLIP for crops of any size, experts beside its last blocks, and the head.

    MoAE(x) = MLP_shared(x) + s * sum_e p_e(x) MLP_e(x)         p = softmax(W_g x + b_g), s = 0 at the start
    f' = f + relu(B relu(A f)),   z_k = exp(tau) cos(f', t_k),   pi = softmax(z),   score = sum_k pi_k v_k

Shapes: B samples, V crops, D width, C embedding, K levels, E experts.
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmoe.errors import BadInput
from mmoe.moe import with_context
from mmoe.surgery import add_side_experts
from zoo.gamma.config import GammaConfig
from zoo.hosts.clip import CLIPHost

OWN_ROUTER = "dense:gate_bias=true"


class AnySizeCLIP(CLIPHost):
    """open_clip's CLIP whose image tower takes pictures of other sizes than its table of positions was made for.

    Args:
        config: of the family.
    """

    def __init__(self, config: GammaConfig) -> None:
        super().__init__(config, route_padding=False)
        self.position_mode = config.positions

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, C)."""
        grid = self.grid(image)
        if grid == tuple(self.visual.grid_size) and self.position_mode != "none":
            return super().encode_image(image, normalize)
        table = resize_positions(self.visual.positional_embedding, grid, self.position_mode)
        with with_context(self.visual, self.image_context(image)):
            features = functional_call(self.visual, {"positional_embedding": table}, (image,))
        return F.normalize(features, dim=-1) if normalize else features


def resize_positions(table: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """A table of positions (1 + G * G, D), class row first, for another grid.

    Args:
        table: for a square grid.
        grid: rows and columns.
        mode: of `GammaConfig.positions`.

    Example:
        >>> resize_positions(torch.zeros(17, 8), (5, 3), "grid").shape
        torch.Size([16, 8])
    """
    rows, columns = grid
    if mode == "none":
        return table.new_zeros(1 + rows * columns, table.shape[1])
    if mode == "grid":
        return resample_abs_pos_embed(table[None], [rows, columns])[0]
    size = (1 + rows * columns, table.shape[1])
    return F.interpolate(table[None, None], size, mode="bicubic", align_corners=False)[0, 0]


def add_experts(clip: CLIPHost, config: GammaConfig) -> None:
    """Adds experts to the feed-forward blocks of both towers from `first_layer` on; all else is frozen."""
    depths = {"visual.transformer": config.vision_layers, "transformer": config.text_layers}
    blocks = [f"{tower}.resblocks.{i}.mlp" for tower, depth in depths.items() for i in range(config.first_layer, depth)]
    router = OWN_ROUTER if config.router is None else config.router
    add_side_experts(clip, config.num_experts, layers=blocks, router=router, inplace=True)


class Adapter(nn.Module):
    """What the image feature gains: f + relu(B relu(A f)), which can only add.

    Args:
        dim: C.

    Example:
        >>> adapter = Adapter(8)
        >>> f = torch.randn(3, 8)
        >>> bool((adapter(f) >= f).all())
        True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(1, dim // 2)
        self.down = nn.Linear(dim, inner, bias=False)
        self.up = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return features + self.up(self.down(features).relu()).relu()


def level_logits(adapted: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Scaled cosines of crops and prompts in fp32, (B, V, K): exp(log_scale) is about 100, too much for half precision.

    Args:
        adapted: (B, V, C) image features behind the adapter.
        texts: (B, K, C) or (K, C), normalised.
        log_scale: tau.

    Example:
        >>> level_logits(torch.ones(1, 1, 2), torch.eye(2), torch.tensor(0.0)).tolist()
        [[[0.7071067690849304, 0.7071067690849304]]]
    """
    with torch.autocast(adapted.device.type, enabled=False):
        cosines = F.normalize(adapted.float(), dim=-1) @ texts.float().transpose(-1, -2)
        return log_scale.float().exp() * cosines


def check_size(image: Tensor, patch: int) -> None:
    """Makes sure that patches cover a batch of pictures.

    Raises:
        BadInput: they do not.
    """
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        wrong = f"its patches have {patch} pixels a side, and whole ones must cover the picture"
        raise BadInput(f"cannot score crops of {height} x {width}", wrong, "model.preprocess(picture)")
