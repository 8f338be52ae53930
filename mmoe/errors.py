"""Errors for users: each says what was asked, what is wrong and one line that works.

The message is three short lines, for the command line and for a traceback alike:

    no model named 'clip_moe_l4'
      did you mean: clip_moe_vit_l14, clip_moe_tiny
      try: mmoe list 'clip_moe*'

This module imports only the standard library, so that any other module and any start-up path may use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = [
    "BadInput",
    "BadOverride",
    "CorruptFile",
    "LoadMismatch",
    "MissingExtra",
    "MmoeError",
    "Offline",
    "Refused",
    "UnknownModel",
    "UnknownName",
    "UnknownVerb",
    "UnknownWeights",
    "did_you_mean",
    "nearest",
]


class MmoeError(Exception):
    """Base of every error a user can cause. The command line prints it without a traceback.

    Args:
        asked: what was asked for, said as what failed: "no model named 'x'", "cannot read 'cat.png'".
        wrong: why not. May have several lines.
        fix: one command or line of code that works.

    >>> print(MmoeError("cannot read 'cat.png'", "no such file", "mmoe predict clip_moe_tiny PATH/TO/cat.png"))
    cannot read 'cat.png'
      no such file
      try: mmoe predict clip_moe_tiny PATH/TO/cat.png
    """

    def __init__(self, asked: str, wrong: str, fix: str) -> None:
        super().__init__(asked, wrong, fix)
        self.asked = _shorten(asked)
        self.wrong = wrong
        self.fix = _shorten(fix)

    def __str__(self) -> str:
        fix = f"try: {self.fix}" if self.fix else ""
        rest = [line for part in (self.wrong, fix) for line in part.splitlines()]
        return "\n  ".join([self.asked, *rest])

    def as_dict(self) -> dict[str, str]:
        """Plain data, as `--json` prints it.

        >>> UnknownModel("no model named 'x'", "known: y", "mmoe list").as_dict()["type"]
        'UnknownModel'
        """
        return {
            "type": type(self).__name__,
            "asked": self.asked,
            "wrong": self.wrong,
            "fix": self.fix,
            "message": str(self),
        }


class UnknownName(MmoeError):
    """A name that is not registered. Its second line comes from `did_you_mean`."""


class UnknownModel(UnknownName):
    """No card has this model name."""


class UnknownWeights(UnknownName):
    """The model has no weights with this tag."""


class UnknownVerb(UnknownName):
    """The `mmoe` command has no such verb."""


class BadOverride(MmoeError):
    """An option that the thing being built does not have, or a value that it does not take."""


class MissingExtra(MmoeError):
    """A package that this one step needs is not installed. Raised when it is needed, never at import."""


class LoadMismatch(MmoeError):
    """Weights that do not fit the model: keys missing, unexpected or of another shape."""


class BadInput(MmoeError):
    """An input that cannot be used: a missing file, a broken picture, a wrong shape."""


class CorruptFile(MmoeError):
    """A weights or data file that cannot be read or has the wrong checksum."""


class Offline(MmoeError):
    """A file has to be downloaded and there is no network."""


class Refused(MmoeError):
    """An operation that is not possible on this model, with the reason and what is."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` choices that `name` may have been meant to be, best first.

    Case, `-` and `_` make no difference; a choice that starts with or contains the name counts as near.

    >>> nearest("clip_moe_l4", ["earth_adapter_tiny", "clip_moe_tiny", "clip_moe_vit_l14"])
    ['clip_moe_vit_l14', 'clip_moe_tiny']
    >>> nearest("TOPK", ["top_k", "top_p"])
    ['top_k', 'top_p']
    >>> nearest("clip", ["uni_moe_tiny", "clip_moe_tiny"])
    ['clip_moe_tiny']
    >>> nearest("zzz", ["top_k", "top_p"])
    []
    """
    scored = [(_nearness(_fold(name), _fold(choice)), choice) for choice in dict.fromkeys(choices)]
    near = sorted((pair for pair in scored if pair[0] >= 0.6), key=lambda pair: (-pair[0], pair[1]))
    return [choice for _, choice in near[:n]]


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The second line of an `UnknownName`: near names, or else what is known.

    >>> did_you_mean("topk", ["top_k", "top_p", "soft"])
    'did you mean: top_k, top_p'
    >>> did_you_mean("zzz", ["top_k", "soft"])
    'known: soft, top_k'
    """
    known = sorted(set(choices))
    near = nearest(name, known)
    if near:
        return f"did you mean: {', '.join(near)}"
    if not known:
        return "none are known"
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f"known: {', '.join(known[:8])}{more}"


def package_of(module: str) -> str:
    """What pip calls the package of a module.

    >>> package_of("yaml.loader"), package_of("timm")
    ('pyyaml', 'timm')
    """
    name = module.partition(".")[0]
    others = {"open_clip": "open_clip_torch", "sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}
    return others.get(name, name)


def _shorten(text: str, most: int = 240) -> str:
    """Leaves the middle out of a text that quotes a very long input."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")


def _nearness(name: str, choice: str) -> float:
    """1 for the same name, at least .9 for a prefix and .75 for a part of it, else difflib's ratio."""
    if not name or not choice:
        return 0.0
    ratio = SequenceMatcher(None, name, choice).ratio()
    if len(name) < 2 or name == choice:
        return ratio
    if choice.startswith(name):
        return max(ratio, 0.9)
    if name in choice or (len(choice) > 2 and choice in name):
        return max(ratio, 0.75)
    return ratio
