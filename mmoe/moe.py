"""The mixture-of-experts layer: a router, experts and optional shared expert around one dispatch.

    y = post(sum_k w_k * Expert_k(pre(x))) + shared(x)

Shapes: x (..., D) -> y (..., D); inside, T rows.

The layer hands each `Routing` to whoever listens (`mmoe.trace`), takes side input from its caller or from
`with_context` around a host that calls its MLP with one argument, and lets `mmoe.override` change a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from mmoe import registry
from mmoe.dispatch import Backend, combine, dispatch
from mmoe.errors import BadOverride, did_you_mean, nearest
from mmoe.experts.base import Experts
from mmoe.options import check_choice, check_int
from mmoe.recompute import Around, Calls, in_backward, in_checkpoint
from mmoe.routing import Context, Router, Routing

Override = Callable[[Tensor, Router, Routing], Routing]


class Recorder(Protocol):
    """Something that wants every `Routing` of a layer."""

    def add(self, layer: MoE, routing: Routing) -> None:
        """Takes one routing decision of `layer`."""


class MoE(nn.Module):
    """A drop-in replacement of a feed-forward block.

    Args:
        router: decides; its `num_experts` must be the experts'.
        experts: packed experts.
        shared: module applied to every row and added, or None.
        pre: module applied to the rows before the experts, or None.
        post: module applied to the combined output, or None.

    Example:
        >>> import torch
        >>> from mmoe import FFNExperts, TopKRouter
        >>> moe = MoE(TopKRouter(8, 4), FFNExperts(8, 16, 4))
        >>> moe(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    _recorders: tuple[Recorder, ...] = ()
    _context: Context | None = None
    _override: Override | None = None
    _calls: Calls[Around] | None = None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise BadOverride(
                f"a router over {router.num_experts} experts with {experts.num_experts} experts",
                "both must have the same number",
                f"build the router with num_experts={experts.num_experts}",
            )
        self.router, self.experts = router, experts
        self.shared, self.pre, self.post = shared, pre, post

    def __getstate__(self) -> dict[str, Any]:
        """Without what `trace`, `with_context` and `override` set: a copy or a pickle made inside them is free."""
        transient = ("_recorders", "_context", "_override", "_calls")
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    @property
    def backend(self) -> Backend:
        """How the experts run, "auto" unless set; see `mmoe.dispatch`."""
        return self.experts.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        check_choice("backend", backend, get_args(Backend))
        self.experts.backend = backend

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    @property
    def observed(self) -> bool:
        """Whether `trace`, `with_context` or `override` act on it now, so that its output is not its own alone."""
        return bool(self._recorders) or self._context is not None or self._override is not None

    def route(self, x: Tensor, context: Context | None = None, state: Any = None) -> Routing:
        """Routes rows (T, D) without running experts; listeners hear of it and overrides apply."""
        return self._route(x, context, state, self._override)

    def _route(self, x: Tensor, context: Context | None, state: Any, override: Override | None) -> Routing:
        routing: Routing = self.router(x, context, state)
        if override is not None:
            routing = _checked(override(x, self.router, routing), routing)
        for recorder in self._recorders:
            recorder.add(self, routing)
        return routing

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Tensor:
        """Applies the layer.

        Args:
            x: (..., D).
            context: side input of the router; what `with_context` set when None.
            state: what the router of the layer before handed on.

        Returns:
            (..., D) in the dtype of the experts' output.
        """
        rows = x.reshape(-1, x.shape[-1])  # (T, D)
        around, override = self._around(rows)
        context = context if context is not None else around
        if context is not None:
            context = context.flatten(x.shape[:-1])
        routing = self._route(rows, context, state, override)
        inputs = rows if self.pre is None else self.pre(rows)
        y = self._mix(inputs, routing, x.shape[:-1])  # (T, D)
        if self.post is not None:
            y = self.post(y)
        if self.shared is not None:
            y = y + self.shared(rows)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])  # a view confuses FSDP's hooks

    def _mix(self, inputs: Tensor, routing: Routing, shape: torch.Size) -> Tensor:
        """The weighted sums of what the experts make of the rows (T, D) of an input (*shape, D)."""
        fuses = getattr(self.experts, "fuses", None)  # peft wraps experts in a module that does not have it
        if fuses is not None and fuses(inputs, routing):
            y: Tensor = self.experts(inputs, None, routing)
            return y
        sent = dispatch(routing)
        out = self.experts(inputs[sent.token_idx], sent.counts)  # (N, D)
        return combine(out, sent, len(inputs))

    def _around(self, rows: Tensor) -> Around:
        """What `with_context` and `override` set around this call, or its first run where backward repeats it."""
        around = self._context, self._override
        if torch.compiler.is_compiling():
            return around
        if in_backward():
            return around if self._calls is None else self._calls.find(rows, around)
        if in_checkpoint():
            self._calls = self._calls or Calls(nothing=(None, None))
            self._calls.keep(rows, around)
        return around


