"""The zoo: models by name, with cards, weights and conversion. `import zoo` loads neither torch nor a backbone library.

>>> import zoo
>>> zoo.card("clip_moe_tiny").family
'clip_moe'
>>> [card.name for card in zoo.list_models("clip_moe_t*")]
['clip_moe_tiny']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.card import Card
from zoo.registry import card, list_models

if TYPE_CHECKING:
    from zoo.loading import load
    from zoo.model import Model
    from zoo.state import LoadReport

__all__ = ["Card", "LoadReport", "Model", "card", "list_models", "load"]

_HOME = {"load": "zoo.loading", "Model": "zoo.model", "LoadReport": "zoo.state"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
