"""Gamma: image quality and aesthetics from the words that fit a picture, with experts beside a frozen CLIP's blocks.

Paper: Zhou et al., "Gamma: Toward Generic Image Assessment with Mixture of Assessment Experts", arXiv 2503.06678, 2025.
Authors' code: github.com/zht8506/Gamma (CC BY-NC-SA 4.0 and S-Lab licence); written from the formulas in
`zoo.gamma.host`. A score is the mean of five learned values under the softmax over five prompts, "natural bad-quality
image" to "natural perfect-quality image", with other prompts for each scene. Experts, routers, scales, the adapter and
the level values are trained; CLIP is frozen. At the start all scales are 0 and only they, the adapter and the values
move: experts follow slowly.

Where we differ: five fixed crops by default, in place of ten random ones without a seed; pictures smaller than a crop
are scaled up; each distinct scene is encoded once per batch and each picture gets its own scene's prompts, also in
batches of mixed scenes, where the released evaluation takes the wrong ones; and a scene can be chosen automatically:

    auto   the scene with the largest max_k mean_v cos(f'_v, t_k): the one that has the single best fitting prompt, its
           cosines averaged over the crops v. This is ours; the authors take the scene from the name of the data set.

Shapes: B pictures, V crops of each, S scenes, K levels, N tokens, C embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as pictures

from mmoe.dispatch import is_sharded
from mmoe.errors import BadInput, BadOverride, Refused, UnknownName, did_you_mean
from mmoe.moe import moe_layers
from mmoe.options import check_int
from zoo.config import make_config
from zoo.gamma.config import GammaConfig
from zoo.gamma.crops import Offsets, cut_picture, enlarge, five_offsets, random_offsets, shrink
from zoo.gamma.host import OWN_ROUTER, Adapter, AnySizeCLIP, add_experts, check_size, level_logits
from zoo.gamma.losses import captions, loss_of
from zoo.hosts.clip import check_colour, check_pictures, make_tokenizer, text_tokens
from zoo.images import read_image
from zoo.model import Model
from zoo.samples import check_samples, misfit
from zoo.table import most_probable
from zoo.views import TokenView

AUTO = -1  # in place of a scene's number
_PREDICT = "model.predict('photo.jpg')"
_AT_ONCE = 8  # pictures in one forward of `predict`
_Mark = list[tuple[int, int, Tensor]]


@dataclass(kw_only=True)
class GammaOutput:
    """What `Gamma.forward` returns.

    Attributes:
        score: (B,), the mean over the crops.
        probs: (B, K) of the levels, the mean over the crops.
        logits: (B, V, K) of the levels, in fp32 as scores and probabilities are.
        scene: (B,) numbers of the scenes that were used.
        image_features: (B, V, C) before the adapter, not normalised.
        adapted: (B, V, C) behind it, not normalised.
        text_features: (B, K, C) of each picture's scene, normalised.
        loss: scalar, or None when there is no label.
        losses: the unweighted parts of the loss by name.
    """

    score: Tensor
    probs: Tensor
    logits: Tensor
    scene: Tensor
    image_features: Tensor
    adapted: Tensor
    text_features: Tensor
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Scores of pictures.

    Attributes:
        scores: one per picture; higher is better, 0 to 1 as labels are (the learned levels may reach a little beyond).
        labels: words of the levels, worst first.
        probs: (pictures, levels), rows sum to 1.
        scenes: scene whose prompts were used for each picture.
        upscaled: True for pictures that were smaller than a crop and were scaled up.
    """

    scores: tuple[float, ...]
    labels: tuple[str, ...]
    probs: Tensor
    scenes: tuple[str, ...]
    upscaled: tuple[bool, ...]

    def __float__(self) -> float:
        if len(self.scores) != 1:
            raise BadInput(f"no single score of {len(self.scores)} pictures", "there are several", "result.scores")
        return self.scores[0]

    def top(self, k: int = 5, picture: int = 0) -> list[tuple[str, float]]:
        """The k most probable levels of one picture."""
        return most_probable(self.labels, self.probs, k, picture)

    def table(self, picture: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and rows that show one picture's score and levels."""
        check_int("picture", picture, 0, len(self.scores) - 1)
        scene = self.scenes[picture] + (", scaled up" if self.upscaled[picture] else "")
        levels = zip(self.labels, self.probs[picture].tolist(), strict=True)
        return ["", ""], [
            ["score", f"{self.scores[picture]:.3f}", scene],
            *([label, f"{probability:.1%}", ""] for label, probability in levels),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "scores": list(self.scores),
            "labels": list(self.labels),
            "probs": self.probs.tolist(),
            "scenes": list(self.scenes),
            "upscaled": list(self.upscaled),
        }


class Gamma(Model):
    """A CLIP with experts that scores pictures.

    Args:
        config: options; `num_experts=0` builds the dense CLIP with the same head.

    Attributes:
        clip: the host, an `open_clip.model.CLIP`.
        adapter: on the image features.
        level_values: (K,) scores of the levels.

    Example:
        >>> sizes = {"vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 2, "vocab_size": 600}
        >>> model = Gamma(GammaConfig(**sizes, image_size=32, first_layer=1)).eval()
        >>> result = model.predict(Image.new("RGB", (40, 48)), scene="natural")
        >>> len(result.scores), result.scenes, result.upscaled
        (1, ('natural',), (False,))
    """

    family = "gamma"
    config_class = GammaConfig
    own_parts = MappingProxyType({"router": OWN_ROUTER})
    layer_methods = ("encode_image", "encode_text")

    def __init__(self, config: GammaConfig) -> None:
        super().__init__(config)
        self.clip = AnySizeCLIP(config)
        self.adapter = Adapter(config.embed_dim)
        self.level_values = nn.Parameter(torch.tensor(config.level_values))
        if config.num_experts:
            add_experts(self.clip, config)
        self.preprocessing = {
            "image_size": config.crop,
            "short_side": config.short_side,
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "background": [255, 255, 255],
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
        }

    @property
    def adapters(self) -> tuple[str, ...]:  # type: ignore[override]  # a dense one has no experts to train
        """Patterns of what is trained while CLIP is frozen."""
        parts = ("router", "experts", "post") if self.config.num_experts else ()
        return (*(f"clip.*.mlp.{part}.*" for part in parts), "adapter.*", "level_values")

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything that turns pictures and prompts into tensors, as plain data."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, values: dict[str, Any]) -> None:
        told = {"image_mean": values["mean"], "image_std": values["std"], "short_side": values["short_side"]}
        make_config(GammaConfig, {**vars(self.config), **told}, self.family)
        own = {"image_size": self.config.crop, **{n: getattr(self.config, n) for n in ("vocab_size", "context_length")}}
        for key, value in own.items():
            if values[key] != value:
                raise ValueError(f"{key} is {values[key]}, the model has {value}")
        check_colour(values["background"])
        self._preprocessing = values
        self._tokenizer: SimpleTokenizer | None = None
        self._prompts: Tensor | None = None
        self._texts: tuple[_Mark, dict[int, Tensor]] = [], {}

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """Texts to ids (B, context_length), made on first use."""
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(self._preprocessing["vocab_size"], self._preprocessing["context_length"])
        return self._tokenizer

    @property
    def scenes(self) -> tuple[str, ...]:
        """Names of the scenes that have prompts."""
        return tuple(self.config.patterns)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a crop, rows and columns."""
        side = self.config.crop // self.config.patch_size
        return side, side

    def scene_ids(self, scene: str | Sequence[str], count: int) -> Tensor:
        """Numbers of scenes, (count,), on the model's device; "auto" is `AUTO`.

        A model with naive prompts has one set for every scene, whatever its name.

        Raises:
            UnknownName: there is no such scene. BadInput: there are more or fewer than pictures.
        """
        scene = scene.tolist() if isinstance(scene, np.ndarray) else scene
        many = isinstance(scene, Sequence) and not isinstance(scene, str)
        names = list(scene) if many else [str(scene)] * count
        if self.config.prompts == "naive":
            names = ["auto"] * len(names)
        if len(names) != count:
            wrong = f"each picture has one; pictures: {count}, scenes: {len(names)}"
            raise BadInput(f"score with the scenes {names}", wrong, "scene='auto'")
        known = {"auto": AUTO, **{name: number for number, name in enumerate(self.scenes)}}
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise UnknownName(f"no scene {name!r}", did_you_mean(str(name), known), f"scene={self.scenes[0]!r}")
        return torch.tensor([known[name] for name in names], device=self.input_device)

    def preprocess(self, image: Any, scene: str | Sequence[str] = "auto") -> dict[str, Tensor]:
        """Pictures to a batch on the model's device.

        Args:
            image: one picture or a list: paths, PIL images or arrays.
            scene: name of one for all, or of one for each; "auto" leaves the choice to the model.

        Returns:
            "image" (B, V, 3, S, S), the crops of each picture in the model's dtype, and "scene" (B,).
        """
        read, _ = self._read(image)
        crops = torch.stack([self._crops(picture) for picture in read])
        return {"image": crops, "scene": self.scene_ids(scene, len(read))}

    def _read(self, image: Any) -> tuple[list[Image.Image], list[bool]]:
        """Pictures as large as crops are cut from, at least as large as one, and which were scaled up for that."""
        background, longest = tuple(self._preprocessing["background"]), self._preprocessing["short_side"]
        read = [read_image(one, background) for one in check_pictures(image, _PREDICT)]
        read = read if longest is None else [shrink(picture, longest) for picture in read]
        pairs = [enlarge(picture, self.config.crop) for picture in read]
        return [picture for picture, _ in pairs], [upscaled for _, upscaled in pairs]

    @property
    def views_note(self) -> str:  # type: ignore[override]  # it depends on the config
        """Which of the crops is drawn."""
        where = {"five": "the one in the middle", "random": "a random one"}.get(self.config.crops)
        return f"the overlay shows the first of the crops that are scored, {where}" if where else ""

    def seen(self, picture: Any) -> Image.Image:
        """The first crop, which is that in the middle unless crops are random."""
        (read,), _ = self._read(picture)
        return cut_picture(read, self._offsets(read.height, read.width)[:1], self.config.crop)[0]

    def _crops(self, picture: Image.Image) -> Tensor:
        return self._pixels(cut_picture(picture, self._offsets(*picture.size[::-1]), self.config.crop))

    def _offsets(self, height: int, width: int) -> Offsets:
        """Where the crops of a picture lie."""
        config = self.config
        if config.crops == "random":
            draw = torch.Generator().manual_seed(config.crop_seed)
            return random_offsets(height, width, config.crop, config.num_crops, draw)
        offsets = five_offsets(height, width, config.crop)
        return offsets if config.crops == "five" else offsets[:1]

    def _pixels(self, crops: Sequence[Image.Image]) -> Tensor:
        """Crops of one size -> (V, 3, S, S) as the model takes them."""
        pixels = torch.stack([pictures.to_tensor(crop) for crop in crops])
        told = self._preprocessing
        return pictures.normalize(pixels, told["mean"], told["std"]).to(self.input_device, self.dtype)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, C) before the adapter."""
        check_size(image, self.config.patch_size)
        return self.clip.encode_image(image, normalize=normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N) -> features (B, C)."""
        return self.clip.encode_text(text, normalize=normalize)

    def prompt_ids(self, scenes: Sequence[int]) -> Tensor:
        """Token ids of the prompts of some scenes, (S * K, N).

        Raises:
            BadOverride: a prompt has more tokens than the model reads, or two levels of a scene have the same.
        """
        if self._prompts is None:
            self._prompts = self._read_prompts()
        return self._prompts[list(scenes)].flatten(0, 1).to(self.device)

    def _read_prompts(self) -> Tensor:
        """Token ids of all prompts, (scenes, K, N), in main memory."""
        most, texts = self.config.context_length, self.config.prompt_texts()
        asked, fix = f"scenes={dict(self.config.patterns)}", "scenes={natural: 'natural {}-quality image'}"
        ids = self.tokenizer(texts)
        for text, row in zip(texts, ids, strict=True):
            if row[-1] and (count := len(self.tokenizer.encode(text)) + 2) > most:
                wrong = f"the prompt {text!r} has {count} tokens, with those of begin and end; the model reads {most}"
                raise BadOverride(asked, wrong, fix)
        ids = ids.unflatten(0, (-1, len(self.config.levels)))
        for scene, own in zip(self.scenes, ids, strict=True):
            if len(own.unique(dim=0)) < len(own):
                wrong = f"levels {list(self.config.levels)} of {scene!r} have the same tokens; case makes no difference"
                raise BadOverride(asked, wrong, "levels=['bad','good']")
        return ids

    def scene_features(self, scenes: Sequence[int]) -> Tensor:
        """Normalised features of the prompts of some scenes, (S, K, C).

        In eval mode without gradients they are kept until a parameter of the text tower changes. Inside `mmoe.trace`,
        `mmoe.override` and `mmoe.with_context` they are computed anew, and not kept.
        """
        if not self._may_keep():
            return self._encode_scenes(scenes)
        mark = _fingerprint(p for name, p in self.clip.named_parameters() if not name.startswith("visual."))
        if not _same(self._texts[0], mark):
            self._texts = mark, {}
        kept = self._texts[1]
        missing = [scene for scene in scenes if scene not in kept]
        if missing:
            kept |= zip(missing, self._encode_scenes(missing), strict=True)
        return torch.stack([kept[scene] for scene in scenes])

    def _encode_scenes(self, scenes: Sequence[int]) -> Tensor:
        return self.encode_text(self.prompt_ids(scenes), normalize=True).unflatten(0, (len(scenes), -1))

    def _may_keep(self) -> bool:
        device = self.device.type
        plain = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        plain = plain and device != "meta" and not torch.is_autocast_enabled(device)
        observed = any(layer.observed for layer in moe_layers(self.clip.transformer).values())
        return plain and not observed and not any(map(is_sharded, self.clip.parameters()))

    def forward(
        self,
        image: Tensor,
        scene: Tensor | None = None,
        score: Tensor | None = None,
        text: Tensor | None = None,
    ) -> GammaOutput:
        """Scores of pictures, and the training loss where there are labels.

        Args:
            image: (B, 3, S, S) pixels, or (B, V, 3, S, S) with several crops of each picture, whose scores are
                averaged.
            scene: (B,) numbers of scenes, `AUTO` where the model chooses; it chooses all when None.
            score: (B,) labels in [0, 1], higher is better; each crop is compared with that of its picture.
            text: (B, N) token ids of captions; with labels, `caption_coef` times the loss of captions is added.

        Raises:
            BadInput: their shapes do not fit.
        """
        self._check_batch(image, scene, score, text)
        crops = image if image.ndim == 5 else image[:, None]
        features = self.encode_image(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])  # (B, V, C)
        adapted = self.adapter(features)
        scene = torch.full((len(image),), AUTO, device=image.device) if scene is None else scene
        scene, texts = self._own_scene(adapted, scene)  # (B, K, C)
        logits = level_logits(adapted, texts, self.clip.logit_scale)
        probs = logits.softmax(-1)
        scores = (probs * self.level_values).sum(-1)  # (B, V)
        output = GammaOutput(
            score=scores.mean(1),
            probs=probs.mean(1),
            logits=logits,
            scene=scene,
            image_features=features,
            adapted=adapted,
            text_features=texts,
        )
        if score is not None:
            name, values = self.config.loss, torch.tensor(self.config.level_values, device=scores.device)
            label = score.to(scores).reshape(-1, 1).expand_as(scores)
            output.loss = loss_of(name, scores.flatten(), logits.flatten(0, 1), label.flatten(), values)
            output.losses = {name: output.loss}
            if text is not None:
                output.losses["captions"] = self._caption_loss(features, text)
                output.loss = output.loss + self.config.caption_coef * output.losses["captions"]
        return output

    def _check_batch(self, image: Tensor, scene: Tensor | None, score: Tensor | None, text: Tensor | None) -> None:
        shape = tuple(getattr(image, "shape", ()))
        if not isinstance(image, Tensor) or len(shape) not in (4, 5) or shape[-3] != 3 or not image.is_floating_point():
            told = f"{shape} {str(getattr(image, 'dtype', type(image).__name__)).removeprefix('torch.')}"
            wrong: str | None = f"pictures are numbers (B, 3, S, S) or (B, V, 3, S, S), not {told}"
        elif not image.numel():
            wrong = f"there is no picture in a batch of the shape {shape}"
        else:
            count = len(image)
            wrong = misfit("scene", scene, (count,)) or misfit("score", score, (count,), whole=False)
            wrong = wrong or misfit("text", text, (count, None))
        if wrong is not None:
            raise BadInput(f"run {self.family} on a batch", wrong, "model(**model.preprocess('photo.jpg'))")

    def _caption_loss(self, features: Tensor, text: Tensor) -> Tensor:
        """That of the captions (B, N) of pictures with features (B, V, C)."""
        distinct, own = text.unique(dim=0, return_inverse=True)
        texts, scale = self.encode_text(distinct, normalize=True), self.clip.logit_scale.exp()
        own = own[:, None].expand(features.shape[:2])
        return captions(F.normalize(features, dim=-1).flatten(0, 1), texts, own.flatten(), scale)

    def _own_scene(self, adapted: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        """The scene of each picture, (B,), the best fitting one where it was left open, and its prompts (B, K, C)."""
        if len(self.scenes) == 1:
            return torch.zeros_like(scene), self.scene_features([0]).expand(len(scene), -1, -1)
        given = scene.unique()
        numbers = given.tolist()
        if numbers[0] < AUTO or numbers[-1] >= len(self.scenes):
            wrong = f"they have numbers from 0 to {len(self.scenes) - 1}, and {AUTO} leaves the choice to the model"
            raise BadInput(f"score with the scenes {numbers}", wrong, "scene=model.scene_ids('auto', 1)")
        if numbers[0] != AUTO:
            texts = self.scene_features(numbers)  # (S, K, C)
            return scene, texts[torch.searchsorted(given, scene)]
        texts = self.scene_features(range(len(self.scenes)))
        cosines = level_logits(adapted.detach(), texts.detach().flatten(0, 1), scene.new_zeros(()))  # (B, V, S * K)
        fit = cosines.mean(1).unflatten(1, texts.shape[:2]).amax(-1)  # (B, S)
        scene = torch.where(scene == AUTO, fit.argmax(-1), scene)
        return scene, texts[scene]

    @torch.no_grad()
    def predict(self, image: Any, scene: str | Sequence[str] = "auto") -> Assessment:
        """Scores of pictures.

        Args:
            image: one picture or a list: paths, PIL images or arrays.
            scene: whose prompts are compared with them: a name of `model.scenes` for all, a list with one for each, or
                "auto", the scene whose best prompt fits best (see above).

        Raises:
            BadInput: a picture cannot be read. UnknownName: there is no such scene.
        """
        self.check_values("predict with")
        read, upscaled = self._read(image)
        scenes = self.scene_ids(scene, len(read))
        outputs = []
        for first in range(0, len(read), _AT_ONCE):
            last = first + _AT_ONCE
            crops = torch.stack([self._crops(picture) for picture in read[first:last]])
            outputs.append(self(crops, scenes[first:last]))
        scores = torch.cat([out.score for out in outputs]).float()
        if not scores.isfinite().all():
            wrong = "the model computes NaN or infinity; its weights may hold some"
            raise BadInput("no score comes out", wrong, "other weights, or dtype='fp32'")
        used = torch.cat([out.scene for out in outputs]).tolist()
        return Assessment(
            scores=tuple(scores.tolist()),
            labels=self.config.levels,
            probs=torch.cat([out.probs for out in outputs]).float().cpu(),
            scenes=tuple(self.scenes[number] for number in used),
            upscaled=tuple(upscaled),
        )

    def training_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with "image" and "score", and "scene" where it is known, as a batch for the loss.

        With a `caption_coef` in the config they need a "text" too, the caption. Each picture is flipped for one in two
        and cropped at random, from the "seed" of its sample, or from the global one.

        Raises:
            Refused: a sample has no such labels. BadInput: there is none, or a score is no number in [0, 1].
        """
        wanted = ("image", "score", "text") if self.config.caption_coef else ("image", "score")
        check_samples(samples, ("image", "score"), self.family, "data with a score for each picture")
        check_samples(samples, wanted, self.family, "model.overrides.caption_coef=0")
        read, _ = self._read([sample["image"] for sample in samples])
        crops = [self._random_crop(picture, sample.get("seed")) for picture, sample in zip(read, samples, strict=True)]
        scores = torch.tensor([_label(sample["score"]) for sample in samples], device=self.input_device)
        scenes = self.scene_ids([sample.get("scene") or "auto" for sample in samples], len(samples))
        batch = {"image": self._pixels(crops), "scene": scenes, "score": scores}
        if self.config.caption_coef:
            batch["text"] = self.tokenizer([sample["text"] for sample in samples]).to(self.input_device)
        return batch

    def _random_crop(self, picture: Image.Image, seed: int | None) -> Image.Image:
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        if torch.rand((), generator=draw) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        offsets = random_offsets(picture.height, picture.width, self.config.crop, 1, draw)
        return cut_picture(picture, offsets, self.config.crop)[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of both towers' blocks again in backward instead of keeping them."""
        self.clip.set_grad_checkpointing(enable)

    def after_step(self, step: int) -> None:
        """Keeps the inverse temperature between 1 and 100, as CLIP does, where it is trained."""
        if self.clip.logit_scale.requires_grad:
            with torch.no_grad():
                self.clip.logit_scale.clamp_(0, math.log(100))

    @classmethod
    def assembled_from(cls, options: Mapping[str, Any]) -> int | None:
        """One dense model: its blocks become the shared experts, and the others begin as copies of them."""
        return 1

    @classmethod
    def assemble(cls, models: Sequence[Model], options: Mapping[str, Any]) -> Gamma:
        """A trained dense model with experts beside its blocks; it computes what that one did until it is trained.

        Args:
            models: one, with `num_experts=0`.
            options: of the new model's config.

        Raises:
            Refused: it is none, or its sizes are not those of the config.
        """
        config = make_config(GammaConfig, options, cls.family)
        dense = models[0]
        if not isinstance(dense, Gamma) or len(models) != 1 or dense.config.num_experts:
            wrong = "it takes one model of this family with num_experts=0"
            raise Refused(f"assemble {len(models)} models", wrong, "start: {assemble: [base]}")
        model = cls(replace(config, num_experts=0))
        try:
            model.load_state_dict(dense.state_dict())
        except RuntimeError as error:
            wrong = f"its sizes are not those of the config: {str(error).splitlines()[-1].strip()}"
            raise Refused("assemble this model", wrong, "model.overrides as the base has them") from error
        model.config = config
        add_experts(model.clip, config)
        model.preprocessing = {**dense.preprocessing, "image_size": config.crop}
        return model.eval()

    def views(self, batch: Mapping[str, Tensor]) -> list[TokenView]:
        """How the rows of the routings of a batch map to patches and words: sample V * b + v is crop v of picture b.

        Prompts are those of the scenes of the batch, of all where one was left open.
        """
        found = []
        if "image" in batch:
            found.append(TokenView(layers="clip.visual.*", modality="image", prefix=1, grid=self.grid))
        if "scene" in batch:
            given = batch["scene"].unique().tolist()
            scenes = list(range(len(self.scenes))) if AUTO in given else given
            text = self.clip.cut(self.prompt_ids(scenes))
            kept = text_tokens(self.tokenizer, text)
            found.append(TokenView(layers="clip.transformer.*", modality="text", length=text.shape[1], tokens=kept))
        return found


def _label(score: Any) -> float:
    """A score of a sample as a number in [0, 1]."""
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0 <= number <= 1:
        wrong = "it is a number from 0 to 1, higher is better"
        raise BadInput(f"train on the score {score!r}", wrong, "data.name=quality, with low and high of your scale")
    return number


def _fingerprint(parameters: Iterable[nn.Parameter]) -> _Mark:
    """Of each parameter its memory, the number of changes in place, and a few of its values."""
    found = []
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        version = 0 if parameter.is_inference() else parameter._version
        found.append((parameter.data_ptr(), version, flat[:: max(1, len(flat) // 8)].clone()))
    return found


def _same(one: _Mark, other: _Mark) -> bool:
    if [mark[:2] for mark in one] != [mark[:2] for mark in other]:
        return False
    return torch.equal(*(torch.cat([values for *_, values in mark]) for mark in (one, other)))
