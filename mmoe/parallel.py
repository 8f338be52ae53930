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
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmoe.errors import BadInput, BadOverride, MmoeError, Refused
from mmoe.experts.base import Experts
from mmoe.options import check_int
from mmoe.sharded_checkpoint import load_checkpoint, save_checkpoint

__all__ = ["clip_grad_norm_", "init", "load_checkpoint", "make_mesh", "parallelize", "save_checkpoint"]


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
    mesh = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))
    for group in mesh.get_all_groups():  # their own would be half an hour
        dist.distributed_c10d._set_pg_timeout(_timeout(dist.group.WORLD, device), group)
    return mesh


def _timeout(group: Any, device: str) -> timedelta:
    """How long a process of a group waits for the others."""
    found: timedelta = group._get_backend(torch.device(device)).options._timeout
    return found


def parallelize(model: nn.Module, mesh: DeviceMesh, methods: Iterable[str] = ()) -> nn.Module:
    """Shards a model in place: experts over "ep", everything over all processes with `fully_shard`.

    Build the optimiser afterwards, with foreach=False, and clip gradients with `clip_grad_norm_` of this file. Every
    process has to run every layer in every pass, if need be with no rows.

    Args:
        model: the same in every process: weights, options and all.
        mesh: of `make_mesh`.
        methods: of the model that run its layers, besides `forward`: "encode_image", ...

    Returns:
        The model.

    Raises:
        BadInput: the processes hold different models.
        Refused: parts cannot be divided among the processes. The model is as it was.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise Refused("parallelize a model again", "its parameters are sharded", "build it anew")
    experts = [module for module in model.modules() if isinstance(module, Experts) and module.packed_parameters()]
    blocks = _blocks(model)
    _check_same_everywhere(model, mesh)
    _check_divisible(model, experts, blocks, mesh)
    world: DeviceMesh = mesh._flatten("world")
    whole = set[nn.Parameter]()  # experts of which every process has others, and scalars: nothing is left to shard
    for module in experts:
        if mesh["ep"].size() > 1:
            _shard_experts(module, mesh["ep"])
        if mesh["dp"].size() > 1:
            sharded: Any = fully_shard(module, mesh=mesh["dp"])
            sharded.set_gradient_divide_factor(float(world.size()))
            sharded.set_force_sum_reduction_for_comms(True)
            continue
        for parameter in module.packed_parameters().values():
            whole.add(_keep_whole(parameter, world, lambda grad: grad / world.size()))
    for parameter in model.parameters():
        if not parameter.ndim:
            whole.add(_keep_whole(parameter, world, lambda grad: _mean(grad, world.get_group())))
    for block in [*blocks, model]:
        fully_shard(block, mesh=world, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def held_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that lie in this process, and those of the whole model.

    >>> held_parameters(nn.Linear(3, 2))
    (8, 8)
    """
    pairs = [(p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()) for p in model.parameters()]
    return sum(here for here, _ in pairs), sum(whole for _, whole in pairs)


def reshard(model: nn.Module) -> None:
    """Gives every process its part of the weights again, which a forward without backward leaves whole.

    Without it the next backward adds to gradients of before, and weights that are set in between are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _keep_whole(parameter: nn.Parameter, mesh: DeviceMesh, hook: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Does for a parameter what FSDP would; the hook of its gradient is there too when it is trained later."""
    trained, parameter.data = parameter.requires_grad, parameter.data.to(mesh.device_type)
    parameter.requires_grad_(True).register_hook(hook)
    parameter.requires_grad_(trained)
    return parameter


