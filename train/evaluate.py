"""What models are measured by: tasks with the standard metrics of their fields.

A task takes the samples of a data set, asks the model, and scores what it says. Models answer in their own terms:
`encode_image` and `encode_text` for retrieval and zero-shot classification, `predict` for everything else.
Shapes: n samples, C embedding.
"""

from __future__ import annotations

import inspect
import shlex
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmoe.errors import BadInput, Refused, did_you_mean
from mmoe.registry import Registry
from train.data.base import DataSet, Sample, data_sets
from train.progress import Progress
from train.recall import recalls

PROBES = 4  # samples that show which metrics a task has

tasks = Registry("task", "train.tasks", "data.task=retrieval")


class Task(ABC):
    """One way to measure a model.

    Attributes:
        fields: that a sample of the data has to have.
        of_model: the task that a model's card has to name; empty where any model may try.
        progress: shows a bar.
    """

    fields: ClassVar[tuple[str, ...]]
    of_model: ClassVar[str] = ""
    progress: bool = False

    def check(self, model: Any, data: DataSet, option: str = "--on") -> None:
        """Makes sure that a model does what is measured; weights are not looked at.

        Args:
            model: that is measured.
            data: of its classes.
            option: how data are chosen, "data.name" or "--on".

        Raises:
            Refused: its card says that it does something else. BadInput: it and the data have other classes.
        """
        card = getattr(model, "card", None)
        if self.of_model and card is not None and self.of_model not in card.tasks:
            asked = f"measure {tasks.name_of(self)} of {card.name}"
            wrong = f"it does {', '.join(card.tasks)}; data {data_sets.name_of(data)!r} is for other models"
            raise Refused(asked, wrong, suggested_data(card.tasks, option))

    @abstractmethod
    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Metrics by name, of all samples that can be read.

        Args:
            model: in eval mode.
            data: samples.
        """

    def about(self, part: str) -> str:
        """In words what is measured as "PART/METRIC"."""
        return part

    def batches(self, data: DataSet, size: int = 64) -> Iterator[list[Sample]]:
        """Samples in their order, so many in memory at a time.

        Raises:
            BadInput: none can be read, or more are broken than may be.
        """
        for numbered in self.numbered(data, size):
            yield [sample for _, sample in numbered]

    def numbered(self, data: DataSet, size: int = 64) -> Iterator[list[tuple[int, Sample]]]:
        """As `batches`, with the number of each sample in the data."""
        found = 0
        with Progress("evaluating", len(data), unit="samples", quiet=not self.progress) as bar:
            for first in range(0, len(data), size):
                last = min(first + size, len(data))
                samples = data.readable(range(first, last))
                found += len(samples)
                if samples:
                    yield samples
                bar.update(last)
        if not found:
            raise BadInput("measure a model", "the data has no samples to evaluate on", "data.held_out=0.1")


def suggested_data(of_model: Sequence[str], option: str = "--on") -> str:
    """Data that models of some tasks are measured on, as a suggestion for "--on" or "data.name"."""
    found = []
    for name in data_sets.names():
        kind: Any = data_sets.get(name)
        task: Any = tasks.get(kind.task)
        if task.of_model in of_model:
            if option == "--on":
                found.append(f"--on {name}{':FOLDER' if kind.needs_path else ''}")
            else:
                found.append(f"{option}={name} data.path={'FOLDER' if kind.needs_path else 'null'}")
    return " or ".join(found) or "mmoe recipe data"


def check_metric(name: str, task: Task, model: Any, data: DataSet) -> None:
    """Makes sure that a task has the metric whose best checkpoint is kept.

    Args:
        name: of the metric; with a minus in front less is better.
        task: that measures.
        model: in eval mode.
        data: a few samples.

    Raises:
        BadInput: it has not, or there is nothing to measure on.
    """
    asked, plain = f"keep the model with the best {name!r}", name.removeprefix("-")
    if not len(data):
        raise BadInput(asked, "data.held_out is 0: nothing is measured", "run.best=null")
    with torch.no_grad(), torch.random.fork_rng():
        metrics = task.measure(model, data)
    if plain not in metrics:
        first = min(metrics, key=lambda metric: ("/" in metric, " " in metric))  # of all samples, and plain
        sign = "-" if first.rpartition("/")[2] in ("WER", "CER", "perplexity") else ""
        raise BadInput(asked, did_you_mean(plain, metrics), shlex.quote(f"run.best={sign}{first}"))


def check_fields(task: Task, data: DataSet, option: str) -> None:
    """Makes sure that samples have what a task measures by.

    Args:
        task: that measures.
        data: samples.
        option: how a task is chosen, "data.task" or "--task".

    Raises:
        BadInput: they have not.
    """
    missing = [field for field in task.fields if field not in data.fields]
    if missing:
        asked = f"measure {tasks.name_of(task)} on the data {data_sets.name_of(data)!r}"
        fix = f"{option}{' ' if option.startswith('-') else '='}{data.task}"
        raise BadInput(asked, f"its samples have no {' and no '.join(missing)}", fix)


@torch.no_grad()
def features(model: Any, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None) -> Tensor:
    """Normalised features of pictures or of texts, (n, C).

    Raises:
        Refused: the model compares no pictures with texts.
    """
    name = "encode_image" if images is not None else "encode_text"
    if not hasattr(model, name):
        wrong = f"it has no {name}"
        raise Refused(f"compare pictures with texts by {type(model).__name__}", wrong, "mmoe list --task retrieval")
    given = {"images": images} if images is not None else {"texts": texts}
    (batch,) = model.preprocess(**given).values()
    found: Tensor = getattr(model, name)(batch, normalize=True)
    return found.float().cpu()


@tasks.register("retrieval")
class Retrieval(Task):
    """Recall at 1, 5 and 10 of texts for pictures (I2T) and of pictures for texts (T2I), among all samples.

    Samples of one name share a picture: it stands once in the gallery, and any of its texts is right for it.
    """

    fields = ("image", "text")
    of_model = "retrieval"

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """R@K in both directions, and their mean at 1."""
        images, texts, owners = dict[str, Tensor](), list[Tensor](), list[str]()
        for numbered in self.numbered(data):
            named = [(data.name(index), sample) for index, sample in numbered]
            new = {name: sample["image"] for name, sample in named if name not in images}
            if new:
                images |= dict(zip(new, features(model, images=list(new.values())), strict=True))
            texts.append(features(model, texts=[sample["text"] for _, sample in numbered]))
            owners += [name for name, _ in named]
        place = {name: number for number, name in enumerate(images)}
        own = torch.tensor([place[name] for name in owners])
        return recalls(torch.cat(texts) @ torch.stack(list(images.values())).t(), own)


@tasks.register("zero_shot")
class ZeroShot(Task):
    """Share of pictures whose class is the most similar text, or among the five most similar ones.

    Args:
        template: sentence around the name of a class.
    """

    fields = ("image", "label")
    of_model = "zero-shot-classification"

    def __init__(self, *, template: str = "a picture of a {}") -> None:
        self.template = template

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Accuracies."""
        from sklearn.metrics import top_k_accuracy_score

        classes: Sequence[str] = data.classes  # type: ignore[attr-defined]  # data with labels have them
        if len(classes) < 2:
            raise BadInput("tell classes apart", f"the data has {len(classes)}", "a folder for each class")
        texts = features(model, texts=[self.template.format(name.replace("_", " ")) for name in classes])
        labels, similarities = [], []
        for samples in self.batches(data):
            labels += [sample["label"] for sample in samples]
            similarities.append(features(model, images=[sample["image"] for sample in samples]) @ texts.t())
        scores = torch.cat(similarities).numpy()
        if not np.isfinite(scores).all():
            raise BadInput("tell classes apart", "some similarities are no numbers", "a model that did not diverge")
        if len(classes) == 2:
            scores = scores[:, 1] - scores[:, 0]
        found = {}
        for k in (1, 5):
            if k == 1 or k < len(classes):
                value = top_k_accuracy_score(labels, scores, k=k, labels=range(len(classes)))
                found[f"top-{k} accuracy"] = round(float(value), 4)
        return found


