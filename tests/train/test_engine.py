"""The engine: exact resume, what is trained, checkpoints, alarms, averages."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
import zoo
from mmoe.errors import BadInput, CorruptFile, MmoeError
from mmoe.moe import moe_layers
from tests.conftest import THREADS
from tests.processes import start
from train import progress, tune
from train.checkpoint import Checkpoints
from train.engine import StageRun, Stopped
from train.progress import interrupts_held
from train.recipe import Recipe
from train.stages import Run
from zoo.clip_moe.model import ClipMoE
from zoo.model import Model

SIZES = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
SIZES |= {"vision_heads": 2, "text_heads": 2, "moe_layers": 2, "expert_dropout": 0.2, "init_logit_scale": 2.6}
EVERY_2 = {"steps": 8, "log_every": 2, "save_every": 2}


@pytest.fixture
def interruptible():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def recipe(tmp_path: Path, *overrides: str, **sections) -> Recipe:
    """A tiny model with dropout from random weights, on the emoji."""
    told = {
        "model": {"name": "clip_moe_tiny", "weights": False, "overrides": SIZES},
        "data": {"name": "emoji", "batch_size": 16, "limit": 128},
        "optim": {"lr": 1e-3},
        "run": EVERY_2,
        "log": [],
        **sections,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(told))
    return Recipe.load(path, *overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run's model, or its adapters."""
    adapters = folder / "model" / "adapter_model.safetensors"
    return load_file(adapters) if adapters.exists() else zoo.load(folder / "model", device="cpu").state_dict()


def assert_same(a: Path, b: Path) -> None:
    expected, found = weights(a), weights(b)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """A signal comes in the middle of a step."""
    inner = StageRun._clip

    def clip(self, each):
        if self.state.step == step:
            os.kill(os.getpid(), number)
        return inner(self, each)

    monkeypatch.setattr(StageRun, "_clip", clip)


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (signal.SIGINT, {}),
        (signal.SIGTERM, {}),
        (signal.SIGINT, {"optim": {"lr": 1e-3, "name": "muon", "muon_lr": 1e-3}}),
        (signal.SIGINT, {"tune": {"method": "experts", "top_used": 2}, "run": {**EVERY_2, "checkpointing": True}}),
        (signal.SIGINT, {"tune": {"method": "router_only"}, "run": {**EVERY_2, "ema": 0.9, "accumulate": 2}}),
        (
            signal.SIGINT,
            {
                "model": {"name": "clip_moe_tiny"},
                "tune": {"method": "lora", "rank": 2},
                "run": {**EVERY_2, "ema": 0.9},
            },
        ),
    ],
    ids=["adamw", "adamw, SIGTERM", "muon", "experts", "routers, ema", "adapters, ema"],
)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, interruptible, number, change):
    tiny = recipe(tmp_path, **change)
    train.run(tiny, tmp_path / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4, number)
        train.run(tiny, tmp_path / "b", progress=False)
    assert Checkpoints(tmp_path / "b" / "checkpoints").steps()[0] == 5
    train.run(tiny, tmp_path / "b", resume=True, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in "ab"]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]
    assert not (tmp_path / "b" / "checkpoints").exists(), "the stage is done"


def test_sigterm_is_held_where_ctrl_c_is_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def train_and_die(path: Path, out: Path, step: int) -> None:
    """Trains until a step in whose middle the process is killed."""
    inner = StageRun._clip

    def clip(self, each):
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, each)

    StageRun._clip = clip
    torch.set_num_threads(THREADS)
    train.run(Recipe.load(path), out, resume=out.exists(), progress=False)


