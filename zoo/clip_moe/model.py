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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.errors import BadInput, BadOverride
from mmoe.moe import with_context
from mmoe.options import check_float, check_int
from mmoe.registry import build_experts, build_router
from mmoe.routing import Context
from mmoe.surgery import HostedMoE
from mmoe.trace import trace
from zoo.clip_moe.loss import contrastive_loss, pooled_balance
from zoo.images import read_image
from zoo.model import Model, TokenView

BYTE_TOKENS, SPECIAL_TOKENS = 512, 2
_PREDICT = "model.predict('fox.png', ['a fox', 'a dog'])"
_SIZES = ("embed_dim", "image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers")
_LEAST = {name: 1 for name in (*_SIZES, "vision_heads", "text_heads", "context_length")}
_LEAST |= {"num_experts": 0, "moe_layers": 0, "vocab_size": 1}


@dataclass(frozen=True, kw_only=True)
class ClipMoEConfig:
    """Options of the family; the defaults are the released ViT-L/14.

    Attributes:
        embed_dim: C.
        image_size, patch_size: in pixels.
        vision_width, vision_layers, vision_heads, vision_mlp_ratio: image tower; width // 64 heads when None.
        text_width, text_layers, text_heads, text_mlp_ratio: text tower; width // 64 heads when None.
        vocab_size: entries of OpenAI's byte-pair encoding that are kept, the most frequent first.
        context_length: longest text in tokens.
        position_split: rows below it come from the first position table, others from the second; None has one table.
        activation: "quick_gelu" (OpenAI) or "gelu".
        num_experts: E; 0 is the dense CLIP.
        top_k: K.
        moe_layers: the last n blocks of each tower are mixtures, clipped to the tower's depth.
        router: registered router in place of top-k (softmax over all experts, renormalised).
        experts: registered experts in place of the two-layer perceptron.
        expert_dropout: after the experts' activation in training (0.1 in the authors' router training).
        route_padding: routes and counts the padding of texts, as released; False cuts texts and ignores padding.
        label_smoothing: of the contrastive loss.
        short_coef: weight of the loss on short captions where they are given.
        balance_coef, text_balance_scale: weights of the balance loss; the text tower's is their product.
        balance_pooled: takes the means over all layers of a tower together, as released.
        balance_over_ranks: divides the balance loss by the number of processes, as released.
        init_logit_scale: logarithm of the initial inverse temperature.
        image_mean, image_std, interpolation, resize_mode: preprocessing of pictures.
    """

    embed_dim: int = 768
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int | None = None
    vision_mlp_ratio: float = 4.0
    text_width: int = 768
    text_layers: int = 12
    text_heads: int | None = None
    text_mlp_ratio: float = 4.0
    vocab_size: int = 49408
    context_length: int = 248
    position_split: int | None = 20
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    num_experts: int = 4
    top_k: int = 2
    moe_layers: int = 24
    router: str | Mapping[str, Any] | None = None
    experts: str | Mapping[str, Any] | None = None
    expert_dropout: float = 0.0
    route_padding: bool = True
    label_smoothing: float = 0.1
    short_coef: float = 1.0
    balance_coef: float = 0.01
    text_balance_scale: float = 0.5
    balance_pooled: bool = True
    balance_over_ranks: bool = True
    init_logit_scale: float = 4.6052
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.num_experts:
            check_int("top_k", self.top_k, 1, self.num_experts)
            check_int("moe_layers", self.moe_layers, 1)
        for name in ("expert_dropout", "label_smoothing"):
            check_float(name, getattr(self, name), low=0, below=1)
        for name in ("short_coef", "balance_coef", "text_balance_scale"):
            check_float(name, getattr(self, name), low=0)
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            check_float(name, getattr(self, name), above=0)
        check_float("init_logit_scale", self.init_logit_scale)
        if self.position_split is not None:
            check_int("position_split", self.position_split, 0)
        for name, least in (("image_mean", {"low": 0}), ("image_std", {"above": 0})):
            if len(getattr(self, name)) != 3:
                wrong = f"{name} has a number for each of red, green and blue"
                raise BadOverride(f"{name}={getattr(self, name)}", wrong, f"{name}=(0.5, 0.5, 0.5)")
            for value in getattr(self, name):
                check_float(name, value, **least)
        for tower in ("vision", "text"):
            width = getattr(self, f"{tower}_width")
            heads = getattr(self, f"{tower}_heads") or max(1, width // 64)
            if width % heads:
                asked = f"{heads} heads in a tower of width {width}"
                raise BadOverride(asked, "heads must share the width evenly", f"{tower}_heads=1")
        if self.image_size % self.patch_size:
            raise BadOverride(
                f"image_size={self.image_size} with patch_size={self.patch_size}",
                "patches must cover the picture",
                f"image_size={max(1, self.image_size // self.patch_size) * self.patch_size}",
            )


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
        check_int("k", k, 1)
        check_int("picture", picture, 0, len(self.probs) - 1)
        best = self.probs[picture].topk(min(k, len(self.labels)))
        return [(self.labels[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"labels": list(self.labels), "probs": self.probs.tolist(), "cosines": self.cosines.tolist()}


class LongTextCLIP(CLIP):
    """open_clip's CLIP with Long-CLIP's second position table and texts cut at the longest of the batch.

    Args:
        config: of the family.
    """

    def __init__(self, config: ClipMoEConfig) -> None:
        vision_heads = config.vision_heads or max(1, config.vision_width // 64)
        super().__init__(
            embed_dim=config.embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=config.vision_layers,
                width=config.vision_width,
                head_width=config.vision_width // vision_heads,
                mlp_ratio=config.vision_mlp_ratio,
                patch_size=config.patch_size,
                image_size=config.image_size,
            ),
            text_cfg=CLIPTextCfg(
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                width=config.text_width,
                heads=config.text_heads or max(1, config.text_width // 64),
                layers=config.text_layers,
                mlp_ratio=config.text_mlp_ratio,
            ),
            quick_gelu=config.activation == "quick_gelu",
            init_logit_scale=config.init_logit_scale,
        )
        self.position_split = config.position_split
        self.route_padding = config.route_padding
        if config.position_split is not None:
            self.positional_embedding_res = nn.Parameter(self.positional_embedding.detach().clone())

    def positions(self, length: int) -> Tensor:
        """Position vectors of the first `length` tokens, (length, D)."""
        if self.position_split is None:
            return self.positional_embedding[:length]
        tables = self.positional_embedding[: self.position_split], self.positional_embedding_res[self.position_split :]
        return torch.cat(tables)[:length]

    def cut(self, text: Tensor) -> Tensor:
        """Texts (B, N) cut behind the last end token of the batch, or as they are when padding is routed."""
        return text if self.route_padding else text[:, : int(text.argmax(-1).max()) + 1]

    def image_context(self, image: Tensor) -> Context:
        """What the routers of the image tower are told about pictures (B, 3, H, W)."""
        rows, columns = self.visual.grid_size
        return Context(group_ids=_sample_ids(len(image), 1 + rows * columns, image.device))

    def _embed_text(self, text: Tensor) -> tuple[Tensor, Tensor, Context]:
        length = text.shape[1]
        x = self.token_embedding(text) + self.positions(length)  # (B, N, D)
        ends = text.argmax(-1, keepdim=True)  # (B, 1)
        within = torch.arange(length, device=text.device) <= ends  # (B, N)
        samples = _sample_ids(len(text), length, text.device)
        context = Context(group_ids=samples, valid=None if self.route_padding else within)
        return x, self.attn_mask[:length, :length], context

    def _pool_text(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), text.argmax(-1)]  # (B, D)
        return x @ self.text_projection

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Pixels (B, 3, H, W) -> features (B, C)."""
        with with_context(self.visual, self.image_context(image)):
            features: Tensor = super().encode_image(image, normalize=normalize)
        return features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N) -> features (B, C)."""
        text = self.cut(text)
        x, mask, context = self._embed_text(text)
        with with_context(self.transformer, context):
            x = self.transformer(x, attn_mask=mask)
        features = self._pool_text(x, text)  # (B, C)
        return F.normalize(features, dim=-1) if normalize else features

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        text_indices: Any = None,
        *,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
        **image_options: Any,
    ) -> dict[str, Any]:
        """As open_clip's, with the position tables of this class.

        Raises:
            BadInput: logits are asked for without a picture or without a text.
        """
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            fix = "forward_intermediates(image, text, output_logits=True)"
            raise BadInput("no logits of pictures alone or texts alone", "they compare the two", fix)
        output: dict[str, Any] = {}
        shared = {"normalize_intermediates": normalize_intermediates, "intermediates_only": intermediates_only}
        if image is not None:
            with with_context(self.visual, self.image_context(image)):
                output = super().forward_intermediates(image, normalize=normalize, **shared, **image_options)
        if text is not None:
            output |= self._text_intermediates(text, text_indices, normalize, **shared)
        if output_logits:
            output["image_logits"] = self.logit_scale.exp() * output["image_features"] @ output["text_features"].t()
            output["text_logits"] = output["image_logits"].t()
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
        return output

    def _text_intermediates(
        self, text: Tensor, indices: Any, normalize: bool, normalize_intermediates: bool, intermediates_only: bool
    ) -> dict[str, Any]:
        text = self.cut(text)
        x, mask, context = self._embed_text(text)
        with with_context(self.transformer, context):
            x, states = self.transformer.forward_intermediates(x, attn_mask=mask, indices=indices)
        output = {
            "text_intermediates": [self.ln_final(state) for state in states] if normalize_intermediates else states
        }
        if not intermediates_only:
            features = self._pool_text(x, text)  # (B, C)
            output["text_features"] = F.normalize(features, dim=-1) if normalize else features
        return output


def _sample_ids(samples: int, length: int, device: torch.device) -> Tensor:
    """Sample of each token, (B, N), for routers that choose inside a sample."""
    return torch.arange(samples, device=device)[:, None].expand(samples, length)


def _add_experts(clip: LongTextCLIP, config: ClipMoEConfig) -> None:
    """Puts a mixture in place of the MLP of the last `moe_layers` blocks of both towers."""
    for tower in (clip.visual.transformer, clip.transformer):
        for block in tower.resblocks[max(0, tower.layers - config.moe_layers) :]:
            sizes = {"dim": block.mlp.c_fc.in_features, "hidden_dim": block.mlp.c_fc.out_features}
            router = build_router(
                "topk" if config.router is None else config.router,
                dim=sizes["dim"],
                num_experts=config.num_experts,
                top_k=config.top_k,
            )
            experts = build_experts(
                "ffn" if config.experts is None else config.experts,
                **sizes,
                num_experts=config.num_experts,
                out_dim=sizes["dim"],
                act=config.activation,
                dropout=config.expert_dropout,
            )
            block.mlp = HostedMoE(router, experts)


def make_tokenizer(vocab_size: int, context_length: int) -> SimpleTokenizer:
    """OpenAI's byte-pair tokenizer with only the most frequent merges, so that small models need few embeddings.

    Args:
        vocab_size: entries with the 512 byte tokens and the two special ones; 49408 is the whole vocabulary.
        context_length: longest text; longer ones are cut and end in the end token.

    Example:
        >>> make_tokenizer(2048, 8)(["a fox"]).shape
        torch.Size([1, 8])
    """
    tokenizer = SimpleTokenizer(context_length=context_length)
    if vocab_size == tokenizer.vocab_size:
        return tokenizer
    merges = vocab_size - BYTE_TOKENS - SPECIAL_TOKENS
    if not 0 <= merges < len(tokenizer.bpe_ranks):
        raise BadInput(
            f"no tokenizer with {vocab_size} entries",
            f"it can have {BYTE_TOKENS + SPECIAL_TOKENS} to {tokenizer.vocab_size}",
            "vocab_size=49408",
        )
    special = [token for token, i in tokenizer.encoder.items() if i in tokenizer.all_special_ids]
    kept = list(tokenizer.encoder)[: BYTE_TOKENS + merges] + special
    tokenizer.encoder = {token: i for i, token in enumerate(kept)}
    tokenizer.decoder = dict(enumerate(kept))
    tokenizer.bpe_ranks = {pair: rank for pair, rank in tokenizer.bpe_ranks.items() if rank < merges}
    tokenizer.vocab_size = vocab_size
    tokenizer.all_special_ids = [tokenizer.encoder[token] for token in special]
    tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    return tokenizer


def _texts(given: Any) -> list[str]:
    """One text or several as a list."""
    many = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for text in many:
        if not isinstance(text, str):
            raise BadInput(f"cannot read {text!r} as a text", f"its type is {type(text).__name__}", _PREDICT)
    return many


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

    def __init__(self, config: ClipMoEConfig) -> None:
        super().__init__(config)
        self.clip = LongTextCLIP(config)
        if config.num_experts:
            _add_experts(self.clip, config)
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
            many = images if isinstance(images, (list, tuple)) else [images]
            if not many:
                raise BadInput("cannot prepare an empty list of pictures", "the list is empty", _PREDICT)
            background = tuple(self._preprocessing["background"])
            pictures = [self.image_transform(read_image(image, background)) for image in many]
            batch["image"] = torch.stack(pictures).to(self.device, self.dtype)
        if texts is not None:
            batch["text"] = self.tokenizer(_texts(texts)).to(self.device)
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
        labels = _texts(labels)
        if not labels or not all(label.strip() for label in labels):
            wrong = "one label is empty" if labels else "there are none"
            raise BadInput("cannot compare a picture with no text", wrong, _PREDICT)
        if images is None:
            raise BadInput("cannot predict without a picture", "none is given", _PREDICT)
        if not isinstance(template, str) or "{}" not in template:
            raise BadInput(f"cannot use the template {template!r}", "it has no {} for the label", "'a photo of {}'")
        batch = self.preprocess(images, [template.replace("{}", label) for label in labels])
        out = self(**batch)
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

    def views(self, batch: Mapping[str, Tensor]) -> list[TokenView]:
        """How the rows of the routings of a batch map to patches and words."""
        found = []
        if "image" in batch:
            found.append(TokenView(layers="clip.visual.*", modality="image", prefix=1, grid=self.grid))
        if "text" in batch:
            text = self.clip.cut(batch["text"])
            words = [[self.tokenizer.decoder[i].replace("</w>", "") for i in row] for row in text.tolist()]
            ends = (text.argmax(-1) + 1).tolist()
            kept = tuple(tuple(row[:end]) for row, end in zip(words, ends, strict=True))
            found.append(TokenView(layers="clip.transformer.*", modality="text", length=text.shape[1], tokens=kept))
        return found
