"""CLIP-MoE: both towers of a CLIP with mixtures of feed-forward experts and per-token top-k routers.

Paper: Zhang et al., "CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling",
arXiv 2409.19291, EMNLP 2025. Authors' code: github.com/OpenSparseLLMs/CLIP-MoE (no licence); written from the paper.

    h = x + MHA(ln_1(x));   p = softmax(W_g ln_2(h));   y = h + sum_{k in top-K} (p_k / sum p) * FFN_k(ln_2(h))

The host is open_clip's CLIP, so the model works where CLIP works. The text tower holds 248 tokens with two position
tables as in Long-CLIP (arXiv 2403.15378). Where we differ: experts are packed and dispatched by one sort; text can be
cut at the longest caption of a batch (`route_padding=False`), which leaves features as they are because attention is
causal.

Shapes: B samples, N tokens, T = B*N rows, D width, C embedding, E experts, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from torch import Tensor
from torch.nn import functional as F

from mmoe.errors import BadInput, Refused
from mmoe.trace import trace
from zoo.clip_moe.config import ClipMoEConfig
from zoo.clip_moe.host import LongTextCLIP, add_experts
from zoo.clip_moe.loss import contrastive_loss, pooled_balance, world
from zoo.config import make_config
from zoo.hosts.clip import check_colour, check_pictures, check_texts, make_tokenizer, text_tokens
from zoo.images import read_image
from zoo.model import Model
from zoo.samples import check_samples
from zoo.table import most_probable, shorten
from zoo.views import TokenView

_PREDICT = "model.predict('fox.png', ['a fox', 'a dog'])"


@dataclass(kw_only=True)
class ClipOutput:
    """What `ClipMoE.forward` returns.

    Attributes:
        image_features: (B, C), not normalised.
        text_features: (B, C), not normalised.
        logits_per_image: (B_image, B_text) scaled cosines; `logits_per_text` is the transpose.
        loss: scalar, or None when not asked for.
        losses: unweighted parts of the loss.
    """

    image_features: Tensor
    text_features: Tensor
    logits_per_image: Tensor
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def logits_per_text(self) -> Tensor:
        """(B_text, B_image)."""
        return self.logits_per_image.t()


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Labels with their probabilities, one row per picture.

    Attributes:
        labels: as given.
        probs: (pictures, labels), rows sum to 1.
        cosines: (pictures, labels) cosine similarities.
    """

    labels: tuple[str, ...]
    probs: Tensor
    cosines: Tensor

    def top(self, k: int = 5, picture: int = 0) -> list[tuple[str, float]]:
        """The k most probable labels of one picture."""
        return most_probable(self.labels, self.probs, k, picture)

    def table(self, picture: int = 0) -> tuple[list[str], list[list[str]]]:
        """Header and rows that show one picture's best labels."""
        return ["probability"], [[shorten(label), f"{probability:.1%}"] for label, probability in self.top(10, picture)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"labels": list(self.labels), "probs": self.probs.tolist(), "cosines": self.cosines.tolist()}


