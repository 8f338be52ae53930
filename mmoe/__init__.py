"""Routers, experts, dispatch, losses, surgery and tracing for mixture-of-experts models.

`import mmoe` is cheap: torch is imported on the first use of a name below.

    >>> import mmoe
    >>> moe = mmoe.MoE(mmoe.TopKRouter(16, 4, top_k=2), mmoe.FFNExperts(16, 32, 4))
    >>> sum(p.numel() for p in moe.parameters()) > 0
    True
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Context": "routing",
    "Router": "routing",
    "Routing": "routing",
    "MoE": "moe",
    "build_moe": "moe",
    "moe_layers": "moe",
    "with_context": "moe",
    "Dispatch": "dispatch",
    "dispatch": "dispatch",
    "grouped_linear": "dispatch",
    "balance_loss": "losses",
    "entropy_loss": "losses",
    "importance_loss": "losses",
    "z_loss": "losses",
    "Trace": "trace",
    "trace": "trace",
    "update_routers": "trace",
    "override": "override",
    "switch_off": "override",
    "group_counts": "groups",
    "mutual_information": "groups",
    "Profile": "profile",
    "count_params": "profile",
    "profile": "profile",
    "FrequencyAdapter": "frequency",
    "FrequencyMoE": "frequency",
    "frequency_split": "frequency",
    "Experts": "experts",
    "FFN": "experts",
    "FFNExperts": "experts",
    "GatedFFN": "experts",
    "GatedFFNExperts": "experts",
    "LoRAGatedFFNExperts": "experts",
    "WithNullExperts": "experts",
    "ByModalityRouter": "routers",
    "DenseRouter": "routers",
    "DynamicRouter": "routers",
    "ExpertChoiceRouter": "routers",
    "FixedRouter": "routers",
    "GShardRouter": "routers",
    "TopKRouter": "routers",
    "build_experts": "registry",
    "build_router": "registry",
    "list_experts": "registry",
    "list_routers": "registry",
    "LearnedScale": "scale",
    "add_frequency_adapters": "surgery",
    "add_side_experts": "surgery",
    "assemble_experts": "surgery",
    "sites": "surgery",
    "upcycle": "surgery",
    "MmoeError": "errors",
    "first_choice": "routing",
    "load_bars": "figures",
    "load_heatmap": "figures",
    "patch_overlay": "figures",
    "save_figure": "figures",
    "token_strip": "figures",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmoe' has no attribute {name!r}")
    value = getattr(import_module(f"mmoe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `mmoe.trace` the function although importing the file `mmoe/trace.py` binds the module to that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
