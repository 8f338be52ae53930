"""`zoo.load`: by name, tag, folder, file and hub; what is refused, word for word; and what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from mmoe import DenseRouter, ExpertChoiceRouter, TopKRouter
from mmoe.errors import (
    BadInput,
    BadOverride,
    CorruptFile,
    LoadMismatch,
    MissingExtra,
    Offline,
    Refused,
    UnknownModel,
    UnknownName,
    UnknownWeights,
)
from mmoe.experts import GatedFFNExperts
from mmoe.moe import moe_layers
from zoo import loading
from zoo.clip_moe.convert import to_original
from zoo.loading import load

NAME = "clip_moe_tiny"


def message(error: pytest.ExceptionInfo[Exception]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()]


# ---- where from ----


def test_by_name(tiny: Any) -> None:
    card = zoo.card(NAME)
    tag, weights = card.find_weights()
    assert tiny.card == card
    assert tiny.load_report.source == f"{NAME}.{tag} ({weights.source})"
    assert tiny.load_report.coverage == 1 and tiny.load_report.unexpected == ()
    assert (tiny.device.type, tiny.dtype, tiny.training) == ("cpu", torch.float32, False)
    assert all(p.requires_grad for p in tiny.parameters())


def test_by_name_and_tag(tiny: Any) -> None:
    tag, _ = zoo.card(NAME).find_weights()
    for model in (load(f"{NAME}.{tag}", device="cpu"), load(NAME, tag, device="cpu")):
        assert model.load_report == tiny.load_report


def test_random_weights() -> None:
    torch.manual_seed(1)
    model = load(NAME, False, device="cpu")
    assert model.load_report is None
    torch.manual_seed(1)
    again = load(NAME, weights=False, device="cpu")
    assert again.clip.text_projection.equal(model.clip.text_projection)
    torch.manual_seed(2)
    assert not load(NAME, False, device="cpu").clip.text_projection.equal(model.clip.text_projection)


def test_wrong_names() -> None:
    with pytest.raises(UnknownModel) as error:
        load("clip_moe_tin")
    assert message(error)[:2] == ["no model named 'clip_moe_tin'", "did you mean: clip_moe_tiny, clip_moe_vit_l14"]
    with pytest.raises(UnknownModel, match="it looks like a hub repository or a folder that is not there"):
        load("runs/best")
    with pytest.raises(BadInput) as found:
        load("./runs/best")
    assert message(found)[0] == "no model folder './runs/best'"


def test_a_wrong_tag() -> None:
    for arguments in ((f"{NAME}.emojis",), (NAME, "emojis")):
        with pytest.raises(UnknownWeights) as error:
            load(*arguments)
        assert message(error)[0] == "no weights 'emojis' for 'clip_moe_tiny'"


@pytest.mark.parametrize("weights", [None, 1, ["a"]])
def test_weights_of_a_wrong_kind(weights: Any) -> None:
    with pytest.raises(BadOverride, match="it is True, False, a tag or a file"):
        load(NAME, weights)


def test_from_a_folder(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(num_experts=3)
    model.save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "saved", str(tmp_path / "saved"), "saved", "./saved"):
        found = load(name, device="cpu")
        assert found.config == model.config
        assert found.clip.text_projection.equal(model.clip.text_projection)
    assert load("saved", False, device="cpu").load_report is None


def test_a_folder_with_the_name_of_a_card(
    tiny: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(num_experts=3).save(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert load(NAME, device="cpu").config == tiny.config
    assert load(f"./{NAME}", device="cpu").config.num_experts == 3


def break_folder(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if how.startswith("no "):
        (folder / how.removeprefix("no ")).unlink()
    elif how == "foreign":
        (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    elif how == "newer":
        (folder / "config.json").write_text(json.dumps({**config, "format": 2}))
    elif how == "family":
        (folder / "config.json").write_text(json.dumps({**config, "family": "clip_mo"}))
    elif how == "option":
        (folder / "config.json").write_text(json.dumps({**config, "config": {"top_kk": 1}}))
    elif how == "no JSON":
        (folder / "config.json").write_text("{")
    elif how == "preprocess":
        (folder / "preprocess.json").write_text("{}")
    elif how == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("how", "kind", "lines"),
    [
        (
            "no config.json",
            BadInput,
            ["cannot load the folder 'F'", "it has no config.json; a model folder is written by"],
        ),
        ("no preprocess.json", BadInput, ["cannot load the folder 'F'", "it has no preprocess.json"]),
        ("no model.safetensors", BadInput, ["no weights file 'F/model.safetensors'"]),
        (
            "foreign",
            CorruptFile,
            ["cannot load the folder 'F'", "its config.json was not written by model.save(folder)"],
        ),
        (
            "newer",
            CorruptFile,
            ["cannot load the folder 'F'", "its format is 2, this version reads 1", "try: pip install"],
        ),
        ("family", BadInput, ["no model family 'clip_mo'", "did you mean: clip_moe"]),
        ("option", BadOverride, ["'top_kk' is not an option of F", "did you mean: top_k"]),
        ("preprocess", CorruptFile, ["cannot read 'F/preprocess.json'", "KeyError: 'image_size'"]),
        ("cut", CorruptFile, ["cannot read the weights file 'F/model.safetensors'"]),
    ],
)
def test_broken_folders(how: str, kind: type[Exception], lines: list[str], small: Any, tmp_path: Path) -> None:
    small().save(tmp_path)
    break_folder(tmp_path, how)
    with pytest.raises(kind) as error:
        load(tmp_path, device="cpu")
    found = message(error)
    for line, expected in zip(found[: len(lines)], lines, strict=True):
        assert line.startswith(
            expected.replace("F/", f"{tmp_path}/").replace("'F'", f"'{tmp_path}'").replace(" F", f" {tmp_path}")
        )


def test_a_config_that_is_no_json(small: Any, tmp_path: Path) -> None:
    small().save(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptFile, match="it is not JSON"):
        load(tmp_path)


def test_a_folder_holds_one_set_of_weights(small: Any, tmp_path: Path) -> None:
    small().save(tmp_path)
    with pytest.raises(BadOverride) as error:
        load(tmp_path, "best")
    assert message(error)[:2] == ["weights='best' for a folder", "a folder holds one set of weights"]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "path", "fp16", "authors"])
def test_from_a_file(kind: str, tiny: Any, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in tiny.state_dict().items()}
    path = tmp_path / ("a.pt" if kind == "pt" else "a.safetensors")
    if kind == "pt":
        torch.save({"state_dict": state, "step": 1}, path)
    else:
        saved = to_original(state) if kind == "authors" else state
        save_file({name: value.half() if kind == "fp16" else value for name, value in saved.items()}, path)
    model = load(NAME, path if kind == "path" else str(path), device="cpu")
    assert model.dtype == torch.float32
    tolerance = 2e-3 if kind == "fp16" else 0
    assert (model.clip.visual.proj - state["clip.visual.proj"]).abs().max() <= tolerance
    converted = ", converted from the authors' layout" if kind == "authors" else ""
    assert model.load_report.source == f"{path}{converted}"
    assert model.load_report.coverage == 1


def test_the_authors_file_of_another_model(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(to_original(small(position_split=8).state_dict()), path)
    with pytest.raises(LoadMismatch) as error:
        load(NAME, path, device="cpu")
    found = message(error)
    assert found[0] == f"the weights {path} are of another model"
    assert any(line.startswith("vision_layers: 2 in the file, ") for line in found)
    assert found[-1] == "try: mmoe convert from-original clip_moe FILE --out DIR"


def test_a_file_of_something_else(tmp_path: Path) -> None:
    save_file({f"layer{i}.weight": torch.ones(2) for i in range(3)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadMismatch, match=r"unknown keys: layer\{0\.\.2\}\.weight"):
        load(NAME, tmp_path / "a.safetensors", device="cpu")


# ---- what does not fit ----


def saved_state(model: Any, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = model.save(folder) / "model.safetensors"
    return path, load_file(path)


@pytest.mark.parametrize("how", ["missing", "unexpected", "reshaped"])
def test_what_does_not_fit_is_refused(how: str, small: Any, tmp_path: Path) -> None:
    path, state = saved_state(small(), tmp_path)
    name = "clip.text_projection"
    if how == "missing":
        del state[name]
    elif how == "unexpected":
        name = "clip.extra"
        state[name] = torch.ones(1)
    else:
        state[name] = torch.ones(3, 3)
    save_file(state, path)
    with pytest.raises(LoadMismatch) as error:
        load(tmp_path, device="cpu")
    found = message(error)
    assert found[0] == "the weights do not fit ClipMoE"
    assert found[2].startswith(f"{how} 1: {name}")
    assert f"zoo.load(..., allow_missing=['{name}'])" in found[-1]
    model = load(tmp_path, device="cpu", allow_missing=[name])
    assert getattr(model.load_report, how)[0].startswith(name)
    assert model.load_report.coverage == (1 if how == "unexpected" else pytest.approx(1 - 1 / len(model.state_dict())))


# ---- options ----


def test_overrides() -> None:
    model = load(NAME, False, device="cpu", num_experts=3, top_k=1, moe_layers=1)
    assert model.config.num_experts == 3
    assert {layer.num_experts for layer in moe_layers(model).values()} == {3}
    assert len(moe_layers(model)) == 2


def test_overrides_of_a_folder(small: Any, tmp_path: Path) -> None:
    small().save(tmp_path)
    assert load(tmp_path, device="cpu", top_k=1).config.top_k == 1


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            {"num_expert": 4},
            [
                "'num_expert' is not an option of clip_moe_tiny",
                "did you mean: num_experts",
                "zoo.load('clip_moe_tiny', num_experts=...)",
            ],
        ),
        ({"zzz": 4}, ["'zzz' is not an option of clip_moe_tiny", "it has: activation, "]),
        (
            {"top_k": "two"},
            ["top_k='two' does not fit clip_moe_tiny", "top_k is int, not str", "mmoe info clip_moe_tiny"],
        ),
        ({"top_k": True}, ["top_k=True does not fit clip_moe_tiny", "top_k is int, not bool"]),
        ({"label_smoothing": "a"}, ["label_smoothing='a' does not fit", "label_smoothing is float, not str"]),
        ({"position_split": 1.5}, ["position_split=1.5 does not fit", "position_split is int or None, not float"]),
        ({"activation": "relu"}, ["activation='relu' does not fit", "activation is 'quick_gelu' or 'gelu'"]),
        ({"image_mean": 0.5}, ["image_mean=0.5 does not fit", "image_mean is tuple"]),
        ({"top_k": 9}, ["top_k=9", "top_k is a whole number from 1 to 4", "top_k=4"]),
        ({"vision_layers": 0}, ["vision_layers=0", "vision_layers is a whole number of at least 1", "vision_layers=1"]),
        ({"interpolation": "foo"}, ["interpolation='foo' does not fit clip_moe_tiny", "interpolation is 'bicubic' or"]),
        ({"vision_mlp_ratio": 0}, ["vision_mlp_ratio=0", "vision_mlp_ratio is a finite number above 0"]),
        ({"balance_coef": float("nan")}, ["balance_coef=nan", "balance_coef is a finite number of at least 0"]),
        ({"init_logit_scale": float("inf")}, ["init_logit_scale=inf", "init_logit_scale is a finite number"]),
        ({"position_split": -3}, ["position_split=-3", "position_split is a whole number of at least 0"]),
        ({"image_std": [0, 1, 1]}, ["image_std=[0, 1, 1]", "image_std has a number of at least 1e-06 for each"]),
        ({"image_mean": [0.5]}, ["image_mean=[0.5]", "image_mean has a number of at least 0 for each of red, green"]),
        ({"image_mean": ["a", "b", "c"]}, ["image_mean=['a', 'b', 'c']", "image_mean has", "image_mean=[0.5,0.5,0.5]"]),
        ({"text_heads": 7}, ["7 heads in a tower of width 128", "heads must share the width evenly", "text_heads=1"]),
        ({"num_experts": -1}, ["num_experts=-1", "num_experts is a whole number of at least 0", "num_experts=0"]),
        (
            {"expert_dropout": 2.0},
            ["expert_dropout=2.0", "expert_dropout is a finite number of at least 0 and below 1", "expert_dropout=0"],
        ),
        ({"vision_heads": 7}, ["7 heads in a tower of width ", "heads must share the width evenly"]),
        (
            {"image_size": 65, "patch_size": 16},
            ["image_size=65 with patch_size=16", "patches must cover the picture", "image_size=64"],
        ),
    ],
)
def test_wrong_overrides(options: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(BadOverride) as error:
        load(NAME, False, device="cpu", **{"num_experts": 4, **options})
    found = [line.removeprefix("try: ") for line in message(error)]
    for line, expected in zip(found[: len(lines)], lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), (torch.float64, torch.float64)],
)
def test_dtypes(dtype: Any, found: torch.dtype, tiny: Any) -> None:
    model = load(NAME, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {found}
    assert model.clip.visual.proj.equal(tiny.clip.visual.proj.to(found))


def test_wrong_dtypes() -> None:
    with pytest.raises(BadOverride) as error:
        load(NAME, dtype="bf61")
    assert message(error) == ["no dtype 'bf61'", "did you mean: bf16", "try: dtype='bf16'"]
    with pytest.raises(BadOverride, match=r"no model in torch\.int8"):
        load(NAME, dtype=torch.int8)


def test_a_model_without_values_cannot_predict(fox: Path) -> None:
    with pytest.raises(Refused, match="predict with a model on the meta device"):
        load(NAME, device="meta").predict(fox, ["a fox"])


def test_wrong_devices() -> None:
    for device in (None, "hip", 5.0):
        with pytest.raises(BadInput, match="no device"):
            load(NAME, device=device)
    with pytest.raises(BadOverride, match="no dtype 5"):
        load(NAME, dtype=5)
    with pytest.raises(BadInput) as error:
        load(NAME, device="gpu")
    assert message(error) == ["no device 'gpu'", "devices are cpu, cuda, mps, xpu, meta", "try: device='auto'"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_here() -> None:
    with pytest.raises(BadInput) as error:
        load(NAME, device="cuda")
    assert message(error) == ["no device 'cuda'", "this machine or this torch has no cuda", "try: device='auto'"]


def test_shapes_only() -> None:
    model = load("clip_moe_vit_l14", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.load_report is None


# ---- other routers and experts ----


@pytest.mark.parametrize(
    ("router", "kind"),
    [
        ("expert_choice", ExpertChoiceRouter),
        ("dense", DenseRouter),
        ("topk:top_k=1", TopKRouter),
        ({"name": "topk", "score": "sigmoid"}, TopKRouter),
    ],
)
def test_another_router_takes_over_the_trained_gate(router: Any, kind: type, tiny: Any, fox: Path) -> None:
    model = load(NAME, device="cpu", router=router)
    layers = moe_layers(model)
    assert {type(layer.router) for layer in layers.values()} == {kind}
    name, layer = next(iter(layers.items()))
    assert layer.router.weight.equal(tiny.get_submodule(name).router.weight)
    assert model.load_report.missing == () == model.load_report.unexpected
    assert model.config.router == router
    probs = model.predict(fox, ["a fox", "a pizza"]).probs
    assert probs.isfinite().all() and not probs.equal(tiny.predict(fox, ["a fox", "a pizza"]).probs)


def test_top_1_uses_one_expert() -> None:
    model = load(NAME, device="cpu", router="topk:top_k=1")
    assert {layer.router.top_k for layer in moe_layers(model).values()} == {1}
    assert model.num_params().active < load(NAME, device="meta").num_params().active


def test_what_another_router_has_in_addition_starts_fresh(tiny: Any) -> None:
    model = load(NAME, device="cpu", router="topk:gate_bias=true,bias_rate=0.01")
    fresh = {f"{name}.router.{part}" for name in moe_layers(model) for part in ("bias", "select_bias")}
    assert set(model.load_report.missing) == fresh
    assert f"missing {len(fresh)}: " in str(model.load_report)
    assert len(model.load_report.matched) == len(tiny.state_dict())


def test_other_experts_start_fresh(tiny: Any) -> None:
    model = load(NAME, device="cpu", experts="gated_ffn")
    layers = moe_layers(model)
    assert {type(layer.experts) for layer in layers.values()} == {GatedFFNExperts}
    name = next(iter(layers))
    assert f"{name}.experts.gate_up_proj" in model.load_report.missing
    assert f"{name}.experts.up_proj" in model.load_report.unexpected
    assert all(".experts." in n for n in (*model.load_report.missing, *model.load_report.unexpected))
    assert model.clip.visual.proj.equal(tiny.clip.visual.proj)


def test_a_router_survives_saving(tmp_path: Path) -> None:
    model = load(NAME, device="cpu", router={"name": "topk", "top_k": 1})
    again = load(model.save(tmp_path), device="cpu")
    assert again.config == model.config
    assert {layer.router.top_k for layer in moe_layers(again).values()} == {1}


@pytest.mark.parametrize(
    ("options", "kind", "lines"),
    [
        (
            {"router": "tpok"},
            UnknownName,
            ["no router named 'tpok'", "did you mean: topk", "try: mmoe list --kind routers"],
        ),
        (
            {"router": "topk:tpo_k=1"},
            BadOverride,
            ["'tpo_k' is not an option of the router 'topk'", "did you mean: top_k"],
        ),
        ({"router": "topk:1"}, BadOverride, ["'1' in 'topk:1' is no option", "options are written key=value"]),
        ({"router": {"top_k": 1}}, BadOverride, ["no 'name' in {'top_k': 1}"]),
        (
            {"router": 3},
            BadOverride,
            ["router=3 does not fit clip_moe_tiny", "router is str or Mapping or None, not int"],
        ),
        (
            {"experts": "fnn"},
            UnknownName,
            ["no expert named 'fnn'", "did you mean: ffn", "try: mmoe list --kind experts"],
        ),
    ],
)
def test_wrong_routers_and_experts(options: dict[str, Any], kind: type[Exception], lines: list[str]) -> None:
    with pytest.raises(kind) as error:
        load(NAME, device="cpu", **options)
    for line, expected in zip(message(error)[: len(lines)], lines, strict=True):
        assert line.startswith(expected)


# ---- the hub ----


def in_cache(model: Any, *names: str) -> Path:
    """The model as a repository in the hub's cache."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / "models--me--model"
    folder = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(folder.name)
    model.save(folder)
    for path in folder.iterdir():
        if names and path.name not in names:
            path.unlink()
    return folder


