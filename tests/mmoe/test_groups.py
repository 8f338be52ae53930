"""Slots by group and expert, and what an expert tells about the group."""

from __future__ import annotations

import math

import pytest
import torch

import mmoe
from mmoe import Context, Routing
from mmoe.errors import BadInput
from mmoe.groups import entropy_bits, group_counts, mutual_information


def routing(experts: list[list[int]], num_experts: int = 3, **options: object) -> Routing:
    ids = torch.tensor(experts)
    return Routing(experts=ids, weights=torch.rand(ids.shape), num_experts=num_experts, **options)  # type: ignore[arg-type]  # options are of several types


def test_every_counted_slot_is_in_one_cell() -> None:
    one = routing(torch.randint(0, 4, (50, 2)).tolist())  # 3 is an unused slot
    groups = torch.randint(-1, 3, (5, 10))
    found = group_counts(one, groups, 4)
    assert found.shape == (4, 3) and found.dtype == torch.int64 and not found[3].any()
    for group in range(3):
        rows = one.experts[groups.flatten() == group]
        assert found[group].tolist() == [(rows == expert).sum().item() for expert in range(3)]


def test_padding_is_left_out_and_modalities_are_known() -> None:
    valid, modality = torch.tensor([True, True, False]), torch.tensor([0, 1, 1])
    one = routing([[0], [1], [1]], context=Context(valid=valid, modality=modality))
    assert group_counts(one).tolist() == [[1, 0, 0], [0, 1, 0]]
    weighted = group_counts(one, weighted=True)
    torch.testing.assert_close(weighted, torch.tensor([[one.weights[0, 0], 0, 0], [0, one.weights[1, 0], 0]]))


def test_modalities_of_a_recorded_layer() -> None:
    moe = mmoe.MoE(mmoe.TopKRouter(8, 4, top_k=2), mmoe.FFNExperts(8, 8, 4))
    modality = torch.tensor([[0, 1, 1, 2, 2, 2]])
    with mmoe.trace(moe) as recorded:
        moe(torch.randn(1, 6, 8), Context(modality=modality))
    assert group_counts(recorded[0]).sum(1).tolist() == [2, 4, 6]


def test_groups_that_do_not_fit() -> None:
    one = routing([[0], [1]])
    with pytest.raises(BadInput, match="groups of 2 rows\n  the routing knows no modalities"):
        group_counts(one)
    with pytest.raises(BadInput, match="groups of 2 rows\n  there are 3"):
        group_counts(one, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(BadInput, match="1 groups\n  a row is of group 1"):
        group_counts(one, torch.tensor([0, 1]), 1)


def test_information_of_known_tables() -> None:
    assert mutual_information(torch.outer(torch.tensor([1, 2, 5]), torch.tensor([3, 1, 4]))) < 1e-12, "independent"
    own = torch.diag(torch.tensor([6, 3, 3]))
    assert mutual_information(own) == pytest.approx(entropy_bits(own.sum(1))) == pytest.approx(1.5)
    # Two groups of one size; one uses expert 0 alone, the other both alike: I = H(expert) - H(expert | group).
    assert mutual_information(torch.tensor([[4, 0], [2, 2]])) == pytest.approx(entropy_bits(torch.tensor([6, 2])) - 0.5)
    assert mutual_information(torch.zeros(2, 3)) == entropy_bits(torch.zeros(2)) == 0


def test_information_is_symmetric_bounded_and_blind_to_scale() -> None:
    counts = torch.randint(0, 20, (4, 6))
    found = mutual_information(counts)
    assert found == pytest.approx(mutual_information(counts.T)) == pytest.approx(mutual_information(7.5 * counts))
    assert 0 <= found <= min(entropy_bits(counts.sum(1)), entropy_bits(counts.sum(0)))


def test_the_bias_of_a_small_sample_is_as_told() -> None:
    slots, size = 400, (3, 4)
    found = []
    for _ in range(200):
        cells = torch.randint(0, 12, (slots,)).bincount(minlength=12).unflatten(0, size)
        found.append(mutual_information(cells))
    told = (size[0] - 1) * (size[1] - 1) / (2 * slots * math.log(2))
    assert sum(found) / len(found) == pytest.approx(told, rel=0.2)
