"""The task of the bundled emoji: names for pictures and pictures for names, in every style, of seen and unseen ones."""

from __future__ import annotations

from typing import Any

from train.evaluate import retrieval
from train.tasks import Task, tasks

_DIRECTIONS = {"text_to_image": "T2I", "image_to_text": "I2T"}


@tasks.register("emoji_retrieval")
class EmojiRetrieval(Task):
    """Recall at 1, 5 and 10 in both directions, in every style, among the seen concepts and among the held-out ones.

    Names are "held_out_noto/T2I R@1"; "seen_twemoji_sentence" has the names in a sentence. "R@1" is the mean over both
    directions of seen concepts in the style that is not trained on.
    """

    fields = ("image", "text")

    def measure(self, model: Any, data: Any) -> dict[str, float]:
        """All recalls."""
        emoji, style = data.emoji, data.emoji.held_out_style
        parts = {f"seen_{name}": (name, emoji.seen, "{}") for name in emoji.styles}
        parts |= {f"held_out_{name}": (name, emoji.held_out, "{}") for name in emoji.styles}
        parts |= {f"seen_{style}_sentence": (style, emoji.seen, "a picture of {}")}
        found = {
            f"{part}/{_DIRECTIONS[direction]} {metric}": value
            for part, (name, concepts, template) in parts.items()
            for direction, values in retrieval(model, emoji, name, concepts[: data.limit], template).items()
            for metric, value in values.items()
        }
        part = f"seen_{style}"
        return {"R@1": round((found[f"{part}/T2I R@1"] + found[f"{part}/I2T R@1"]) / 2, 4), **found}
