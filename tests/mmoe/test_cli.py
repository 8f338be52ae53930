"""The `mmoe` command: lazy verbs, one style of error, exit codes. The texts are pinned word for word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mmoe import cli

VERBS = '''
"""Verbs of a pretend distribution."""
from typing import Annotated
import typer
from mmoe.errors import UnknownModel

Json = Annotated[bool, typer.Option("--json")]


def hello(who: str, times: Annotated[int, typer.Option(help="How often.")] = 1, as_json: Json = False):
    """Say hello.

    Args:
        who: not for the command line.
    """
    for _ in range(times):
        print("hello", who)
    return 7


def lost(as_json: Json = False):
    """Ask for a model that is not there."""
    raise UnknownModel("no model named 'a'", "did you mean: b", "mmoe list")


def leave():
    """Stop with a code of its own."""
    raise typer.Exit(3)


def interrupt():
    """Do as Ctrl-C does."""
    raise KeyboardInterrupt


def bug():
    """Fail by our own fault."""
    raise ZeroDivisionError("our fault")


group = typer.Typer(help="Make a model from another one.")


@group.command()
def upcycle(name: str):
    """Copy an expert."""
    print("upcycled", name)


single = typer.Typer()
single.command("only")(upcycle)
'''


def entry(name: str, value: str, dist: object = None) -> EntryPoint:
    made = EntryPoint(name, value, cli.GROUP)
    vars(made).update(dist=dist)  # what importlib.metadata does for entry points that it finds
    return made


@pytest.fixture(autouse=True)
def _pretend_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the installed verbs by those above, in a module that no test has imported yet."""
    module = f"pretend_verbs_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(VERBS)
    (tmp_path / f"{module}_heavy.py").write_text("import a_package_nobody_has.part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [entry(name, f"{module}:{name}") for name in ("hello", "lost", "leave", "interrupt", "bug", "nope")]
    found += [entry("convert", f"{module}:group"), entry("single", f"{module}:single")]
    found += [entry("heavy", f"{module}_heavy:run"), entry("gone", "a_module_nobody_wrote.cli:run")]
    monkeypatch.setattr(cli, "entry_points", lambda group: found)


@pytest.fixture
def module(tmp_path: Path) -> str:
    return f"pretend_verbs_{tmp_path.name}".replace("-", "_")


def test_help_lists_verbs_and_imports_none(capsys: pytest.CaptureFixture[str], module: str) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("hello", "convert", "gone", "heavy"))
    assert f"From {module}:hello." in text
    assert module not in sys.modules


def test_no_arguments_and_dash_h_are_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main(["-h"]) == cli.main([]) == 0
    out = capsys.readouterr().out
    assert out.count("Usage: mmoe [OPTIONS] COMMAND [ARGS]...") == 3


def test_our_verbs_come_first_and_have_their_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours:
        name = "mmoe"

    def ours(name: str) -> EntryPoint:
        return entry(name, "zoo.cli:x", Ours())

    found = [entry("aaa", "x:y"), ours("demo"), ours("list"), entry("list", "thief:list")]
    monkeypatch.setattr(cli, "entry_points", lambda group: found)
    assert list(cli.verbs()) == ["list", "demo", "aaa"]
    assert cli.verbs()["list"].value == "zoo.cli:x"
    group = cli.VerbGroup(name="mmoe")
    commands = [group.get_command(None, name) for name in ("list", "aaa", "lsit")]
    assert [command and command.help for command in commands] == [
        "List models, routers and experts.",
        "From x:y.",
        None,
    ]


def test_a_verb_runs_and_its_result_is_not_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hello", "you", "--times", "2"]) == 0
    assert capsys.readouterr().out == "hello you\nhello you\n"


def test_verb_help_stops_before_the_sections_for_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hello", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: mmoe hello [OPTIONS]" in out and "Say hello." in out and "How often." in out
    assert "not for the command line" not in out


