"""What a recipe can say: its sections, with defaults and limits."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False)]  # with room, as torch's overflow near 3e38


class Section(BaseModel):
    """Of what no option may be unknown, and true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and "bool" not in kinds and ("int" in kinds or "float" in kinds):
            raise ValueError(f"{info.field_name} should be a number, not {str(value).lower()}")
        return value


class ModelSection(Section):
    """Which model.

    Attributes:
        name: of a card, of a folder that a model was saved in, or hf-hub:ORG/NAME.
        weights: true (the card's), false (random), a tag, or a file.
        router, experts: registered parts in place of the model's own.
        overrides: options of the model's config.
    """

    name: str
    weights: bool | str = True
    router: str | dict[str, Any] | None = None
    experts: str | dict[str, Any] | None = None
    overrides: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        """What `zoo.load` is told besides name and weights."""
        return {"router": self.router, "experts": self.experts, **self.overrides}


class TuneSection(Section):
    """What of it is trained.

    Attributes:
        method: full; router_only; adapters (what the model's family adds to a frozen backbone); modules (those of
            `modules`); experts (those of `experts` or `top_used`, and nothing else of their layers); lora (by peft, on
            `modules` and the experts' packed weights).
        modules: patterns of parameter names.
        whole: of LoRA: patterns of modules that are trained as they are, such as a head that is new.
        experts: numbers of experts.
        top_used: as many experts per layer, those that the data uses most.
        rank, alpha: of LoRA.
        merge: saves the model with LoRA's adapters added to its weights, so that it loads alone, and them in its folder
            "adapters"; else the adapters alone.
    """

    method: Literal["full", "router_only", "adapters", "modules", "experts", "lora"] = "full"
    modules: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    experts: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    top_used: Annotated[int, Field(gt=0)] | None = None
    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Positive = 16.0
    merge: bool = True

    @model_validator(mode="after")
    def _fits(self) -> TuneSection:
        if self.method == "modules" and not self.modules:
            raise ValueError("method: modules needs patterns, for example modules: ['*.mlp.*']")
        if self.method == "experts" and (self.experts is None) == (self.top_used is None):
            raise ValueError("method: experts needs either experts: [0, 3] or top_used: 2")
        takers = {"modules": ("modules", "lora"), "whole": ("lora",), "experts": ("experts",), "top_used": ("experts",)}
        for option, methods in takers.items():
            if getattr(self, option) not in ((), None) and self.method not in methods:
                raise ValueError(f"{option} says nothing to method: {self.method}; it is for {' and '.join(methods)}")
        return self


class DataSection(Section):
    """On which data.

    Attributes:
        name: of a data set; `mmoe recipe data` tells them and how their files lie.
        path: folder or file, for data of one's own.
        batch_size: samples of an optimiser step over all processes and accumulated parts.
        limit: uses so many samples of each split.
        held_out: share of one's own samples that is evaluated on and not trained on; 0 trains on all and measures
            nothing.
        task: what evaluation measures; the data set's own when null.
        max_broken: samples that cannot be read are skipped up to so many; one more stops the run with their list.
        workers: processes that prepare batches ahead, each with a copy of the model.
        options: of the data set.
    """

    name: str
    path: Path | None = None
    batch_size: Annotated[int, Field(gt=0)] = 32
    limit: Annotated[int, Field(gt=0)] | None = None
    held_out: Share = 0.1
    task: str | None = None
    max_broken: Annotated[int, Field(ge=0)] = 10
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    options: dict[str, Any] = {}


