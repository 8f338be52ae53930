"""CLIP-MoE as its users meet it: predictions, features, the host as an open_clip model, and conversions.

That it computes what the authors' code computes is shown by tests/parity/test_clip_moe.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import mmoe
import zoo
from mmoe.errors import BadInput, BadOverride, LoadMismatch, Refused, UnknownModel, UnknownWeights
from mmoe.moe import moe_layers
from zoo.clip_moe import convert
from zoo.clip_moe.convert import (
    difference,
    from_open_clip,
    from_original,
    lengthen,
    open_clip_licence,
    stretch_positions,
    to_original,
    upcycle,
)
from zoo.clip_moe.model import ClipMoE, ClipMoEConfig

LABELS = ["a fox", "a pizza", "a guitar"]

# Outputs of a model before and after upcycling differ by the order of a few sums only: at most a few units in the
# last place of fp32 (1.2e-7), grown over the blocks.
ROUNDING = 1e-5


@pytest.fixture
def pictures(root: Path) -> list[Path]:
    return [root / "assets" / "examples" / f"{name}.png" for name in ("fox", "pizza")]


# ---- predictions ----


def test_one_picture(tiny: Any, fox: Path) -> None:
    out = tiny.predict(fox, LABELS)
    assert out.labels == tuple(LABELS)
    assert out.probs.shape == out.cosines.shape == (1, 3)
    torch.testing.assert_close(out.probs.sum(-1), torch.ones(1))
    assert out.cosines.abs().max() <= 1 + 1e-5
    scale = tiny.clip.logit_scale.exp()
    torch.testing.assert_close(out.probs, (scale * out.cosines).softmax(-1).detach())
    assert not out.probs.requires_grad


def test_many_pictures_give_what_each_gives_alone(tiny: Any, pictures: list[Path]) -> None:
    many = tiny.predict(pictures, LABELS)
    alone = [tiny.predict(picture, LABELS).cosines for picture in pictures]
    torch.testing.assert_close(many.cosines, torch.cat(alone), atol=1e-5, rtol=0)


def test_other_labels_change_no_cosine(tiny: Any, fox: Path) -> None:
    """Short texts stand in one batch with long ones, so padding must not matter."""
    long = "a drawing of a small orange animal with a bushy tail that looks at you"
    few, many = tiny.predict(fox, ["a fox"]), tiny.predict(fox, ["a fox", long])
    torch.testing.assert_close(few.cosines[:, 0], many.cosines[:, 0], atol=1e-5, rtol=0)


def test_kinds_of_pictures(tiny: Any, fox: Path) -> None:
    image = Image.open(fox).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    array = np.asarray(white)
    expected = tiny.predict(fox, LABELS).cosines
    tensor = torch.from_numpy(array / 255.0)
    for picture in (str(fox), image, white, array, array / 255.0, tensor):
        torch.testing.assert_close(tiny.predict(picture, LABELS).cosines, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tiny.predict(tensor.bfloat16(), LABELS).cosines, expected, atol=2e-2, rtol=0)


def test_the_best_labels(tiny: Any, pictures: list[Path]) -> None:
    out = tiny.predict(pictures, LABELS)
    best = out.top(2, picture=1)
    assert [label for label, _ in best] == [LABELS[i] for i in out.probs[1].argsort(descending=True)[:2]]
    assert best[0][1] >= best[1][1]
    assert len(out.top(9)) == 3
    assert json.loads(json.dumps(out.as_dict()))["labels"] == LABELS


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"k": -1}, "k=-1\n  k is a whole number of at least 1"),
        ({"picture": 1}, "picture is a whole number from 0 to 0"),
    ],
)
def test_best_labels_of_nothing(options: dict[str, int], wrong: str, tiny: Any, fox: Path) -> None:
    with pytest.raises(BadOverride) as error:
        tiny.predict(fox, ["a fox"]).top(**options)
    assert wrong in str(error.value)


def test_routers_that_compare_tokens_do_so_inside_a_sample(small: Any, pictures: list[Path]) -> None:
    model, labels = small(router="expert_choice"), ["a fox", "two pizzas on a table"]
    together = model.predict(pictures, labels).cosines
    alone = torch.cat([model.predict(picture, labels).cosines for picture in pictures])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together[:, :1], model.predict(pictures, labels[:1]).cosines)
    batch = model.preprocess(pictures)
    hidden = model.hidden_states(batch["image"])
    torch.testing.assert_close(hidden[:1], model.hidden_states(batch["image"][:1]))


def test_side_input_of_the_caller_stays(small: Any, fox: Path) -> None:
    model = small(router="fixed")
    image = model.preprocess(fox)["image"]
    routes = torch.arange(5) % 4  # class token and 2 x 2 patches
    with mmoe.with_context(model.clip.visual, mmoe.Context(expert_ids=routes)), mmoe.trace(model) as routing:
        model.encode_image(image)
    assert [run.experts.flatten().tolist() for run in routing] == [routes.tolist()] * 2
    assert routing[0].context.group_ids.tolist() == [0] * 5


def test_a_template(tiny: Any, fox: Path) -> None:
    out = tiny.predict(fox, ["fox", "pizza"], template="a picture of a {}")
    said = tiny.predict(fox, ["a picture of a fox", "a picture of a pizza"])
    assert out.cosines.equal(said.cosines) and out.labels == ("fox", "pizza")


@pytest.mark.parametrize(
    ("images", "labels", "template", "lines"),
    [
        ("fox.png", [], "{}", ["cannot compare a picture with no text", "there are none"]),
        ("fox.png", ["a fox", " "], "{}", ["cannot compare a picture with no text", "one label is empty"]),
        ("fox.png", ["a fox"], "a fox", ["cannot use the template 'a fox'", "it has no {} for the label"]),
        ("fox.png", [1], "{}", ["cannot read 1 as a text", "its type is int"]),
        ("fox.png", None, "{}", ["cannot read None as a text", "its type is NoneType"]),
        (None, ["a fox"], "{}", ["cannot predict without a picture", "none is given"]),
        ([], ["a fox"], "{}", ["cannot prepare an empty list of pictures", "the list is empty"]),
        ("gone.png", ["a fox"], "{}", ["cannot read the picture 'gone.png'", "no such file"]),
    ],
)
def test_inputs_that_cannot_be_used(images: Any, labels: Any, template: str, lines: list[str], tiny: Any) -> None:
    with pytest.raises(BadInput) as error:
        tiny.predict(images, labels, template)
    for line, expected in zip(str(error.value).splitlines()[: len(lines)], lines, strict=True):
        assert line.strip().startswith(expected)


# ---- texts ----


def test_long_texts_are_cut_and_end_in_the_end_token(tiny: Any) -> None:
    length, end = tiny.config.context_length, tiny.config.vocab_size - 1
    ids = tiny.tokenizer(["fox " * 500, "fox"])
    assert ids.shape == (2, length)
    assert int(ids[0, -1]) == end and int(ids[1].argmax()) < length - 1
    assert tiny.encode_text(ids).isfinite().all()


def test_padding_is_not_routed(tiny: Any) -> None:
    """With `route_padding=False` only tokens up to the end token count; features are those of the whole text."""
    ids = tiny.tokenizer(["a fox", "a fox and a pizza and a guitar on a rocket"])
    real = int((ids.argmax(-1) + 1).sum())
    whole = zoo.load("clip_moe_tiny", device="cpu", route_padding=True)
    with torch.no_grad():
        with mmoe.trace(tiny) as routing:
            features = tiny.encode_text(ids)
        with mmoe.trace(whole) as padded:
            expected = whole.encode_text(ids)
    top_k = tiny.config.top_k
    assert {int(layer.counts().sum()) for layer in routing} == {real * top_k}
    assert {int(layer.counts().sum()) for layer in padded} == {ids.numel() * top_k}
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


# ---- features ----


def test_features(tiny: Any, fox: Path) -> None:
    batch = tiny.preprocess(fox, "a fox")
    size, length = tiny.config.image_size, tiny.config.context_length
    assert batch["image"].shape == (1, 3, size, size) and batch["text"].shape == (1, length)
    for features in (tiny.encode_image(batch["image"]), tiny.encode_text(batch["text"])):
        assert features.shape == (1, tiny.config.embed_dim)
        assert (features.norm(dim=-1) - 1).abs() > 1e-3, "not normalised"
    norm = tiny.encode_image(batch["image"], normalize=True).norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones(1))


def test_hidden_states_are_tokens_with_the_class_token_first(tiny: Any, fox: Path) -> None:
    image = tiny.preprocess(fox)["image"]
    patches = tiny.grid[0] * tiny.grid[1]
    assert patches == (tiny.config.image_size // tiny.config.patch_size) ** 2
    seen: list[torch.Tensor] = []
    blocks = tiny.clip.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda m, args, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        tiny.encode_image(image)
        for hook in hooks:
            hook.remove()
        for layer in range(-len(blocks), len(blocks)):
            states = tiny.hidden_states(image, layer)
            assert states.shape == (1, 1 + patches, tiny.config.vision_width)
            torch.testing.assert_close(states, seen[layer])
        assert tiny.hidden_states(image).equal(tiny.hidden_states(image, -2))
    for layer in (len(blocks), -len(blocks) - 1):
        with pytest.raises(BadInput, match=f"no block {layer}"):
            tiny.hidden_states(image, layer)


def test_where_the_rows_of_a_routing_are(tiny: Any, pictures: list[Path]) -> None:
    texts = ["a fox", "a slice of pizza on a plate"]
    batch = tiny.preprocess(pictures, texts)
    with torch.no_grad(), mmoe.trace(tiny) as routing:
        tiny(**batch)
    image, text = tiny.views(batch)
    assert (image.modality, image.grid, image.prefix) == ("image", tiny.grid, 1)
    assert text.tokens[0] == ("<start_of_text>", "a", "fox", "<end_of_text>")
    for view, samples in ((image, pictures), (text, texts)):
        layers = routing.select(view.layers)
        assert len(layers) == sum(name.startswith(view.layers.rstrip("*")) for name in moe_layers(tiny))
        for index in range(len(samples)):
            rows = view.of_sample(layers[0].experts, index)
            length = len(text.tokens[index]) if view is text else tiny.grid[0] * tiny.grid[1]
            assert rows.shape == (length, tiny.config.top_k)
            assert (rows < tiny.config.num_experts).all(), "padding is left out"


def test_tokens_are_shown_as_text(tiny: Any) -> None:
    (view,) = tiny.views(tiny.preprocess(texts=["café 狐"]))
    (shown,) = view.tokens
    assert (shown[0], shown[-1]) == ("<start_of_text>", "<end_of_text>")
    assert "".join(shown[1:-1]).replace("·", "") == "café狐"


def test_a_locked_text_tower_has_no_trainable_positions(small: Any) -> None:
    model = small(position_split=4)
    model.clip.lock_text_tower()
    trainable = {name for name, p in model.clip.named_parameters() if p.requires_grad and not name.startswith("visual")}
    assert trainable == {"logit_scale"}
    assert {"positional_embedding", "positional_embedding_res"} <= model.clip.no_weight_decay()


def test_a_loss_needs_a_picture_for_each_text(small: Any, pictures: list[Path]) -> None:
    model = small()
    batch = model.preprocess(pictures[:1], ["a fox", "a pizza"])
    with pytest.raises(BadInput, match="a loss of 1 pictures and 2 texts"):
        model(**batch, return_loss=True)


def test_it_is_an_open_clip_model(tiny: Any, pictures: list[Path]) -> None:
    """The zero-shot code of open_clip's README, on `model.clip`."""
    model, preprocess, tokenizer = tiny.clip, tiny.image_transform, tiny.tokenizer
    assert isinstance(model, open_clip.CLIP)
    image = preprocess(Image.open(pictures[1]).convert("RGB")).unsqueeze(0)
    text = tokenizer(LABELS)
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        text_features = text_features / text_features.norm(dim=-1, keepdim=True)
        probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)
        image_out, text_out, scale = model(image, text)
        logits_per_image, logits_per_text = model.get_logits(image, text)
        parts = model.forward_intermediates(image, text)
    assert probs.shape == (1, 3)
    torch.testing.assert_close(image_out, image_features)
    torch.testing.assert_close(text_out, text_features)
    torch.testing.assert_close(logits_per_image, scale * image_out @ text_out.T)
    torch.testing.assert_close(logits_per_text, logits_per_image.T)
    torch.testing.assert_close(parts["image_features"], image_features)
    torch.testing.assert_close(parts["text_features"], text_features)
    assert len(parts["text_intermediates"]) == tiny.config.text_layers