def test_from_the_hubs_cache_without_network(small: Any) -> None:
    model = small()
    folder = in_cache(model)
    for name in ("hf-hub:me/model", "hf-hub:me/model@main"):
        found = load(name, device="cpu")
        assert found.clip.text_projection.equal(model.clip.text_projection)
        assert found.load_report.source == str(folder / "model.safetensors")


@pytest.mark.parametrize("names", [(), ("config.json",)])
def test_from_the_hub_without_network(names: tuple[str, ...], small: Any) -> None:
    if names:
        in_cache(small(), *names)  # somebody looked at one file of it
    with pytest.raises(Offline) as error:
        load("hf-hub:me/model")
    assert message(error) == [
        "cannot fetch the model 'me/model'",
        "there is no network and the file is not in the cache",
        "try: hf download me/model --local-dir FOLDER   "
        "(on a machine with network, then copy the folder and load it by its path)",
    ]


def test_with_network_the_hub_is_asked_for_the_newest(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    in_cache(small())
    newer = small(num_experts=3)
    newer.save(tmp_path / "newer")
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path / "newer")

    monkeypatch.setattr(loading, "online", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("hf-hub:me/model@v2", device="cpu").config.num_experts == 3
    assert asked == [("me/model", {"revision": "v2", "allow_patterns": ["*.json", "model.safetensors"]})]


def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*args: object, **options: object) -> str:
        raise OSError("Repository Not Found for url: https://...\nPlease make sure")

    monkeypatch.setattr(loading, "online", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(BadInput) as error:
        load("hf-hub:me/model")
    assert message(error) == [
        "cannot fetch the model 'me/model'",
        "Repository Not Found for url: https://...",
        "try: look at https://huggingface.co/me/model",
    ]


def test_a_backbone_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")

    monkeypatch.setattr(loading, "import_module", fail)
    with pytest.raises(MissingExtra) as error:
        load(NAME)
    assert message(error) == [
        "clip_moe needs open_clip_torch",
        "the module 'open_clip' is not installed",
        "try: pip install open_clip_torch",
    ]


def test_an_empty_tag_or_router_is_no_default() -> None:
    with pytest.raises(UnknownWeights, match="no weights '' for 'clip_moe_tiny'"):
        load("clip_moe_tiny.")
    with pytest.raises(UnknownName, match="no router named ''"):
        load("clip_moe_tiny", False, router="")


class TestTopK:
    """A router's spec and the config's `top_k` are one option."""

    def test_the_spec_sets_the_config(self) -> None:
        assert load(NAME, weights=False, router="topk:top_k=1").config.top_k == 1

    def test_a_later_option_wins(self, tmp_path: Path) -> None:
        load(NAME, router="topk:top_k=1").save(tmp_path)
        model = load(tmp_path, top_k=3)
        assert model.config.top_k == 3
        assert {layer.router.top_k for layer in moe_layers(model).values()} == {3}

    def test_both_at_once_have_to_agree(self) -> None:
        assert load(NAME, weights=False, router="topk:top_k=1", top_k=1).config.top_k == 1
        with pytest.raises(BadOverride, match="top_k=3 with a router of top_k=1"):
            load(NAME, weights=False, router="topk:top_k=1", top_k=3)


def test_one_pattern_is_one_pattern() -> None:
    with pytest.raises(LoadMismatch):
        load(NAME, num_experts=8, allow_missing="*router*")
    model = load(NAME, num_experts=8, allow_missing="*.mlp.*")
    assert model.load_report.random == 5 * len(moe_layers(model))


@pytest.mark.parametrize(
    ("file", "change", "wrong"),
    [
        ("config.json", None, "was not written by model.save"),
        ("config.json", {"config": None}, "was not written by model.save"),
        ("config.json", {"family": 5}, "was not written by model.save"),
        ("preprocess.json", {"resize_mode": "nope"}, "resize_mode is 'shortest' or 'longest' or 'squash'"),
        ("preprocess.json", {"mean": [0.5, 0.5]}, "for each of red, green and blue"),
        ("preprocess.json", {"std": [0, 0, 0]}, "image_std has a number of at least 1e-06"),
        ("preprocess.json", {"vocab_size": 9999}, "vocab_size"),
        ("preprocess.json", {"image_size": "64"}, "image_size is int, not str"),
        ("preprocess.json", {"image_size": 16}, "image_size is 16, the model has 32"),
        ("preprocess.json", {"context_length": 999}, "context_length is 999, the model has"),
        ("preprocess.json", {"background": None}, "background"),
        ("preprocess.json", {"background": ["a", "b", "c"]}, "background is ['a', 'b', 'c'], not a colour"),
        ("preprocess.json", {"background": [999, -1, 0]}, "background is [999, -1, 0], not a colour"),
        ("card.json", {"lineage": None}, "lineage is a NoneType, not a mapping"),
        ("card.json", {"moe": [1]}, "moe is a list, not a mapping"),
    ],
)
def test_folders_that_were_edited(file: str, change: Any, wrong: str, small: Any, tmp_path: Path) -> None:
    folder = small().save(tmp_path / "a")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(None if change is None else {**data, **change}))
    with pytest.raises(CorruptFile) as error:
        load(folder)
    assert wrong in str(error.value)


def test_patterns_that_are_none() -> None:
    with pytest.raises(BadOverride, match="allow_missing=5\n  it is a pattern of tensor names"):
        load(NAME, allow_missing=5)  # type: ignore[arg-type]  # wrong on purpose


def test_loading_in_inference_mode() -> None:
    with torch.inference_mode():
        model = load(NAME, device="cpu")
        assert model.load_report is not None and model.load_report.coverage == 1


def test_a_model_larger_than_the_memory() -> None:
    with pytest.raises(BadInput) as error:
        load(NAME, False, device="cpu", image_size=10**6)
    asked, wrong, fix = message(error)
    assert asked == "cannot build clip_moe_tiny" and wrong.startswith("its memory is not there: ")
    assert fix == "try: smaller sizes, or device='meta' for the shapes alone"
