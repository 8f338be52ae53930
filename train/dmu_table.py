"""Puts the results of several runs of `train.dmu` together: mean and spread over seeds, as a table and for the card.

python -m train.dmu_table runs/dmu_0 runs/dmu_1 runs/dmu_2 --yaml runs/card.yaml
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import zoo
from mmoe.atomic import atomic_path
from mmoe.errors import BadInput, MmoeError
from train.tasks import RANKS
from zoo.state import read_json

DENSE, MIXTURE = "clip_tiny", "clip_moe_tiny"
MODELS = {
    "base": ("dense base", DENSE),
    "base_longer": ("dense base, trained on", DENSE),  # all weights, for as many steps as the mixture had
    "upcycled": ("plain upcycling", MIXTURE),  # copies of the base, experts and routers trained for as many steps
    "expert_1": ("MCL expert 1 alone", DENSE),
    "expert_2": ("MCL expert 2 alone", DENSE),
    "expert_3": ("MCL expert 3 alone", DENSE),
    "clip_moe": ("CLIP-MoE", MIXTURE),
}
SPLITS = {
    "seen_twemoji": "1,341 seen concepts, Twemoji (style never trained on)",
    "held_out_openmoji": "300 concepts never trained on, OpenMoji",
    "held_out_noto": "300 concepts never trained on, Noto",
    "held_out_twemoji": "300 concepts never trained on, Twemoji (style never trained on)",
    "seen_openmoji": "1,341 seen concepts, OpenMoji (trained on)",
    "seen_noto": "1,341 seen concepts, Noto (trained on)",
}
DIRECTIONS = {"text_to_image": "T2I", "image_to_text": "I2T"}  # names in the results, names in the table


def read_results(folders: list[Path]) -> list[dict[str, Any]]:
    """Results of finished runs.

    Raises:
        BadInput: a folder holds none, or two runs have the same seed.
    """
    results = []
    for folder in folders:
        path = folder / "results.json"
        if not path.is_file():
            raise BadInput(
                f"no results in '{folder}'", "the run is not finished", f"python -m train.dmu --out {folder}"
            )
        results.append(read_json(path, f"python -m train.dmu --out {folder}"))
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise BadInput("put runs together", f"their seeds are {seeds}", "give runs with different seeds")
    return results


def metrics(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per model and data: recalls as mean and standard deviation over seeds.

    Args:
        results: of runs with different seeds.
    """
    for result in results:
        missing = [model for model in MODELS if model not in result["retrieval"]]
        if missing:
            asked = f"make the table of the run with seed {result['seed']}"
            raise BadInput(asked, f"it has no {', '.join(missing)}", "python -m train.dmu --controls")
    steps = sorted({result.get("added_steps") for result in results})
    if len(steps) > 1:
        raise BadInput("put runs together", f"their recipes add {steps} steps", "give runs of one recipe")
    seeds = [result["seed"] for result in results]
    command = f"python -m train.dmu --controls --seed S --out runs/dmu_S, S = {', '.join(map(str, seeds))}"
    entries = []
    for split, data in SPLITS.items():
        for model, (about, card) in MODELS.items():
            entry: dict[str, Any] = {"data": data, "model": about, **zoo.card(card).params, "seeds": seeds}
            for direction, label in DIRECTIONS.items():
                for k in RANKS:
                    values = [result["retrieval"][model][split][direction][f"R@{k}"] for result in results]
                    entry[f"{label} R@{k}"] = round(statistics.mean(values), 4)
                    entry[f"{label} R@{k} sd"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
            entries.append({**entry, "provenance": "ours", "command": command})
    return entries


def show(entries: list[dict[str, Any]]) -> str:
    """The entries as Markdown tables, one per data."""
    lines = []
    for data in SPLITS.values():
        lines += ["", f"{data}: R@1 / R@5 / R@10 in %, mean ± standard deviation", ""]
        lines += ["| model | parameters, total / active | text to image | image to text |", "|---|---|---|---|"]
        for entry in entries:
            if entry["data"] == data:
                cells = [
                    " / ".join(f"{100 * entry[f'{d} R@{k}']:.1f} ± {100 * entry[f'{d} R@{k} sd']:.1f}" for k in RANKS)
                    for d in DIRECTIONS.values()
                ]
                lines.append(
                    f"| {entry['model']} | {entry['total']:,} / {entry['active']:,} | {cells[0]} | {cells[1]} |"
                )
    return "\n".join(lines).strip()


def routing(result: dict[str, Any]) -> dict[str, Any]:
    """How the mixture of one run uses its experts, for the card."""
    keys = ("layer", "load", "max_over_mean", "dead", "entropy")
    return {
        "data": "1,341 seen concepts: Twemoji pictures and names",
        "command": f"python -m train.dmu --seed {result['seed']} (expert_use in train/evaluate.py)",
        "layers": [{key: layer[key] for key in keys} for layer in result["experts"]],
    }


def as_yaml(results: list[dict[str, Any]]) -> str:
    """For the cards of both models: metrics over all runs, and routing of the first; one entry a line."""

    def line(entry: dict[str, Any]) -> str:
        return "    - " + yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=10**6).strip()

    entries, used = metrics(results), routing(results[0])
    base = [entry for entry in entries if entry["model"] == MODELS["base"][0]]
    layers = ["  " + line(layer) for layer in used.pop("layers")]
    about = [f"    {key}: {json.dumps(value)}" for key, value in used.items()]
    mixture = [f"{MIXTURE}:", "  metrics:", *map(line, entries), "  routing:", *about, "    layers:", *layers]
    return "\n".join([*mixture, f"{DENSE}:", "  metrics:", *map(line, base)]) + "\n"


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs with different seeds.")],
    to_yaml: Annotated[Path | None, typer.Option("--yaml", help="Write metrics and routing of the cards here.")] = None,
) -> None:
    """Print the table of several runs."""
    try:
        results = read_results(folders)
        print(show(metrics(results)))
        if to_yaml is not None:
            with atomic_path(to_yaml) as temporary:
                temporary.write_text(as_yaml(results), encoding="utf-8")
    except MmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
