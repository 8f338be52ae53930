"""Two processes: the losses of one, parameters that are really sharded, checkpoints for any number of processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor

import train
import zoo
from mmoe import parallel
from mmoe.errors import BadInput, MmoeError, Refused
from tests.processes import command, run
from train.engine import StageRun, Stopped
from train.health import RouterHealth
from train.recipe import Recipe
from train.stages import Run

SIZES = {"vision_width": 32, "vision_layers": 2, "text_width": 32, "text_layers": 2, "embed_dim": 16}
SIZES |= {"vision_heads": 2, "text_heads": 2, "moe_layers": 2, "init_logit_scale": 2.6}
SIZES |= {"balance_coef": 0.1, "balance_over_ranks": False}


def recipe(tmp_path: Path, **sections) -> Path:
    """Plain SGD: what it does shows every gradient."""
    told = {
        "model": {"name": "clip_moe_tiny", "weights": False, "overrides": SIZES},
        "data": {"name": "emoji", "batch_size": 16, "limit": 128},
        "optim": {"lr": 0.05, "name": "sgd", "clip": 1.0},
        "run": {"steps": 4, "log_every": 1, "save_every": None},
        "log": [],
        **sections,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def job(rank: int, world: int, path: Path, out: Path, resume: bool, stop: int) -> tuple[int, int]:
    """A run that may be asked to stop; returns how many parameters are sharded, and the size of this process' part."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, not used: there is a group
    found = []
    inner, agree = StageRun.train, StageRun._agree

    def told(self):
        sharded = [p for p in self.trained.parameters() if isinstance(p, DTensor)]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in self.trained.parameters()]
        found.append((len(sharded), sum(p.numel() for p in own)))
        return inner(self)

    StageRun.train = told
    StageRun._agree = lambda self, loss, asked: agree(self, loss, asked or (self.state.step + 1 == stop and rank == 0))
    with contextlib.suppress(Stopped):
        train.run(Recipe.load(path), out, resume=resume, progress=False)
    return found[0]


def launch(tmp_path: Path, path: Path, out: Path, processes: int, stop: int = 0) -> list[tuple[int, int]]:
    found = run(processes, job, tmp_path, path, out, out.exists(), stop)
    assert all(isinstance(one, tuple) for one in found), found
    return found


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return zoo.load(out / "model", device="cpu").state_dict()


FSDP, EVALUATED = {"scale": {"shard": "fsdp"}}, {"steps": 5, "log_every": 1, "save_every": None, "eval_every": 2}
MUON = {"name": "muon", "lr": 1e-3, "muon_lr": 1e-2}
CASES = {
    "ddp": {},
    "ddp, router losses": {"moe": {"balance_coef": 1.0, "z_coef": 0.5}},
    "ddp, muon": {"optim": MUON},
    "ddp, experts": {"tune": {"method": "experts", "experts": [0, 3]}},
    "ddp, most used experts": {"tune": {"method": "experts", "top_used": 1}},
    "ddp, parts, average": {"run": {**EVALUATED, "accumulate": 2, "ema": 0.5}},
    "fsdp": FSDP,
    "fsdp, evaluated": {**FSDP, "run": EVALUATED},
    "fsdp, evaluated, average": {**FSDP, "run": {**EVALUATED, "ema": 0.5}},
    "experts": {"scale": {"expert_parallel": 2}},
    "experts, evaluated": {"scale": {"expert_parallel": 2}, "run": EVALUATED},
}


def test_parameters_that_no_loss_needs_are_not_waited_for(tmp_path, root):
    rows = [f"{root}/assets/examples/fox.png,{score / 15}" for score in range(16)]
    (tmp_path / "scores.csv").write_text("\n".join(["image,score", *rows]))
    sizes = {
        "vision_heads": 2,
        "text_heads": 2,
        "vision_width": 64,
        "text_width": 64,
        "vision_layers": 1,
        "text_layers": 1,
        "image_size": 32,
    }
    told = {
        # This loss compares probabilities of levels, so the numbers that turn them into a score have no gradient.
        "model": {
            "name": "gamma_tiny",
            "weights": False,
            "overrides": {**sizes, "num_experts": 0, "first_layer": 0, "loss": "levels", "short_side": 32},
        },
        "data": {"name": "quality", "path": str(tmp_path), "batch_size": 8, "held_out": 0.0},
        "run": {"steps": 3, "log_every": 1, "save_every": None},
    }
    path = recipe(tmp_path, **told)
    train.run(Recipe.load(path), tmp_path / "one", progress=False)
    launch(tmp_path, path, tmp_path / "two", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


PARTS_OF_OTHERS = {"ddp", "fsdp", "fsdp, evaluated", "experts"}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name in PARTS_OF_OTHERS)) for name in CASES]
)
def test_two_processes_train_as_one(tmp_path, case):
    sections, scale = CASES[case], CASES[case].get("scale", {})
    one = recipe(tmp_path, **{name: told for name, told in sections.items() if name != "scale"})
    begun = (
        Run(Recipe.load(one), tmp_path / "start", progress=False).start(Recipe.load(one).stages[0]).model.state_dict()
    )
    begun = {name: value.clone() for name, value in begun.items()}
    train.run(Recipe.load(one), tmp_path / "one", progress=False)
    shares = launch(tmp_path, recipe(tmp_path, **sections), tmp_path / "two", 2)
    for name, value in weights(tmp_path / "one").items():
        moved, gap = (value - begun[name]).norm(), (weights(tmp_path / "two")[name] - value).norm()
        assert gap <= 1e-3 * moved + 1e-5, f"{name} moved by {moved:.2g} and differs by {gap:.2g}"
    whole = sum(value.numel() for value in begun.values())
    if scale:
        assert all(sharded > 10 and local < 0.6 * whole for sharded, local in shares)
    else:
        assert shares == [(0, whole)] * 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def alarmed(rank: int, world: int, path: Path, out: Path) -> str:
    """A run in which one process alone sees a router that is ill."""
    RouterHealth.alarms = lambda self: ["a router is ill"] if rank == 1 else []
    try:
        job(rank, world, path, out, False, 0)
    except MmoeError as error:
        return str(error)
    return "it went on"


