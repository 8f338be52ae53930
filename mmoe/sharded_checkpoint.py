"""Checkpoints of sharded models, each process its part, on PyTorch's distributed checkpoints.

Any number of processes reads what any other wrote, one process without a launcher too.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mmoe.errors import BadInput, CorruptFile, LoadMismatch

_INDEX = ".metadata"
_MOMENTS, _GROUPS = "optimizer.state.", "groups"
_SOME = StateDictOptions(strict=False)  # parameters that never had a gradient have no state
_SAME = "the model and the optimiser that it was written with"
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "module")


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes weights and optimiser state, each process its part; any number of processes can read them.

    The folder takes its name when everything is written; an older checkpoint stays until then.

    Args:
        folder: a new one, or that of an older checkpoint.
        model: sharded or not.
        optimizer: of its parameters.

    Raises:
        BadInput: the folder holds other files.
    """
    folder = _own_folder(folder)
    state: dict[str, Any] = {"model": get_model_state_dict(model), _GROUPS: _options(optimizer)}
    if optimizer.state:  # PyTorch would make one by a step
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_SOME)
    temporary, older = _beside(folder, "tmp"), _beside(folder, "old")
    if _is_first():
        if not folder.exists() and older.exists():  # a process was killed before the new one had its name
            older.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
    _wait()
    state_dict_saver.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if _is_first():
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
        shutil.rmtree(older, ignore_errors=True)
    _wait()


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads what `save_checkpoint` wrote, on the same or another number of processes; gradients are cleared.

    Raises:
        BadInput: there is no checkpoint.
        LoadMismatch: it is of another model or optimiser.
        CorruptFile: it cannot be read.
    """
    folder = Path(folder).resolve()
    if not (folder / _INDEX).exists() and (_beside(folder, "old") / _INDEX).exists():
        folder = _beside(folder, "old")
    if not (folder / _INDEX).exists():
        raise BadInput(f"no checkpoint in '{folder}'", f"it has no {_INDEX}", "a folder of save_checkpoint")
    with _readable(folder):
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    optimizer.zero_grad(set_to_none=True)  # PyTorch makes no state to read into where there are gradients
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    state[_GROUPS] = _saved_options(folder, saved, optimizer)
    stateless = set[str]()
    if any(name.startswith("optimizer.") for name in saved):
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_SOME)
        moments = state["optimizer"]["state"]
        stateless = {name for name in moments if not any(key.startswith(f"{_MOMENTS}{name}.") for key in saved)}
        for name in stateless:
            del moments[name]
    _check_fit(folder, saved, state)
    with _readable(folder):
        state_dict_loader.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    if "optimizer" in state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_SOME)
        _forget(model, optimizer, stateless)
    else:
        optimizer.state.clear()
    for group, options in zip(optimizer.param_groups, state[_GROUPS], strict=True):
        group.update(options)


def _own_folder(folder: str | Path) -> Path:
    """Where a checkpoint goes.

    Raises:
        BadInput: something else is there.
    """
    path = Path(folder).resolve()
    others = [] if path.is_dir() else [path.name] if path.exists() else []
    if path.is_dir():
        others = [file.name for file in path.iterdir() if file.name != _INDEX and file.suffix != ".distcp"]
    if others:
        wrong = f"it holds {sorted(others)[0]!r}, and a checkpoint has a folder of its own"
        raise BadInput(f"cannot write a checkpoint to '{folder}'", wrong, f"'{path / 'checkpoint'}'")
    return path


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups of an optimiser say, without their parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _saved_options(folder: Path, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each group that a checkpoint holds, to be read into.

    Raises:
        LoadMismatch: it has more or fewer groups.
    """
    found: dict[int, dict[str, Any]] = {}
    for name in saved:
        if name.startswith(f"{_GROUPS}."):
            _, number, option = name.split(".", 2)
            found.setdefault(int(number), {})[option] = None
    if len(found) != len(optimizer.param_groups):
        wrong = f"groups of parameters: {len(found)} in place of {len(optimizer.param_groups)}"
        raise LoadMismatch(f"the checkpoint '{folder}' is of another optimiser", wrong, _SAME)
    return [found[number] for number in sorted(found)]


def _forget(model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
    """Takes away the state that PyTorch made for parameters that had none."""
    gone = set(names)
    for name, parameter in model.named_parameters():
        if ".".join(part for part in name.split(".") if part not in _WRAPPERS) in gone:
            optimizer.state.pop(parameter, None)


def _check_fit(folder: str | Path, saved: Mapping[str, Any], state: dict[str, Any]) -> None:
    """Compares names and shapes of a checkpoint with those it is to be read into."""
    own = {f"model.{name}": value for name, value in state["model"].items()}
    moments = state.get("optimizer", {}).get("state", {})
    own |= {f"{_MOMENTS}{name}.{key}": value for name, held in moments.items() for key, value in held.items()}
    theirs = {name: told for name, told in saved.items() if name.startswith(("model.", _MOMENTS))}
    differ = [name for name in {**own, **theirs} if name not in own or name not in theirs]
    for name, value in own.items():
        told = getattr(theirs.get(name), "size", None)
        if told is not None and tuple(told) != tuple(value.shape):
            differ.append(name)
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        wrong = f"they differ in {', '.join(sorted(differ)[:3])}{more}"
        raise LoadMismatch(f"the checkpoint '{folder}' is of another model or optimiser", wrong, _SAME)


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """Says what is wrong with files that cannot be read."""
    try:
        yield
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        wrong = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CorruptFile(f"cannot read the checkpoint '{folder}'", wrong, "an older checkpoint") from error


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
