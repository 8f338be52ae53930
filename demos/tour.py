"""`mmoe tour`: the zoo in a minute, in the terminal: load a model, predict, look at its routing, fine-tune its routers.

Everything is bundled, so it needs no network. What it writes is two pictures in one folder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from demos.record import RoutingRecord

MODEL, PICTURE = "clip_moe_tiny", "examples/dog_face.png"
LABELS = ("dog face", "cat face", "fox", "octopus", "pizza", "guitar", "rocket")
HELD_BATCH = 64  # concepts of the batch that the loss is measured on


def tour(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("runs/tour"),
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning.", min=1, max=1000)] = 20,
) -> None:
    """Walk through the zoo in a minute: load, predict, look at the routing, fine-tune.

    Args:
        out: folder of the pictures; made when it is not there.
        steps: of fine-tuning.
    """
    from rich.console import Console

    import zoo
    from demos.record import record_routing
    from zoo.assets import asset
    from zoo.images import as_seen

    console = Console(highlight=False)
    begin = time.perf_counter()
    _step(console, 1, "Load a model by its name", f"model = zoo.load({MODEL!r})")
    model: Any = zoo.load(MODEL, device="cpu")
    params = model.num_params()
    console.print(f"{params.total:,} parameters, {params.active:,} of them active for a token. {model.load_report}")

    picture = asset(PICTURE)
    _step(console, 2, "Ask which label fits a picture", f"model.predict('assets/{PICTURE}', labels)")
    result, record = record_routing(
        model,
        lambda: model.predict(picture, LABELS),
        model.preprocess(picture, LABELS),
        as_seen(picture, model.preprocessing["resize_mode"]),
        MODEL,
    )
    _print_result(console, result.top(len(LABELS)))

    _step(console, 3, "See what its routers did", "with mmoe.trace(model) as routing: model.predict(...)")
    _print_routing(console, record)
    for path in _write_pictures(record, out):
        console.print(f"wrote {path}")

    _step(console, 4, f"Fine-tune its routers for {steps} steps", f"train.fine_tune(model, steps={steps})")
    _fine_tune(console, model, steps)
    console.print(f"\nDone in {time.perf_counter() - begin:.0f} s. Next: mmoe demo, mmoe list")


def _step(console: Console, number: int, title: str, code: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/bold]")
    console.print(f"   {code}", style="cyan", markup=False)


def _print_result(console: Console, ranked: list[tuple[str, float]]) -> None:
    from rich.table import Table

    table = Table("label", "probability", "", box=None, pad_edge=False)
    for label, share in ranked:
        table.add_row(label, f"{100 * share:.1f} %", "█" * round(30 * share))
    console.print(table)
    console.print(
        "The drawing is in a style that the model was not trained on. The probabilities compare only these labels."
    )


def _print_routing(console: Console, record: RoutingRecord) -> None:
    from rich.table import Table

    from demos.record import NUMBERS_HEADER, numbers

    table = Table(*NUMBERS_HEADER, box=None, pad_edge=False)
    for row in numbers(record):
        table.add_row(*row)
    console.print(table)
    first = record.summary[0]
    even = 100 / first["num_experts"]
    console.print(
        f"Each token goes to {first['experts_per_token']:g} of {first['num_experts']} experts; an even load would be "
        f"{even:.0f} % each. One picture and a few labels are a small sample."
    )


def _write_pictures(record: RoutingRecord, out: Path) -> list[Path]:
    from demos.record import overlay
    from mmoe.figures import load_heatmap, save_figure

    heatmap = load_heatmap(record.trace, names=[record.names[layer] for layer in record.trace.layers])
    written = [save_figure(heatmap, out / "routing.png")]
    picture = overlay(record, record.depth)
    return [*written, save_figure(picture, out / "overlay.png")] if picture is not None else written


def _fine_tune(console: Console, model: Any, steps: int) -> None:
    from train import fine_tune

    batch = held_batch(model)
    before = held_loss(model, batch)
    losses = fine_tune(model, steps=steps, progress=True)
    after = held_loss(model, batch)
    model.eval()
    routers = sum(value.numel() for name, value in model.named_parameters() if "router" in name)
    console.print(f"Trained {routers:,} of {model.num_params().total:,} parameters, the routers, for {steps} steps.")
    console.print(f"loss of the training batches:   {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    console.print(
        f"loss of {HELD_BATCH} held-out emoji:      {before:.3f} before, {after:.3f} after (unseen names and style)"
    )
    console.print(honest_words(before, after))


def held_batch(model: Any) -> dict[str, Any]:
    """Pictures and names of concepts that are held out of training, the same ones each time."""
    from train.data.emoji import load_emoji

    emoji = load_emoji()
    chosen = emoji.held_out[:: max(1, len(emoji.held_out) // HELD_BATCH)][:HELD_BATCH]
    pictures = [emoji.image(index, emoji.held_out_style) for index in chosen]
    return dict(model.preprocess(pictures, [emoji.concepts[index].name for index in chosen]))


def held_loss(model: Any, batch: dict[str, Any]) -> float:
    """Contrastive loss of a batch."""
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(**batch, return_loss=True).losses["contrastive"])


def honest_words(before: float, after: float) -> str:
    """What the two numbers say and what they do not."""
    change = after - before
    if abs(change) < 0.02:
        found = "That is no change to speak of"
    else:
        found = f"The loss {'fell' if change < 0 else 'rose'} by {abs(change):.3f}"
    return (
        f"{found}. A few steps on the routers alone show that training runs. Whether they made a better model takes a "
        "whole evaluation to say: one small batch measures it only roughly."
    )
