"""A model saves itself to load alone, whole or not at all, and gives itself to the hub."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import mmoe
import zoo
from mmoe.errors import BadInput, BadOverride, Offline, Refused
from zoo import model as model_module
from zoo.views import TokenView

FILES = ["card.json", "config.json", "model.safetensors", "preprocess.json"]


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(v.equal(theirs[n]) for n, v in one.state_dict().items())


def test_what_was_saved_loads_alone_bit_for_bit(tiny: Any, tmp_path: Path, fox: Path) -> None:
    folder = tiny.save(tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    again = zoo.load(folder, device="cpu")
    assert same(again, tiny)
    assert (again.config, again.preprocessing) == (tiny.config, tiny.preprocessing)
    assert again.card.params == tiny.card.params
    assert again.load_report.source == str(folder / "model.safetensors")
    labels = ["a fox", "a pizza"]
    assert again.predict(fox, labels).cosines.equal(tiny.predict(fox, labels).cosines)
    assert not again.training


def test_preprocessing_travels_with_the_weights(small: Any, tmp_path: Path, fox: Path) -> None:
    model = small()
    model.preprocessing = {
        **model.preprocessing,
        "mean": [0.1, 0.2, 0.3],
        "resize_mode": "squash",
        "background": [9, 9, 9],
    }
    again = zoo.load(model.save(tmp_path), device="cpu")
    assert again.preprocessing == model.preprocessing
    assert again.preprocess(fox)["image"].equal(model.preprocess(fox)["image"])
    assert not again.preprocess(fox)["image"].equal(small().preprocess(fox)["image"])


def test_a_smaller_type_on_disk(small: Any, tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = zoo.load(tmp_path, device="cpu")
    assert again.dtype == torch.float32 and model.dtype == torch.float32
    rounded = model.clip.text_projection.bfloat16().float()
    assert again.clip.text_projection.equal(rounded)


def test_anyone_may_read_the_files(small: Any, tmp_path: Path) -> None:
    """safetensors makes files for their owner alone."""
    before = os.umask(0o027)
    try:
        small().save(tmp_path / "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o640}


def test_tied_tensors_are_saved_twice(small: Any, tmp_path: Path) -> None:
    model = small()
    model.clip.ln_final.bias = model.clip.visual.ln_post.bias
    attention = model.clip.transformer.resblocks[0].attn
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.t())
    assert same(zoo.load(model.save(tmp_path), device="cpu"), model)


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*args: object, **options: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "what", "fault", "good_calls"),
    [
        (model_module, "save_file", full, 0),
        (model_module, "save_file", full_for_safetensors, 0),
        (os, "replace", full, 0),
        (os, "fsync", full, 0),
        (os, "fsync", full, 1),
        (os, "fsync", full, 3),
        (Path, "write_text", full, 0),
        (Path, "write_text", full, 2),
    ],
)
def test_a_full_disk_leaves_the_old_model(
    where: Any,
    what: str,
    fault: Callable[..., None],
    good_calls: int,
    small: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works, calls = getattr(where, what), itertools.count()

    def sometimes(*args: Any, **options: Any) -> Any:
        return (works if next(calls) < good_calls else fault)(*args, **options)

    old = small()
    old.save(tmp_path)
    new = small(vision_layers=1)
    with monkeypatch.context() as patch:
        patch.setattr(where, what, sometimes)
        with pytest.raises(BadInput) as error:
            new.save(tmp_path)
    assert str(error.value).startswith(f"cannot write '{tmp_path}/")
    assert "No space left on device" in error.value.wrong
    assert error.value.fix == "write to another folder or free space"
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES, "no temporary file is left"
    assert same(zoo.load(tmp_path, device="cpu"), old)


def test_an_interrupt_leaves_the_old_model(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    old = small()
    old.save(tmp_path)
    monkeypatch.setattr(model_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(vision_layers=1).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert same(zoo.load(tmp_path, device="cpu"), old)


def test_the_config_takes_its_name_last(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is a model once it has a config.json."""
    order: list[str] = []
    replace = os.replace

    def record(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    small().save(tmp_path)
    assert order[0] == "model.safetensors" and order[-1] == "config.json"


def test_an_old_card_does_not_stay(small: Any, tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path)
    model.card = None
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if name != "card.json"]
    assert zoo.load(tmp_path, device="cpu").card is None


