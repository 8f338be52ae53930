"""The verbs `mmoe list` and `mmoe info`, which import no torch."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from mmoe.errors import BadInput, BadOverride, CorruptFile, UnknownName, did_you_mean, nearest
from zoo.card import Card, Weights
from zoo.registry import card, list_parts, model_folder
from zoo.registry import list_models as find_models
from zoo.table import columns, metric_tables, routing_table, short

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_KINDS, _WEIGHTS = ("models", "routers", "experts"), ("bundled", "any")
_DRAWN = {"heatmap": ("png", "jpg", "jpeg", "webp", "svg", "pdf"), "overlay": ("png", "jpg", "jpeg", "webp")}
_MOST_LAYERS, _MOST_EXPERTS = 16, 16  # that the summary of `predict` shows


def list_models(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Part of a name, or a pattern such as 'clip_moe*'.")
    ] = "*",
    task: Annotated[str | None, typer.Option(help="Only models that can do this.")] = None,
    modality: Annotated[str | None, typer.Option(help="Only models that take these, such as image,text.")] = None,
    family: Annotated[str | None, typer.Option(help="Only models of this family.")] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", "--licence", help="A licence such as 'MIT' or 'Apache*', or commercial."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Only models with weights: bundled, or any.")] = None,
    kind: Annotated[str, typer.Option(help="What to list: models, routers or experts.")] = "models",
    as_json: Json = False,
) -> None:
    """List models, or the routers and experts that models are built from.

    \b
    mmoe list
    mmoe list clip --weights bundled
    mmoe list --task retrieval --license commercial
    mmoe list --kind routers
    """
    for option, value, choices in (("kind", kind, _KINDS), ("weights", weights, _WEIGHTS)):
        if value is not None and value not in choices:
            fix = f"--{option} {(nearest(value, choices) or choices)[0]}"
            raise UnknownName(f"cannot list by --{option} {value!r}", did_you_mean(value, choices), fix)
    if kind != "models":
        filters = {"task": task, "modality": modality, "family": family, "license": license, "weights": weights}
        given = [option for option, value in filters.items() if value is not None]
        if given:
            raise BadOverride(
                f"--{given[0]} with --kind {kind}", "it is a property of models", f"mmoe list --{given[0]} ..."
            )
        _list_registered([entry for entry in list_parts(kind) if _matches(entry["name"], pattern)], kind, as_json)
        return
    cards = find_models()
    wanted = modality.split(",") if modality else []
    _check_known("task", [task] if task else [], (one for c in cards for one in c.tasks))
    _check_known("modality", wanted, (one for c in cards for one in c.modalities))
    _check_known("family", [family] if family else [], (c.family for c in cards))
    cards = [
        c
        for c in find_models(task=task, family=family, license=license, weights=weights)
        if _matches(c.name, pattern) and set(wanted) <= set(c.modalities)
    ]
    if as_json:
        print_json([c.as_dict() for c in cards])
    elif cards:
        header = ["name", "active / total", "experts", "router", "licence", "weights"]
        echo_table(header, [_row(c) for c in cards])
    else:
        near = nearest(pattern.strip("*"), [c.name for c in find_models()])
        hint = f"; did you mean: {', '.join(near)}" if near else ""
        typer.echo(f"no model matches{hint}", err=True)


def _list_registered(found: list[dict[str, str]], kind: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    elif found:
        echo_table(["name", "", "properties"], [[e["name"], e["summary"], e["properties"]] for e in found])
    else:
        typer.echo(f"no {kind} match; all of them: mmoe list --kind {kind}", err=True)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*")


def _check_known(what: str, values: Sequence[str], known: Iterable[str]) -> None:
    choices = sorted(set(known))
    for value in values:
        if value not in choices:
            fix = (nearest(value, choices) or choices)[0]
            raise UnknownName(f"no model has the {what} {value!r}", did_you_mean(value, choices), f"--{what} {fix}")


def _row(found: Card) -> list[str]:
    moe = found.moe
    top = "up to" if moe.get("at_most") else "top"
    experts = f"{moe['layers']} x {moe['experts']}, {top} {moe['top_k']}" if moe else "-"
    return [
        found.name,
        f"{short(found.params['active'])} / {short(found.params['total'])}",
        experts,
        str(moe.get("router", "-")),
        " / ".join(dict.fromkeys([found.licence, *(w.licence for w in found.weights.values())])),
        ", ".join(dict.fromkeys(_place(w) for w in found.weights.values())) or "none",
    ]


def _place(weights: Weights) -> str:
    kind = weights.source.partition(":")[0]
    return {"bundled": "bundled", "hf-hub": "hub", "pypi": "pypi"}.get(kind, "file")


def info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, or a folder that a model was saved in.")],
    as_json: Json = False,
) -> None:
    """Show what is known about a model: sizes, licences, weights, metrics, routing.

    \b
    mmoe info clip_moe_tiny
    mmoe info runs/a/best --json
    """
    found, folder = find_card(name)
    files = _files(found, folder)
    line = f"model = zoo.load({name!r})"
    if as_json:
        print_json({**found.as_dict(), "files": files, "load": line})
        return
    typer.echo(f"{typer.style(found.name, bold=True)}  {found.summary}\n")
    for title, text in _facts(found, files):
        typer.echo(_paragraph(title, text))
    for heading, table in metric_tables(found.metrics):
        typer.echo(f"\n{heading}\n{table}")
    if found.routing.get("layers"):
        about, table = routing_table(found.routing)
        typer.echo(f"\n{about}\n{table}\n")
    typer.echo(_paragraph("load it", line))


def find_card(name: str) -> tuple[Card, Path | None]:
    """The card of a name or of a saved model's folder, and the folder; without torch."""
    folder = model_folder(name)
    if folder is not None:
        file = folder / "card.json"
        if not file.is_file():
            raise BadInput(f"no card in the folder '{name}'", "a saved model has a card.json", "mmoe list")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptFile(f"cannot read '{file}'", f"it is not JSON: {error}", "save the model again") from error
        return Card.from_dict(data, str(file)), folder
    if name.startswith("hf-hub:"):
        raise BadInput(f"no card of {name!r} on this machine", "it comes with the model", f"zoo.load({name!r}).card")
    found = card(name)
    if name != found.name:
        found.find_weights(name.removeprefix(f"{found.name}."))
    return found, None


