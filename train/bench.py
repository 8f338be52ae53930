"""`mmoe bench`: times the MoE layer against a dense layer of the same active work and transformers' MoE block.

All candidates of a cell run in turn in one process, so a machine whose speed drifts hits them alike: compare ratios.
Shapes of a cell: T rows, D width, F inner width, E experts, K slots per row; gated experts without biases.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

CELLS = ((32, 512, 1024, 8, 2), (1024, 512, 1024, 8, 2), (1024, 512, 256, 64, 8), (4096, 512, 256, 64, 8))


def bench(
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of every candidate; the median counts.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the MoE layer and a bundled model on this machine.

    Example: mmoe bench --dtype bf16
    """
    import torch

    from zoo.loading import pick_dtype

    kind = pick_dtype(dtype)
    torch.set_num_threads(threads)
    rows = [time_cell(cell, kind, repeats) for cell in CELLS]
    models = [time_model("clip_moe_tiny", kind, repeats)]
    if as_json:
        print(json.dumps({"dtype": dtype, "threads": threads, "layers": rows, "models": models}, indent=2))
    else:
        _show(rows, models, dtype, threads)


def time_cell(cell: tuple[int, int, int, int, int], dtype: Any, repeats: int) -> dict[str, Any]:
    """Milliseconds of a forward pass and of forward plus backward, per candidate."""
    import torch

    rows, dim, hidden, num_experts, top_k = cell
    x = torch.randn(rows, dim, dtype=dtype, requires_grad=True)
    candidates, parameters = _candidates(dim, hidden, num_experts, top_k, dtype)

    def forward(layer: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                layer(x)

        return run

    def both(layer: Callable[[Any], Any]) -> Callable[[], None]:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None  # or backward would add to all experts' gradients too
            layer(x).sum().backward()

        return run

    return {
        "cell": dict(zip("TDFEK", cell, strict=True)),
        "forward_ms": in_turn({name: forward(layer) for name, layer in candidates.items()}, repeats),
        "forward_backward_ms": in_turn({name: both(layer) for name, layer in candidates.items()}, repeats),
    }


def _candidates(
    dim: int, hidden: int, num_experts: int, top_k: int, dtype: Any
) -> tuple[dict[str, Callable[[Any], Any]], list[Any]]:
    """Dense layer of inner width K*F, our layer with each backend, transformers' block, and their parameters."""
    import mmoe

    dense = mmoe.GatedFFN(dim, hidden * top_k).to(dtype)
    router, experts = mmoe.TopKRouter(dim, num_experts, top_k=top_k), mmoe.GatedFFNExperts(dim, hidden, num_experts)
    moe = mmoe.MoE(router, experts).to(dtype)
    ours = {f"mmoe {backend}": copy.deepcopy(moe) for backend in ("auto", "fused", "grouped", "loop")}
    for name, layer in ours.items():
        layer.experts.backend = name.removeprefix("mmoe ")
    theirs = _transformers_block(moe, dim, hidden, num_experts, top_k).to(dtype)
    parameters = [parameter for layer in (dense, *ours.values(), theirs) for parameter in layer.parameters()]
    return {"dense": dense, **ours, "transformers": lambda x: theirs(x[None])}, parameters


def _transformers_block(moe: Any, dim: int, hidden: int, num_experts: int, top_k: int) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=dim,
        moe_intermediate_size=hidden,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    block = Qwen3MoeSparseMoeBlock(config)
    block.experts.gate_up_proj.data.copy_(moe.experts.gate_up_proj)
    block.experts.down_proj.data.copy_(moe.experts.down_proj)
    block.gate.weight.data.copy_(moe.router.weight)
    return block


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of several functions that take turns, after one turn of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def time_model(name: str, dtype: Any, repeats: int) -> dict[str, Any]:
    """Parameters, FLOPs and pictures per second of a bundled model's image tower."""
    import torch

    import mmoe
    import zoo

    model: Any = zoo.load(name, device="cpu", dtype=dtype)
    images = torch.randn(64, 3, model.config.image_size, model.config.image_size, dtype=dtype)
    with torch.inference_mode():
        ms = in_turn({name: lambda: model.encode_image(images)}, repeats)[name]
    counted = mmoe.profile(model, model.encode_image, images)
    return {
        "name": name,
        "total_params": counted.params.total,
        "active_params": counted.params.active,
        "mflops_per_image": round(counted.flops / len(images) / 1e6, 2),
        "images_per_second": round(len(images) / ms * 1e3, 1),
    }


def _show(rows: list[dict[str, Any]], models: list[dict[str, Any]], dtype: str, threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for row in rows:
        cell = ", ".join(f"{name} {size}" for name, size in row["cell"].items())
        table = Table(title=f"MoE layer, {cell}, {dtype}, {threads} thread{'s' * (threads > 1)}", title_justify="left")
        for heading in ("", "forward ms", "vs dense", "forward + backward ms", "vs dense"):
            table.add_column(heading, justify="right" if heading else "left")
        for name in row["forward_ms"]:
            cells = []
            for times in (row["forward_ms"], row["forward_backward_ms"]):
                cells += [f"{times[name]:.2f}", f"{times['dense'] / times[name]:.2f}"]
            table.add_row(name, *cells)
        console.print(table)
    console.print("vs dense: speed relative to a dense layer of the same active work, measured in turn")
    for model in models:
        console.print(
            f"{model['name']}: {model['total_params']:,} parameters, {model['active_params']:,} active, "
            f"{model['mflops_per_image']} MFLOPs per picture, {model['images_per_second']} pictures/s"
        )
