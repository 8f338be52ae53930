"""Several processes compute what one does: outputs, losses, gradients, trained weights, checkpoints, clear ends."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mmoe
import zoo
from mmoe import parallel
from mmoe.errors import BadInput, BadOverride, CorruptFile, LoadMismatch, MmoeError, Refused
from tests.processes import SECONDS, run

D, F, E, K, ROWS, STEPS = 16, 24, 8, 2, 7, 9


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), mmoe.build_moe(D, F, E, K, num_shared_experts=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Net(nn.Module):
    """Two blocks; the router of the second one leaves half of the experts without rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Linear(D, D), nn.Linear(D, 4)
        self.blocks = nn.ModuleList([Block(experts="ffn"), Block(router="topk:gate_bias=true")])
        with torch.no_grad():
            self.blocks[1].moe.router.bias[: E // 2] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def batch(step: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and targets of every process; once in a while the first one has none."""
    draw = torch.Generator().manual_seed(step)
    sizes = [0 if rank == 0 and step % 5 == 3 and world > 1 else ROWS + rank for rank in range(world)]
    return [(torch.randn(n, D, generator=draw), torch.randn(n, 4, generator=draw)) for n in sizes]


def mean_loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / ROWS


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def close(one: Tensor, other: Tensor, what: str) -> None:
    torch.testing.assert_close(whole(one), other, atol=1e-5, rtol=1e-5, msg=lambda text: f"{what}: {text}")


def backward(model: nn.Module, reference: nn.Module, step: int, rank: int, world: int, what: str = "") -> None:
    """A step's backward passes of this process's part and of one process; every gradient is the same."""
    data = batch(step, world)
    x, target = data[rank]
    y = model(x)
    loss = mean_loss(y, target)
    loss.backward()
    outputs = [reference(part) for part, _ in data]
    losses = [mean_loss(out, wanted) for out, (_, wanted) in zip(outputs, data, strict=True)]
    torch.stack(losses).mean().backward()
    close(y, outputs[rank], f"outputs{what}")
    close(loss, losses[rank], f"loss{what}")
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad, f"gradient of {name}{what}")


def check(results: list[Any]) -> None:
    assert results == ["done"] * len(results)


# ---- the same as one process ----


def train(rank: int, world: int, sizes: list[int]) -> str:
    for ep in sizes:
        reference, model = Net(), parallel.parallelize(Net(), parallel.make_mesh(ep))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        single = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
        for step in range(STEPS):
            backward(model, reference, step, rank, world, f", ep={ep}, step {step}")
            norm = parallel.clip_grad_norm_(model.parameters(), 0.5)
            close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.5), "norm")
            for taken in (optimizer, single):
                taken.step()
                taken.zero_grad()
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            close(ours, theirs, f"{name} after {STEPS} steps, ep={ep}")
    return "done"


@pytest.mark.parametrize(("world", "sizes"), [(2, [1, 2]), (4, [1, 2, 4])])
def test_a_training_run_is_that_of_one_process(world: int, sizes: list[int], tmp_path: Path) -> None:
    check(run(world, train, tmp_path, sizes))


def copies(rank: int, world: int) -> str:
    """Data parallel training by `DistributedDataParallel`, which needs a gradient of every parameter."""
    reference, model = Net(), nn.parallel.DistributedDataParallel(Net())
    for step in (0, 3):  # in step 3 the first process has no rows
        model.zero_grad()
        reference.zero_grad()
        backward(model, reference, step, rank, world)
    return "done"


def test_data_parallel_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    check(run(2, copies, tmp_path))


def balance(rank: int, world: int) -> str:
    torch.manual_seed(0)
    alone = mmoe.build_moe(D, F, E, K, bias_rate=0.1)
    together = copy.deepcopy(alone)
    data = torch.cat([x for x, _ in batch(0, world)])
    mine = batch(0, world)[rank][0]
    load = alone.router(data).load()
    with mmoe.trace(together) as routing:
        together(mine)
    mmoe.update_routers(together, routing)
    close(together.router.select_bias, 0.1 * (load.mean() - load).sign(), "bias")
    return "done"


def test_bias_balancing_counts_the_rows_of_all_processes(tmp_path: Path) -> None:
    check(run(2, balance, tmp_path))


def unfreeze(rank: int, world: int) -> str:
    """Experts that are trained from a later step on."""
    for ep in (1, world):
        reference, model = Net(), Net().requires_grad_(False)
        parallel.parallelize(model, parallel.make_mesh(ep)).requires_grad_(True)
        backward(model, reference, 0, rank, world, f", ep={ep}")
    return "done"