def test_the_folder_says_what_it_is(small: Any, tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["family"], saved["format"]) == ("clip_moe", 1)
    assert saved["config"] == json.loads(json.dumps(asdict(model.config)))


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    model = zoo.load("clip_moe_tiny", device="meta")
    with pytest.raises(Refused) as error:
        model.save(tmp_path / "a")
    assert str(error.value) == (
        "save a model on the meta device\n  it has shapes but no values\n  try: zoo.load(name, device='cpu')"
    )
    assert not (tmp_path / "a").exists()


# ---- the hub ----


class Api:
    """Stands in for the hub's client."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.calls: list[Any] = []
        self.files: dict[str, int] = {}
        self.fault = fault

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.fault is not None:
            raise self.fault
        self.calls.append((repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        self.files = {
            path.name: path.stat().st_size for path in Path(folder_path).iterdir() if path.name in allow_patterns
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Api]:
    def use(fault: Exception | None = None) -> Api:
        import huggingface_hub

        api = Api(fault)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        monkeypatch.setattr("zoo.weights.online", lambda: True)
        return api

    return use


def test_push_uploads_what_save_writes(small: Any, hub: Callable[..., Api], tmp_path: Path) -> None:
    api, model = hub(), small()
    (tmp_path / "private.txt").write_text("not for others")
    assert model.push("me/model", private=True, folder=tmp_path) == "https://huggingface.co/me/model"
    assert api.calls == [("me/model", {"private": True, "exist_ok": True})]
    assert sorted(api.files) == FILES and all(api.files.values())
    assert model.push("me/model") == "https://huggingface.co/me/model"
    assert sorted(api.files) == FILES


def test_push_without_network(small: Any) -> None:
    with pytest.raises(Offline) as error:
        small().push("me/model")
    assert str(error.value).startswith("cannot push to 'me/model'\n  there is no network")
    assert "hf upload me/model FOLDER" in error.value.fix


def test_push_without_permission(small: Any, hub: Callable[..., Api]) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub(LocalTokenNotFoundError("Token is required, but no token found.\nYou need to provide a token."))
    with pytest.raises(BadInput) as error:
        small().push("me/model")
    assert str(error.value) == (
        "cannot push to 'me/model'\n  Token is required, but no token found.\n  try: hf auth login"
    )


# ---- views ----


def test_a_view_finds_the_patches_of_a_sample() -> None:
    rows = torch.arange(2 * 5)[:, None]
    view = TokenView(layers="*", modality="image", prefix=1, grid=(2, 2))
    assert view.of_sample(rows, 1).flatten().tolist() == [6, 7, 8, 9]


def test_a_view_finds_the_words_of_a_sample() -> None:
    rows = torch.arange(2 * 4)
    view = TokenView(layers="*", modality="text", length=4, tokens=(("a", "b"), ("c", "d", "e")))
    assert view.of_sample(rows, 0).tolist() == [0, 1]
    assert view.of_sample(rows, 1).tolist() == [4, 5, 6]


def test_parameters_are_counted(tiny: Any) -> None:
    params = tiny.num_params()
    assert params.total == sum(p.numel() for p in tiny.parameters())
    idle = sum(p.numel() for name, p in tiny.named_parameters() if ".experts." in name)
    share = 1 - tiny.config.top_k / tiny.config.num_experts
    assert params.active == params.total - round(idle * share)


def test_save_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = zoo.load("clip_moe_tiny", device="cpu")
    assert model.save("~/saved") == tmp_path / "saved"
    assert zoo.load("~/saved", device="cpu").load_report.coverage == 1


def saved_card(model: Any, folder: Path) -> Any:
    return zoo.load(model.save(folder), device="cpu").card


def test_numbers_and_weights_of_the_zoo_stay_behind(tiny: Any, tmp_path: Path) -> None:
    card = saved_card(tiny, tmp_path)
    assert tiny.card.weights and not (card.weights or card.metrics or card.routing)
    assert card.summary == "Saved from clip_moe_tiny."
    assert card.lineage == {
        "verb": "save",
        "source": "clip_moe_tiny",
        "weights": f"loaded from {tiny.load_report.source}",
    }
    assert (card.params, card.moe) == (tiny.card.params, tiny.card.moe)
    again = zoo.load(tmp_path, device="cpu")
    assert saved_card(again, tmp_path / "copy") == card, "a folder's own card stays when nothing changed"


def test_the_saved_card_tells_the_changed_structure(tiny: Any, tmp_path: Path) -> None:
    model = zoo.load("clip_moe_tiny", device="cpu", router="topk:top_k=1")
    card, params = saved_card(model, tmp_path / "a"), model.num_params()
    assert card.params == {"total": params.total, "active": params.active} != dict(tiny.card.params)
    assert card.moe == {"layers": 7, "experts": 4, "top_k": 1, "router": "topk"}
    assert card.lineage["router"] == "topk:top_k=1"
    again = zoo.load(tmp_path / "a", device="cpu", router="dense")
    later = saved_card(again, tmp_path / "b")
    assert later.moe["router"] == "dense" and later.lineage["before"] == card.lineage


def test_a_dense_variant_says_that_it_is_dense(tmp_path: Path) -> None:
    dense = zoo.load("clip_moe_tiny", False, device="cpu", num_experts=0)
    card = saved_card(dense, tmp_path)
    assert card.moe == {} and card.params["total"] == card.params["active"] == dense.num_params().total


def test_random_and_trained_weights_are_not_called_the_zoos(tmp_path: Path) -> None:
    from train import fine_tune

    told = "random, or trained since they were loaded"
    assert saved_card(zoo.load("clip_moe_tiny", False, device="cpu"), tmp_path / "a").lineage["weights"] == told
    model = zoo.load("clip_moe_tiny", device="cpu")
    fine_tune(model, steps=1, progress=False)
    assert saved_card(model, tmp_path / "b").lineage["weights"] == told
    partly = zoo.load("clip_moe_tiny", device="cpu", router="topk:gate_bias=true")
    assert saved_card(partly, tmp_path / "c").lineage["weights"].endswith(", 7 tensors random")


def test_the_licence_of_the_weights_stays(tmp_path: Path) -> None:
    model = zoo.load("clip_moe_tiny", False, device="cpu")
    model.card = replace(model.card, weights={"a": replace(model.card.weights["emoji"], licence="unknown")})
    assert saved_card(model, tmp_path).licence == "unknown"


def test_a_given_card_is_written_as_it_is(tiny: Any, tmp_path: Path) -> None:
    tiny.save(tmp_path, card=tiny.card)
    assert zoo.load(tmp_path, device="cpu").card.as_dict() == tiny.card.as_dict()


def test_a_smaller_type_spares_the_balancing_bias(small: Any, tmp_path: Path) -> None:
    model = small(router="topk:bias_rate=0.001")
    router = model.clip.visual.transformer.resblocks[0].mlp.router
    router.select_bias.fill_(0.7)
    model.save(tmp_path, dtype=torch.float16)
    saved = load_file(tmp_path / "model.safetensors")["clip.visual.transformer.resblocks.0.mlp.router.select_bias"]
    assert saved.equal(router.select_bias)


def test_a_model_that_was_rebuilt_by_hand_is_not_saved(small: Any, tmp_path: Path) -> None:
    sparse, _ = mmoe.upcycle(small(num_experts=0), 2)
    with pytest.raises(Refused, match=r"whose layers are not those of its config\n  they differ in clip\.visual"):
        sparse.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["router", "experts"])
def test_parts_of_another_kind_are_not_saved(part: str, small: Any, tmp_path: Path) -> None:
    """Their tensors may have the same names and shapes."""

    class Other(mmoe.DenseRouter):
        pass

    class OtherExperts(mmoe.FFNExperts):
        pass

    model = small()
    for layer in mmoe.moe_layers(model).values():
        if part == "router":
            layer.router = Other(layer.router.weight.shape[1], layer.num_experts)
        else:
            layer.experts.__class__ = OtherExperts
    with pytest.raises(Refused, match="whose layers are not those of its config"):
        model.save(tmp_path / "out")


def test_a_model_that_was_trained_is_not_the_loaded_one(small: Any, tmp_path: Path) -> None:
    model = zoo.load(small().save(tmp_path / "a"), device="cpu")
    model.to(torch.bfloat16).float().train().eval()
    assert model.load_report is not None
    loss = model(image=torch.randn(2, 3, 32, 32), text=model.tokenizer(["a", "b"]), return_loss=True).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.load_report is None
    card = json.loads((model.save(tmp_path / "b") / "card.json").read_text()) if model.card else {}
    assert card.get("lineage", {}).get("weights", "random").startswith("random")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_loaded_until_it_is_trained(copied: Callable[[Any], Any], small: Any, tmp_path: Path) -> None:
    model = copied(zoo.load(small().save(tmp_path / "a"), device="cpu"))
    assert model.load_report is not None and model.load_report.coverage == 1
    with torch.no_grad():
        model.clip.logit_scale.add_(1e-6)
    assert model.load_report is None and copied(model).load_report is None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "through .data": lambda model: [p.data.mul_(0.5) for p in model.parameters()],
    "assigned": lambda model: model.load_state_dict(
        {name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True
    ),
    "other experts": lambda model: mmoe.upcycle(model, 2, layers="*.resblocks.0.*", inplace=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_not_the_loaded_ones(change: str, small: Any, tmp_path: Path) -> None:
    model = zoo.load(small(moe_layers=1).save(tmp_path / "a"), device="cpu")
    CHANGES[change](model)
    assert model.load_report is None


def test_other_settings_of_the_layers_are_refused(small: Any, tmp_path: Path) -> None:
    def policy(moe: mmoe.MoE) -> None:
        old = moe.router
        moe.router = mmoe.TopKRouter(old.weight.shape[1], old.num_experts, score="sigmoid", weights="raw")

    def scale(moe: mmoe.MoE) -> None:
        moe.router.scale = 3.0

    def act(moe: mmoe.MoE) -> None:
        moe.experts.act = torch.nn.functional.relu

    for change in (policy, scale, act):
        model = small()
        change(next(iter(mmoe.moe_layers(model).values())))
        with pytest.raises(Refused, match="whose layers are not those of its config"):
            model.save(tmp_path / "out")
    model = small()
    moe = next(iter(mmoe.moe_layers(model).values()))
    moe.backend, moe.note_of_mine, moe.forward = "loop", "here", moe.forward
    model.train().save(tmp_path / "out")


def test_values_that_a_type_does_not_hold_are_refused(small: Any, tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.clip.token_embedding.weight[0, 0] = 1e5
    with pytest.raises(Refused, match=r"save clip.token_embedding.weight in torch.float16\n.* up to 1e\+05"):
        model.save(tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_a_card_that_is_none(small: Any, tmp_path: Path) -> None:
    with pytest.raises(BadOverride, match="it is no Card"):
        small().save(tmp_path / "out", card={"a": 1})


def test_the_type_of_saved_weights_has_a_name(small: Any, tmp_path: Path) -> None:
    small().save(tmp_path / "a", dtype="bf16")
    assert zoo.load(tmp_path / "a", device="cpu").load_report is not None
    with pytest.raises(BadOverride, match=r"no model in torch\.int8"):
        small().save(tmp_path / "b", dtype=torch.int8)