class OptimSection(Section):
    """How the weights move.

    Attributes:
        name: adamw; sgd; muon (for the matrices of the blocks, each expert's its own, and AdamW for the rest).
        lr: peak learning rate.
        muon_lr: that of the matrices with muon.
        weight_decay, muon_weight_decay: biases, norms, positions and scales have none.
        beta1, beta2, eps: of AdamW; beta1 is the momentum of SGD.
        factors: pattern of parameter names -> multiple of the learning rate.
        schedule: cosine, linear or constant, after a linear warm-up.
        warmup: share of the steps.
        end: share of the peak that the rate comes down to behind the last step.
        clip: largest norm of the gradient; null leaves it.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: LearningRate
    muon_lr: LearningRate | None = None
    weight_decay: Rate = 0.01
    muon_weight_decay: Rate = 0.05
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Positive = 1e-6
    factors: dict[str, Rate] = {}
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.1
    end: Share = 0.01
    clip: Positive | None = 1.0

    @model_validator(mode="after")
    def _fits(self) -> OptimSection:
        if (self.name == "muon") != (self.muon_lr is not None):
            raise ValueError("name: muon and muon_lr belong together")
        return self


class HealthSection(Section):
    """When to call a router ill; null turns an alarm off.

    Attributes:
        dead_share: an expert with less than this share of an even load is dead.
        max_violation: largest load over an even one, minus 1.
        min_entropy: of the probabilities, as a share of that of even ones.
        max_drop: share of slots that were dropped.
        max_drift: change of a router's weights since the start, as a share of their norm then; off unless it is set.
        on_alarm: "warn", or "stop" the run (its state is saved).
    """

    dead_share: Share | None = 0.01
    max_violation: Rate | None = 4.0
    min_entropy: Share | None = 0.02
    max_drop: Share | None = 0.5
    max_drift: Rate | None = None
    on_alarm: Literal["warn", "stop"] = "warn"


class MoeSection(Section):
    """The mixtures.

    Attributes:
        balance_coef, z_coef: weights of the balance loss and of the router z-loss; null leaves what the model has.
        health: alarms.
    """

    balance_coef: Rate | None = None
    z_coef: Rate | None = None
    health: HealthSection = HealthSection()


class RunSection(Section):
    """How long, and with which arithmetic.

    Attributes:
        steps: optimiser steps; or `epochs` passes over the data.
        seed: of everything random.
        precision: fp32, bf16, fp16; auto is bf16 on GPUs that have it, else fp32.
        accumulate: parts that a batch is computed in; losses that compare samples with each other, such as CLIP's, see
            those of a part only.
        checkpointing: computes activations again in backward instead of keeping them.
        compile: uses torch.compile.
        ema: decay of a moving average of the weights, which is evaluated and saved in their place; null has none.
        log_every, eval_every, save_every: steps; null is never, but the end is always evaluated and saved.
        keep_last: checkpoints that stay.
        best: metric whose best checkpoint is kept, with "-" in front where less is better.
    """

    steps: Annotated[int, Field(gt=0, le=10**9)] | None = None
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: Annotated[int, Field(gt=0)] = 1
    checkpointing: bool = False
    compile: bool = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    log_every: Annotated[int, Field(gt=0)] = 10
    eval_every: Annotated[int, Field(gt=0)] | None = None
    save_every: Annotated[int, Field(gt=0)] | None = 100
    keep_last: Annotated[int, Field(gt=0)] = 2
    best: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> RunSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class ScaleSection(Section):
    """On how many devices.

    Attributes:
        processes: how many there must be; null takes what the launcher started.
        shard: "none" (every process has all weights) or "fsdp" (FSDP2).
        expert_parallel: processes that share one set of experts.
    """

    processes: Annotated[int, Field(gt=0)] | None = None
    shard: Literal["none", "fsdp"] = "none"
    expert_parallel: Annotated[int, Field(gt=0)] = 1


class Stage(Section):
    """All that one stage says. A recipe without `stages:` is one stage.

    Attributes:
        name: of its folder; empty where it is the only one.
        start: the stage, folder or model whose weights it begins with, or {assemble: [...]}: experts made of the
            feed-forward layers of several, the first one being the host; `model.weights` when null.
        model, tune, data, optim, moe, run: sections.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""
    start: str | dict[Literal["assemble"], Annotated[tuple[str, ...], Field(min_length=1)]] | None = None
    model: ModelSection
    tune: TuneSection = TuneSection()
    data: DataSection
    optim: OptimSection
    moe: MoeSection = MoeSection()
    run: RunSection

    @model_validator(mode="after")
    def _free_name(self) -> Stage:
        if self.name in ("model", "best", "checkpoints", "tensorboard"):
            raise ValueError(f"no stage can be named {self.name!r}: a run has a folder of that name")
        return self


def section_of(annotation: Any) -> Any:
    """The section class in an annotation, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_of(part) for part in typing.get_args(annotation)]
    return next((section for section in found if section is not None), None)