def _checked(routing: Any, before: Routing) -> Routing:
    """The routing of an override, which may have left slots unused, or chosen others than were `undropped` or counted.

    Raises:
        BadOverride: it is none.
    """
    if not isinstance(routing, Routing):
        wrong = f"it returned {type(routing).__name__}, not a Routing"
        raise BadOverride("an override that changes nothing", wrong, "return routing")
    if routing.experts is not before.experts and routing.undropped is before.undropped:
        routing = replace(routing, undropped=None)
    if routing.experts is not before.experts and routing.tally is before.tally:
        own = {name: value for name, value in routing.losses.items() if name != "balance"}
        routing = replace(routing, tally=None, losses=own)
    if torch.compiler.is_compiling():  # the values are not known
        return routing
    if bool((routing.experts < 0).any()):
        fix = f"replace(routing, experts=...) with numbers from 0 to {routing.num_experts}"
        raise BadOverride("an override with negative experts", f"{routing.num_experts} marks an unused slot", fix)
    if routing.all_used and not bool((routing.experts < routing.num_experts).all()):
        return replace(routing, all_used=False)
    return routing


def build_moe(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int = 2,
    *,
    router: str | Mapping[str, Any] = "topk",
    experts: str | Mapping[str, Any] = "gated_ffn",
    num_shared_experts: int = 0,
    backend: Backend = "auto",
    **options: Any,
) -> MoE:
    """A layer from names. As it stands it is Qwen3's with `norm_topk_prob` and Mixtral's.

    Args:
        dim: model width D.
        hidden_dim: inner width F of one expert.
        num_experts: E.
        top_k: K, for routers that take it.
        router: name or spec; "topk" is a softmax over all experts, whose best K are renormalised.
        experts: name or spec; "gated_ffn" has SiLU and no biases.
        num_shared_experts: S experts that see every row, as one block of inner width S * F of the same kind.
        backend: how the experts run; see `mmoe.dispatch`.
        options: of the router or of the experts, by name.

    Raises:
        BadOverride: an option that neither takes, or a value that cannot be.
        UnknownName: no such router or experts.

    Example:
        >>> moe = build_moe(8, 16, 4, 2, num_shared_experts=1, score="sigmoid", bias=True)
        >>> [tuple(p.shape) for p in (moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj)]
        [(4, 8), (4, 32, 8), (4, 8, 16)]
    """
    for size, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
        check_int(size, value, 1)
    check_int("num_shared_experts", num_shared_experts, 0)
    specs = registry.parse_spec(router), registry.parse_spec(experts)
    takes = registry.routers.options(specs[0]["name"]), registry.experts.options(specs[1]["name"])
    known = [*takes[0], *takes[1]]
    for name in options:
        if name not in known:
            fix = f"build_moe(..., {(nearest(name, known) or known)[0]}=...)"
            raise BadOverride(f"neither the router nor the experts take {name!r}", did_you_mean(name, known), fix)
    for spec, taken in zip(specs, takes, strict=True):
        own = {name: value for name, value in options.items() if name in taken}
        for name in own.keys() & spec.keys():
            asked = f"{name}={own[name]!r} beside {spec['name']!r} with {name}={spec[name]!r}"
            raise BadOverride(asked, "the option is given twice", f"build_moe(..., {name}={own[name]!r})")
        spec.update(own)
    gate = registry.build_router(specs[0], dim=dim, num_experts=num_experts, top_k=top_k)
    packed = registry.build_experts(specs[1], dim=dim, hidden_dim=hidden_dim, num_experts=num_experts)
    moe = MoE(gate, packed, packed.shared(num_shared_experts) if num_shared_experts else None)
    moe.backend = backend
    return moe


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """MoE layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextmanager
def with_context(model: nn.Module, context: Context | None) -> Iterator[None]:
    """Gives every MoE layer of a host the same side input while the host runs.

    Inside another one, the fields that `context` leaves None stay as they were.

    Example:
        >>> import torch
        >>> from mmoe import FFNExperts, TopKRouter
        >>> host = nn.Sequential(nn.LayerNorm(8), MoE(TopKRouter(8, 4), FFNExperts(8, 16, 4)))
        >>> with with_context(host, Context(valid=torch.ones(2, 5, dtype=torch.bool))):
        ...     y = host(torch.randn(2, 5, 8))
    """
    layers = list(moe_layers(model).values())
    before = [layer._context for layer in layers]
    for layer, outer in zip(layers, before, strict=True):
        layer._context = outer if context is None else context.over(outer)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer._context = old
