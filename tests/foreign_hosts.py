"""Small models of open_clip, timm and transformers with random weights, as hosts of surgery, and how to call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[nn.Module], Tensor]
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
IMAGE: dict[str, Any] = {**TEXT, "image_size": 32, "patch_size": 16}
del IMAGE["vocab_size"], IMAGE["pad_token_id"]


def open_clip_host(text_layers: int = 3) -> nn.Module:
    """open_clip's ViT-B-32-quickgelu at a tiny width; its weights are drawn wider so that blocks matter."""
    from open_clip.model import CLIP

    model = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        text_cfg={"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": text_layers},
        quick_gelu=True,
    )
    return widen(model)


def widen(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.15)
    return model.eval()


def timm_host(name: str, **options: Any) -> nn.Module:
    import timm

    return widen(timm.create_model(name, img_size=32, patch_size=16, depth=2, num_classes=5, **options))


def hf_host(name: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(
        transformers, f"{name.removesuffix('ForCausalLM').removesuffix('Model').removesuffix('Encoder')}Config"
    )
    return widen(getattr(transformers, name)(config(**options)))


def images(model: nn.Module) -> Tensor:
    values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return values.to(next(model.parameters()).dtype)


def tokens() -> Tensor:
    return torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(2))


def clip_call(model: Any) -> Tensor:
    return torch.cat([model.encode_image(images(model)), model.encode_text(tokens())])


def hf_clip_call(model: Any) -> Tensor:
    out = model(input_ids=tokens(), pixel_values=images(model))
    return torch.cat([out.image_embeds, out.text_embeds])


def logits_call(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


def states_call(model: Any) -> Tensor:
    return model(input_ids=tokens()).last_hidden_state


def pixels_call(model: Any) -> Tensor:
    return model(pixel_values=images(model)).last_hidden_state


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
CLIP = {"text_config": {**TEXT, "max_position_embeddings": 12, "eos_token_id": 2}, "vision_config": IMAGE}
HOSTS: dict[str, tuple[Callable[[], nn.Module], Call, int, str]] = {
    "open_clip": (open_clip_host, clip_call, 5, "Sequential"),
    "timm vit": (lambda: timm_host("vit_tiny_patch16_224"), lambda m: m(images(m)), 2, "Mlp"),
    "timm packed swiglu": (lambda: timm_host("eva02_tiny_patch14_224"), lambda m: m(images(m)), 2, "GluMlp"),
    "timm swiglu": (
        lambda: timm_host("vit_small_plus_patch16_dinov3", embed_dim=48, num_heads=2, init_values=1.0),
        lambda m: m(images(m)),
        2,
        "SwiGLU",
    ),
    "hf clip": (lambda: hf_host("CLIPModel", **CLIP, projection_dim=16), hf_clip_call, 4, "CLIPMLP"),
    "hf siglip": (lambda: hf_host("SiglipModel", **CLIP), hf_clip_call, 5, "SiglipMLP"),
    "hf llama": (lambda: hf_host("LlamaForCausalLM", **TEXT), logits_call, 2, "LlamaMLP"),
    "hf phi3": (lambda: hf_host("Phi3ForCausalLM", **TEXT), logits_call, 2, "Phi3MLP"),
    "hf gpt2": (lambda: hf_host("GPT2Model", **GPT2), states_call, 2, "GPT2MLP"),
    "hf t5": (lambda: hf_host("T5EncoderModel", **T5), states_call, 2, "T5DenseActDense"),
    "hf vit": (lambda: hf_host("ViTModel", **IMAGE), pixels_call, 2, "ViTMLP"),
    "hf dinov2": (lambda: hf_host("Dinov2Model", **IMAGE, use_swiglu_ffn=True), pixels_call, 2, "Dinov2SwiGLUFFN"),
}


def relative_gap(want: Tensor, got: Tensor) -> float:
    return ((want - got).abs().max() / want.abs().max()).item()