def test_a_run_that_is_killed_five_times_ends_with_the_same_bits(tmp_path):
    tiny = recipe(tmp_path, "run.steps=12", "run.save_every=1", "run.keep_last=3")
    train.run(tiny, tmp_path / "a", progress=False)
    tiny.save(tmp_path / "resolved.yaml")
    for step in [1, *sorted(torch.randperm(10)[:4].add(2).tolist())]:
        assert start(train_and_die, tmp_path / "resolved.yaml", tmp_path / "b", step) == -signal.SIGKILL
    train.run(tiny, tmp_path / "b", resume=True, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_second_interrupt_does_not_wait_unless_it_is_that_of_a_launcher(interruptible, monkeypatch):
    with pytest.raises(KeyboardInterrupt), interrupts_held() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        monkeypatch.setattr(progress, "_AT_ONCE", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_moving_average_is_saved_and_the_weights_train_on(tmp_path, monkeypatch):
    seen = []
    inner = StageRun._clip
    monkeypatch.setattr(StageRun, "_clip", lambda self, each: seen.append(scale(self)) or inner(self, each))

    def scale(stage):
        return stage.model.clip.visual.proj.detach().clone()

    tiny = recipe(tmp_path, "run.ema=0.75", "run.steps=4", "run.eval_every=1", "run.best=R@1")
    run = Run(tiny, tmp_path / "a", progress=False)
    stage = run.start(tiny.stages[0])
    run.finish(tiny.stages[0], stage)
    average = seen[0]
    for weights_then in [*seen[1:], scale(stage)]:
        average = 0.75 * average + 0.25 * weights_then
    torch.testing.assert_close(weights(tmp_path / "a")["clip.visual.proj"], average)
    train.run(recipe(tmp_path, "run.steps=4"), tmp_path / "b", progress=False)
    assert torch.equal(scale(stage), weights(tmp_path / "b")["clip.visual.proj"]), "it changes nothing of the training"


def test_a_checkpoint_has_what_is_trained(tmp_path):
    sizes = {}
    for method in ("full", "router_only"):
        tiny = recipe(tmp_path, tune={"method": method})
        stage = Run(tiny, tmp_path / method, progress=False).start(tiny.stages[0])
        stage.save()
        _, folder, state = stage.checkpoints.newest()
        sizes[method] = (folder / "state.pt").stat().st_size
        assert all(".router." in name for name in state["model"]) == (method == "router_only")
    assert sizes["router_only"] < sizes["full"] / 10


def test_gradients_are_clipped(tmp_path):
    moved = {}
    for clip in (1e-9, 1.0):
        tiny = recipe(tmp_path, "run.steps=1", optim={"lr": 1e-2, "clip": clip, "weight_decay": 0.0})
        stage = Run(tiny, tmp_path / str(clip), progress=False).start(tiny.stages[0])
        before = stage.model.clip.token_embedding.weight.detach().clone()
        stage.train()
        moved[clip] = float((stage.model.clip.token_embedding.weight.detach() - before).norm())
    assert 0 < moved[1e-9] < 0.1 * moved[1.0]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, interruptible):
    tiny = recipe(tmp_path)
    train.run(tiny, tmp_path / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        train.run(tiny, tmp_path / "b", progress=False)
    state = tmp_path / "b" / "checkpoints" / "step_00000005" / "state.pt"
    values = bytearray(state.read_bytes())
    values[len(values) // 2] ^= 1
    state.write_bytes(values)
    with pytest.warns(UserWarning, match=r"state.pt is damaged; going on from step 4"):
        train.run(tiny, tmp_path / "b", resume=True, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_damaged_checkpoints_alone_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"a": torch.ones(2)})
    (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CorruptFile, match="it is not whole"):
        checkpoints.newest()


def test_the_last_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 30):
        checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [30, 2]
    assert checkpoints.newest()[2] == {"step": 30}


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})

    def full(value, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="No space left on device; checkpoints that are there: 1"):
        checkpoints.save(2, {"step": 2})
    assert checkpoints.steps() == [1] and checkpoints.newest()[2] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    tiny = recipe(tmp_path, "run.steps=1")
    train.run(tiny, tmp_path / "a", progress=False)
    with pytest.raises(BadInput, match="it holds a run"):
        train.run(tiny, tmp_path / "a", progress=False)
    other = recipe(tmp_path, "run.steps=1", "optim.lr=0.5")
    with pytest.raises(BadInput, match=r"optim.lr: 0.001 -> 0.5"):
        train.run(other, tmp_path / "a", resume=True, progress=False)
    with pytest.raises(BadInput, match="there is no such folder"):
        train.run(tiny, tmp_path / "none", resume=True, progress=False)


@pytest.mark.parametrize(("method", "part"), [("router_only", ".router."), ("adapters", ".ln_post.")])
def test_only_what_the_method_names_moves(tmp_path, monkeypatch, method, part):
    monkeypatch.setattr(ClipMoE, "adapters", ("*.ln_post.*",))
    tiny = recipe(tmp_path, tune={"method": method})
    run = Run(tiny, tmp_path / "a", progress=False)
    stage = run.start(tiny.stages[0])
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    run.finish(tiny.stages[0], stage)
    moved = {name for name, value in weights(tmp_path / "a").items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if part in name}


def test_a_family_without_adapters_says_so(tmp_path):
    with pytest.raises(BadInput, match=r"adapters of ClipMoE\n  its family adds none to a frozen backbone"):
        train.run(recipe(tmp_path, tune={"method": "adapters"}), tmp_path / "a", progress=False)


def test_only_the_chosen_experts_move(tmp_path):
    tiny = recipe(tmp_path, tune={"method": "experts", "experts": [0, 3]}, optim={"lr": 1e-2, "weight_decay": 0.5})
    run = Run(tiny, tmp_path / "a", progress=False)
    stage = run.start(tiny.stages[0])
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    run.finish(tiny.stages[0], stage)
    for name, value in weights(tmp_path / "a").items():
        if ".experts." in name:
            same = [torch.equal(value[e], before[name][e]) for e in range(4)]
            assert same == [False, True, True, False], name
        else:
            assert torch.equal(value, before[name]), name


