"""`mmoe bench`: the candidates compute the same, and what is printed is what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from mmoe.cli import main
from train import bench

CELL = (16, 32, 24, 4, 2)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "CELLS", (CELL,))


def test_all_mixtures_of_a_cell_give_the_same():
    _, dim, hidden, experts, top_k = CELL
    candidates, _ = bench._candidates(dim, hidden, experts, top_k, torch.float32)
    x = torch.randn(16, dim)
    for backend in ("auto", "fused", "loop"):
        torch.testing.assert_close(candidates[f"mmoe {backend}"](x), candidates["mmoe grouped"](x))
    torch.testing.assert_close(candidates["transformers"](x)[0], candidates["mmoe grouped"](x))


def test_json(capsys):
    assert main(["bench", "--repeats", "1", "--threads", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["layers"]
    assert row["cell"] == dict(zip("TDFEK", CELL, strict=True))
    for times in (row["forward_ms"], row["forward_backward_ms"]):
        assert (
            set(times) == {"dense", "mmoe auto", "mmoe fused", "mmoe grouped", "mmoe loop", "transformers"}
            and min(times.values()) > 0
        )
    (model,) = told["models"]
    assert model["name"] == "clip_moe_tiny" and model["active_params"] < model["total_params"]


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["bench", "--repeats", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "MoE layer, T 16, D 32, F 24, E 4, K 2, fp32, 1 thread" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--dtype", "fp8"], "no dtype 'fp8'\n  known: bf16"),
        (["--repeats", "0"], "Invalid value for '--repeats': Input should be greater than or equal to 1"),
        (["--threads", "-1"], "Invalid value for '--threads': Input should be greater than or equal to 1"),
    ],
)
def test_options_without_a_meaning(options, wrong, capsys):
    assert main(["bench", *options]) == 2
    assert wrong in capsys.readouterr().err
