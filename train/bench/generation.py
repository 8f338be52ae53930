"""`mmoe bench generation`: Uni-MoE with media spliced once and a cache, beside encoding all again at every step.

The second is what the authors' released code does. Both write the same tokens, greedily, from the same random weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from mmoe.errors import MmoeError
from zoo.uni_moe.config import UniMoEConfig
from zoo.uni_moe.model import PLACEHOLDERS, UniMoE

SIZES: dict[str, Any] = {"vocab_size": 49152, "width": 576, "heads": 9, "kv_heads": 3, "ffn_dim": 1536, "sound": None}
VISION = {"width": 384, "layers": 12, "heads": 6, "ffn_dim": 1536, "image_size": 224, "patch_size": 16}
SPEECH = {"width": 384, "layers": 4, "heads": 6, "ffn_dim": 1536, "resampler_layers": 4}


def measure(tokens: int = 64, layers: int = 30, experts: int = 4) -> dict[str, Any]:
    """Seconds of both ways for one picture and half a minute of speech, and how many times as fast ours is.

    Args:
        tokens: that are written.
        layers: of the language model, which has the other sizes of a SmolLM2-135M, and the experts of Uni-MoE.
        experts: E, in every block.

    Raises:
        MmoeError: the two write different tokens.
    """
    torch.manual_seed(0)
    sizes = {**SIZES, "layers": layers, "num_experts": experts}
    model = UniMoE(UniMoEConfig(**sizes, vision=VISION, speech=SPEECH)).eval()
    ids = torch.tensor([[1, PLACEHOLDERS["<image>"], PLACEHOLDERS["<speech>"], 2, 3, 4]])
    media = {"images": torch.randn(1, 3, 224, 224), "speech": torch.randn(1, 80, 3000)}
    written = {}
    seconds = {}
    for name, run in {"cached": _cached, "re-encoding": _again}.items():
        run(model, ids, media, 2)  # warm
        begun = time.perf_counter()
        written[name] = run(model, ids, media, tokens)
        seconds[name] = time.perf_counter() - begun
    if not torch.equal(written["cached"], written["re-encoding"]):
        raise MmoeError("both ways of generation write other tokens", "one of them is wrong", "open an issue")
    ratio = seconds["re-encoding"] / seconds["cached"]
    told = {f"{name}_s": round(value, 3) for name, value in seconds.items()}
    return {"tokens": tokens, "layers": layers, "experts": experts, **told, "ratio": round(ratio, 2)}


@torch.no_grad()
def _cached(model: UniMoE, ids: torch.Tensor, media: dict[str, Any], tokens: int) -> torch.Tensor:
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    return model.generate(ids, media=media, eos_token_id=None, **options)


@torch.no_grad()
def _again(model: UniMoE, ids: torch.Tensor, media: dict[str, Any], tokens: int) -> torch.Tensor:
    begin = ids.shape[1]
    for _ in range(tokens):
        best = model(ids, **media).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids[:, begin:]
