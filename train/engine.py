"""Trains one stage of a recipe: one process or many, stopped and resumed at any step.

Everything random in step s comes from (seed, stage, s). So weights, optimisers and s are all that a stage needs to go
on and to end with the bits of one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mmoe import parallel
from mmoe.errors import BadInput, MmoeError, did_you_mean
from mmoe.losses import balance_loss, z_loss
from mmoe.trace import Trace, trace, update_routers
from train import tune
from train.average import MovingAverage
from train.checkpoint import WEIGHTS, Checkpoints
from train.data.base import DataSet
from train.data.loader import Steps, seed_of
from train.evaluate import Task
from train.health import RouterHealth
from train.log import RunLog
from train.optim import Optimizers, schedule
from train.progress import Progress, interrupts_held
from train.sections import ScaleSection, Stage
from zoo.model import Model

_PROBES = 8  # batches that show which experts are used most


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its state is on the disk."""


@dataclass
class State:
    """What a stage knows besides weights and optimisers.

    Attributes:
        step: steps that are done.
        losses: of the last logged interval.
        seconds: of training so far, over all interruptions.
        best: value of the metric that is kept, and its step.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: tuple[float, int] | None = None


class StageRun:
    """One stage on one model.

    Args:
        stage: of the recipe.
        scale: devices.
        model: trained in place.
        data: to train on, and to evaluate on or None.
        task: what evaluation measures.
        folder: of the stage.
        accelerator: of the process.
        log: where numbers go.
        progress: shows a bar.
    """

    def __init__(
        self,
        stage: Stage,
        scale: ScaleSection,
        model: Model,
        data: tuple[DataSet, DataSet | None],
        task: Task,
        folder: Path,
        accelerator: Accelerator,
        log: RunLog,
        progress: bool = True,
    ) -> None:
        self.stage, self.model, self.folder, self.accelerator, self.log = stage, model, folder, accelerator, log
        self.data, self.eval_data, self.task, self.progress = *data, task, progress
        self.key = stage.run.seed, stage.name
        self.sharded = scale.shard == "fsdp" or scale.expert_parallel > 1
        rank, processes = accelerator.process_index, accelerator.num_processes
        self.batches = Steps(self.data, model, stage.data.batch_size, self.key, rank, processes, stage.run.accumulate)
        self.steps = stage.run.steps or max(1, round((stage.run.epochs or 1) * self.batches.per_epoch))
        model.to(accelerator.device)
        model.load_report = None  # the weights will no longer be the loaded ones
        self.parameters = model.num_params()
        if stage.run.checkpointing:
            model.set_grad_checkpointing()
        self.trained, chosen = self._tuned(model)
        self.table = tune.table(self.trained, chosen)
        if self.sharded:
            mesh = parallel.make_mesh(scale.expert_parallel)
            parallel.parallelize(self.trained, mesh, methods=model.layer_methods)
        self.optimizers = Optimizers.make(self.trained, stage.optim, chosen)
        self.health = RouterHealth(model, stage.moe.health)
        self.state = State()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", stage.run.keep_last, accelerator.is_main_process, accelerator.wait_for_everyone
        )
        self.ema = None if stage.run.ema is None else MovingAverage(self.trained, stage.run.ema)

    def _tuned(self, model: Model) -> tuple[nn.Module, tune.Chosen]:
        """Freezes what the recipe leaves out, or adds adapters."""
        if self.stage.tune.method == "lora":
            set_seed(seed_of(*self.key, "adapters"))
            return tune.add_adapters(model, self.stage.tune), {}
        used = {}
        if self.stage.tune.top_used is not None:
            steps = range(min(_PROBES, self.batches.per_epoch))
            batches = (send_to_device(part, model.device) for step in steps for part in self.batches[step][0])
            used = tune.expert_use(model.eval(), batches)
        return model, tune.freeze(model, self.stage.tune, used)

    def run(self) -> dict[str, Any]:
        """Trains to the end, evaluates, saves, and tells what came out."""
        self.train()
        return self._finish()

    def train(self) -> list[float]:
        """Trains to the end, from the newest checkpoint where there is one; returns the losses since the last log."""
        self._resume()
        accelerator, run = self.accelerator, self.stage.run
        model = self.trained if self.sharded else accelerator.prepare(self.trained)
        if run.compile:
            model = torch.compile(model)
        each = [accelerator.prepare(optimizer) for optimizer in self.optimizers.each]
        model.train()
        bar = Progress(self.stage.name or self.folder.name, self.steps, self.state.step, quiet=not self.shows)
        begun, before = time.monotonic(), self.state.seconds
        try:
            with bar, interrupts_held() as interrupted:
                for parts, broken in self.batches.from_step(self.state.step, self.steps, self.stage.data.workers):
                    self.data.note_broken(broken)
                    logs = (self.state.step + 1) % run.log_every == 0 or self.state.step + 1 == self.steps
                    loss, told = self._step(model, each, parts, logs)
                    loss, stop = self._agree(loss, interrupted())
                    self._check_loss(loss)
                    self.state.losses = [*self.state.losses, loss][-run.log_every :]
                    self.state.step += 1
                    self.state.seconds = before + time.monotonic() - begun
                    bar.update(self.state.step, loss=sum(self.state.losses) / len(self.state.losses))
                    if logs:
                        self._log(told)
                    if _due(self.state.step, run.eval_every) and self.state.step < self.steps:
                        self._evaluate()
                    if stop or (_due(self.state.step, run.save_every) and self.state.step < self.steps):
                        self.save()
                    if stop and self.state.step < self.steps:
                        raise Stopped
        finally:
            self.model.eval()
        return self.state.losses

    @property
    def shows(self) -> bool:
        """True where this process talks to a person."""
        return self.progress and self.accelerator.is_main_process

    def _agree(self, loss: float, stop: bool) -> tuple[float, bool]:
        """The mean loss of all processes, and whether any was asked to stop, so that all do after the same step."""
        if self.accelerator.num_processes == 1:
            return loss, stop
        told = torch.tensor([loss, float(stop)], device=self.accelerator.device)
        mean, stops = self.accelerator.reduce(told, "mean").tolist()
        return mean, stops > 0

    def _step(
        self, model: nn.Module, each: list[Any], parts: list[dict[str, Tensor]], logs: bool
    ) -> tuple[float, dict[str, Any]]:
        """One optimiser step; returns the loss and, where it is logged, what else is told about it."""
        set_seed(seed_of(*self.key, "step", self.state.step), device_specific=True)
        self.optimizers.set_rate(schedule(self.state.step, self.steps, self.stage.optim))
        self.trained.zero_grad()
        total, found, routing = 0.0, dict[str, float](), Trace()
        for number, batch in enumerate(parts, 1):
            last = number == len(parts)
            with nullcontext() if last or self.sharded else self.accelerator.no_sync(model):
                with trace(self.model) as routing, self.accelerator.autocast():
                    out = model(**send_to_device(batch, self.accelerator.device))
                    loss = out.loss + self._mixture_loss(routing)
                self.accelerator.backward(loss / len(parts))
            total += float(loss.detach()) / len(parts)
            if logs:
                losses = {f"loss/{name}": value.detach() for name, value in out.losses.items()}
                found = {name: float(value) for name, value in self.accelerator.reduce(losses, "mean").items()}
        self.optimizers.parts.take_gradients()
        norm = self._clip(each)
        for optimizer in each:
            optimizer.step()
        update_routers(self.model, routing)
        self.model.constrain()
        if self.ema is not None:
            self.ema.update()
        if not logs:
            return total, {}
        return total, {**found, "grad_norm": norm, "health": self.health.measure(routing.detach())}

    def _mixture_loss(self, routing: Trace) -> Tensor | float:
        """Losses of the recipe that are not the model's own."""
        section = self.stage.moe
        total: Tensor | float = 0.0
        if section.balance_coef and not hasattr(self.model.config, "balance_coef"):
            total = total + section.balance_coef * balance_loss(routing)
        if section.z_coef and not hasattr(self.model.config, "z_coef"):
            total = total + section.z_coef * z_loss(routing)
        return total

    def _clip(self, each: list[Any]) -> float:
        """Norm of the gradient before it is cut."""
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        most = self.stage.optim.clip or math.inf
        if self.sharded:
            return float(parallel.clip_grad_norm_(parameters, most))
        self.accelerator.unscale_gradients(each)
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            wrong = f"the loss of step {self.state.step + 1} is {loss}"
            fix = f"optim.lr={self.stage.optim.lr / 3:.1g}, or optim.clip=1.0"
            raise BadInput(f"go on with the stage {self.stage.name!r}", wrong, fix)

    def _log(self, told: dict[str, Any]) -> None:
        state = self.state
        health = told.pop("health")
        values = {
            "loss": sum(state.losses) / len(state.losses),
            "lr": self.stage.optim.lr * schedule(state.step - 1, self.steps, self.stage.optim),
            "samples_per_second": state.step * self.stage.data.batch_size / max(state.seconds, 1e-9),
            **told,
        }
        self.log.write(state.step, values, health)
        for alarm in self.health.alarms():
            self.log.alarm(state.step, alarm)
            if self.stage.moe.health.on_alarm == "stop":
                self.save()
                raise MmoeError(f"stopped at step {state.step}: {alarm}", "moe.health.on_alarm is stop", "--resume")

    def _evaluate(self) -> dict[str, float]:
        """Measures the model, or its moving average, and keeps the best."""
        if self.eval_data is None:
            return {}
        self.model.eval()
        with self._shown(), torch.no_grad(), torch.random.fork_rng():
            metrics = self.task.measure(self.model, self.eval_data)
            self._keep_best(metrics)
        self.model.train()
        self.log.write(self.state.step, {f"eval/{name}": value for name, value in metrics.items()}, {})
        return metrics

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        name = self.stage.run.best
        if name is None:
            return
        sign, name = (-1.0, name[1:]) if name.startswith("-") else (1.0, name)
        if name not in metrics:
            raise BadInput(f"keep the model with the best {name!r}", did_you_mean(name, metrics), "run.best=null")
        value = sign * metrics[name]
        if self.state.best is None or value > self.state.best[0]:
            self.state.best = value, self.state.step
            self._write_model(self.folder / "best")

    def _shown(self) -> AbstractContextManager[None]:
        """The model has the weights that are evaluated and saved."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def save(self) -> None:
        """Writes a checkpoint, from which `run` goes on."""
        state: dict[str, Any] = {
            "state": vars(self.state),
            "stage": self.stage.model_dump(mode="json"),
            "processes": self.accelerator.num_processes,
            "health": self.health.state_dict(),
            "broken": self.data.broken,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        if self.sharded:
            (optimizer,) = self.optimizers.each
            self.checkpoints.save(
                self.state.step, state, lambda folder: parallel.save_checkpoint(folder, self.trained, optimizer)
            )
        else:
            state["model"] = {k: v for k, v in self.trained.state_dict().items() if k not in self._frozen()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers.each]
            self.checkpoints.save(self.state.step, state)

    def _resume(self) -> None:
        found = self.checkpoints.newest()
        if found is None:
            return
        _, folder, state = found
        if state["stage"] != self.stage.model_dump(mode="json"):
            wrong = "its checkpoint was written by another recipe"
            raise BadInput(
                f"go on with the stage '{self.folder}'", wrong, "the recipe.yaml of its run, or another --out"
            )
        if (folder / WEIGHTS).exists():
            (optimizer,) = self.optimizers.each
            parallel.load_checkpoint(folder / WEIGHTS, self.trained, optimizer)
        else:
            self._load(state["model"])
            for optimizer, saved in zip(self.optimizers.each, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
        self.data.broken.update(state["broken"])
        self.state = State(**state["state"])
        self.log.cut(self.state.step)

    def _frozen(self) -> set[str]:
        """Parameters that are as they were when the stage began; a checkpoint does without."""
        return {name for name, parameter in self.trained.named_parameters() if not parameter.requires_grad}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        found = self.trained.load_state_dict(state, strict=False)
        assert not found.unexpected_keys and set(found.missing_keys) <= self._frozen(), found

    def _finish(self) -> dict[str, Any]:
        """Evaluates and saves the trained model."""
        metrics = self._evaluate()
        self.log.heatmap(self.state.step)
        self.model.eval()
        with self._shown():
            self._write_model(self.folder / "model")
        return {
            "stage": self.stage.name,
            "parameters": {"total": self.parameters.total, "active": self.parameters.active},
            "steps": self.steps,
            "seconds": round(self.state.seconds, 1),
            "loss": sum(self.state.losses) / len(self.state.losses),
            "metrics": metrics,
            "best": None if self.state.best is None else {"value": abs(self.state.best[0]), "step": self.state.best[1]},
            "broken": self.data.broken,
        }

    def _write_model(self, folder: Path) -> None:
        """A folder that `zoo.load` reads, or adapters as peft writes them."""
        model: Any = self.trained
        if self.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = get_model_state_dict(model, options=options)
        if self.accelerator.is_main_process:
            if self.sharded:
                model = type(self.model)(self.model.config)
                model.card, model.preprocessing = self.model.card, self.model.preprocessing
                model.load_state_dict(whole)
            if self.stage.tune.method == "lora":
                tune.save_adapters(model, folder)
            else:
                model.save(folder)
        self.accelerator.wait_for_everyone()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
