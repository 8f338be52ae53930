"""Vision hosts of three libraries: their blocks are found, and frequency adapters follow them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import mmoe
from mmoe.errors import BadInput, BadOverride, Refused
from mmoe.frequency import FrequencyMoE
from mmoe.frequency_maps import frequency_maps
from mmoe.surgery import add_frequency_adapters, frequency_adapters, vision_blocks
from mmoe.surgery.blocks import extend, host_class

D, DEPTH, PATCH = 32, 3, 8


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, **{**sizes, "dynamic_img_size": True, **options})


def transformers_vit(name: str, **options: Any) -> nn.Module:
    sizes = {"hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"image_size": 32, "patch_size": PATCH, "attn_implementation": "sdpa"}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, f"{name}Model")(config)


def open_clip_model(batch_first: bool = True) -> nn.Module:
    vision = open_clip.CLIPVisionCfg(layers=DEPTH, width=D, head_width=8, patch_size=PATCH, image_size=(32, 48))
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=D, heads=4, layers=2)
    clip = open_clip.CLIP(16, vision, text)
    if not batch_first:
        from open_clip.transformer import Transformer

        clip.visual.transformer = Transformer(D, DEPTH, 4, batch_first=False)
    return clip


def run(model: nn.Module, pixels: Tensor) -> Tensor:
    """All tokens that come out: a class token alone would not depend on the last adapter."""
    if isinstance(model, open_clip.CLIP):
        found = model.visual.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
        return found["image_intermediates"][-1]
    if not hasattr(model, "config"):
        return model.forward_features(pixels)
    resized = "interpolate_pos_encoding" in type(model).forward.__code__.co_varnames or hasattr(model, "layers")
    return model(pixels, **({"interpolate_pos_encoding": True} if resized else {})).last_hidden_state


# Makes the host; name of its blocks; prefix tokens; pixels that it takes besides the square ones.
HOSTS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "timm ViT": (timm_vit, "blocks", 1),
    "timm DINOv2 with registers": (lambda: timm_vit("vit_small_patch14_reg4_dinov2"), "blocks", 5),
    "timm DINOv3": (lambda: timm_vit("vit_small_patch16_dinov3"), "blocks", 5),
    "transformers Dinov2": (lambda: transformers_vit("Dinov2"), "encoder.layer", 1),
    "transformers Dinov2 with registers": (
        lambda: transformers_vit("Dinov2WithRegisters", num_register_tokens=4),
        "encoder.layer",
        5,
    ),
    "transformers DINOv3": (lambda: transformers_vit("DINOv3ViT", num_register_tokens=2), "model.layer", 3),
    "transformers ViT": (lambda: transformers_vit("ViT"), "layers", 1),
    "open_clip": (open_clip_model, "visual.transformer.resblocks", 1),
    "open_clip, tokens first": (lambda: open_clip_model(batch_first=False), "visual.transformer.resblocks", 1),
}
hosts = pytest.mark.parametrize("name", HOSTS)


def make(name: str) -> nn.Module:
    return HOSTS[name][0]().eval()


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 48)


def perturbed(model: nn.Module) -> nn.Module:
    """Scales up the adapters, so that what they do is far above rounding."""
    for adapter in frequency_adapters(model).values():
        nn.init.ones_(adapter.scale)
        nn.init.normal_(adapter.adapter.experts.down_proj)
    return model


@hosts
def test_the_blocks(name: str) -> None:
    model = make(name)
    stack = vision_blocks(model)
    assert (stack.name, stack.prefix, stack.dim) == (*HOSTS[name][1:], D)
    assert list(stack.blocks) == list(model.get_submodule(stack.name)) and len(stack.blocks) == DEPTH
    assert stack.tokens_first == name.endswith("tokens first")
    seen: list[Tensor] = []
    stack.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, pixels())
    rows, columns = stack.grid(32, 48)
    assert seen[0].shape[0 if stack.tokens_first else 1] == stack.prefix + rows * columns


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_models_without_one_stack_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(Refused):
        vision_blocks(model)


@hosts
def test_zero_init_changes_nothing_and_only_adapters_learn(name: str) -> None:
    model, images = make(name), pixels()
    adapted = add_frequency_adapters(model, 4, fft_layers=[1], cutoff=0.6, zero_init=True)
    with torch.no_grad():  # with gradients torch takes another path through frozen attention
        expected = run(model, images)
        assert run(adapted, images).equal(expected)
    out = run(perturbed(adapted), images)
    assert not torch.allclose(out, expected, atol=1e-3)
    (out * torch.randn_like(out)).sum().backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    assert trained == {n for n in adapted.state_dict() if ".frequency_adapter." in n}
    assert not frequency_adapters(model) and host_class(vision_blocks(model).blocks[0]) is type(
        vision_blocks(model).blocks[0]
    )


@hosts
def test_each_block_is_followed_by_its_adapter(name: str) -> None:
    """Block by block, on the tokens that the block gave, prefix tokens left alone."""
    model, images = make(name), pixels()
    adapted = perturbed(add_frequency_adapters(model, 4, fft_layers=[0, 2], adapter_layers=[0, 2], cutoff=0.6))
    stack, plain = vision_blocks(adapted), vision_blocks(model)
    rows, columns = stack.grid(32, 48)
    calls: dict[int, tuple[Any, ...]] = {}
    for i, block in enumerate(stack.blocks):

        def keep(_, args, kwargs, out, i=i):
            calls[i] = args, kwargs, out

        block.register_forward_hook(keep, with_kwargs=True)
    run(adapted, images)
    for i, (args, kwargs, found) in calls.items():
        expected = plain.blocks[i](*args, **kwargs)
        if i != 1:
            expected = expected.transpose(0, 1) if stack.tokens_first else expected
            own = stack.blocks[i].frequency_adapter(expected, (rows, columns))
            assert own[:, : stack.prefix].equal(expected[:, : stack.prefix])
            assert not torch.allclose(own[:, stack.prefix :], expected[:, stack.prefix :], atol=1e-3)
            expected = own.transpose(0, 1) if stack.tokens_first else own
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@hosts
def test_reloading_is_exact(name: str) -> None:
    model, images = make(name), pixels()
    adapted = perturbed(add_frequency_adapters(model, 4, fft_layers=[1], cutoff=0.6))
    state = adapted.state_dict()
    assert set(model.state_dict()) < set(state), "names of the host stay"
    fresh = add_frequency_adapters(model, 4, fft_layers=[1], cutoff=0.6)
    own = {key: value for key, value in state.items() if ".frequency_adapter." in key}
    assert fresh.load_state_dict(own, strict=False).unexpected_keys == []
    expected = run(adapted, images)
    assert run(fresh, images).equal(expected)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert run(other, images).equal(expected)
        alone = {id(part) for part in adapted.modules()}
        assert not any(id(part) in alone for part in other.modules())
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    assert run(torch.load(buffer, weights_only=False), images).equal(expected)


@hosts
def test_routers_are_seen_and_maps_shown(name: str) -> None:
    adapted, images = add_frequency_adapters(make(name), 4, fft_layers=[0, 2], cutoff=0.6), pixels()
    names = [layer for layer, moe in mmoe.moe_layers(adapted).items() if isinstance(moe, FrequencyMoE)]
    assert names == [f"{HOSTS[name][1]}.{i}.frequency_adapter.adapter" for i in (0, 2)]
    with torch.no_grad(), mmoe.trace(adapted) as routing:
        run(adapted, images)
    found = frequency_maps(adapted, run, adapted, images)
    assert list(found) == routing.layers == names
    for layer, maps in found.items():
        assert maps.features.shape == (2, 4, 6, D) and maps.weights.shape == (2, 4, 6, 3)
        torch.testing.assert_close(maps.low + maps.high, maps.features, atol=1e-6, rtol=0)
        torch.testing.assert_close(maps.weights.flatten(0, 2), routing[layer].weights)


@pytest.mark.parametrize("name", ["timm ViT", "transformers Dinov2 with registers", "open_clip"])
def test_the_frequency_split_stays_in_fp32_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, seen = add_frequency_adapters(make(name), 4, fft_layers=[0], cutoff=0.6), set()
    transform = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda x, **o: seen.add(x.dtype) or transform(x, **o))
    expected = run(adapted, images := pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(adapted, images)
    run(copy.deepcopy(adapted).bfloat16(), images.bfloat16())
    assert seen == {torch.float32}
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "name", ["timm ViT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformers Dinov2", "open_clip"))]
)
def test_compiled(name: str) -> None:
    adapted, images = perturbed(add_frequency_adapters(make(name), 4, fft_layers=[1], cutoff=0.6)), pixels()
    compiled = torch.compile(lambda x: run(adapted, x), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), run(adapted, images), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_for_several_sizes() -> None:
    adapted = perturbed(add_frequency_adapters(timm_vit().eval(), 4, fft_layers=[0], cutoff=0.9))
    compiled = torch.compile(adapted, backend="aot_eager")
    with torch.no_grad():
        for size in ((32, 32), (32, 48), (48, 32)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(compiled(images), adapted(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["timm ViT", "transformers Dinov2", "open_clip"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    """Pictures of several shapes, two of one area, wait for backward together."""
    model = perturbed(add_frequency_adapters(make(name), 4, fft_layers=[0, 1], cutoff=0.9)).train()
    shapes = [(32, 48)] if name == "open_clip" else [(32, 48), (48, 32), (32, 64)]
    batches = [torch.randn(1, 3, *shape) for shape in shapes]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        losses = [run(model, batch).square().mean() for batch in batches]
        torch.stack(losses).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing(True)
    found = gradients()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-4)


def test_features_of_a_clip_are_adapted() -> None:
    model, images = make("open_clip"), pixels()
    adapted = add_frequency_adapters(model, 4, fft_layers=[0], zero_init=True)
    with torch.no_grad():
        assert adapted.encode_image(images).equal(model.encode_image(images))
        assert not torch.allclose(perturbed(adapted).encode_image(images), model.encode_image(images), atol=1e-3)


def test_hidden_states_of_transformers_are_the_adapted_ones() -> None:
    adapted = perturbed(add_frequency_adapters(transformers_vit("Dinov2").eval(), 4))
    out = adapted(torch.randn(1, 3, 32, 32), output_hidden_states=True)
    torch.testing.assert_close(adapted.layernorm(out.hidden_states[-1]), out.last_hidden_state)
    assert len(out.hidden_states) == DEPTH + 1


def test_blocks_that_return_tuples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x + self.linear(self.norm(x)), "more"

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.blocks = nn.Conv2d(3, D, 8, 8), nn.ModuleList([Two(), Two()])

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            x = self.patch(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x, more = block(x)
            return x, more

    host, images = Host(), torch.randn(1, 3, 32, 16)
    adapted = add_frequency_adapters(host, 4, fft_layers=[1], zero_init=True)
    assert adapted(images)[0].equal(host(images)[0]) and adapted(images)[1] == "more"
    assert not perturbed(adapted)(images)[0].equal(host(images)[0])


def test_blocks_that_split_frequencies_have_adapters() -> None:
    with pytest.raises(
        BadOverride, match=r"(?s)fft_layers=\[0\].*block 0 has no adapter.*try: adapter_layers=\[0, 1\]"
    ):
        add_frequency_adapters(timm_vit(), 4, fft_layers=[0], adapter_layers=[1])


def test_layers_that_are_not_chosen_stay_as_they_are() -> None:
    adapted = add_frequency_adapters(timm_vit(), 4, fft_layers=[1], adapter_layers=[1, 2])
    assert list(frequency_adapters(adapted)) == ["blocks.1.frequency_adapter", "blocks.2.frequency_adapter"]
    assert [moe for moe in mmoe.moe_layers(adapted)] == ["blocks.1.frequency_adapter.adapter"]
    assert type(adapted.blocks[0]) is timm.models.vision_transformer.Block


def test_adapters_are_of_the_device_and_type_of_their_blocks() -> None:
    adapted = add_frequency_adapters(timm_vit().to("meta", torch.bfloat16), 8, fft_layers=[0])
    kinds = {(p.device.type, p.dtype) for p in adapted.parameters()}
    assert kinds == {("meta", torch.bfloat16)}
    assert adapted(torch.zeros(1, 3, 32, 32, device="meta", dtype=torch.bfloat16)).shape == (1, 5)


def test_in_place_and_not_frozen() -> None:
    model = timm_vit()
    assert add_frequency_adapters(model, 4, freeze=False, inplace=True) is model
    assert all(p.requires_grad for p in model.parameters()) and len(frequency_adapters(model)) == DEPTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fft_layers": [3]}, "a layer of fft_layers=3\n  a layer of fft_layers is a whole number from 0 to 2"),
        ({"adapter_layers": [-1]}, "a layer of adapter_layers=-1"),
        ({"fft_layers": 1}, "fft_layers=1\n  it is a list of blocks"),
        ({"token_dim": 4}, "token_dim=4 with token_grid=None"),
        (
            {"token_dim": 4, "token_grid": (4,)},
            "token_dim=4 with token_grid=(4,)\n  a grid is its numbers of",
        ),
        ({"token_dim": 4, "token_grid": 16}, "token_dim=4 with token_grid=16"),
        ({"token_dim": 4, "token_grid": (0, 4)}, "token_dim=4 with token_grid=(0, 4)"),
        ({"dim": 0}, "dim=0"),
        ({"cutoff": 2.0}, "cutoff=2.0"),
        ({"box": "round"}, "box='round'"),
        ({"freeze": "no"}, "freeze='no'"),
        ({"zero_init": "no"}, "zero_init='no'"),
        ({"compact": 0}, "compact=0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    model = timm_vit()
    with pytest.raises(BadOverride) as error:
        add_frequency_adapters(model, **{"dim": 4} | options, inplace=True)
    assert str(error.value).startswith(message)
    assert all(p.requires_grad for p in model.parameters()), "a host that gets no adapters stays as it is"
    assert len(frequency_adapters(add_frequency_adapters(model, 4, inplace=True))) == DEPTH


def test_a_host_that_cannot_be_extended_stays_as_it_is() -> None:
    model = timm_vit()
    model.blocks[2].forward = model.blocks[2].forward
    with pytest.raises(Refused, match="its forward is not that of its class"):
        add_frequency_adapters(model, 4, inplace=True)
    assert all(p.requires_grad for p in model.parameters()) and not frequency_adapters(model)
    del model.blocks[2].forward
    model.blocks[2] = model.blocks[1]
    with pytest.raises(Refused, match="it stands in several places"):
        add_frequency_adapters(model, 4, inplace=True)
    add_frequency_adapters(model, 4, adapter_layers=[0, 1], inplace=True)


def test_what_is_no_model() -> None:
    with pytest.raises(BadInput, match="it is no model"):
        add_frequency_adapters("vit_tiny", 4)


def test_adapters_twice() -> None:
    with pytest.raises(Refused, match="it has them already"):
        add_frequency_adapters(add_frequency_adapters(timm_vit(), 4), 4)


def test_dropped_patches_are_told() -> None:
    adapted = add_frequency_adapters(timm_vit(patch_drop_rate=0.5), 4).train()
    with pytest.raises(BadInput, match="adapt 9 tokens\n  the picture has 1 and 4 x 4"):
        adapted(torch.randn(1, 3, 32, 32))


def test_learned_vectors_fix_the_grid() -> None:
    adapted = add_frequency_adapters(timm_vit(), 4, fft_layers=[0], token_dim=5, token_grid=(4, 4))
    assert adapted(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    for shape, grid in (((32, 48), "4 x 6"), ((16, 64), "2 x 8")):
        with pytest.raises(
            BadInput, match=f"a picture of {grid} patches\n  its learned vectors belong to 4 x 4 patches"
        ):
            adapted(torch.randn(1, 3, *shape))


def test_only_once_and_only_what_a_class_computes() -> None:
    class Doubles:
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    linear, x = nn.Linear(2, 2), torch.randn(1, 2)
    expected = linear(x)
    assert extend(linear, Doubles)(x).equal(2 * expected) and isinstance(linear, nn.Linear)
    with pytest.raises(Refused, match="it was extended before"):
        extend(linear, Doubles)
    other = nn.Linear(2, 2)
    other.forward = lambda x: x
    with pytest.raises(Refused, match="its forward is not that of its class"):
        extend(other, Doubles)


def test_hosts_whose_class_token_joins_late_or_whose_tokens_are_maps() -> None:
    from timm.models.cait import Cait
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    sam = VisionTransformerSAM(**sizes, window_size=0, neck_chans=8, num_classes=0)
    for host in (Cait(**sizes, num_classes=3).eval(), sam.eval()):
        image = torch.randn(2, 3, 32, 32)
        same = add_frequency_adapters(host, 4, fft_layers=[1], zero_init=True)
        torch.testing.assert_close(same(image), host(image), atol=1e-5, rtol=1e-4)
        adapted = add_frequency_adapters(host, 4, fft_layers=[1])
        assert not torch.equal(adapted(image), host(image))
        with mmoe.trace(adapted) as routing:
            adapted(image)
        assert [len(one.weights) for one in routing] == [2 * 16]
