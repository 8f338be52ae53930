"""Options of the Gamma family; paper and method: `zoo.gamma.model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmoe.errors import BadOverride
from mmoe.options import check_choice, check_float, check_int
from zoo.gamma.losses import LOSSES
from zoo.hosts.clip import CLIPSizes, check_patches

SCENES: Mapping[str, str] = {
    "natural": "natural {}-quality image",
    "AI-generated": "AI-generated {}-quality image",
    "underwater": "underwater {}-quality image",
    "face": "face {}-quality image",
    "aesthetic": "natural {}-aesthetics image",
}
NAIVE: Mapping[str, str] = {"any": "{} image"}


@dataclass(frozen=True, kw_only=True)
class GammaConfig(CLIPSizes):
    """Options of the family beside the sizes of its CLIP; the defaults are the released model.

    Attributes:
        crop_size: side of the crops that are scored, in pixels; `image_size` when None.
        short_side: pictures whose short side is longer are made smaller first, in pixels; None scores them as they
            are, as the authors do with most data sets.
        num_experts: E beside the shared one; 0 is the dense CLIP with the same head.
        first_layer: blocks from this one on have experts, in both towers.
        router: registered router in place of the dense softmax over all experts.
        positions: how the image tower's table fits crops of another size: "grid" interpolates it in two dimensions,
            "reference" resamples the flattened table along its length, class row included, as the authors' code does,
            "none" adds no positions, which is another default of that code.
        prompts: "scene" has five prompts for each of `scenes`; "naive" has "bad image" to "perfect image" for all.
        scenes: pattern of the prompts by scene, with {} for the level.
        levels: words for the levels, worst first.
        level_values: initial scores of the levels, which are learned.
        crops: what `predict` scores: "five" (centre and corners), "random" (`num_crops` of them), or "centre".
        num_crops: random crops.
        crop_seed: of random crops; every picture has its own draw, the same in every call.
        loss: of training; see `zoo.gamma.losses`. "levels" and "emd" compare level probabilities, the others scores.
        caption_coef: weight of a second loss that lets pictures find their captions, for training a CLIP to host
            experts; 0 takes no captions.
    """

    least: ClassVar[Mapping[str, int]] = {
        **CLIPSizes.least,
        "crop_size": 1,
        "short_side": 1,
        "num_experts": 0,
        "num_crops": 1,
    }

    crop_size: int | None = None
    short_side: int | None = None
    num_experts: int = 3
    first_layer: int = 6
    router: str | Mapping[str, Any] | None = None
    positions: Literal["grid", "reference", "none"] = "grid"
    prompts: Literal["scene", "naive"] = "scene"
    scenes: Mapping[str, str] = field(default_factory=lambda: dict(SCENES))
    levels: tuple[str, ...] = ("bad", "poor", "fair", "good", "perfect")
    level_values: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    crops: Literal["five", "random", "centre"] = "five"
    num_crops: int = 10
    crop_seed: int = 0
    loss: str = "mse"
    caption_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("crop_seed", self.crop_seed, 0, 2**63 - 1)
        check_patches("crop_size", self.crop, self.patch_size)
        if self.num_experts:
            check_int("first_layer", self.first_layer, 0, min(self.vision_layers, self.text_layers) - 1)
        check_choice("loss", self.loss, LOSSES)
        check_float("caption_coef", self.caption_coef, low=0)
        if self.short_side is not None and self.short_side < self.crop:
            wrong = f"a crop of {self.crop} pixels has to fit"
            raise BadOverride(f"short_side={self.short_side}", wrong, f"short_side={2 * self.crop}")
        self._check_words()

    def _check_words(self) -> None:
        if len(self.levels) < 2 or len(set(self.levels)) < len(self.levels):
            wrong = "there are two levels at least, and no two are the same"
            raise BadOverride(f"levels={list(self.levels)}", wrong, "levels=['bad','good']")
        if len(self.level_values) != len(self.levels):
            wrong = f"there are {len(self.levels)} levels"
            raise BadOverride(f"level_values={list(self.level_values)}", wrong, "a value for each level, rising")
        for value in self.level_values:
            check_float("level_values", value)
        if list(self.level_values) != sorted(set(self.level_values)):
            wrong = "they rise from the worst level to the best"
            raise BadOverride(f"level_values={list(self.level_values)}", wrong, "level_values=[0.2,0.4,0.6,0.8,1.0]")
        odd = [name for name, pattern in self.scenes.items() if name == "auto" or "{}" not in str(pattern)]
        if odd or not self.scenes:
            wrong = f"{odd[0]!r} has no place {{}} for the level" if odd and odd[0] != "auto" else "name one, not auto"
            raise BadOverride(f"scenes={dict(self.scenes)}", wrong, "scenes={natural: 'natural {}-quality image'}")

    @property
    def crop(self) -> int:
        """Side of a crop in pixels."""
        return self.image_size if self.crop_size is None else self.crop_size

    @property
    def patterns(self) -> dict[str, str]:
        """Pattern of the prompts by scene, of the chosen set.

        >>> GammaConfig(prompts="naive").patterns
        {'any': '{} image'}
        """
        return dict(self.scenes if self.prompts == "scene" else NAIVE)

    def prompt_texts(self) -> list[str]:
        """All prompts, scene by scene, worst level first.

        >>> GammaConfig().prompt_texts()[4:6]
        ['natural perfect-quality image', 'AI-generated bad-quality image']
        """
        return [pattern.replace("{}", level) for pattern in self.patterns.values() for level in self.levels]
