"""The contrastive loop: batches, augmentation, frozen parameters, exact resume, errors."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import zoo
from mmoe.errors import BadInput, BadOverride, CorruptFile
from mmoe.moe import moe_layers
from train.augment import augment, on_background
from train.contrastive import (
    ContrastiveRun,
    PackedMuon,
    StageConfig,
    batch_stream,
    epoch_batches,
    fine_tune,
    make_optimizers,
    schedule,
)
from train.data.emoji import load_emoji
from train.progress import interrupts_held


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


@pytest.fixture
def interruptible():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
    heads = {"vision_heads": 2, "text_heads": 2}
    return zoo.load("clip_moe_tiny", weights=False, device="cpu", **{**sizes, **heads, "moe_layers": 2, **options})


def test_batches_hold_seen_concepts_once_in_training_styles(emoji):
    batches = epoch_batches(emoji, 64, seed=1)
    concepts = [concept for batch in batches for _, concept in batch]
    assert len(set(concepts)) == len(concepts) > 1280
    assert not set(concepts) & set(emoji.held_out)
    assert {style for batch in batches for style, _ in batch} == {0, 1}
    assert batches != epoch_batches(emoji, 64, seed=2)


def test_cluster_batches_stay_inside_one_cell(emoji):
    cells = torch.arange(len(emoji)).remainder(5).expand(2, -1)
    for batch in epoch_batches(emoji, 32, seed=0, cells=cells):
        assert len({int(cells[style, concept]) for style, concept in batch}) == 1


def test_clusters_below_half_a_batch_are_an_error(emoji):
    cells = torch.arange(2 * len(emoji)).view(2, -1)
    with pytest.raises(BadInput, match="every cluster is smaller"):
        epoch_batches(emoji, 32, seed=0, cells=cells)


def test_stream_is_the_same_from_any_start(emoji):
    whole = batch_stream(emoji, 256, (0, "a"), 0, None)
    expected = [next(whole) for _ in range(14)]
    for start in (3, 6, 11):
        later = batch_stream(emoji, 256, (0, "a"), start, None)
        assert [next(later) for _ in range(14 - start)] == expected[start:]


def test_augmentation_keeps_range_and_repeats(emoji):
    pixels = emoji.pixels("noto")[:16]
    first, again = (augment(pixels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 1 + 1e-6
    assert not torch.equal(first, augment(pixels, torch.Generator().manual_seed(4)))


def test_transparency_shows_the_background():
    clear = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    assert (on_background(clear) == 1).all()


def test_schedule_warms_up_and_falls():
    config = StageConfig(steps=100, lr=1.0, warmup=0.1)
    values = [schedule(step, config) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True) and values[-1] < 0.02


def test_only_chosen_parameters_move():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fine_tune(model, steps=2, progress=False)
    fine_tune(model, steps=1, trainable="*.router.*", progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".router." in name}


def test_fine_tuning_leaves_nothing_frozen():
    model = tiny()
    model.clip.logit_scale.requires_grad_(False)
    fine_tune(model, steps=1, progress=False)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["clip.logit_scale"]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"steps": 0}, "steps=0\n  steps is a whole number of at least 1\n  try: steps=1"),
        ({"lr": -1.0}, "lr=-1.0\n  lr is a finite number above 0\n  try: lr=0.003"),
    ],
)
def test_fine_tuning_without_a_meaning(options, wrong):
    with pytest.raises(BadOverride) as error:
        fine_tune(tiny(), progress=False, **options)
    assert str(error.value) == wrong


def test_bias_balancing_moves_with_the_steps():
    model = tiny(router="topk:bias_rate=0.01")
    fine_tune(model, steps=3, progress=False)
    biases = torch.stack([layer.router.select_bias for layer in moe_layers(model).values()])
    assert biases.abs().max() > 0.005 and biases.abs().max() < 0.031


def test_training_lowers_the_loss():
    model = tiny(num_experts=0)
    config = StageConfig(steps=60, batch_size=32, lr=3e-3, muon_lr=1e-2, strength=0.2)
    losses = ContrastiveRun(model, load_emoji(), config).run(progress=False)
    assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.2


def run_until(model, folder, config, interrupted_in: int | None) -> torch.nn.Module:
    """Trains; a Ctrl-C comes between the two optimisers of a step."""
    run = ContrastiveRun(model, load_emoji(), config, seed=5, folder=folder)
    last = run.optimizers[-1]
    take = last.step

    def step():
        if run.step == interrupted_in:
            os.kill(os.getpid(), signal.SIGINT)
        take()

    last.step = step
    run.run(progress=False)
    return model


def test_interrupted_run_ends_with_the_same_bits(tmp_path, interruptible):
    config = StageConfig(steps=8, batch_size=16, lr=1e-3, muon_lr=1e-3)
    options = {"expert_dropout": 0.2}
    undisturbed = run_until(tiny(**options), tmp_path / "a", config, None)
    with pytest.raises(KeyboardInterrupt):
        run_until(tiny(**options), tmp_path / "b", config, 3)
    saved = torch.load(tmp_path / "b" / "stage.pt", weights_only=True)
    assert saved["step"] == 4
    resumed = run_until(tiny(**options), tmp_path / "b", config, None)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    logs = [json.loads((tmp_path / run / "stage.log.json").read_text()) for run in "ab"]
    assert logs[0]["losses"] == logs[1]["losses"]
    assert logs[1]["seconds"] > saved["seconds"] > 0


def test_a_second_interrupt_does_not_wait(interruptible):
    with pytest.raises(KeyboardInterrupt), interrupts_held() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class TestOptimizers:
    """Every parameter has one optimiser, and a mixture's matrices the same as those of the dense model."""

    @staticmethod
    def names(model, config) -> dict[str, set[str]]:
        """Parameters by optimiser."""
        of = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {}
        for optimizer in make_optimizers(model, config):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in of]
            parameters += [parameter for parameter, _ in getattr(optimizer, "packed", ())]
            found[type(optimizer).__name__] = {of[id(parameter)] for parameter in parameters}
        return found

    def test_matrices_of_blocks_go_to_muon(self) -> None:
        model, config = tiny(), StageConfig(steps=1, lr=1e-3, muon_lr=1e-3)
        found = self.names(model, config)
        blocks = {name for name, p in model.named_parameters() if ".resblocks." in name}
        parts = (
            "in_proj_weight",
            "out_proj.weight",
            "experts.up_proj",
            "experts.down_proj",
            "c_fc.weight",
            "c_proj.weight",
        )
        assert found["PackedMuon"] == {name for name in blocks if name.endswith(parts)}
        assert any(name.endswith("experts.up_proj") for name in found["PackedMuon"])
        assert found["AdamW"] == {name for name, _ in model.named_parameters()} - found["PackedMuon"]

    def test_packed_matrices_are_trained_like_single_ones(self) -> None:
        packed = torch.nn.Parameter(torch.randn(3, 8, 6))
        single = [torch.nn.Parameter(matrix.clone()) for matrix in packed.detach()]
        one = PackedMuon([packed], lr=0.1, weight_decay=0.1)
        other = PackedMuon(single, lr=0.1, weight_decay=0.1)
        for _ in range(3):
            packed.grad = torch.randn(3, 8, 6)
            for matrix, grad in zip(single, packed.grad, strict=True):
                matrix.grad = grad.clone()
            one.step()
            other.step()
            torch.testing.assert_close(packed.detach(), torch.stack([matrix.detach() for matrix in single]))
        one.zero_grad()
        assert packed.grad is None


