"""Memory of large tensors: values, types, who owns it, when it is handed out again."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import mmoe
from mmoe import memory

FLOAT, HALF = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def none_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LEAST", 64)
    memory.release()
    yield
    memory.release()


@pytest.mark.parametrize("least", [0, 10**9])
@pytest.mark.parametrize("like", [FLOAT, HALF])
def test_zeros(least: int, like: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAST", least)
    one, other = (memory.zeros((3, 4, 5), like) for _ in range(2))
    assert one.shape == (3, 4, 5) and one.dtype == like.dtype and not one.any()
    one += 1
    assert not other.any() and one.sum() == 60


def test_memory_is_handed_out_again_when_nobody_has_it() -> None:
    first = memory.empty((64, 80), FLOAT)
    second = memory.empty((64, 80), FLOAT)
    view, places = first[3:], {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    del first, second
    third, fourth = memory.empty((128, 80), HALF), memory.empty((64, 80), FLOAT)
    assert third.dtype == torch.bfloat16 and third.data_ptr() in places, "the view holds the other one"
    assert fourth.data_ptr() not in places
    del view
    assert memory.empty((64, 80), FLOAT).data_ptr() in places


def test_zeros_are_zero_although_memory_was_used() -> None:
    memory.empty((64, 80), FLOAT).fill_(1.0)
    assert not memory.zeros((64, 80), FLOAT).any()


def test_sizes_of_a_class_share_memory() -> None:
    place = memory.empty((1000, 1000), FLOAT).data_ptr()
    assert memory.empty((999, 1000), FLOAT).data_ptr() == place
    assert memory.empty((500, 1000), FLOAT).data_ptr() != place


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_KEPT", 3 * 2**20)
    held = [memory.empty((2**18,), FLOAT) for _ in range(5)]
    large = memory.empty((2**20,), FLOAT)
    held.clear()
    assert memory.kept() == 3 * 2**20
    del large
    assert memory.kept() == 3 * 2**20, "what is larger than all that is kept pushes nothing out"
    memory.release()
    assert memory.kept() == 0


def test_threads_share_it_one_at_a_time() -> None:
    wrong: list[str] = []

    def work(value: float) -> None:
        for _ in range(300):
            mine = memory.empty((2**14,), FLOAT).fill_(value)
            if not bool((mine == value).all()):
                wrong.append("another thread wrote to it")

    workers = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and memory.kept() <= 2 * 4 * 2**16, "each holds one while it takes the next"


def test_the_garbage_collector_may_give_back_at_any_moment() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.value, self.me = memory.empty((2**14,), FLOAT), self

    held = [memory.empty((2**14,), FLOAT) for _ in range(60)]
    del held
    before = gc.get_threshold()
    try:
        for turn in range(500):
            Cycle()
            gc.set_threshold(1 + turn % 40)
            memory.empty((2**14,), FLOAT)
            memory.kept()
    finally:
        gc.set_threshold(*before)


def test_where_the_system_has_no_more_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    memory.empty((64, 80), FLOAT)
    assert memory.kept() > 0
    monkeypatch.setattr(memory.mmap, "mmap", nothing)
    assert memory.empty((640, 80), FLOAT).shape == (640, 80) and memory.kept() == 0
    assert not memory.zeros((64, 80), FLOAT).any()
    with pytest.raises(RuntimeError, match="allocate"):
        memory.empty((2**50,), FLOAT)


def test_copies_and_pickles_are_of_the_tensor_alone() -> None:
    value = memory.empty((1000, 1001), FLOAT).fill_(2.0)
    assert value.untyped_storage().nbytes() == 4 * 1000 * 1001
    assert torch.equal(copy.deepcopy(value), value)
    assert torch.equal(pickle.loads(pickle.dumps(value)), value)


@pytest.mark.parametrize("make", [memory.zeros, memory.empty])
def test_it_becomes_the_gradient_itself(make: Callable[..., Tensor]) -> None:
    places = []

    class Ones(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            made = make((64, 64), grad).fill_(1.0)
            places.append(made.data_ptr())
            return made

    x = torch.ones(64, 64, requires_grad=True)
    Ones.apply(x).backward()
    kept = x.grad
    assert kept is not None and kept.data_ptr() == places[0]
    del x
    gc.collect()
    kept += 1
    assert kept.sum() == 2 * 64 * 64


def test_inference_leaves_memory_that_training_can_use() -> None:
    with torch.inference_mode():
        memory.empty((512, 512), FLOAT)
    x = torch.randn(512, 512)
    torch.mm(x, x, out=memory.empty((512, 512), x))


def test_steps_of_training_use_the_same_memory() -> None:
    moe = mmoe.build_moe(64, 128, 4, 2, backend="fused")
    host, x = nn.Sequential(nn.Linear(64, 64), moe), torch.randn(100, 64)
    optimizer, sizes = torch.optim.SGD(host.parameters(), 0.1), []
    for _ in range(6):
        optimizer.zero_grad()
        host(x).square().sum().backward()
        optimizer.step()
        sizes.append(memory.kept())
    optimizer.zero_grad()
    assert sizes[2:] == sizes[2:3] * 4 and memory.kept() > sizes[-1]
