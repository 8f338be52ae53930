"""Trains one stage of a recipe: one process or many, stopped and resumed at any step.

Everything random in step s comes from (seed, stage, s). So weights, optimisers and s are all that a stage needs to go
on and to end with the bits of one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn

from mmoe import parallel
from mmoe.errors import BadInput, MmoeError, Refused
from mmoe.trace import Trace, trace, update_routers
from train import tune
from train.average import MovingAverage
from train.checkpoint import WEIGHTS, Checkpoints, State
from train.data.base import DataSet
from train.data.loader import Steps, count_steps, seed_of
from train.evaluate import Task
from train.health import RouterHealth
from train.log import RunLog
from train.optim import Optimizers, schedule
from train.outcome import is_finite, write_model
from train.progress import Progress, interrupts_held, interrupts_raise
from train.recipe import course
from train.sections import ScaleSection, Stage
from train.step_loss import StepLoss
from zoo.model import Model

CHECKPOINTS = "checkpoints"
_PROBES = 8  # batches that show which experts are used most
_ALARM = "moe.health.on_alarm is stop; its state is saved", "the same command with --resume"


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its state is on the disk."""


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
        self.steps = count_steps(stage.run, self.batches.per_epoch)
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
            self._check_sharded()
        inner = torch.compile(self.trained) if stage.run.compile else self.trained
        self.loss = StepLoss(inner, stage.moe, model.config)
        self.optimizers = Optimizers.make(self.trained, stage.optim, chosen)
        self.health = RouterHealth(model, stage.moe.health)
        self.state = State()
        self.checkpoints = Checkpoints(
            folder / CHECKPOINTS, stage.run.keep_last, accelerator.is_main_process, accelerator.wait_for_everyone
        )
        self.ema = None if stage.run.ema is None else MovingAverage(self.trained, stage.run.ema)
        self._told: set[str] = set()  # names of broken samples

    def _check_sharded(self) -> None:
        held, whole = parallel.held_parameters(self.trained)
        if held == whole and self.accelerator.num_processes > 1:
            wrong = f"every process holds all {whole:,} parameters"
            raise Refused("train a sharded model", wrong, "scale.shard=none scale.expert_parallel=1")
        self.log.note(f"the first process holds {held:,} of {whole:,} parameters")

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
            used = {name: self.accelerator.reduce(counts, "sum") for name, counts in used.items()}
        return model, tune.freeze(model, self.stage.tune, used)

    def run(self) -> dict[str, Any]:
        """Trains to the end, evaluates, saves, and tells what came out."""
        self.train()
        with interrupts_held() as interrupted:
            self._check(self._sound(), f"some weights after step {self.state.step} are no numbers")
            self.save()
        if interrupted():
            raise Stopped
        with interrupts_raise(Stopped):
            return self._finish()

    def train(self) -> list[float]:
        """Trains to the end, from the newest checkpoint where there is one; returns the losses since the last log."""
        self._resume()
        self.log.begin(self.state.step)
        accelerator, run = self.accelerator, self.stage.run
        # It lies on the device; moved once more, its memory would no longer be that of the optimisers' views.
        model = self.loss if self.sharded else accelerator.prepare_model(self.loss, device_placement=False)
        each = [accelerator.prepare(optimizer) for optimizer in self.optimizers.each]
        model.train()
        quiet = not (self.progress and accelerator.is_main_process)
        bar = Progress(self.stage.name or self.folder.name, self.steps, self.state.step, quiet=quiet)
        begun, before = time.monotonic(), self.state.seconds
        try:
            with bar, interrupts_held() as interrupted:
                for parts, broken in self.batches.from_step(self.state.step, self.steps, self.stage.data.workers):
                    self.data.note_broken(broken)
                    self._tell_broken()
                    logs = (self.state.step + 1) % run.log_every == 0 or self.state.step + 1 == self.steps
                    loss, told = self._step(model, each, parts, logs)
                    loss, stop = self._agree(loss, interrupted())
                    self._check(math.isfinite(loss), f"the loss of step {self.state.step + 1} is {loss}")
                    self.state.losses = [*self.state.losses, loss][-run.log_every :]
                    self.state.step += 1
                    self.state.seconds = before + time.monotonic() - begun
                    bar.update(self.state.step, loss=sum(self.state.losses) / len(self.state.losses))
                    alarm = self._log(told) if logs else None
                    if _due(self.state.step, run.eval_every) and self.state.step < self.steps:
                        self._evaluate()
                    more = self.state.step < self.steps
                    alarm = alarm if more else None
                    if stop or alarm or (more and _due(self.state.step, run.save_every)):
                        self.save()
                    if stop or alarm:
                        self.log.heatmap(self.state.step)
                    if alarm:
                        raise MmoeError(f"stopped at step {self.state.step}: {alarm}", *_ALARM)
                    if stop:
                        raise Stopped
        finally:
            self.model.eval()
        return self.state.losses

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
        total, found, whole = 0.0, dict[str, float](), Trace()
        for number, batch in enumerate(parts, 1):
            last = number == len(parts)
            with nullcontext() if last or self.sharded else self.accelerator.no_sync(model):
                with trace(self.model) as routing, self.accelerator.autocast():
                    loss, losses = model(send_to_device(batch, self.accelerator.device), routing)
                self.accelerator.backward(loss / len(parts))
            whole.extend(routing.detach())
            total += float(loss.detach()) / len(parts)
            if logs:
                losses = {f"loss/{name}": value / len(parts) for name, value in losses.items()}
                for name, value in self.accelerator.reduce(losses, "mean").items():
                    found[name] = found.get(name, 0.0) + float(value)
        self.optimizers.parts.take_gradients()
        norm = self._clip(each)
        for optimizer in each:
            optimizer.step()
        update_routers(self.model, whole if len(parts) == 1 else whole.joined())
        self.model.after_step(self.state.step)
        if self.ema is not None:
            self.ema.update()
        if not logs:
            return total, {}
        return total, {**found, "grad_norm": norm, "health": self.health.measure(whole)}

    def _clip(self, each: list[Any]) -> float:
        """Norm of the gradient before it is cut."""
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        most = self.stage.optim.clip or math.inf
        if self.sharded:
            return float(parallel.clip_grad_norm_(parameters, most))
        self.accelerator.unscale_gradients(each)
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def _sound(self) -> bool:
        """Whether all weights are numbers; no loss tells what the newest step did."""
        return not self._agree(0.0, not is_finite(self.trained))[1]

    def _check(self, finite: bool, wrong: str) -> None:
        if not finite:
            clip = "" if self.stage.optim.clip else " optim.clip=1.0"
            fix = f"optim.lr={min(1e-3, self.stage.optim.lr / 10):.1g}{clip}, into another folder by --out"
            raise BadInput(f"go on with {self._name}", wrong, fix)

    def _log(self, told: dict[str, Any]) -> str | None:
        """Tells the numbers of a step and its alarms; returns one that stops the run."""
        state = self.state
        health = told.pop("health")
        values = {
            "loss": sum(state.losses) / len(state.losses),
            "lr": self.stage.optim.lr * schedule(state.step - 1, self.steps, self.stage.optim),
            "samples_per_second": state.step * self.stage.data.batch_size / max(state.seconds, 1e-9),
            **told,
        }
        self.log.write(state.step, values, health)
        alarms = self.health.alarms()
        for alarm in alarms:
            self.log.alarm(state.step, alarm)
        if self.stage.moe.health.on_alarm == "warn":
            return None
        _, any_process = self._agree(0.0, bool(alarms))
        return next(iter(alarms), "a router of another process is ill") if any_process else None

    def _evaluate(self) -> dict[str, float]:
        """Measures the model, or its moving average, and keeps the best."""
        if self.eval_data is None:
            return {}
        self.model.eval()
        with self._shown(), torch.no_grad(), torch.random.fork_rng():
            metrics = self.task.measure(self.model, self.eval_data)
            parallel.reshard(self.trained)
            self._tell_broken()
            self._keep_best(metrics)
        self.model.train()
        self.log.write(self.state.step, {f"eval/{name}": value for name, value in metrics.items()}, {})
        self.log.heatmap(self.state.step)
        return metrics

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        name = self.stage.run.best
        if name is None:
            return
        sign, name = (-1.0, name[1:]) if name.startswith("-") else (1.0, name)
        value = sign * metrics[name]
        if math.isfinite(value) and (self.state.best is None or value > self.state.best[0]) and self._sound():
            self.state.best, self.state.best_metrics = (value, self.state.step), dict(metrics)
            write_model(self, self.folder / "best")

    def _shown(self) -> AbstractContextManager[None]:
        """The model has the weights that are evaluated and saved."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def save(self) -> None:
        """Writes a checkpoint, from which `run` goes on."""
        state: dict[str, Any] = {
            "state": vars(self.state),
            "stage": course(self.stage),
            "data": self.data.fingerprint(),
            "log": self.log.lines,
            "best_of": self.stage.run.best,
            "health": self.health.state_dict(),
            "broken": self.data.broken,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "training": self.model.training_state(),
        }
        if self.sharded:
            (optimizer,) = self.optimizers.each
            self.checkpoints.save(
                self.state.step, state, lambda folder: parallel.save_checkpoint(folder, self.trained, optimizer)
            )
        else:
            frozen = self._frozen()
            state["model"] = {k: v for k, v in self.trained.state_dict().items() if k not in frozen}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers.each]
            self.checkpoints.save(self.state.step, state)

    def _resume(self) -> None:
        found = self.checkpoints.newest()
        if found is None:
            self.model.load_training_state({})
            if self.log.cut(0):
                self.log.note(f"{self._name}: no checkpoint was written before it stopped; it begins anew")
            return
        step, folder, state = found
        if state["stage"] != course(self.stage):
            wrong, fix = "its checkpoint was written by another recipe", "the recipe.yaml of its run, or another --out"
            raise BadInput(f"go on with '{self.folder}'", wrong, fix)
        self.log.note(f"{self._name}: goes on from step {step:,} of {self.steps:,}")
        if state["data"] != self.data.fingerprint():
            self.log.note("its data are not those that it began with: samples came, went or have other names")
        if (folder / WEIGHTS).exists():
            (optimizer,) = self.optimizers.each
            parallel.load_checkpoint(folder / WEIGHTS, self.trained, optimizer)
        else:
            self._load(state["model"])
            for optimizer, saved in zip(self.optimizers.each, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.model.load_training_state(state["training"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
        self.data.broken.update(state["broken"])
        self.state = State(**state["state"])
        if state["best_of"] != self.stage.run.best:
            self.state.best, self.state.best_metrics = None, {}  # it was another metric's
        self.log.cut(state["log"])

    @property
    def _name(self) -> str:
        return f"the stage {self.stage.name!r}" if self.stage.name else "the run"

    def _tell_broken(self) -> None:
        """Names samples that could not be read, once."""
        known = self._unread()
        for name in known.keys() - self._told:
            self.log.note(f"left out: {name}: {known[name].splitlines()[0]}")
        self._told |= known.keys()

    def _best(self) -> dict[str, Any] | None:
        """Value of the metric whose best checkpoint was kept, its step, and all metrics of it."""
        if self.state.best is None:
            return None
        sign = -1 if str(self.stage.run.best).startswith("-") else 1
        value, step = self.state.best
        return {"value": sign * value, "step": step, "metrics": self.state.best_metrics}

    def _unread(self) -> dict[str, str]:
        return {**self.data.broken, **(self.eval_data.broken if self.eval_data is not None else {})}

    def _broken(self) -> dict[str, str]:
        """Samples that any process could not read."""
        return {name: wrong for one in gather_object([self._unread()]) for name, wrong in one.items()}

    def _frozen(self) -> set[str]:
        """Parameters that are as they were when the stage began; a checkpoint does without."""
        return {name for name, parameter in self.trained.named_parameters() if not parameter.requires_grad}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        found = self.trained.load_state_dict(state, strict=False)  # a checkpoint has what is trained
        assert not found.unexpected_keys and set(found.missing_keys) <= self._frozen(), found

    def _finish(self) -> dict[str, Any]:
        """Saves the trained model and evaluates it."""
        self.model.eval()
        with self._shown():
            write_model(self, self.folder / "model")
        metrics = self._evaluate()
        if self.eval_data is None:
            self.log.heatmap(self.state.step)
        whole, trained = self.parameters, sum(trained for _, trained, _ in self.table)
        return {
            "stage": self.stage.name,
            "parameters": {"total": whole.total, "active": whole.active, "trained": trained},
            "steps": self.steps,
            "seconds": round(self.state.seconds, 1),
            "loss": sum(self.state.losses) / len(self.state.losses),
            "metrics": metrics,
            "best": self._best(),
            "broken": self._broken(),
        }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