def test_other_options_do_not_go_on(tmp_path):
    config = StageConfig(steps=1, batch_size=16, lr=1e-3)
    run_until(tiny(), tmp_path, config, None)
    with pytest.raises(BadInput, match="its stage 'stage' was started with other options"):
        run_until(tiny(), tmp_path, config.model_copy(update={"lr": 2e-3}), None)


def test_another_seed_does_not_go_on(tmp_path):
    config = StageConfig(steps=1, batch_size=16, lr=1e-3)
    ContrastiveRun(tiny(), load_emoji(), config, folder=tmp_path, seed=0).run(progress=False)
    with pytest.raises(BadInput, match="or another seed"):
        ContrastiveRun(tiny(), load_emoji(), config, folder=tmp_path, seed=7).run(progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = StageConfig(steps=1, batch_size=16, lr=1e-3)
    ContrastiveRun(tiny(), load_emoji(), config, folder=tmp_path, name="stage").run(progress=False)
    path = tmp_path / "stage.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptFile, match=r"cannot go on from '.*stage.pt'\n  5,000 bytes; it is damaged\n  try: rm"):
        ContrastiveRun(tiny(), load_emoji(), config, folder=tmp_path, name="stage").run(progress=False)


def test_gradients_are_clipped():
    moved = {}
    for clip in (1e-9, 1.0):
        model = tiny()
        before = model.clip.token_embedding.weight.detach().clone()
        config = StageConfig(steps=1, batch_size=16, lr=1e-2, clip=clip, weight_decay=0.0)
        ContrastiveRun(model, load_emoji(), config).run(progress=False)
        moved[clip] = float((model.clip.token_embedding.weight.detach() - before).norm())
    assert 0 < moved[1e-9] < 0.1 * moved[1.0]


def test_fine_tuning_leaves_the_mode():
    model = tiny().train()
    fine_tune(model, steps=1, progress=False)
    assert model.training


def test_pattern_that_names_nothing_is_an_error():
    with pytest.raises(BadInput, match="no parameter has such a name"):
        ContrastiveRun(tiny(), load_emoji(), StageConfig(steps=1, lr=1e-3, trainable=("*.ruoter.*",)))


def test_any_picture_size_and_context_length_can_be_fine_tuned():
    model = tiny(image_size=32, context_length=12)
    assert len(fine_tune(model, steps=1, progress=False)) == 1
