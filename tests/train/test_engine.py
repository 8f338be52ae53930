"""The engine: exact resume, what is trained, checkpoints, alarms, averages."""

from __future__ import annotations

import errno
import json
import math
import os
import pydoc
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import train
import zoo
from mmoe.errors import BadInput, CorruptFile, MmoeError
from mmoe.losses import z_loss
from mmoe.moe import moe_layers
from mmoe.trace import trace
from tests.conftest import THREADS
from tests.processes import start
from train import progress, tune
from train.checkpoint import Checkpoints
from train.engine import StageRun, Stopped
from train.health import LayerHealth
from train.progress import interrupts_held
from train.recipe import Recipe
from train.stages import Run
from zoo.clip_moe.model import ClipMoE, ClipOutput
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
    adapters = folder / "model" / "adapters" / "adapter_model.safetensors"
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
    for line in (*logs[0], *logs[1]):
        line.pop("samples_per_second", None)  # all else is the same: losses, norms, health, metrics
    assert logs[0] == logs[1]
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


def train_in_a_group(path: Path, out: Path) -> None:
    """All processes of the run, those that prepare its batches too, are told to end, as a cluster's scheduler does."""
    os.setsid()
    inner = StageRun._clip

    def clip(self, each):
        if self.state.step == 4:
            os.killpg(0, signal.SIGTERM)
        return inner(self, each)

    StageRun._clip = clip
    torch.set_num_threads(THREADS)
    try:
        train.run(Recipe.load(path), out, progress=False)
    except Stopped:
        os._exit(7)


