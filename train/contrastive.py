"""Contrastive training of CLIP-like zoo models on emoji pairs: one loop for base training, MCL stages and routers.

Every random choice of step s comes from (seed, stage, s), so a run that was stopped and taken up again ends with the
same bits as one that was not. A batch never holds a concept twice: its two drawings would be false negatives.

Shapes: B pairs per batch, n concepts.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmoe.atomic import atomic_path, torch_save
from mmoe.errors import BadInput, CorruptFile
from mmoe.options import check_float, check_int
from mmoe.trace import trace, update_routers
from train.augment import as_input, augment
from train.data.emoji import EmojiSet, load_emoji
from train.progress import Progress, interrupts_held
from zoo.clip_moe.model import ClipMoE


class StageConfig(BaseModel):
    """One stage of training.

    Attributes:
        steps: optimiser steps.
        batch_size: concepts per step over all processes, each in all training styles against one caption.
        text_length: captions are cut to this many tokens.
        lr: peak learning rate of AdamW; linear warm-up, then cosine to 1 % of it.
        muon_lr: peak learning rate of Muon for the matrices of the blocks, each expert's its own; None leaves them to
            AdamW.
        weight_decay: of what AdamW trains; biases, norms, positions and the logit scale have none.
        muon_weight_decay: of what Muon trains.
        scale_lr: learning rate of the logit scale, as a multiple of `lr`.
        warmup: share of the steps.
        clip: largest gradient norm.
        beta2: of AdamW.
        trainable: patterns of parameter names; the others are frozen.
        strength: of the augmentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(gt=0)
    batch_size: int = Field(default=128, gt=1)
    text_length: int = Field(default=16, gt=2)
    lr: float = Field(gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    muon_weight_decay: float = Field(default=0.05, ge=0)
    scale_lr: float = Field(default=1.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    beta2: float = Field(default=0.98, gt=0, lt=1)
    trainable: tuple[str, ...] = ("*",)
    strength: float = Field(default=1.0, ge=0)


def step_seed(*parts: object) -> int:
    """A seed from anything that names a random choice."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def epoch_batches(
    emoji: EmojiSet, batch_size: int, seed: int, cells: Tensor | None = None
) -> list[list[tuple[int, int]]]:
    """Batches of (style, concept) for one pass over the seen concepts, each in one random training style.

    Args:
        emoji: the data.
        batch_size: B.
        seed: of this epoch.
        cells: (styles, n) cluster of every picture; a batch then comes from one cluster. Clusters that are smaller than
            half a batch in this pass are left out, as the paper's sampler leaves out clusters below a batch.
    """
    draw = random.Random(seed)
    pairs = [(draw.randrange(len(emoji.training_styles)), concept) for concept in emoji.seen]
    draw.shuffle(pairs)
    groups: dict[int, list[tuple[int, int]]] = {}
    for style, concept in pairs:
        groups.setdefault(0 if cells is None else int(cells[style, concept]), []).append((style, concept))
    batches = []
    for members in groups.values():
        chunks = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        batches += [chunk for chunk in chunks if 2 * len(chunk) >= batch_size]
    draw.shuffle(batches)
    if not batches:
        raise BadInput(
            f"make batches of {batch_size} pairs", "every cluster is smaller than half of that", "batch_size=32"
        )
    return batches


def batch_stream(
    emoji: EmojiSet, batch_size: int, key: Sequence[object], start: int, cells: Tensor | None
) -> Iterator[list[tuple[int, int]]]:
    """Batches from step `start` on; the same for every start."""
    epoch = position = 0
    while True:
        batches = epoch_batches(emoji, batch_size, step_seed(*key, "epoch", epoch), cells)
        yield from batches[max(0, start - position) :]
        position += len(batches)
        epoch += 1


def make_batch(
    model: ClipMoE, emoji: EmojiSet, pairs: Sequence[tuple[int, int]], config: StageConfig, seed: int
) -> dict[str, Tensor]:
    """Augmented pixels in all training styles of each concept, and one random caption per concept."""
    draw = random.Random(seed)
    concepts = torch.tensor(pairs)[:, 1]
    pixels = emoji.training_pixels[:, concepts].flatten(0, 1)  # (styles * B, 4, 64, 64)
    image = augment(pixels, torch.Generator().manual_seed(seed), config.strength)
    captions = [emoji.concepts[concept].caption(draw) for concept in concepts.tolist()]
    text = model.tokenizer(captions, context_length=min(config.text_length, model.config.context_length))
    return {"image": as_input(model, image), "text": text.to(model.device)}


class ContrastiveRun:
    """One stage on one model.

    Args:
        model: trained in place.
        emoji: the data.
        config: of the stage.
        seed: of the run.
        name: of the stage; part of every random choice.
        folder: where the checkpoint and the log go; None keeps nothing.
        cells: (styles, n) clusters for cluster-wise batches.
        save_every: seconds between checkpoints.
    """

    def __init__(
        self,
        model: ClipMoE,
        emoji: EmojiSet,
        config: StageConfig,
        *,
        seed: int = 0,
        name: str = "stage",
        folder: Path | None = None,
        cells: Tensor | None = None,
        save_every: float = 60.0,
    ) -> None:
        self.model, self.emoji, self.config = model, emoji, config
        self.key, self.name, self.folder, self.cells = (seed, name), name, folder, cells
        self.save_every = save_every
        self.step, self.losses, self.seconds = 0, list[float](), 0.0
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(parameter_name, pattern) for pattern in config.trainable))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise BadInput(
                f"train {', '.join(config.trainable)}", "no parameter has such a name", "trainable=['*.mlp.*'] or ['*']"
            )
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        model.to(self.accelerator.device)  # before the optimisers, whose state and views follow the parameters
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in make_optimizers(model, config)]

    def run(self, progress: bool = True) -> list[float]:
        """Trains to the end, from the checkpoint where there is one; returns the loss of every step."""
        self._resume()
        self.model.load_report = None  # its weights are no longer the loaded ones
        model = self.accelerator.prepare(self.model.train())
        stream = batch_stream(self.emoji, self.config.batch_size, self.key, self.step, self.cells)
        begun = saved = time.monotonic()
        before = self.seconds
        bar = Progress(self.name, self.config.steps, self.step, quiet=not progress)
        try:
            with bar, interrupts_held() as interrupted:
                while self.step < self.config.steps:
                    loss = self._step(model, next(stream))
                    if not math.isfinite(loss):
                        wrong = f"the loss of step {self.step} is {loss}"
                        raise BadInput(f"go on with {self.name!r}", wrong, f"a lower lr than {self.config.lr:g}")
                    self.losses.append(loss)
                    self.step += 1
                    self.seconds = before + time.monotonic() - begun
                    bar.update(self.step, loss=sum(self.losses[-20:]) / len(self.losses[-20:]))
                    if interrupted() or time.monotonic() - saved > self.save_every:
                        self.save()
                        saved = time.monotonic()
                    if interrupted():
                        raise KeyboardInterrupt
        finally:
            self.model.eval()
        self.save()
        return self.losses

    def _step(self, model: nn.Module, pairs: list[tuple[int, int]]) -> float:
        seed = step_seed(*self.key, "step", self.step)
        torch.manual_seed(seed)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        whole = len(pairs) // ranks * ranks
        batch = make_batch(self.model, self.emoji, pairs[:whole][rank::ranks], self.config, seed + rank)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(self.step, self.config)
            optimizer.zero_grad()
        with trace(self.model) as routing:
            loss = model(**batch, return_loss=True).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(
            [parameter for parameter in model.parameters() if parameter.requires_grad], self.config.clip
        )
        for optimizer in self.optimizers:
            optimizer.step()
        update_routers(self.model, routing)
        scale = self.model.clip.logit_scale
        if scale.requires_grad:
            scale.data.clamp_(0, math.log(100))
        return float(loss.detach())

    def save(self) -> None:
        """Writes the checkpoint, from which `run` goes on."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "losses": self.losses,
            "seconds": self.seconds,
            "config": self.config.model_dump(),
            "key": self.key,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch_save(state, self.folder / f"{self.name}.pt")
        log = {"seconds": round(self.seconds, 3), "losses": [round(loss, 5) for loss in self.losses]}
        with atomic_path(self.folder / f"{self.name}.log.json") as temporary:
            temporary.write_text(json.dumps(log))

    def _resume(self) -> None:
        path = None if self.folder is None else self.folder / f"{self.name}.pt"
        if path is None or not path.exists():
            return
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file can raise anything
            wrong = f"{path.stat().st_size:,} bytes; it is damaged"
            fix = f"rm '{path}'   (its stage begins again)"
            raise CorruptFile(f"cannot go on from '{path}'", wrong, fix) from error
        if (state["config"], state.get("key", self.key)) != (self.config.model_dump(), self.key):
            raise BadInput(
                f"go on with the run in '{self.folder}'",
                f"its stage {self.name!r} was started with other options or another seed",
                f"start again in another folder, or delete '{path}'",
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.losses, self.seconds = state["step"], state["losses"], state["seconds"]


def schedule(step: int, config: StageConfig) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to 0.01."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, config.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


class PackedMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that takes packed matrices (E, O, I) as E matrices, as it would take E dense layers."""

    def __init__(self, parameters: Sequence[nn.Parameter], **options: Any) -> None:
        self.packed = [(p, [nn.Parameter(m) for m in p.detach().unbind()]) for p in parameters if p.ndim == 3]
        matrices = [matrix for _, views in self.packed for matrix in views]
        group = {"params": [*(p for p in parameters if p.ndim == 2), *matrices], "peak": options["lr"]}
        super().__init__([group], adjust_lr_fn="match_rms_adamw", **options)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # overloads
        """One step with the gradients of the packed matrices."""
        for parameter, views in self.packed:
            grads = [None] * len(views) if parameter.grad is None else parameter.grad.unbind()
            for view, grad in zip(views, grads, strict=True):
                view.grad = grad
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the packed matrices' gradients too."""
        super().zero_grad(set_to_none)
        for parameter, _ in self.packed:
            parameter.grad = None


def make_optimizers(model: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the blocks where configured; `peak` is each group's own learning rate."""
    plain, decayed, scale, muon = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("logit_scale"):
            scale.append(parameter)
        elif parameter.ndim < 2 or "positional" in name or name.endswith("_bias"):
            plain.append(parameter)
        elif config.muon_lr and "resblocks" in name and ".router." not in name:
            muon.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "peak": config.lr},
        {"params": plain, "weight_decay": 0.0, "peak": config.lr},
        {"params": scale, "weight_decay": 0.0, "peak": config.lr * config.scale_lr},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=1e-6))
    if config.muon_lr and muon:
        optimizers.append(PackedMuon(muon, lr=config.muon_lr, weight_decay=config.muon_weight_decay))
    return optimizers


def fine_tune(
    model: ClipMoE,
    steps: int = 20,
    *,
    lr: float = 3e-3,
    trainable: str | Sequence[str] = ("*router*",),
    progress: bool = True,
) -> list[float]:
    """A short fine-tuning on the emoji, of the routers by default; returns the loss of every step.

    Args:
        model: trained in place; afterwards it is where it was, in its mode, with the same parameters frozen.
        steps: optimiser steps.
        lr: peak learning rate. The default is for routers; all weights of a trained model want about 1e-4.
        trainable: pattern of parameter names, or several.
        progress: shows a bar on a terminal.

    Raises:
        BadOverride: no steps or no learning rate. BadInput: no parameter has such a name.
    """
    check_int("steps", steps, 1)
    check_float("lr", lr, above=0, usual=3e-3)
    patterns = (trainable,) if isinstance(trainable, str) else tuple(map(str, trainable))
    config = StageConfig(steps=steps, batch_size=64, lr=lr, trainable=patterns)
    frozen = {name: not parameter.requires_grad for name, parameter in model.named_parameters()}
    device, was_training = model.device, model.training
    try:
        with torch.random.fork_rng():
            return ContrastiveRun(model, load_emoji(), config, name="fine_tune").run(progress)
    finally:
        model.to(device).train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen[name])
