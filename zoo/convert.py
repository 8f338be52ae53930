"""The verbs `mmoe convert ...`: models from dense models, from the authors' weights, and back.

Every family that has a `zoo/<family>/convert.py` takes part: `from_original(state) -> (config, state)`,
`to_original(state)` and `assumed(config)` (what files do not say) for the authors' files; `upcycle(dense, ...)`,
`lengthen(dense, ...)` and `difference(dense, mixture)` where a dense model can become a mixture. torch is imported
when a verb runs.
"""

from __future__ import annotations

import inspect
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmoe.errors import BadInput, BadOverride, LoadMismatch, Refused, did_you_mean
from zoo.card import Card
from zoo.cli import Json, parse_settings, print_json
from zoo.registry import list_models

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.state import State

app = typer.Typer(help="Make a model from another one or from the authors' weights.")

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new model.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that has files.")]

_NOTE = "mmoe"  # key in the metadata of a .safetensors file
_ROUNDING = 1e-4  # largest relative difference that counts as rounding in fp32


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A dense model to start from, and what its card has to say about it."""

    model: Any
    name: str
    licence: str
    components: tuple[Mapping[str, str], ...] = field(default_factory=tuple)
    weights: str = ""  # "random", or what the model's card says about them


@app.command()
def upcycle(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="open_clip:ARCH/TAG, a model's name, or a folder of a dense model.")
    ],
    out: Out,
    experts: Annotated[int, typer.Option(help="Experts per layer, copies of the dense block.")] = 4,
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token. [default: 2, or 1 with a single expert]")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only the last N blocks of each tower. [default: all]")] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option("--source", help="Expert i from the i-th of these (folder, file or name); replaces --experts."),
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Stretch the text positions, 77 to 248 say.")] = None,
    noise: Annotated[float, typer.Option(help="Relative noise on the copies.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of routers, noise and random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: fp32, bf16 or fp16.")] = "fp32",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a dense model's feed-forward blocks into experts.

    With one source the new model computes what the dense one does, which is measured. With several, each gives one
    expert and SOURCE gives the rest.

    \b
    mmoe convert upcycle clip_tiny --experts 4 --out my_moe
    mmoe convert upcycle open_clip:ViT-B-32-quickgelu/openai --layers 6 --out my_moe
    mmoe convert upcycle stage0 --source stage0 --source stage1 --out my_moe
    """
    out = _check_folder(out, force)
    begin = time.perf_counter()
    import torch

    from zoo.loading import pick_dtype

    saved_dtype = pick_dtype(dtype)
    torch.manual_seed(seed)
    start = _open(source)
    dense, convert = start.model, _family(start.model.family, "upcycle")
    others = [_open(one, like=dense) for one in sources or []]
    for one in others:
        _note_differences(one, dense)
    before = dense.num_params()
    if context_length is not None:
        dense = convert.lengthen(dense, context_length=context_length)
    states = [one.model.state_dict() for one in others] or None
    model = convert.upcycle(dense, experts, top_k=top_k, moe_layers=layers, sources=states, noise=noise)
    difference = None if states else convert.difference(dense, model)
    if difference is not None and not noise and not difference <= _ROUNDING:
        wrong = f"their outputs differ by {difference:.1e} of the largest, which is more than rounding"
        raise Refused("cannot upcycle: the mixture is not the dense model at the start", wrong, "open an issue")
    options: dict[str, Any] = {"experts": model.config.num_experts, "top_k": model.config.top_k, "layers": layers}
    options |= {"sources": sources}
    options["weights"] = next((one.weights for one in (start, *others) if one.weights.startswith("random")), None)
    options |= {"context_length": context_length, "noise": noise or None, "seed": seed, "dtype": dtype}
    lineage = {"verb": "upcycle", "source": source, **{k: v for k, v in options.items() if v not in (None, [])}}
    model.card = _card(out, model, lineage, [start, *others])
    model.save(out, dtype=saved_dtype, card=model.card)
    told = {"difference": difference, "rounded_to": None if saved_dtype == torch.float32 else dtype}
    told["seconds"] = round(time.perf_counter() - begin, 1)
    _tell(out, model, asdict(before), told, as_json)