def test_a_group_that_is_told_to_end_saves_its_state(tmp_path):
    tiny = recipe(tmp_path, "data.workers=2")
    train.run(tiny, tmp_path / "a", progress=False)
    tiny.save(tmp_path / "resolved.yaml")
    assert start(train_in_a_group, tmp_path / "resolved.yaml", tmp_path / "b") == 7
    train.run(tiny, tmp_path / "b", resume=True, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_run_that_is_killed_five_times_ends_with_the_same_bits(tmp_path):
    tiny = recipe(tmp_path, "run.steps=12", "run.save_every=3", "run.keep_last=3")
    train.run(tiny, tmp_path / "a", progress=False)
    tiny.save(tmp_path / "resolved.yaml")
    steps = [1, *sorted(torch.randperm(10)[:4].add(2).tolist())]
    print("killed in the steps", steps)
    for step in steps:
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


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path):
    """The system refuses to write past a limit, as it does past the end of a disk."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1][1]))
    try:
        with pytest.raises(BadInput, match=r"File too large; checkpoints that are there: 1\n  try: free space"):
            checkpoints.save(2, {"step": 2, "a": torch.randn(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert checkpoints.steps() == [1] and checkpoints.newest()[2] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(
    ("method", "writer"), [("full", "zoo.model.save_file"), ("lora", "peft.peft_model.safe_save_file")]
)
def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch, method, writer):
    tiny = recipe(tmp_path, "run.steps=2", "run.save_every=1", f"tune.method={method}")

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(BadInput, match=r"No space left on device\n  try: free space .* with --resume"):
            train.run(tiny, tmp_path / "a", progress=False)
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    train.run(tiny, tmp_path / "b", progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("full")])
@pytest.mark.parametrize("place", ["peft.peft_model.safe_save_file", "zoo.model.save_file"])
def test_a_full_disk_leaves_the_adapters_of_before_with_their_model(tmp_path, monkeypatch, place, error):
    tiny = recipe(tmp_path, "run.steps=3", "tune.method=lora", 'run.best="R@1"', "run.eval_every=1")
    found = []
    keep = StageRun._keep_best

    def rising(self, metrics):
        found.append({str(file): file.read_bytes() for file in tmp_path.rglob("best/**/*") if file.is_file()})
        keep(self, {**metrics, "R@1": float(self.state.step)})

    write = pydoc.locate(place)

    def full(values, file, **options):
        if len(found) < 2:
            return write(values, file, **options)
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(StageRun, "_keep_best", rising)
    monkeypatch.setattr(place, full)
    with pytest.raises(BadInput, match=r"best.*\n  full\n  try: free space"):
        train.run(tiny, tmp_path / "a", progress=False)
    now = {str(file): file.read_bytes() for file in tmp_path.rglob("best/**/*") if file.is_file()}
    assert len(found) == 2 and now == found[1] and len(now) >= 4


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"state.pt": 3}'])
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(tmp_path, text):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        checkpoints.save(step, {"step": step})
    (tmp_path / "step_00000002" / "manifest.json").write_text(text)
    with pytest.warns(UserWarning, match="going on from step 1"):
        assert checkpoints.newest()[0] == 1


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
    folder = tmp_path / "a" / "model"
    assert {path.name for path in (folder / "adapters").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    check_adapters(stage.trained.eval(), folder / "adapters")
    image = stage.model.preprocess(images="assets/examples/fox.png")["image"]
    with torch.no_grad():
        merged, adapted = zoo.load(folder, device="cpu").encode_image(image), stage.trained.encode_image(image)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)


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
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    layers = [layer for line in lines for layer in line.get("health", {}).values()]
    assert [layer["dead"] for layer in layers] == [
        [expert for expert, load in enumerate(layer["load"]) if load == 0] for layer in layers
    ]
    assert any(layer["dead"] for layer in layers)


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_balance_loss_changes_the_gradient_where_its_coefficient_is_above_0(tmp_path, coef):
    def gradient(value: float) -> torch.Tensor:
        tiny = recipe(tmp_path, f"moe.balance_coef={value}", "model.overrides.expert_dropout=0.0")
        stage = Run(tiny, tmp_path / str(value), resume=(tmp_path / str(value)).exists(), progress=False).start(
            tiny.stages[0]
        )
        parts, _ = stage.batches[0]
        stage._step(stage.loss.train(), stage.optimizers.each, parts, False)
        return next(iter(moe_layers(stage.model).values())).router.weight.grad.clone()

    assert torch.equal(gradient(0.0), gradient(coef)) == (coef == 0.0)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    tiny = recipe(tmp_path, "optim.lr=1e10", "optim.clip=null")
    with pytest.raises(BadInput, match="the loss of step"):
        train.run(tiny, tmp_path / "a", progress=False)


@pytest.mark.parametrize(("last", "told"), [(8, "some weights after step 8 are"), (4, "the loss of step 5 is nan")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch, last, told):
    inner = StageRun._step

    def step(self, *args):
        found = inner(self, *args)
        if self.state.step == last - 1:
            next(p for p in self.trained.parameters() if p.requires_grad).data.view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(StageRun, "_step", step)
    tiny = recipe(tmp_path, "run.eval_every=4", "run.best=-R@1", "run.save_every=null")
    with pytest.raises(BadInput, match=rf"{told}.*\n  try: optim.lr=0.0001, into"):
        train.run(tiny, tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "model").exists()
    assert (tmp_path / "a" / "best").exists() == (last == 8)


def test_bf16_trains_as_fp32_does(tmp_path):
    losses = [
        train.run(recipe(tmp_path, f"run.precision={name}"), tmp_path / name, progress=False)[""]["loss"]
        for name in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_compiled_models_train_alike(tmp_path):
    from torch._dynamo.utils import counters

    def loss(compiles: str) -> float:
        changes = f"run.compile={compiles}", "run.steps=3", "model.overrides.expert_dropout=0.0"
        return train.run(recipe(tmp_path, *changes), tmp_path / compiles, progress=False)[""]["loss"]

    plain, compiled = loss("false"), loss("true")
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert counters["stats"]["unique_graphs"] > 0


def test_numbers_and_loads_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.run(recipe(tmp_path, log=["tensorboard"]), tmp_path / "a", progress=False)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "mmoe"), size_guidance={"images": 0}).Reload()
    told = events.Tags()
    layer = "clip.visual.transformer.resblocks.0.mlp"
    curves = {"loss", "lr", "grad_norm", "samples_per_second", "eval/R@1", "loss/contrastive"}
    curves |= {f"router/{layer}/{name}" for name in ("entropy", "violation", "dead", "drop_rate", "drift")}
    assert curves <= set(told["scalars"])
    assert [point.step for point in events.Scalars("loss")] == [2, 4, 6, 8]
    assert f"load/{layer}" in told["images"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    health = lines[0]["health"][layer]
    assert sum(health["load"]) == pytest.approx(1) and health["violation"] == pytest.approx(4 * max(health["load"]) - 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_z_loss_of_a_recipe_counts_once(tmp_path, monkeypatch, checkpointing):
    def gradient(value: float) -> torch.Tensor:
        changes = f"moe.z_coef={value}", "moe.balance_coef=0", "model.overrides.expert_dropout=0.0"
        tiny = recipe(tmp_path, *changes, f"run.checkpointing={str(checkpointing).lower()}")
        stage = Run(tiny, tmp_path / str(value), progress=False).start(tiny.stages[0])
        parts, _ = stage.batches[0]
        stage._step(stage.loss.train(), stage.optimizers.each, parts, False)
        return next(iter(moe_layers(stage.model).values())).router.weight.grad.clone()

    def alone() -> torch.Tensor:
        tiny = recipe(tmp_path, "model.overrides.expert_dropout=0.0")
        stage = Run(tiny, tmp_path / "alone", progress=False).start(tiny.stages[0])
        parts, _ = stage.batches[0]
        with trace(stage.model) as routing:
            stage.model.train()(**parts[0])
        z_loss(routing).backward()
        return next(iter(moe_layers(stage.model).values())).router.weight.grad

    monkeypatch.setattr(StageRun, "_clip", lambda self, each: 0.0)
    added = gradient(0.5) - gradient(0.0)
    torch.testing.assert_close(added, 0.5 * alone(), atol=1e-6, rtol=1e-3)


def mean_loss(model: ClipMoE, image: torch.Tensor, **rest: object) -> ClipOutput:
    """A loss that is a mean over samples, unlike a contrastive one."""
    features = model.encode_image(image)
    loss = features.square().mean()
    return ClipOutput(image_features=features, text_features=features, logits_per_image=features, loss=loss)


def test_parts_of_a_batch_add_up_to_the_whole_where_the_loss_is_a_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(ClipMoE, "forward", mean_loss)
    found = {}
    for parts in (1, 2, 4):
        changes = f"run.accumulate={parts}", "run.steps=3", "model.overrides.expert_dropout=0.0"
        tiny = recipe(tmp_path, *changes, optim={"name": "sgd", "lr": 0.1})
        stage = Run(tiny, tmp_path / str(parts), progress=False).start(tiny.stages[0])
        monkeypatch.setattr(stage.data, "batch", one_style(stage.data))
        found[parts] = stage.train(), stage.model.clip.visual.proj.detach().clone()
    for parts in (2, 4):
        assert found[parts][0] == pytest.approx(found[1][0], rel=1e-5)
        torch.testing.assert_close(found[parts][1], found[1][1], atol=1e-6, rtol=1e-5)


def one_style(data):
    """Pictures of one drawing style, so that parts of a batch are parts of its pictures, and the same in each."""

    def batch(indices, model, seeds):
        return model.training_batch([data.read(index) for index in indices])

    return batch


def test_every_pass_has_its_own_order_and_its_own_crops(tmp_path):
    stage = Run(recipe(tmp_path), tmp_path / "a", progress=False).start(recipe(tmp_path).stages[0])
    per_epoch = stage.batches.per_epoch
    passes = [[stage.batches.indices(step) for step in range(n * per_epoch, (n + 1) * per_epoch)] for n in (0, 1)]
    assert passes[0] != passes[1]
    assert sorted(i % 1641 for batch in passes[0] for i in batch) == sorted(
        i % 1641 for batch in passes[1] for i in batch
    )
    index = stage.batches.indices(0)
    first, second = (stage.data.batch(index, stage.model, [seed] * len(index))["image"] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_checkpointing_runs_the_blocks_again(tmp_path):
    calls = {}
    for told in ("false", "true"):
        tiny = recipe(tmp_path, f"run.checkpointing={told}", "run.steps=1")
        stage = Run(tiny, tmp_path / told, progress=False).start(tiny.stages[0])
        seen: list[int] = []
        stage.model.clip.visual.transformer.resblocks[0].ln_1.register_forward_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        stage.train()
        calls[told] = len(seen)
    assert calls["true"] == 2 * calls["false"]


def test_the_temperature_stays_in_its_range(tmp_path):
    tiny = recipe(tmp_path, "run.steps=1", "model.overrides.init_logit_scale=4.7", "optim.lr=1e-9")
    stage = Run(tiny, tmp_path / "a", progress=False).start(tiny.stages[0])
    stage.train()
    assert stage.model.clip.logit_scale.item() == pytest.approx(math.log(100))


def test_the_best_model_is_that_of_the_best_evaluation(tmp_path):
    name = "held_out_noto/T2I R@10"
    tiny = recipe(tmp_path, "run.eval_every=1", f"run.best={name}", "run.steps=12", optim={"lr": 3e-3})
    result = train.run(tiny, tmp_path / "a", progress=False)[""]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    told = {line["step"]: line[f"eval/{name}"] for line in lines if f"eval/{name}" in line}
    step = max(told, key=lambda step: (told[step], -step))
    assert len(set(told.values())) > 1
    best = result["best"]
    assert (best["value"], best["step"], best["metrics"][name]) == (told[step], step, told[step])
    (line,) = (line for line in lines if line["step"] == step and f"eval/{name}" in line)
    assert {f"eval/{key}": value for key, value in best["metrics"].items()}.items() <= line.items()
    again = train.measure(str(tmp_path / "a" / "best"), on="emoji", limit=128)["metrics"]
    assert again[name] == told[step]


def test_a_metric_where_less_is_better(tmp_path):
    result = train.run(recipe(tmp_path, "run.eval_every=2", "run.best=-R@1"), tmp_path / "a", progress=False)[""]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    told = {line["step"]: line["eval/R@1"] for line in lines if "eval/R@1" in line}
    step = min(told, key=lambda step: (told[step], step))
    assert list(told) == [2, 4, 6, 8]
    assert (result["best"]["value"], result["best"]["step"]) == (told[step], step)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["run.best=R@2"], "did you mean: R@1"),
        (["run.best=R@1", "data.held_out=0"], "nothing is measured"),
        (["run.steps=null", "run.epochs=0.001"], "one has 8 steps"),
    ],
)
def test_what_would_fail_at_the_end_is_told_at_the_start(tmp_path, monkeypatch, changes, told):
    monkeypatch.setattr(StageRun, "train", lambda self: pytest.fail("it trains"))
    data = {"name": "emoji", "batch_size": 16, "limit": 128}
    if "data.held_out=0" in changes:
        for number in range(16):
            Image.new("RGB", (64, 64), (9 * number, 0, 0)).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"number {number}")
        data = {"name": "pairs", "path": str(tmp_path), "batch_size": 16}
    with pytest.raises(BadInput, match=told):
        train.run(recipe(tmp_path, *changes, data=data), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists(), "the same command works when it is mended"


def test_training_on_everything_measures_nothing(tmp_path):
    for number in range(16):
        Image.new("RGB", (64, 64), (9 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    data = {"name": "pairs", "path": str(tmp_path), "batch_size": 8, "held_out": 0}
    result = train.run(recipe(tmp_path, "run.steps=2", data=data), tmp_path / "out", progress=False)[""]
    assert result["metrics"] == {} and (tmp_path / "out" / "model" / "config.json").exists()


def test_an_evaluation_that_fails_at_the_end_loses_nothing(tmp_path, monkeypatch):
    def fails(task, model, data):
        raise ValueError("odd")

    tiny = recipe(tmp_path, "run.save_every=null")
    train.run(tiny, tmp_path / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="odd"):
        patch.setattr("train.emoji_retrieval.EmojiRetrieval.measure", fails)
        train.run(tiny, tmp_path / "b", progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(StageRun, "_step", lambda *_: pytest.fail("it trains again"))
    result = train.run(tiny, tmp_path / "b", resume=True, progress=False)[""]
    assert result["metrics"]["R@1"] >= 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_of_the_last_evaluation_keeps_the_training(tmp_path, monkeypatch, interruptible, number):
    tiny = recipe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("train.emoji_retrieval.EmojiRetrieval.measure", lambda *_: os.kill(os.getpid(), number))
        train.run(tiny, tmp_path / "a", progress=False)
    monkeypatch.setattr(StageRun, "_step", lambda *_: pytest.fail("it trains again"))
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 8]


def test_a_run_that_died_before_its_first_checkpoint_tells_nothing_twice(tmp_path, capsys):
    tiny = recipe(tmp_path, "run.save_every=null")
    tiny.save(tmp_path / "resolved.yaml")
    assert start(train_and_die, tmp_path / "resolved.yaml", tmp_path / "a", 5) == -signal.SIGKILL
    with (tmp_path / "a" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "health": {"x": {"load": [1.0]}')  # torn
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    assert "no checkpoint was written before it stopped; it begins anew" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 8]


def test_two_runs_do_not_train_in_one_folder(tmp_path):
    tiny = recipe(tmp_path)
    first = Run(tiny, tmp_path / "a", progress=False)
    stage = first.start(tiny.stages[0])
    first._claim()
    with pytest.raises(BadInput, match="another process trains there now"):
        train.run(tiny, tmp_path / "a", resume=True, progress=False)
    first.finish(tiny.stages[0], stage)


def test_a_run_goes_on_with_other_options_that_change_no_weights(tmp_path, monkeypatch, interruptible, capsys):
    tiny = recipe(tmp_path)
    train.run(tiny, tmp_path / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        train.run(tiny, tmp_path / "b", progress=False)
    other = recipe(tmp_path, "run.save_every=1", "run.log_every=4", "run.best=R@1", "moe.health.max_drop=null")
    train.run(other, tmp_path / "b", resume=True, progress=False)
    assert "the run: goes on from step 5 of 8" in capsys.readouterr().err
    assert_same(tmp_path / "a", tmp_path / "b")
    assert Recipe.load(tmp_path / "b").stages[0].run.save_every == 1


@pytest.mark.parametrize(
    ("option", "change", "told"),
    [
        ("dead_share", {"load": (0.5, 0.5, 0.0, 0.0)}, "experts 2, 3 get less than 20.0% of an even load"),
        ("max_violation", {"load": (0.7, 0.1, 0.1, 0.1)}, "expert 0 gets 2.8 times an even load"),
        ("min_entropy", {"entropy": 0.1}, "the router is sure of every token, 10.0% of the largest entropy"),
        ("max_drop", {"drop_rate": 0.5}, "50% of the slots are dropped"),
        ("max_drift", {"drift": 3.0}, "the router moved by 300% of its weights"),
    ],
)
def test_every_threshold_has_its_alarm(tmp_path, option, change, told):
    well = {"load": (0.25,) * 4, "entropy": 1.0, "drop_rate": 0.0, "drift": 0.0}
    limits = {"dead_share": 0.2, "max_violation": 1.0, "min_entropy": 0.2, "max_drop": 0.2, "max_drift": 2.0}
    for limit, words in ((limits[option], [told]), (None, [])):
        health = {name: limit if name == option else None for name in limits}
        tiny = recipe(tmp_path, moe={"health": health})
        stage = Run(tiny, tmp_path / str(limit), progress=False).start(tiny.stages[0])
        name = next(iter(stage.health._layers))
        for ill in ({}, change):
            stage.health._recent[name].extend([LayerHealth(**{**well, **ill})] * 5)
            found = stage.health.alarms()
            assert [text for text in found if told in text] == found and len(found) == len(words if ill else [])


def test_alarms_are_told_anew_once_a_router_was_well(tmp_path):
    tiny = recipe(tmp_path)
    stage = Run(tiny, tmp_path / "a", progress=False).start(tiny.stages[0])
    health = stage.health
    name = next(iter(health._layers))
    ill, well = ((1.0, 0.0, 0.0, 0.0), (0.25,) * 4)

    def told(load: tuple[float, ...], steps: int) -> int:
        found = 0
        for _ in range(steps):
            health._recent[name].append(LayerHealth(load=load, entropy=1.0, drop_rate=0.0, drift=0.0))
            found += len(health.alarms())
        return found

    assert [told(ill, 5), told(ill, 5), told(well, 9), told(ill, 9)] == [1, 0, 0, 1]


def test_an_alarm_that_stops_a_run_lets_it_go_on(tmp_path):
    moe = {"health": {"on_alarm": "stop", "max_violation": 0.0, "dead_share": None}}
    change = {"run": {"steps": 8, "log_every": 1, "save_every": None, "eval_every": 5}}
    tiny = recipe(tmp_path, moe=moe, **change)
    with pytest.raises(MmoeError, match=r"stopped at step 5: .*\n.*its state is saved"):
        train.run(tiny, tmp_path / "a", progress=False)
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/R@1" in line] == [5, 8]
    layers = len(lines[0]["health"])
    assert sum("alarm" in line for line in lines) == layers, "all are told, each once"


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    synced: list[str] = []
    inner, rename = os.fsync, Path.rename
    names = {}

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        inner(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda self, target: names.update(synced=list(synced)) or rename(self, target))
    Checkpoints(tmp_path).save(1, {"a": torch.ones(2)})
    assert {Path(name).name for name in names["synced"]} >= {"state.pt", "manifest.json", ".step_00000001.tmp"}
    assert synced[-1] == str(tmp_path), "the folder with the new name too"


def test_adapters_have_the_scale_that_the_recipe_says(tmp_path):
    tiny = recipe(tmp_path, model={"name": "clip_moe_tiny"}, tune={"method": "lora", "rank": 2, "alpha": 3.0})
    stage = Run(tiny, tmp_path / "a", progress=False).start(tiny.stages[0])
    scales = {value for module in stage.trained.modules() for value in getattr(module, "scaling", {}).values()}
    assert scales == {1.5}


def test_every_adapter_that_is_counted_has_a_gradient(tmp_path):
    tune_ = {"method": "lora", "rank": 2, "modules": ["*.attn.*", "*.router"]}
    tiny = recipe(tmp_path, "run.steps=2", model={"name": "clip_moe_tiny"}, tune=tune_)
    stage = Run(tiny, tmp_path / "a", progress=False).start(tiny.stages[0])
    stage.train()
    dead = [name for name, p in stage.trained.named_parameters() if "lora_B" in name and not p.detach().any()]
    assert dead == []


def test_adapters_without_the_merged_model(tmp_path):
    tiny = recipe(tmp_path, "tune.merge=false", model={"name": "clip_moe_tiny"}, tune={"method": "lora", "rank": 2})
    train.run(tiny, tmp_path / "a", progress=False)
    files = {path.name for path in (tmp_path / "a" / "model").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    told = json.loads((tmp_path / "a" / "model" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "clip_moe_tiny"
    assert train.measure(str(tmp_path / "a"), limit=64)["metrics"]["R@1"] > 0
    with pytest.raises(BadInput, match="it holds adapters without the model"):
        train.measure(str(tmp_path / "a" / "model"), on="emoji")


def test_names_of_stages_and_models_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.load("clip_moe_tiny", False, device="cpu", **SIZES).save(tmp_path / "base")
    (tmp_path / "clip_moe_tiny").mkdir()
    short = {"steps": 1, "log_every": 1, "save_every": None}
    stages = [{"name": "base"}, {"name": "two", "start": "base"}, {"name": "three", "start": "./base"}]
    tiny = recipe(tmp_path, run=short, stages=stages).located()
    assert [stage.start for stage in tiny.stages] == [None, "base", str(tmp_path / "base")]
    assert {stage.model.name for stage in tiny.stages} == {"clip_moe_tiny"}
    train.run(tiny, tmp_path / "run", progress=False, stages=["base"])
    monkeypatch.chdir(tmp_path / "run")
    train.run(Recipe.load("."), ".", resume=True, progress=False)


def test_adapters_without_their_model_find_the_same_random_one(tmp_path):
    adapted = {"tune": {"method": "lora", "merge": False}, "run": {"seed": 5}}
    stages = [{"name": "a"}, {"name": "b", "start": "a", **adapted}]
    tiny = recipe(tmp_path, run={**EVERY_2, "steps": 2}, stages=stages)
    found = train.run(tiny, tmp_path / "a", progress=False)
    assert train.measure(tmp_path / "a")["metrics"] == found["b"]["metrics"]
    alone = recipe(tmp_path, tune={"method": "lora", "merge": False}, run={**EVERY_2, "steps": 2})
    found = train.run(alone, tmp_path / "b", progress=False)
    assert train.measure(tmp_path / "b")["metrics"] == found[""]["metrics"]


def test_an_interrupt_in_the_last_step_stops_before_the_next_stage(tmp_path, monkeypatch, interruptible):
    stages = [{"name": "one"}, {"name": "two", "start": "one"}]
    tiny = recipe(tmp_path, stages=stages, run={**EVERY_2, "steps": 4})
    train.run(tiny, tmp_path / "a", progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        train.run(tiny, tmp_path / "b", progress=False)
    assert not (tmp_path / "b" / "two").exists()
    train.run(tiny, tmp_path / "b", resume=True, progress=False)
    for stage in ("one", "two"):
        assert_same(tmp_path / "a" / stage, tmp_path / "b" / stage)


def test_another_metric_begins_anew(tmp_path, monkeypatch, interruptible):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        first = recipe(tmp_path, "run.eval_every=2", "run.best=held_out_noto/T2I R@10")
        train.run(first, tmp_path / "a", progress=False)
    second = recipe(tmp_path, "run.eval_every=2", "run.best=-R@1")
    found = train.run(second, tmp_path / "a", resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    after = {line["step"]: line["eval/R@1"] for line in lines if line["step"] > 5 and "eval/R@1" in line}
    assert found[""]["best"]["value"] == min(after.values()) and found[""]["best"]["step"] in after


def test_curves_have_no_point_twice(tmp_path, monkeypatch, interruptible):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny = recipe(tmp_path, "run.log_every=1", "run.save_every=3", log=["tensorboard"])
    tiny.save(tmp_path / "resolved.yaml")
    assert start(train_and_die, tmp_path / "resolved.yaml", tmp_path / "a", 5) == -signal.SIGKILL
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "mmoe")).Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(1, 9))


def test_a_router_is_balanced_once_for_all_parts_of_a_batch(tmp_path):
    router = {"name": "topk", "bias_rate": 0.25}
    found = {}
    for parts in (1, 2):
        changes = f"run.accumulate={parts}", "run.steps=1", "optim.lr=1e-12"
        sizes = {**SIZES, "expert_dropout": 0.0}
        model = {"name": "clip_moe_tiny", "weights": False, "overrides": sizes, "router": router}
        tiny = recipe(tmp_path, *changes, model=model)
        stage = Run(tiny, tmp_path / str(parts), progress=False).start(tiny.stages[0])
        stage.train()
        found[parts] = [layer.router.select_bias.clone() for layer in moe_layers(stage.model).values()]
    assert all(bias.abs().max() <= 0.25 for biases in found.values() for bias in biases)
    assert any(bias.any() for bias in found[2])


def test_losses_of_all_parts_are_told(tmp_path):
    lines = {}
    for parts in (1, 2):
        changes = f"run.accumulate={parts}", "run.steps=1", "run.log_every=1", "model.overrides.expert_dropout=0.0"
        tiny = recipe(tmp_path, *changes)
        train.run(tiny, tmp_path / str(parts), progress=False)
        (line, *_) = (json.loads(told) for told in (tmp_path / str(parts) / "log.jsonl").read_text().splitlines())
        lines[parts] = line
    for line in lines.values():
        balance = sum(0.01 * scale * line[f"loss/balance_{part}"] for part, scale in (("image", 1), ("text", 0.5)))
        assert line["loss/contrastive"] + balance == pytest.approx(line["loss"], rel=1e-4)
    assert lines[2]["loss/contrastive"] < lines[1]["loss/contrastive"], "fewer others to be told from"


def test_a_finished_stage_keeps_no_checkpoints(tmp_path):
    tiny = recipe(tmp_path, "run.steps=1")
    train.run(tiny, tmp_path / "a", progress=False)
    (tmp_path / "a" / "checkpoints" / "step_00000001").mkdir(parents=True)
    train.run(tiny, tmp_path / "a", resume=True, progress=False)
    assert not (tmp_path / "a" / "checkpoints").exists()