def test_intermediates_have_open_clips_options(tiny: Any, pictures: list[Path]) -> None:
    image, text = tiny.preprocess(pictures)["image"], tiny.tokenizer(LABELS)
    with torch.no_grad():
        plain = tiny.clip.forward_intermediates(image, text)
        options = {"output_logits": True, "output_logit_scale_bias": True, "normalize_intermediates": True}
        found = tiny.clip.forward_intermediates(image, text, image_indices=[1], text_indices=[1], **options)
        logits = tiny.clip.get_logits(image, text)
        with pytest.raises(BadInput, match="no logits of pictures alone"):
            tiny.clip.forward_intermediates(image, output_logits=True)
    torch.testing.assert_close((found["image_logits"], found["text_logits"]), logits)
    torch.testing.assert_close(found["logit_scale"], tiny.clip.logit_scale.exp())
    assert len(found["image_intermediates"]) == len(found["text_intermediates"]) == 1
    normalized = tiny.clip.ln_final(plain["text_intermediates"][1])
    torch.testing.assert_close(found["text_intermediates"][0], normalized)


def test_lower_precision(tiny: Any, pictures: list[Path]) -> None:
    model = zoo.load("clip_moe_tiny", device="cpu", dtype="bf16")
    batch = model.preprocess(pictures, LABELS)
    assert batch["image"].dtype == torch.bfloat16
    with torch.no_grad():
        features = model.encode_image(batch["image"])
        expected = tiny.encode_image(tiny.preprocess(pictures)["image"])
    assert features.dtype == torch.bfloat16
    assert F.cosine_similarity(features.float(), expected).min() > 0.95
    assert model.predict(pictures, LABELS).probs.dtype == torch.float32


