"""Earth-Adapter against tensors recorded from the authors' code: split, adapters, backbone, mixing, conversion."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmoe.frequency
from mmoe import override, switch_off, trace
from mmoe.frequency import ADAPTERS, FrequencyAdapter, FrequencyMoE, frequency_split, half_width
from mmoe.surgery.blocks import host_class
from zoo.earth_adapter.adaptation import chosen_pixels, follow, half_of_classes, paste
from zoo.earth_adapter.backbone import UNUSED, to_grid
from zoo.earth_adapter.config import EarthAdapterConfig
from zoo.earth_adapter.convert import adapter_from_original, from_original, head_from_original, to_original
from zoo.earth_adapter.heads import pyramid
from zoo.earth_adapter.model import EarthAdapter

FAMILY = "earth_adapter"
NATIVE = 1e-4  # tolerance of the run at the released size


def grid(recording) -> tuple[int, int]:
    return recording.config["G"], recording.config["G"]


def layers(recording) -> list[int]:
    """Those with adapters."""
    return list(recording.config["adapter_layer"])


def fft_layer(recording) -> int:
    """The first that splits frequencies."""
    return next(layer for layer in recording.config["fft_layer"] if layer in layers(recording))


def is_used(recording, name: str) -> bool:
    """True for tensors of layers with adapters and for those of no layer: the authors hold tensors for all layers."""
    found = re.fullmatch(r"refine_feat\.(?:mlp_list\d|router)\.(\d+)\..*", name)
    return found is None or int(found[1]) in layers(recording)


# ---- the split ----


def check_split(recording) -> None:
    for name, case in recording.config["split"].items():
        size = name.partition(".")[0]
        side = int(size.removeprefix("grid"))
        maps = recording.take("split", f"{size}.in").transpose(0, 1).unflatten(1, (side, side))
        assert half_width((side, side), case["ratio"]) == case["half_width"]
        for kind, found in zip(("low", "high"), frequency_split(maps, case["ratio"]), strict=True):
            recording.check("split", f"{name}.{kind}", found.permute(0, 3, 1, 2))


def test_split(recording):
    check_split(recording)


# ---- the adapter alone ----


def build_adapter(recording, file: str, layer: int) -> FrequencyAdapter:
    weights = {f"refine_feat.{name}": value for name, value in recording.take_all(file, "w.").items()}
    fft = layer in recording.config["fft_layer"]
    state = adapter_from_original(weights, layer, frequency=fft)
    learned = {}
    if "adapter.experts.tokens" in state:
        learned = {"token_dim": state["adapter.experts.tokens"].shape[1], "token_grid": grid(recording)}
    width, hidden, cutoff = (recording.config[key] for key in ("D", "hidden", "cutoff"))
    adapter = FrequencyAdapter(width, hidden, frequency=fft, cutoff=cutoff, **learned)
    adapter.load_state_dict(state)
    return adapter


def run_layer(recording, layer: int, change: Callable[[FrequencyAdapter], object] = lambda adapter: None) -> None:
    """One layer forward and backward; `change` makes a mutant of it."""
    x = recording.take("adapter", "in.x").clone().requires_grad_()
    coefficients = recording.take("adapter", "loss.coef")

    def check(name: str, value: Tensor) -> None:
        recording.check("adapter", f"layer{layer}.{name}", value)

    adapts = layer in recording.config["adapter_layer"]
    adapter = build_adapter(recording, "adapter", layer)
    change(adapter)
    with trace(adapter) as routing:
        out = adapter(x, grid(recording)) if adapts else x * 1
    (loss := (out * coefficients).sum()).backward()
    check("out", out)
    check("loss", loss)
    check("grad.x", x.grad)
    scale = torch.zeros(recording.config["L"])
    if adapts:
        scale[layer] = adapter.scale.grad
    if adapts or f"layer{layer}.grad.scale" in recording.files["adapter"]:
        check("grad.scale", scale)
    if not adapts:
        return
    experts = adapter.adapter.experts
    for name in recording.files["adapter"]:
        if name.startswith(f"layer{layer}.grad.mlp_list"):
            kind, part = name.split("mlp_list")[1].split(".", 1)
            packed = {"0.weight": "up_proj", "0.bias": "up_bias", "2.weight": "down_proj", "2.bias": "down_bias"}[part]
            recording.check("adapter", name, getattr(experts, packed).grad[int(kind) - 1])
    if isinstance(adapter.adapter, FrequencyMoE):
        check("router_logits", routing[0].logits)
        check("router_prob", routing[0].dense_weights())
        check("grad.router.weight", adapter.adapter.router.weight.grad)
        check("grad.router.bias", adapter.adapter.router.bias.grad)
        check_experts(check, adapter.adapter, x.detach()[:, 1:].unflatten(1, grid(recording)))


def check_experts(check: Callable[[str, Tensor], None], layer: FrequencyMoE, maps: Tensor) -> None:
    low, high = frequency_split(maps, layer.cutoff, layer.box)
    check("low", low.permute(0, 3, 1, 2))
    check("high", high.permute(0, 3, 1, 2))
    for number, name in enumerate(ADAPTERS):
        with override(layer, switch_off([one for one in range(3) if one != number])):
            check(f"delta_{name}", layer(maps))


def test_every_layer(recording):
    for layer in range(recording.config["L"]):
        run_layer(recording, layer)


def test_scales_start_alike(recording):
    scale, count = recording.config["scale"], recording.config["L"]
    adapters = [FrequencyAdapter(4, 2, scale=scale) for _ in range(count)]
    recording.check("adapter", "init.scale", torch.cat([adapter.scale for adapter in adapters]))


def test_flags(recording):
    """Tokens first is the same transposed; without a class token the authors drop the first token, we have none."""
    x, recorded = recording.take("adapter", "in.x"), recording.files["adapter"]
    same = (
        torch.equal(recorded[f"layer{i}.out"].transpose(0, 1), recorded["flag.batch_first_false"])
        for i in layers(recording)
    )
    adapter = build_adapter(recording, "adapter", layers(recording)[list(same).index(True)])
    recording.check("adapter", "flag.batch_first_false", adapter(x, grid(recording)).transpose(0, 1))
    recording.check("adapter", "flag.no_cls", adapter(x[:, 1:], grid(recording)))


def test_learned_vectors(recording):
    x = recording.take("adapter_with_token", "in.x")
    names = [name for name in recording.files["adapter_with_token"] if name.endswith(".out")]
    for name in names:
        layer = int(name.removeprefix("layer").removesuffix(".out"))
        adapter = build_adapter(recording, "adapter_with_token", layer)
        recording.check("adapter_with_token", name, adapter(x, grid(recording)))
    assert recording.config["token_dim"] == adapter.adapter.experts.tokens.shape[1]


# ---- the tiny model ----


def tiny_config(recording, **options) -> EarthAdapterConfig:
    told = recording.config
    sizes = {"image_size": told["img"], "patch_size": told["patch"], "width": told["D"], "depth": told["L"]}
    sizes |= {"heads": told["heads"], "layer_scale": told["init_values"], "out_layers": tuple(told["out_indices"])}
    adapters = {"adapter_dim": told["hidden"], "fft_layers": tuple(told["fft_layer"]), "cutoff": told["cutoff"]}
    adapters |= {"adapter_layers": tuple(told["adapter_layer"]), "scale": told["scale"]}
    return EarthAdapterConfig(
        **{**sizes, **adapters, "head": "light", "head_width": 4, "classes": ("a", "b"), **options}
    )


def build_model(recording, **options) -> EarthAdapter:
    config, state = from_original(recording.take_all("tiny_model", "w."), like=tiny_config(recording, **options))
    model = EarthAdapter(config).eval()
    found = model.load_state_dict(state, strict=False)
    assert found.unexpected_keys == [] and all(name.startswith("head.") for name in found.missing_keys)
    return model


def run_model(recording, model: EarthAdapter) -> None:
    image = recording.take("tiny_model", "in.image")

    def check(name: str, value: Tensor) -> None:
        recording.check("tiny_model", name, value)

    backbone = model.backbone
    check("embed.tokens", backbone._pos_embed(backbone.patch_embed(image)))
    block = backbone.blocks[0]
    probe = recording.take("tiny_model", "eps_probe.in")
    check("eps_probe.block0_out", host_class(block).forward(block, probe))
    maps = model.maps(image)
    levels = pyramid(maps)
    stored = [levels[0][:, ::4, ::3, ::3], levels[1][:, ::4], *levels[2:]]
    for i, (one, level) in enumerate(zip(maps, stored, strict=True)):
        check(f"stage{i}.tokens_map", one)
        check(f"stage{i}.pyramid", level)
    loss = sum(level.square().mean() for level in levels)
    loss.backward()
    check("loss.value", loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check_gradients(recording, model, gradients)


def check_gradients(recording, model: EarthAdapter, gradients: dict[str, Tensor]) -> None:
    """Of all that is trained; what gets no gradient in the authors' module we do not even have."""
    filled = {name: gradients.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}
    filled = {name: value for name, value in filled.items() if ".frequency_adapter." in name}
    written = {name.removeprefix("backbone."): value for name, value in to_original(filled).items()}
    scale = torch.zeros(recording.config["L"])
    scale[layers(recording)] = written["refine_feat.scale"]
    written["refine_feat.scale"] = scale
    assert {f"grad.{name}" for name in written} == {n for n in recording.files["tiny_model"] if n.startswith("grad.")}
    assert written.keys().isdisjoint(recording.config["no_grad_trainable"])
    for name, value in written.items():
        recording.check("tiny_model", f"grad.{name}", value)