@app.command()
def from_original(
    family: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Family that the weights belong to, such as clip_moe.")
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The authors' state dict, .pt or .safetensors, or a folder of parts.")
    ],
    out: Out,
    over: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="File or folder whose tensors stand over those: adapters, parts; in order."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, which files do not say.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the config; may be repeated.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert the authors' weights to a folder that loads.

    \b
    mmoe convert from-original clip_moe clip-moe-4-2-sharegpt4v.pt --top-k 2 --out clip_moe_l14
    mmoe convert from-original uni_moe speech-base --over speech-e2 --out uni_moe_speech
    """
    out = _check_folder(out, force)
    begin = time.perf_counter()
    overrides = parse_settings(settings or [])
    convert = _family(family, "from_original")

    from zoo.base import with_base
    from zoo.config import make_config
    from zoo.loading import family_class
    from zoo.released import read_released
    from zoo.state import load_state

    paths = [str(path) for path in (file, *(over or []))]
    takes = inspect.signature(convert.from_original).parameters
    if top_k is not None and "top_k" not in takes:
        raise BadOverride(f"--top-k for {family}", "its files say how many experts a token uses", "leave it out")
    asked = {**overrides, **({} if top_k is None else {"top_k": top_k})}
    if asked != {**asked, **overrides}:
        wrong = "they are the same option"
        raise BadOverride(f"--top-k {top_k} with --set top_k={overrides['top_k']}", wrong, f"--top-k {top_k}")
    given = {**_read_note(file.expanduser(), family), **asked}
    options: dict[str, Any] = {} if top_k is None else {"top_k": top_k}
    if "like" in takes:
        options = {"like": make_config(family_class(family).config_class, given, family, "--set {}=...")}
    try:
        config, state = convert.from_original(read_released(paths), **options)
    except (RuntimeError, TypeError, IndexError) as error:  # tensors of shapes that no model has
        wrong = str(error).splitlines()[0]
        raise LoadMismatch(f"convert this checkpoint to {family}", wrong, f"the state dict of a {family}") from error
    config = make_config(type(config), {**asdict(config), **given}, family, "--set {}=...")
    model = family_class(family)(config).eval()
    state, _, _ = with_base(model, state)
    model.load_report = load_state(model, state, str(file))
    assumed = {key: value for key, value in convert.assumed(config).items() if key not in given}
    lineage = {"verb": "from-original", **_sources(paths), **asked, **assumed}
    model.card = _card(out, model, lineage, [_Source(model=model, name=file.name, licence="unknown")])
    model.save(out, card=model.card)
    told = {"matched": len(model.load_report.matched), "assumed": assumed}
    _tell(out, model, None, {**told, "seconds": round(time.perf_counter() - begin, 1)}, as_json)


@app.command()
def to_original(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's name, or a folder that a model was saved in.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, .safetensors or .pt.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model's weights under the authors' names.

    They are read back and compared. A .safetensors file also carries the options that names and shapes do not show,
    for the way back.

    \b
    mmoe convert to-original clip_moe_tiny --out original.safetensors
    """
    out = out.expanduser()
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        raise BadInput(f"cannot write weights to '{out}'", "the suffix names the format", "--out original.safetensors")
    if out.exists() and not force:
        raise BadInput(f"'{out}' is there already", "it would be replaced", "add --force, or give another file")
    from safetensors.torch import save_file

    from mmoe.atomic import atomic_path, torch_save
    from zoo.loading import load

    found = load(model, device="cpu")
    convert = _family(found.family, "to_original")
    convert.check_expressible(found.config)
    state = {name: value.detach().contiguous() for name, value in convert.to_original(found.state_dict()).items()}
    guessed, again = convert.from_original(state)
    if "like" in inspect.signature(convert.from_original).parameters:
        _, again = convert.from_original(state, like=found.config)
    if not _same(again, found.state_dict()):
        raise Refused(
            f"cannot write {model!r} under the authors' names", "it does not survive the way back", "model.save(folder)"
        )
    if out.suffix == ".safetensors":
        with atomic_path(out) as temporary:
            save_file(state, temporary, metadata={"format": "pt", **_note(found)})
    else:
        torch_save(state, out)
    here, there = convert.assumed(found.config), convert.assumed(guessed)
    differ = {key: value for key, value in here.items() if there.get(key) != value}
    if as_json:
        told = {"out": str(out), "tensors": len(state), "bytes": out.stat().st_size, "round_trip": "exact"}
        print_json({**told, "not_in_the_file": differ})
        return
    if differ:
        theirs = ", ".join(f"{key}={there.get(key)}" for key in differ)
        written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in differ.items()}
        back = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in written.items())
        note = f"their code takes {theirs} for this file and computes something else; the way back needs {back}"
        typer.echo(f"note: {note}" + (", which the file carries" if out.suffix == ".safetensors" else ""), err=True)
    typer.echo(f"{out}: {len(state)} tensors, {out.stat().st_size / 1e6:,.1f} MB; read back they are equal bit for bit")