def test_training_and_evaluation(small: Any, fox: Path) -> None:
    model = small(expert_dropout=0.5)
    assert not model.training
    batch = model.preprocess(fox, "a fox")
    with torch.no_grad():
        first, second = model.encode_image(batch["image"]), model.encode_image(batch["image"])
        assert first.equal(second)
        model.train()
        first, second = model.encode_image(batch["image"]), model.encode_image(batch["image"])
        assert not first.equal(second), "dropout inside the experts"
        model.eval()
    assert model.predict(fox, LABELS).cosines.equal(model.predict(fox, LABELS).cosines)


def test_the_loss_reaches_routers_and_experts(small: Any, pictures: list[Path]) -> None:
    model = small().train()
    batch = model.preprocess(pictures, ["a fox", "a pizza"])
    assert model(**batch).loss is None
    out = model(**batch, return_loss=True)
    assert set(out.losses) == {"contrastive", "balance_image", "balance_text"}
    out.loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("positional_embedding" in name for name in silent), silent
    without = small(balance_coef=0.0)
    assert set(without(**batch, return_loss=True).losses) == {"contrastive"}


@pytest.mark.slow
def test_compiled(tiny: Any, pictures: list[Path]) -> None:
    image = tiny.preprocess(pictures)["image"]
    with torch.no_grad():
        compiled = torch.compile(tiny.encode_image)(image)
        torch.testing.assert_close(compiled, tiny.encode_image(image), atol=1e-4, rtol=1e-4)
        with mmoe.trace(tiny) as routing:
            torch.compile(tiny.encode_image)(image)
    assert len(routing) == len(routing.select("clip.visual.*")) > 0