def test_tiny_model(recording):
    run_model(recording, build_model(recording))


def test_parameters_are_as_many_as_recorded(recording):
    """With dead parts, the parameters of the authors' module; they also hold parts that maps do not use."""
    model = build_model(recording, compact=False)
    weights = recording.take_all("tiny_model", "w.")
    idle = sum(value.numel() for name, value in weights.items() if not is_used(recording, name))
    idle += recording.config["L"] - len(layers(recording))
    adapters = [p for name, p in model.backbone.named_parameters() if ".frequency_adapter." in name]
    assert sum(p.numel() for p in adapters) + idle == recording.config["trainable_after_train_mode"]
    dead = [p for name, p in model.backbone.named_parameters() if ".dead." in name]
    listed = [name for name in recording.config["no_grad_trainable"] if is_used(recording, name)]
    assert sum(p.numel() for p in dead) == sum(weights[name].numel() for name in listed)
    assert not any(p.requires_grad for p in dead)
    unused = sum(weights[name].numel() for name in UNUSED)
    total = sum(p.numel() for p in model.backbone.parameters())
    assert total + unused + idle == recording.config["total_params"]
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert all(".frequency_adapter." in name for name in trained)
    assert recording.config["trainable_prefixes"] == ["refine_feat"]


def test_the_file_survives_the_way_back(recording):
    model = build_model(recording, compact=False)
    written = to_original({n: v for n, v in model.state_dict().items() if not n.startswith("head.")})
    weights = {n: v for n, v in recording.take_all("tiny_model", "w.").items() if is_used(recording, n)}
    weights["refine_feat.scale"] = weights["refine_feat.scale"][layers(recording)]
    assert {name.removeprefix("backbone.") for name in written} == set(weights) - set(UNUSED)
    for name, value in written.items():
        assert value.equal(weights[name.removeprefix("backbone.")]), name


