"""Uni-MoE on pretrained parts: each gives what the model it comes from gives, and is saved by its name alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

import zoo
from mmoe.errors import BadOverride, LoadMismatch
from tests.zoo.conftest import PRETRAINED
from train.sections import TuneSection
from train.tune import freeze
from zoo.base import of_base, with_base
from zoo.state import load_state, read_state
from zoo.uni_moe.config import UniMoEConfig
from zoo.uni_moe.media import image_tensor
from zoo.uni_moe.model import PLACEHOLDERS, UniMoE
from zoo.uni_moe.parts import LORA_FACTORS, part_state

SIZES: dict[str, Any] = {"vocab_size": 60, "width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 48}
SIZES |= {"positions": 128, "num_experts": 3, "queries": 4, "vision": None, "speech": None, "sound": None}
VISION = {"width": 16, "layers": 3, "heads": 2, "ffn_dim": 24, "image_size": 32, "patch_size": 8}
SPEECH = {"width": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "resampler_layers": 1, "mels": 80}
SPEECH |= {"positions": 20, "words": 8}
CLIP_TINY = {"width": 128, "layers": 4, "heads": 4, "ffn_dim": 512, "image_size": 64, "patch_size": 16}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    """The family's own cards, where the folder's fixture leaves two of another one."""


def build(**options: Any) -> UniMoE:
    return UniMoE(UniMoEConfig(**{**SIZES, **options})).eval()


def fill(model: UniMoE, part: str, state: dict[str, Tensor]) -> set[str]:
    """Loads a part from a state dict of another layout; tells what it brought."""
    found = model.from_base(state, part)
    unexpected = model.load_state_dict(found, strict=False).unexpected_keys
    assert not unexpected
    return set(found)


# ---- language models ----


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options)).eval()


def as_llama_cpp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of llama.cpp, and its order of rows: those that are rotated together side by side."""
    parts = {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    parts |= {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for name, value in state.items():
        name = name.removesuffix(".weight")
        if name in tops:
            found[f"{tops[name]}.weight"] = value
            continue
        _, _, layer, part = name.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = 4 if ".q_" in name else 2
            half = len(value) // heads // 2
            order = [head * 2 * half + side * half + n for head in range(heads) for n in range(half) for side in (0, 1)]
            value = value[order]
        found[f"blk.{layer}.{parts[part]}.weight"] = value
    return found


@pytest.mark.parametrize("layout", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("options", [{"num_experts": 0}, {"moe_layers": "even"}, {"experts": "lora_gated_ffn:rank=2"}])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_says_what_its_base_says(layout: str, options: dict[str, Any], tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    state = {name: value for name, value in base.state_dict().items() if not (tied and name == "lm_head.weight")}
    model = build(tie_embeddings=tied, **options)
    brought = fill(model, "llm", as_llama_cpp(state) if layout == "llama.cpp" else state)
    own = {name for name in model.state_dict() if name not in brought}
    assert all(".router." in name or name.rpartition(".")[2] in LORA_FACTORS for name in own)
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, atol=1e-5, rtol=1e-4)


def test_an_untied_model_on_a_tied_base_begins_with_its_words() -> None:
    state = llama(tie_word_embeddings=True).state_dict()
    del state["lm_head.weight"]
    model = build()
    fill(model, "llm", state)
    assert model.llm.lm_head.weight.equal(state["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("options", "change", "told"),
    [
        ({"experts": "ffn"}, {}, "experts='ffn' are no gated feed-forward blocks"),
        ({"tie_embeddings": True}, {}, "its lm_head is another matrix than its embeddings"),
        (
            {},
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
            "it has 'model.layers.0.self_attn.q_proj.bias'",
        ),
        ({}, {"rope_freqs.weight": torch.zeros(2)}, "a Llama of transformers or llama.cpp"),
    ],
)
def test_language_models_that_do_not_fit(options: dict[str, Any], change: dict[str, Tensor], told: str) -> None:
    with pytest.raises(LoadMismatch) as error:
        build(**options).from_base({**llama().state_dict(), **change}, "llm")
    assert told in str(error.value)


def test_heads_that_do_not_divide_llama_cpps_rows() -> None:
    with pytest.raises(LoadMismatch, match="has 32 rows for 6 heads\n  try: heads and kv_heads as the base has them"):
        build(width=48, heads=6, kv_heads=1).from_base(as_llama_cpp(llama().state_dict()), "llm")


# ---- images ----


def clip_states(visual: Any, images: Tensor) -> list[Tensor]:
    """Outputs of every block of open_clip's tower."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out)) for block in visual.transformer.resblocks
    ]
    with torch.no_grad():
        visual(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_an_open_clip_tower(activation: str) -> None:
    sizes = CLIPVisionCfg(layers=3, width=16, head_width=8, mlp_ratio=1.5, patch_size=8, image_size=32)
    visual = _build_vision_tower(4, sizes, quick_gelu=activation == "quick_gelu").eval()
    model = build(vision={**VISION, "activation": activation})
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    brought = fill(model, "vision", state | {"logit_scale": torch.ones(()), "transformer.a": torch.ones(2)})
    assert brought == {name for name in model.state_dict() if name.startswith("vision.encoder.")}
    images = torch.randn(2, 3, 32, 32)
    ours = model.vision.encoder(images, output_hidden_states=True).hidden_states[1:]
    for one, theirs in zip(ours, clip_states(visual, images), strict=True):
        torch.testing.assert_close(one, theirs, atol=1e-5, rtol=1e-4)
    theirs = {
        f"vision_model.{n.removeprefix('vision.encoder.')}": v for n, v in model.from_base(state, "vision").items()
    }
    again = model.from_base(theirs | {"text_model.a": torch.ones(2)}, "vision")
    assert again.keys() == brought and all(
        again[name].equal(value) for name, value in model.state_dict().items() if name in again
    )


def test_the_bundled_clip() -> None:
    clip = zoo.load("clip_tiny", device="cpu")
    source = "bundled:weights/clip_tiny.safetensors"
    model = build(vision=CLIP_TINY, base={"vision": source})
    fill(model, "vision", load_file(zoo.weights.locate(source)))
    images = torch.randn(2, 3, 64, 64)
    ours = model.vision.encoder(images, output_hidden_states=True).hidden_states[1:]
    for one, theirs in zip(ours, clip_states(clip.clip.visual, images), strict=True):
        torch.testing.assert_close(one, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(LoadMismatch, match="a dense CLIP"):
        fill(model, "vision", load_file(zoo.weights.locate("bundled:weights/clip_moe_tiny.safetensors")))


@pytest.mark.parametrize(("name", "width", "patches"), [("test_efficientnet", 256, 25), ("test_vit", 64, 100)])
def test_an_image_model_of_timm(name: str, width: int, patches: int) -> None:
    base = timm.create_model(name, pretrained=False).eval()
    model = build(vision={"timm": name, "image_size": 160})
    brought = fill(model, "vision", base.state_dict())
    assert brought == {one for one in model.state_dict() if one.startswith("vision.encoder.")}
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        found, pooled = model.vision.features(images), base.forward_features(images)
    assert found.shape == (2, patches, width) and model.vision(images).shape == (2, patches, 32)
    expected = pooled[:, 1:] if pooled.ndim == 3 else pooled.flatten(2).mT
    torch.testing.assert_close(found, expected)
    assert model.vision.mean == tuple(base.pretrained_cfg["mean"])


def test_pictures_are_normalised_as_their_encoder_needs() -> None:
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    model = build(
        vision={"timm": "test_efficientnet", "image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 1.0, 1.0]}
    )
    found = model._media({"<image>": [grey], "<video>": [[grey, grey]], "<speech>": [], "<sound>": []})
    assert found["images"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(found["images"][0, 0], torch.full((32, 32), (128 / 255 - 0.5) / 0.25))
    torch.testing.assert_close(found["videos"][0][1], found["images"][0])
    clip = build(vision=VISION).vision
    assert image_tensor(grey, 8, clip.mean, clip.std)[0].mean() == pytest.approx((128 / 255 - 0.48145466) / 0.26862954)


@pytest.mark.parametrize(
    ("vision", "told"),
    [
        ({"timm": "tf_efficientnet_lite"}, "did you mean: tf_efficientnet_lite0"),
        ({"timm": 3}, "the type of vision.timm"),
        ({"timm": "test_vit", "width": 8}, "vision with 'width'"),
        ({"activation": "relu"}, "vision.activation='relu'"),
        ({"mean": [0.5]}, "vision.mean=[0.5]"),
        ({"std": [0.0, 1.0, 1.0]}, "vision.std=[0.0, 1.0, 1.0]"),
    ],
)
def test_encoders_that_cannot_be(vision: dict[str, Any], told: str) -> None:
    with pytest.raises(BadOverride) as error:
        build(vision=vision)
    assert told in str(error.value)


# ---- speech ----


def whisper() -> WhisperModel:
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    sizes |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 30}
    return WhisperModel(
        WhisperConfig(**sizes, max_source_positions=50, max_target_positions=16, pad_token_id=0, num_mel_bins=80)
    ).eval()


def as_ctranslate2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of CTranslate2, with fused projections and zeros for the biases that keys lack."""
    tops = {"embed_positions.weight": "position_encodings/encodings", "embed_tokens.weight": "embeddings/weight"}
    found: dict[str, Tensor] = {"encoder/num_heads": torch.tensor(2, dtype=torch.int16)}
    norms = {"weight": "gamma", "bias": "beta"}
    for name, value in state.items():
        side, rest = name.removeprefix("model.").split(".", 1)
        module, _, kind = rest.rpartition(".")
        if rest in tops:
            found[f"{side}/{tops[rest]}"] = value
        elif module.startswith("conv"):
            found[f"{side}/{module}/{kind}"] = value
        elif module == "layer_norm":
            found[f"{side}/layer_norm/{norms[kind]}"] = value
        else:
            _, number, part = module.split(".", 2)
            place, attn = f"{side}/layer_{number}", {"self_attn": "self_attention", "encoder_attn": "attention"}
            part, _, inner = part.partition(".")
            if part in ("fc1", "fc2"):
                found[f"{place}/ffn/linear_{part == 'fc2':d}/{kind}"] = value
            elif part == "final_layer_norm":
                found[f"{place}/ffn/layer_norm/{norms[kind]}"] = value
            elif part.endswith("_layer_norm"):
                found[f"{place}/{attn[part.removesuffix('_layer_norm')]}/layer_norm/{norms[kind]}"] = value
            elif inner == "out_proj":
                found[f"{place}/{attn[part]}/linear_{1 + (part == 'encoder_attn')}/{kind}"] = value
            elif part == "self_attn" and inner == "q_proj":
                rows = [state.get(f"{name.removesuffix(f'q_proj.{kind}')}{one}_proj.{kind}") for one in "qkv"]
                rows = [torch.zeros_like(value) if one is None else one for one in rows]
                found[f"{place}/self_attention/linear_0/{kind}"] = torch.cat(rows)
            elif part == "encoder_attn" and inner == "q_proj":
                found[f"{place}/attention/linear_0/{kind}"] = value
            elif part == "encoder_attn" and inner == "v_proj":
                keys = state.get(name.replace("v_proj", "k_proj"), torch.zeros_like(value))
                found[f"{place}/attention/linear_1/{kind}"] = torch.cat([keys, value])
    return found


@pytest.mark.parametrize("layout", ["transformers", "of a task", "ctranslate2"])
def test_a_whisper(layout: str) -> None:
    base = whisper()
    state = base.state_dict()
    if layout == "of a task":
        state = {f"model.{name}": value for name, value in state.items()} | {"proj_out.weight": torch.ones(2)}
    state = as_ctranslate2(state) if layout == "ctranslate2" else state
    model = build(speech={**SPEECH, "positions": 50, "resampler_layers": 2, "words": 16})
    for part, place in (("speech", "speech.encoder."), ("resampler", "speech.resampler.decoder.")):
        assert fill(model, part, state) == {name for name in model.state_dict() if name.startswith(place)}
    mels, queries = torch.randn(2, 80, 100), torch.randn(2, 5, 16)
    features = base.encoder(mels).last_hidden_state
    torch.testing.assert_close(model.speech.features(mels), features)
    expected = base.decoder(inputs_embeds=queries, encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(model.speech.resampler.read(queries, features), expected, atol=1e-5, rtol=1e-4)


def test_a_whisper_that_hears_less_and_resamples_with_fewer_layers() -> None:
    state, model = whisper().state_dict(), build(speech=SPEECH)
    fill(model, "speech", state)
    brought = fill(model, "resampler", state)
    assert model.speech.encoder.embed_positions.weight.equal(state["encoder.embed_positions.weight"][:20])
    assert model.speech.resampler.decoder.embed_positions.weight.equal(state["decoder.embed_positions.weight"][:8])
    assert brought == {name for name in model.state_dict() if name.startswith("speech.resampler.decoder.")}
    assert model.speech(torch.randn(1, 80, 40)).shape == (1, 4, 32)


def test_frames_in_the_order_of_time() -> None:
    model = build(speech={**SPEECH, "connector": "stack", "stack": 3})
    mels = torch.randn(2, 80, 40)
    tokens, features = model.speech(mels), model.speech.features(mels)
    assert tokens.shape == (2, 7, 32) and features.shape == (2, 20, 16)
    joined = model.speech.resampler.projector(features[:, 3:6].flatten(1))
    torch.testing.assert_close(tokens[:, 1], joined)
    ids = torch.tensor([[5, PLACEHOLDERS["<speech>"], 7]])
    out = model(ids, labels=ids.clamp(min=0), speech=mels[:1])
    assert out.logits.shape == (1, 9, 60)
    out.loss.backward()
    assert model.speech.resampler.projector[0].weight.grad.any()
    with pytest.raises(BadOverride, match="base of 'resampler'\n  the model is built without it"):
        build(speech={**SPEECH, "connector": "stack"}, base={"resampler": "a.bin"})
    with pytest.raises(BadOverride, match="did you mean: stack"):
        build(speech={**SPEECH, "connector": "stacks"})


# ---- frozen or trained ----


def test_encoders_are_frozen_until_a_recipe_names_them() -> None:
    model = build(vision={"timm": "test_efficientnet", "image_size": 32}, experts="lora_gated_ffn:rank=2").train()
    ids = torch.tensor([[5, PLACEHOLDERS["<image>"], 7]])
    given = {"labels": ids.clamp(min=0), "images": torch.randn(1, 3, 32, 32)}
    before = {name: value.clone() for name, value in model.vision.encoder.state_dict().items()}

    def trained() -> set[str]:
        model.zero_grad()
        model(ids, **given).loss.backward()
        return {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}

    assert model.training and not any(module.training for module in model.vision.encoder.modules())
    assert "vision.projector.0.weight" in trained() and not any(".encoder." in name for name in trained())
    freeze(model, TuneSection(method="adapters"))
    found = trained()
    assert {name.split(".")[0] for name in found} == {"vision", "llm"}
    assert all(".projector." in n or ".router." in n or n.rpartition(".")[2] in LORA_FACTORS for n in found)
    freeze(model, TuneSection(method="modules", modules=("vision.encoder.*",)))
    model.train()
    found = trained()
    assert found and all(name.startswith("vision.encoder.") for name in found)
    freeze(model, TuneSection())
    assert any(name.startswith("vision.encoder.") for name in trained()), "all there is"
    buffers = dict(model.vision.encoder.named_buffers())
    assert buffers and all(value.equal(before[name]) for name, value in buffers.items()), "of batch norms"


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a model on three bases, with parts of its own that are random."""
    save_file(llama().state_dict(), tmp_path / "llama.safetensors")
    torch.save(as_ctranslate2(whisper().state_dict()), tmp_path / "whisper.pt")
    visual = _build_vision_tower(
        4, CLIPVisionCfg(layers=3, width=16, head_width=8, mlp_ratio=1.5, patch_size=8, image_size=32)
    )
    save_file({f"visual.{name}": value for name, value in visual.state_dict().items()}, tmp_path / "clip.safetensors")
    base = {"llm": "llama.safetensors", "vision": "clip.safetensors", "speech": "whisper.pt", "resampler": "whisper.pt"}
    base = {part: str(tmp_path / name) for part, name in base.items()}
    options = {"experts": "lora_gated_ffn:rank=2", "vision": VISION, "speech": SPEECH}
    build(**options).save(tmp_path / "random")
    found = zoo.load(tmp_path / "random", "base", device="cpu", base=base)
    assert set(found.load_report.missing).isdisjoint(found.load_report.from_base)
    found.save(tmp_path / "model")
    return tmp_path / "model"


def test_only_what_is_new_is_saved(folder: Path) -> None:
    names = set(load_file(folder / "model.safetensors"))
    assert all(
        "projector" in n or ".router." in n or "queries" in n or n.rpartition(".")[2] in LORA_FACTORS for n in names
    )
    model = zoo.load(folder, device="cpu")
    assert model.load_report.random == 0 and len(model.load_report.from_base) > 100
    with torch.no_grad():
        model.speech.resampler.decoder.layers[0].fc1.bias += 1
        model.llm.model.norm.weight += 1
    model.save(folder.parent / "trained")
    config = json.loads((folder.parent / "trained" / "config.json").read_text())["config"]
    assert set(config["base"]) == set(config["base_sha256"]) == {"vision", "speech"}
    again = zoo.load(folder.parent / "trained", device="cpu")
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_saved_model_is_a_base(folder: Path) -> None:
    model = zoo.load(folder, device="cpu")
    model.save(folder.parent / "first")
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for part in ("llm", "vision", "speech", "resampler"):
        found = part_state(whole, part, model.config, whole)
        assert found and all(value.equal(whole[name]) for name, value in found.items())
        assert not any(".router." in name or name.rpartition(".")[2] in LORA_FACTORS for name in found)


@pytest.mark.parametrize(
    ("part", "name", "told"),
    [
        ("llm", "clip.safetensors", "it has 'visual.class_embedding'"),
        ("vision", "llama.safetensors", "it has 'lm_head.weight'"),
        ("speech", "clip.safetensors", "a Whisper of transformers or CTranslate2"),
    ],
)
def test_a_base_of_another_part(part: str, name: str, told: str, folder: Path) -> None:
    base = json.loads((folder / "config.json").read_text())["config"]["base"]
    with pytest.raises(LoadMismatch) as error:
        zoo.load(folder, device="cpu", base={**base, part: str(folder.parent / name)}, base_sha256=None)
    assert told in str(error.value) and f"as the base of {part}" in str(error.value)


def test_a_base_of_other_sizes(folder: Path) -> None:
    save_file(
        llama(max_position_embeddings=8).state_dict() | {"model.norm.weight": torch.ones(8)}, folder / "a.safetensors"
    )
    base = json.loads((folder / "config.json").read_text())["config"]["base"]
    with pytest.raises(LoadMismatch, match=r"llm\.model\.norm\.weight \(8,\) for \(32,\)"):
        zoo.load(folder, device="cpu", base={**base, "llm": str(folder / "a.safetensors")}, base_sha256=None)
    del base["vision"]
    with pytest.raises(LoadMismatch, match=r"missing \d+: vision\.encoder"):
        zoo.load(folder, device="cpu", base=base, base_sha256=None)


# ---- the real ones, where they were fetched ----

SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3}
SMOLLM2 |= {"ffn_dim": 1536, "positions": 2048, "rope_theta": 100000.0, "tie_embeddings": True, "moe_layers": 10}
SMOLLM2 |= {"experts": "lora_gated_ffn:rank=4", "template": "chatml"}
TINY_EN = {"width": 384, "layers": 4, "heads": 6, "ffn_dim": 1536, "resampler_layers": 2, "mels": 80}
TINY_EN |= {"positions": 500, "words": 64}


@pytest.mark.slow
def test_small_parts_in_one_model(pretrained: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    paths = {name: PRETRAINED[name].source for name in ("smollm2", "whisper", "efficientnet") if pretrained(name)}
    base = {"llm": paths["smollm2"], "vision": paths["efficientnet"]}
    base |= {"speech": paths["whisper"], "resampler": paths["whisper"]}
    branches = {"vision": {"timm": "tf_efficientnet_lite0"}, "speech": TINY_EN, "tokenizer": paths["smollm2"]}
    model = build(**SMOLLM2, **branches, base=base)
    state, from_base, _ = with_base(model, {})
    model.load_report = load_state(model, state, "bases", allow_missing=["*"])
    assert set(from_base) == set(of_base(model, model.state_dict()))
    assert "Paris" in model.predict("What is the capital of France?", max_new_tokens=12).text
    model.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 15e6
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["config"]
    assert config["base"] == base and config["base_sha256"]["llm"] == PRETRAINED["smollm2"].sha256
    again = zoo.load(tmp_path / "saved", device="cpu")
    assert again.load_report.random == 0
    assert all(value.equal(model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
def test_efficientnet_lite0_knows_what_it_sees(pretrained: Any) -> None:
    picture = Path(pytest.importorskip("skimage.data").__file__).with_name("coffee.png")
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    names = {f"vision.encoder.{name}" for name in whole.state_dict()}
    config = UniMoEConfig(vision={"timm": "tf_efficientnet_lite0"}, speech=None, sound=None)
    found = part_state(read_state(pretrained("efficientnet")), "vision", config, names)
    whole.load_state_dict({name.removeprefix("vision.encoder."): value for name, value in found.items()})
    with torch.no_grad():
        scores = whole(image_tensor(picture, 224, [0.5] * 3, [0.5] * 3)[None]).softmax(-1)[0]
    assert scores.argmax() == 967 and scores.max() > 0.9, "an espresso"
