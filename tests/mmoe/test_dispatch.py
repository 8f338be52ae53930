"""Sorting rows to experts and back, and grouped products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmoe import Routing, dispatch, grouped_linear
from mmoe.dispatch import combine
from mmoe.errors import BadOverride

E = 4


def routing_of(experts: list[list[int]], weights: Tensor | None = None) -> Routing:
    ids = torch.tensor(experts)
    return Routing(experts=ids, weights=torch.ones(ids.shape) if weights is None else weights, num_experts=E)


class TestDispatch:
    def test_rows_are_sorted_by_expert_and_keep_their_order(self) -> None:
        token_idx, counts, _ = dispatch(routing_of([[2, 0], [0, 3], [2, 3], [0, 2]]))
        assert token_idx.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
        assert counts.tolist() == [3, 0, 3, 2]

    def test_sentinels_are_dropped(self) -> None:
        token_idx, counts, weights = dispatch(routing_of([[E, 1], [E, E], [0, E]]))
        assert token_idx.tolist() == [2, 0] and counts.tolist() == [1, 1, 0, 0] and len(weights) == 2

    def test_nothing_used(self) -> None:
        token_idx, counts, weights = dispatch(routing_of([[E, E]]))
        assert len(token_idx) == len(weights) == 0 and counts.tolist() == [0] * E

    def test_weights_stay_with_their_slot(self) -> None:
        weights = torch.rand(6, 2, requires_grad=True)
        ids = torch.stack([torch.randperm(E)[:2] for _ in range(6)])
        token_idx, counts, sorted_weights = dispatch(Routing(experts=ids, weights=weights, num_experts=E))
        expert = torch.arange(E).repeat_interleave(counts)
        for row, e, weight in zip(token_idx, expert, sorted_weights, strict=True):
            assert weight == weights[row][ids[row] == e]
        sorted_weights.sum().backward()
        assert weights.grad is not None and (weights.grad == 1).all()

    def test_a_promise_of_used_slots_gives_the_same(self) -> None:
        routing = routing_of([[2, 0], [0, 3], [2, 3]])
        promised = Routing(experts=routing.experts, weights=routing.weights, num_experts=E, all_used=True)
        for a, b in zip(dispatch(routing), dispatch(promised), strict=True):
            assert torch.equal(a, b)

    def test_combine_is_the_weighted_sum_per_row(self) -> None:
        routing = routing_of([[1, 0], [E, 1], [E, E]], torch.tensor([[0.25, 0.75], [0.0, 2.0], [0.0, 0.0]]))
        sent = dispatch(routing)
        outputs = torch.tensor([[1.0, 1.0], [10.0, 20.0], [100.0, 200.0]])
        assert combine(outputs, sent, 3).tolist() == [[3.25, 5.75], [200.0, 400.0], [0.0, 0.0]]

    def test_combine_keeps_the_outputs_precision(self) -> None:
        sent = dispatch(routing_of([[1, 0]]))
        assert combine(torch.ones(2, 3, dtype=torch.bfloat16), sent, 1).dtype == torch.bfloat16


class TestGroupedLinear:
    @pytest.mark.parametrize("backend", ["auto", "loop", "grouped"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_one_linear_layer_per_group(self, backend: str, bias: bool) -> None:
        counts = torch.tensor([2, 0, 3, 1])
        x, weight = torch.randn(6, 8), torch.randn(E, 4, 8)
        biases = torch.randn(E, 4) if bias else None
        got = grouped_linear(x, weight, counts, biases, backend)
        owner = torch.arange(E).repeat_interleave(counts)
        expected = torch.einsum("ni,noi->no", x, weight[owner])
        torch.testing.assert_close(got, expected if biases is None else expected + biases[owner])

    @pytest.mark.parametrize(
        ("rows", "inputs", "outputs", "dtype"),
        [
            (6, 7, 4, torch.float32),
            (6, 8, 3, torch.float32),
            (6, 12, 4, torch.bfloat16),
            (0, 8, 4, torch.float32),
            (6, 8, 4, torch.float64),
            (6, 8, 4, torch.float16),
        ],
    )
    def test_auto_falls_back_where_grouped_mm_may_not_run(
        self, rows: int, inputs: int, outputs: int, dtype: torch.dtype
    ) -> None:
        x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(E, outputs, inputs, dtype=dtype)
        counts = torch.tensor([rows, 0, 0, 0])
        y = grouped_linear(x, weight, counts)
        torch.testing.assert_close(y, x @ weight[0].T, atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=1e-2)
        assert y.shape == (rows, outputs) and y.dtype == dtype

    @pytest.mark.parametrize(
        ("inputs", "dtype"), [(6, torch.float32), (12, torch.bfloat16), (6, torch.float16), (8, torch.float64)]
    )
    def test_grouped_products_of_shapes_that_they_forbid(self, inputs: int, dtype: torch.dtype) -> None:
        x, weight = torch.randn(5, inputs, dtype=dtype), torch.randn(E, 8, inputs, dtype=dtype)
        with pytest.raises(BadOverride) as error:
            grouped_linear(x, weight, torch.tensor([5, 0, 0, 0]), backend="grouped")
        assert error.value.asked == f"backend='grouped' for experts of {inputs} inputs and 8 outputs in {dtype}"
        assert error.value.fix == "backend='auto'"

    def test_autocast_gives_its_dtype_as_linear_layers_do(self) -> None:
        x, weight, counts = torch.randn(4, 8), torch.randn(E, 8, 8), torch.tensor([1, 1, 1, 1])
        expected = grouped_linear(x.bfloat16(), weight.bfloat16(), counts, torch.ones(E, 8).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            for backend in ("auto", "loop", "grouped"):
                y = grouped_linear(x, weight, counts, torch.ones(E, 8), backend)
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y, expected, atol=0.05, rtol=0.02)

    def test_gradients_under_compile_equal_those_without(self) -> None:
        counts = torch.tensor([2, 0, 3, 1])

        def run(function: object) -> list[Tensor]:
            torch.manual_seed(0)
            x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(E, 4, 8, requires_grad=True)
            y = function(x, weight, counts, None, "grouped")
            (y * torch.arange(24.0).view(6, 4)).sum().backward()
            return [y, x.grad, weight.grad]

        torch._dynamo.reset()
        compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
        for a, b in zip(run(compiled), run(grouped_linear), strict=True):
            torch.testing.assert_close(a, b)