# ---- sizes of the paper ----


def test_paper_sizes_on_the_meta_device() -> None:
    """Counted from the released shapes: dense Long-CLIP L/14, and the mixture in total and per token."""
    dense = zoo.load("clip_moe_vit_l14", device="meta", num_experts=0)
    assert dense.num_params().total == dense.num_params().active == 427_938_305
    params = zoo.load("clip_moe_vit_l14", device="meta").num_params()
    assert (params.total, params.active, params.routers) == (1_202_429_441, 686_192_129, 135_168)


def test_keys_of_the_released_checkpoint() -> None:
    """Key layout and shapes of the released ViT-L/14, E = 4."""
    state = zoo.load("clip_moe_vit_l14", device="meta").state_dict()
    theirs = {name: tuple(value.shape) for name, value in to_original(state).items()}
    assert theirs["visual.transformer.resblocks.23.gate.weight"] == (4, 1024)
    assert theirs["visual.transformer.resblocks.0.experts.3.c_fc.weight"] == (4096, 1024)
    assert theirs["transformer.resblocks.11.experts.0.c_proj.weight"] == (768, 3072)
    assert theirs["positional_embedding"] == theirs["positional_embedding_res"] == (248, 768)
    assert not [name for name in theirs if ".mlp." in name or name.startswith("clip.")]
    config, _ = from_original(to_original(state))
    assert config == ClipMoEConfig()