class ClipMoE(Model):
    """A CLIP with experts: compares pictures with texts.

    Args:
        config: options; `num_experts=0` builds the dense CLIP.

    Attributes:
        clip: the host, an `open_clip.model.CLIP`, to hand to whatever takes one.

    Example:
        >>> import zoo
        >>> model = zoo.load("clip_moe_tiny", weights=False)
        >>> model.encode_text(model.tokenizer(["a fox"])).shape[1] == model.config.embed_dim
        True
    """

    family = "clip_moe"
    config_class = ClipMoEConfig
    layer_methods = ("encode_image", "encode_text")

    def __init__(self, config: ClipMoEConfig) -> None:
        super().__init__(config)
        self.clip = LongTextCLIP(config)
        if config.num_experts:
            add_experts(self.clip, config)
        self.preprocessing = {
            "image_size": config.image_size,
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize_mode,
            "background": [255, 255, 255],
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
        }

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything that turns pictures and texts into tensors, as plain data."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, values: dict[str, Any]) -> None:
        told = {key: values[key] for key in ("image_size", "interpolation", "resize_mode", "context_length")}
        told |= {"image_mean": values["mean"], "image_std": values["std"]}
        make_config(ClipMoEConfig, {**vars(self.config), **told}, self.family)
        for key in ("vocab_size", "image_size"):
            if values[key] != getattr(self.config, key):
                raise ValueError(f"{key} is {values[key]}, the model has {getattr(self.config, key)}")
        if values["context_length"] > self.config.context_length:
            raise ValueError(
                f"context_length is {values['context_length']}, the model has {self.config.context_length}"
            )
        check_colour(values["background"])
        self._preprocessing = values
        self._tokenizer: SimpleTokenizer | None = None
        self.image_transform = image_transform(
            values["image_size"],
            is_train=False,
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            interpolation=values["interpolation"],
            resize_mode=values["resize_mode"],
        )

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """Texts to ids (B, context_length), made on first use."""
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(self._preprocessing["vocab_size"], self._preprocessing["context_length"])
        return self._tokenizer

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a picture, rows and columns."""
        rows, columns = self.clip.visual.grid_size
        return int(rows), int(columns)

    def preprocess(self, images: Any = None, texts: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Plain inputs to a batch on the model's device.

        Args:
            images: one picture or a list: paths, PIL images or arrays.
            texts: one text or a list.

        Returns:
            "image" (B, 3, H, W) in the model's dtype and "text" (B, context_length), each where given.
        """
        batch = {}
        if images is not None:
            many = check_pictures(images, _PREDICT)
            background = tuple(self._preprocessing["background"])
            pictures = [self.image_transform(read_image(image, background)) for image in many]
            batch["image"] = torch.stack(pictures).to(self.input_device, self.dtype)
        if texts is not None:
            batch["text"] = self.tokenizer(check_texts(texts, _PREDICT)).to(self.input_device)
        return batch

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, C)."""
        return self.clip.encode_image(image, normalize=normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N) -> features (B, C)."""
        return self.clip.encode_text(text, normalize=normalize)

    def hidden_states(self, image: Tensor, layer: int = -2) -> Tensor:
        """Tokens after one block of the image tower, class token first: (B, 1 + patches, D).

        The default is the penultimate block, which multimodal language models take as visual tokens.
        """
        blocks = self.config.vision_layers
        if not -blocks <= layer < blocks:
            raise BadInput(f"no block {layer}", f"the image tower has {blocks} blocks", "layer=-2")
        states = self.clip.forward_intermediates(
            image,
            image_indices=[layer % blocks],
            image_output_fmt="NLC",
            image_output_extra_tokens=True,
            intermediates_only=True,
        )
        return torch.cat([states["image_intermediates_prefix"][0], states["image_intermediates"][0]], dim=1)

    @torch.no_grad()
    def predict(self, images: Any, labels: str | Sequence[str], template: str = "{}") -> Classification:
        """Probabilities of labels for pictures (zero-shot classification).

        Args:
            images: one picture or a list.
            labels: texts to choose from.
            template: a sentence with {} for the label.

        Raises:
            BadInput: no label is given, one is empty, or the template has no place for it.
        """
        self.check_values("predict with")
        labels = check_texts(labels, _PREDICT)
        if not labels or not all(label.strip() for label in labels):
            wrong = "one label is empty" if labels else "there are none"
            raise BadInput("cannot compare a picture with no text", wrong, _PREDICT)
        if images is None:
            raise BadInput("cannot predict without a picture", "none is given", _PREDICT)
        if not isinstance(template, str) or "{}" not in template:
            raise BadInput(f"cannot use the template {template!r}", "it has no {} for the label", "'a photo of {}'")
        batch = self.preprocess(images, [template.replace("{}", label) for label in labels])
        out = self(**batch)
        if not out.logits_per_image.isfinite().all():
            wrong = "the model computes NaN or infinity; its weights may hold some"
            raise BadInput("no probabilities come out", wrong, "other weights, or dtype='fp32'")
        logits = out.logits_per_image.float()
        return Classification(
            labels=tuple(labels),
            probs=logits.softmax(-1).cpu(),
            cosines=(logits / self.clip.logit_scale.exp().float()).cpu(),
        )

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        text_short: Tensor | None = None,
        return_loss: bool = False,
    ) -> ClipOutput:
        """Features and similarities, and the training loss where asked for.

        Args:
            image: (B, 3, H, W) pixels. For the loss it may hold several pictures of each text, as whole batches one
                behind the other (V*B, 3, H, W); the contrastive loss is then the mean over the V batches.
            text: (B, N) token ids.
            text_short: (B, N) token ids of short captions for the optional second contrastive loss.
            return_loss: computes the contrastive loss over all processes plus the weighted balance losses.
        """
        with trace(self.clip.visual) as image_routing:
            image_features = self.encode_image(image)  # (B, C)
        with trace(self.clip.transformer) as text_routing:
            text_features = self.encode_text(text)  # (B, C)
        scale = self.clip.logit_scale.exp()
        output = ClipOutput(
            image_features=image_features,
            text_features=text_features,
            logits_per_image=scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).t(),
        )
        if not return_loss:
            return output
        smoothing = self.config.label_smoothing
        if not len(text) or len(image) % len(text):
            wrong = "each text has one picture, or as many as every other one"
            raise BadInput(f"a loss of {len(image)} pictures and {len(text)} texts", wrong, "as many texts as pictures")
        if len(text) * world()[1] == 1:
            wrong = "a picture is compared with the texts of others, and there are none"
            raise BadInput("a loss of one picture and its text", wrong, "data.batch_size=2, or more")
        batches = image_features.split(len(text))
        contrast = [contrastive_loss(images, text_features, scale, smoothing) for images in batches]
        losses = {"contrastive": torch.stack(contrast).mean()}
        total = losses["contrastive"]
        routings = {
            "balance_image": (image_routing, 1.0),
            "balance_text": (text_routing, self.config.text_balance_scale),
        }
        if text_short is not None:
            with trace(self.clip.transformer) as short_routing:
                short_features = self.encode_text(text_short)
            contrast = [contrastive_loss(images, short_features, scale, smoothing) for images in batches]
            losses["contrastive_short"] = torch.stack(contrast).mean()
            total = total + self.config.short_coef * losses["contrastive_short"]
            routings["balance_short"] = (short_routing, self.config.text_balance_scale)
        if self.config.num_experts and self.config.balance_coef:
            for name, (routing, weight) in routings.items():
                losses[name] = pooled_balance(routing, self.config)
                total = total + self.config.balance_coef * weight * losses[name]
        output.loss, output.losses = total, losses
        return output

    def training_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples with "image" and "text" as a batch for the contrastive loss."""
        check_samples(samples, ("image", "text"), self.family, "data.name=pairs")
        batch = self.preprocess([sample["image"] for sample in samples], [sample["text"] for sample in samples])
        return {**batch, "return_loss": True}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the activations of both towers' blocks again in backward instead of keeping them."""
        self.clip.set_grad_checkpointing(enable)

    def after_step(self, step: int) -> None:
        """Keeps the inverse temperature between 1 and 100, as CLIP does."""
        if self.clip.logit_scale.requires_grad:
            self.clip.logit_scale.data.clamp_(0, math.log(100))

    @classmethod
    def assembled_from(cls, options: Mapping[str, Any]) -> int | None:
        """One model for each expert."""
        return int(options["num_experts"])

    @classmethod
    def assemble(cls, models: Sequence[Model], options: Mapping[str, Any]) -> ClipMoE:
        """A mixture whose expert i is the feed-forward layer of model i; the first one is the host."""
        from zoo.clip_moe.convert import upcycle

        host = models[0]
        if not isinstance(host, ClipMoE) or len(models) != options["num_experts"]:
            wrong = f"it takes {options['num_experts']} dense models of this family, one for each expert"
            raise Refused(f"assemble {len(models)} models", wrong, "start: {assemble: [base, ...]}")
        sources = [model.state_dict() for model in models]
        given = {name: options[name] for name in ("top_k", "moe_layers", "expert_dropout") if name in options}
        return upcycle(host, len(models), sources=sources, **given)

    def views(self, batch: Mapping[str, Tensor]) -> list[TokenView]:
        """How the rows of the routings of a batch map to patches and words."""
        found = []
        if "image" in batch:
            found.append(TokenView(layers="clip.visual.*", modality="image", prefix=1, grid=self.grid))
        if "text" in batch:
            text = self.clip.cut(batch["text"])
            kept = text_tokens(self.tokenizer, text)
            found.append(TokenView(layers="clip.transformer.*", modality="text", length=text.shape[1], tokens=kept))
        return found
