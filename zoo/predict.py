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

from mmoe.errors import BadInput, BadOverride, MmoeError, Refused
from zoo.cli import Json, echo_table, parse_settings, print_json
from zoo.inputs import Call, check_options, known_card, read_call

_RASTER = ("png", "jpg", "jpeg", "webp")
_DRAWN = {"heatmap": (*_RASTER, "svg", "pdf"), "overlay": _RASTER, "out": ("png",)}
_MOST_LAYERS, _MOST_EXPERTS = 16, 16  # that the summary shows


def predict(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, or a folder that a model was saved in.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Pictures; behind them the texts to choose from, or what is asked about the files."
        ),
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
    sound: Annotated[
        bool, typer.Option("--sound", help="Recordings are sounds, for a model that takes speech as well.")
    ] = False,
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
    mmoe predict uni_moe_tiny fox.png "What is this?"
    mmoe predict uni_moe_tiny hello.wav --with max_new_tokens=20
    """
    asked = (("trace", trace), ("heatmap", heatmap), ("overlay", overlay), ("out", out))
    files = {kind: path for kind, path in asked if path is not None}
    early = read_call(name, inputs, found, sound) if (found := known_card(name)) is not None else None
    _check_results(files, {Path(word).resolve() for word in inputs})
    overrides = parse_settings(settings or [])
    router = router if router is not None else overrides.pop("router", None)
    _check_overrides(overrides)
    more = parse_settings(given or [], "--with", "--with scene=natural")
    if early is not None:
        _check_picture(files, early.with_media(more))

    from mmoe.trace import trace as record

    options = {"device": device, "dtype": dtype, "router": router, **overrides}
    model: Any = _loaded([name, *inputs], weights, options)
    call = (early or read_call(name, inputs, model.card, sound)).with_media(more)
    check_options(model, call, list(more))
    _check_picture(files, call)
    with record(model) as routing:
        result = _result(model, call, more, [name, *inputs])
    if out is not None:
        _save(result, out, name)
    about = {"model": name, "inputs": list(inputs), **more}
    _draw(files, model, call, routing, {**about, "result": result.as_dict()})
    if as_json:
        print_json(_as_data(about, model, result, routing, files))
        return
    _note_random(model)
    _echo_result(result, call.pictures)
    _echo_routing(routing.summary(), files)


def _as_data(
    about: Mapping[str, Any], model: Any, result: Any, routing: Any, files: Mapping[str, Path]
) -> dict[str, Any]:
    """What is printed for programs."""
    report = model.load_report
    told = {"model": about["model"], "weights": report.source if report else "random", **about, **result.as_dict()}
    told |= {"random_tensors": report.random} if report and report.random else {}
    paths = {kind: str(path) for kind, path in files.items()}
    return {**told, "routing": routing.summary(), "files": paths}


def _loaded(given: Sequence[str], weights: str | None, options: Mapping[str, Any]) -> Any:
    """The model that a command names first; errors suggest the command again, with other options."""
    from zoo.loading import load

    chosen: bool | str = weights != "random" and (weights if weights is not None else True)
    try:
        return load(given[0], chosen, **options)
    except MmoeError as error:
        raise type(error)(error.asked, error.wrong, _as_command(error.fix, given)) from error


def _as_command(fix: str, given: Sequence[str], inputs: Collection[str] = ()) -> str:
    """A fix in Python as the command that does it: a model that is loaded or predicts, an option of that.

    Others stay as they are.

    Args:
        fix: in Python.
        given: the model and the inputs of the command.
        inputs: names of the inputs of `predict`, where it was that which failed.

    >>> _as_command("zoo.load('gamma_vit_b16', weights=False)", ["gamma_vit_b16", "my photo.jpg"])
    "mmoe predict gamma_vit_b16 'my photo.jpg' --weights random"
    >>> _as_command("device='auto'", ["gamma_tiny", "a.jpg"]), _as_command("mmoe list", ["gamma_tiny", "a.jpg"])
    ('mmoe predict gamma_tiny a.jpg --device auto', 'mmoe list')
    >>> _as_command("scene='natural'", ["gamma_tiny", "a.jpg"], ["scene"])
    'mmoe predict gamma_tiny a.jpg --with scene=natural'
    """
    options = _options_of(fix, given[0])
    words = ["mmoe", "predict", *given]
    for name, value in options.items():
        own = name in ("weights", "router", "device", "dtype")
        option = "--with" if name in inputs else "--set"
        words += [f"--{name}", value] if own else [option, f"{name}={value}"]
    predicts = fix.startswith("model.predict(") and bool(inputs)
    return shlex.join(words) if predicts or (options and "allow_missing" not in options) else fix


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
    if not pictures:
        typer.echo(f"{result}\n")


def _result(model: Any, call: Call, more: Mapping[str, Any], given: Sequence[str]) -> Any:
    """What the model says; options of writing are checked by the library that writes."""
    try:
        return model.predict(*call.args, **{**call.media, **more})
    except MmoeError as error:
        own = [*inspect.signature(model.predict).parameters, *(call.options or ())]
        error.fix = _as_command(error.fix, given, own)
        raise
    except (ValueError, TypeError) as error:
        if call.options is None or not more:
            raise
        told = ", ".join(f"{key}={value}" for key, value in more.items())
        wrong = str(error).strip().partition("\n")[0]
        raise BadOverride(f"cannot write a reply with {told}", wrong, "--with max_new_tokens=20") from error


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for option in sorted({"device", "dtype", "weights", "router", "name", "allow_missing"} & set(overrides)):
        asked = f"cannot read --set {option}={overrides[option]}"
        raise BadOverride(asked, "it is one of loading, not of the config", "mmoe predict --help")


def _draw(files: Mapping[str, Path], model: Any, call: Call, routing: Any, about: Mapping[str, Any]) -> None:
    """Writes what the experts did; of a model that runs its layers in parts, with all of an input as one."""
    files = {kind: path for kind, path in files.items() if kind != "out"}
    if not files:
        return
    import torch

    from mmoe.trace import trace
    from zoo import routes

    batch = model.preprocess(*call.args, **call.media)
    if model.views_note and (model.windows or "overlay" in files):
        typer.echo(f"note: {model.views_note}", err=True)
    if model.windows:
        with torch.no_grad(), trace(model) as routing:
            model(**batch)
    seen = None if call.picture is None else model.seen(call.picture)
    routes.write(files, routing.joined(), model.views(batch), about, seen)


def _note_random(model: Any) -> None:
    """Says where weights are random."""
    report = model.load_report
    made_of = str(model.card.lineage.get("weights", "")) if model.card is not None else ""
    if made_of.startswith("random"):
        typer.echo(f"note: this model's card says that its weights were {made_of}", err=True)
    if report is None or report.random:
        what = f"{report.random} tensors are" if report else "all weights are"
        typer.echo(f"note: {what} random, so the result means nothing", err=True)


def _check_picture(files: Mapping[str, Path], call: Call) -> None:
    if "overlay" in files and call.picture is None:
        wrong = "there is no picture to draw them over"
        raise BadInput(f"cannot draw experts to '{files['overlay']}'", wrong, "--trace routing.json")


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


def _echo_routing(layers: Sequence[Mapping[str, Any]], files: Mapping[str, Path]) -> None:
    """Experts used per layer, the busiest ones where there are many, and what was written."""
    _echo_layers(layers) if layers else typer.echo("no layer has experts")
    for kind, path in files.items():
        typer.echo(f"{kind}: {path}")


def _echo_layers(layers: Sequence[Mapping[str, Any]]) -> None:
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
