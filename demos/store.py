"""Models in memory: loaded on first use, at most two at a time, one job at a time."""

from __future__ import annotations

import gc
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zoo
from mmoe.errors import BadInput, Refused

if TYPE_CHECKING:
    from zoo.model import Model

Note = Callable[[str, float], None]


def quiet(text: str, share: float) -> None:
    """A progress note that nobody reads."""


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        model: the model.
        derived: what was computed from the model alone (never from a visitor's input) and is worth keeping.
    """

    model: Model
    derived: dict[Any, Any] = field(default_factory=dict)

    def megabytes(self) -> float:
        """Size of the parameters and of what was derived from them."""
        tensors = [*self.model.parameters(), *(v for v in list(self.derived.values()) if hasattr(v, "nbytes"))]
        return sum(tensor.nbytes for tensor in tensors) / 1e6


class ModelStore:
    """Hands out models one job at a time, and drops the one that was not used for longest when there are too many.

    Tracing and overrides change a model while they run, so two jobs never share it.

    Args:
        capacity: models in memory.
        allow_download: False refuses to fetch weights from the network, for a gallery that others can reach.
    """

    def __init__(self, capacity: int = 2, *, allow_download: bool = True) -> None:
        self.capacity = capacity
        self.allow_download = allow_download
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.RLock()

    @contextmanager
    def use(self, name: str, note: Note = quiet, *, fetch: bool = False) -> Iterator[Loaded]:
        """The model for one job, loaded when it has to be.

        Args:
            name: of the model.
            note: told what takes time.
            fetch: weights that are not bundled may be fetched.

        Raises:
            BadInput: there is no name. Refused: the weights are not here and may not be fetched. MmoeError: loading
                failed.
        """
        if not name:
            raise BadInput("there is no model", "none is chosen in the list of models", "clip_moe_tiny")
        with self._lock:
            if name not in self._loaded:
                self._load(name, note, fetch)
            self._loaded.move_to_end(name)
            yield self._loaded[name]

    def _load(self, name: str, note: Note, fetch: bool) -> None:
        card = zoo.card(name)
        if not card.weights:
            wrong = "its card lists none, so there is nothing to try; the tab Card tells about it"
            raise Refused(f"{name} has no weights", wrong, "choose a bundled model in the list")
        if card.weights and not card.bundled:
            weights = card.find_weights()[1]
            source = f"{weights.source}\n{weights.note}".strip()
            if not self.allow_download:
                raise Refused(
                    f"{name} is not on this machine",
                    f"a public gallery fetches no weights; these would come from {source}",
                    "mmoe demo   (on your own machine)",
                )
            if not fetch:
                raise Refused(
                    f"{name} is not loaded",
                    f"its weights are not bundled, they come from {source}",
                    'press "Fetch and load" under the list of models',
                )
            note(f"Fetching {name}", 0.0)
            from zoo.weights import locate

            locate(weights.source, weights.sha256)  # before the model is built, which may take gigabytes
        while len(self._loaded) >= self.capacity:
            self._drop(next(iter(self._loaded)))
        note(f"Loading {name}, only the first time", 0.1)
        self._loaded[name] = Loaded(zoo.load(name))

    def unload(self, name: str) -> bool:
        """Frees a model's memory; False when it was not loaded."""
        with self._lock:
            return name in self._loaded and self._drop(name)

    def _drop(self, name: str) -> bool:
        del self._loaded[name]
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()
        return True

    def sizes(self) -> dict[str, float]:
        """Megabytes of each model in memory, the one used last at the end."""
        return {name: loaded.megabytes() for name, loaded in list(self._loaded.items())}
