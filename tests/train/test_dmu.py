"""Diversified multiplet upcycling: stages, resume, clusters, recipe errors, and what each stage may change."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import typer
import yaml

from mmoe.errors import BadInput, CorruptFile
from train import clusters, dmu, dmu_table
from train.clusters import refine_cells
from train.dmu import RECIPE, DmuRun, main, print_results, read_recipe
from train.evaluate import expert_use
from train.tasks import recall

SMALL = {
    "model": "clip_moe_tiny",
    "image_clusters": 2,
    "text_clusters": 2,
    "base": {"steps": 2, "batch_size": 32, "lr": 1e-3},
    "mcl": {"steps": 1, "batch_size": 8, "lr": 1e-3, "trainable": ["*.mlp.*"]},
    "router": {"steps": 1, "batch_size": 32, "lr": 1e-2, "trainable": ["*.router.*"]},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dmu")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    run = DmuRun(read_recipe(folder / "recipe.yaml"), folder / "run", progress=False)
    run.clip_moe()
    return run


def test_bundled_recipe_is_valid():
    assert read_recipe(RECIPE).model == "clip_moe_tiny"


def test_experts_differ_from_the_base_in_feed_forward_layers_only(run):
    base, *experts = run.experts()
    assert len(experts) == run.card.moe["experts"] - 1
    for expert in experts:
        changed = {n for n, v in expert.state_dict().items() if not torch.equal(v, base.state_dict()[n])}
        assert changed and all(".mlp." in name for name in changed)


def test_each_stage_starts_from_the_base_with_clusters_of_the_newest_model(recipe, tmp_path, monkeypatch):
    run, started, clustered = DmuRun(read_recipe(recipe), tmp_path / "run", progress=False), [], []

    def train(model, config, name, cells=None):
        started.append((name, copy.deepcopy(model.state_dict())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * len(started)
        return model

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(dmu, "refine_cells", lambda cells, model, *rest: clustered.append(model) or cells)
    models = [model.state_dict() for model in run.experts()]
    assert [name for name, _ in started] == ["base", "mcl_1", "mcl_2", "mcl_3"]
    for _, start in started[1:]:
        assert all(torch.equal(value, models[0][name]) for name, value in start.items())
    for model, newest in zip(clustered, models, strict=False):  # the last one is not clustered
        assert all(torch.equal(value, newest[name]) for name, value in model.state_dict().items())
    assert len(clustered) == len(models) - 1


def test_clusters_are_fitted_to_concepts_that_are_trained_on(run, monkeypatch):
    fitted = []

    class Watched(clusters.MiniBatchKMeans):
        def fit(self, rows):
            fitted.append(len(rows))
            return super().fit(rows)

    monkeypatch.setattr(clusters, "MiniBatchKMeans", Watched)
    none = torch.zeros(len(run.emoji.training_styles), len(run.emoji), dtype=torch.long)
    refine_cells(none, run.base(), run.emoji, (2, 2), 0)
    seen = len(run.emoji.seen)
    assert fitted == [len(run.emoji.training_styles) * seen, seen] and seen == 1341


@pytest.mark.parametrize("file", ["recipe.json", "base.log.json"])
def test_damaged_files_of_a_run_are_named(file, recipe, tmp_path):
    run = DmuRun(read_recipe(recipe), tmp_path / "run", progress=False)
    (tmp_path / "run" / file).write_text("")
    with pytest.raises(CorruptFile, match=f"cannot read '.*{file}'\n  it is not JSON"):
        DmuRun(run.config, tmp_path / "run", progress=False).seconds()


def test_assembly_takes_expert_i_from_stage_i(run):
    models, state = run.experts(), run.clip_moe().state_dict()
    for tower in ("clip.visual.transformer", "clip.transformer"):
        packed = state[f"{tower}.resblocks.1.mlp.experts.up_proj"]
        for i, model in enumerate(models):
            dense = model.state_dict()[f"{tower}.resblocks.1.mlp.c_fc.weight"]
            assert torch.equal(packed[i], dense)


def test_router_stage_moved_the_routers(run):
    untrained = run.upcycled([model.state_dict() for model in run.experts()]).state_dict()
    changed = {n for n, v in run.clip_moe().state_dict().items() if not torch.equal(v, untrained[n])}
    assert changed and all(".router." in name for name in changed)


def test_finished_stages_are_read_not_run(run, monkeypatch):
    monkeypatch.setattr(DmuRun, "train", lambda *a, **k: pytest.fail("a finished stage was run again"))
    monkeypatch.setattr("train.dmu.refine_cells", lambda *a: pytest.fail("clusters of a finished stage were made"))
    again = DmuRun(run.config, run.out, progress=False)
    assert torch.equal(
        again.clip_moe().state_dict()["clip.logit_scale"], run.clip_moe().state_dict()["clip.logit_scale"]
    )


def test_another_seed_needs_another_folder(run):
    with pytest.raises(BadInput, match="it was started with another recipe or seed"):
        DmuRun(run.config, run.out, seed=1)


def test_cells_split_further(run):
    base = run.base()
    cells = torch.zeros(2, len(run.emoji), dtype=torch.long)
    first = refine_cells(cells, base, run.emoji, (2, 1), seed=0)
    second = refine_cells(first, base, run.emoji, (2, 3), seed=0)
    assert first.unique().tolist() == [0, 1] and second.max() < 12
    assert len(second.unique()) > 2
    assert torch.equal(second // 6, first)


def test_recipe_mistakes_are_all_reported(tmp_path):
    bad = {**SMALL, "bsae": SMALL["base"], "mcl": {**SMALL["mcl"], "stpes": 3, "lr": -1}}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(bad))
    with pytest.raises(BadInput) as caught:
        read_recipe(path)
    assert "bsae: Extra inputs are not permitted; did you mean 'base'?" in caught.value.wrong
    assert "mcl.stpes: Extra inputs are not permitted; did you mean 'steps'?" in caught.value.wrong
    assert "mcl.lr: Input should be greater than 0" in caught.value.wrong


def test_a_dense_card_grows_no_experts(tmp_path):
    path = tmp_path / "dense.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": "clip_tiny"}))
    with pytest.raises(BadInput, match="grow experts for 'clip_tiny'\n  it is a dense model"):
        DmuRun(read_recipe(path), tmp_path / "run")


def test_empty_recipe(tmp_path):
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(BadInput) as caught:
        read_recipe(tmp_path / "empty.yaml")
    assert caught.value.wrong == "it holds no mapping from options to values"


def test_seconds_survive_a_second_run(run):
    again = DmuRun(run.config, run.out, progress=False)
    assert set(again.seconds()) == {"base", "mcl_1", "mcl_2", "mcl_3", "clip_moe"}
    assert all(seconds > 0 for seconds in again.seconds().values())


def test_missing_recipe(tmp_path):
    with pytest.raises(BadInput, match="no recipe"):
        read_recipe(tmp_path / "none.yaml")


def test_recall_counts_ties_as_misses():
    assert recall(torch.eye(4), ranks=(1,)) == {"R@1": 1.0}
    assert recall(torch.ones(4, 4), ranks=(1, 4)) == {"R@1": 0.0, "R@4": 1.0}


def test_recall_of_a_diverged_model_is_nothing():
    assert recall(torch.full((4, 4), torch.nan), ranks=(1,)) == {"R@1": 0.0}


def test_expert_use_covers_every_mixture(run):
    use = expert_use(run.clip_moe(), run.emoji)
    assert len(use) == run.card.moe["layers"]
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-3) for layer in use)
    assert json.dumps(use)


def test_results_hold_every_model_that_the_table_shows(run, capsys, monkeypatch):
    few = copy.copy(run.emoji)
    few.seen, few.held_out = run.emoji.seen[:64], run.emoji.held_out[:16]
    monkeypatch.setattr(run, "emoji", few)
    results = run.results(controls=True)
    assert set(results["retrieval"]) == set(dmu_table.MODELS)
    assert results["added_steps"] == 3 * 1 + 1
    assert len({json.dumps(rows) for rows in results["retrieval"].values()}) == len(dmu_table.MODELS)
    assert json.loads((run.out / "results.json").read_text()) == results
    print_results(results)
    assert len(capsys.readouterr().out.splitlines()) == len(dmu_table.MODELS)
    dmu_table.main([run.out])
    table = capsys.readouterr().out
    assert all(about in table for about, _ in dmu_table.MODELS.values())


def test_a_table_is_of_one_recipe(run):
    result = {"seed": 0, "added_steps": 4, "retrieval": {name: {} for name in dmu_table.MODELS}}
    with pytest.raises(BadInput, match=r"their recipes add \[4, 5\] steps"):
        dmu_table.metrics([result, {**result, "seed": 1, "added_steps": 5}])


def test_a_table_needs_the_controls(run, tmp_path, capsys):
    results = {"seed": 4, "retrieval": {"base": {}, "clip_moe": {}}, "experts": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(typer.Exit) as stopped:
        dmu_table.main([tmp_path])
    told = capsys.readouterr().err
    assert stopped.value.exit_code == 2
    assert told.startswith("error: make the table of the run with seed 4\n  it has no base_longer, upcycled, ")
    assert told.endswith("try: python -m train.dmu --controls\n")


def test_the_command_runs_a_recipe_to_its_results(recipe, tmp_path, monkeypatch, capsys):
    results = {"retrieval": {"base": {"seen": {"text_to_image": {"R@1": 0.5, "R@10": 0.75}}}}}
    asked = []
    monkeypatch.setattr(DmuRun, "results", lambda self, controls: asked.append((self.seed, controls)) or results)
    main(recipe, tmp_path / "run", 3, True, 0)
    assert asked == [(3, True)]
    assert "seen 0.500/0.750" in capsys.readouterr().out
