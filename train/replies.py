"""Tasks of models that reply in words: names of what is seen or heard, and how well replies are foreseen.

A model answers with `predict(text=None, image=..., sound=..., ...)`, where no text asks its usual question about what
is given, and tells how likely replies are with `reply_likelihoods`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from mmoe.errors import BadInput, Refused
from mmoe.options import check_int
from train.data.base import DataSet, Sample
from train.evaluate import Task, same_words, tasks

SIZE = 64  # samples in memory at a time
MEDIA = ("image", "video", "audio", "speech", "sound")


def asked(sample: Sample) -> dict[str, Any]:
    """What of a sample a model is shown: its media, and its question or the turns before the last one."""
    given = {name: sample[name] for name in MEDIA if sample.get(name) is not None}
    if "turns" in sample:
        return {**given, "text": list(sample["turns"][:-1])}
    return {**given, "text": sample["question"]} if "question" in sample else given


class _Replies(Task):
    """Tasks of models that tell how likely a reply is."""

    of_model = "chat"

    def check(self, model: Any, data: DataSet, option: str = "--on") -> None:
        """It has to tell likelihoods."""
        super().check(model, data, option)
        if not hasattr(model, "reply_likelihoods"):
            wrong = f"a {type(model).__name__} tells no likelihoods of replies"
            raise Refused(f"measure {tasks.name_of(self)}", wrong, "mmoe list --task chat")


@tasks.register("naming")
class Naming(_Replies):
    """Names of pictures or sounds: the right one among several by likelihood, and the one that is written.

    "choice" is the share of samples whose name is the likeliest of `choices` names, the others drawn among those of the
    same group; "exact match" that of replies that are the name to the letter, but for case and punctuation around.

    Args:
        choices: names to choose from, the right one among them; all where the data has fewer.
        seed: of which names are drawn.
    """

    fields = ("text",)

    def __init__(self, *, choices: int = 20, seed: int = 0) -> None:
        check_int("choices", choices, 2)
        self.choices, self.seed = choices, seed

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Shares of all samples, or as "GROUP/METRIC" of each group where data are not pooled; chance beside them."""
        names: dict[str, list[str]] = {}
        found: dict[str, list[tuple[float, bool, bool]]] = {}
        for first in range(0, len(data), SIZE):
            for _, sample in data.readable(range(first, min(first + SIZE, len(data)))):
                names.setdefault(sample.get("group", ""), []).append(sample["text"])
        for numbered in self.numbered(data, 1):
            ((index, sample),) = numbered
            group = sample.get("group", "")
            answer = self._answer(model, sample, sorted(set(names[group])), random.Random(f"{self.seed} {index}"))
            parts = ([""] if data.pooled or not group else []) + ([group] if group else [])
            for part in parts:
                found.setdefault(part, []).append(answer)
        told: dict[str, float] = {}
        for part, answers in found.items():
            chances, right, written = (sum(values) / len(answers) for values in zip(*answers, strict=True))
            metrics = {"choice": right, "exact match": written, "chance": chances}
            told |= {f"{part}/{name}" if part else name: round(value, 4) for name, value in metrics.items()}
        return told

    def _answer(
        self, model: Any, sample: Sample, names: Sequence[str], draw: random.Random
    ) -> tuple[float, bool, bool]:
        """Chance, whether the right name is the likeliest, and whether it is written."""
        others = [name for name in names if name != sample["text"]]
        if not others:
            raise BadInput("choose among names", "all samples have one name", "data with several")
        listed = [sample["text"], *draw.sample(others, min(self.choices - 1, len(others)))]
        likelihoods, _ = model.reply_likelihoods(listed, **asked(sample))
        if not bool(likelihoods.isfinite().all()):
            wrong = "some likelihoods are no numbers"
            raise BadInput("choose among names", wrong, "a model whose training did not diverge")
        right = bool(likelihoods[0] > likelihoods[1:].max())
        return 1 / len(listed), right, same_words(str(model.predict(**asked(sample))), sample["text"])


@tasks.register("perplexity")
class Perplexity(_Replies):
    """Perplexity of replies: exp of the mean negative log-likelihood of a token, the end of the reply included."""

    fields = ("turns",)

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Over all tokens of the last turn of every conversation."""
        total, count = 0.0, 0
        for (sample,) in self.batches(data, 1):
            likelihoods, tokens = model.reply_likelihoods([sample["turns"][-1]], **asked(sample))
            total, count = total - float(likelihoods[0]), count + int(tokens[0])
        return {"perplexity": round(math.exp(min(total / count, 700.0)), 4)}


@tasks.register("parts")
class Parts(Task):
    """Every part of a mixture by the task of its data, as "PART/METRIC".

    Args:
        options: of the tasks, by the name of the part.
    """

    fields = ("part",)

    def __init__(self, *, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.options = dict(options or {})

    def check(self, model: Any, data: DataSet, option: str = "--on") -> None:
        """As the tasks of the parts do."""
        for task, part in self._tasks(data).values():
            task.check(model, part, option)

    def measure(self, model: Any, data: DataSet) -> dict[str, float]:
        """Metrics of all parts that have samples."""
        found: dict[str, float] = {}
        for name, (task, part) in self._tasks(data).items():
            task.progress = self.progress
            if len(part):
                found |= {f"{name}/{metric}": value for metric, value in task.measure(model, part).items()}
        return found

    def _tasks(self, data: DataSet) -> dict[str, tuple[Task, DataSet]]:
        parts: Mapping[str, DataSet] | None = getattr(data, "parts", None)
        if parts is None:
            raise BadInput("measure parts of data", "the data is no mixture", "data.task=null")
        return {
            name: (tasks.build({"name": one.task, **self.options.get(name, {})}), one) for name, one in parts.items()
        }