class _Answers(Task):
    """Tasks that compare what `predict` says with what is right, sample by sample."""

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Metrics of all answers, and as "GROUP/METRIC" of those of each group where samples have one.

        Of data that are not to be pooled each group is told alone.
        """
        pairs: dict[str, list[tuple[Any, Any]]] = {}
        for (sample,) in self.batches(data, 1):
            found, group = self.answers(model, sample), sample.get("group")
            parts = ([""] if data.pooled or group is None else []) + ([] if group is None else [f"{group}/"])
            for part in parts:
                pairs.setdefault(part, []).extend(found)
        return {
            f"{group}{name}": round(float(value), 4)
            for group, answers in pairs.items()
            for name, value in self.score(*zip(*answers, strict=True)).items()
        }

    def answers(self, model: Any, sample: Sample) -> list[tuple[Any, Any]]:
        """(what the model says, what is right): of the last field from those before it."""
        *asked, wanted = self.fields
        return [(model.predict(**{name: sample[name] for name in asked}), sample[wanted])]

    @abstractmethod
    def score(self, said: Sequence[Any], given: Sequence[Any]) -> dict[str, float]:
        """Metrics by name."""


@tasks.register("quality")
class Quality(Task):
    """Rank (SRCC) and linear (PLCC) correlation of predicted scores with opinions, PLCC after a logistic curve too.

    Where photographs are distorted at several levels, "monotone" is the share of such series whose scores never rise.
    All are told of all samples, and as "blur/SRCC" of each group, "jpeg/SRCC" of each kind of distortion, where samples
    have them; "SRCC human" is that with the part of pseudo-labels that people gave, "SRCC metrics" that with what
    metrics alone say. Models answer several pictures at once with `scores`; those that ask for scenes are told those of
    the samples, "auto" where one has none that the model knows.
    """

    fields = ("image", "score")
    of_model = "quality"

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Correlations, -1 to 1; 0 where all answers are the same."""
        from train.quality_groups import agreement_by_group

        said, given = list[float](), list[Sample]()
        for samples in self.batches(data):
            told = model.predict([sample["image"] for sample in samples], **self._asked(model, samples))
            said += told.scores
            given += [{name: value for name, value in sample.items() if name != "image"} for sample in samples]
        return agreement_by_group(said, given)

    @staticmethod
    def _asked(model: Any, samples: Sequence[Sample]) -> dict[str, Any]:
        if "scene" not in inspect.signature(model.predict).parameters:
            return {}
        known, scenes = getattr(model, "scenes", None), [sample.get("scene") for sample in samples]
        return {"scene": [scene if scene and (known is None or scene in known) else "auto" for scene in scenes]}


