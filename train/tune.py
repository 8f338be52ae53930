"""What a stage trains: everything, routers, named modules, chosen experts, or low-rank adapters by peft."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mmoe.atomic import atomic_paths
from mmoe.errors import BadInput, nearest
from mmoe.moe import moe_layers
from mmoe.trace import trace
from train.sections import TuneSection

Chosen = Mapping[nn.Parameter, tuple[int, ...]]
_WRAPPING = ("base_model", "model", "base_layer", "modules_to_save", "default")  # peft's names around a part


def freeze(model: nn.Module, section: TuneSection, used: Mapping[str, Tensor] | None = None) -> Chosen:
    """Freezes what is not trained; of packed parameters that train in part it tells the experts.

    Args:
        model: changed in place.
        section: of the recipe, not "lora".
        used: slots that each expert of each layer got, (E,), for `top_used`.

    Raises:
        BadInput: nothing is left to train, or there are no such experts.
    """
    layers = moe_layers(model)
    if section.method in ("router_only", "experts") and not layers:
        raise BadInput(f"train with method: {section.method}", "the model has no mixtures", "tune.method=full")
    if section.method == "experts":
        return _choose_experts(model, section, used or {})
    routers = {id(p) for layer in layers.values() for p in layer.router.parameters()}
    patterns = {"full": ("*",), "adapters": getattr(model, "adapters", ())}.get(section.method, section.modules)
    if not patterns and section.method == "adapters":
        wrong, fix = "its family adds none to a frozen backbone", "tune.method=lora"
        raise BadInput(f"train the adapters of {type(model).__name__}", wrong, fix)
    for name, parameter in model.named_parameters():
        named = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(id(parameter) in routers if section.method == "router_only" else named)
    if section.method in ("modules", "adapters"):
        check_patterns("train", patterns, model, "tune.modules=['*.mlp.*']")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(f"train with method: {section.method}", "no parameter is left to train", "tune.method=full")
    return {}


def check_patterns(verb: str, patterns: Iterable[str], model: nn.Module, fix: str) -> None:
    """Makes sure that every pattern names a parameter.

    Raises:
        BadInput: one names none.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern.strip("*."), names)
            wrong = "no parameter has such a name" + (f"; one is {near[0]}" if near else "")
            raise BadInput(f"{verb} {pattern!r}", wrong, fix)


def _choose_experts(model: nn.Module, section: TuneSection, used: Mapping[str, Tensor]) -> Chosen:
    model.requires_grad_(False)
    chosen: dict[nn.Parameter, tuple[int, ...]] = {}
    for name, layer in moe_layers(model).items():
        count = layer.router.num_experts
        if section.top_used is None:
            numbers = section.experts or ()
        elif section.top_used > count:
            asked, wrong = f"train the {section.top_used} most used experts of '{name}'", f"it has {count}"
            raise BadInput(asked, wrong, f"tune.top_used={count}")
        else:
            numbers = tuple(sorted(used[name].topk(section.top_used).indices.tolist()))
        beyond = [number for number in numbers if number >= count]
        if beyond:
            raise BadInput(
                f"train expert {beyond[0]} of '{name}'", f"it has {count}, from 0", f"tune.experts=[{count - 1}]"
            )
        for parameter in layer.experts.packed_parameters().values():
            chosen[parameter.requires_grad_(True)] = numbers
    return chosen


def add_adapters(model: nn.Module, section: TuneSection) -> Any:
    """Low-rank adapters beside the frozen model, on its experts' packed weights and on named linear layers.

    Args:
        model: wrapped in place.
        section: of the recipe.

    Returns:
        A `peft.PeftModel`.
    """
    from peft import LoraConfig, get_peft_model

    whole = _whole(model, section.whole)

    def named(name: str) -> bool:
        inside = any(name.startswith(f"{module}.") for module in whole)
        return not inside and any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in section.modules)

    unused = nn.modules.linear.NonDynamicallyQuantizableLinear  # nn.MultiheadAttention reads its weight alone
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = [name for name, kind in kinds.items() if not issubclass(kind, unused)]
    packed = {f"{name}.experts" for name in moe_layers(model)}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and name.removesuffix(".weight") not in kinds
    ]
    adapted = [name for name in others if name.rpartition(".")[0] in packed and not name.endswith("_bias")]
    wanted = [name for name in linear if named(name)]
    more = [name for name in others if named(name) and name not in adapted]
    more = [name for name in more if not _holds(name, [*wanted, *adapted, *more])]
    for pattern in section.modules:
        if not any(fnmatchcase(name.removesuffix(".weight"), pattern) for name in [*linear, *others]):
            hidden = any(fnmatchcase(name, pattern) for name in kinds)
            wrong = "no linear layer, router or other matrix has such a name"
            wrong = "nn.MultiheadAttention reads it by itself, so that no adapter is heard" if hidden else wrong
            raise BadInput(f"adapt {pattern!r}", wrong, f"tune.modules=['{[*linear, *others][0]}']")
    if not wanted + more + adapted:
        raise BadInput("train with method: lora", "the model has no mixtures", "tune.modules=['*.attn.*']")
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=wanted,
        target_parameters=adapted + more,
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def _holds(name: str, others: Iterable[str]) -> bool:
    """Whether the module of a parameter has others inside, whose names change where peft wraps it."""
    owner = name.rpartition(".")[0]
    return any(other.startswith(f"{owner}.") and "." in other.removeprefix(f"{owner}.") for other in others)