# ---- conversions ----


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_upcycling_starts_from_the_dense_model(top_k: int, small: Any) -> None:
    dense = small(num_experts=0)
    model = upcycle(dense, 3, top_k=top_k)
    assert difference(dense, model) < ROUNDING
    assert (model.config.num_experts, model.config.top_k, model.config.moe_layers) == (3, top_k, 2)
    assert {layer.num_experts for layer in moe_layers(model).values()} == {3} and len(moe_layers(model)) == 4
    assert not model.training and model.card is None
    before, after = dense.num_params(), model.num_params()
    inside = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    assert after.total == before.total + 2 * inside + after.routers


def test_the_dense_model_stays_as_it_was(small: Any) -> None:
    dense = small(num_experts=0)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    model = upcycle(dense, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad and not parameter.is_meta
            parameter.add_(1)
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert all(value.equal(before[name]) for name, value in dense.state_dict().items())


def test_the_difference_is_measured(small: Any) -> None:
    """The proof can fail: a change to one expert of one layer shows."""
    dense = small(num_experts=0)
    model = upcycle(dense, 2)
    with torch.no_grad():
        next(iter(moe_layers(model).values())).experts.up_proj[1] *= 2
    assert difference(dense, model) > 100 * ROUNDING
    noisy = upcycle(dense, 2, noise=0.1)
    assert difference(dense, noisy) > 100 * ROUNDING
    first = next(iter(moe_layers(noisy).values())).experts.up_proj
    assert first[0].equal(dense.clip.visual.transformer.resblocks[0].mlp.c_fc.weight) and not first[1].equal(first[0])


@pytest.mark.parametrize(
    ("layers", "names"), [(1, ["2", "1"]), (2, ["1", "2", "0", "1"]), (9, ["0", "1", "2", "0", "1"])]
)
def test_only_the_last_blocks(layers: int, names: list[str], small: Any) -> None:
    """A tower with fewer blocks has all of them changed."""
    dense = small(num_experts=0, vision_layers=3, text_layers=2)
    model = upcycle(dense, 2, moe_layers=layers)
    assert [name.split(".")[-2] for name in moe_layers(model)] == names
    assert difference(dense, model) < ROUNDING
    again = ClipMoE(model.config)
    again.load_state_dict(model.state_dict())


def test_several_sources(small: Any) -> None:
    dense = small(num_experts=0)
    sources = [small(num_experts=0) for _ in range(3)]
    model = upcycle(dense, sources=[source.state_dict() for source in sources])
    assert model.config.num_experts == 3
    for name, layer in moe_layers(model).items():
        for expert, source in enumerate(sources):
            mlp = source.get_submodule(name)
            assert layer.experts.up_proj[expert].equal(mlp.c_fc.weight)
            assert layer.experts.down_bias[expert].equal(mlp.c_proj.bias)
    state = model.state_dict()
    outside = [name for name in dense.state_dict() if ".mlp." not in name]
    assert all(state[name].equal(dense.state_dict()[name]) for name in outside)


def test_several_sources_with_a_partly_dense_text_tower(small: Any) -> None:
    """The released routine crashes here."""
    dense = small(num_experts=0, text_layers=3)
    sources = [small(num_experts=0, text_layers=3).state_dict() for _ in range(2)]
    model = upcycle(dense, sources=sources, moe_layers=1, top_k=1)
    assert list(moe_layers(model)) == ["clip.visual.transformer.resblocks.1.mlp", "clip.transformer.resblocks.2.mlp"]
    first = model.clip.transformer.resblocks[0].mlp.c_fc.weight
    assert first.equal(dense.clip.transformer.resblocks[0].mlp.c_fc.weight)


def test_upcycling_that_is_refused(small: Any) -> None:
    with pytest.raises(Refused, match="upcycle a model that is a mixture already"):
        upcycle(small())
    dense = small(num_experts=0)
    with pytest.raises(BadOverride, match="top_k=5\n  top_k is a whole number from 1 to 4"):
        upcycle(dense, 4, top_k=5)
    with pytest.raises(BadOverride, match="layers=0"):
        upcycle(dense, moe_layers=0)
    with pytest.raises(LoadMismatch):
        upcycle(dense, sources=[dense.state_dict(), small(num_experts=0, vision_mlp_ratio=2.0).state_dict()])


def test_the_way_there_and_back(small: Any) -> None:
    for options in ({}, {"num_experts": 0}, {"moe_layers": 1, "vision_layers": 3}, {"position_split": None}):
        model = small(**options)
        config, state = from_original(to_original(model.state_dict()), top_k=model.config.top_k)
        assert {n: v.tolist() for n, v in state.items()} == {n: v.tolist() for n, v in model.state_dict().items()}
        for key in convert.SHOWN_BY_TENSORS:
            if model.config.num_experts or key != "moe_layers":
                assert getattr(config, key) == getattr(model.config, key), key


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"visual.attnpool.k.weight": (2, 2)}, "unknown keys: visual.attnpool.k.weight"),
        ({f"head.{i}.weight": (1,) for i in range(3)}, r"unknown keys: head.{0..2}.weight"),
        ({"visual.conv1.weight": None}, "it has no 'visual.conv1.weight'"),
        ({"transformer.resblocks.1.experts.2.c_fc.bias": None}, "no transformer.resblocks.1.experts.2.c_fc.bias"),
        ({"transformer.resblocks.1.gate.weight": None}, "mixtures in blocks [0] of 2 of transformer.resblocks"),
    ],
)
def test_checkpoints_that_are_refused(change: dict[str, Any], wrong: str, small: Any) -> None:
    state = to_original(small().state_dict())
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.ones(shape)
    with pytest.raises(LoadMismatch) as error:
        from_original(state)
    assert str(error.value).startswith("convert this checkpoint to clip_moe\n") and wrong in error.value.wrong