@tasks.register("segmentation")
class Segmentation(_Answers):
    """Mean over classes of intersection over union (mIoU), and share of right pixels; 255 counts nothing."""

    fields = ("image", "mask")
    of_model = "segmentation"

    def check(self, model: Any, data: DataSet, option: str = "--on") -> None:
        """The classes of the data are those of the model, where both have names."""
        super().check(model, data, option)
        own, given = (list(getattr(one, "classes", None) or ()) for one in (getattr(model, "config", None), data))
        if own and given and own != given:
            wrong = f"the model knows {', '.join(own)}; the data has {', '.join(given)}"
            fix = "data with the model's classes (--option, data.options), or model.overrides.classes=[...]"
            raise BadInput("compare masks of other classes", wrong, fix)

    def answers(self, model: Any, sample: Sample) -> list[tuple[Any, Any]]:
        """The mask that the model draws, and the right one."""
        ((drawn, right),) = super().answers(model, sample)
        drawn, right = np.asarray(drawn), np.asarray(right)
        if drawn.shape != right.shape:
            wrong = f"the mask has {right.shape}, the model draws {drawn.shape}"
            raise BadInput("compare masks of different sizes", wrong, "a mask of the size of its picture")
        return [(drawn, right)]

    def score(self, said: Sequence[Any], given: Sequence[Any]) -> dict[str, float]:
        """Over all pixels of all pictures."""
        predicted, masks = (np.concatenate([one.ravel() for one in part]) for part in (said, given))
        if (masks == 255).all():
            raise BadInput("compare masks", "every pixel is 255, which is left out", "masks with numbers of classes")
        return overlap(predicted[masks != 255], masks[masks != 255])


def overlap(predicted: np.ndarray, given: np.ndarray) -> dict[str, float]:
    """mIoU over the classes that occur on either side, and accuracy.

    >>> overlap(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    {'mIoU': 0.5833, 'accuracy': 0.75}
    """
    from sklearn.metrics import accuracy_score, jaccard_score

    base = 1 + int(predicted.max())
    counts = np.bincount(given.astype(np.int64) * base + predicted)  # millions of pixels are few kinds of pairs
    kinds = counts.nonzero()[0]
    pairs, weights = np.divmod(kinds, base), {"sample_weight": counts[kinds]}
    found = jaccard_score(*pairs, average="macro", zero_division=0, **weights), accuracy_score(*pairs, **weights)
    return dict(zip(("mIoU", "accuracy"), (round(float(value), 4) for value in found), strict=True))


@tasks.register("transcription")
class Transcription(_Answers):
    """Errors per word (WER) and per character (CER) of transcripts, in small letters without punctuation."""

    fields = ("audio", "text")

    def score(self, said: Sequence[Any], given: Sequence[Any]) -> dict[str, float]:
        """Over all words and characters; may exceed 1."""
        import jiwer

        texts = [_plain(one) for one in given], [_plain(str(one)) for one in said]
        return {"WER": jiwer.wer(*texts), "CER": jiwer.cer(*texts)}


@tasks.register("exact_match")
class ExactMatch(_Answers):
    """Share of the questions whose answer is right to the letter, but for case, punctuation and spaces."""

    fields = ("image", "turns")

    def answers(self, model: Any, sample: Sample) -> list[tuple[Any, Any]]:
        """Of all questions; those before one are part of it with their right answers."""
        turns, image = sample["turns"], {"image": sample["image"]} if "image" in sample else {}
        return [
            (model.predict(text=list(turns[: number + 1]), **image), turns[number + 1])
            for number in range(0, len(turns), 2)
        ]

    def score(self, said: Sequence[Any], given: Sequence[Any]) -> dict[str, float]:
        """Of all questions of all samples."""
        right = [same_words(str(one), other) for one, other in zip(said, given, strict=True)]
        return {"exact match": sum(right) / len(right)}


def same_words(said: str, given: str) -> bool:
    """Alike but for case, spaces, and punctuation around."""

    def bare(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?\"'")

    return bare(said) == bare(given) and bool(said.strip()) == bool(given.strip())


def _plain(text: str) -> str:
    """Small letters, digits and the marks on them, with a space between words; apostrophes join theirs."""
    text = unicodedata.normalize("NFC", text.casefold().replace("’", "'")).replace("'", "")
    kept = "".join(sign if unicodedata.category(sign)[0] in "LNM" else " " for sign in text)
    return " ".join(kept.split())