def test_parameters_that_were_frozen_at_first(tmp_path: Path) -> None:
    check(run(2, unfreeze, tmp_path))


def zoo_model(rank: int, world: int) -> str:
    """A model of the zoo, with its scalar and its two encoders."""
    reference, model = (zoo.load("clip_moe_tiny", device="cpu") for _ in range(2))
    parallel.parallelize(model, parallel.make_mesh(2), methods=["encode_image", "encode_text"])
    draw = torch.Generator().manual_seed(0)
    size = reference.config.image_size
    images = torch.randn(world, 3, 3, size, size, generator=draw)
    text = reference.tokenizer([f"a fox and {n} dogs" for n in range(3)])
    with torch.no_grad():
        close(model.encode_image(images[rank]), reference.encode_image(images[rank]), "encode_image")
        close(model.encode_text(text), reference.encode_text(text), "encode_text")
    model(images[rank], text).logits_per_image.square().mean().backward()
    sum(reference(part, text).logits_per_image.square().mean() for part in images).div(world).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                whole(ours.grad), theirs.grad, atol=1e-4, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
            )
    parallel.clip_grad_norm_(model.parameters(), 1.0)
    return "done"


def test_a_model_of_the_zoo(tmp_path: Path) -> None:
    check(run(2, zoo_model, tmp_path))


def refuse_prelu(rank: int, world: int) -> str:
    with pytest.raises(Refused, match=r"divide experts with the parameter 'act\.weight'"):
        parallel.parallelize(nn.Sequential(moe(act=nn.PReLU())), parallel.make_mesh(2))
    for group in parallel.make_mesh(2).get_all_groups():
        assert parallel._timeout(group, "cpu") == parallel._timeout(dist.group.WORLD, "cpu") != timedelta(minutes=30)
    return "done"


def test_experts_with_a_parameter_that_they_share(tmp_path: Path) -> None:
    check(run(4, refuse_prelu, tmp_path))


# ---- checkpoints ----


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, first: int) -> None:
    for step in (first, first + 1):
        x, target = batch(5 * step, world)[rank]
        mean_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def start(ep: int | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net()
    if ep is not None:
        parallel.parallelize(model, parallel.make_mesh(ep))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def write(rank: int, world: int, ep: int, folder: Path) -> dict[str, Tensor]:
    model, optimizer = start(ep)
    take_steps(model, optimizer, rank, world, 0)
    for _ in range(2):  # the second one replaces the first
        parallel.save_checkpoint(folder, model, optimizer)
    return weights(model)


def read(rank: int, world: int, ep: int, folder: Path, new: Path) -> tuple[dict[str, Tensor], float]:
    model, optimizer = start(ep)
    parallel.load_checkpoint(folder, model, optimizer)
    found = weights(model)
    parallel.save_checkpoint(new, model, optimizer)
    return found, float(max(state["step"] for state in optimizer.state.values()))


def test_checkpoints_move_between_numbers_of_processes(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    written = run(4, write, tmp_path, 2, first)[0]
    on_two, steps = run(2, read, tmp_path, 2, first, second)[0]
    assert steps == 2
    model, optimizer = start(None)
    parallel.load_checkpoint(second, model, optimizer)
    back, _ = run(4, read, tmp_path, 4, second, third)[0]
    for name, value in written.items():
        for found in (on_two, weights(model), back):
            assert torch.equal(found[name], value), name
    parallel.save_checkpoint(third, model, optimizer)
    fresh, other = start(None)
    parallel.load_checkpoint(third, fresh, other)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(fresh).items())
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def resume(rank: int, world: int, folder: Path) -> str:
    """Saving changes nothing, before the first step too, and loading goes on where the saved run was."""
    found = []
    for case in ("undisturbed", "saved", "resumed"):
        model, optimizer = start(2)
        if case == "resumed":
            mean_loss(model(batch(0, world)[rank][0]), torch.zeros(1)).backward()  # gradients that are in the way
            parallel.load_checkpoint(folder / "0", model, optimizer)
            assert not optimizer.state
            parallel.load_checkpoint(folder / "2", model, optimizer)
        for step in range(0 if case != "resumed" else 2, 4, 2):
            if case == "saved":
                parallel.save_checkpoint(folder / str(step), model, optimizer)
            take_steps(model, optimizer, rank, world, step)
        found.append(weights(model))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value) and torch.equal(found[2][name], value), name
    return "done"


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    check(run(2, resume, tmp_path, tmp_path / "runs"))