def test_scalars_of_openais_files_are_dropped(small: Any) -> None:
    state = to_original(small(num_experts=0).state_dict())
    state |= {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    config, converted = from_original(state)
    assert config.num_experts == 0 and set(converted) == set(small(num_experts=0).state_dict())


def test_positions_of_longer_texts(small: Any) -> None:
    table = torch.arange(77.0)[:, None].expand(77, 4)
    stretched = stretch_positions(table)
    assert stretched.shape == (248, 4) and stretched[:20].equal(table[:20])
    assert stretched[20:25, 0].tolist() == [20, 20.25, 20.5, 20.75, 21] and stretched[-1, 0] == 76.75


@pytest.mark.parametrize("length", [28, 34, 52])
def test_a_longer_context(length: int, small: Any) -> None:
    dense = small(num_experts=0, position_split=None)
    model = lengthen(dense, context_length=length)
    assert (model.config.context_length, model.tokenizer(["a fox"]).shape[1]) == (length, length)
    keep = (4 * 16 - length) // 3
    assert model.config.position_split == keep
    text = dense.tokenizer(["a fox"])
    with torch.no_grad():
        expected, found = dense.encode_text(text), model.encode_text(model.tokenizer(["a fox"]))
    same = torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert same == (int(text.argmax()) <= keep) == (length != 52), (
        "a text of tokens whose positions stay is seen as before"
    )


def test_a_context_that_cannot_be_had(small: Any) -> None:
    with pytest.raises(BadOverride) as error:
        lengthen(small(num_experts=0, position_split=None), context_length=63)
    assert str(error.value) == (
        "context_length=63 from texts of 16 tokens\n"
        "  a stretch keeps k rows and gives 64 - 3k tokens\n"
        "  try: context_length=64"
    )


# ---- open_clip ----


def test_a_model_of_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our dense model computes what open_clip's own computes."""
    small = {"embed_dim": 32, "quick_gelu": True, "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64}}
    small["text_cfg"] |= {"heads": 2, "layers": 2}
    small["vision_cfg"] = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: small)
    model = from_open_clip("ViT-small")
    theirs = open_clip.CLIP(
        **{**small, "vision_cfg": {**small["vision_cfg"]}, "text_cfg": {**small["text_cfg"]}}
    ).eval()
    theirs.load_state_dict(model.clip.state_dict())
    image, text = torch.randn(2, 3, 32, 32), open_clip.SimpleTokenizer()(["a fox", "a pizza"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), theirs.encode_image(image))
        torch.testing.assert_close(model.encode_text(text), theirs.encode_text(text))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RN50", "vision_cfg.layers (a ResNet)"),
        ("ViT-B-16-SigLIP", "vision_cfg.timm_model_name"),
        ("coca_ViT-B-32", "multimodal_cfg"),
        ("roberta-ViT-B-32", "text_cfg.hf_model_name"),
        ("EVA02-B-16", "vision_cfg.timm_model_name"),
    ],
)
def test_open_clip_models_that_are_refused(name: str, reason: str) -> None:
    with pytest.raises(Refused) as error:
        from_open_clip(name)
    assert error.value.asked == f"make a clip_moe of open_clip's {name!r}"
    assert error.value.wrong.startswith("it is no plain ViT with a plain text transformer: ")
    assert reason in error.value.wrong
    assert "mmoe.surgery.upcycle" in error.value.fix


