"""Recipes: every mistake at once with its line, overrides, stages, and round trips."""

from __future__ import annotations

import re

import pytest
import yaml

from mmoe.errors import BadInput, MmoeError, UnknownName
from train.recipe import Recipe, bundled, differences

GOOD = """\
model: {name: clip_moe_tiny}
tune: {method: router_only}
data: {name: emoji, batch_size: 16}
optim:
  lr: 1.0e-3
run: {steps: 4}
"""
STAGES = """\
model: {name: clip_moe_tiny}
data: {name: emoji}
optim: {lr: 1.0e-3}
stages:
  - name: one
    run: {steps: 3}
  - name: two
    start: one
    optim: {lr: 3.0e-4}
    run: {steps: 5}
"""


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def mistakes(tmp_path, text, *overrides):
    with pytest.raises(MmoeError) as error:
        Recipe.load(write(tmp_path, text), *overrides)
    return str(error.value)


@pytest.mark.parametrize("name", list(bundled()))
def test_bundled_recipes_are_valid_and_say_what_they_are_for(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert bundled()[name].read_text().startswith("# "), "the first line is shown by `mmoe recipe ls`"


@pytest.mark.parametrize(
    ("change", "told"),
    {
        ("router_only", "router_onl"): "line 2: tune.method should be 'full'",
        ("lr: 1.0e-3", "lr: -1"): "line 5: optim.lr should be greater than 0, not -1",
        ("lr: 1.0e-3", "lr: fast"): "line 5: optim.lr should be a number, not 'fast'",
        ("lr: 1.0e-3", "lr: .nan"): "line 5: optim.lr should be a finite number, not nan",
        ("lr: 1.0e-3", "learning_rate: 1"): "line 5: there is no optim.learning_rate; known: ",
        (
            "  lr: 1.0e-3",
            "  lr: 1.0\n  shedule: cosine",
        ): "line 6: there is no optim.shedule; did you mean optim.schedule?",
        ("  lr: 1.0e-3", "  lr: 1.0\n  lr: 2.0"): "line 6: optim.lr was given before, in line 5",
        ("  lr: 1.0e-3", "  clip: 1.0"): "line 4: optim.lr is missing",
        ("  lr: 1.0e-3", "  lr: 1\n  name: muon"): "name: muon and muon_lr belong together",
        ("batch_size: 16", "batch_size: 0"): "line 3: data.batch_size should be greater than 0, not 0",
        ("batch_size: 16", "batch_size: 1.5"): "line 3: data.batch_size should be a whole number, not 1.5",
        ("batch_size: 16", "batchsize: 16"): "line 3: there is no data.batchsize; did you mean data.batch_size?",
        ("run: {steps: 4}", "run: {}"): "line 6: give either steps or epochs",
        ("run: {steps: 4}", "run: {steps: 4, epochs: 1}"): "line 6: give either steps or epochs",
        ("run: {steps: 4}", "run: {steps: 4, ema: 1.0}"): "line 6: run.ema should be less than 1, not 1.0",
        ("run: {steps: 4}", "run: {steps: 4}\nseed: 3"): "line 7: there is no seed; did you mean run.seed?",
        ("run: {steps: 4}", "run: {steps: 4}\nscale: {shard: ddp}"): "line 7: scale.shard should be 'none' or 'fsdp'",
        ("run: {steps: 4}", "run: {steps: 4}\nlog: tensorboard"): "line 7: log should be",
        ("{method: router_only}", "{method: experts}"): "line 2: method: experts needs either experts: [0, 3]",
        ("{method: router_only}", "{method: modules}"): "line 2: method: modules needs patterns",
        ("{method: router_only}", "{top_used: 2}"): "line 2: top_used says nothing to method: full",
        ("tune: {method: router_only}", "tune: router_only"): "line 2: tune should be a mapping",
        ("model: {name: clip_moe_tiny}", "modle: {name: x}"): "line 1: there is no modle; did you mean model?",
        ("run: {steps: 4}", "run: {steps: 4}\nstages: []"): "line 7: stages is a list of mappings",
        ("run: {steps: 4}", "run: {steps: 4}\nstages: [{run: {steps: 1}}]"): "line 7: a stage without a name",
        ("optim:", "optim: ["): "line ",
    }.items(),
)
def test_a_mistake_is_told_with_its_line(change, told, tmp_path):
    assert change[0] in GOOD
    message = mistakes(tmp_path, GOOD.replace(*change))
    assert told in message and "try: " in message
    assert "pydantic" not in message.lower() and "validation" not in message.lower()


def test_all_mistakes_at_once(tmp_path):
    text = GOOD.replace("lr: 1.0e-3", "lr: -1").replace("steps: 4", "stepps: 4").replace("tune:", "tun:")
    message = mistakes(tmp_path, text)
    for told in ("there is no tun; did you mean tune?", "optim.lr should be", "there is no run.stepps"):
        assert told in message


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "": "it is empty, not sections",
        "- 1\n- 2\n": "it holds a list",
        "just words": "it holds a str",
        "model:\n\tname: x\n": "indented with spaces, not tabs",
        "a: 1\n---\nb: 2\n": "a second document begins",
    }.items(),
)
def test_a_file_that_holds_no_sections(text, told, tmp_path):
    assert told in mistakes(tmp_path, text)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="it is not UTF-8"):
        Recipe.load(path)


