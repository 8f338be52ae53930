"""One view on the feed-forward and mixture blocks of any host: packed expert weights, router weights, and a swap.

    for name, site in sites(model).items():
        weights, router = site.weights(), site.router()
        site.replace(HostedMoE(router, experts))

Every conversion of dense or sparse models (upcycling, splitting, pruning, merging) is written against this view only.
Weights are normalised once to the packed layout of transformers 5: up_proj (E, F, D), gate_up_proj (E, 2F, D) with the
gate rows first, down_proj (E, D, F); a dense block has E = 1.
Shapes: E experts, F inner width, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mmoe.errors import LoadMismatch, Refused, UnknownName, did_you_mean
from mmoe.experts.activations import Activation
from mmoe.experts.base import Experts
from mmoe.experts.ffn import FFNExperts, GatedFFNExperts
from mmoe.moe import MoE
from mmoe.routing import LinearRouter
from mmoe.surgery.layout import Layout, is_host_moe, looks_like_ffn, maps_width_to_itself, prove, recognize, why_not

Places = tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The weights of E experts in one layout. Tensors are detached; they may be views of the host's.

    Attributes:
        up: (E, F, D), or gated (E, 2F, D) with the gate rows first.
        up_bias: (E, F), gated (E, 2F), or None.
        down: (E, D, F).
        down_bias: (E, D) or None.
        act: activation, of the gate where gated.
        gated: whether the activated product multiplies another one.
        dropout: probability between activation and down, in training.
        out_dropout: probability after down, in training.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    act: Activation
    gated: bool = False
    dropout: float = 0.0
    out_dropout: float = 0.0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.up.shape[2]

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.down.shape[2]

    def tensors(self) -> dict[str, Tensor | None]:
        """The four tensors by field name."""
        return {"up": self.up, "up_bias": self.up_bias, "down": self.down, "down_bias": self.down_bias}

    def experts(self, *, dropout: float | None = None) -> Experts:
        """Packed experts with copies of these weights.

        Args:
            dropout: probability between activation and down; the host's when None.
        """
        rate, act = self.dropout if dropout is None else dropout, copy.deepcopy(self.act)
        kind = GatedFFNExperts if self.gated else FFNExperts
        with torch.device("meta"):  # neither memory nor random numbers for weights that are set below
            experts = kind(self.dim, self.hidden_dim, self.num_experts, act=act, bias=False, dropout=rate)
        up = "gate_up" if self.gated else "up"
        names = {f"{up}_proj": self.up, f"{up}_bias": self.up_bias}
        for name, value in {**names, "down_proj": self.down, "down_bias": self.down_bias}.items():
            if value is not None:
                value = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(experts, name, None if value is None else nn.Parameter(value))
        return experts


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterWeights:
    """What a router with a linear gate consists of. Tensors are detached views.

    Attributes:
        weight: (E, D) of the gate.
        bias: (E,) of the gate, or None.
        select_bias: (E,) added for the selection only, or None.
        top_k: experts per row, or None where the router has no fixed number.
        score: "softmax" or "sigmoid".
        weights: policy of the combine weights; see `mmoe.routers.topk`.
        scale: factor on the combine weights.
        temperature: divides the logits.
    """

    weight: Tensor
    bias: Tensor | None
    select_bias: Tensor | None
    top_k: int | None
    score: str = "softmax"
    weights: str = "raw"
    scale: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One feed-forward or mixture block of a host.

    Attributes:
        name: the block's name in the host.
        kind: "dense" for a feed-forward block, "moe" for a `MoE`.
        module: the block.
        places: (parent, attribute) of every place where the host holds the block.
        layout: where a dense block keeps its layers.
    """

    name: str
    kind: Literal["dense", "moe"]
    module: nn.Module = field(repr=False)
    places: Places = field(repr=False, default=())
    layout: Layout | None = field(repr=False, default=None)

    def weights(self, state_dict: Mapping[str, Tensor] | None = None) -> ExpertWeights:
        """Packed weights of the block.

        A dense block is run on two rows first, to prove that it computes nothing but the formula of its weights.

        Args:
            state_dict: reads the tensors of this dense block from the state dict of another model of the same kind.

        Raises:
            Refused: the block computes something else, or its experts have no packed weights.
            LoadMismatch: the state dict lacks a tensor or has one of another shape.
        """
        if self.layout is None:
            return self._moe_weights(state_dict)
        layout = prove(self.module, self.layout)
        if isinstance(layout, str):
            raise _refused(self.name, layout)
        assert layout.act is not None
        tensors = self._tensors(layout, state_dict)
        packed = {name: None if t is None else t[None] for name, t in layout.packed(tensors).items()}
        up, down = packed["up"], packed["down"]
        assert up is not None and down is not None
        return ExpertWeights(
            up=up,
            up_bias=packed["up_bias"],
            down=down,
            down_bias=packed["down_bias"],
            act=layout.act,
            gated=layout.gated,
            dropout=layout.dropout,
            out_dropout=layout.out_dropout,
        )

    def _tensors(self, layout: Layout, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        own = {
            name: value.detach()
            for name, value in self.module.named_parameters()
            if name.rpartition(".")[0] in layout.layers
        }
        if state_dict is None:
            return own
        prefix = f"{self.name}." if self.name else ""
        for name, value in own.items():
            key = prefix + name
            if key not in state_dict:
                raise LoadMismatch(
                    f"no {key!r} in a source",
                    did_you_mean(key, state_dict),
                    "sources of the same architecture as the model",
                )
            if state_dict[key].shape != value.shape:
                raise LoadMismatch(
                    f"{key!r} of a source has the wrong shape",
                    f"it is {tuple(state_dict[key].shape)}, the model's is {tuple(value.shape)}",
                    "sources of the same architecture as the model",
                )
        return {name: state_dict[prefix + name].detach() for name in own}

    def _moe_weights(self, state_dict: Mapping[str, Tensor] | None) -> ExpertWeights:
        assert isinstance(self.module, MoE)
        experts, post = self.module.experts, self.module.post
        if state_dict is not None:
            raise _refused(self.name, "it is a mixture; a state dict gives the weights of dense blocks")
        if type(experts) not in (FFNExperts, GatedFFNExperts):
            raise _refused(self.name, f"it holds {type(experts).__name__}; FFNExperts and GatedFFNExperts can be read")
        assert isinstance(experts, FFNExperts | GatedFFNExperts)
        up = "gate_up" if isinstance(experts, GatedFFNExperts) else "up"
        get = {name: value.detach() for name, value in experts.packed_parameters().items()}
        return ExpertWeights(
            up=get[f"{up}_proj"],
            up_bias=get.get(f"{up}_bias"),
            down=get["down_proj"],
            down_bias=get.get("down_bias"),
            act=experts.act,
            gated=up == "gate_up",
            dropout=experts.dropout,
            out_dropout=post.p if isinstance(post, nn.Dropout) else 0.0,
        )

    def router(self) -> RouterWeights | None:
        """The router's weights; None for a dense block and for a router without a linear gate."""
        router = self.module.router if isinstance(self.module, MoE) else None
        if not isinstance(router, LinearRouter):
            return None
        select_bias = getattr(router, "select_bias", None)
        return RouterWeights(
            weight=router.weight.detach(),
            bias=None if router.bias is None else router.bias.detach(),
            select_bias=select_bias.detach() if isinstance(select_bias, Tensor) else None,
            top_k=getattr(router, "top_k", None),
            score=getattr(router, "score", "softmax"),
            weights=getattr(router, "weights", "raw"),
            scale=getattr(router, "scale", 1.0),
            temperature=getattr(router, "temperature", 1.0),
        )

    def replace(self, module: nn.Module) -> None:
        """Puts another module in the place of the block, everywhere where the host holds it; this view is then stale.

        Raises:
            Refused: the block is the whole model.
        """
        if not self.places:
            raise Refused("replace a whole model", "it stands in no other module", "nn.Sequential(model)")
        for parent, attribute in self.places:
            setattr(parent, attribute, module)


@dataclass(frozen=True)
class _Weight:
    """Looks like a linear layer to a host that asks for the type or device of its feed-forward's weight."""

    weight: Tensor


class HostedMoE(MoE):
    """A `MoE` in the place of a host's feed-forward block.

    Some hosts ask their block for the dtype of a layer: open_clip reads `mlp.c_fc.weight.dtype` for its cast dtype,
    Qwen2-VL `mlp.fc2.weight.dtype`. These names answer here with the packed weights; they are no submodules, and the
    state dict is that of a `MoE`.

    Example:
        >>> from mmoe import FFNExperts, TopKRouter
        >>> moe = HostedMoE(TopKRouter(8, 4), FFNExperts(8, 16, 4).to(torch.bfloat16))
        >>> moe.c_fc.weight.dtype
        torch.bfloat16
    """

    def _packed(self, index: int) -> _Weight:
        packed = [p for p in self.experts.parameters() if p.ndim == 3]
        return _Weight((packed or list(self.parameters()))[index])

    @property
    def c_fc(self) -> _Weight:
        """First product of the experts."""
        return self._packed(0)

    @property
    def c_proj(self) -> _Weight:
        """Last product of the experts."""
        return self._packed(-1)

    fc1, fc2 = c_fc, c_proj  # the same under timm's names


def sites(model: nn.Module) -> dict[str, Site]:
    """Dense feed-forward blocks and MoE layers of a model by name, in module order.

    A feed-forward block is a module that maps width D to D by two linear layers around an activation, plain or gated;
    projectors and heads that change the width are none. What looks like one but cannot be read is in `refused_sites`.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        ...
        ...     def forward(self, x):
        ...         return x + self.ffn(x)
        >>> found = sites(nn.Sequential(Block(), Block()))
        >>> list(found), found["0.ffn"].kind, found["0.ffn"].weights().up.shape
        (['0.ffn', '1.ffn'], 'dense', torch.Size([1, 16, 8]))
    """
    return _search(model)[0]


def refused_sites(model: nn.Module) -> dict[str, str]:
    """Blocks that look like a feed-forward but cannot be read, by name, with the reason and what would work.

    Example:
        >>> list(refused_sites(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))))
        ['0']
    """
    return _search(model)[1]


def get_site(model: nn.Module, name: str) -> Site:
    """The site of this name.

    Raises:
        Refused: there is a block of this name that cannot be read.
        UnknownName: there is none.

    Example:
        >>> from mmoe import FFN
        >>> get_site(nn.ModuleDict({"ffn": FFN(8, 16)}), "ffn").kind
        'dense'
    """
    found, refused = _search(model)
    if name in refused:
        raise _refused(name, refused[name])
    if name not in found:
        raise UnknownName(f"no feed-forward block named {name!r}", did_you_mean(name, found), "list(mmoe.sites(model))")
    return found[name]


def _refused(name: str, reason: str) -> Refused:
    return Refused(f"cannot read the feed-forward block {name!r}", reason, "list(mmoe.sites(model))")


def _search(model: nn.Module) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites and refusals. A site is not searched further; a block refused as a whole mixture neither."""
    found: dict[str, Site] = {}
    refused: dict[str, str] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, parent: nn.Module | None) -> bool:
        """Whether the module or something inside is a site or refused."""
        if id(module) in seen:
            return False
        seen.add(id(module))
        named_ffn = looks_like_ffn(name, module)
        parent_named = parent is not None and looks_like_ffn("", parent)
        layout = None if isinstance(module, MoE) else recognize(module, named_ffn or parent_named)
        if isinstance(module, MoE) or isinstance(layout, Layout):
            found[name] = Site(
                name=name,
                kind="moe" if isinstance(module, MoE) else "dense",
                module=module,
                places=tuple(places.get(id(module), ())),
                layout=layout if isinstance(layout, Layout) else None,
            )
            return True
        if is_host_moe(module):
            refused[name] = "it is a mixture of experts of the host's own; a dense host of the same family works"
            return True
        inside = [visit(f"{name}.{key}" if name else key, child, module) for key, child in module.named_children()]
        if isinstance(layout, str):
            refused[name] = layout
        elif not any(inside) and named_ffn and maps_width_to_itself(module):
            refused[name] = why_not(module)
        return name in refused or any(inside)

    visit("", model, None)
    return found, refused