def _sources(paths: Sequence[str]) -> dict[str, str]:
    """What a model was converted from: names, and the checksum where it is one file."""
    from zoo.packages import file_sha256

    name, only = " and ".join(Path(path).name for path in paths), Path(paths[0]).expanduser()
    return {"source": name, **({"sha256": file_sha256(only)} if len(paths) == 1 and only.is_file() else {})}


def _note(model: Model) -> dict[str, str]:
    """Metadata for a file in the authors' layout, from which `_read_note` gets the options back."""
    return {_NOTE: json.dumps({"family": model.family, "config": asdict(model.config)})}


def _read_note(path: Path, family: str) -> dict[str, Any]:
    """The config that `_note` put into a file; empty where there is none of this family."""
    from zoo.state import read_metadata

    try:
        told = json.loads(read_metadata(path)[_NOTE])
        config = told["config"] if told["family"] == family else {}
    except (KeyError, TypeError, ValueError):  # no note, or another program's
        return {}
    return config if isinstance(config, dict) else {}


def _check_folder(out: Path, force: bool) -> Path:
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise BadInput(f"'{out}' is no folder", "a model is saved as a folder", "--out DIR")
    if not force and out.is_dir() and any(out.iterdir()):
        wrong = "files in it would be replaced"
        raise BadInput(f"the folder '{out}' is not empty", wrong, "add --force, or give another folder")
    return out


def _family(family: str, function: str) -> Any:
    """The converters of a family; its library is imported here."""
    from zoo.loading import family_class

    known = {found.family for found in list_models()}
    if family not in known:
        raise BadInput(f"no model family {family!r}", did_you_mean(family, known), "mmoe list")
    family_class(family)
    convert = import_module(f"zoo.{family}.convert")
    if not hasattr(convert, function):
        has = [name for name in ("upcycle", "from_original", "to_original") if hasattr(convert, name)]
        verbs = ", ".join(name.replace("_", "-") for name in has) or "nothing"
        raise Refused(f"cannot {function.replace('_', '-')} a {family}", f"it can: {verbs}", "mmoe convert --help")
    return convert


def _open(source: str, like: Model | None = None) -> _Source:
    """A dense model from open_clip, from the zoo, from a folder, or (`like` another) from a file."""
    if source.startswith("open_clip:"):
        return _open_clip(source.removeprefix("open_clip:"))
    from zoo.loading import load

    if source.startswith(("timm:", "transformers:", "hf:")):
        fix = "sparse, report = mmoe.upcycle(model, num_experts=4)   (any torch model, in Python)"
        raise Refused(f"cannot upcycle {source!r} to a folder", "only open_clip's CLIPs become models of the zoo", fix)
    if like is not None and Path(source).is_file():
        return _open_file(Path(source), like)
    model = load(source, device="cpu")
    found = model.card
    if getattr(model.config, "num_experts", 0):
        dense = (card.name for card in list_models(family=model.family) if not card.moe)
        fix = f"mmoe convert upcycle {next(dense, 'open_clip:ViT-B-32-quickgelu/openai')} --out DIR"
        raise Refused(f"cannot upcycle {source!r}", "it is a mixture already; give a dense model", fix)
    if found is None:
        return _Source(model=model, name=source, licence="unknown")
    weights = str(found.lineage.get("weights", ""))
    licence, parts = found.whole_licence, found.components
    return _Source(model=model, name=source, licence=licence, components=parts, weights=weights)


