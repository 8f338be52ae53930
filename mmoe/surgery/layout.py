"""Recognises the feed-forward blocks of any host by their structure and proves that they compute the known formula.

    plain:  down(act(up x))          gated:  down(act(gate x) * up x)

Hosts name and pack the same layers differently (transformers, timm, open_clip and our own blocks): two or three linear
layers, an activation, dropouts. Structure says which layers there are; a run on two rows says where dropouts act, and
with real weights also that the block computes the formula and nothing else. No host library is imported.
Shapes: D model width, F inner width, N rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmoe.experts.activations import ACTIVATIONS, Activation, match_activation

# Names of the linear layers, the gate (the product that is activated) first.
PLAIN = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("linear_fc1", "linear_fc2"),
    ("up_proj", "down_proj"),
    ("dense1", "dense2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
    ("intermediate_dense", "output_dense"),
    ("wi", "wo"),
)
PACKED = (("gate_up_proj", "down_proj"), ("w12", "w3"), ("weights_in", "weights_out"), ("Wi", "Wo"))
SPLIT = (
    ("gate_proj", "up_proj", "down_proj"),
    ("fc1_g", "fc1_x", "fc2"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
)

_ACT_NAMES = ("act", "act_fn", "activation", "activation_fn", "activation_function", "intermediate_act_fn")
_FFN_NAME = re.compile(r"mlp|ffn|feed_?forward|(^|_)ff(n?)$", re.IGNORECASE)
_HARMLESS = (nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of one dense feed-forward block are.

    Attributes:
        up: names of the first layers inside the block: one, or gate and up of a block that keeps them apart.
        down: name of the last layer.
        gated: whether the activated product multiplies another one.
        gate_last: the rows of a packed gate come last; None when only a run can tell.
        transposed: weights are stored input by output (GPT-2's Conv1D).
        act: the activation, or None when the block hides it in its forward.
        dropout: probability between activation and last layer.
        out_dropout: probability after the last layer.
    """

    up: tuple[str, ...]
    down: str
    gated: bool = False
    gate_last: bool | None = False
    transposed: bool = False
    act: Activation | None = None
    dropout: float = 0.0
    out_dropout: float = 0.0

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all linear layers."""
        return (*self.up, self.down)

    def packed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Weights and biases of one expert from tensors by their name inside the block; views where possible.

        Returns:
            "up" (F, D), gated (2F, D) with the gate rows first; "down" (D, F); "up_bias", "down_bias" or None.
        """
        ups = [self._weight(tensors, name) for name in self.up]
        biases = [tensors.get(f"{name}.bias") for name in self.up]
        if any(bias is not None for bias in biases):
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(ups, biases, strict=True)]
        up = ups[0] if len(ups) == 1 else torch.cat(ups)
        bias = biases[0] if len(ups) == 1 or biases[0] is None else torch.cat([b for b in biases if b is not None])
        if self.gate_last:
            up, bias = _swap_halves(up), None if bias is None else _swap_halves(bias)
        return {
            "up": up,
            "up_bias": bias,
            "down": self._weight(tensors, self.down),
            "down_bias": tensors.get(f"{self.down}.bias"),
        }

    def _weight(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return weight.t() if self.transposed else weight


def _swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def recognize(module: nn.Module, named_ffn: bool = False) -> Layout | str | None:
    """Reads the structure of a module.

    Args:
        module: any module of a host.
        named_ffn: its name or its parent's says feed-forward; without that a sequence of layers is taken for a head.

    Returns:
        The layout of a dense feed-forward block, why a block that looks like one cannot be read, or None.
    """
    children = dict(module.named_children())
    if isinstance(module, nn.Sequential):
        return _sequential(module, children) if named_ffn else None
    if {"intermediate", "output"} <= children.keys() and all(
        _is_linear(getattr(children[name], "dense", None)) for name in ("intermediate", "output")
    ):
        return (
            "its feed-forward is split over `intermediate` and `output`, and `output` adds the residual (BERT); "
            "take a pre-norm host such as ViT, CLIP or SigLIP"
        )
    names = next((names for names in (*SPLIT, *PACKED, *PLAIN) if children.keys() >= set(names)), None)
    if names is None:
        return None
    layers = [children[name] for name in names]
    if not all(_is_linear(layer) for layer in layers):
        return why_not(module) if named_ffn else None
    wrong = why_not_weights(layers)  # before sizes, which quantised weights do not have
    layout = None if wrong else _fit(names, layers, getattr(module, "gate_last", None))
    if layout is None:
        return wrong
    extra = {name: child for name, child in children.items() if name not in names and not isinstance(child, _HARMLESS)}
    act_name, act = _activation(module, extra)
    extra.pop(act_name, None)
    if extra or _num_inputs(module) > 1:
        return why_not(module, extra)
    inner, outer = _functional_dropout(module)
    return replace(layout, act=act, dropout=inner, out_dropout=outer)


def _sequential(module: nn.Sequential, children: dict[str, nn.Module]) -> Layout | str | None:
    """Linear, activation, Linear with dropouts anywhere, such as open_clip's; other sequences are no feed-forward."""
    steps = [(name, child) for name, child in children.items() if not isinstance(child, _HARMLESS)]
    linears = [(name, child) for name, child in steps if _is_linear(child)]
    if len(linears) != 2:
        return None
    layers = [child for _, child in linears]
    wrong = why_not_weights(layers)
    layout = None if wrong else _fit(tuple(name for name, _ in linears), layers, None)
    if layout is None or layout.gated:
        return wrong
    middle = [child for _, child in steps[1:-1]]
    whole = len(steps) == 3 and steps[0] == linears[0] and steps[-1] == linears[1]
    if not whole or _has_state(middle[0]):
        return why_not(module, {name: child for name, child in steps if not _is_linear(child)})
    return replace(layout, act=match_activation(middle[0]))


def _has_state(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in (*module.parameters(), *module.buffers()))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2 and hasattr(module, "nf")


def _fit(names: tuple[str, ...], layers: list[Any], gate_last: bool | None) -> Layout | None:
    """The layout when the layers lead from width D over F back to D."""
    transposed = _is_conv1d(layers[0])
    if any(_is_conv1d(layer) != transposed for layer in layers):
        return None
    sizes = [tuple(layer.weight.shape) for layer in layers]
    sizes = [size[::-1] if transposed else size for size in sizes]  # (out, in)
    (inner, dim), (out, inner_down) = sizes[0], sizes[-1]
    if out != dim or any(size != sizes[0] for size in sizes[1:-1]):
        return None
    packed = len(names) == 2 and inner == 2 * inner_down
    if not packed and inner != inner_down:
        return None
    known = False if names in PACKED or len(names) == 3 else gate_last
    return Layout(
        up=names[:-1],
        down=names[-1],
        gated=packed or len(names) == 3,
        gate_last=known if packed else False,
        transposed=transposed,
    )


def _activation(module: nn.Module, extra: Mapping[str, nn.Module]) -> tuple[str, Activation | None]:
    """The activation's attribute name and function; None when there is none to see."""
    for name in (*_ACT_NAMES, *extra):
        found = extra.get(name) or module.__dict__.get(name)
        is_act = name in _ACT_NAMES or re.search("gelu|relu|silu|swish|act", type(found).__name__, re.IGNORECASE)
        if callable(found) and is_act and not _has_state(found):
            return name, match_activation(found)
    return "", None


def _functional_dropout(module: nn.Module) -> tuple[float, float]:
    """Probabilities, inside and after, that a host keeps as numbers and applies in its forward."""

    def rate(*names: str) -> float:
        values = [getattr(module, name, 0.0) for name in names]
        return max(value for value in [*values, 0.0] if isinstance(value, float))

    return rate("activation_dropout"), rate("dropout", "hidden_dropout", "residual_dropout")


def _num_inputs(module: nn.Module) -> int:
    """How many arguments the forward needs."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    params = inspect.signature(module.forward).parameters.values()
    return sum(p.default is inspect.Parameter.empty and p.kind not in optional for p in params)


def looks_like_ffn(name: str, module: nn.Module) -> bool:
    """Whether a block's attribute name or class name says feed-forward."""
    return bool(_FFN_NAME.search(name.rpartition(".")[2]) or _FFN_NAME.search(type(module).__name__))


def is_host_moe(module: nn.Module) -> bool:
    """Whether a block is a mixture of experts of the host's own."""
    children = dict(module.named_children())
    routed = any(name in children for name in ("gate", "router", "wg", "gating"))
    return "experts" in children and routed


def maps_width_to_itself(module: nn.Module) -> bool:
    """Whether a block has two or more matrices that lead from one width back to it."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    return len(matrices) >= 2 and matrices[0].shape[1] == matrices[-1].shape[0]


def why_not_weights(layers: list[Any]) -> str | None:
    """Why weights cannot be packed, or None."""
    dtypes = {layer.weight.dtype for layer in layers}
    for dtype in dtypes:
        if not dtype.is_floating_point:
            return f"its weights are quantised ({dtype}); load the model in a floating-point type"
    if len(dtypes) > 1:
        return f"its layers have different types ({', '.join(sorted(map(str, dtypes)))}); move the model to one dtype"
    return None


def why_not(module: nn.Module, extra: Mapping[str, nn.Module] | None = None) -> str:
    """Why a block that looks like a feed-forward cannot be read, and what would work."""
    children = dict(module.named_children()) if extra is None else dict(extra)
    inside = [child for child in module.modules() if child is not module]
    if any(hasattr(child, "base_layer") for child in inside):
        return "its layers carry adapters; merge them first (peft: model.merge_and_unload())"
    kept = [
        name
        for name, child in children.items()
        if "norm" in type(child).__name__.lower() or (name in _ACT_NAMES and _has_state(child))
    ]
    others = sorted((name for name in children if name not in kept), key=lambda name: "att" not in name)
    beside = others and extra and _has_state(extra[others[0]])
    if any(isinstance(child, nn.modules.conv._ConvNd) for child in inside) and not (beside and "att" in others[0]):
        return "it convolves feature maps, and experts take rows (..., D); a transformer host works"
    if beside:
        return (
            f"its layers stand beside others (`{others[0]}`) and are applied inside their forward, so there is no "
            "block to swap; a host that keeps them in a module of their own works"
        )
    if _num_inputs(module) > 1:
        return "its forward takes more than one input (a residual, say); a host that adds the residual outside works"
    if kept and not any(_has_state(children[name]) for name in others):
        free = "a host built without it works (timm: scale_mlp=False)"
        return f"`{kept[0]}` stands between its layers, and packed experts have no place for it; {free}"
    names = ", ".join(children) or type(module).__name__
    return f"its parts ({names}) are no structure known here; nn.Sequential(Linear, activation, Linear) works"


def prove(module: nn.Module, layout: Layout) -> Layout | str:
    """Runs a block on two rows and settles what its structure leaves open.

    Args:
        module: the block; its mode and hooks are left as they were.
        layout: what `recognize` said.

    Returns:
        The layout with gate order, activation and dropouts filled in, or the reason why the block is not the formula.
        On the meta device, and with weights that are not finite, only the order of the layers is checked.
    """
    tensors = dict(module.named_parameters())
    if not {f"{name}.weight" for name in layout.layers} <= tensors.keys():
        return "its weights are computed from other tensors (weight norm, pruning); make them plain parameters first"
    weight = tensors[f"{layout.up[0]}.weight"]
    dim = weight.shape[0 if layout.transposed else 1]
    x = torch.arange(2 * dim, device="cpu", dtype=torch.float32).sin().reshape(1, 2, dim)  # no random numbers drawn
    x = x.to(weight.device, weight.dtype)
    try:
        with _watched(module, layout) as events, torch.no_grad(), _no_autocast(x.device):
            want = type(module).forward(module, x)
    except Exception as error:  # whatever a foreign forward raises
        return f"it does not run on rows of shape {tuple(x.shape)} ({type(error).__name__}: {error})"
    if not isinstance(want, Tensor) or want.shape != x.shape:
        return "it does not return one tensor of the shape of its input"
    placed = _place_dropouts(layout, events)
    if isinstance(placed, str):
        return placed
    layout = placed
    if want.is_meta or not want.isfinite().all():
        hidden = layout.gate_last is None or layout.act is None
        return "its gate order or activation shows only with real weights; load them first" if hidden else layout
    with torch.no_grad(), _no_autocast(x.device):
        tried = [(_error(want, _formula(x, option, tensors)), option) for option in _options(layout)]
    gap, best = min(tried, key=lambda pair: pair[0])
    if gap > (1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2):
        return "it computes something else than two linear layers around an activation; a plain block works"
    return best


def _options(layout: Layout) -> Iterator[Layout]:
    """All layouts that the structure allows."""
    for act in list(ACTIVATIONS.values()) if layout.act is None else [layout.act]:
        for gate_last in (False, True) if layout.gate_last is None else (layout.gate_last,):
            yield replace(layout, act=act, gate_last=gate_last)


def _formula(x: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    w = layout.packed(tensors)
    assert w["up"] is not None and w["down"] is not None and layout.act is not None
    hidden = F.linear(x, w["up"], w["up_bias"])  # (1, 2, F) or (1, 2, 2F)
    if layout.gated:
        gate, up = hidden.chunk(2, dim=-1)
        return F.linear(layout.act(gate) * up, w["down"], w["down_bias"])
    return F.linear(layout.act(hidden), w["down"], w["down_bias"])


def _error(want: Tensor, got: Tensor) -> float:
    scale = want.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((want.float() - got.float()).abs().max() / scale)


@contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    if device.type == "meta":
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _watched(module: nn.Module, layout: Layout) -> Iterator[list[Any]]:
    """Lists what a block consists of in the order in which it runs, in eval mode; linear layers by name."""
    modes = {child: child.training for child in module.modules()}
    events: list[Any] = []
    names = {module.get_submodule(name): name for name in layout.layers}
    watched = [child for child in modes if child in names or (child is not module and not list(child.children()))]

    def note(child: nn.Module, args: Any) -> None:
        events.append(names.get(child, child))

    handles = [child.register_forward_pre_hook(note) for child in watched]
    module.eval()
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()
        for child, training in modes.items():
            child.training = training


def _place_dropouts(layout: Layout, events: list[Any]) -> Layout | str:
    """Files each dropout under the place where it ran, or says why experts have no such place."""
    found: dict[str, Any] = {}
    begun, place = 0, "dropout"
    for event in events:
        if isinstance(event, str):
            begun, place = begun + 1, "out_dropout" if event == layout.down else "dropout"
        elif not isinstance(event, nn.modules.dropout._DropoutNd):
            if place in found and not isinstance(event, nn.Identity):
                return "it has a dropout before its activation; experts have one behind it"
        elif event.p > 0:
            if place in found:
                return "it has two dropouts in a row; experts have one"
            if begun < len(layout.up):
                return "it has a dropout on its input; experts have one behind the activation and one at the end"
            found[place] = event.p
    return replace(layout, **found)
