"""`mmoe convert`: models from dense ones and from the authors' files, end to end, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from mmoe.errors import Refused
from mmoe.moe import moe_layers
from zoo import loading, registry
from zoo.card import read_cards
from zoo.clip_moe.convert import difference, to_original, upcycle

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 600, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(autouse=True)
def _small_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's ViT-B-32-quickgelu with two blocks, so that its weights are drawn at once."""
    real = open_clip.get_model_config

    def small(name: str) -> Any:
        return SMALL if name == "ViT-B-32-quickgelu" else real(name)

    monkeypatch.setattr(open_clip, "get_model_config", small)


@pytest.fixture
def dense(small: Any, tmp_path: Path) -> Any:
    """Saves dense models, each with weights of its own."""

    def save(name: str, base: Any = None, **options: Any) -> Path:
        model = small(num_experts=0, **options)
        if base is not None:
            state = base.state_dict()
            model.load_state_dict({n: v if ".mlp." in n else state[n] for n, v in model.state_dict().items()})
        return Path(model.save(tmp_path / name))

    return save


ARCH = "open_clip:ViT-B-32-quickgelu"


def test_upcycle_from_open_clip(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "my_moe"
    done = run("convert", "upcycle", ARCH, "--experts", "3", "--out", out)
    assert done.code == 0, done.err
    assert done.err == (
        f"note: ALL WEIGHTS ARE RANDOM: '{ARCH}' names no weights; trained weights: "
        f"{ARCH}/openai, {ARCH}/laion400m_e31, {ARCH}/laion400m_e32\n"
    )
    model = zoo.load(out, device="cpu")
    before, after, difference, licence, written, load_it = done.out.splitlines()
    params = model.num_params()
    dense_params = params.total - params.routers - 2 * params.routed // 3
    assert re.fullmatch(rf"before +{dense_params:,} parameters, +{dense_params:,} active", before)
    assert re.fullmatch(rf"after +{params.total:,} parameters, +{params.active:,} active", after)
    found = re.fullmatch(r"difference +(\S+) of the largest output, on random pictures and texts", difference)
    assert found is not None and float(found[1]) < 1e-5
    assert licence.split() == ["licence", "Apache-2.0"]
    assert re.fullmatch(rf"written +{re.escape(str(out))} in [\d.]+ s", written)
    assert load_it.split(maxsplit=2)[-1] == f"zoo.load('{out}')"
    assert {layer.num_experts for layer in moe_layers(model).values()} == {3} and len(moe_layers(model)) == 3
    assert model.load_report.coverage == 1 and model.tokenizer(["a fox"]).shape == (1, 77)


def test_its_card_says_where_it_comes_from(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "my_moe"
    run("convert", "upcycle", ARCH, "--layers", "1", "--noise", "0.1", "--seed", "3", "--out", out)
    card = zoo.load(out, device="cpu").card
    assert (card.name, card.family, card.licence) == ("my_moe", "clip_moe", "Apache-2.0")
    assert card.summary == f"Made by `mmoe convert upcycle` from {ARCH}."
    assert card.components == (
        {
            "name": "open_clip ViT-B-32-quickgelu, architecture with random weights",
            "licence": "MIT",
            "source": "https://github.com/mlfoundations/open_clip",
        },
    )
    assert card.lineage == {
        "verb": "upcycle",
        "source": ARCH,
        "experts": 4,
        "top_k": 2,
        "layers": 1,
        "noise": 0.1,
        "seed": 3,
        "dtype": "fp32",
        "weights": "random",
    }
    assert card.moe == {"layers": 2, "experts": 4, "top_k": 2, "router": "topk"}
    model = zoo.load(out, device="meta")
    assert card.params == {"total": model.num_params().total, "active": model.num_params().active}
    assert not card.weights and not card.metrics and not card.notes
    text = " ".join(run("info", out).out.split())
    assert f"made by verb upcycle, source {ARCH}" in text and "licence Apache-2.0" in text


def test_random_weights_are_never_forgotten(run: Any, tmp_path: Path, fox: Path) -> None:
    run("convert", "upcycle", ARCH, "--out", tmp_path / "a")
    done = run("predict", tmp_path / "a", fox, "a fox")
    assert done.code == 0 and done.err == "note: this model's card says that its weights were random\n"


def test_other_libraries_are_for_python(run: Any, tmp_path: Path) -> None:
    done = run("convert", "upcycle", "timm:vit_tiny_patch16_224", "--out", tmp_path / "a")
    assert done.code == 2 and done.err.startswith(
        "error: cannot upcycle 'timm:vit_tiny_patch16_224' to a folder\n"
        "  only open_clip's CLIPs become models of the zoo\n"
        "  try: sparse, report = mmoe.upcycle(model, num_experts=4)"
    )


def test_the_seed_decides(run: Any, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("convert", "upcycle", ARCH, "--seed", str(seed), "--out", tmp_path / name)
        files.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert files[0] == files[1] != files[2]


def test_upcycle_from_a_folder_as_json(run: Any, dense: Any, tmp_path: Path) -> None:
    source, out = dense("dense"), tmp_path / "out"
    done = run("convert", "upcycle", source, "--top-k", "1", "--dtype", "bf16", "--out", out, "--json")
    found = done.json
    assert (done.code, done.err, found["out"]) == (0, "", str(out))
    assert found["before"]["total"] == zoo.load(source, device="meta").num_params().total
    model = zoo.load(out, device="cpu")
    assert found["after"]["total"] == model.num_params().total and found["after"]["active"] < found["after"]["total"]
    assert found["difference"] < 1e-5 and found["card"] == json.loads((out / "card.json").read_text())
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_upcycle_the_dense_model_of_the_zoo(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {card.name: card for card in read_cards(Path(zoo.__file__).parent / "clip_moe" / "card.yaml")}
    monkeypatch.setattr(registry, "_cards", lambda: cards)
    done = run("convert", "upcycle", "clip_moe_tiny", "--out", tmp_path / "out")
    assert (done.code, done.err) == (
        2,
        "error: cannot upcycle 'clip_moe_tiny'\n  it is a mixture already; give a dense model\n"
        "  try: mmoe convert upcycle clip_tiny --out DIR\n",
    )
    found = run("convert", "upcycle", "clip_tiny", "--out", tmp_path / "out", "--json").json
    assert found["before"]["total"] == cards["clip_tiny"].params["total"] and found["difference"] < 1e-5
    assert found["card"]["licence"] == cards["clip_tiny"].licence
    assert [part["name"] for part in found["card"]["components"]] == ["clip_tiny"]


def test_longer_texts(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", "upcycle", ARCH, "--context-length", "248", "--out", out)
    assert done.code == 0, done.err
    config = zoo.load(out, device="meta").config
    assert (config.context_length, config.position_split) == (248, 20)
    done = run("convert", "upcycle", ARCH, "--context-length", "247", "--out", tmp_path / "other")
    assert done.code == 2
    assert done.err.endswith(
        "error: context_length=247 from texts of 77 tokens\n"
        "  a stretch keeps k rows and gives 308 - 3k tokens\n"
        "  try: context_length=248\n"
    )
    assert not (tmp_path / "other").exists()


def test_several_sources(run: Any, dense: Any, small: Any, tmp_path: Path) -> None:
    """Folders, files in our layout and files in the authors', each giving one expert."""
    base = dense("stage0")
    stage0 = zoo.load(base, device="cpu")
    stage1 = zoo.load(dense("stage1", base=stage0), device="cpu")
    stage2 = zoo.load(dense("stage2", base=stage0), device="cpu")
    save_file(to_original(stage2.state_dict()), tmp_path / "stage2.safetensors")
    sources = [base, tmp_path / "stage1" / "model.safetensors", tmp_path / "stage2.safetensors"]
    words = [word for source in sources for word in ("--source", source)]
    done = run("convert", "upcycle", base, *words, "--experts", "9", "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert "difference" not in done.out
    model = zoo.load(tmp_path / "out", device="cpu")
    name, layer = next(iter(moe_layers(model).items()))
    for expert, stage in enumerate((stage0, stage1, stage2)):
        assert layer.experts.up_proj[expert].equal(stage.get_submodule(name).c_fc.weight)
    assert model.card.lineage["experts"] == 3 and model.card.lineage["sources"] == [str(s) for s in sources]
    assert model.card.licence == "unknown", "of the two files nothing is known"
    assert {"name": "stage2.safetensors", "licence": "unknown", "source": "stage2.safetensors"} in model.card.components


def test_sources_that_do_not_belong_together(run: Any, dense: Any, tmp_path: Path) -> None:
    base, other = dense("stage0"), dense("other")
    done = run("convert", "upcycle", base, "--source", base, "--source", other, "--out", tmp_path / "out")
    assert done.code == 0
    count = sum(".mlp." not in name for name in zoo.load(base, device="meta").state_dict())
    found = re.fullmatch(
        r"note: (\S+) differs from SOURCE in (\d+) tensors outside its experts; SOURCE's are used\n", done.err
    )
    assert found is not None and 0 < int(found[2]) <= count


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["clip_moe_tiny"],
            "cannot upcycle 'clip_moe_tiny'\n  it is a mixture already; give a dense model\n"
            "  try: mmoe convert upcycle open_clip:ViT-B-32-quickgelu/openai --out DIR",
        ),
        (["clip_moe_tin"], "no model named 'clip_moe_tin'\n  did you mean: clip_moe_tiny, clip_moe_vit_l14\n"),
        (["./gone"], "no model folder './gone'\n"),
        (["open_clip:ViT-B32"], "open_clip has no model 'ViT-B32'\n  did you mean: ViT-B-32"),
        (["open_clip:ViT-B-32/openia"], "open_clip has no weights 'openia' for 'ViT-B-32'\n  it has: openai, "),
        (["open_clip:RN50"], "make a clip_moe of open_clip's 'RN50'\n  it is no plain ViT"),
        (
            ["open_clip:ViT-B-32-quickgelu/openai"],
            "cannot fetch 'open_clip_model.safetensors' of 'timm/vit_base_patch32_clip_224.openai'\n"
            "  there is no network and the file is not in the cache\n",
        ),
        ([ARCH, "--experts", "2", "--top-k", "3"], "top_k=3\n  top_k is a whole number from 1 to 2\n"),
        ([ARCH, "--layers", "0"], "moe_layers=0\n  moe_layers is a whole number of at least 1\n"),
        ([ARCH, "--seed", "9" * 30], "Invalid value for '--seed'"),
        ([ARCH, "--dtype", "int8"], "no dtype 'int8'\n"),
        ([ARCH, "--source", "gone.pt"], "no model named 'gone.pt'\n"),
    ],
)
def test_upcycling_that_is_refused(words: list[str], text: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("convert", "upcycle", *words, "--out", out)
    error = done.err.partition("error: ")[2]
    assert done.code == 2 and error.startswith(text), done.err
    assert "Traceback" not in done.err and not out.exists()


def test_nothing_is_overwritten(run: Any, dense: Any, tmp_path: Path) -> None:
    source, out = dense("dense"), tmp_path / "out"
    out.mkdir()
    assert run("convert", "upcycle", source, "--out", out).code == 0, "an empty folder is fine"
    (out / "mine.txt").write_text("keep")
    done = run("convert", "upcycle", source, "--experts", "2", "--out", out)
    assert (done.code, done.err) == (
        2,
        f"error: the folder '{out}' is not empty\n  files in it would be replaced\n"
        "  try: add --force, or give another folder\n",
    )
    assert zoo.load(out, device="meta").config.num_experts == 4
    assert run("convert", "upcycle", source, "--experts", "2", "--out", out, "--force").code == 0
    assert zoo.load(out, device="meta").config.num_experts == 2 and (out / "mine.txt").read_text() == "keep"
    done = run("convert", "upcycle", source, "--out", out / "mine.txt", "--force")
    assert done.err == f"error: '{out / 'mine.txt'}' is no folder\n  a model is saved as a folder\n  try: --out DIR\n"


def test_a_mixture_that_is_not_the_dense_model(
    run: Any, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.clip_moe.convert.difference", lambda dense, mixture: 0.01)
    done = run("convert", "upcycle", dense("dense"), "--out", tmp_path / "out")
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert done.err.startswith(
        "error: cannot upcycle: the mixture is not the dense model at the start\n"
        "  their outputs differ by 1.0e-02 of the largest, which is more than rounding\n"
    )
    assert run("convert", "upcycle", tmp_path / "dense", "--noise", "0.1", "--out", tmp_path / "out").code == 0


def test_a_mixture_that_is_no_number_is_not_the_dense_model(small: Any) -> None:
    dense = small(num_experts=0)
    mixture = upcycle(dense, 2)
    with torch.no_grad():
        mixture.clip.ln_final.weight.fill_(torch.nan)
    assert math.isnan(difference(dense, mixture))


def test_a_home_folder_is_checked_before_it_is_written(
    run: Any, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = dense("dense")
    assert run("convert", "upcycle", source, "--out", "~/new").code == 0
    done = run("convert", "upcycle", source, "--out", "~/new")
    assert done.code == 2 and f"the folder '{tmp_path / 'new'}' is not empty" in done.err
    assert run("convert", "to-original", "~/new", "--out", "~/file.pt").code == 0
    done = run("convert", "to-original", "~/new", "--out", "~/file.pt")
    assert done.code == 2 and f"'{tmp_path / 'file.pt'}' is there already" in done.err


# ---- the authors' files ----


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"router": "dense"}, "they have no router 'dense'"),
        ({"router": "topk:score=sigmoid"}, "they have no router 'topk:score=sigmoid'"),
        ({"experts": "gated_ffn"}, "they have no experts 'gated_ffn'"),
    ],
)
def test_what_the_authors_layout_cannot_hold(
    options: dict[str, str], wrong: str, run: Any, small: Any, tmp_path: Path
) -> None:
    small(**options).save(tmp_path / "a")
    done = run("convert", "to-original", tmp_path / "a", "--out", tmp_path / "a.safetensors")
    assert done.code == 2 and wrong in done.err and not (tmp_path / "a.safetensors").exists()
    small(router="topk:top_k=1").save(tmp_path / "b")
    assert run("convert", "to-original", tmp_path / "b", "--out", tmp_path / "b.safetensors").code == 0


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_authors_weights_there_and_back(suffix: str, run: Any, small: Any, tmp_path: Path) -> None:
    model = small(num_experts=3, top_k=1, position_split=20)
    folder, file, again = model.save(tmp_path / "ours"), tmp_path / f"theirs.{suffix}", tmp_path / "again"
    done = run("convert", "to-original", folder, "--out", file)
    assert done.code == 0 and done.err.startswith("note: their code takes vision_heads=1, text_heads=1, top_k=2")
    assert done.out.startswith(f"{file}: ") and done.out.endswith("; read back they are equal bit for bit\n")
    done = run("convert", "from-original", "clip_moe", file, "--top-k", "1", "--out", again)
    assert (done.code, done.err) == (0, "")
    assumed = {"activation": "quick_gelu", "vision_heads": 1, "text_heads": 1}
    assumed |= {"position_split": 20, "route_padding": True}
    listed = ", ".join(f"{key}={value}" for key, value in assumed.items())
    told = f"assumed      {listed} (not in the file; change it with --set)\n"
    assert (told in done.out) == (suffix == "pt"), "a .safetensors file says it"
    found = zoo.load(again, device="cpu")
    assert all(value.equal(found.state_dict()[name]) for name, value in model.state_dict().items())
    assert found.config.top_k == 1 and found.config.num_experts == 3
    assert found.card.licence == "unknown"
    assert found.card.lineage == {
        "verb": "from-original",
        "source": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "top_k": 1,
        **(assumed if suffix == "pt" else {}),
    }


def test_what_the_file_does_not_say_can_be_set(run: Any, small: Any, tmp_path: Path) -> None:
    save_file(to_original(small(num_experts=0).state_dict()), tmp_path / "a.safetensors")
    words = ["convert", "from-original", "clip_moe", tmp_path / "a.safetensors", "--out", tmp_path / "out"]
    found = run(*words, "--set", "activation=gelu", "--json").json
    assert found["assumed"] == {"vision_heads": 1, "text_heads": 1, "position_split": 20}
    assert found["before"] is None
    assert zoo.load(tmp_path / "out", device="meta").config.activation == "gelu"
    done = run(*words, "--set", "activation=relu", "--force")
    assert done.code == 2 and done.err.startswith("error: activation='relu' does not fit clip_moe\n")
    done = run(*words, "--set", "vision_width=128", "--force")
    assert done.code == 2 and done.err.startswith("error: the weights do not fit ClipMoE\n")


def test_a_file_of_ours_says_what_names_do_not(run: Any, small: Any, tmp_path: Path) -> None:
    model = small(top_k=1, activation="gelu", vision_heads=4, text_heads=2, route_padding=False)
    model.save(tmp_path / "a")
    run("convert", "to-original", tmp_path / "a", "--out", tmp_path / "a.safetensors")
    words = ["convert", "from-original", "clip_moe", tmp_path / "a.safetensors"]
    done = run(*words, "--out", tmp_path / "b")
    assert done.code == 0 and "assumed" not in done.out, done.err
    again = zoo.load(tmp_path / "b", device="cpu")
    assert again.config == model.config and again.preprocessing == model.preprocessing
    run(*words, "--out", tmp_path / "c", "--top-k", "2", "--set", "vision_heads=1")
    config = zoo.load(tmp_path / "c", device="meta").config
    assert (config.top_k, config.vision_heads, config.text_heads) == (2, 1, 2)


@pytest.mark.parametrize("note", ["{", "1", "[1]", '"0.1.0"', "{}", '{"family": "clip_moe", "config": [1]}'])
def test_notes_of_others_are_ignored(note: str, run: Any, small: Any, tmp_path: Path) -> None:
    save_file(to_original(small(num_experts=0).state_dict()), tmp_path / "a.safetensors", metadata={"mmoe": note})
    done = run("convert", "from-original", "clip_moe", tmp_path / "a.safetensors", "--out", tmp_path / "b")
    assert done.code == 0 and "assumed      activation=quick_gelu" in done.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["clip_mo", "a.safetensors"], "no model family 'clip_mo'\n  did you mean: clip_moe\n  try: mmoe list\n"),
        (["clip_moe", "gone.pt"], "no weights file 'gone.pt'\n"),
        (["clip_moe", "odd.safetensors"], "convert this checkpoint to clip_moe\n  unknown keys: head.weight\n"),
        (["clip_moe", "bad.pt"], "cannot read the weights file 'bad.pt'\n  5 bytes; it is no torch file, or damaged\n"),
    ],
)
def test_files_that_are_refused(
    words: list[str], text: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"head.weight": torch.ones(1)}, "odd.safetensors")
    Path("bad.pt").write_text("hello")
    done = run("convert", "from-original", *words, "--out", "out")
    assert done.code == 2 and done.err.startswith(f"error: {text}"), done.err
    assert not Path("out").exists()