def test_names_that_open_clip_does_not_know() -> None:
    with pytest.raises(UnknownModel) as unknown:
        from_open_clip("ViT-B32")
    assert str(unknown.value).splitlines()[0] == "open_clip has no model 'ViT-B32'"
    assert "did you mean: ViT-B-32" in str(unknown.value)
    with pytest.raises(UnknownWeights) as error:
        from_open_clip("ViT-B-32/openia")
    assert str(error.value).startswith("open_clip has no weights 'openia' for 'ViT-B-32'\n  it has: openai, ")
    assert error.value.fix == "open_clip:ViT-B-32/openai"


def test_pretrained_weights_bring_their_activation_and_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ViT-B-32` is a GELU architecture but its OpenAI weights were trained with QuickGELU; open_clip only warns."""
    small = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    small["text_cfg"] = {"context_length": 16, "vocab_size": 600, "width": 64, "heads": 1, "layers": 1}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: small)
    source = from_open_clip("ViT-B-32")
    assert source.config.activation == "gelu"
    path = tmp_path / "open_clip_model.safetensors"
    save_file(to_original(source.state_dict()), path)
    asked: list[str] = []

    def locate(name: str) -> Path:
        asked.append(name)
        return path

    monkeypatch.setattr(convert, "locate", locate)
    model = from_open_clip("ViT-B-32/openai")
    assert asked == ["hf-hub:timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors"]
    assert model.config.activation == "quick_gelu"
    assert model.clip.visual.proj.equal(source.clip.visual.proj)
    assert from_open_clip("ViT-B-32/laion2b_s34b_b79k").config.activation == "gelu"
    half = from_open_clip("ViT-L-14/laion2b_s32b_b82k")
    assert (half.config.image_mean, half.preprocessing["mean"]) == ((0.5, 0.5, 0.5), [0.5, 0.5, 0.5])


def test_licences_are_not_invented() -> None:
    assert open_clip_licence("ViT-B-32")[0] == "MIT"
    assert open_clip_licence("ViT-B-32", "openai") == ("MIT", "https://github.com/openai/CLIP")
    licence, source = open_clip_licence("ViT-B-32", "laion2b_s34b_b79k")
    assert licence == "unknown" and source == "https://huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


@pytest.mark.parametrize("options", [{}, {"router": "expert_choice"}, {"route_padding": False}])
def test_gradient_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model = zoo.load("clip_moe_tiny", device="cpu", **options).train()
    texts = ["a fox", "a very long name of something"]
    batch = {"image": torch.randn(2, 3, 64, 64), "text": model.tokenizer(texts)}
    grads = []
    for checkpointed in (False, True):
        model.clip.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model(**batch, return_loss=True).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)
