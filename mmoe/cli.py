"""The `mmoe` command: a host that finds its verbs by entry point and imports only the one that runs.

A verb is an entry point of the group `mmoe.commands`; any distribution can add one. It names a function with
typer annotations, or a `typer.Typer` for a verb with verbs of its own:

    [project.entry-points."mmoe.commands"]
    list = "zoo.cli:list_models"
    convert = "zoo.convert:app"

Drawing `mmoe --help` therefore imports neither torch nor any verb. Exit codes: 0 done, 1 failed, 2 a user's
mistake, 130 interrupted, 141 the reader of a pipe went away. `MMOE_DEBUG=1` shows tracebacks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from mmoe import __version__
from mmoe.errors import BadInput, MissingExtra, MmoeError, UnknownVerb, did_you_mean, package_of

GROUP = "mmoe.commands"

# One line for each of our verbs, in the order of the help page, so that drawing it imports none of them.
_HELP = {
    "list": "List models, routers and experts.",
    "info": "Show a model's card: sizes, licences, weights, metrics.",
    "predict": "Run a model on an input and show what its router did.",
    "train": "Train a model with a recipe.",
    "eval": "Measure a model on a data set.",
    "recipe": "List, copy, check and compare recipes, and fetch their data.",
    "convert": "Make a model from another one or from the authors' weights.",
    "bench": "Time the MoE layer and a bundled model on this machine.",
    "demo": "Open the gallery in a browser.",
    "tour": "Walk through the zoo in a few minutes.",
    "fetch": "Download a model's weights for a machine without a network.",
    "doctor": "Check the installation, the caches and the network.",
}

# Where the part of a docstring starts that is for readers of the code.
_CODE_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Examples?|Notes?):|^>>> ", re.MULTILINE)


def verbs() -> dict[str, EntryPoint]:
    """The installed verbs by name: ours in the order of the help page, then others; ours win a name."""
    ours_last = sorted(entry_points(group=GROUP), key=_is_ours)
    found = {entry.name: entry for entry in ours_last}
    known = [name for name in _HELP if name in found]
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}


def _is_ours(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == "mmoe"


class VerbGroup(TyperGroup):
    """A command group whose members are entry points: listed without an import, loaded when run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names only; nothing is imported."""
        return list(verbs())

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """A bare command that carries its line of help; asked for every verb while help is drawn."""
        entry = verbs().get(cmd_name)
        if entry is None:
            return None
        text = _HELP.get(cmd_name) if _is_ours(entry) else None
        return TyperCommand(name=cmd_name, help=text or f"From {entry.value}.", rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str, TyperCommand | TyperGroup, list[str]]:
        """Imports the one verb that runs."""
        name, rest = args[0], args[1:]
        entry = verbs().get(name)
        if entry is None:
            raise UnknownVerb(f"no verb named {name!r}", did_you_mean(name, verbs()), "mmoe --help")
        command = as_command(name, _load(entry))
        if isinstance(command, TyperGroup):
            _check_subverb(ctx, command, rest)
            if not rest and not command.invoke_without_command:
                rest = ["--help"]
        return name, command, rest


def _load(entry: EntryPoint) -> Any:
    asked = f"cannot start 'mmoe {entry.name}'"
    pip = f"{os.path.basename(sys.executable)} -m pip install"
    update = f"{pip} --upgrade {entry.dist.name if entry.dist else 'mmoe'}"
    try:
        module = import_module(entry.module)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing == entry.module or entry.module.startswith(f"{missing}."):
            raise MmoeError(asked, f"there is no module {missing!r} to load {entry.value!r} from", update) from error
        wrong = f"it needs the module {missing!r}, which is not installed"
        raise MissingExtra(asked, wrong, f"{pip} {package_of(missing)}") from error
    try:
        return functools.reduce(getattr, entry.attr.split("."), module)
    except AttributeError as error:
        raise MmoeError(asked, f"there is no {entry.attr!r} in the module {entry.module!r}", update) from error


def as_command(name: str, verb: Any) -> TyperCommand | TyperGroup:
    """Makes the command for a loaded verb.

    Args:
        name: the verb's name on the command line.
        verb: a function with typer annotations or a `typer.Typer`, which always becomes a group.

    >>> def greet(who: str):
    ...     '''Say hello.
    ...
    ...     Args:
    ...         who: a name.
    ...     '''
    >>> as_command("greet", greet).help
    'Say hello.'
    """
    if isinstance(verb, typer.Typer):
        command: Any = typer.main.get_group(verb)
    else:
        app = typer.Typer(add_completion=False)
        app.command(name)(verb)
        command = typer.main.get_command(app)
    command.name = name
    _plain(command)
    return command


def _plain(command: Any) -> None:
    """Keeps rich out of help pages and the sections for code readers out of their text."""
    command.rich_markup_mode = None
    command.help = _CODE_SECTION.split(command.help or "")[0].rstrip() or None
    for member in getattr(command, "commands", {}).values():
        _plain(member)


def _check_subverb(ctx: Any, group: TyperGroup, rest: list[str]) -> None:
    known = group.list_commands(ctx)
    if rest and not rest[0].startswith("-") and rest[0] not in known:
        asked = f"no verb named '{group.name} {rest[0]}'"
        raise UnknownVerb(asked, did_you_mean(rest[0], known), f"mmoe {group.name} --help")


app = typer.Typer(
    cls=VerbGroup,
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def host(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """A zoo of multimodal mixture-of-experts models: find, run, train and change them.

    Start with `mmoe list`, `mmoe info NAME` and `mmoe demo`; `mmoe VERB --help` tells more.
    """
    if version:
        typer.echo(f"mmoe {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: the words after `mmoe`; those of this process by default.

    >>> main(["--version"])
    mmoe 0.1.0
    0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # `mmoe list >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    try:
        code = _run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `mmoe list | head`
        _drop_output()
        return 141
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    return code


def _drop_output() -> None:
    """What is still buffered must not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str]) -> int:
    command = typer.main.get_group(app)
    try:
        with command.make_context("mmoe", args[:]) as ctx:
            command.invoke(ctx)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except MmoeError as error:
        return _report(error, error, args)
    except BrokenPipeError:
        raise
    except OSError as error:  # a file that may not be read, a disk that is full
        about = f"'{error.filename}'" if error.filename else "a file"
        wrong = error.strerror or str(error)
        return _report(error, BadInput(f"cannot use {about}", wrong, "another file or folder, or free space"), args)
    except typer.TyperException as error:  # wrong options and arguments
        where = getattr(getattr(error, "ctx", None), "command_path", "mmoe")
        return _report(error, _UsageError(error.format_message(), "", f"{where} --help"), args)
    return 0


class _UsageError(MmoeError):
    """What typer says about options and arguments, in our form."""

    def as_dict(self) -> dict[str, str]:
        return {**super().as_dict(), "type": "UsageError"}


def _report(raised: BaseException, error: MmoeError, args: list[str]) -> int:
    """Prints an error for a person, or for a program after `--json`; returns the exit code."""
    if os.environ.get("MMOE_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(raised)
    if "--json" in args[: args.index("--") if "--" in args else None]:
        try:
            typer.echo(json.dumps({"error": error.as_dict()}, ensure_ascii=False, indent=2))
            return 2
        except BrokenPipeError:
            raise
        except OSError:  # it may be the output that failed
            _drop_output()
    if not _first_to_tell(str(error)):
        return 2
    colour = None if "NO_COLOR" not in os.environ else False
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True, color=colour)
    return 2


def _first_to_tell(text: str) -> bool:
    """Of several processes that a launcher started, one tells what all would."""
    folder = os.environ.get("MMOE_ERRORS")
    if folder is None:
        return True
    name = hashlib.sha256(text.encode()).hexdigest()
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # better told twice than never
        pass
    return True