# ---- the released size ----


def formula(count: int, rank: int, amplitude: float) -> Tensor:
    """Values of the recorded closed formula."""
    i = torch.arange(count, dtype=torch.float64)
    wave = 0.7390851 * i * (rank % 7 + 1) + 1.3 * rank + 0.0001 * i * i / (1 + 0.001 * i)
    return (amplitude * wave.sin()).float()


def test_native_size(recording):
    told, spec = recording.config["native"], recording.json("native_weights")
    like = EarthAdapterConfig(
        depth=told["depth"],
        adapter_dim=told["dim"],
        fft_layers=tuple(told["fft_layer"]),
        cutoff=told["cutoff"],
        compact=False,
        head="light",
        head_width=1,
    )
    model = EarthAdapter(like).eval()
    blank = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    shapes = {name.removeprefix("backbone."): value.shape for name, value in to_original(blank).items()}
    shapes |= {"mask_token": (1, like.width), "norm.weight": (like.width,), "norm.bias": (like.width,)}
    state = {}
    for name, rank, amplitude in spec["order"]:
        if amplitude is None:
            state[name] = torch.full(shapes[name], recording.config["scale"])
            continue
        if name.startswith("refine_feat.") and name not in shapes:
            continue  # their adapters have 24 layers whatever the backbone has
        values = formula(math.prod(shapes[name]), rank, amplitude).reshape(shapes[name])
        state[name] = values + 1 if "norm" in name and name.endswith(".weight") else values
    assert set(state) == set(shapes)
    probe = state["blocks.0.attn.qkv.weight"].flatten()[:16]
    recording.check("native_model", "check.blocks.0.attn.qkv.weight_first16", probe)
    config, converted = from_original(state, like=like)
    assert config == like
    model.load_state_dict({**model.state_dict(), **converted})
    image = formula(told["B"] * 3 * 512 * 512, 101, 1.0).reshape(told["B"], 3, 512, 512)
    recording.check("native_model", "check.image_first16", image.flatten()[:16])
    with torch.no_grad():
        levels = pyramid(model.maps(image))
    for i, level in enumerate(levels):
        step = max(1, level.shape[-1] // 8)
        both = torch.stack([level.double().mean(), level.double().std(unbiased=False)])
        recording.check("native_model", f"stage{i}.shape", torch.tensor(level.shape))
        recording.check("native_model", f"stage{i}.sample", level[:, ::64, ::step, ::step], NATIVE)
        recording.check("native_model", f"stage{i}.mean_std", both, NATIVE)


# ---- adaptation, conversion, decoder ----


def test_mixing(recording):
    def take(name: str) -> Tensor:
        return recording.take("dacs", name)

    labels, pseudo = take("src_label"), take("pseudo_label")
    classes = [take(f"chosen_classes{i}") for i in range(len(labels))]
    for own, chosen in zip(labels, classes, strict=True):
        assert len(half_of_classes(own)) == len(chosen) and set(chosen.tolist()) <= set(own.unique().tolist())
    pasted = chosen_pixels(labels, classes)
    recording.check("dacs", "mask", pasted)
    recording.check("dacs", "mix_img", paste(take("src_img"), take("tgt_img"), pasted))
    recording.check("dacs", "mix_label", paste(labels, pseudo, pasted))


class Pair(nn.Module):
    """A backbone and a decoder of one linear layer each."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for part in ("backbone", "decode_head"):
            rows, columns = state[f"{part}.weight"].shape
            self.add_module(part, nn.Linear(columns, rows))
        self.load_state_dict(state)


def test_teacher(recording):
    teacher = Pair(recording.take_all("dacs", "ema_start."))
    for i, step in enumerate(recording.config["ema_iters"]):
        follow(teacher, Pair(recording.take_all("dacs", f"ema_step{i}.student.")), step)
        for name, value in teacher.named_parameters():
            recording.check("dacs", f"ema_step{i}.teacher.{name}", value)


def test_patches_of_another_size(recording):
    state = recording.take_all("dinov2_convert", "in.")
    kernel, crop = recording.config["convert"]["kernel"], recording.config["convert"]["crop"]
    found = to_grid(state, kernel, (crop[0] // kernel, crop[1] // kernel))
    for name, value in found.items():
        recording.check("dinov2_convert", f"out.{name}", value)


def test_the_decoder_has_the_recorded_keys(recording):
    sizes = recording.json("decode_head_keys")
    with torch.device("meta"):
        model = EarthAdapter(EarthAdapterConfig(task="dg_r2u"))
    own = {name.removeprefix("head."): p for name, p in model.state_dict().items() if name.startswith("head.")}
    adapters = {name: p for name, p in model.state_dict().items() if ".frequency_adapter." in name}
    written = to_original({**adapters, **{f"head.{name}": value for name, value in own.items()}})
    heads = {name: value for name, value in written.items() if name.startswith("decode_head.")}
    assert {name: value.numel() for name, value in heads.items()} == sizes
    again, unknown = head_from_original({n.removeprefix("decode_head."): v for n, v in heads.items()})
    assert unknown == [] and {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in own.items()}


# ---- mutants: each comparison above can fail ----


def swap(adapter: FrequencyAdapter) -> None:
    if isinstance(adapter.adapter, FrequencyMoE):
        for value in adapter.adapter.experts.packed_parameters().values():
            value.data = value.data[[0, 2, 1]]


def symmetric(adapter: FrequencyAdapter) -> None:
    adapter.adapter.experts.box = "symmetric"


def other_activation(adapter: FrequencyAdapter) -> None:
    adapter.adapter.experts.act = F.gelu


def no_adapter(adapter: FrequencyAdapter) -> None:
    adapter.scale.data.zero_()


@pytest.mark.parametrize("mutant", [swap, symmetric, other_activation, no_adapter])
def test_changed_adapters_are_caught(recording, mutant):
    layer = fft_layer(recording)
    with pytest.raises(AssertionError, match="differs by"):
        run_layer(recording, layer, mutant)


def test_another_cut_off_is_caught(recording, monkeypatch):
    monkeypatch.setattr(mmoe.frequency, "half_width", lambda grid, cutoff: math.ceil(min(grid) * cutoff / 2))
    with pytest.raises(AssertionError):
        check_split(recording)


@pytest.mark.parametrize("mutant", ["eps", "no adapters", "final norm"])
def test_changed_models_are_caught(recording, mutant):
    model = build_model(recording)
    if mutant == "eps":
        model.backbone.blocks[0].norm1.eps = model.backbone.blocks[0].norm2.eps = 1e-5
    elif mutant == "final norm":
        model.maps = lambda image: [
            F.layer_norm(one.movedim(1, -1), one.shape[1:2]).movedim(-1, 1) for one in EarthAdapter.maps(model, image)
        ]
    else:
        for block in model.backbone.blocks:
            block.frequency_adapter.scale.data.zero_()
    with pytest.raises(AssertionError, match="differs by"):
        run_model(recording, model)


def test_nothing_was_left_out(recording, whole_module):
    assert recording.untouched() == []
    assert {"native_weights", "decode_head_keys"} <= recording.compared