def _whole(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Names of the modules that are trained as they are.

    Raises:
        BadInput: a pattern names none, or peft would take others too.
    """
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    found: list[str] = []
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            near = nearest(pattern.strip("*."), names)
            wrong = "no module with parameters has such a name" + (f"; one is {near[0]}" if near else "")
            raise BadInput(f"train {pattern!r} as it is", wrong, f"tune.whole=['{names[-1]}']")
        found += matching
    for other in names:
        like = next((name for name in found if other.endswith(name) and other not in found), None)
        if like is not None and not any(other.startswith(f"{name}.") for name in found):
            wrong = f"peft would train {other!r} too, as its name ends alike"
            raise BadInput(f"train {like!r} as it is", wrong, f"tune.whole=['{like}', '{other}']")
    return [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]


def expert_use(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Slots that each expert of each layer gets, (E,), over some batches."""
    found: dict[str, Tensor] = {}
    for batch in batches:
        with torch.no_grad(), trace(model) as routing:
            model(**batch)
        for name in routing.layers:
            for one in routing.select(name):
                found[name] = found.get(name, 0) + one.counts()
    return found


def table(model: nn.Module, chosen: Chosen) -> list[tuple[str, int, int]]:
    """(group, trained parameters, all parameters) by group: routers, experts, adapters, each part of the rest."""
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # peft keeps it beside what it trains in its place
            continue
        group = groups.setdefault(_group(name), [0, 0])
        group[1] += parameter.numel()
        if parameter.requires_grad:
            share = len(chosen[parameter]) / len(parameter) if parameter in chosen else 1
            group[0] += round(parameter.numel() * share)
    return [(name, trained, total) for name, (trained, total) in groups.items()]


def _group(name: str) -> str:
    if ".lora_" in name or name.startswith("lora_"):
        return "adapters"
    if ".router." in name:
        return "routers"
    if ".experts." in name:
        return "experts"
    parts = [part for part in name.split(".") if part not in _WRAPPING]
    return ".".join(parts[:2] if len(parts) > 2 else parts[:1])


def show_table(rows: list[tuple[str, int, int]]) -> str:
    """The table as text, with what is trained of each group as a share of the whole model."""
    total, trained = sum(row[2] for row in rows), sum(row[1] for row in rows)
    width = max(len("trained of"), *(len(name) for name, _, _ in rows))
    lines = [f"{'group':{width}}  {'trained':>12}  {'parameters':>12}  trained of all"]
    for name, part, whole in [*rows, ("all", trained, total)]:
        lines.append(f"{name:{width}}  {part:>12,}  {whole:>12,}  {part / max(total, 1):14.2%}")
    return "\n".join(lines)


ADAPTERS = "adapters"  # folder of adapters inside that of the model that has them in its weights


def save_adapters(model: Any, folder: Path, base: str, *, merge: bool) -> None:
    """Writes adapters as peft does: adapter_config.json and adapter_model.safetensors; all or, if it fails, nothing.

    Args:
        model: a `peft.PeftModel`.
        folder: of the merged model, whose folder "adapters" they go into; or of the adapters.
        base: name of the model that they were trained on.
        merge: writes the model with the adapters added to its weights too.
    """
    model.peft_config["default"].base_model_name_or_path = base
    target = folder / ADAPTERS if merge else folder
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=target) as made:
        model.save_pretrained(made, save_embedding_layers=False)  # peft would ask the hub whether the base has others
        # The configuration takes its name last: it tells that there are adapters.
        files = [Path(made) / name for name in ("adapter_model.safetensors", "adapter_config.json")]
        with atomic_paths(*(target / file.name for file in files)) as temporaries:
            for file, temporary in zip(files, temporaries, strict=True):
                file.replace(temporary)
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())  # before the model takes its name, so that only renaming is left
            if merge:
                copy.deepcopy(model).merge_and_unload().save(folder)


def load_adapters(model: nn.Module, folder: str | Path, *, merge: bool = False) -> Any:
    """The model with adapters from a folder; merged into its weights where asked for.

    Raises:
        BadInput: there are none.
    """
    from peft import PeftModel

    if not (Path(folder) / "adapter_config.json").is_file():
        raise BadInput(f"no adapters in '{folder}'", "it has no adapter_config.json", f"RUN/model/{ADAPTERS}")
    adapted = PeftModel.from_pretrained(model, str(folder))
    return adapted.merge_and_unload() if merge else adapted