@pytest.mark.parametrize("verb", ["convert", "single"])
def test_a_typer_is_a_group_even_with_one_member(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    member = {"convert": "upcycle", "single": "only"}[verb]
    assert cli.main([verb, member, "x"]) == 0
    assert capsys.readouterr().out == "upcycled x\n"
    assert cli.main([verb]) == cli.main([verb, "--help"]) == 0
    bare, asked = capsys.readouterr().out.split("Usage: ")[1:]
    assert bare == asked and member in bare


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["helo", "x"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "error: no verb named 'helo'\n  did you mean: hello\n  try: mmoe --help\n"


def test_unknown_member_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "upcylce"]) == 2
    assert capsys.readouterr().err == (
        "error: no verb named 'convert upcylce'\n  did you mean: upcycle\n  try: mmoe convert --help\n"
    )


@pytest.mark.parametrize(
    ("args", "first", "fix"),
    [
        (["hello"], "Missing argument", "mmoe hello --help"),
        (["hello", "x", "--tims", "2"], "No such option: --tims", "mmoe hello --help"),
        (["hello", "x", "--times", "many"], "Invalid value for '--times'", "mmoe hello --help"),
        (["convert", "upcycle"], "Missing argument", "mmoe convert upcycle --help"),
        (["--wrong"], "No such option: --wrong", "mmoe --help"),
    ],
)
def test_wrong_options_have_the_same_form(
    args: list[str], first: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith(f"error: {first}") and streams.err.endswith(f"\n  try: {fix}\n")
    assert cli.main([*args, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UsageError" and error["fix"] == fix


def test_a_user_error_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lost"]) == 2
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "error: no model named 'a'\n  did you mean: b\n  try: mmoe list\n")


def test_json_errors_are_objects_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lost", "--json"]) == 2
    streams = capsys.readouterr()
    assert streams.err == ""
    assert json.loads(streams.out) == {
        "error": {
            "type": "UnknownModel",
            "asked": "no model named 'a'",
            "wrong": "did you mean: b",
            "fix": "mmoe list",
            "message": "no model named 'a'\n  did you mean: b\n  try: mmoe list",
        }
    }
    assert cli.main(["lst", "--", "--json"]) == 2, "after -- it is an argument"
    assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMOE_DEBUG", "1")
    assert cli.main(["lost"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in lost" in err and "error: no model named 'a'" in err


def test_our_own_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError, match="our fault"):
        cli.main(["bug"])


def test_exit_codes_of_verbs_and_of_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["leave"]) == 3
    assert cli.main(["interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("verb", "wrong", "fix"),
    [
        ("gone", "there is no module 'a_module_nobody_wrote'", "--upgrade mmoe"),
        ("heavy", "it needs the module 'a_package_nobody_has', which is not installed", "a_package_nobody_has"),
        ("nope", "there is no 'nope' in the module", "--upgrade mmoe"),
    ],
)
def test_a_verb_that_cannot_be_loaded(verb: str, wrong: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot start 'mmoe {verb}'\n  {wrong}")
    assert "pip install" in err and err.endswith(f"{fix}\n")


def run(*args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, with the verbs that are installed."""
    env = {key: value for key, value in os.environ.items() if key != "MMOE_DEBUG"}
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "mmoe"]
    return subprocess.run([*command, *args], capture_output=True, text=True, env=env, timeout=60)


def test_real_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "rich.table", "yaml", "zoo", "train", "demos", "gradio")
    code = f"import sys, mmoe.cli; mmoe.cli.main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    assert "list" in done.stdout and "doctor" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_real_wrong_verb() -> None:
    done = run("lsit")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no verb named 'lsit'\n  did you mean: list\n  try: mmoe --help\n"


def test_real_reader_that_goes_away() -> None:
    """`mmoe --help | true` prints no traceback, also not from the interpreter's exit."""
    with subprocess.Popen([sys.executable, "-m", "mmoe", "--help"], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_real_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"mmoe {version('mmoe')}\n"
