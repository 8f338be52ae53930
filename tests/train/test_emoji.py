"""The bundled emoji in training: batches, clusters, augmentation, and multiplet upcycling from end to end."""

from __future__ import annotations

import json

import pytest
import torch

import train
import zoo
from mmoe.errors import BadInput, BadOverride
from train import clusters
from train.augment import augment, on_background
from train.clusters import refine_cells
from train.compare import compare
from train.data.emoji import Emoji, load_emoji
from train.emoji_retrieval import parts
from train.evaluate import tasks
from train.recipe import Recipe

EXPERTS = ("base", "mcl_1", "mcl_2", "mcl_3")


@pytest.fixture(scope="module")
def data():
    return Emoji("train")


@pytest.fixture(scope="module")
def base():
    return zoo.load("clip_tiny", device="cpu")


def test_batches_hold_seen_concepts_once_in_training_styles(data):
    emoji, batches = data.emoji, data.epoch(64, seed=1)
    styles, concepts = zip(*(divmod(index, len(emoji)) for batch in batches for index in batch), strict=True)
    assert len(set(concepts)) == len(concepts) > 1280
    assert not set(concepts) & set(emoji.held_out)
    assert set(styles) == {0, 1}
    assert batches != data.epoch(64, seed=2)


def test_cluster_batches_stay_inside_one_cell():
    data = Emoji("train")
    data.cells = torch.arange(len(data.emoji)).remainder(5).expand(2, -1)
    for batch in data.epoch(32, seed=0):
        assert len({index % len(data.emoji) % 5 for index in batch}) == 1


def test_clusters_below_half_a_batch_are_an_error():
    data = Emoji("train")
    data.cells = torch.arange(2 * len(data.emoji)).view(2, -1)
    with pytest.raises(BadInput, match="every cluster is smaller"):
        data.epoch(32, seed=0)


@pytest.mark.parametrize("told", [{}, {"models": []}, {"models": ["clip_tiny"], "imge": 2}])
def test_clusters_need_models(told):
    with pytest.raises(BadOverride, match=r"it names no models|did you mean: image"):
        Emoji("train", clusters=told, load=zoo.load)


def test_clusters_are_fitted_to_concepts_that_are_trained_on(base, monkeypatch):
    fitted, emoji = [], load_emoji()

    class Watched(clusters.MiniBatchKMeans):
        def fit(self, rows):
            fitted.append(len(rows))
            return super().fit(rows)

    monkeypatch.setattr(clusters, "MiniBatchKMeans", Watched)
    refine_cells(torch.zeros(2, len(emoji), dtype=torch.long), base, emoji, (2, 2), 0)
    assert fitted == [2 * 1341, 1341]


def test_cells_split_further(base):
    emoji = load_emoji()
    first = refine_cells(torch.zeros(2, len(emoji), dtype=torch.long), base, emoji, (2, 1), seed=0)
    second = refine_cells(first, base, emoji, (2, 3), seed=0)
    assert first.unique().tolist() == [0, 1] and second.max() < 12
    assert len(second.unique()) > 2
    assert torch.equal(second // 6, first)


def test_what_becomes_of_a_picture_depends_on_its_own_seed():
    pixels = load_emoji().pixels("noto")[:16]
    first, again = (augment(pixels, range(16)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1 + 1e-6
    torch.testing.assert_close(augment(pixels[5:7], [5, 6]), first[5:7])
    assert not torch.equal(augment(pixels[5:6], [6])[0], first[5])


def test_transparency_shows_the_background():
    clear = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    assert (on_background(clear) == 1).all()


def test_a_batch_has_all_styles_of_a_concept_and_one_caption(data, base):
    batch = data.batch([3, len(data.emoji) + 7], base, [10, 11])
    assert batch["image"].shape == (4, 3, 64, 64) and len(batch["text"]) == 2
    alone = data.batch([3], base, [10])
    torch.testing.assert_close(alone["image"], batch["image"][[0, 2]])
    assert torch.equal(alone["text"][0], batch["text"][0])


def test_every_part_of_the_task_is_told_in_words():
    found = parts(load_emoji())
    assert len(found) == 7
    task = tasks.build("emoji_retrieval")
    assert task.about("held_out_noto") == "300 concepts never trained on, noto"
    assert task.about("seen_twemoji") == "1,341 concepts trained on, twemoji (style never trained on)"
    assert task.about("other") == "other"


@pytest.fixture(scope="module")
def dmu(tmp_path_factory):
    """The bundled recipe with few steps."""
    out = tmp_path_factory.mktemp("dmu") / "run"
    few = ["run.steps=1", "data.batch_size=32", "data.limit=128", "log=[]", "model.overrides.vision_layers=2"]
    few += ["model.overrides.text_layers=2", "model.overrides.moe_layers=2"]
    train.run(Recipe.load("clip_moe_dmu", *few), out, progress=False)
    return out


def weights(run, stage):
    return zoo.load(run / stage / "model", device="cpu").state_dict()


def test_experts_differ_from_the_base_in_feed_forward_layers_only(dmu):
    first, *experts = (weights(dmu, name) for name in EXPERTS)
    for expert in experts:
        changed = {name for name, value in expert.items() if not torch.equal(value, first[name])}
        assert changed and all(".mlp." in name for name in changed)
    assert not torch.equal(*(expert["clip.transformer.resblocks.1.mlp.c_fc.weight"] for expert in experts[:2]))


def test_assembly_takes_expert_i_from_stage_i_and_trains_its_routers(dmu):
    mixture, dense = weights(dmu, "clip_moe"), [weights(dmu, name) for name in EXPERTS]
    for tower in ("clip.visual.transformer", "clip.transformer"):
        packed = mixture[f"{tower}.resblocks.1.mlp.experts.up_proj"]
        for expert, state in zip(packed, dense, strict=True):
            assert torch.equal(expert, state[f"{tower}.resblocks.1.mlp.c_fc.weight"])
    assert torch.equal(mixture["clip.token_embedding.weight"], dense[0]["clip.token_embedding.weight"])


def test_controls_have_as_many_steps_as_the_mixture_had():
    stages = {stage.name: stage for stage in Recipe.load("clip_moe_dmu").stages}
    added = sum(stages[name].run.steps for name in (*EXPERTS[1:], "clip_moe"))
    assert stages["base_longer"].run.steps == stages["upcycled"].run.steps == added
    assert len({stage.run.seed for stage in stages.values()}) == 1


def test_every_stage_is_measured_in_every_part(dmu):
    entries = compare([dmu])
    assert {entry["model"] for entry in entries} == {*EXPERTS, "clip_moe", "base_longer", "upcycled"}
    assert len(entries) == 7 * (1 + 7)
    assert len({json.dumps(entry) for entry in entries}) == len(entries)
