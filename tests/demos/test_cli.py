"""`mmoe demo` before it serves: ports and names, without importing gradio or torch."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from demos.cli import PORT, free_port
from mmoe.cli import main
from mmoe.errors import BadInput


@pytest.fixture
def taken() -> socket.socket:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held


def test_a_taken_port_is_skipped_unless_it_was_asked_for(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    if port < 65535:
        assert free_port("127.0.0.1", port, tried=50) > port
    with pytest.raises(BadInput, match="the port is taken") as error:
        free_port("127.0.0.1", port, tried=1)
    assert error.value.fix == f"mmoe demo --port {min(port + 1, 65535)}"
    assert free_port("127.0.0.1") >= PORT


def test_an_address_of_another_machine() -> None:
    with pytest.raises(BadInput, match=r"cannot listen on 192\.0\.2\.1"):
        free_port("192.0.2.1")


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["clip_moe_tini"], "did you mean: clip_moe_tiny"), (["--port", "70000"], "less than or equal to 65535")],
)
def test_mistakes_are_told_at_once(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--no-browser", *words]) == 2
    assert reason in capsys.readouterr().err


def test_the_verbs_are_light() -> None:
    code = (
        "import sys, demos.cli, demos.tour; print([m for m in ('torch', 'gradio', 'rich.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_gallery_that_a_script_started_in_the_background(ending: signal.Signals) -> None:
    ignoring = "trap '' INT; exec \"$@\""
    start = ["sh", "-c", ignoring, "sh", sys.executable, "-u", "-m", "mmoe", "demo", "--no-browser"]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as gallery:
        assert gallery.stdout is not None
        try:
            assert "runs at" in gallery.stdout.readline()
            gallery.send_signal(ending)
            assert gallery.wait(60) == 0
            assert gallery.stdout.read().strip() == "stopped"
        finally:
            gallery.kill()