def test_what_the_authors_code_would_read_otherwise_is_told(run: Any, small: Any, tmp_path: Path) -> None:
    small(text_heads=4, activation="gelu").save(tmp_path / "a")
    done = run("convert", "to-original", tmp_path / "a", "--out", tmp_path / "a.pt")
    assert done.err.startswith("note: their code takes activation=quick_gelu, vision_heads=1, text_heads=1")
    back = done.err.split("the way back needs ")[1].split()
    done = run("convert", "from-original", "clip_moe", tmp_path / "a.pt", "--out", tmp_path / "b", *back)
    assert done.code == 0
    config = zoo.load(tmp_path / "b", device="cpu").config
    assert (config.text_heads, config.activation) == (4, "gelu")


def test_one_option_given_twice(run: Any, small: Any, tmp_path: Path) -> None:
    small().save(tmp_path / "a")
    run("convert", "to-original", tmp_path / "a", "--out", tmp_path / "a.pt")
    given = ["--top-k", "2", "--set", "top_k=1"]
    done = run("convert", "from-original", "clip_moe", tmp_path / "a.pt", "--out", tmp_path / "b", *given)
    assert (done.code, done.err) == (
        2,
        "error: --top-k 2 with --set top_k=1\n  they are the same option\n  try: --top-k 2\n",
    )