@torch.no_grad()
def check_adapters(trained, folder: Path) -> None:
    """They reload to the same bits, and merge into the weights."""
    base = zoo.load("clip_moe_tiny", device="cpu")
    image = base.preprocess(images="assets/examples/fox.png")["image"]
    expected, plain = trained.encode_image(image), base.encode_image(image)
    assert not torch.equal(expected, plain)
    assert torch.equal(tune.load_adapters(base, folder).eval().encode_image(image), expected)
    merged = tune.load_adapters(zoo.load("clip_moe_tiny", device="cpu"), folder, merge=True)
    assert isinstance(merged, Model) and ".base_layer" not in "".join(merged.state_dict())
    torch.testing.assert_close(merged.encode_image(image), expected, atol=1e-5, rtol=1e-5)


def test_adapters_reload_and_merge_exactly(tmp_path):
    tiny = recipe(
        tmp_path, model={"name": "clip_moe_tiny"}, tune={"method": "lora", "rank": 2, "modules": ["*.router"]}
    )
    run = Run(tiny, tmp_path / "a", progress=False)
    stage = run.start(tiny.stages[0])
    run.finish(tiny.stages[0], stage)
    files = {path.name for path in (tmp_path / "a" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    check_adapters(stage.trained.eval(), tmp_path / "a" / "model")


def test_a_router_that_collapses_raises_an_alarm(tmp_path, capsys):
    tiny = recipe(
        tmp_path,
        moe={"health": {"on_alarm": "stop"}},
        tune={"method": "modules", "modules": ["*.attn.*"]},
        data={"name": "emoji", "batch_size": 16},
        run={"steps": 30, "log_every": 1, "save_every": None},
    )
    run = Run(tiny, tmp_path / "a", progress=False)
    stage = run.start(tiny.stages[0])
    with torch.no_grad():
        for layer in moe_layers(stage.model).values():
            layer.router.weight[1:] = 0.0
            layer.router.weight[1] = -layer.router.weight[0]
    with pytest.raises(MmoeError, match=r"stopped at step 1\d: .*: experts? .* gets? less than 1.0% of an even load"):
        run.finish(tiny.stages[0], stage)
    assert "a larger moe.balance_coef spreads it" in capsys.readouterr().err


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_balance_loss_changes_the_gradient_where_its_coefficient_is_above_0(tmp_path, coef):
    def gradient(value: float) -> torch.Tensor:
        tiny = recipe(tmp_path, f"moe.balance_coef={value}", "model.overrides.expert_dropout=0.0")
        stage = Run(tiny, tmp_path / str(value), resume=(tmp_path / str(value)).exists(), progress=False).start(
            tiny.stages[0]
        )
        parts, _ = stage.batches[0]
        stage._step(stage.trained.train(), stage.optimizers.each, parts, False)
        return next(iter(moe_layers(stage.model).values())).router.weight.grad.clone()

    assert torch.equal(gradient(0.0), gradient(coef)) == (coef == 0.0)


def test_parts_of_a_batch_add_up_to_the_whole_where_the_loss_is_a_mean(tmp_path):
    tiny = recipe(tmp_path, "run.accumulate=2", "run.steps=1")
    stage = Run(tiny, tmp_path / "a", progress=False).start(tiny.stages[0])
    parts, _ = stage.batches[0]
    assert [len(part["text"]) for part in parts] == [8, 8]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    tiny = recipe(tmp_path, "optim.lr=1e30", "optim.clip=null")
    with pytest.raises(BadInput, match="the loss of step"):
        train.run(tiny, tmp_path / "a", progress=False)


def test_bf16_trains_as_fp32_does(tmp_path):
    losses = [
        train.run(recipe(tmp_path, f"run.precision={name}"), tmp_path / name, progress=False)[""]["loss"]
        for name in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_compiled_models_train_alike(tmp_path):
    from torch._dynamo.utils import counters

    plain, compiled = (
        train.run(recipe(tmp_path, f"run.compile={told}", "run.steps=3"), tmp_path / told, progress=False)[""]["loss"]
        for told in ("false", "true")
    )
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


def test_numbers_and_loads_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.run(recipe(tmp_path, log=["tensorboard"]), tmp_path / "a", progress=False)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "mmoe"), size_guidance={"images": 0}).Reload()
    told = events.Tags()
    layer = "clip.visual.transformer.resblocks.0.mlp"
    curves = {"loss", "lr", "grad_norm", "samples_per_second", "eval/R@1", "loss/contrastive"}
    curves |= {f"router/{layer}/{name}" for name in ("entropy", "violation", "drop_rate", "drift")}
    assert curves <= set(told["scalars"])
    assert [point.step for point in events.Scalars("loss")] == [2, 4, 6, 8]
    assert f"load/{layer}" in told["images"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    health = lines[0]["health"][layer]
    assert sum(health["load"]) == pytest.approx(1) and health["violation"] == pytest.approx(4 * max(health["load"]) - 1)