def _mean(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over the processes."""
    total = grad.clone()
    dist.all_reduce(total, group=group)
    return total / group.size()


def _check_same_everywhere(model: nn.Module, mesh: DeviceMesh) -> None:
    """Processes with different models would wait for each other for ever, or train a mixture of them."""
    told = [f"{name} {type(module).__name__} {_settings(module)}" for name, module in model.named_modules()]
    told += [f"{name} {p.requires_grad}" for name, p in model.named_parameters()]
    tensors = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    values = [None if value.is_meta else float(value.double().sum()) for value in model.state_dict().values()]
    own = [_digest(part) for part in ([str(mesh.mesh.tolist()), *tensors], told, values)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    fixes = {
        "the mesh, or in names, shapes or types of tensors": "build it from the same config in every process",
        "classes, options or what is frozen": "build it from the same config in every process",
        "the values of tensors": "torch.manual_seed(0) before it is built, or the same weights in every process",
    }
    for part, (what, fix) in enumerate(fixes.items()):
        others = [rank for rank, parts in enumerate(found) if parts[part] != found[0][part]]
        if others:
            wrong = f"processes {', '.join(map(str, others))} differ from process 0 in {what}"
            raise BadInput("parallelize a model", wrong, fix)


def _settings(module: nn.Module) -> list[str]:
    """Plain values and functions of a module that say what it computes."""
    found = {name: getattr(value, "__qualname__", value) for name, value in vars(module).items() if name[0] != "_"}
    plain = (bool, int, float, str, type(None))
    return [
        f"{name}={value!r}"
        for name, value in sorted(found.items())
        if all(isinstance(part, plain) for part in (value if isinstance(value, tuple) else (value,)))
    ]


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _check_divisible(model: nn.Module, experts: list[Experts], blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Finds what cannot be sharded before anything is.

    Raises:
        Refused: there is such a part.
    """
    for module in experts:
        packed = module.packed_parameters()
        count = len(next(iter(packed.values())))
        if count % mesh["ep"].size():
            asked = f"divide {count} experts among {mesh['ep'].size()} processes"
            wrong = "each process holds as many as the others"
            raise Refused(asked, wrong, "another ep, or another number of experts")
        others = [name for name, _ in module.named_parameters() if name not in packed]
        if others and min(mesh["ep"].size(), mesh["dp"].size()) > 1:
            wrong = "every expert uses it, and the processes of one set of experts would train it apart"
            raise Refused(f"divide experts with the parameter {others[0]!r}", wrong, "ep=1, or ep of all processes")
    alone = {id(parameter) for module in experts for parameter in module.packed_parameters().values()}
    _check_units(model, {id(unit) for unit in [*blocks, *experts]}, alone)


def _check_units(model: nn.Module, units: set[int], alone: set[int]) -> None:
    """Modules that are sharded one by one, here by id, have parameters of their own and of one type.

    Args:
        model: holds them; others in it may give one parameter two names.
        units: ids of the modules.
        alone: ids of the parameters of experts, which are sharded apart.

    Raises:
        Refused: two share one, or one has several types.
    """
    paths = {name for name, module in model.named_modules(remove_duplicate=False) if name and id(module) in units}
    owners: dict[nn.Parameter, tuple[str, str]] = {}
    types: dict[str, tuple[torch.dtype, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = max((path for path in paths if name.startswith(f"{path}.")), key=len, default="")
        first_unit, first = owners.setdefault(parameter, (unit, name))
        if unit != first_unit:
            wrong = "a parameter of several layers cannot be sharded with each of them"
            raise Refused(f"divide the parameter {first!r}, which is {name!r} too", wrong, "a copy for each layer")
        if not parameter.ndim or id(parameter) in alone:
            continue
        dtype, other = types.setdefault(unit, (parameter.dtype, name))
        if parameter.dtype != dtype:
            wrong = f"it is {parameter.dtype}, and {other!r} of the same layer is {dtype}"
            raise Refused(f"divide the parameter {name!r}", wrong, "model.to(torch.float32)")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Elements of the outermost stacks of layers, each a unit that is gathered at once."""
    found: list[nn.Module] = []
    for child in model.children():
        stack = isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1
        found += [block for block in child.children() if list(block.parameters())] if stack else _blocks(child)
    return found


def _shard_experts(experts: Experts, mesh: DeviceMesh) -> None:
    for name, value in experts.packed_parameters().items():
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