class Partly(nn.Module):
    """A layer of it is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe, self.unused = mmoe.build_moe(D, F, E, K), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)


def save_partly(rank: int, world: int, folder: Path) -> str:
    made = []
    for _ in range(2):
        model = parallel.parallelize(Partly(), parallel.make_mesh(2))
        made.append((model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)))
    (model, optimizer), (fresh, other) = made
    model(torch.randn(ROWS, D)).square().mean().backward()
    optimizer.step()
    parallel.save_checkpoint(folder, model, optimizer)
    for ours, state in ((fresh, other), (model, optimizer)):
        parallel.load_checkpoint(folder, ours, state)
        held = {name for name, parameter in ours.named_parameters() if parameter in state.state}
        assert held and not any("unused" in name for name in held)
    return "done"


def test_parameters_that_never_had_a_gradient_have_no_state(tmp_path: Path) -> None:
    check(run(2, save_partly, tmp_path, tmp_path / "a"))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_learning_rate_is_that_of_the_checkpoint(tmp_path: Path, kind: Any) -> None:
    model = Net()
    optimizer, other = kind(model.parameters(), lr=0.5), kind(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    schedule.step()
    parallel.save_checkpoint(tmp_path / "a", model, optimizer)
    parallel.load_checkpoint(tmp_path / "a", model, other)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


class TestFoldersOfCheckpoints:
    def test_a_run_that_is_killed_between_two_names_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, optimizer = start(None)
        parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        rename = Path.rename

        def killed(path: Path, target: Path) -> Path:
            if path.name == ".a.tmp":
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        parallel.load_checkpoint(tmp_path / "a", model, optimizer)
        parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize("name", ["notes.txt", "best/model.pt"])
    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True)
        file.write_text("precious")
        for target in (tmp_path / "run", file):
            with pytest.raises(BadInput, match="a checkpoint has a folder of its own"):
                parallel.save_checkpoint(target, *start(None))
        assert file.read_text() == "precious"

    def test_links_and_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "latest").symlink_to("real")
        model, optimizer = start(None)
        parallel.save_checkpoint(tmp_path / "latest", model, optimizer)
        assert (tmp_path / "latest").is_symlink() and (tmp_path / "real" / ".metadata").exists()
        monkeypatch.chdir(tmp_path / "real")
        parallel.save_checkpoint(".", model, optimizer)
        parallel.load_checkpoint(tmp_path / "latest", model, optimizer)


class TestCheckpointsThatDoNotFit:
    def test_another_number_of_groups(self, tmp_path: Path) -> None:
        model, optimizer = start(None)
        parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        groups = [{"params": model.inp.parameters()}, {"params": model.blocks.parameters()}]
        with pytest.raises(LoadMismatch, match="groups of parameters: 1 in place of 2"):
            parallel.load_checkpoint(tmp_path / "a", model, torch.optim.AdamW(groups))

    def test_other_models_and_optimisers(self, tmp_path: Path) -> None:
        model, optimizer = start(None)
        mean_loss(model(torch.randn(ROWS, D)), torch.zeros(1)).backward()
        optimizer.step()
        parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        before = copy.deepcopy(model.state_dict())
        model.more = nn.Linear(2, 2)
        self.check_refused(tmp_path / "a", model, torch.optim.AdamW(model.parameters()), "model.more.bias")
        del model.more, model.blocks[1]
        self.check_refused(tmp_path / "a", model, torch.optim.AdamW(model.parameters()), "model.blocks.1")
        other = Net()
        self.check_refused(tmp_path / "a", other, torch.optim.SGD(other.parameters()), "optimizer.state.blocks")
        wide = Net()
        wide.out = nn.Linear(D, 5)
        self.check_refused(tmp_path / "a", wide, torch.optim.AdamW(wide.parameters()), "model.out")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def check_refused(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
        with pytest.raises(LoadMismatch, match=f"they differ in .*{name}"):
            parallel.load_checkpoint(folder, model, optimizer)

    def test_broken_files(self, tmp_path: Path) -> None:
        model, optimizer = start(None)
        (tmp_path / ".a.tmp").mkdir()
        (tmp_path / ".a.tmp" / "left.distcp").touch()
        parallel.save_checkpoint(tmp_path / "a", model, optimizer)
        (data,) = (tmp_path / "a").glob("*.distcp")
        data.write_bytes(data.read_bytes()[:100])
        with pytest.raises(CorruptFile, match="cannot read the checkpoint"):
            parallel.load_checkpoint(tmp_path / "a", model, optimizer)
        (tmp_path / "a" / ".metadata").write_bytes(b"none")
        with pytest.raises(CorruptFile, match="cannot read the checkpoint"):
            parallel.load_checkpoint(tmp_path / "a", model, optimizer)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no checkpoint in"):
        parallel.load_checkpoint(tmp_path, *start(None))


# ---- clear ends ----


def moe(seed: int = 0, hidden_dim: int = F, experts: int = E, **options: Any) -> mmoe.MoE:
    torch.manual_seed(seed)
    return mmoe.build_moe(D, hidden_dim, experts, K, **options)


def differ(rank: int, world: int) -> str:
    mesh = parallel.make_mesh(2)
    frozen = moe()
    frozen.experts.requires_grad_(rank == 0)
    for model, what in (
        (moe(hidden_dim=F + 8 * rank), "the mesh, or in names, shapes or types of tensors"),
        (moe(act="gelu" if rank else "silu"), "classes, options or what is frozen"),
        (moe(score="sigmoid" if rank else "softmax"), "classes, options or what is frozen"),
        (frozen, "classes, options or what is frozen"),
        (moe(seed=rank), "the values of tensors"),
    ):
        with pytest.raises(BadInput, match=f"processes 1 differ from process 0 in {what}"):
            parallel.parallelize(nn.Sequential(model), mesh)
    uneven = nn.Sequential(moe(), moe(experts=7))
    with pytest.raises(Refused, match="divide 7 experts among 2 processes"):
        parallel.parallelize(uneven, mesh)
    assert not any(hasattr(parameter, "to_local") for parameter in uneven.parameters()), "it is as it was"
    layer, tied = moe(), nn.Sequential(moe(), moe())
    tied[1].experts.down_proj = tied[0].experts.down_proj
    for shared, name in ((nn.Sequential(layer, layer), "0.experts.gate_up_proj"), (tied, "0.experts.down_proj")):
        with pytest.raises(Refused, match=f"divide the parameter '{name}', which is '1"):
            parallel.parallelize(shared, mesh)
    model = parallel.parallelize(nn.Sequential(moe(), moe()), mesh)
    mixed = Net().bfloat16()
    mixed.blocks[1].moe.router.float()
    with pytest.raises(Refused, match=r"divide the parameter 'blocks.1.moe.router.weight'\n  it is torch.float32"):
        parallel.parallelize(mixed, parallel.make_mesh(2))
    with pytest.raises(Refused, match="parallelize a model again"):
        parallel.parallelize(model, mesh)
    with pytest.raises(BadOverride, match="ep=3\n  ep is a whole number from 1 to 2"):
        parallel.make_mesh(3)
    return "done"


def test_models_that_differ_are_told(tmp_path: Path) -> None:
    check(run(2, differ, tmp_path))


def lose(rank: int, world: int) -> str:
    model = parallel.parallelize(Net(), parallel.make_mesh(2))
    for step in range(3):
        if rank == 1 and step == 1:
            os._exit(1)
        model(batch(0, world)[rank][0]).sum().backward()
    return "done"


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    survivor, dead = run(2, lose, tmp_path)
    assert dead is None
    assert isinstance(survivor, MmoeError | RuntimeError)
    assert re.search(r"rows could not be exchanged|gloo|Connection|peer", str(survivor)), survivor


LOST = """
import os
import torch
from torch import nn
from mmoe import parallel

mesh = parallel.make_mesh(ep=1)
torch.manual_seed(0)
model = parallel.parallelize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), mesh)
for step in range(3):
    if step == 1 and os.environ["RANK"] == "1":
        os._exit(1)
    model(torch.randn(4, 8)).sum().backward()
"""


def test_a_process_that_dies_in_a_collective_of_pytorch_is_explained(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    survivor, dead = (
        subprocess.Popen([sys.executable, tmp_path / "lost.py"], env={**common, "RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    )
    told = survivor.communicate(timeout=SECONDS)[1].decode()
    assert dead.wait(SECONDS) == 1 and survivor.returncode != 0
    assert "Another process ended first, or runs other layers: read the other processes' messages." in told


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BadInput, match="this process has no others") as error:
        parallel.make_mesh(2)
    assert error.value.fix == "torchrun --nproc-per-node 2 SCRIPT.py"
