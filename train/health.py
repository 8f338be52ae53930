"""Health of the routers while they train: a few numbers per layer, and alarms in plain words.

Alarms look at means over the last logged steps, so that one unlucky batch raises none; each is told once until the
layer is well again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmoe.dispatch import is_sharded
from mmoe.moe import moe_layers
from mmoe.trace import Trace
from train.sections import HealthSection

WINDOW = 5  # logged steps


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """One layer at one step, or its mean over several.

    Attributes:
        load: share of the used slots by expert; sums to 1.
        entropy: of the router's probabilities as a share of that of even ones, 0 (always sure) to 1 (no preference);
            None where it has none.
        drop_rate: share of the chosen slots that were dropped, 0 to 1.
        drift: change of the router's weights since the start, as a share of their norm then.
    """

    load: tuple[float, ...]
    entropy: float | None
    drop_rate: float
    drift: float

    @property
    def violation(self) -> float:
        """Largest load over an even one, minus 1: 0 (even) to E - 1 (one expert has all)."""
        return max(self.load) * len(self.load) - 1

    def dead(self, share: float) -> list[int]:
        """Experts with less than a share of an even load."""
        return [expert for expert, load in enumerate(self.load) if load * len(self.load) < share]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with "violation" and "dead", the experts that got nothing at all."""
        idle = [expert for expert, load in enumerate(self.load) if not load]
        return {**asdict(self), "violation": self.violation, "dead": idle}


class RouterHealth:
    """Watches the routers of a model.

    Args:
        model: with mixtures, or without: then there is nothing to watch.
        section: thresholds.
    """

    def __init__(self, model: nn.Module, section: HealthSection) -> None:
        self.section = section
        self._layers = moe_layers(model)
        self._start = {name: _weights(layer.router) for name, layer in self._layers.items()}
        self._recent: dict[str, deque[LayerHealth]] = {name: deque(maxlen=WINDOW) for name in self._layers}
        self._told: set[tuple[str, str]] = set()

    def measure(self, routing: Trace) -> dict[str, LayerHealth]:
        """The layers that ran in a step."""
        found = {name: self._measure(name, routing.select(name)) for name in routing.layers if name in self._layers}
        for name, health in found.items():
            self._recent[name].append(health)
        return found

    def _measure(self, name: str, runs: Trace) -> LayerHealth:
        counts = torch.stack([run.counts() for run in runs]).sum(0).double()
        chosen = sum(int((run.undropped or run).counts().sum()) for run in runs)
        most = math.log(runs[0].num_experts) if runs[0].num_experts > 1 else 1.0
        known = any(run.probs is not None or run.logits is not None for run in runs)
        now = _weights(self._layers[name].router)
        return LayerHealth(
            load=tuple((counts / counts.sum().clamp(min=1)).tolist()),
            entropy=float(runs.entropy()[0]) / most if known else None,
            drop_rate=1 - float(counts.sum()) / chosen if chosen else 0.0,
            drift=float((now - self._start[name]).norm() / self._start[name].norm().clamp(min=1e-12)),
        )

    def alarms(self) -> list[str]:
        """What is wrong now and was not told before; empty before a window of steps was measured."""
        new = []
        for name, recent in self._recent.items():
            if len(recent) < WINDOW:
                continue
            wrong = self._wrong(_mean(recent))
            new += [f"{name}: {words}" for kind, words in wrong.items() if (name, kind) not in self._told]
            self._told = {told for told in self._told if told[0] != name} | {(name, kind) for kind in wrong}
        return new

    def _wrong(self, health: LayerHealth) -> dict[str, str]:
        """Alarms of one layer by kind."""
        limits, wrong = self.section, dict[str, str]()
        dead = health.dead(limits.dead_share) if limits.dead_share is not None else []
        if dead:
            least = f"less than {limits.dead_share:.1%} of an even load"
            who = f"expert {dead[0]} gets" if len(dead) == 1 else f"experts {', '.join(map(str, dead))} get"
            wrong["dead"] = f"{who} {least}; a larger moe.balance_coef spreads it"
        if limits.max_violation is not None and health.violation > limits.max_violation:
            worst = health.load.index(max(health.load))
            times = f"{health.violation + 1:.1f} times an even load"
            wrong["violation"] = f"expert {worst} gets {times}; a larger moe.balance_coef spreads it"
        if limits.min_entropy is not None and health.entropy is not None and health.entropy < limits.min_entropy:
            share = f"{health.entropy:.1%} of the largest entropy"
            wrong["entropy"] = f"the router is sure of every token, {share}; moe.z_coef or a lower optim.lr softens it"
        if limits.max_drop is not None and health.drop_rate > limits.max_drop:
            wrong["drop"] = f"{health.drop_rate:.0%} of the slots are dropped; a larger capacity_factor keeps them"
        if limits.max_drift is not None and health.drift > limits.max_drift:
            wrong["drift"] = f"the router moved by {health.drift:.0%} of its weights; a lower optim.lr keeps it nearer"
        return wrong

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        recent = {name: [asdict(one) for one in found] for name, found in self._recent.items()}
        return {"start": self._start, "recent": recent, "told": sorted(map(list, self._told))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._start = dict(state["start"])
        for name, found in state["recent"].items():
            self._recent[name] = deque((LayerHealth(**one) for one in found), maxlen=WINDOW)
        self._told = {(name, kind) for name, kind in state["told"]}


def _mean(recent: deque[LayerHealth]) -> LayerHealth:
    count = len(recent)
    entropies = [one.entropy for one in recent if one.entropy is not None]
    return LayerHealth(
        load=tuple(sum(shares) / count for shares in zip(*(one.load for one in recent), strict=True)),
        entropy=sum(entropies) / len(entropies) if entropies else None,
        drop_rate=sum(one.drop_rate for one in recent) / count,
        drift=recent[-1].drift,
    )


def _weights(router: nn.Module) -> Tensor:
    """All parameters of a router in one vector, on the CPU; of a sharded one in every process."""
    found = []
    for value in router.parameters():
        whole: Any = value.detach()
        whole = whole.full_tensor() if is_sharded(whole) else whole
        found.append(whole.float().flatten().cpu())
    return torch.cat(found) if found else torch.zeros(1)
