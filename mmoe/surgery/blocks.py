"""Finds the transformer blocks of a vision model of any library, and lets modules follow them.

    stack = vision_blocks(model)          name, width, prefix tokens, grid of a picture
    extend(module, Mixin)                 the module itself, of a class that comes before its own

A vision transformer is a convolution that cuts patches (its kernel is its stride) and, under the same tower, a list of
alike blocks of the width that the convolution gives. Nothing of a library is imported: timm's ViTs (DINOv2, DINOv3,
EVA), transformers' Dinov2, DINOv3, ViT and CLIP, and open_clip's towers are all found that way. Models whose blocks are
not of one width (Swin, ConvNeXt) are refused.

Modules get a subclass of their own class instead of a wrapper or a hook: names of parameters stay, so that the host's
checkpoints load; `isinstance` and attributes stay, which hosts rely on; and torch.compile sees a plain forward, where
hooks added later are not run. Shapes: B pictures, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from mmoe.errors import BadInput, Refused

# Names under which libraries keep tokens that come before the patches.
PREFIX_TOKENS = (
    "cls_token",
    "class_token",
    "class_embedding",
    "dist_token",
    "distillation_token",
    "reg_token",
    "register_tokens",
)
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockStack:
    """The transformer blocks of one vision tower.

    Attributes:
        name: of the list in the model.
        blocks: in the order in which they run.
        dim: D.
        prefix: P, tokens before the patches: class token, registers.
        patches: the convolution that cuts patches.
        tokens_first: blocks take (P + N, B, D) instead of (B, P + N, D).
    """

    name: str
    blocks: Sequence[nn.Module] = field(repr=False)
    dim: int
    prefix: int
    patches: nn.Conv2d = field(repr=False)
    tokens_first: bool = False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of a picture in pixels."""
        sides = zip((height, width), self.patches.kernel_size, self.patches.stride, strict=True)
        rows, columns = ((side - kernel) // stride + 1 for side, kernel, stride in sides)
        return rows, columns


def vision_blocks(model: nn.Module) -> BlockStack:
    """The blocks of a model's vision tower.

    Args:
        model: a vision transformer, or a model with one inside, such as a CLIP.

    Raises:
        Refused: there is none, or the tower has blocks of several widths. BadInput: it is no model.

    Example:
        >>> class ViT(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patch = nn.Conv2d(3, 8, 4, 4)
        ...         self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        ...         layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        ...         self.blocks = nn.ModuleList([layer, layer])
        >>> import torch
        >>> stack = vision_blocks(ViT())
        >>> stack.name, stack.dim, stack.prefix, stack.grid(16, 24)
        ('blocks', 8, 1, (4, 6))
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"find the vision blocks of a {type(model).__name__}", "it is no model", "a ViT of timm")
    lists = dict(_lists(model))
    pairs = []
    for patch_name, patches in _patch_convolutions(model):
        for name, blocks in lists.items():
            tower = _common(patch_name, name)
            depth = len(tower.split(".")) if tower else 0
            if _width(blocks[0]) == patches.out_channels:
                pairs.append((depth, len(blocks), name, patches, tower))
    if not pairs:
        wrong = "it has no convolution into patches with a list of alike blocks of the same width beside it"
        raise Refused(f"find the vision blocks of a {type(model).__name__}", wrong, "a ViT of timm or transformers")
    _, _, name, patches, tower = max(pairs, key=lambda pair: pair[:2])
    widths = sorted({_width(blocks[0]) or 0 for other, blocks in lists.items() if _inside(other, tower)})
    if len(widths) > 1:
        wrong = f"its blocks are {', '.join(map(str, widths))} wide"
        raise Refused(f"take the blocks of a {type(model).__name__} as one stack", wrong, "a ViT of timm")
    return BlockStack(
        name=name,
        blocks=list(lists[name]),
        dim=patches.out_channels,
        prefix=_prefix(model.get_submodule(tower)),
        patches=patches,
        tokens_first=_tokens_first(lists[name][0]),
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of blocks: members of one class and width; lists inside a block do not count."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        members = list(module)
        kinds = {(host_class(member), _width(member)) for member in members}
        if len(kinds) == 1 and _width(members[0]) is not None and not any(_inside(name, outer) for outer in found):
            found.append(name)
            yield name, members


def _width(block: nn.Module) -> int | None:
    """Width of a block: of its first norm; None where it is no block of linear layers alone."""
    parts = list(block.modules())
    if not any(isinstance(part, nn.Linear) for part in parts) or any(isinstance(part, nn.Conv2d) for part in parts):
        return None
    norms = (part for part in parts if "norm" in type(part).__name__.lower())
    weights = (getattr(norm, "weight", None) for norm in norms)
    return next((len(weight) for weight in weights if isinstance(weight, Tensor) and weight.ndim == 1), None)


def _patch_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size == part.stride and min(part.stride) > 1:
            yield name, part


def _common(one: str, other: str) -> str:
    """The name of the innermost module that holds both."""
    shared = []
    for left, right in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _prefix(tower: nn.Module) -> int:
    """Tokens that a tower puts before its patches, by the parameters that hold them."""
    count = 0
    for name, value in tower.named_parameters():
        if name.rpartition(".")[2] in PREFIX_TOKENS:
            count += value.shape[-2] if value.ndim > 1 else 1
    return count


def _tokens_first(block: nn.Module) -> bool:
    attention = next((part for part in block.modules() if isinstance(part, nn.MultiheadAttention)), None)
    return attention is not None and not attention.batch_first


class Extended:
    """A module whose class was changed by `extend`; its class is made again where it is copied or read."""

    _mixin: type
    _host: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._mixin, self._host), self.__getstate__()


@cache
def _class(mixin: type, host: type) -> type:
    name = f"{mixin.__name__}{host.__name__}"
    return type(name, (mixin, Extended, host), {"_mixin": mixin, "_host": host, "__module__": host.__module__})


def _blank(mixin: type, host: type) -> Any:
    made: Any = _class(mixin, host)
    return made.__new__(made)


def extend(module: Module, mixin: type) -> Module:
    """Lets a class come before that of a module, in place: its `forward` may call `super().forward`.

    Args:
        module: of any class.
        mixin: a plain class with a `forward`.

    Raises:
        Refused: see `check_extendable`.
    """
    check_extendable([module])
    host: type = type(module)
    module.__class__ = _class(mixin, host)
    return module


def check_extendable(modules: Sequence[nn.Module]) -> None:
    """Modules that `extend` takes, each of them once.

    Raises:
        Refused: one has a forward of its own, which a class would not reach, was extended before, or comes twice.
    """
    for place, module in enumerate(modules):
        wrong = None
        if isinstance(module, Extended):
            wrong = "it was extended before"
        elif "forward" in vars(module):
            wrong = "its forward is not that of its class"
        elif any(module is other for other in modules[:place]):
            wrong = "it stands in several places"
        if wrong is not None:
            raise Refused(f"extend a {host_class(module).__name__}", wrong, "a model as its library built it")


def host_class(module: nn.Module) -> type:
    """The class that a module had before it was extended.

    >>> host_class(nn.Linear(2, 2)).__name__
    'Linear'
    """
    return module._host if isinstance(module, Extended) else type(module)


class PatchGrid:
    """Rows and columns of the picture that a tower runs on, as its convolution gave them and its blocks need them."""

    latest: tuple[int, int] | None = None

    @property
    def now(self) -> tuple[int, int]:
        """The latest grid.

        Raises:
            BadInput: no picture came by.
        """
        if self.latest is None:
            raise BadInput("adapt the patches of a picture", "its convolution did not run", "model(pixels)")
        return self.latest


class NotesGrid:
    """Mixin of the convolution that cuts patches: tells its grid."""

    patch_grid: PatchGrid

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host, and notes the grid."""
        out = super().forward(*args, **kwargs)  # type: ignore[misc]  # the host's
        self.patch_grid.latest = out.shape[-2], out.shape[-1]
        return out
