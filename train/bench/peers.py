"""Who takes part in `mmoe bench layer`: a dense layer as the limit, our layer, and others with the same weights.

All mixtures compute y = sum_k w_k * down_k(silu(gate_k x) * up_k x) with softmax weights of the best K, renormalised
(Mixtral, Qwen3-MoE with `norm_topk_prob`), from the same parameters. Shapes: T rows, D width, F inner width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmoe
from mmoe.dispatch import Backend, combine

Layer = Callable[[Tensor], Tensor]
LIMIT, OURS, THEIRS, NAIVE = "dense", "mmoe", "transformers", "plain loop"
TORCHTITAN = "torchtitan experts"  # takes part where it is installed
PRODUCTS = "products alone"
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
MOST_BYTES = 4e9  # of the weights that batched_mm copies for every slot


@dataclass(frozen=True)
class Cell:
    """One size of the layer.

    Attributes:
        rows: T.
        dim: D.
        hidden_dim: F of one expert.
        num_experts: E.
        top_k: K.
    """

    rows: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.rows}, {self.dim}, {self.hidden_dim}, {self.num_experts}, {self.top_k}"


def layers(cell: Cell, dtype: torch.dtype) -> tuple[dict[str, Layer], list[nn.Parameter]]:
    """Everyone by name, "mmoe" and "mmoe BACKEND" among them, and all parameters."""
    moe = mmoe.build_moe(cell.dim, cell.hidden_dim, cell.num_experts, cell.top_k).to(dtype)
    dense = mmoe.GatedFFN(cell.dim, cell.hidden_dim * cell.top_k).to(dtype)
    found: dict[str, Layer] = {LIMIT: dense, OURS: moe}
    for backend in get_args(Backend):
        if backend != "auto":
            twin = copy.copy(moe)
            twin._modules = {**moe._modules, "experts": copy.copy(moe.experts)}
            twin.backend = backend
            found[f"{OURS} {backend}"] = twin
    weights = moe.experts.packed_parameters()
    for implementation in IMPLEMENTATIONS:
        copied = cell.rows * cell.top_k * 3 * cell.dim * cell.hidden_dim * dtype.itemsize
        if implementation != "batched_mm" or copied < MOST_BYTES:
            found[f"{THEIRS} {implementation}"] = _qwen3(cell, moe, implementation, dtype)
    found[NAIVE] = lambda x: _plain_loop(x, moe.router.weight, weights, cell.top_k)
    parameters = [*dense.parameters(), *moe.parameters()]
    grouped_experts = torchtitan_experts()
    if grouped_experts is not None:
        found[TORCHTITAN], theirs = _torchtitan(grouped_experts, cell, moe, dtype)
        parameters += theirs
    return found, parameters


def products(moe: mmoe.MoE, x: Tensor) -> Callable[[bool], None]:
    """The products of a pass, one per expert with rows, between tensors that are sorted and there already.

    A layer that makes one product per expert cannot be faster; one that multiplies several experts at once can.

    Args:
        moe: layer with gated experts.
        x: (T, D).

    Returns:
        A function of whether the products of backward are wanted too.
    """
    with torch.no_grad():
        sent = mmoe.dispatch(moe.route(x))
    up, down = (weight.detach() for weight in moe.experts.packed_parameters().values())  # (E, 2F, D), (E, D, F)
    counts, rows = sent.counts.tolist(), x.detach()[sent.token_idx]
    to_up, to_down = torch.zeros_like(up), torch.zeros_like(down)
    inner, hidden = rows.new_zeros(len(rows), up.shape[1]), rows.new_zeros(len(rows), down.shape[2])
    out = torch.zeros_like(rows)
    tensors = rows.split(counts), up, inner.split(counts), hidden.split(counts), down, out.split(counts), to_up, to_down
    of_experts = [one for one in zip(*tensors, strict=True) if len(one[0])]

    @torch.no_grad()
    def multiply(backward: bool) -> None:
        for r, w, h, a, v, o, to_w, to_v in of_experts:
            torch.mm(r, w.t(), out=h)
            torch.mm(a, v.t(), out=o)
            if backward:
                torch.mm(o, v, out=a)
                torch.mm(o.t(), a, out=to_v)
                torch.mm(h.t(), r, out=to_w)
                torch.mm(h, w, out=o)

    return multiply


def _qwen3(cell: Cell, moe: mmoe.MoE, implementation: str, dtype: torch.dtype) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config: Any = Qwen3MoeConfig(
        hidden_size=cell.dim,
        moe_intermediate_size=cell.hidden_dim,
        num_experts=cell.num_experts,
        num_experts_per_tok=cell.top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).to(dtype)
    block.experts.gate_up_proj = moe.experts.gate_up_proj
    block.experts.down_proj = moe.experts.down_proj
    block.gate.weight = moe.router.weight
    return lambda x: block(x[None])[0]


def torchtitan_experts() -> Any:
    """The experts of torchtitan 0.2, or None where it is not installed; 0.3 computes in bf16 only."""
    try:
        from torchtitan.models.moe.moe import GroupedExperts
    except ImportError:
        return None
    return GroupedExperts


def _torchtitan(
    grouped_experts: Any, cell: Cell, moe: mmoe.MoE, dtype: torch.dtype
) -> tuple[Layer, list[nn.Parameter]]:
    """torchtitan's experts behind our router: its own one does not run on a CPU."""
    experts = grouped_experts(cell.dim, cell.hidden_dim, cell.num_experts, use_grouped_mm=False).to(dtype)
    ours = moe.experts.packed_parameters()
    gate, up = ours["gate_up_proj"].detach().chunk(2, dim=1)
    for name, weight in (("w1", gate), ("w3", up), ("w2", ours["down_proj"].detach())):
        getattr(experts, name).data = weight.contiguous()

    def layer(x: Tensor) -> Tensor:
        sent = mmoe.dispatch(moe.route(x))
        return combine(experts(x[sent.token_idx], sent.counts), sent, len(x))

    return layer, list(experts.parameters())


def _plain_loop(x: Tensor, gate: Tensor, weights: dict[str, nn.Parameter], top_k: int) -> Tensor:
    """As much research code does it: for each expert, a module of its own, the rows that chose it, found by a mask."""
    experts = zip(weights["gate_up_proj"].unbind(), weights["down_proj"].unbind(), strict=True)
    probs = F.linear(x, gate).float().softmax(-1)  # (T, E)
    best, chosen = probs.topk(top_k, dim=-1)  # (T, K)
    best = (best / best.sum(-1, keepdim=True)).to(x.dtype)
    y = torch.zeros_like(x)
    for expert, (gate_up_proj, down_proj) in enumerate(experts):
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        gated, up = F.linear(x[rows], gate_up_proj).chunk(2, dim=-1)
        out = F.linear(F.silu(gated) * up, down_proj)
        y.index_add_(0, rows, out * best[rows, slots, None])
    return y
