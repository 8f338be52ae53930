"""What families on open_clip's CLIP share: its sizes, the host itself, its tokenizer, and checks of texts and pictures.

`CLIPHost` is open_clip's CLIP, so a model works where CLIP works; it tells routers which sample a token belongs to and
which tokens are padding, and can cut texts behind the last end token of a batch, which leaves features as they are
because attention is causal. Shapes: B samples, N tokens, D width, C embedding.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F

from mmoe.errors import BadInput, BadOverride, LoadMismatch
from mmoe.moe import with_context
from mmoe.options import check_float, check_int
from mmoe.routing import Context
from zoo.config import check_types

BYTE_TOKENS, SPECIAL_TOKENS = 512, 2


@dataclass(frozen=True, kw_only=True)
class CLIPSizes:
    """Sizes of a CLIP and the numbers of its preprocessing; the defaults are OpenAI's ViT-B/16.

    Attributes:
        embed_dim: C.
        image_size, patch_size: in pixels.
        vision_width, vision_layers, vision_heads, vision_mlp_ratio: image tower; width // 64 heads when None.
        text_width, text_layers, text_heads, text_mlp_ratio: text tower; width // 64 heads when None.
        vocab_size: entries of OpenAI's byte-pair encoding that are kept, the most frequent first.
        context_length: longest text in tokens.
        activation: "quick_gelu" (OpenAI) or "gelu".
        init_logit_scale: logarithm of the initial inverse temperature.
        init_patches: how an untrained patch embedding begins: "random", or "cosine", which lets fine detail count as
            much as brightness from the first step on (see `cosine_patches`).
        image_mean, image_std: of the preprocessing of pictures.
    """

    least: ClassVar[Mapping[str, int]] = dict.fromkeys(
        (
            "embed_dim",
            "image_size",
            "patch_size",
            "vision_width",
            "vision_layers",
            "vision_heads",
            "text_width",
            "text_layers",
            "text_heads",
            "vocab_size",
            "context_length",
        ),
        1,
    )

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int | None = None
    vision_mlp_ratio: float = 4.0
    text_width: int = 512
    text_layers: int = 12
    text_heads: int | None = None
    text_mlp_ratio: float = 4.0
    vocab_size: int = 49408
    context_length: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    init_logit_scale: float = 4.6052
    init_patches: Literal["random", "cosine"] = "random"
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in self.least.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            check_float(name, getattr(self, name), above=0)
        check_float("init_logit_scale", self.init_logit_scale)
        for name, low in (("image_mean", 0.0), ("image_std", 1e-6)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, float | int) and low <= v < math.inf for v in values):
                wrong = f"{name} has a number of at least {low:g} for each of red, green and blue"
                raise BadOverride(f"{name}={list(values)}", wrong, f"{name}=[0.5,0.5,0.5]")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), self.heads(tower)
            if width % heads:
                asked = f"{heads} heads in a tower of width {width}"
                raise BadOverride(asked, "heads must share the width evenly", f"{tower}_heads=1")
        check_patches("image_size", self.image_size, self.patch_size)

    def heads(self, tower: str) -> int:
        """Attention heads of the "vision" or "text" tower."""
        return getattr(self, f"{tower}_heads") or max(1, getattr(self, f"{tower}_width") // 64)


def check_patches(option: str, size: int, patch: int) -> None:
    """Makes sure that patches cover a picture.

    Raises:
        BadOverride: they do not.
    """
    if size % patch:
        asked, fix = f"{option}={size} with patch_size={patch}", f"{option}={max(1, size // patch) * patch}"
        raise BadOverride(asked, "patches must cover the picture", fix)


def cosine_patches(width: int, patch: int) -> Tensor:
    """Weights (D, 3, P, P) of a patch embedding whose channels have about the same strength on normalised pictures.

    Two thirds of the channels are cosine functions of brightness, the others of two differences of colours, from low
    frequencies to high ones. Each is divided by its usual strength, 1.4 P for the mean and P / 4f at frequency f, as
    amplitudes in pictures fall with the frequency (Field 1987, J. Opt. Soc. Am. A 4, 2379); colours have a third of it.
    With random weights the mean of a patch is louder than fine detail by a factor of sixty.

    Args:
        width: D; what P * P functions of each colour do not fill is 0.
        patch: P.

    Example:
        >>> weights = cosine_patches(12, 4)
        >>> weights.shape, (weights[1:].sum((1, 2, 3)).abs() < 1e-5).sum().item()
        (torch.Size([12, 3, 4, 4]), 11)
    """
    n = torch.arange(patch)
    basis = (math.pi / patch * (n + 0.5) * n[:, None]).cos() * math.sqrt(2 / patch)
    basis[0] /= math.sqrt(2)
    frequency = torch.hypot(n[:, None].float(), n.float()).flatten()  # (P * P,)
    order = frequency.argsort(stable=True)
    strength = patch / 4 / frequency[order]
    strength[0] = 1.4 * patch
    waves = torch.einsum("ix,jy->ijxy", basis, basis).flatten(0, 1)[order] / strength[:, None, None]
    brightness = min(patch * patch, width - width // 3)
    channels = []
    for colour, count, usual in (
        ((1.0, 1.0, 1.0), brightness, 1.0),
        ((1.0, -1.0, 0.0), (width - brightness + 1) // 2, 1 / 3),
        ((1.0, 1.0, -2.0), (width - brightness) // 2, 1 / 3),
    ):
        mixed = F.normalize(torch.tensor(colour), dim=0) / usual
        channels.append(mixed[:, None, None] * waves[:count, None])
    weights = torch.cat(channels)
    return F.pad(weights, (0, 0, 0, 0, 0, 0, 0, width - len(weights)))


class CLIPHost(CLIP):
    """open_clip's CLIP whose routers are told samples and padding, and whose texts may be cut.

    Args:
        sizes: of both towers.
        route_padding: routes the padding of texts; False cuts texts at the longest of a batch and ignores padding.

    Example:
        >>> sizes = CLIPSizes(vision_width=64, vision_layers=1, text_width=64, text_layers=1, vocab_size=600)
        >>> CLIPHost(sizes, route_padding=False).encode_text(torch.tensor([[598, 3, 599, 0]])).shape
        torch.Size([1, 512])
    """

    def __init__(self, sizes: CLIPSizes, *, route_padding: bool) -> None:
        super().__init__(
            embed_dim=sizes.embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=sizes.vision_layers,
                width=sizes.vision_width,
                head_width=sizes.vision_width // sizes.heads("vision"),
                mlp_ratio=sizes.vision_mlp_ratio,
                patch_size=sizes.patch_size,
                image_size=sizes.image_size,
            ),
            text_cfg=CLIPTextCfg(
                context_length=sizes.context_length,
                vocab_size=sizes.vocab_size,
                width=sizes.text_width,
                heads=sizes.heads("text"),
                layers=sizes.text_layers,
                mlp_ratio=sizes.text_mlp_ratio,
            ),
            quick_gelu=sizes.activation == "quick_gelu",
            init_logit_scale=sizes.init_logit_scale,
        )
        self.route_padding = route_padding
        if sizes.init_patches == "cosine":
            self.visual.conv1.weight.data.copy_(cosine_patches(sizes.vision_width, sizes.patch_size))

    def positions(self, length: int) -> Tensor:
        """Position vectors of the first `length` tokens, (length, D)."""
        return self.positional_embedding[:length]

    def cut(self, text: Tensor) -> Tensor:
        """Texts (B, N) cut behind the last end token of the batch, or as they are when padding is routed."""
        return text if self.route_padding else text[:, : int(text.argmax(-1).max()) + 1]

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of pictures (B, 3, H, W)."""
        (height, width), (rows, columns) = image.shape[-2:], self.visual.patch_size
        return height // rows, width // columns

    def image_context(self, image: Tensor) -> Context:
        """What the routers of the image tower are told about pictures (B, 3, H, W)."""
        rows, columns = self.grid(image)
        return Context(group_ids=sample_ids(len(image), 1 + rows * columns, image.device))

    def _embed_text(self, text: Tensor) -> tuple[Tensor, Tensor, Context]:
        length = text.shape[1]
        x = self.token_embedding(text) + self.positions(length)  # (B, N, D)
        ends = text.argmax(-1, keepdim=True)  # (B, 1)
        within = torch.arange(length, device=text.device) <= ends  # (B, N)
        samples = sample_ids(len(text), length, text.device)
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
        """As open_clip's, with the positions and contexts of this class.

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


TOWERS = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}
MLP_NAMES = {  # of packed experts, as OpenAI's blocks have them
    "up_proj": "c_fc.weight",
    "up_bias": "c_fc.bias",
    "down_proj": "c_proj.weight",
    "down_bias": "c_proj.bias",
}
SIZES_IN_TENSORS = (
    "embed_dim",
    "image_size",
    "patch_size",
    "vision_width",
    "vision_layers",
    "text_width",
    "text_layers",
    "vocab_size",
    "context_length",
)


def sizes_of(state: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """Sizes that a CLIP's tensors show, as options of `CLIPSizes`.

    Args:
        state: under OpenAI's names; blocks may have experts besides an MLP, or in its place.
        family: for messages.

    Raises:
        LoadMismatch: it is no state dict of a CLIP with a plain ViT.

    >>> sizes_of(CLIPHost(CLIPSizes(vision_layers=3, text_layers=2), route_padding=True).state_dict(), "a clip")[
    ...     "vision_layers"
    ... ]
    3
    """
    asked, fix = f"convert this checkpoint to {family}", "give the state dict of a CLIP with a ViT"
    try:
        conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
        texts, projection = state["positional_embedding"], state["text_projection"]
        vocabulary = state["token_embedding.weight"]
    except KeyError as error:
        raise LoadMismatch(asked, f"it has no {error}", fix) from error
    found: dict[str, Any] = {
        "embed_dim": projection.shape[1],
        "patch_size": conv.shape[-1],
        "image_size": math.isqrt(len(positions) - 1) * conv.shape[-1],
        "vision_width": conv.shape[0],
        "text_width": projection.shape[0],
        "vocab_size": len(vocabulary),
        "context_length": len(texts),
    }
    for tower, prefix in TOWERS.items():
        own = [name for name in state if name.startswith(f"{prefix}.")]
        up = [state[name].shape for name in own if name.endswith("c_fc.weight")]
        if not up:
            raise LoadMismatch(asked, f"it has no block in {prefix}", fix)
        found[f"{tower}_layers"] = sum(name.endswith(".ln_1.weight") for name in own)
        found[f"{tower}_mlp_ratio"] = float(up[0][0] / up[0][1])
    return found


def sample_ids(samples: int, length: int, device: torch.device) -> Tensor:
    """Sample of each token, (B, N), for routers that choose inside a sample.

    >>> sample_ids(2, 3, torch.device("cpu")).tolist()
    [[0, 0, 0], [1, 1, 1]]
    """
    return torch.arange(samples, device=device)[:, None].expand(samples, length)


@cache
def make_tokenizer(vocab_size: int, context_length: int) -> SimpleTokenizer:
    """OpenAI's byte-pair tokenizer with only the most frequent merges, so that small models need few embeddings.

    Made once for each two numbers; its tables take time.

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


