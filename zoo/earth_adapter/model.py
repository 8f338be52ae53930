"""Earth-Adapter: segments pictures of the earth with a frozen vision transformer, frequency adapters and a decoder.

Paper: Hu et al., "Earth-Adapter: Bridge the Geospatial Domain Gaps with Mixture of Frequency Adaptation", arXiv
2504.06220. Authors' code: github.com/VisionXLab/Earth-Adapter (GPL-3); written from the paper.

    after block l:  F' = F + s_l (w_0 A_0(F) + w_1 A_1(F_low) + w_2 A_2(F_high)),  w = softmax(R_l F)   in some blocks
                    F' = F + s_l A_0(F)                                                                 in the others

The host is timm's vision transformer, the adapters are those of `mmoe.surgery.add_frequency_adapters`, the decoder is
transformers' Mask2Former or a few convolutions. Where we differ: any size of backbone and picture; parts that are
never run are left out (`compact`); the learned scales have no weight decay; large pictures are cut into windows.
Shapes: B pictures, H and W pixels, P prefix tokens, N patches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmoe.errors import BadInput, Refused
from mmoe.options import check_bool, check_int
from mmoe.surgery import add_frequency_adapters
from zoo.config import make_config
from zoo.earth_adapter.adaptation import Adaptation
from zoo.earth_adapter.backbone import DinoViT, backbone_state
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.earth_adapter.heads import HEADS, IGNORED
from zoo.earth_adapter.result import Segmentation, Segmentations, class_colors
from zoo.images import read_image
from zoo.model import Model
from zoo.samples import check_samples, misfit
from zoo.state import State
from zoo.views import TokenView

_PREDICT = "model.predict('tile.png')"
_PARTS = ("cls_token", "reg_token", "pos_embed", "patch_embed.*", "norm.*")
_BLOCK_PARTS = ("norm?.*", "attn.*", "ls?.*", "mlp.*")


@dataclass(kw_only=True)
class EarthOutput:
    """What `EarthAdapter.forward` returns.

    Attributes:
        scores: (B, C, H, W) of classes per pixel, or logits (B, C) of the head "classes"; None where a loss of pixels
            was asked for.
        loss: scalar, or None without labels.
        losses: parts of the loss, as they are added up.
    """

    scores: Tensor | None = None
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class EarthAdapter(Model):
    """Segments pictures; with the head "classes" it tells what a picture shows, to train a backbone.

    Args:
        config: options.

    Attributes:
        backbone: timm's vision transformer, frozen unless the head is "classes".
        head: the decoder.

    Example:
        >>> sizes = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "head_width": 8}
        >>> model = EarthAdapter(EarthAdapterConfig(**sizes, head="light", classes=("land", "sea"))).eval()
        >>> model.predict(np.zeros((40, 56, 3), dtype=np.uint8)).mask.shape
        torch.Size([40, 56])
    """

    family = "earth_adapter"
    windows = True
    views_note = "experts are drawn as in one pass over the whole picture; the result is made of windows"
    config_class = EarthAdapterConfig
    base_tensors = MappingProxyType(
        {"backbone": (*(f"backbone.{p}" for p in _PARTS), *(f"backbone.blocks.*.{p}" for p in _BLOCK_PARTS))}
    )

    def __init__(self, config: EarthAdapterConfig) -> None:
        super().__init__(config)
        self.backbone = DinoViT(config)
        self.adapters = ("head.*",)
        if config.head != "classes" or config.adapters != "none":
            self.backbone.requires_grad_(False)
        if config.adapters != "none":
            self.adapters = ("*.frequency_adapter.adapter.*", "*.frequency_adapter.scale", "head.*")
            add_frequency_adapters(
                self.backbone,
                config.adapter_dim or 1,
                fft_layers=(config.fft_layers or ()) if config.adapters == "frequency" else (),
                adapter_layers=config.adapter_layers,
                cutoff=config.cutoff or 0.0,
                box=config.box,
                scale=config.scale,
                token_dim=config.token_dim,
                token_grid=config.grid if config.token_dim else None,
                zero_init=config.zero_init,
                compact=config.compact,
                inplace=True,
            )
        self.head = HEADS[config.head](config)
        self._adaptation: Adaptation | None = None
        self.preprocessing = {
            "image_size": config.image_size,
            "stride": config.window_stride,
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "background": [0, 0, 0],
            "classes": list(config.classes or ()),
            "colors": list(config.colors or class_colors(config.num_classes)),
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything that turns pictures into tensors and masks into pictures, as plain data."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, values: dict[str, Any]) -> None:
        told = {key: values[key] for key in ("image_size", "stride", "classes", "colors")}
        told |= {"image_mean": values["mean"], "image_std": values["std"]}
        make_config(EarthAdapterConfig, {**vars(self.config), **told}, self.family)
        if len(values["classes"]) != self.config.num_classes:
            raise ValueError(f"it has {len(values['classes'])} classes, the model {self.config.num_classes}")
        self._preprocessing = values

    def from_base(self, state: State, part: str) -> State:
        """A backbone's tensors, resized to this model's patches and grid where they have to be."""
        return {f"backbone.{name}": value for name, value in backbone_state(state, self.config).items()}

    # ---- pictures to tensors ----

    def preprocess(self, images: Any, texts: None = None) -> dict[str, Tensor]:
        """Pictures as one batch, each as a whole: made smaller to fit into a window, its sides to whole patches.

        Args:
            images: one picture or a list: paths, PIL images or arrays. Several of different shapes become squares.
            texts: there are none; for callers that give both.

        Returns:
            "image" (B, 3, H, W) in the model's dtype on its device.
        """
        pictures = [self._read(image) for image in _listed(images)]
        sizes = {self._whole(picture.size) for picture in pictures}
        side = self._preprocessing["image_size"]
        size = sizes.pop() if len(sizes) == 1 else (side, side)
        return {"image": torch.stack([self._pixels(picture.resize(size)) for picture in pictures])}

    def seen(self, picture: Any) -> Image.Image:
        """All of it."""
        return self._read(picture)

    def _read(self, image: Any) -> Image.Image:
        return read_image(image, self._background)

    @property
    def _background(self) -> tuple[int, int, int]:
        red, green, blue = self._preprocessing["background"]
        return red, green, blue

    def _whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height in whole patches, the longer side as long as a window."""
        patch, side = self.config.patch_size, self._preprocessing["image_size"]
        width, height = (max(1, round(one * side / max(size) / patch)) * patch for one in size)
        return width, height

    def _pixels(self, picture: Image.Image | np.ndarray) -> Tensor:
        """Colours of 0 to 255 -> (3, H, W), normed."""
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.input_device, torch.float32) / 255
        mean, std = (torch.tensor(self._preprocessing[key], device=values.device) for key in ("mean", "std"))
        return ((values - mean[:, None, None]) / std[:, None, None]).to(self.dtype)

    def training_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with "image" and "mask" (class numbers, 255 left out), or "label" for the head "classes".

        With adaptation each has a "target" too, a picture without labels. Pictures of another size than a window are
        resized by their shorter side and cut around the middle.

        Raises:
            Refused: the samples have no such labels. BadInput: there are none, or a mask has another size, numbers that
                are not whole or unknown classes.
        """
        wanted = "label" if self.config.head == "classes" else "mask"
        check_samples(samples, ("image", wanted), self.family, "data.name=segmentation")
        adapts = self.config.adaptation_begin is not None
        if adapts:
            fix = "data.options.unlabelled=target, or model.overrides.adaptation_begin=null"
            check_samples(samples, ("target",), self.family, fix)
        pictures = [self._read(sample["image"]) for sample in samples]
        image = self._middles(pictures)
        if wanted == "label":
            labels = [self._label(_whole("label", sample["label"])) for sample in samples]
            return {"image": image, "label": torch.tensor(labels, device=self.input_device)}
        pairs = zip(pictures, samples, strict=True)
        masks = [self._mask(_whole("mask", sample["mask"]), picture) for picture, sample in pairs]
        batch = {"image": image, "mask": torch.stack(masks).to(self.input_device)}
        return {**batch, "target": self._middles([self._read(one["target"]) for one in samples])} if adapts else batch

    def _middles(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The middle of each picture as a window, (B, 3, S, S)."""
        side = self._preprocessing["image_size"]
        return torch.stack([self._pixels(_square(one, side, Image.Resampling.BILINEAR)) for one in pictures])

    def _mask(self, mask: np.ndarray, picture: Image.Image) -> Tensor:
        if mask.shape != (picture.height, picture.width):
            wrong = f"its picture has {picture.height} x {picture.width} pixels"
            raise BadInput(f"train on a mask of {mask.shape}", wrong, "a mask of the size of its picture")
        self._known(int(np.where(mask == IGNORED, 0, mask).max()))
        self._known(int(mask.min()))
        small = _square(Image.fromarray(mask.astype(np.uint8)), self._preprocessing["image_size"])
        return torch.from_numpy(np.array(small)).long()

    def _label(self, label: np.ndarray) -> int:
        if label.ndim:
            raise BadInput(f"train on a label of {label.shape}", "it is one number", "label=0")
        return self._known(int(label))

    def _known(self, number: int) -> int:
        if not (0 <= number < self.config.num_classes or number == IGNORED):
            wrong = f"the model has {self.config.num_classes} classes, from 0"
            raise BadInput(f"train on class {number}", wrong, "model.overrides.classes=[...] with a name for each")
        return number

    # ---- the network ----

    def maps(self, image: Tensor) -> list[Tensor]:
        """Pixels (B, 3, H, W) -> patches behind four blocks, (B, D, rows, columns) each.

        Raises:
            BadInput: the sides are not whole patches.
        """
        self._check_sides(image)
        taken = list(self.config.out_layers or ())
        return self.backbone.forward_intermediates(image, indices=taken, norm=False, intermediates_only=True)

    def _check_sides(self, image: Tensor) -> None:
        patch, (height, width) = self.config.patch_size, image.shape[-2:]
        if height % patch or width % patch or not height * width:
            wrong = f"the sides are whole patches of {patch} pixels"
            raise BadInput(f"run on {height} x {width} pixels", wrong, "model.preprocess('tile.png')")

    def forward(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        label: Tensor | None = None,
        target: Tensor | None = None,
    ) -> EarthOutput:
        """Scores of classes, or the training loss where there are labels.

        Args:
            image: (B, 3, H, W) pixels, sides in whole patches.
            mask: (B, H, W) class numbers, int64; 255 is left out. `training_batch` checks the numbers, this does not.
            label: (B,) class numbers, int64, for the head "classes".
            target: (B, 3, H, W) pixels without labels, to adapt to.

        Raises:
            BadInput: their shapes do not fit, or the head has no use for such labels.
        """
        self._check_labels(image, mask, label, target)
        if target is not None and mask is not None:
            self._adaptation = self._adaptation or self._adapting()
            return self._adaptation.loss({"image": image, "mask": mask}, target)
        if self.config.head == "classes":
            self._check_sides(image)
            logits = self.head(self.backbone.forward_features(image), self.backbone.num_prefix_tokens)
            if label is None:
                return EarthOutput(scores=logits)
            losses = {"cross_entropy": F.cross_entropy(logits.float(), label, ignore_index=IGNORED)}
            return EarthOutput(scores=logits, loss=losses["cross_entropy"], losses=losses)
        maps = self.maps(image)
        if mask is None:
            return EarthOutput(scores=self.head.scores(maps, (image.shape[-2], image.shape[-1])))
        losses = self.head.loss(maps, mask)
        return EarthOutput(loss=torch.stack(list(losses.values())).sum(), losses=losses)

    def _check_labels(self, image: Tensor, mask: Tensor | None, label: Tensor | None, target: Tensor | None) -> None:
        head, wrong = self.config.head, None
        if image.ndim != 4 or image.shape[1] != 3 or not len(image):
            wrong = f"pictures of the shape {tuple(image.shape)} are not (B, 3, H, W), at least one"
        elif (mask if head == "classes" else label) is not None:
            wrong = f"the head {head!r} has no use for a {'mask' if head == 'classes' else 'label'}"
        elif told := misfit("mask", mask, (len(image), *image.shape[2:])) or misfit("label", label, (len(image),)):
            wrong = told
        elif target is not None and (mask is None or self.config.adaptation_begin is None):
            wrong = "a target needs masks, and a model with adaptation_begin"
        if wrong is not None:
            raise BadInput(f"run {self.family} on a batch", wrong, "model(**model.training_batch(samples))")

    def _adapting(self) -> Adaptation:
        told = self.config
        weight, threshold = told.adaptation_weight, told.adaptation_threshold
        return Adaptation(self, begin=told.adaptation_begin or 0, weight=weight, threshold=threshold)

    def after_step(self, step: int) -> None:
        """Lets the teacher follow."""
        if self._adaptation is not None:
            self._adaptation.after_step(step)

    def training_state(self) -> dict[str, Tensor]:
        """The teacher and the number of steps, where pictures without labels are adapted to."""
        return {} if self._adaptation is None else self._adaptation.state_dict()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with that teacher, or makes one of the model as it is."""
        self._adaptation = None if self.config.adaptation_begin is None else self._adapting()
        if self._adaptation is not None and state:
            self._adaptation.load_state_dict(state)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of the backbone's blocks again in backward instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    # ---- plain inputs to plain results ----

    @overload
    def predict(
        self, image: list[Any] | tuple[Any, ...], texts: None = None, *, all_probs: bool = False, batch_size: int = 4
    ) -> Segmentations: ...
    @overload
    def predict(
        self, image: Any, texts: None = None, *, all_probs: bool = False, batch_size: int = 4
    ) -> Segmentation: ...
    @torch.no_grad()
    def predict(
        self, image: Any, texts: None = None, *, all_probs: bool = False, batch_size: int = 4
    ) -> Segmentation | Segmentations:
        """The class of every pixel of a picture, or of each of several.

        A picture larger than a window is cut into windows that overlap (512 pixels every 341 in the released setting),
        whose scores are averaged; a smaller one is seen as it is, its edge repeated to whole patches.

        Args:
            image: path, PIL image or array, or a list of some.
            texts: None; other models of the zoo have some.
            all_probs: keeps the probabilities of all classes.
            batch_size: windows that are computed together.

        Raises:
            BadInput: it is no picture, or one of more than 50 megapixels, or there are texts.
        """
        if texts is not None:
            raise BadInput("segment by texts", f"{self.family} knows its classes alone", "model.predict('tile.png')")
        self.check_values("predict with")
        check_int("batch_size", batch_size, 1)
        check_bool("all_probs", all_probs)
        if self.config.head == "classes":
            raise Refused(
                "segment a picture", "the head 'classes' tells one label per picture", "model(**batch).scores"
            )
        if isinstance(image, (list, tuple)):
            return Segmentations(pictures=tuple(self._segment(one, all_probs, batch_size) for one in _listed(image)))
        return self._segment(image, all_probs, batch_size)

    def _segment(self, image: Any, all_probs: bool, batch_size: int) -> Segmentation:
        picture = np.asarray(self._read(image))
        height, width = picture.shape[:2]
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for scores in self._bands(picture, batch_size):
            probs = scores / scores.sum(0).clamp(min=torch.finfo(scores.dtype).tiny)  # (C, rows, W)
            confidence, mask = probs.max(0)
            found.append((mask.to(torch.uint8), confidence, probs if all_probs else None))
        masks, confidences, probs_ = zip(*found, strict=True)
        return Segmentation(
            mask=torch.cat(masks)[:height, :width],
            confidence=torch.cat(confidences)[:height, :width],
            classes=tuple(self._preprocessing["classes"]),
            colors=tuple(self._preprocessing["colors"]),
            probs=torch.cat(probs_, dim=1)[:, :height, :width] if all_probs else None,
            background=self._background,
        )

    def _bands(self, picture: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """Scores (C, rows, W) of a picture from top to bottom, rows when all windows over them are done."""
        side, stride, patch = self._preprocessing["image_size"], self._preprocessing["stride"], self.config.patch_size
        tall, wide = (min(side, -(-one // patch) * patch) for one in picture.shape[:2])
        more = [(0, max(0, window - have)) for window, have in zip((tall, wide), picture.shape[:2], strict=True)]
        picture = np.pad(picture, (*more, (0, 0)), mode="edge")
        tops, lefts = (window_starts(*sizes, stride) for sizes in zip(picture.shape[:2], (tall, wide), strict=True))
        columns = torch.zeros(picture.shape[1])
        for left in lefts:
            columns[left : left + wide] += 1
        carry, rows = torch.zeros(self.config.num_classes, 0, picture.shape[1]), torch.zeros(0)
        windows = self._window_scores(picture, list(product(tops, lefts)), (tall, wide), batch_size)
        for top, below in zip(tops, [*tops[1:], picture.shape[0]], strict=True):
            carry, rows = F.pad(carry, (0, 0, 0, tall - carry.shape[1])), F.pad(rows, (0, tall - len(rows))) + 1
            for left in lefts:
                carry[:, :, left : left + wide] += next(windows)
            done = below - top
            yield carry[:, :done] / (rows[:done, None] * columns)
            carry, rows = carry[:, done:], rows[done:]

    def _window_scores(
        self, picture: np.ndarray, corners: list[tuple[int, int]], size: tuple[int, int], batch_size: int
    ) -> Iterator[Tensor]:
        """Scores (C, *size) of each window, computed when they are wanted, some at a time."""
        for first in range(0, len(corners), batch_size):
            some = corners[first : first + batch_size]
            windows = [picture[top : top + size[0], left : left + size[1]] for top, left in some]
            yield from self._scores(torch.stack([self._pixels(window) for window in windows]))

    def _scores(self, image: Tensor) -> Tensor:
        scores = self(image).scores
        assert scores is not None
        if not scores.isfinite().all():
            wrong = "the model computes NaN or infinity; its weights may hold some"
            raise BadInput("no classes come out", wrong, "other weights, or dtype='fp32'")
        return scores.float().cpu()

    def views(self, batch: Mapping[str, Tensor]) -> list[TokenView]:
        """How the rows of routings map to patches: routers see the patches alone."""
        height, width = batch["image"].shape[-2:]
        grid = height // self.config.patch_size, width // self.config.patch_size
        return [TokenView(layers="backbone.blocks.*", modality="image", grid=grid)]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last one ends at the edge.

    >>> window_starts(1000, 512, 341), window_starts(512, 512, 341)
    ([0, 341, 488], [0])
    """
    count = max(0, -(-(length - window) // stride)) + 1
    return [min(number * stride, length - window) for number in range(count)]


def _listed(images: Any) -> Sequence[Any]:
    """Pictures as a list, one or several."""
    many = images if isinstance(images, (list, tuple)) else [images]
    if not many:
        raise BadInput("cannot prepare an empty list of pictures", "the list is empty", _PREDICT)
    return many


def _whole(name: str, labels: Any) -> np.ndarray:
    """Class numbers as an array."""
    found = np.asarray(labels)
    if found.dtype.kind not in "uib":
        raise BadInput(f"train on a {name} of {found.dtype}", "numbers of classes are whole", f"{name}.astype('uint8')")
    return found


def _square(picture: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """The middle of a picture, its shorter side resized to `side`."""
    if picture.size == (side, side):
        return picture
    factor = side / min(picture.size)
    width, height = (max(side, round(one * factor)) for one in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), resample).crop((left, top, left + side, top + side))
