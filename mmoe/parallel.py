"""Models over several processes: expert parallelism, and FSDP2 around it, on PyTorch's device meshes.

    mesh = parallel.make_mesh(ep=2)        # processes as a (dp, ep) mesh
    parallel.parallelize(model, mesh)      # experts over "ep", the rest and the experts' copies sharded over the others

Every process feeds its own rows. In front of sharded experts the rows travel to the processes that hold their experts,
behind them the results travel back (GShard, Lepikhin et al. 2020, arXiv 2006.16668, section 3.2), with all-to-all of
uneven sizes and without capacity. Losses are means over the rows of a process, so gradients are means over processes.
Works with gloo on CPUs and NCCL on GPUs. Commands, and what was tested: README.md.
Shapes: N slots sorted by expert, E experts, D width, P processes of the "ep" dimension.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmoe.errors import BadInput, BadOverride, MmoeError, Refused
from mmoe.experts.base import Experts
from mmoe.options import check_int


def init(timeout: float = 600.0) -> None:
    """Joins the processes that `torchrun` or `accelerate launch` started; does nothing when that was done.

    Args:
        timeout: seconds after which a process that hears nothing from the others gives up.

    Raises:
        BadInput: this process was not started by a launcher.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        fix = "torchrun --nproc-per-node 2 SCRIPT.py"
        raise BadInput("this process has no others", "no launcher set $RANK and $WORLD_SIZE", fix)
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout))
    atexit.register(_leave)
    _explain_lost_processes()


def _explain_lost_processes() -> None:
    """What gloo and NCCL say when another process is gone names a socket; tracebacks that end a program say more."""
    show = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL")):
            error.add_note("Another process ended first, or runs other layers: read the other processes' messages.")
        show(kind, error, trace)

    sys.excepthook = explain


def _leave() -> None:
    """Ends the threads that talk to the others; the interpreter can abort where they still run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(ep: int = 1) -> DeviceMesh:
    """All processes as a mesh of dimensions "dp" and "ep".

    Args:
        ep: processes that share one set of experts; the number of all processes is a multiple of it.

    Raises:
        BadOverride: it is not.
    """
    init()
    world = dist.get_world_size()
    check_int("ep", ep, 1, world)
    if world % ep:
        works = max(size for size in range(1, ep) if world % size == 0)
        raise BadOverride(f"ep={ep} with {world} processes", "the processes cannot be divided evenly", f"ep={works}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shards a model in place: experts over "ep", everything over all processes with `fully_shard`.

    Build the optimiser afterwards, with foreach=False, and clip gradients with `clip_grad_norm_` of this file.

    Args:
        model: the same in every process: weights, options and all.
        mesh: of `make_mesh`.

    Returns:
        The model.

    Raises:
        BadInput: the processes hold different models.
        Refused: a layer's experts cannot be divided among the processes.
    """
    _check_same_everywhere(model, mesh)
    world: DeviceMesh = mesh._flatten("world")
    experts = [module for module in model.modules() if isinstance(module, Experts) and module.packed_parameters()]
    whole = set[nn.Parameter]()  # experts of which every process has others: there is nothing left to shard
    for module in experts:
        if mesh["ep"].size() > 1:
            _shard_experts(module, mesh["ep"])
        if mesh["dp"].size() > 1:
            sharded: Any = fully_shard(module, mesh=mesh["dp"])
            sharded.set_gradient_divide_factor(float(world.size()))
            sharded.set_force_sum_reduction_for_comms(True)
            continue
        for parameter in module.packed_parameters().values():
            whole.add(parameter)
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad / world.size())
    for block in [*_blocks(model), model]:
        fully_shard(block, mesh=world, ignored_params=whole)
    return model


def _check_same_everywhere(model: nn.Module, mesh: DeviceMesh) -> None:
    """Processes with different models would wait for each other for ever."""
    shapes = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    own = hashlib.sha256("\n".join([str(mesh.mesh.tolist()), *shapes]).encode()).hexdigest()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (own, len(shapes)))
    others = [rank for rank, told in enumerate(found) if told != found[0]]
    if others:
        wrong = f"processes {', '.join(map(str, others))} differ from process 0 in names, shapes or types of tensors"
        raise BadInput("parallelize a model", wrong, "build it from the same config in every process")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Elements of the outermost stacks of layers, each a unit that is gathered at once."""
    found: list[nn.Module] = []
    for child in model.children():
        stack = isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1
        found += [block for block in child.children() if list(block.parameters())] if stack else _blocks(child)
    return found


def _shard_experts(experts: Experts, mesh: DeviceMesh) -> None:
    packed = experts.packed_parameters()
    count = len(next(iter(packed.values())))
    if count % mesh.size():
        asked = f"divide {count} experts among {mesh.size()} processes"
        raise Refused(asked, "each process holds as many as the others", "another ep, or another number of experts")
    for name, value in packed.items():
        local = nn.Parameter(distribute_tensor(value.data, mesh, [Shard(0)]), requires_grad=value.requires_grad)
        setattr(experts, name, local)
    exchange = _Exchange(mesh.get_group())
    experts.register_forward_pre_hook(exchange.send)
    experts.register_forward_hook(exchange.bring_back)


class _Exchange:
    """Takes sorted rows to the processes that hold their experts, and the results back.

    Args:
        group: P processes; process p holds experts p * E/P to (p + 1) * E/P - 1.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.processes = group, group.size()
        self._under_way: list[tuple[Tensor, list[int], list[int]]] = []

    def send(self, experts: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows (N, D) sorted by expert with counts (E,) -> rows of the own experts, with counts (E/P,)."""
        x, counts = args
        arriving = torch.empty_like(counts)
        try:
            dist.all_to_all_single(arriving, counts, group=self.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            wrong = f"another process ended, or runs other layers: {reason}"
            raise MmoeError("rows could not be exchanged", wrong, "read the other processes' messages") from error
        table = arriving.view(self.processes, -1)  # (P, E/P)
        leaving, coming = counts.view(self.processes, -1).sum(1).tolist(), table.sum(1).tolist()
        rows = collectives.all_to_all_single_autograd(x.contiguous(), coming, leaving, self.group)
        ids = torch.arange(table.shape[1], device=x.device).repeat(self.processes)
        order = ids.repeat_interleave(table.flatten(), output_size=len(rows)).argsort(stable=True)
        self._under_way.append((order, leaving, coming))
        return rows[order], table.sum(0)

    def bring_back(self, experts: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Results of the own experts -> results (N, D) in the order that the rows were sent in."""
        order, leaving, coming = self._under_way.pop()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        result: Tensor = collectives.all_to_all_single_autograd(out[inverse], leaving, coming, self.group)
        return result


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their norm is at most `max_norm`; parameters may live on different meshes.

    Returns:
        The norm before.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [nn.utils.get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(whole).norm() if whole else torch.zeros(())
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.mul_(scale.to(local.device))
    return total


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes weights and optimiser state, each process its part; any number of processes can read them.

    The folder takes its name when everything is written; an older one stays until then.
    """
    folder, state = Path(folder), _state(model, optimizer)
    temporary = folder.with_name(f".{folder.name}.tmp")
    state_dict_saver.save(state, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads what `save_checkpoint` wrote, on the same or another number of processes.

    Raises:
        BadInput: there is no checkpoint.
    """
    if not (Path(folder) / ".metadata").exists():
        raise BadInput(f"no checkpoint in '{folder}'", "it has no .metadata", "a folder of save_checkpoint")
    state = _state(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}