def _open_clip(name: str) -> _Source:
    convert = _family("clip_moe", "from_open_clip")
    architecture, _, tag = name.partition("/")
    model = convert.from_open_clip(name)
    if not tag:
        tags = convert.open_clip_tags(architecture)
        known = f"; trained weights: {', '.join(f'open_clip:{architecture}/{t}' for t in tags[:3])}" if tags else ""
        text = f"ALL WEIGHTS ARE RANDOM: 'open_clip:{name}' names no weights{known}"
        typer.echo(typer.style(f"note: {text}", fg="yellow", bold=True), err=True)
    licence, source = convert.open_clip_licence(architecture, tag)
    what = f"open_clip {architecture}, " + (f"weights {tag}" if tag else "architecture with random weights")
    part = {"name": what, "licence": licence, "source": source}
    licence = licence if tag else "Apache-2.0"
    weights = "" if tag else "random"
    return _Source(model=model, name=f"open_clip:{name}", licence=licence, components=(part,), weights=weights)


def _open_file(path: Path, like: Model) -> _Source:
    """Weights of a dense model of the same shape, in our layout or the authors'."""
    from zoo.state import load_state, read_state

    state: State = read_state(path)
    if not set(state) & set(like.state_dict()):
        _, state = _family(like.family, "from_original").from_original(state)
    model = type(like)(like.config)
    load_state(model, state, str(path))
    return _Source(model=model, name=path.name, licence="unknown")


def _note_differences(other: _Source, dense: Model) -> None:
    """Experts of one model were trained around its other weights, so these should be the same everywhere."""
    own, theirs = dense.state_dict(), other.model.state_dict()
    differ = [name for name in own if ".mlp." not in name and (name not in theirs or not own[name].equal(theirs[name]))]
    if differ:
        text = f"note: {other.name} differs from SOURCE in {len(differ)} tensors outside its experts; SOURCE's are used"
        typer.echo(typer.style(text, fg="yellow"), err=True)


def _same(one: State, other: State) -> bool:
    return set(one) == set(other) and all(value.equal(other[name]) for name, value in one.items())


def _card(out: Path, model: Model, lineage: Mapping[str, Any], sources: Sequence[_Source]) -> Card:
    """A card for a new model: what its family shares, its own sizes, and where it comes from."""
    base = list_models(family=model.family)[0]
    parts = [{"name": one.name, "licence": one.licence, "source": one.name} for one in sources if not one.components]
    parts += [dict(part) for one in sources for part in one.components]
    licences = list(dict.fromkeys(one.licence for one in sources))
    return replace(
        base,
        **model.facts(),
        name=out.resolve().name,
        summary=f"Made by `mmoe convert {lineage['verb']}` from {lineage['source']}.",
        licence="unknown" if "unknown" in licences else " AND ".join(licences),
        components=tuple(part for i, part in enumerate(parts) if part not in parts[:i]),
        weights={},
        metrics=(),
        routing={},
        lineage=lineage,
        notes=(),
    )


def _tell(out: Path, model: Model, before: Mapping[str, int] | None, told: Mapping[str, Any], as_json: bool) -> None:
    after = model.num_params()
    assert model.card is not None
    if as_json:
        sizes = {"before": before, "after": asdict(after)}
        print_json({"out": str(out), **sizes, **told, "card": model.card.as_dict()})
        return
    if before is not None:
        typer.echo(f"before       {before['total']:>15,} parameters, {before['active']:>15,} active")
    typer.echo(f"{'after' if before else 'converted':<12} {after.total:>15,} parameters, {after.active:>15,} active")
    if told.get("difference") is not None:
        rounded = f", before rounding to {told['rounded_to']}" if told.get("rounded_to") else ""
        typer.echo(
            f"difference   {told['difference']:.1e} of the largest output, on random pictures and texts{rounded}"
        )
    if told.get("assumed"):
        assumed = ", ".join(f"{key}={value}" for key, value in told["assumed"].items())
        typer.echo(f"assumed      {assumed} (not in the file; change it with --set)")
    typer.echo(f"licence      {model.card.licence}")
    typer.echo(f"written      {out} in {told['seconds']} s")
    typer.echo(f"load it      zoo.load({str(out)!r})")