def unsharded(rank: int, world: int, path: Path, out: Path) -> str:
    """A run whose model is left whole, as accelerate leaves it on CPUs."""
    parallel.parallelize = lambda model, mesh, methods: model
    try:
        job(rank, world, path, out, False, 0)
    except Refused as error:
        return str(error)
    return "it trained"


def test_a_model_that_was_not_sharded_is_not_trained(tmp_path):
    told = run(2, unsharded, tmp_path, recipe(tmp_path, **FSDP), tmp_path / "a")
    assert ["train a sharded model\n  every process holds all" in text for text in told] == [True, True], told


def test_an_alarm_of_one_process_stops_all(tmp_path):
    path = recipe(tmp_path, moe={"health": {"on_alarm": "stop"}})
    told = run(2, alarmed, tmp_path, path, tmp_path / "a")
    assert ["stopped at step 1: a router" in text for text in told] == [True, True], told


@pytest.mark.parametrize("scale", [{}, {"shard": "fsdp"}], ids=["ddp", "fsdp"])
def test_a_checkpoint_goes_from_two_processes_to_one_and_back(tmp_path, scale):
    sections = {"optim": {"lr": 1e-3}, "run": {"steps": 6, "log_every": 1, "save_every": None, "ema": 0.5}}
    train.run(Recipe.load(recipe(tmp_path, **sections)), tmp_path / "whole", progress=False)
    path, out = recipe(tmp_path, scale=scale, **sections), tmp_path / "mixed"
    for processes, stop in ((2, 2), (1, 4), (2, 0)):
        launch(tmp_path, path, out, processes, stop)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(out)[name], value, atol=1e-3, rtol=1e-2, msg=name)


def test_the_number_of_processes_is_checked(tmp_path):
    path = recipe(tmp_path, scale={"processes": 2})
    with pytest.raises(BadInput, match=r"train with 2 processes\n  1 was started\n  try: mmoe train ... --launch 2"):
        Run(Recipe.load(path), tmp_path / "a", progress=False)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"scale": {"expert_parallel": 3}}, "one process was started, without a group"),
        ({**FSDP, "tune": {"method": "experts", "experts": [0]}}, "some experts train"),
        ({"scale": {"expert_parallel": 2}, "tune": {"method": "lora"}}, "peft adapts whole weights"),
        (
            {"scale": {"shard": "fsdp"}, "optim": {"name": "muon", "lr": 1e-3, "muon_lr": 1e-3}},
            "Muon needs whole matrices",
        ),
    ],
)
def test_what_cannot_be_sharded(tmp_path, sections, told):
    with pytest.raises(BadInput, match=told):
        Run(Recipe.load(recipe(tmp_path, **sections)), tmp_path / "a", progress=False)


def test_sharding_by_accelerate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInput, match=r"train with accelerate's FSDP\n.*\n  try: .*scale.shard=fsdp"):
        Run(Recipe.load(recipe(tmp_path)), tmp_path / "a", progress=False)


ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "train"]


def launched(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """What `python -m` with these words does in a folder; `mmoe`, which starts other processes, is a forked one."""
    if words[0] == "mmoe":
        return command(words[1:], folder)
    alone = [sys.executable, "-m", *words]
    return subprocess.run(alone, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    "launcher", [["mmoe", "train", "--launch", "2"], ACCELERATE], ids=["mmoe --launch", "accelerate launch"]
)
def test_launchers_start_as_many_processes_as_were_asked_for(tmp_path, launcher):
    path = recipe(tmp_path, scale={"processes": 2}, run={"steps": 1})
    ended = launched([*launcher, str(path), "data.limit=32", "--out", "a"], tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("1 steps, loss") == 1, "one process tells"
    assert (tmp_path / "a" / "results.json").exists()


def test_a_launch_ends_with_what_its_processes_say(tmp_path):
    path = recipe(tmp_path, optim={"lr": 1e10, "clip": None}, run={"steps": 9})
    words = ["mmoe", "train", "--launch", "2", str(path), "--out", "a"]
    ended = launched(words, tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "the loss of step" in ended.stderr and "Traceback" not in ended.stderr
    ended = launched([*words, "optim.lr=-1"], tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1


def test_one_process_that_launchers_start_in_place_of_two_is_told(tmp_path):
    path = recipe(tmp_path, scale={"processes": 2})
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "train", str(path)]
    ended = launched(words, tmp_path)
    assert ended.returncode != 0
    assert "train with 2 processes\n  1 was started\n  try: mmoe train ... --launch 2" in ended.stderr
