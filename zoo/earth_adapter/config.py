"""Options of the Earth-Adapter family and the released settings of each task; method: `zoo.earth_adapter.model`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mmoe.errors import BadOverride
from mmoe.frequency import check_split
from mmoe.options import check_choice, check_float, check_int
from mmoe.surgery.frequency_adapters import check_split_layers
from zoo.config import check_types

ISPRS = ("impervious surface", "building", "low vegetation", "tree", "car", "clutter")
LOVEDA = ("background", "building", "road", "water", "barren", "forest", "agricultural")
ISAID = (
    "background",
    "ship",
    "storage tank",
    "baseball diamond",
    "tennis court",
    "basketball court",
    "ground track field",
    "bridge",
    "large vehicle",
    "small vehicle",
    "helicopter",
    "swimming pool",
    "roundabout",
    "soccer ball field",
    "plane",
    "harbor",
)


class Setting(NamedTuple):
    """What was released for one task.

    Attributes:
        adapter_dim: inner width of the adapters.
        fft_layers: first block that splits frequencies and the one behind the last.
        cutoff: side of the low-pass box.
        classes: of the data.
    """

    adapter_dim: int
    fft_layers: tuple[int, int]
    cutoff: float
    classes: tuple[str, ...]


# da: unsupervised domain adaptation, dg: domain generalisation, ss: in-domain segmentation.
# p: Potsdam, v: Vaihingen (ISPRS); r: rural, u: urban (LoveDA).
RELEASED = {
    "da_p2v": Setting(64, (0, 3), 0.3, ISPRS),
    "da_v2p": Setting(32, (21, 24), 0.2, ISPRS),
    "da_r2u": Setting(16, (21, 24), 0.3, LOVEDA),
    "da_u2r": Setting(32, (18, 24), 0.2, LOVEDA),
    "dg_p2v": Setting(24, (18, 24), 0.3, ISPRS),
    "dg_v2p": Setting(64, (0, 6), 0.3, ISPRS),
    "dg_r2u": Setting(64, (0, 6), 0.3, LOVEDA),
    "dg_u2r": Setting(64, (21, 24), 0.3, LOVEDA),
    "ss_loveda": Setting(16, (0, 3), 0.2, LOVEDA),
    "ss_potsdam": Setting(32, (21, 24), 0.2, ISPRS),
    "ss_vaihingen": Setting(32, (18, 24), 0.3, ISPRS),
    "ss_isaid": Setting(64, (0, 6), 0.2, ISAID),
}
_LEAST = {"image_size": 1, "patch_size": 1, "width": 1, "depth": 1, "heads": 1, "num_registers": 0, "head_width": 1}
_LEAST |= {"adapter_dim": 1, "token_dim": 0, "queries": 1, "pixel_layers": 1, "query_layers": 1, "points": 1}


@dataclass(frozen=True, kw_only=True)
class EarthAdapterConfig:
    """Options of the family; the defaults are the released model on DINOv2-L for Potsdam to Vaihingen.

    Attributes:
        task: one of `RELEASED`, which sets `adapter_dim`, `fft_layers`, `cutoff` and `classes` where they are None; a
            model whose card gives them all takes a task only with `adapter_dim=None` and so on.
        image_size: side of the pictures that it is trained on and of the windows that larger pictures are cut into.
        patch_size, width, depth, heads, mlp_ratio, num_registers: of the backbone; width // 64 heads when None.
        layer_scale: initial value of the backbone's layer scales.
        base: file of the backbone's weights, in the layout of DINOv2, timm or transformers, or of a model of this
            family; other patch sizes and grids are resized. base_sha256: its checksum.
        adapters: "frequency" (spatial, low and high, as published), "spatial" (one plain adapter per block), "none".
        adapter_dim: d.
        fft_layers: blocks that split frequencies; the other adapters are plain.
        adapter_layers: blocks with adapters; None: all.
        cutoff: side of the low-pass box as a share of the shorter side of the grid.
        box: "half_open" as published, or "symmetric".
        scale: initial value of the learned factor of each adapter.
        token_dim: width of learned vectors per patch for the spatial adapters; they fix the size of pictures.
        zero_init: adapters change nothing at first.
        compact: False keeps the parts of plain adapters that released files hold and never run.
        out_layers: blocks whose patches are handed to the head, four of them; evenly spaced when None.
        head: "mask2former" as published; "light", a few convolutions; "classes", one label per picture.
        head_width: channels of the head.
        queries, pixel_layers, query_layers, points: of Mask2Former: queries, layers of its two transformers, points
            of a mask that its loss looks at.
        classes: names, in the order of the numbers in masks.
        colors: "#RRGGBB" of each class.
        adaptation_begin: steps on labelled pictures alone before a teacher labels those without and pictures are mixed;
            None trains on labelled ones only. 4,000 of 20,000 in the released setting.
        adaptation_weight: of the loss on mixed pictures.
        adaptation_threshold: weights that loss by the share of pixels that the teacher is at least so sure of; None, as
            released, counts all fully.
        stride: pixels between windows of larger pictures; two thirds of a window when None.
        image_mean, image_std: of colours in [0, 1].
    """

    task: str | None = None
    image_size: int = 512
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    heads: int | None = None
    mlp_ratio: float = 4.0
    num_registers: int = 0
    layer_scale: float | None = 1e-5
    base: str | None = None
    base_sha256: str | None = None
    adapters: Literal["frequency", "spatial", "none"] = "frequency"
    adapter_dim: int | None = None
    fft_layers: tuple[int, ...] | None = None
    adapter_layers: tuple[int, ...] | None = None
    cutoff: float | None = None
    box: Literal["half_open", "symmetric"] = "half_open"
    scale: float = 0.1
    token_dim: int = 0
    zero_init: bool = False
    compact: bool = True
    out_layers: tuple[int, ...] | None = None
    head: Literal["mask2former", "light", "classes"] = "mask2former"
    head_width: int = 256
    queries: int = 100
    pixel_layers: int = 6
    query_layers: int = 9
    points: int = 12544
    classes: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None
    adaptation_begin: int | None = None
    adaptation_weight: float = 0.5
    adaptation_threshold: float | None = None
    stride: int | None = None
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_types(self)
        if self.task is not None:
            check_choice("task", self.task, RELEASED)
        setting = RELEASED[self.task or "da_p2v"]
        adapted = range(self.depth) if self.adapter_layers is None else self.adapter_layers
        first, behind = setting.fft_layers
        split = tuple(layer for layer in range(first, behind) if layer < self.depth and layer in adapted)
        if self.task is not None:
            self._check_task({"adapter_dim": setting.adapter_dim, "fft_layers": split, "classes": setting.classes})
        if self.fft_layers is None:
            self._set("fft_layers", split)
        defaults = {"adapter_dim": setting.adapter_dim, "cutoff": setting.cutoff, "classes": setting.classes}
        defaults |= {"heads": max(1, self.width // 64), "out_layers": _evenly(self.depth)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                self._set(name, value)
        for name in ("fft_layers", "adapter_layers", "out_layers", "classes", "colors"):
            if getattr(self, name) is not None:
                self._set(name, tuple(getattr(self, name)))
        self._check()

    @property
    def window_stride(self) -> int:
        """Pixels between windows of larger pictures."""
        return self.stride or max(1, self.image_size * 2 // 3)

    def _check_task(self, setting: Mapping[str, Any]) -> None:
        """A task that changes nothing was not meant; a saved config, whose values are those of its task, stays."""
        given = {name: getattr(self, name) for name in setting}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        if all(value is not None and value != setting[name] for name, value in plain.items()):
            wrong = f"a task sets {', '.join(setting)} where they are None, and all of them are given"
            raise BadOverride(f"task={self.task!r}", wrong, ", ".join(f"{name}=None" for name in setting))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name, least in _LEAST.items():
            check_int(name, getattr(self, name), least)
        if self.stride is not None:
            check_int("stride", self.stride, 1, self.image_size)
        check_float("mlp_ratio", self.mlp_ratio, above=0)
        check_split(self.cutoff, self.box)
        check_float("adaptation_weight", self.adaptation_weight, low=0, usual=0.5)
        if self.adaptation_threshold is not None:
            check_float("adaptation_threshold", self.adaptation_threshold, low=0, high=1, usual=0.968)
        if self.adaptation_begin is not None:
            check_int("adaptation_begin", self.adaptation_begin, 0)
            if self.head == "classes":
                asked = f"adaptation_begin={self.adaptation_begin} with head=classes"
                raise BadOverride(asked, "a teacher labels pixels, and this head none", "adaptation_begin=null")
        for name in ("fft_layers", "adapter_layers", "out_layers"):
            for layer in getattr(self, name) or ():
                check_int(f"a layer of {name}", layer, 0, self.depth - 1)
        if self.adapters == "frequency" and self.adapter_layers is not None:
            check_split_layers(self.fft_layers or (), self.adapter_layers)
        if len(self.out_layers or ()) != 4:
            asked, wrong = f"out_layers={list(self.out_layers or ())}", "the head takes the patches of four blocks"
            raise BadOverride(asked, wrong, f"out_layers={list(_evenly(self.depth))}")
        if list(self.out_layers or ()) != sorted(set(self.out_layers or ())):
            asked, wrong = f"out_layers={list(self.out_layers or ())}", "blocks are named once, the first ones first"
            raise BadOverride(asked, wrong, f"out_layers={list(_evenly(self.depth))}")
        if self.width % (self.heads or 1):
            asked = f"heads={self.heads} in a backbone of width {self.width}"
            raise BadOverride(asked, "heads must share the width evenly", "heads=1")
        if self.image_size % self.patch_size:
            works = max(1, self.image_size // self.patch_size) * self.patch_size
            asked = f"image_size={self.image_size} with patch_size={self.patch_size}"
            raise BadOverride(asked, "patches must cover the picture", f"image_size={works}")
        if self.head == "mask2former" and self.head_width % 32:
            wrong = "Mask2Former norms its channels in 32 groups"
            raise BadOverride(f"head_width={self.head_width}", wrong, "head_width=256, or head=light")
        if not 1 <= len(self.classes or ()) <= 255:
            wrong = "masks have numbers from 0 to 254, and 255 is left out"
            raise BadOverride(f"{len(self.classes or ())} classes", wrong, "classes=[land, sea]")
        if len(set(self.classes or ())) < self.num_classes:
            raise BadOverride(f"classes={list(self.classes or ())}", "no two have the same name", "classes=[land, sea]")
        if self.colors is not None and len(self.colors) != self.num_classes:
            asked = f"{len(self.colors)} colors for {self.num_classes} classes"
            raise BadOverride(asked, "each class has one", "colors=null")
        for color in self.colors or ():
            if not re.fullmatch(r"#[0-9A-Fa-f]{6}", str(color)):
                raise BadOverride(f"the color {color!r}", "colors are written as #RRGGBB", "colors=null")
        for name, low in (("image_mean", 0.0), ("image_std", 1e-6)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, float | int) and low <= v < math.inf for v in values):
                wrong = f"{name} has a number of at least {low:g} for each of red, green and blue"
                raise BadOverride(f"{name}={list(values)}", wrong, f"{name}=[0.5,0.5,0.5]")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes or ())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a window."""
        side = self.image_size // self.patch_size
        return side, side


def _evenly(depth: int) -> tuple[int, ...]:
    """Four blocks of a backbone: of 24 the released ones, else evenly spaced up to the last.

    >>> _evenly(24), _evenly(12), _evenly(4)
    ((7, 11, 15, 23), (2, 5, 8, 11), (0, 1, 2, 3))
    """
    return (7, 11, 15, 23) if depth == 24 else tuple(max(0, depth * part // 4 - 1) for part in (1, 2, 3, 4))