def shown_tokens(tokenizer: SimpleTokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token; of the tokens that make up one character the last shows it, the others are dots.

    >>> tokenizer = make_tokenizer(1024, 77)
    >>> shown_tokens(tokenizer, tokenizer.encode("a 狐"))
    ('a', '·', '·', '狐')
    """
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    words = [tokenizer.decoder[i].removesuffix("</w>") for i in ids]
    return tuple(decode(bytes(tokenizer.byte_decoder[sign] for sign in word)) or "·" for word in words)


def text_tokens(tokenizer: SimpleTokenizer, text: Tensor) -> tuple[tuple[str, ...], ...]:
    """Shown tokens of texts (B, N), each up to its end token.

    >>> tokenizer = make_tokenizer(600, 8)
    >>> text_tokens(tokenizer, tokenizer(["a"]))
    (('<start_of_text>', 'a', '<end_of_text>'),)
    """
    ends = (text.argmax(-1) + 1).tolist()
    return tuple(shown_tokens(tokenizer, row[:end]) for row, end in zip(text.tolist(), ends, strict=True))


def check_texts(given: Any, fix: str) -> list[str]:
    """One text or several as a list.

    Raises:
        BadInput: something is no text.

    >>> check_texts("a fox", "")
    ['a fox']
    """
    many = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for text in many:
        if not isinstance(text, str):
            raise BadInput(f"cannot read {text!r} as a text", f"its type is {type(text).__name__}", fix)
    return many


def check_pictures(given: Any, fix: str) -> list[Any]:
    """One picture or several as a list; an array is one.

    Raises:
        BadInput: the list is empty.
    """
    many = list(given) if isinstance(given, list | tuple) else [given]
    if not many:
        raise BadInput("cannot prepare an empty list of pictures", "the list is empty", fix)
    return many


def check_colour(value: Any) -> None:
    """Red, green and blue from 0 to 255, as a saved model's preprocessing has its background.

    Raises:
        ValueError: it is no such colour.

    >>> check_colour([255, 255, 255])
    """
    whole = isinstance(value, (list, tuple)) and all(isinstance(v, int) and 0 <= v <= 255 for v in value)
    if not whole or len(value) != 3:
        raise ValueError(f"background is {value}, not a colour such as [255, 255, 255]")