def _files(found: Card, folder: Path | None) -> dict[str, dict[str, Any] | None]:
    """Where each set of weights lies on this machine, or None."""
    from zoo.weights import WEIGHTS, find_local

    sources = {tag: weights.source for tag, weights in found.weights.items()}
    if folder is not None:
        sources = {"saved": str(folder / WEIGHTS)}
    paths = {tag: find_local(source) for tag, source in sources.items()}
    return {tag: {"path": str(p), "bytes": p.stat().st_size} if p else None for tag, p in paths.items()}


def _facts(found: Card, files: Mapping[str, dict[str, Any] | None]) -> list[tuple[str, str]]:
    moe = found.moe
    most = "at most " if moe.get("at_most") else ""
    facts = [
        ("family", found.family),
        ("tasks", ", ".join(found.tasks)),
        ("takes", ", ".join(found.modalities)),
        ("parameters", f"{most}{found.params['active']:,} active of {found.params['total']:,}"),
    ]
    if moe:
        layers = f"{moe['experts']} in each of {moe['layers']} layers, {most}{moe['top_k']} per token"
        layers = f"{layers}, router {moe['router']}"
        facts.append(("experts", layers))
    facts.append(("licence", found.licence))
    facts += [("component", f"{c['name']}: {c['licence']} ({c['source']})") for c in found.components]
    if found.paper:
        facts.append(("paper", _joined(found.paper, title="{}.", authors="{}", venue="{},", arxiv="arXiv {}")))
    if found.code:
        facts.append(("authors' code", _joined(found.code, url="{}", commit="at {:.12},", licence="licence {}")))
    facts += [("weights", text) for text in _weights_lines(found, files)]
    facts += [("base", text) for text in _base_lines(found.config)]
    if found.lineage:
        facts.append(("made by", _pairs(found.lineage)))
    facts += [("note", note) for note in found.notes]
    config = {key: value for key, value in found.config.items() if key not in ("base", "base_sha256")}
    if config:
        facts.append(("config", _pairs(config)))
    return facts


def _weights_lines(found: Card, files: Mapping[str, dict[str, Any] | None]) -> list[str]:
    lines = []
    for tag, file in files.items():
        here = f"{file['path']} ({file['bytes'] / 1e6:,.1f} MB)" if file else "not on this machine"
        weights = found.weights.get(tag)
        if weights is None:
            lines.append(here)
            continue
        sha = f"sha256 {weights.sha256}" if weights.sha256 else "no checksum known"
        note = f" {weights.note}" if weights.note else ""
        lines.append(f"{tag}: {weights.source}, licence {weights.licence}, {sha}; {here}.{note}")
    return lines or ["none"]


def _base_lines(config: Mapping[str, Any]) -> list[str]:
    """Each base of a model, and whether it is on this machine."""
    from zoo.weights import find_local

    base, checksums = ({"": v} if isinstance(v, str) else v or {} for v in map(config.get, ("base", "base_sha256")))
    lines = []
    for part, source in base.items():
        told, sha = f"{part}: {source}" if part else source, checksums.get(part)
        path = find_local(source, sha)
        here = str(path) if path is not None else "not on this machine; it is fetched when the model is loaded"
        lines.append(f"{told}, {f'sha256 {sha}' if sha else 'no checksum known'}; {here}")
    return lines


def _joined(values: Mapping[str, str], **forms: str) -> str:
    return " ".join(form.format(values[key]) for key, form in forms.items() if key in values)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _paragraph(title: str, text: str) -> str:
    indent = " " * 15
    width = max(40, min(120, shutil.get_terminal_size((100, 24)).columns))
    wrapped = textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return typer.style(f"{title:<15}", bold=True) + wrapped[15:]


def parse_settings(settings: Sequence[str], option: str = "--set", fix: str = "--set top_k=1") -> dict[str, Any]:
    """Options written KEY=VALUE, the value as YAML.

    Args:
        settings: as they were given.
        option: of the command line that they were given by.
        fix: one that works.

    >>> parse_settings(["top_k=1", "route_padding=true", "experts=null"])
    {'top_k': 1, 'route_padding': True, 'experts': None}
    """
    import yaml

    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise BadOverride(f"cannot read {option} {setting!r}", "it is written KEY=VALUE", fix)
        if key in values:
            raise BadOverride(f"cannot read {option} {setting!r}", f"{key} is given twice", fix)
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadOverride(f"cannot read {option} {setting!r}", str(error).splitlines()[0], fix) from error
    return values


def echo_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> None:
    """Prints `columns`, the header in bold on a terminal."""
    first, *rest = columns(header, rows, right).splitlines()
    typer.echo("\n".join([typer.style(first, bold=True), *rest]))


def print_json(data: Any) -> None:
    """Prints plain data for programs."""
    typer.echo(json.dumps(data, ensure_ascii=False, indent=2))
