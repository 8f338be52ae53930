"""On what a recipe runs: device, precision, number of processes, and what of that a stage cannot have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from mmoe.errors import BadInput, MissingExtra
from train.recipe import Recipe
from train.sections import Stage

NO_FP16 = "there is no GPU, and fp16 on a CPU overflows"


def not_here(recipe: Recipe) -> Iterator[str]:
    """What a recipe asks for that this machine does not have, in words; another one may."""
    if not torch.cuda.is_available() and any(stage.run.precision == "fp16" for stage in recipe.stages):
        yield f"not on this machine: fp16; {NO_FP16}"
    wanted = recipe.scale.processes or 1
    if wanted > 1 or recipe.scale.shard == "fsdp" or recipe.scale.expert_parallel > 1:
        yield f"it needs several processes: mmoe train ... --launch {max(2, wanted)}"


def make_accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """The device, the precision and the trackers that a recipe asks for.

    Raises:
        BadInput: its stages differ in precision, or this machine has none such.
        MissingExtra: a tracker is not installed.
    """
    precision, *others = dict.fromkeys(stage.run.precision for stage in recipe.stages)
    if others:
        wrong = f"its stages ask for {precision} and {', '.join(others)}"
        raise BadInput(f"run '{recipe.name}' in one go", wrong, f"run.precision={precision}")
    gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and any(stage.optim.name == "muon" for stage in recipe.stages):
        raise BadInput("train with Muon in fp16", "two optimisers share one scale of the loss", "run.precision=bf16")
    if precision == "fp16" and not gpu:
        raise BadInput("train in fp16", NO_FP16, "run.precision=bf16")
    if "wandb" in recipe.log and find_spec("wandb") is None:  # accelerate would say nothing
        raise MissingExtra("log to wandb", "the package 'wandb' is not installed", "pip install wandb")
    AcceleratorState._reset_state()  # of another run in this process, with another precision
    return Accelerator(
        cpu=not gpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(recipe.log) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # of a modality that is not there
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
    )


def check_scale(recipe: Recipe, accelerator: Accelerator) -> None:
    """accelerate starts one process where it cannot start several, shards nothing on CPUs, and says nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        wrong = "a recipe says itself what is sharded"
        raise BadInput(
            "train with accelerate's FSDP", wrong, "accelerate launch --multi_gpu -m train ... scale.shard=fsdp"
        )
    wanted, there = recipe.scale.processes, accelerator.num_processes
    if wanted is not None and wanted != there:
        started = f"{there} {'was' if there == 1 else 'were'} started"
        raise BadInput(f"train with {wanted} processes", started, f"mmoe train ... --launch {wanted}")
    parallel = recipe.scale.expert_parallel
    if recipe.scale.shard == "fsdp" or parallel > 1:
        for stage in recipe.stages:
            _check_sharded(stage)
        if not torch.distributed.is_initialized():
            raise BadInput("shard a model", "one process was started, without a group", "mmoe train ... --launch 2")
    if there % parallel:
        started = f"{there} {'was' if there == 1 else 'were'} started"
        raise BadInput(f"expert_parallel: {parallel}", started, f"mmoe train ... --launch {parallel}")


def _check_sharded(stage: Stage) -> None:
    """What needs whole parameters in every process.

    Raises:
        BadInput: the stage does.
    """
    whole = "scale.shard=none scale.expert_parallel=1"
    if stage.optim.name == "muon":
        fix = "optim.name=adamw optim.muon_lr=null"
        raise BadInput("shard a model that Muon trains", "Muon needs whole matrices", fix)
    if stage.tune.method == "experts":
        raise BadInput("shard a model of which some experts train", "a process has parts of all or none", whole)
    if stage.tune.method == "lora":
        raise BadInput("shard a model with adapters", "peft adapts whole weights", whole)
    if stage.run.precision == "fp16":
        raise BadInput("shard a model in fp16", "gradients are clipped before they are unscaled", "run.precision=bf16")
