"""Adaptation to pictures without labels: a teacher labels them, and classes of labelled pictures are pasted in.

Method: DACS, Tranheden et al. 2021, arXiv 2007.08702, in the variant of arXiv 2504.06220 and its code: no threshold on
the teacher's confidence, mixing only after 4,000 steps, both losses added with weights 1 and 1/2.

    teacher <- a teacher + (1 - a) student,   a = min(1 - 1 / (step + 1), 0.99)
    mixed = m source + (1 - m) target          for pictures and labels; m: pixels of half of the source's classes

Where we differ: the teacher shares what is frozen with the student, is no module of the model, and is never given to an
optimiser; the labels of the source are not overwritten. A confidence weight as in DACS is an option. A model with
`adaptation_begin` in its config does all this by itself where a batch has "target".
Shapes: B pictures, H and W pixels, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmoe.dispatch import is_sharded
from mmoe.errors import Refused

if TYPE_CHECKING:
    from zoo.earth_adapter.model import EarthAdapter, EarthOutput


def teacher_rate(step: int, most: float = 0.99) -> float:
    """Share of itself that the teacher keeps after a step, from 0: the first one copies the student.

    >>> [round(teacher_rate(step), 3) for step in (0, 1, 4, 5000)]
    [0.0, 0.5, 0.8, 0.99]
    """
    return min(1 - 1 / (step + 1), most)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, step: int, most: float = 0.99) -> None:
    """Moves a teacher's parameters towards the student's, after the optimiser's step."""
    rate = teacher_rate(step, most)
    others = dict(student.named_parameters())
    for name, own in teacher.named_parameters():  # not in order: peft puts parameters away and back
        if own is not others[name]:
            own.mul_(rate).add_(others[name], alpha=1 - rate)


def half_of_classes(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Half of the classes of a mask (H, W), rounded up, by chance; 255 counts as one of them."""
    found = labels.unique()
    chosen = torch.randperm(len(found), generator=generator)[: (len(found) + 1) // 2]
    return found[chosen.to(found.device)]


def paste(source: Tensor, target: Tensor, pasted: Tensor) -> Tensor:
    """Pixels (B, ..., H, W) of the source where `pasted` (B, H, W) is true, of the target elsewhere."""
    where = pasted if source.ndim == pasted.ndim else pasted[:, None]
    return torch.where(where, source, target)


def chosen_pixels(labels: Tensor, classes: Sequence[Tensor]) -> Tensor:
    """Pixels of masks (B, H, W) whose class is one of those chosen for their picture, (B, H, W) bool.

    >>> chosen_pixels(torch.tensor([[[0, 1, 255]]]), [torch.tensor([1, 255])]).int().tolist()
    [[[0, 1, 1]]]
    """
    return torch.stack([torch.isin(one, chosen) for one, chosen in zip(labels, classes, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Pseudo:
    """What the teacher says about pictures.

    Attributes:
        labels: (B, H, W) class numbers.
        confidence: (B, H, W) probability of that class.
    """

    labels: Tensor
    confidence: Tensor


class Adaptation:
    """Trains a student on labelled source pictures and unlabelled target pictures.

    Args:
        student: of the family, not of the head "classes".
        begin: steps on the source alone before pictures are mixed.
        weight: of the loss on mixed pictures.
        most: largest share that the teacher keeps of itself.
        threshold: weights a mixed picture's loss by the share of its target's pixels that the teacher is at least so
            sure of, as DACS does; None counts every picture fully.

    Attributes:
        step: number of the step that comes next, from 0.

    Raises:
        Refused: the student is sharded over processes.

    Example:
        >>> from zoo.earth_adapter.config import EarthAdapterConfig
        >>> from zoo.earth_adapter.model import EarthAdapter
        >>> sizes = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "head_width": 8}
        >>> student = EarthAdapter(EarthAdapterConfig(**sizes, head="light", classes=("land", "sea")))
        >>> adaptation = Adaptation(student, begin=0)
        >>> adaptation.after_step(0)
        >>> source = {"image": torch.zeros(1, 3, 16, 16), "mask": torch.zeros(1, 16, 16, dtype=torch.long)}
        >>> sorted(adaptation.loss(source, torch.zeros(1, 3, 16, 16)).losses)
        ['cross_entropy', 'mix_cross_entropy']
    """

    def __init__(
        self,
        student: EarthAdapter,
        *,
        begin: int = 4000,
        weight: float = 0.5,
        most: float = 0.99,
        threshold: float | None = None,
    ) -> None:
        self.student, self.begin, self.weight, self.most, self.threshold = student, begin, weight, most, threshold
        if any(map(is_sharded, student.parameters())):
            wrong = "each process has a part of its weights, and the teacher needs all"
            raise Refused("adapt a sharded model", wrong, "scale.shard=none")
        self.step = 0
        frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.teacher = copy.deepcopy(student, frozen).requires_grad_(False).eval()

    @torch.no_grad()
    def pseudo_labels(self, target: Tensor) -> Pseudo:
        """The teacher's labels of pictures (B, 3, H, W)."""
        scores = self.teacher(target).scores
        probs = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        confidence, labels = probs.max(1)
        return Pseudo(labels=labels, confidence=confidence)

    def mix(
        self, source: Mapping[str, Tensor], target: Tensor, generator: torch.Generator | None = None
    ) -> tuple[dict[str, Tensor], Pseudo]:
        """Classes of the source pasted over the target, as a batch, and what the teacher said about the target."""
        said = self.pseudo_labels(target)
        classes = [half_of_classes(labels, generator) for labels in source["mask"]]
        pasted = chosen_pixels(source["mask"], classes)  # (B, H, W)
        image, mask = paste(source["image"], target, pasted), paste(source["mask"], said.labels, pasted)
        return {"image": image, "mask": mask}, said

    def loss(
        self, source: Mapping[str, Tensor], target: Tensor, generator: torch.Generator | None = None
    ) -> EarthOutput:
        """Loss of a step: of the source, and behind `begin` of the mixed pictures.

        Args:
            source: "image" (B, 3, H, W) and "mask" (B, H, W).
            target: (B, 3, H, W).
            generator: of the choice of classes; the global one when None.
        """
        out: EarthOutput = self.student(**source)
        if self.step <= self.begin:
            return out
        batch, said = self.mix(source, target, generator)
        sure = 1.0 if self.threshold is None else float((said.confidence >= self.threshold).float().mean())
        mixed: EarthOutput = self.student(**batch)
        parts = {f"mix_{name}": self.weight * sure * value for name, value in mixed.losses.items()}
        losses = {**out.losses, **parts}
        return replace(out, loss=torch.stack(list(losses.values())).sum(), losses=losses)

    def after_step(self, step: int) -> None:
        """Lets the teacher follow; call it after each step of the optimiser.

        Args:
            step: number of the step that was done, from 0.
        """
        follow(self.teacher, self.student, step, self.most)
        self.step = step + 1

    def state_dict(self) -> dict[str, Tensor]:
        """The number of the next step and the teacher's own tensors, for a run that goes on later."""
        return {"step": torch.tensor(self.step), **{name: value.detach() for name, value in self._own().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self.step = int(state["step"])
        with torch.no_grad():
            for name, own in self._own().items():
                own.copy_(state[name])

    def _own(self) -> dict[str, Tensor]:
        """What the teacher does not share with the student."""
        shared = {id(p) for p in self.student.parameters()}
        return {f"teacher.{name}": p for name, p in self.teacher.named_parameters() if id(p) not in shared}
