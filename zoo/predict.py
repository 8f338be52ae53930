"""The verb `mmoe predict`: any model of the zoo on pictures, and on texts where it compares the two."""

from __future__ import annotations

import ast
import contextlib
import inspect
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmoe.errors import BadInput, BadOverride, MmoeError, Refused, did_you_mean
from zoo.cli import Json, echo_table, find_card, parse_settings, print_json
from zoo.registry import model_folder

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_RASTER = ("png", "jpg", "jpeg", "webp")
_DRAWN = {"heatmap": (*_RASTER, "svg", "pdf"), "overlay": _RASTER, "out": ("png",)}
_MOST_LAYERS, _MOST_EXPERTS = 16, 16  # that the summary shows
_COMPARES = "zero-shot-classification"  # the task that takes texts to choose from
_RUNS = (_COMPARES, "quality", "segmentation")


def predict(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, or a folder that a model was saved in.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="Pictures; behind them the texts to choose from, if any.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write the mask of the first picture here (PNG).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the experts of every token here (JSON).")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Draw the load of each layer's experts here.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Draw the last layer's experts over the first picture here.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="Another input of the model, such as scene=natural."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the config; may be repeated.")
    ] = None,
    router: Annotated[str | None, typer.Option(metavar="SPEC", help="Another router, such as topk:top_k=1.")] = None,
    weights: Annotated[str | None, typer.Option(help="A tag, a file, or random.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Run a model on an input and show which experts it used.

    \b
    mmoe predict clip_moe_tiny fox.png "a fox" "a pizza"
    mmoe predict clip_moe_tiny fox.png "a fox" "a pizza" --trace routing.json --overlay overlay.png
    mmoe predict clip_moe_tiny fox.png "a fox" "a pizza" --router topk:top_k=1
    """
    drawn = {"trace": trace, "heatmap": heatmap, "overlay": overlay, "out": out}
    files = {kind: path for kind, path in drawn.items() if path is not None}
    pictures, labels = _arguments(name, inputs)
    _check_results(files, {Path(picture).resolve() for picture in pictures})
    overrides = parse_settings(settings or [])
    router = router if router is not None else overrides.pop("router", None)
    _check_overrides(overrides)
    more = parse_settings(given or [], "--with", "--with scene=natural")

    from mmoe.trace import trace as record

    options = {"device": device, "dtype": dtype, "router": router, **overrides}
    model: Any = _loaded([name, *inputs], weights, options)
    words = (labels,) if labels else ()
    _check_given(model, more, len(words))
    with record(model) as routing:
        result = model.predict(pictures, *words, **more)
    if out is not None:
        _save(result, out, name)
    about = {"model": name, "inputs": list(inputs), **more, "result": result.as_dict()}
    _draw({kind: path for kind, path in files.items() if kind != "out"}, model, (pictures, *words), routing, about)
    report = model.load_report
    if as_json:
        told = {"model": name, "weights": report.source if report else "random", "inputs": inputs, **more}
        told |= result.as_dict()
        told |= {"random_tensors": report.random} if report and report.random else {}
        paths = {kind: str(path) for kind, path in files.items()}
        print_json({**told, "routing": routing.summary(), "files": paths})
        return
    _note_random(model)
    _echo_result(result, pictures)
    _echo_routing(routing.summary())
    for kind, path in files.items():
        typer.echo(f"{kind}: {path}")


def _loaded(given: Sequence[str], weights: str | None, options: Mapping[str, Any]) -> Any:
    """The model that a command names first; errors suggest the command again, with other options."""
    from zoo.loading import load

    chosen: bool | str = weights != "random" and (weights if weights is not None else True)
    try:
        return load(given[0], chosen, **options)
    except MmoeError as error:
        raise type(error)(error.asked, error.wrong, _as_command(error.fix, given)) from error


def _as_command(fix: str, given: Sequence[str]) -> str:
    """A fix that loads a model in Python, or an option of that, as the command that does it; others stay as they are.

    >>> _as_command("zoo.load('gamma_vit_b16', weights=False)", ["gamma_vit_b16", "my photo.jpg"])
    "mmoe predict gamma_vit_b16 'my photo.jpg' --weights random"
    >>> _as_command("device='auto'", ["gamma_tiny", "a.jpg"]), _as_command("mmoe list", ["gamma_tiny", "a.jpg"])
    ('mmoe predict gamma_tiny a.jpg --device auto', 'mmoe list')
    """
    options = _options_of(fix, given[0])
    words = ["mmoe", "predict", *given]
    for name, value in options.items():
        own = name in ("weights", "router", "device", "dtype")
        words += [f"--{name}", value] if own else ["--set", f"{name}={value}"]
    return shlex.join(words) if options and "allow_missing" not in options else fix


def _options_of(fix: str, model: str) -> dict[str, str]:
    """Options of `zoo.load` for a model in a line of Python, as the command line writes them; none of other lines."""
    for code in (fix, f"zoo.load(..., {fix})"):
        with contextlib.suppress(SyntaxError):
            call = ast.parse(code, mode="eval").body
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "zoo.load" and len(call.args) == 1:
                own = ast.unparse(call.args[0]) in ("...", repr(model))
                return {str(one.arg): _written(one) for one in call.keywords} if own else {}
    return {}


def _written(option: ast.keyword) -> str:
    if isinstance(option.value, ast.Constant) and isinstance(option.value.value, str):
        return option.value.value
    value = ast.unparse(option.value)
    return "random" if option.arg == "weights" and value == "False" else value


def _echo_result(result: Any, pictures: Sequence[str]) -> None:
    for index, picture in enumerate(pictures):
        header, rows = result.table(index)
        echo_table([picture, *header], rows, right=range(1, 1 + len(header)))
        typer.echo()


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for option in sorted({"device", "dtype", "weights", "router", "name", "allow_missing"} & set(overrides)):
        asked = f"cannot read --set {option}={overrides[option]}"
        raise BadOverride(asked, "it is one of loading, not of the config", "mmoe predict --help")


def _draw(files: Mapping[str, Path], model: Any, inputs: Sequence[Any], routing: Any, about: Mapping[str, Any]) -> None:
    """Writes what the experts did; of a model that cuts pictures into windows, with each picture as one."""
    if not files:
        return
    import torch

    from mmoe.trace import trace
    from zoo import routes

    batch = model.preprocess(*inputs)
    if model.views_note and (model.windows or "overlay" in files):
        typer.echo(f"note: {model.views_note}", err=True)
    if model.windows:
        with torch.no_grad(), trace(model) as routing:
            model(**batch)
    routes.write(files, routing.joined(), model.views(batch), about, model.seen(inputs[0][0]))


def _note_random(model: Any) -> None:
    """Says where weights are random."""
    report = model.load_report
    made_of = str(model.card.lineage.get("weights", "")) if model.card is not None else ""
    if made_of.startswith("random"):
        typer.echo(f"note: this model's card says that its weights were {made_of}", err=True)
    if report is None or report.random:
        what = f"{report.random} tensors are" if report else "all weights are"
        typer.echo(f"note: {what} random, so the result means nothing", err=True)


def _check_given(model: Any, given: Mapping[str, Any], words: int) -> None:
    """Fails where the model takes no such input."""
    known = list(inspect.signature(model.predict).parameters)[1 + words :]
    for key in given:
        if key not in known:
            wrong = did_you_mean(key, known) if known else "it takes no other inputs"
            raise BadOverride(f"no input {key!r} of {type(model).__name__}", wrong, "mmoe predict --help")


def _save(result: Any, path: Path, name: str) -> None:
    if not hasattr(result, "save"):
        raise Refused(f"cannot write '{path}'", f"{name} draws no mask", "--overlay experts.png")
    result.save(path)


def _check_results(files: Mapping[str, Path], kept: Collection[Path]) -> None:
    """Fails before the model is loaded, not after; inputs are kept."""
    targets = [path.resolve() for path in files.values()]
    for kind, path in files.items():
        if path.resolve() in kept or targets.count(path.resolve()) > 1:
            wrong = "it is an input" if path.resolve() in kept else "two results would go there"
            raise BadInput(f"cannot write '{path}'", wrong, f"--{kind} another name")
        if not path.name:
            raise BadInput(f"cannot write '{path}'", "it names no file", f"--{kind} {kind}.png")
        known, suffix = _DRAWN.get(kind), path.suffix.lower().removeprefix(".")
        if known is not None and suffix not in known:
            fix = f"--{kind} {path.with_suffix('.png').name}"
            raise BadInput(f"cannot draw to '{path}'", f"the suffix names the format: {', '.join(known)}", fix)


def _arguments(name: str, inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pictures and labels, after every check that needs no torch.

    Pictures come first, at least one; what is not named like a picture is a label.
    """
    folder, compares = model_folder(name), None
    if not name.startswith("hf-hub:") and (folder is None or (folder / "card.json").is_file()):
        found, _ = find_card(name)
        if not set(_RUNS) & set(found.tasks):
            wrong = f"its tasks are {', '.join(found.tasks)}; this runs {', '.join(_RUNS)}"
            raise Refused(f"cannot run {name!r} from the command line", wrong, f"zoo.load({name!r}).predict(...)")
        compares = _COMPARES in found.tasks

    from zoo.images import read_image

    count = 1
    while count < len(inputs) and Path(inputs[count]).suffix.lower() in _PICTURES:
        count += 1
    pictures, labels = list(inputs[:count]), list(inputs[count:])
    for picture in pictures:
        read_image(picture)
    if compares is False and labels:
        wrong = "it takes no texts, and what has no ending of a picture is one"
        raise BadInput(f"cannot show {labels[0]!r} to {name}", wrong, f"mmoe predict {name} {pictures[0]}")
    if (compares and not labels) or not all(label.strip() for label in labels):
        wrong = "one label is empty" if labels else "the texts to choose from come after it"
        fix = f"mmoe predict {name} {pictures[0]} 'a fox' 'a pizza'"
        raise BadInput(f"cannot compare '{pictures[-1]}' with no text", wrong, fix)
    return pictures, labels


def _echo_routing(layers: Sequence[Mapping[str, Any]]) -> None:
    """Experts used per layer; the busiest ones where there are many."""
    if not layers:
        typer.echo("no layer has experts")
        return
    rows = []
    for layer in layers[:_MOST_LAYERS]:
        shares = " ".join(f"{100 * share:3.0f}" for share in layer["use"])
        if layer["num_experts"] > _MOST_EXPERTS:
            busiest = sorted(enumerate(layer["use"]), key=lambda pair: -pair[1])[:6]
            shares = ", ".join(f"{expert}: {100 * share:.0f}" for expert, share in busiest) + ", ..."
        used = layer["num_experts"] - len(layer["dead"])
        rows.append([layer["layer"], f"{used} of {layer['num_experts']}", f"{layer['experts_per_token']:g}", shares])
    echo_table(["layer", "experts used", "per token", "share of each in %"], rows)
    if len(layers) > _MOST_LAYERS:
        typer.echo(f"and {len(layers) - _MOST_LAYERS} more layers; --trace FILE has them all")
