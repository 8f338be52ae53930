"""Finds cards by name and by filters, without torch."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from mmoe.errors import UnknownModel, did_you_mean, nearest
from mmoe.options import check_choice
from zoo.card import Card, read_cards


@cache
def _cards() -> dict[str, Card]:
    files = sorted(Path(__file__).parent.glob("*/card.yaml"))
    return {card.name: card for file in files for card in read_cards(file)}


def list_models(
    pattern: str = "*",
    *,
    task: str | None = None,
    modality: str | None = None,
    family: str | None = None,
    license: str | None = None,
    weights: str | None = None,
) -> list[Card]:
    """Cards that match all given filters, sorted by name.

    Args:
        pattern: shell pattern on the name.
        task: a task that the model can do.
        modality: a modality that the model takes.
        family: family name.
        license: shell pattern on the licences of our code and of all weights, or "commercial" for models none of whose
            parts forbids commercial use or has an unknown licence.
        weights: "bundled" for models that come with weights, "any" for models with weights from anywhere.

    Raises:
        BadOverride: `weights` is neither.

    >>> all(card.bundled for card in list_models(weights="bundled"))
    True
    """
    if weights is not None:
        check_choice("weights", weights, ("bundled", "any"))
    cards = (card for _, card in sorted(_cards().items()))
    return [
        card
        for card in cards
        if fnmatchcase(card.name, pattern)
        and (task is None or task in card.tasks)
        and (modality is None or modality in card.modalities)
        and (family is None or family == card.family)
        and (license is None or _has_licence(card, license))
        and (weights is None or (card.bundled if weights == "bundled" else bool(card.weights)))
    ]


def _has_licence(card: Card, wanted: str) -> bool:
    parts = [card.licence, *(weights.licence for weights in card.weights.values())]
    if wanted != "commercial":
        return all(fnmatchcase(part.lower(), wanted.lower()) for part in parts)
    parts += [component["licence"] for component in card.components]
    return not any("-NC" in part.upper() or part == "unknown" for part in parts)


def model_folder(name: str) -> Path | None:
    """The folder that a name means, or None: the name of a card means the card.

    >>> model_folder("clip_moe_tiny") is None
    True
    """
    folder = os.path.expanduser(name)
    return Path(folder) if name not in _cards() and os.path.isdir(folder) else None


def list_parts(kind: str) -> list[dict[str, str]]:
    """Name, first line of the docstring and properties of every registered router or expert.

    Args:
        kind: "routers" or "experts".
    """
    from mmoe import registry

    found = []
    names = registry.routers if kind == "routers" else registry.experts
    for name in names.names():
        cls: Any = names.get(name)
        flags = {"trainable": "trainable", "causal_safe": "causal-safe", "batch_dependent": "batch-dependent"}
        properties = [word for flag, word in flags.items() if getattr(cls, flag, False)]
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        found.append({"name": name, "summary": summary, "properties": ", ".join(properties)})
    return found


def card(name: str) -> Card:
    """The card of a model; a name may carry a weights tag ("clip_moe_tiny.emoji").

    Raises:
        UnknownModel: no card has this name; the message names the nearest ones.

    >>> card("clip_moe_vit_l14").params["total"]
    1202429441
    """
    name, cards = str(name), _cards()
    found = cards.get(name) or cards.get(name.partition(".")[0])
    if found is not None:
        return found
    if name.startswith(("/", ".", "~")):
        wrong = "it is a file" if os.path.isfile(os.path.expanduser(name)) else "there is no such folder"
        raise UnknownModel(f"no model folder {name!r}", wrong, "mmoe list")
    if "/" in name:
        raise UnknownModel(
            f"no model named {name!r}",
            "it looks like a hub repository or a folder that is not there",
            f"zoo.load('hf-hub:{name}')",
        )
    near = nearest(name, cards)
    fix = f"mmoe list '{near[0].split('_')[0]}*'" if near else "mmoe list"
    raise UnknownModel(f"no model named {name!r}", did_you_mean(name, cards), fix)
