"""`mmoe bench`: the candidates compute the same, and what is printed is what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import mmoe
import zoo
from mmoe.cli import main
from mmoe.errors import MmoeError
from train.bench import gamma, layer, peers, pictures, scaling
from train.bench.peers import Cell

CELL = Cell(16, 32, 24, 4, 2)
SMALL = ["--cell", "16,32,24,4,2", "--seconds", "0", "--threads", "1"]
NAMES = {"dense", "mmoe", "mmoe fused", "mmoe grouped", "mmoe loop", "plain loop"}
NAMES |= {f"transformers {name}" for name in ("grouped_mm", "batched_mm", "eager")}


@pytest.fixture(autouse=True)
def without_torchtitan(monkeypatch):
    monkeypatch.setattr(peers, "torchtitan_experts", lambda: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_mixtures_agree(dtype):
    candidates, parameters = peers.layers(CELL, dtype)
    assert set(candidates) == NAMES
    x = torch.randn(16, 32, dtype=dtype, requires_grad=True)
    layer._check_agreement(candidates, x, parameters)
    assert x.grad is None and all(parameter.grad is None for parameter in parameters)


def test_torchtitan_takes_part_where_it_is_installed(monkeypatch):
    class GroupedExperts(torch.nn.Module):
        """The interface of torchtitan.models.moe.moe.GroupedExperts."""

        def __init__(self, dim, hidden_dim, num_experts, use_grouped_mm):
            super().__init__()
            self.w1 = torch.nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
            self.w2 = torch.nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
            self.w3 = torch.nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

        def forward(self, x, num_tokens_per_expert):
            e = torch.arange(len(num_tokens_per_expert)).repeat_interleave(num_tokens_per_expert)
            hidden = torch.einsum("nd,nfd->nf", x, self.w1[e])
            hidden = torch.nn.functional.silu(hidden) * torch.einsum("nd,nfd->nf", x, self.w3[e])
            return torch.einsum("nf,ndf->nd", hidden, self.w2[e])

    monkeypatch.setattr(peers, "torchtitan_experts", lambda: GroupedExperts)
    candidates, parameters = peers.layers(CELL, torch.float32)
    assert set(candidates) == NAMES | {"torchtitan experts"}
    layer._check_agreement(candidates, torch.randn(16, 32, requires_grad=True), parameters)
    assert all(parameter.grad is None for parameter in parameters)


def test_products_alone_are_those_of_the_used_slots():
    candidates, parameters = peers.layers(CELL, torch.float32)
    multiply = peers.products(candidates["mmoe"], torch.randn(16, 32))
    with FlopCounterMode(display=False) as forward:
        multiply(False)
    with FlopCounterMode(display=False) as both:
        multiply(True)
    slots = CELL.rows * CELL.top_k
    assert forward.get_total_flops() == 2 * slots * 3 * CELL.dim * CELL.hidden_dim
    assert both.get_total_flops() == 3 * forward.get_total_flops()
    assert all(parameter.grad is None for parameter in parameters)


def test_one_that_computes_something_else_is_told():
    candidates, parameters = peers.layers(CELL, torch.float32)
    ours = candidates["mmoe fused"]
    candidates["mmoe fused"] = lambda x: 1.01 * ours(x)
    with pytest.raises(MmoeError, match="the candidate 'mmoe fused' computes something else"):
        layer._check_agreement(candidates, torch.randn(16, 32, requires_grad=True), parameters)


def test_the_limit_has_the_same_active_work():
    candidates, _ = peers.layers(CELL, torch.float32)
    dense, moe = candidates["dense"], candidates["mmoe"]
    active = sum(p.numel() for p in moe.experts.parameters()) * CELL.top_k // CELL.num_experts
    assert sum(p.numel() for p in dense.parameters()) == active


def test_copies_of_all_weights_are_left_out_where_they_are_huge(monkeypatch):
    monkeypatch.setattr(peers, "MOST_BYTES", 1000)
    assert set(peers.layers(CELL, torch.float32)[0]) == NAMES - {"transformers batched_mm"}


def test_turns_are_medians_of_what_was_timed(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(layer.time, "perf_counter", lambda: next(clock) / 1000)
    prepared = []
    assert layer.take_turns({"a": lambda: None, "b": lambda: None}, lambda: prepared.append(1), 0) == {"a": 1, "b": 1}
    assert len(prepared) == 2 * (layer._LEAST + 1)


def test_json(capsys, tmp_path):
    assert main(["bench", "layer", *SMALL, "--json", "--plot", str(tmp_path / "ratios.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["dtype"], one["kind"]) for one in told["cells"]] == [
        ("fp32", "forward"),
        ("fp32", "forward + backward"),
        ("bf16", "forward"),
        ("bf16", "forward + backward"),
    ]
    for one in told["cells"]:
        assert set(one["ms"]) == NAMES | {"products alone"} and min(one["ms"].values()) > 0
        assert one["to_limit"] == pytest.approx(one["ms"]["dense"] / one["ms"]["mmoe"], abs=1e-3)
        theirs = {name: ms for name, ms in one["ms"].items() if not name.startswith(("mmoe", "dense", "products"))}
        assert one["best_peer"] == min(theirs, key=theirs.get)
        assert one["to_best_peer"] == pytest.approx(min(theirs.values()) / one["ms"]["mmoe"], abs=1e-3)
    assert told["summary"]["to the limit, forward, T >= 1024"] is None, "there is no such cell"
    assert Image.open(tmp_path / "ratios.png").width > 300


def test_what_was_measured_before_ctrl_c_is_told(capsys, monkeypatch):
    passes = layer._pass

    def one(candidate, x, backward):
        if backward:
            raise KeyboardInterrupt
        return passes(candidate, x, backward)

    monkeypatch.setattr(layer, "_pass", one)
    assert main(["bench", "layer", *SMALL, "--json"]) == 130
    told = capsys.readouterr()
    assert [cell["kind"] for cell in json.loads(told.out)["cells"]] == ["forward"]
    assert json.loads(told.out)["complete"] is False
    assert "stopped: 1 of 4 measurements follow" in told.err


def test_scaling(capsys, tmp_path, monkeypatch):
    few, many, longer = Cell(64, 32, 24, 8, 2), Cell(64, 32, 24, 64, 2), Cell(128, 32, 24, 8, 2)
    monkeypatch.setattr(scaling, "EXPERTS", [few, many])
    monkeypatch.setattr(scaling, "ROWS", [longer])
    words = ["bench", "scaling", "--seconds", "0", "--threads", "1", "--plot", str(tmp_path / "scaling.png")]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    ours = {(one["cell"]["rows"], one["cell"]["num_experts"], one["kind"]): one["ms"]["mmoe"] for one in told["cells"]}
    assert len(ours) == 6
    for kind, value in told["growth"].items():
        assert value == pytest.approx(ours[64, 64, kind] / ours[64, 8, kind], abs=1e-3)
    assert {frozenset(one["ms"]) for one in told["cells"]} == {frozenset(scaling.NAMES)}
    assert Image.open(tmp_path / "scaling.png").width > 300


def test_slow_candidates_are_timed_once(monkeypatch):
    clock = iter(range(0, 10**9, 5))
    monkeypatch.setattr(layer.time, "perf_counter", lambda: next(clock))
    prepared = []
    assert layer.take_turns({"a": lambda: None}, lambda: prepared.append(1), 1) == {"a": 5000}
    assert len(prepared) == 2


def test_memory_of_large_cells():
    def take():
        torch.ones(20_000_000)

    taken = layer.peak(take)
    assert taken is None or 75 < taken < 95


@pytest.mark.parametrize(
    ("plot", "wrong"),
    [("a.xyz", "cannot write 'a.xyz' as a figure"), ("/", "cannot write '/' as a figure"), ("/proc/a/b.png", "/proc")],
)
@pytest.mark.parametrize("verb", [["layer"], ["scaling"], ["model", "clip_moe_tiny", "--sweep", "top_k=1,2"]])
def test_a_picture_that_cannot_be_written_is_told_before_the_work(verb, plot, wrong, capsys, monkeypatch):
    monkeypatch.setattr(layer, "run", lambda *args: pytest.fail("it began"))
    monkeypatch.setattr("train.bench.model.measure", lambda *args: pytest.fail("it began"))
    assert main(["bench", *verb, "--plot", plot]) == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize(
    "sizes", [["32,24,4,2"], ["32,24,4,2", "32,24,4,1"], ["32,24,4,1", "32,24,4,2", "32,24,2,1", "32,24,8,1"]]
)
@pytest.mark.parametrize("kinds", [["forward"], list(layer.PASSES)])
def test_nothing_of_the_picture_is_cut_off(sizes, kinds, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    names = sorted(NAMES | {"products alone"})
    timings = [
        layer.Timing(cell=Cell(rows, *map(int, size.split(","))), dtype="fp32", kind=kind, ms=dict.fromkeys(names, 1.0))
        for size in sizes
        for kind in kinds
        for rows in (16, 4096)
    ]
    pictures.draw_ratios(timings, tmp_path / "a.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    inside = figure.get_tightbbox()  # in inches, of all that is drawn
    assert inside.x0 >= 0 and inside.y0 >= 0
    assert inside.x1 <= figure.get_figwidth() and inside.y1 <= figure.get_figheight()
    assert "mmoe" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("words", [["layer", *SMALL], ["model", "clip_moe_tiny", "--sweep", "top_k=1,4"]])
def test_tables_fit_a_terminal(words, capsys, monkeypatch):
    monkeypatch.setattr("train.bench.model.BATCH", 2)
    assert main(["bench", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 100


def test_a_sweep_over_a_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("train.bench.model.BATCH", 4)
    words = ["bench", "model", "clip_moe_tiny", "--sweep", "top_k=1,2", "--json", "--threads", "1"]
    assert main([*words, "--plot", str(tmp_path / "sweep.png")]) == 0
    one, two = json.loads(capsys.readouterr().out)["models"]
    assert (one["top_k"], two["top_k"]) == (1, 2)
    assert one["params"]["total"] == two["params"]["total"] > two["params"]["active"] > one["params"]["active"]
    assert one["image"]["mflops"] < two["image"]["mflops"]
    assert one["image"]["mflops_dense_twin"] == two["image"]["mflops_dense_twin"]
    assert one["image"]["mflops"] == pytest.approx(one["image"]["mflops_dense_twin"], rel=0.02), "and the gates"
    assert Image.open(tmp_path / "sweep.png").width > 300


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["layer", "--dtype", "fp8"], "no dtype 'fp8'\n  known: bf16"),
        (["layer", "--seconds", "inf"], "Input should be less than or equal to 3600"),
        (["layer", "--seconds", "-1"], "Invalid value for '--seconds': Input should be greater than or equal to 0"),
        (["layer", "--threads", "0"], "Invalid value for '--threads': Input should be greater than or equal to 1"),
        (["layer", "--cell", "1,2"], "no cell '1,2'\n  a cell is five whole numbers"),
        (["layer", "--cell", "1,2,3,4,-5"], "no cell '1,2,3,4,-5'\n  a cell is five whole numbers"),
        (["layer", "--cell", "1,20,24,4,2"], "no cell '1,20,24,4,2'\n  grouped products want widths that 8 divides"),
        (["model", "clip_moe_tini"], "no model named 'clip_moe_tini'\n  did you mean: clip_moe_tiny"),
        (["model", "clip_moe_tiny", "--sweep", "top_k"], "no sweep 'top_k'\n  a sweep is an option and its values"),
        (["model", "clip_moe_tiny", "--sweep", "topk=1"], "'topk' is not an option of clip_moe_tiny"),
        (["model", "clip_moe_tiny", "--sweep", "dtype=fp32,bf16"], "'dtype' is not an option of clip_moe_tiny"),
        (["model", "clip_moe_tiny", "--sweep", "name=a,b"], "'name' is not an option of clip_moe_tiny"),
        (["model", "clip_moe_tiny", "--sweep", "seconds=1,2"], "'seconds' is not an option of clip_moe_tiny"),
        (["model", "clip_moe_tiny", "--plot", "a.png"], "--plot without --sweep"),
    ],
)
def test_options_without_a_meaning(words, wrong, capsys):
    assert main(["bench", *words]) == 2
    assert wrong in capsys.readouterr().err


GAMMA = {"embed_dim": 16, "image_size": 32, "patch_size": 16, "vision_width": 64, "vision_layers": 2, "text_width": 64}
GAMMA |= {"text_layers": 2, "vocab_size": 600, "context_length": 16, "first_layer": 1}


@pytest.fixture
def small_gamma(tmp_path):
    from zoo.gamma.model import Gamma, GammaConfig

    return lambda **options: str(Gamma(GammaConfig(**{**GAMMA, **options})).save(tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gamma_beside_a_loop_over_its_experts(small_gamma, capsys, dtype):
    words = ["bench", "gamma", small_gamma(), "--dtype", dtype, "--batch", "2", "--seconds", "0", "--threads", "1"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for kind in ("forward", "forward + backward"):
        ms = told[kind]
        assert ms["ratio"] == pytest.approx(ms["loop_ms"] / ms["mmoe_ms"], rel=0.01) and ms["mmoe_ms"] > 0
    assert main(words) == 0
    assert "forward + backward: " in capsys.readouterr().out


def test_the_loop_over_experts_has_the_same_weights_and_is_checked(small_gamma):
    model = zoo.load(small_gamma(), device="cpu")
    tower = model.clip.visual
    loops = gamma.with_loops(tower)
    assert {id(p) for p in loops.parameters()} == {id(p) for p in tower.parameters()}
    assert len(mmoe.moe_layers(tower)) == 1, "the model itself keeps its mixtures"
    image = torch.randn(1, 3, 32, 32)
    gamma._check_agreement({"mmoe": tower, "loop": loops}, image)
    other = gamma.with_loops(tower)
    other.ln_post = torch.nn.Identity()
    with pytest.raises(MmoeError, match="the tower with loops computes something else"):
        gamma._check_agreement({"mmoe": tower, "loop": other}, image)


def test_generation_beside_encoding_all_again(capsys):
    words = ["bench", "generation", "--tokens", "3", "--layers", "1", "--experts", "2", "--threads", "1"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ratio"] == pytest.approx(told["re-encoding_s"] / told["cached_s"], rel=0.05)
    assert main(words) == 0
    assert "ratio " in capsys.readouterr().out


def test_what_cannot_be_compared_with_a_loop(small_gamma, capsys):
    for name in (small_gamma(router="topk:top_k=1"), "clip_moe_tiny"):
        assert main(["bench", "gamma", name, "--seconds", "0"]) == 2
        assert "it is no Gamma whose routers weigh all experts by a softmax" in capsys.readouterr().err


def test_the_engine_beside_a_bare_loop(capsys):
    words = ["bench", "train", "clip_moe_router", "data.batch_size=4", "data.limit=8", "--steps", "2", "--rounds", "1"]
    assert main([*words, "--threads", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ratio"] == pytest.approx(told["engine_ms"] / told["bare_ms"], rel=0.01)


def test_adapters_beside_the_bare_backbone(capsys):
    words = ["bench", "adapters", "--width", "64", "--depth", "4", "--size", "32", "--batch", "1", "--seconds", "0"]
    assert main([*words, "--threads", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    bare, spatial, some, every = told["rows"]
    assert [row["name"] for row in told["rows"]][2:] == ["frequency in the last 3", "frequency in all"]
    assert bare["parameters"] == 0 and bare["forward_ratio"] == bare["step_ratio"] == bare["flops_ratio"] == 1
    one = 2 * 64 * 64 + 64 + 64
    assert spatial["parameters"] == 4 * (one + 1)
    assert some["parameters"] == spatial["parameters"] + 3 * (2 * one + 3 * 64 + 3)
    assert 1 < spatial["flops_ratio"] < some["flops_ratio"] < every["flops_ratio"]
    for row in told["rows"]:
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / bare["step_ms"], rel=0.01)
    assert main([*words, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 100


def test_pictures_for_adapters_have_whole_patches(capsys):
    assert main(["bench", "adapters", "--size", "40"]) == 2
    assert "patches must cover the picture" in capsys.readouterr().err