def test_names_of_recipes_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match="did you mean: clip_moe_router"):
        Recipe.load("clip_moe_ruter")
    with pytest.raises(UnknownName, match=f"looked in {tmp_path}"):
        Recipe.load("mine.yaml")


def test_overrides_win_and_are_named(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = Recipe.load(path, "optim.lr=2e-4", "run.ema=0.9", "model.overrides.top_k=1")
    (stage,) = recipe.stages
    assert (stage.optim.lr, stage.run.ema, stage.model.overrides) == (2e-4, 0.9, {"top_k": 1})
    with pytest.raises(
        BadInput, match=r"optim.lrr=1 on the command line: there is no optim.lrr; did you mean optim.lr\?"
    ):
        Recipe.load(path, "optim.lrr=1")


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", "optim.lr=[1", "stages.one.run.steps=3"])
def test_no_overrides(text, tmp_path):
    with pytest.raises(BadInput, match="no override"):
        Recipe.load(write(tmp_path, GOOD), text)


def test_steps_on_the_command_line_take_the_place_of_epochs(tmp_path):
    path = write(tmp_path, STAGES.replace("run: {steps: 3}", "run: {epochs: 3}"))
    for recipe in (Recipe.load(path, "run.steps=7"), Recipe.load(path, "stages.one.run.steps=7", "run.seed=1")):
        assert (recipe.stages[0].run.steps, recipe.stages[0].run.epochs) == (7, None)
    assert [s.run.epochs for s in Recipe.load(path, "run.epochs=2").stages] == [2, 2]
    with pytest.raises(BadInput, match="give either steps or epochs"):
        Recipe.load(path, "run.epochs=2", "run.steps=7")


def test_a_stage_takes_what_all_stages_say_and_changes_it(tmp_path):
    one, two = Recipe.load(write(tmp_path, STAGES)).stages
    assert (one.optim.lr, one.run.steps, two.optim.lr, two.run.steps) == (1e-3, 3, 3e-4, 5)
    assert two.start == "one" and one.data == two.data


def test_an_override_is_of_all_stages_or_of_one(tmp_path):
    path = write(tmp_path, STAGES)
    assert [stage.optim.lr for stage in Recipe.load(path, "optim.lr=1.0").stages] == [1.0, 1.0]
    assert [stage.optim.lr for stage in Recipe.load(path, "stages.two.optim.lr=1.0").stages] == [1e-3, 1.0]
    with pytest.raises(BadInput, match="did you mean: two"):
        Recipe.load(path, "stages.tow.optim.lr=1.0")
    with pytest.raises(BadInput, match=r"optim.lr=-1 on the command line: optim.lr should be greater than 0, not -1"):
        Recipe.load(path, "optim.lr=-1")


def test_mistakes_in_stages_name_the_stage(tmp_path):
    message = mistakes(tmp_path, STAGES.replace("steps: 5", "steps: x"))
    assert "line 10: stages.two.run.steps should be a whole number, not 'x'" in message
    message = mistakes(tmp_path, STAGES.replace("name: two", "name: one"))
    assert "line 7: a stage named 'one' again" in message


def test_a_mistake_for_all_stages_is_told_once(tmp_path):
    message = mistakes(tmp_path, STAGES.replace("optim: {lr: 1.0e-3}", "optim: {lr: 1.0e-3, wamup: 1}"))
    assert message.count("optim.wamup") == 1 and "line 3" in message


@pytest.mark.parametrize("text", [GOOD, STAGES])
def test_the_resolved_recipe_is_the_same_recipe(text, tmp_path):
    recipe = Recipe.load(write(tmp_path, text))
    path = tmp_path / "resolved.yaml"
    recipe.save(path, {"mmoe": "1", "seed": "0"})
    assert path.read_text().startswith("# mmoe: 1\n# seed: 0\n")
    assert Recipe.load(path) == recipe
    told = yaml.safe_load(path.read_text())
    assert ("stages" in told) == (text is STAGES)


def test_differences_are_told_by_option(tmp_path):
    a, b = Recipe.load(write(tmp_path, STAGES)), Recipe.load(write(tmp_path, STAGES), "stages.two.optim.lr=0.5")
    assert differences(a, b) == ["stages.two.optim.lr: 0.0003 -> 0.5"]
    assert differences(a, a) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("steps: 10", "steps: true", "run.steps should be a number, not true|steps should be a number, not true"),
        ("model:", "name: ..\nmodel:", "of letters, digits"),
        ("model:", "x: &x [*x]\nmodel:", "a part of it holds itself"),
        ("model:", "stages: [{name: model}]\nmodel:", "no stage can be named 'model'"),
        ("model:", "stages: [{name: a, start: {assemble: []}}]\nmodel:", "a list with one value at least"),
    ],
)
def test_values_that_only_look_right(old, new, told, tmp_path):
    text = "model: {name: clip_moe_tiny}\ndata: {name: emoji}\noptim: {lr: 0.1}\nrun: {steps: 10}\n"
    assert re.search(told, mistakes(tmp_path, text.replace(old, new, 1)))


def test_deep_nesting_is_told(tmp_path):
    assert "is nested too deeply" in mistakes(tmp_path, "model: " + "[" * 3000 + "]" * 3000)