@pytest.mark.parametrize("options", [{"router": "topk:gate_bias=true"}, {"router": "topk:bias_rate=0.1"}])
def test_upcycling_to_another_router(options: Any, small: Any) -> None:
    dense = small(num_experts=0)
    model = upcycle(dense, 3, **options)
    assert difference(dense, model) < 1e-5
    assert all(moe.router.num_experts == 3 for moe in moe_layers(model).values())


@pytest.mark.parametrize("options", [{"experts": "with_null:num_null=1"}, {"context_length": 10}])
def test_upcycling_to_what_does_not_fit(options: Any, small: Any) -> None:
    with pytest.raises(Refused, match=r"upcycle with .*\n  the dense model's tensors do not fit"):
        upcycle(small(num_experts=0), 3, **options)


def test_to_original_that_is_refused(run: Any, small: Any, tmp_path: Path) -> None:
    others = [{"experts": "gated_ffn"}, {"experts": "with_null"}, {"experts": "ffn:bias=false"}, {"router": "fixed"}]
    for i, options in enumerate([*others, {"router": "topk:bias_rate=0.1"}, {"router": "topk:gate_bias=true"}]):
        folder = small(**options).save(tmp_path / str(i))
        done = run("convert", "to-original", folder, "--out", tmp_path / "a.pt")
        assert done.code == 2 and not (tmp_path / "a.pt").exists(), options
        assert done.err.startswith("error: cannot write this model under the authors' names\n  the"), options
    done = run("convert", "to-original", folder, "--out", tmp_path / "a.bin")
    assert done.err == (
        f"error: cannot write weights to '{tmp_path / 'a.bin'}'\n  the suffix names the format\n"
        "  try: --out original.safetensors\n"
    )
    (tmp_path / "b.pt").write_text("mine")
    done = run("convert", "to-original", folder, "--out", tmp_path / "b.pt")
    assert done.err.startswith(f"error: '{tmp_path / 'b.pt'}' is there already\n  it would be replaced\n")
    assert (tmp_path / "b.pt").read_text() == "mine"


def test_a_family_without_upcycling(run: Any, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("zoo.clip_moe.convert.upcycle")
    done = run("convert", "upcycle", dense("dense"), "--out", tmp_path / "out")
    assert (done.code, done.err) == (
        2,
        "error: cannot upcycle a clip_moe\n  it can: from-original, to-original\n  try: mmoe convert --help\n",
    )


def test_without_open_clip(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")

    monkeypatch.setattr(loading, "import_module", fail)
    done = run("convert", "upcycle", ARCH, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.startswith("error: clip_moe needs open_clip_torch\n")


def test_help_has_examples(run: Any) -> None:
    assert {"upcycle", "from-original", "to-original"} <= set(run("convert", "--help").out.split())
    for verb in ("upcycle", "from-original", "to-original"):
        done = run("convert", verb, "--help")
        assert f"\n  mmoe convert {verb} " in done.out and "--json" in done.out
